"""The JVP of a batch's token values where groups of rows move along directions of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fx_influence.autodiff.directional import micro_batch_jvp
from fx_influence.autodiff.token_values import scatter_to_batch, scored_hidden_states
from fx_influence.batching.microbatch import MicroBatch
from fx_influence.batching.rows import group_of_rows, places_by_group, select_rows
from fx_influence.core.tree import DirectionDifference, promote, unit_direction
from fx_influence.policy.lm_head import head_jvp
from fx_influence.policy.modes.tangents_by_group import GroupedTangents
from fx_influence.policy.split import SplitPolicy
from fx_influence.types import Batch, Params, TokenValues


class GroupedTokenJvp:
    """The JVP of a batch's token values, each group of rows along its own direction, a micro-batch at a time.

    A policy with ``backbone_grouped_jvp`` takes rows of all groups in one forward; another one is given micro-batches
    of one group each.

    Args:
        params: theta, by name.
        batch: rollouts (B, T).
        policy: the split policy.
        temperature: divisor of the logits.
        chunk_size: rows per forward; None chooses by tokens.
        groups: index tensors into the rows; every row is in one of them.
        directions: of the groups, all with the same minuend.
        pending: the micro-batches that will be added, in order.
    """

    def __init__(
        self,
        params: Params,
        batch: Batch,
        policy: SplitPolicy,
        temperature: float,
        chunk_size: int | None,
        groups: Sequence[Tensor],
        directions: Sequence[DirectionDifference],
        pending: Sequence[MicroBatch],
    ) -> None:
        self._params, self._batch, self._policy, self._temperature = params, batch, policy, temperature
        self._directions, self._values = directions, list[tuple[MicroBatch, TokenValues]]()
        self._group, self._scale, self._tangent = -1, 1.0, dict[str, Tensor]()
        group_of_row = group_of_rows(groups, batch)
        self._packed = _packed_micro_batches(batch, policy, chunk_size, groups, group_of_row)
        self._places = iter(_places_by_group(self._packed or pending, group_of_row, len(groups)))

    @property
    def has_own_forward(self) -> bool:
        """Return whether rows share prompts, so that their forward is no other pass's."""
        return bool(self._packed)

    def add(self, micro_batch: MicroBatch, outputs: Sequence[Tensor] | None) -> None:
        """Add the rows of a micro-batch, unless they have a forward of their own.

        Args:
            micro_batch: the tokens to score.
            outputs: linear layers' outputs over the same micro-batch, or None.
        """
        if not self._packed:
            self._add(micro_batch, outputs)

    def values(self) -> TokenValues:
        """Return the derivatives of all rows, (B, T) each."""
        for micro_batch in self._packed:
            self._add(micro_batch, None)
        if not self._values:
            zeros = torch.zeros_like(self._batch.input_ids, dtype=promote(next(iter(self._params.values())).dtype))
            return TokenValues(zeros, zeros)
        return scatter_to_batch(self._values, self._batch)

    @torch.no_grad()
    def _add(self, micro_batch: MicroBatch, outputs: Sequence[Tensor] | None) -> None:
        tokens, scored = next(self._places)
        if self._policy.backbone_grouped_jvp is None:
            self._values.append((micro_batch, self._derivatives(next(iter(tokens)), micro_batch, outputs)))
            return
        tangents = GroupedTangents(self._directions, tokens)
        try:
            hidden_and_tangent = self._policy.backbone_grouped_jvp(self._params, tangents, micro_batch, outputs)
        except NotImplementedError:
            # A use of a parameter that does not tell tokens of several groups apart.
            by_group = [self._derivatives(k, micro_batch, outputs) for k in scored]
            parts = [TokenValues(*(x[index] for x in d)) for d, index in zip(by_group, scored.values(), strict=True)]
            self._append_in_order(micro_batch, scored, parts, 1.0)
            return
        hidden, d_hidden = (scored_hidden_states(x, micro_batch) for x in hidden_and_tangent)
        head = {name: self._params[name] for name in self._policy.head_parameters if name in self._params}
        parts = []
        for k, index in scored.items():
            through_head = ((name, self._directions[k].over_scale(name, p)) for name, p in head.items())
            tangent = {name: x for name, x in through_head if x is not None}
            inputs = hidden[index], d_hidden[index], micro_batch.targets[index]
            parts.append(head_jvp(self._policy, self._params, tangent, *inputs, self._temperature))
        self._append_in_order(micro_batch, scored, parts, tangents.scale)

    def _append_in_order(
        self, micro_batch: MicroBatch, scored: Mapping[int, Tensor], parts: Sequence[TokenValues], scale: float
    ) -> None:
        """Append ``scale`` times the values of scored tokens by group, in the order of the micro-batch."""
        if parts:
            back = torch.cat(list(scored.values())).argsort()
            in_order = (scale * torch.cat(field)[back] for field in zip(*parts, strict=True))
            self._values.append((micro_batch, TokenValues(*in_order)))

    def _derivatives(self, group: int, micro_batch: MicroBatch, outputs: Sequence[Tensor] | None) -> TokenValues:
        """Return the derivatives of a micro-batch's scored tokens along the direction of a group, (n,) each."""
        if group != self._group:
            direction = self._directions[group].direction()
            scale, self._tangent = unit_direction(direction.unit, self._params)
            self._group, self._scale = group, scale * direction.scale
        options = self._policy, self._params, self._tangent, micro_batch, outputs, self._temperature
        d = micro_batch_jvp(*options)
        return TokenValues(d.logprobs * self._scale, d.entropies * self._scale)


def _packed_micro_batches(
    batch: Batch, policy: SplitPolicy, chunk_size: int | None, groups: Sequence[Tensor], group_of_row: Tensor
) -> list[MicroBatch]:
    """Return the micro-batches of rows that share prompts within their group, or none where packing saves little.

    Args:
        batch: rollouts (B, T).
        policy: the split policy.
        chunk_size: rows per forward; None chooses by tokens.
        groups: index tensors into the rows.
        group_of_row: (B,), the number of each row's group.
    """
    if policy.backbone_grouped_jvp is not None:
        packed = policy.micro_batches(batch, chunk_size)
        if packed[0].layout is None:
            return []
        rows_of = ((x.token_rows()[x.position], x.flat_index // batch.input_ids.shape[1]) for x in packed)
        mixed = [(group_of_row[prefix] != group_of_row[row]).any() for prefix, row in rows_of]
        if not bool(torch.stack(mixed).any()):
            return packed
    cut = (
        x.of_rows(index, batch)
        for index in groups
        if len(index)
        for x in policy.micro_batches(select_rows(batch, index), chunk_size)
    )
    packed = list(cut)
    return packed if any(x.layout is not None for x in packed) else []


def _places_by_group(
    micro_batches: Sequence[MicroBatch], group_of_row: Tensor, count: int
) -> list[tuple[dict[int, Tensor], dict[int, Tensor]]]:
    """Return the indices of each micro-batch's tokens, and of its scored ones, by the group of their row."""
    numbers = [
        group_of_row[rows]
        for x in micro_batches
        for rows in (x.token_rows(), x.row_index[x.row] if x.layout is None else x.token_rows()[x.position])
    ]
    by_group = [
        {k: index for k, index in enumerate(places) if len(index)} for places in places_by_group(numbers, count)
    ]
    return list(zip(by_group[::2], by_group[1::2], strict=True))
