"""A policy in two: the backbone up to the last hidden states, and the LM head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor
from torch.func import jvp

from fx_influence.batching.microbatch import TOKENS_PER_CHUNK, MicroBatch, micro_batches
from fx_influence.batching.prefix_packing import packed_micro_batches
from fx_influence.core.tree import full_tangent
from fx_influence.policy.modes.forward_ad import ForwardMode
from fx_influence.policy.modes.tangents_by_group import GroupedTangents
from fx_influence.types import Apply, Batch, Params

GroupedJvp = Callable[[Params, GroupedTangents, MicroBatch, Sequence[Tensor] | None], tuple[Tensor, Tensor]]

MAX_LOGITS = 2**25
"""Logits that exist at once: 128 MiB of float32, and up to four times that with their derivatives."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SplitPolicy:
    """A policy in two: a ``backbone`` up to the last hidden states, and a ``head`` that turns them into logits.

    A plain ``apply`` is all backbone, and its head returns its input.

    Attributes:
        backbone: ``backbone(params, micro_batch)`` -> hidden states (b, L, d), for plain and reverse-mode passes.
        backbone_eager: ``backbone_eager(params, input_ids, attention_mask)``, the same and never compiled, for passes
            that record its operations.
        backbone_vmap: ``backbone_vmap(params, micro_batch)``, for use inside vmap and jvp, on a micro-batch without a
            layout.
        backbone_jvp: ``backbone_jvp(params, tangent, micro_batch, outputs)`` -> hidden states and their tangent.
            ``outputs`` are those of the linear layers in ``backbone`` on the same micro-batch, from a
            ``LinearOutputCache``, or None.
        backbone_grouped_jvp: ``backbone_grouped_jvp(params, tangents, micro_batch, outputs)``, the same with a
            direction for each group of tokens, over their scale; None where there is no such pass.
        head: ``head(params, hidden)`` -> logits (..., V).
        head_parameters: names of the parameters that the head takes.
        vocab_size: V, or None where it is not known.
        left_alignable: whether positions come from the attention mask and no token sees a later one, so that rows may
            be moved to begin in column 0 and cut after their last token.
        prefix_shareable: whether tokens meet in attention alone, so that a prompt goes through the model once for all
            rows that begin with it, up to ``tokens_per_pass`` tokens at a time.
        tokens_per_pass: largest number of tokens in a packed row.
        compiled: whether the passes go through ``torch.compile``.
        loss_scale: factor on the gradients inside, so that none vanishes in float16.
        max_logits: number of logits that the LM head forms at once.
    """

    backbone: Callable[[Params, MicroBatch], Tensor]
    backbone_eager: Callable[[Params, Tensor, Tensor], Tensor]
    backbone_vmap: Callable[[Params, MicroBatch], Tensor]
    backbone_jvp: Callable[[Params, Params, MicroBatch, Sequence[Tensor] | None], tuple[Tensor, Tensor]]
    head: Callable[[Params, Tensor], Tensor]
    backbone_grouped_jvp: GroupedJvp | None = None
    head_parameters: frozenset[str] = frozenset()
    vocab_size: int | None = None
    left_alignable: bool = False
    prefix_shareable: bool = False
    tokens_per_pass: int = TOKENS_PER_CHUNK
    compiled: bool = False
    loss_scale: float = 1.0
    max_logits: int = MAX_LOGITS

    def micro_batches(self, batch: Batch, chunk_size: int | None) -> list[MicroBatch]:
        """Return the micro-batches of a batch, for passes that do not need each rollout in a row of its own.

        Rows that begin with one prompt are packed, where that saves tokens. ``chunk_size``: rows at a time, None to
        choose by size.
        """
        packed = packed_micro_batches(batch, chunk_size, self.tokens_per_pass) if self.prefix_shareable else None
        return micro_batches(batch, chunk_size, self.left_alignable) if packed is None else packed


def split_policy(apply: Apply) -> SplitPolicy:
    """Return the backbone/head split; a plain ``apply`` is all backbone, with a head that returns its input."""
    split = getattr(apply, "split", None)
    if isinstance(split, SplitPolicy):
        return split

    def backbone(params: Params, micro_batch: MicroBatch) -> Tensor:
        return apply(params, micro_batch.input_ids, micro_batch.attention_mask)

    def backbone_jvp(
        params: Params, tangent: Params, micro_batch: MicroBatch, outputs: Sequence[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        mode = ForwardMode(outputs)

        def with_rules(params: Params) -> Tensor:
            with mode:
                return backbone(params, micro_batch)

        # forward_mode_jvp would not do: a function may have a jvp of its own inside, and dual levels do not nest.
        both = cast(tuple[Tensor, Tensor], jvp(with_rules, (params,), (full_tangent(tangent, params),)))
        return both if mode.outputs_fit else backbone_jvp(params, tangent, micro_batch, None)

    return SplitPolicy(
        backbone=backbone,
        backbone_eager=apply,
        backbone_vmap=backbone,
        backbone_jvp=backbone_jvp,
        head=lambda params, hidden: hidden.view_as(hidden),
    )
