"""Rollouts that a loop has added, and the gradients that its loss sends to their log-probabilities and entropies."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fx_influence.core.checks import check_tensor
from fx_influence.interop.live.rows import RolloutRows
from fx_influence.interop.loop.columns import Columns, PackedColumns, PaddedColumns

LOGPROBS, ENTROPIES = 0, 1
"""Places of the gradients of log-probabilities and entropies."""


class AddedRollouts:
    """The rollouts of one micro-batch, as one call of ``StepCapture.add`` names them.

    Args:
        columns: where the rollouts stand in the tensors.
        ids: (B, T), tokens.
        attended: bool, (B, T).
        completions: bool, (B, T).
        values: log-probabilities and entropies of tokens in the loop's layout, in its graph; entropies or None.
        behaviour: likewise, log-probabilities under the policy that sampled, or None.
        advantages: (B,) or of tokens in the loop's layout, or None.
        group: (B,), or None.
        sources: B names, or None.
        rewards: (B,), or None.
        loss_scale: factor by which the loss is multiplied before its backward pass.
    """

    def __init__(
        self,
        columns: Columns,
        ids: Tensor,
        attended: Tensor,
        completions: Tensor,
        values: tuple[Tensor, Tensor | None],
        behaviour: Tensor | None,
        advantages: Tensor | None,
        group: Tensor | None,
        sources: Sequence[str | None] | None,
        rewards: Tensor | None,
        loss_scale: float,
    ) -> None:
        count = len(ids)
        lengths = {"group": count if group is None else len(group), "sources": len(sources or [None] * count)}
        lengths["rewards"] = count if rewards is None else len(rewards)
        for name, length in lengths.items():
            if length != count:
                raise ValueError(f"{name} has {length} entries; expected {count}. Pass one for each rollout")
        self._columns, self._ids, self._attended, self._completions = columns, ids, attended, completions
        self._logprobs, self._dtype = self._to_rows(values[0]), torch.promote_types(values[0].dtype, torch.float32)
        self._entropies = None if values[1] is None else self._to_rows(values[1])
        self.has_behaviour = behaviour is not None
        self._behaviour = None if behaviour is None else self._to_rows(behaviour)
        of_rows = advantages is None or (advantages.dim() == 1 and len(advantages) == count)
        self._advantages = advantages.detach() if advantages is not None and of_rows else None
        self._token_advantages = None if of_rows or advantages is None else self._to_rows(advantages)
        self._group, self._sources, self._loss_scale = group, sources, loss_scale
        self._rewards = torch.full((count,), torch.nan) if rewards is None else rewards.detach().float()
        self._gradients: dict[int, Tensor] = {}

    @property
    def reached(self) -> bool:
        """Return whether a backward pass has reached these rollouts."""
        return bool(self._gradients)

    def has_gradient(self) -> bool:
        """Return whether a gradient that is not 0 has reached these rollouts."""
        return any(bool(gradient.any()) for gradient in self._gradients.values())

    def watch(self, values: tuple[Tensor, Tensor | None], guard: Callable[[], AbstractContextManager[None]]) -> None:
        """Take the gradients that reach the values of tokens from now on, under ``guard``."""

        def arrive(index: int, gradient: Tensor) -> None:
            with guard():
                unscaled = gradient.detach() / self._loss_scale
                self._gradients[index] = self._gradients[index] + unscaled if index in self._gradients else unscaled

        for index, value in enumerate(values):
            if value is not None and value.requires_grad:
                value.register_hook(functools.partial(arrive, index))

    def rows(self, share: float = 1.0) -> RolloutRows:
        """Return the rollouts with the coefficients of the loss, 0 where no backward pass has reached them.

        ``share``: of this process's loss in that of all.
        """
        coefficients, entropy_coefficients = (share * self._coefficients(index) for index in (LOGPROBS, ENTROPIES))
        token_advantages, advantages = self._token_advantages, self._advantages
        if advantages is None:
            # The sign of an advantage that is not known is that of the coefficient.
            token_advantages = coefficients if token_advantages is None else token_advantages
            advantages = token_advantages.sum(1) / self._completions.sum(1).clamp(min=1)
        count, width = self._ids.shape
        first = self._completions.int().argmax(1)
        return RolloutRows(
            input_ids=self._ids,
            attention_mask=self._attended,
            completion_mask=self._completions,
            coefficients=coefficients,
            entropy_coefficients=entropy_coefficients,
            logprobs=self._logprobs,
            entropies=self._entropies,
            old_logprobs=self._behaviour,
            sampled_logprobs=None,
            advantages=advantages.float(),
            token_advantages=token_advantages,
            rewards=self._rewards,
            prompt_widths=torch.where(self._completions.any(1), first, width),
            group=self._group,
            sources=tuple(self._sources or [None] * count),
        ).to("cpu")

    def _coefficients(self, index: int) -> Tensor:
        gradient = self._gradients.get(index)
        return torch.zeros_like(self._logprobs) if gradient is None else self._to_rows(-gradient)

    def _to_rows(self, values: Tensor) -> Tensor:
        """Return values of the completions' tokens as rows (B, T), in float32 at least, 0 elsewhere."""
        rows = self._columns.to_rows(values.detach())
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return rows.masked_fill(~self._completions, 0.0)


def columns_of(input_ids: Tensor, cu_seqlens: Tensor | None, position_ids: Tensor | None) -> Columns:
    """Return where the rollouts of a micro-batch stand: in rows, or packed where one of the two others is given."""
    if cu_seqlens is not None and position_ids is not None:
        raise ValueError("cu_seqlens and position_ids are both given; expected one of them. Leave one out")
    if cu_seqlens is not None:
        return PackedColumns.from_starts(cu_seqlens, input_ids.numel())
    if position_ids is not None:
        return PackedColumns.from_positions(position_ids)
    if input_ids.dim() != 2:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; expected (B, T), a row for each rollout. Pass cu_seqlens "
            "with rollouts that are packed"
        )
    return PaddedColumns(*input_ids.shape)


def added_rollouts(
    *,
    logprobs: Tensor,
    input_ids: Tensor,
    completion_mask: Tensor,
    attention_mask: Tensor | None,
    entropies: Tensor | None,
    behaviour_logprobs: Tensor | None,
    advantages: Tensor | None,
    group: Tensor | None,
    sources: Sequence[str | None] | None,
    rewards: Tensor | None,
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    loss_scale: float,
) -> AddedRollouts:
    """Return the rollouts of a micro-batch from the arguments of ``StepCapture.add``.

    Raises:
        TypeError: for an argument that is no tensor.
        ValueError: for shapes that disagree.
    """
    for name, value in {"logprobs": logprobs, "input_ids": input_ids, "completion_mask": completion_mask}.items():
        check_tensor(name, value)
    columns = columns_of(input_ids, cu_seqlens, position_ids)
    ids = columns.to_rows(input_ids)
    attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return AddedRollouts(
        columns,
        ids,
        columns.to_rows(attended).bool(),
        columns.to_rows(completion_mask.to(input_ids.dtype)).bool(),
        (logprobs, entropies),
        behaviour_logprobs,
        advantages,
        group,
        sources,
        rewards,
        loss_scale,
    )
