"""Policy-gradient losses, each as one coefficient per completion token: c_it = -dL/dlog pi(y_it | y_i<t)."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from fx_influence.core.checks import check_choice, check_count, check_number, check_tensor
from fx_influence.types import LossType


def group_advantages(rewards: Tensor, group: Tensor, scale: bool = True, eps: float = 1e-4) -> Tensor:
    """Return group-relative advantages A_i = (r_i - mean_group) / (std_group + eps), the std unbiased as in TRL.

    A group whose rewards are all equal, one row included, has advantage exactly 0.

    Args:
        rewards: float (N,), one per completion.
        group: int64 (N,), the prompt of each completion.
        scale: divide by the standard deviation; False leaves the division out (Dr. GRPO).
        eps: added to the standard deviation.

    Returns:
        (N,), in the dtype of ``rewards``, at least float32.

    Raises:
        ValueError: for rewards that are not finite, and for shapes that disagree.

    Source:
        Shao et al., DeepSeekMath, arXiv 2402.03300; Liu et al., arXiv 2503.20783.

    Example:
        >>> group_advantages(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1]), scale=False).tolist()
        [0.5, -0.5, 0.0]
    """
    check_tensor("rewards", rewards)
    check_tensor("group", group)
    rewards = _at_least_float32(rewards)
    if rewards.dim() != 1:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; expected (N,), one reward a completion")
    if group.shape != rewards.shape:
        raise ValueError(
            f"group has shape {tuple(group.shape)}; expected {tuple(rewards.shape)}, one prompt index a reward"
        )
    _require_finite("rewards", rewards)
    _, index = torch.unique(group, return_inverse=True)
    count = torch.bincount(index).to(rewards)
    centred = rewards - (torch.zeros_like(count).index_add(0, index, rewards) / count)[index]
    lowest, highest = (
        torch.zeros_like(count).scatter_reduce(0, index, rewards, r, include_self=False) for r in ("amin", "amax")
    )
    # The mean of equal numbers may be rounded, and the rounding error must not become an advantage.
    centred = centred.masked_fill((lowest == highest)[index], 0.0)
    if not scale:
        return centred
    variance = torch.zeros_like(count).index_add(0, index, centred.square()) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt()[index] + eps)


def clipped_ratio(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, epsilon_low: float = 0.2, epsilon_high: float = 0.2
) -> Tensor:
    """Return the PPO ratio r = pi/pi_old, set to 0 where clipping cuts the gradient, for ``coefficients(ratio=...)``.

    d/dlog pi of min(r A, clip(r, 1-epsilon_low, 1+epsilon_high) A) is r A where the unclipped branch is the
    smaller and 0 elsewhere: where A > 0 and r > 1+epsilon_high, or A < 0 and r < 1-epsilon_low.

    Args:
        logprobs: (N, T), log pi of each token.
        old_logprobs: (N, T), log pi_old of each token.
        advantages: (N,) or (N, T).
        epsilon_low: clip range below 1, at least 0.
        epsilon_high: clip range above 1, at least 0.

    Returns:
        (N, T), at least float32.

    Raises:
        ValueError: for log-probs whose shapes disagree.

    Source:
        Schulman et al., arXiv 1707.06347; asymmetric bounds: Yu et al., DAPO, arXiv 2503.14476.

    Example:
        >>> new, old = torch.tensor([[0.5, 0.0]]), torch.zeros(1, 2)
        >>> clipped_ratio(new, old, torch.ones(1)).tolist()
        [[0.0, 1.0]]
    """
    for name, value in (("logprobs", logprobs), ("old_logprobs", old_logprobs), ("advantages", advantages)):
        check_tensor(name, value)
    for name, epsilon in (("epsilon_low", epsilon_low), ("epsilon_high", epsilon_high)):
        check_number(name, epsilon, "pass the trainer's clip range", lambda x: x >= 0, "at least 0")
    if old_logprobs.shape != logprobs.shape:
        raise ValueError(
            f"old_logprobs has shape {tuple(old_logprobs.shape)}; expected that of logprobs, {tuple(logprobs.shape)}"
        )
    ratio = (_at_least_float32(logprobs) - _at_least_float32(old_logprobs)).exp()
    advantages = _per_token(advantages, ratio)
    cut = ((advantages > 0) & (ratio > 1 + epsilon_high)) | ((advantages < 0) & (ratio < 1 - epsilon_low))
    return ratio.masked_fill(cut, 0.0)


def coefficients(
    loss_type: LossType,
    advantages: Tensor,
    completion_mask: Tensor,
    group: Tensor | None = None,
    max_completion_length: int | None = None,
    ratio: Tensor | None = None,
) -> Tensor:
    """Return coefficients c_it of a policy-gradient loss, so that dL/dtheta = -sum_it c_it d log pi(y_it)/dtheta.

    With advantages A_i, N rows and T_i completion tokens, c_it is

    - ``"grpo"``: A_i / (N T_i)
    - ``"bnpo"``: A_i / sum_j T_j over the rows passed, a micro-batch
    - ``"dapo"``: A_i / sum_j T_j over the rows passed, the full generation batch
    - ``"dr_grpo"``: A_i / (N max_completion_length)
    - ``"prompt_max"``: A_i / (G longest completion of the row's prompt), G the rows of that prompt

    times ``ratio``, if passed. Every denominator is at least 1. A positive c pushes its token up.

    Args:
        loss_type: one of the names above.
        advantages: (N,), or (N, T) where they differ by token.
        completion_mask: bool (N, T), True on generated tokens that count.
        group: int64 (N,), the prompt of each row; needed by ``"prompt_max"``.
        max_completion_length: the trainer's limit in tokens, at least 1; needed by ``"dr_grpo"``.
        ratio: pi/pi_old, (N, T), or (N,) for sequence-level ratios, already 0 where clipping cuts the gradient: see
            ``clipped_ratio``.

    Returns:
        (N, T), 0 outside the mask, float64 if the advantages are, else float32.

    Raises:
        ValueError: for an unknown loss type, shapes that disagree, a missing argument, or values that are not finite.

    Source:
        DeepSeekMath arXiv 2402.03300, DAPO arXiv 2503.14476, Dr. GRPO arXiv 2503.20783.

    Example:
        >>> mask = torch.tensor([[False, True, True], [False, True, False]])
        >>> coefficients("grpo", torch.tensor([1.0, -1.0]), mask).tolist()
        [[0.0, 0.25, 0.25], [0.0, -0.5, 0.0]]
    """
    _check_inputs(loss_type, advantages, completion_mask, group, max_completion_length, ratio)
    mask = completion_mask.to(torch.promote_types(advantages.dtype, torch.float32))
    lengths = mask.sum(-1, keepdim=True)
    n = mask.shape[0]
    if loss_type == "grpo":
        denominator = n * lengths.clamp(min=1)
    elif loss_type in ("bnpo", "dapo"):
        denominator = lengths.sum().clamp(min=1)
    elif loss_type == "dr_grpo":
        assert max_completion_length is not None
        denominator = mask.new_tensor(float(max(n * max_completion_length, 1)))
    else:
        assert group is not None
        denominator = _prompt_max_denominator(lengths, group)
    c = _per_token(advantages, mask) / denominator
    if ratio is not None:
        c = c * _per_token(ratio, mask)
    return torch.where(completion_mask, c, torch.zeros_like(mask))


def _prompt_max_denominator(lengths: Tensor, group: Tensor) -> Tensor:
    """Return (N, 1), rows of each row's prompt times the longest of their completions, at least 1."""
    _, index = torch.unique(group, return_inverse=True)
    count = torch.bincount(index).to(lengths)
    longest = torch.zeros_like(count).scatter_reduce(0, index, lengths.squeeze(-1), "amax").clamp(min=1)
    return (count * longest)[index].unsqueeze(-1)


def _check_inputs(
    loss_type: str,
    advantages: Tensor,
    completion_mask: Tensor,
    group: Tensor | None,
    max_completion_length: int | None,
    ratio: Tensor | None,
) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless the arguments of ``coefficients`` fit each other."""
    check_choice("loss_type", loss_type, get_args(LossType))
    tensors = {"advantages": advantages, "completion_mask": completion_mask, "group": group, "ratio": ratio}
    for name, value in tensors.items():
        if value is not None or name in ("advantages", "completion_mask"):
            check_tensor(name, value)
    if max_completion_length is not None:
        check_count("max_completion_length", max_completion_length, "pass the trainer's", least=0)
    if completion_mask.dim() != 2 or completion_mask.dtype != torch.bool:
        raise ValueError(
            f"completion_mask is {completion_mask.dtype} of shape {tuple(completion_mask.shape)}; expected bool "
            "(N, T), a row for each completion. Pass mask.bool()"
        )
    shape = tuple(completion_mask.shape)
    for name, value in (("advantages", advantages), ("ratio", ratio)):
        if value is None:
            continue
        if tuple(value.shape) not in (shape, shape[:1], (shape[0], 1)):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected ({shape[0]},) or {shape}, a row a completion"
            )
    if group is not None and tuple(group.shape) != shape[:1]:
        raise ValueError(f"group has shape {tuple(group.shape)}; expected ({shape[0]},), one prompt index a row")
    for name, value in (("advantages", advantages), ("ratio", ratio)):
        if value is not None:
            # Values where no token counts are never read, so they may be NaN.
            counts = completion_mask.any(-1) if value.dim() == 1 else completion_mask
            _require_finite(name, value.where(counts, value.new_zeros(())))
    if loss_type == "prompt_max" and group is None:
        raise ValueError(
            "group is None; expected the prompt index of each row, which loss_type 'prompt_max' needs. Pass group="
        )
    if loss_type == "dr_grpo" and (max_completion_length is None or max_completion_length < 1):
        raise ValueError(
            f"max_completion_length is {max_completion_length}; expected at least 1, which loss_type 'dr_grpo' needs"
        )


def _per_token(values: Tensor, like: Tensor) -> Tensor:
    """Return (N,) as (N, 1), and (N, T) unchanged, in at least the dtype of ``like``."""
    values = values.to(torch.promote_types(values.dtype, like.dtype))
    return values.unsqueeze(-1) if values.dim() == 1 else values


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _require_finite(name: str, values: Tensor) -> None:
    bad = (~torch.isfinite(values)).nonzero().tolist()
    if bad:
        raise ValueError(
            f"{name}{bad[0]} is {values[tuple(bad[0])].item()} ({len(bad)} such values); expected finite values. "
            "Drop those rollouts or repair their rewards"
        )
