"""A policy in two: the backbone up to the last hidden states, and the LM head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

from torch import Tensor
from torch.func import jvp

from fx_influence.batching.microbatch import TOKENS_PER_CHUNK, Part, parts
from fx_influence.batching.prefix_packing import parts_by_prompt
from fx_influence.policy.forward_ad import ForwardMode
from fx_influence.types import Apply, Batch, Params


class Halves(NamedTuple):
    """A policy in two: ``features`` up to the vocabulary, and the ``head`` that turns them into logits.

    ``features(params, part)``: (b, L, d), for plain and reverse passes. ``eager(params, input_ids, attention_mask)``:
    the same, never compiled, for passes that watch its operations. ``traced(params, part)``: for use inside vmap and
    jvp, of a part without a layout. ``pushforward(params, tangent, part, outputs)``: features and their tangent;
    ``outputs``: of the linear maps in ``features`` of the same part, see ``forward_mode.Tape``, or None.
    ``head(params, features)``: (..., V). ``in_head``: the names of the parameters that it takes. ``vocab_size``: V,
    None where it is not known.
    ``aligned``: positions come from the attention mask and no token sees a later one, so that rows may be moved to
    begin in column 0 and cut after their last token. ``shares``: tokens meet in attention alone, so that a prompt goes
    through the model once for all rows that have it, up to ``tokens`` at a time. ``compiled``: passes are.
    ``loss_scale``: what gradients inside are times, so that none vanishes in float16. A plain ``apply`` is all
    features, and its head does nothing.
    """

    features: Callable[[Params, Part], Tensor]
    eager: Callable[[Params, Tensor, Tensor], Tensor]
    traced: Callable[[Params, Part], Tensor]
    pushforward: Callable[[Params, Params, Part, Sequence[Tensor] | None], tuple[Tensor, Tensor]]
    head: Callable[[Params, Tensor], Tensor]
    in_head: frozenset[str]
    vocab_size: int | None
    aligned: bool
    shares: bool
    tokens: int
    compiled: bool
    loss_scale: float = 1.0

    def parts(self, batch: Batch, chunk_size: int | None) -> list[Part]:
        """The batch in parts for passes that need no row for itself: with every prompt once, where that saves."""
        found = parts_by_prompt(batch, chunk_size, self.tokens) if self.shares else None
        return parts(batch, chunk_size, self.aligned) if found is None else found


def halves(apply: Apply) -> Halves:
    """Of a ``Policy`` its own; of any other ``apply`` itself and nothing."""
    own = getattr(apply, "halves", None)
    if isinstance(own, Halves):
        return own

    def features(params: Params, part: Part) -> Tensor:
        return apply(params, part.input_ids, part.attention_mask)

    def pushed(params: Params, tangent: Params, part: Part, outputs: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
        mode = ForwardMode(outputs)

        def moved(params: Params) -> Tensor:
            with mode:
                return features(params, part)

        # Not by pushforward: a function may have a jvp of its own inside, and its levels do not nest.
        both = cast(tuple[Tensor, Tensor], jvp(moved, (params,), (tangent,)))
        return both if mode.outputs_fit else pushed(params, tangent, part, None)

    own = features, apply, features, pushed, lambda params, x: x.view_as(x)
    return Halves(*own, frozenset(), None, aligned=False, shares=False, tokens=TOKENS_PER_CHUNK, compiled=False)
