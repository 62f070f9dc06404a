"""A policy in two: the backbone up to the last hidden states, and the LM head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

from torch import Tensor
from torch.func import jvp

from fx_influence.batching.microbatch import TOKENS_PER_CHUNK, MicroBatch, micro_batches
from fx_influence.batching.prefix_packing import packed_micro_batches
from fx_influence.policy.modes.forward_ad import ForwardMode
from fx_influence.types import Apply, Batch, Params


class SplitPolicy(NamedTuple):
    """A policy in two: ``features`` up to the vocabulary, and the ``head`` that turns them into logits.

    ``features(params, part)``: (b, L, d), for plain and reverse passes. ``eager(params, input_ids, attention_mask)``:
    the same, never compiled, for passes that watch its operations. ``backbone_vmap(params, part)``: for use inside vmap
    and jvp, of a part without a layout. ``backbone_jvp(params, tangent, part, outputs)``: features and their tangent;
    ``outputs``: of the linear maps in ``features`` of the same part, see ``forward_mode.LinearOutputCache``, or None.
    ``head(params, features)``: (..., V). ``head_parameters``: the names of the parameters that it takes.
    ``vocab_size``: V, None where it is not known.
    ``left_alignable``: positions come from the attention mask and no token sees a later one, so that rows may be moved
    to begin in column 0 and cut after their last token. ``prefix_shareable``: tokens meet in attention alone, so that a
    prompt goes through the model once for all rows that have it, up to ``tokens`` at a time. ``compiled``: passes are.
    ``loss_scale``: what gradients inside are times, so that none vanishes in float16. A plain ``apply`` is all
    features, and its head does nothing.
    """

    backbone: Callable[[Params, MicroBatch], Tensor]
    backbone_eager: Callable[[Params, Tensor, Tensor], Tensor]
    backbone_vmap: Callable[[Params, MicroBatch], Tensor]
    backbone_jvp: Callable[[Params, Params, MicroBatch, Sequence[Tensor] | None], tuple[Tensor, Tensor]]
    head: Callable[[Params, Tensor], Tensor]
    head_parameters: frozenset[str]
    vocab_size: int | None
    left_alignable: bool
    prefix_shareable: bool
    tokens: int
    compiled: bool
    loss_scale: float = 1.0

    def micro_batches(self, batch: Batch, chunk_size: int | None) -> list[MicroBatch]:
        """The batch in parts for passes that need no row for itself: with every prompt once, where that saves."""
        found = packed_micro_batches(batch, chunk_size, self.tokens) if self.prefix_shareable else None
        return micro_batches(batch, chunk_size, self.left_alignable) if found is None else found


def split_policy(apply: Apply) -> SplitPolicy:
    """Of a ``Policy`` its own; of any other ``apply`` itself and nothing."""
    own = getattr(apply, "split", None)
    if isinstance(own, SplitPolicy):
        return own

    def features(params: Params, part: MicroBatch) -> Tensor:
        return apply(params, part.input_ids, part.attention_mask)

    def pushed(
        params: Params, tangent: Params, part: MicroBatch, outputs: Sequence[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        mode = ForwardMode(outputs)

        def moved(params: Params) -> Tensor:
            with mode:
                return features(params, part)

        # Not by pushforward: a function may have a jvp of its own inside, and its levels do not nest.
        both = cast(tuple[Tensor, Tensor], jvp(moved, (params,), (tangent,)))
        return both if mode.outputs_fit else pushed(params, tangent, part, None)

    own = features, apply, features, pushed, lambda params, x: x.view_as(x)
    return SplitPolicy(
        *own, frozenset(), None, left_alignable=False, prefix_shareable=False, tokens=TOKENS_PER_CHUNK, compiled=False
    )
