"""Coefficients of every loss against the gradient of that loss, written as in its paper or in TRL."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.tolerances import assert_close_to_rounding
from torch import Tensor

import fx_influence as fx
from fx_influence.losses import LossType

N, WIDTH, LONGEST = 6, 7, 9
# Groups of one, two and three rows, unordered; row 2 has no completion token, and neither has group 4.
GROUP = torch.tensor([7, 1, 7, 4, 1, 7])
LENGTHS = (3, 6, 0, 0, 1, 5)
LOW, HIGH = 0.2, 0.3


def make_mask() -> Tensor:
    mask = torch.zeros(N, WIDTH, dtype=torch.bool)
    for i, length in enumerate(LENGTHS):
        mask[i, WIDTH - length :] = True
    mask[1, 3] = False
    return mask


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def surrogate(logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """Return PPO's clipped objective as a loss per token: -min(r A, clip(r) A)."""
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - LOW, 1 + HIGH) * advantages)


def grpo(loss: Tensor, mask: Tensor) -> Tensor:
    return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()


def bnpo(loss: Tensor, mask: Tensor) -> Tensor:
    return (loss * mask).sum() / mask.sum().clamp(min=1.0)


def dapo(loss: Tensor, mask: Tensor) -> Tensor:
    """Return TRL's loss, which divides by the tokens of the generation batch; here that is one batch."""
    items_in_batch = mask.sum().clamp(min=1.0)
    return (loss * mask).sum() / items_in_batch


def dr_grpo(loss: Tensor, mask: Tensor) -> Tensor:
    return (loss * mask).sum() / (loss.size(0) * LONGEST)


def prompt_max(loss: Tensor, mask: Tensor) -> Tensor:
    total = loss.new_zeros(())
    for prompt in set(GROUP.tolist()):
        rows = [i for i in range(len(loss)) if GROUP[i] == prompt]
        longest = max(max(int(mask[i].sum()) for i in rows), 1)
        for i in rows:
            total = total + (loss[i] * mask[i]).sum() / (len(rows) * longest)
    return total


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grpo": grpo,
    "bnpo": bnpo,
    "dapo": dapo,
    "dr_grpo": dr_grpo,
    "prompt_max": prompt_max,
}
every_loss = pytest.mark.parametrize("loss_type", LOSSES)


def options(loss_type: LossType) -> dict[str, Any]:
    needed: dict[str, dict[str, Any]] = {"dr_grpo": {"max_completion_length": LONGEST}, "prompt_max": {"group": GROUP}}
    return needed.get(loss_type, {})


def minus_gradient(loss_of: Callable[[Tensor], Tensor], logprobs: Tensor) -> Tensor:
    """Return -dL/dlog pi at ``logprobs``."""
    leaf = logprobs.clone().requires_grad_()
    return -torch.autograd.grad(loss_of(leaf), leaf)[0]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Assert equality up to the rounding of a mean over all tokens and a ratio."""
    assert actual.dtype == expected.dtype
    assert_close_to_rounding(actual, expected, terms=actual.numel())


@every_loss
@pytest.mark.parametrize("by_token", [False, True], ids=["by_row", "by_token"])
def test_coefficients_match_loss_gradient_on_policy(loss_type: LossType, by_token: bool) -> None:
    mask, logprobs = make_mask(), normal(N, WIDTH) - 2
    advantages = normal(N, WIDTH, seed=1) if by_token else normal(N, seed=1)
    full = advantages if by_token else advantages[:, None]
    expected = minus_gradient(lambda x: LOSSES[loss_type](surrogate(x, logprobs, full), mask), logprobs)
    assert (expected != 0).equal(mask)
    assert_close(fx.coefficients(loss_type, advantages, mask, **options(loss_type)), expected)


@every_loss
@pytest.mark.parametrize("by_token", [False, True], ids=["by_row", "by_token"])
def test_coefficients_match_loss_gradient_when_clipped(loss_type: LossType, by_token: bool) -> None:
    mask, old = make_mask(), normal(N, WIDTH) - 2
    logprobs = old + 0.4 * normal(N, WIDTH, seed=2)
    advantages = normal(N, WIDTH, seed=1) if by_token else normal(N, seed=1)
    full = advantages if by_token else advantages[:, None]
    expected = minus_gradient(lambda x: LOSSES[loss_type](surrogate(x, old, full), mask), logprobs)
    cut = mask & (expected == 0)
    assert 0 < cut.sum() < mask.sum()
    ratio = fx.clipped_ratio(logprobs, old, advantages, LOW, HIGH)
    assert_close(fx.coefficients(loss_type, advantages, mask, ratio=ratio, **options(loss_type)), expected)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.5, 0.1)])
def test_clipped_ratio_times_advantage_is_ppo_gradient(low: float, high: float) -> None:
    old, logprobs = normal(40, 5), normal(40, 5) + 0.5 * normal(40, 5, seed=1)
    advantages = normal(40, 5, seed=2)
    advantages[0] = 0.0

    def loss(x: Tensor) -> Tensor:
        ratio = (x - old).exp()
        return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages).sum()

    result = fx.clipped_ratio(logprobs, old, advantages, low, high)
    assert_close(result * advantages, minus_gradient(loss, logprobs))
    unclipped = (logprobs - old).exp()
    assert ((result == 0) | (result == unclipped)).all()
    for sign in (1, -1):
        side = advantages.sign() == sign
        assert (result[side] == 0).any()
        assert (result[side] > 1 + high).any() if sign < 0 else (result[side & (result > 0)] < 1 - low).any()


def test_coefficients_accept_sequence_level_ratio() -> None:
    """GSPO has L = -mean_i s_i A_i with s_i = exp(mean_t (log pi - log pi_old)): grpo's gradient times s_i."""
    mask, old = make_mask(), normal(N, WIDTH) - 2
    logprobs, advantages = old + 0.3 * normal(N, WIDTH, seed=2), normal(N, seed=1)

    def importance(x: Tensor) -> Tensor:
        return (((x - old) * mask).sum(-1) / mask.sum(-1).clamp(min=1)).exp()

    expected = minus_gradient(lambda x: -(importance(x) * advantages).mean(), logprobs)
    assert_close(fx.coefficients("grpo", advantages, mask, ratio=importance(logprobs)), expected)
    column = importance(logprobs)[:, None]
    assert_close(fx.coefficients("grpo", advantages[:, None], mask, ratio=column), expected)


@every_loss
def test_coefficients_denominator_is_at_least_one(loss_type: LossType) -> None:
    no_tokens = torch.zeros(N, WIDTH, dtype=torch.bool)
    c = fx.coefficients(loss_type, torch.ones(N), no_tokens, **options(loss_type))
    assert torch.equal(c, torch.zeros(N, WIDTH))
    one_token = no_tokens.clone()
    one_token[0, 3] = True
    expected = {"grpo": 1 / N, "bnpo": 1.0, "dapo": 1.0, "dr_grpo": 1 / (N * LONGEST), "prompt_max": 1 / 3}
    c = fx.coefficients(loss_type, torch.ones(N), one_token, **options(loss_type))
    assert_close_to_rounding(c[0, 3], expected[loss_type], terms=c.numel())


@every_loss
@pytest.mark.parametrize(
    ("input_dtype", "dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_coefficients_are_float32_at_least(loss_type: LossType, input_dtype: torch.dtype, dtype: torch.dtype) -> None:
    advantages = torch.full((N,), 1 / 3, dtype=input_dtype)
    c = fx.coefficients(loss_type, advantages, make_mask(), **options(loss_type))
    assert c.dtype == dtype
    exact = fx.coefficients(loss_type, advantages.double(), make_mask(), **options(loss_type))
    assert_close_to_rounding(c, exact, terms=c.numel(), dtype=dtype)


def test_coefficients_ignore_order_and_labels_of_prompts() -> None:
    advantages, mask = normal(N), make_mask()
    plain = fx.coefficients("prompt_max", advantages, mask, group=GROUP)
    order = torch.tensor([4, 0, 5, 2, 3, 1])
    moved = fx.coefficients("prompt_max", advantages[order], mask[order], group=100 - GROUP[order])
    assert_close(moved, plain[order])


@pytest.mark.parametrize("scale", [True, False])
def test_group_advantages_match_loop_over_groups(scale: bool) -> None:
    rewards = normal(N)
    result = fx.group_advantages(rewards, GROUP, scale=scale, eps=1e-3)
    for i in range(N):
        peers = [rewards[j].item() for j in range(N) if GROUP[j] == GROUP[i]]
        mean = sum(peers) / len(peers)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in peers) / max(len(peers) - 1, 1))
        expected = (rewards[i].item() - mean) / (deviation + 1e-3 if scale else 1.0)
        assert_close_to_rounding(result[i], expected, terms=N, scale=rewards)
    assert result[3] == 0, "a group of one"


def test_group_advantages_are_float32_when_rewards_are_half() -> None:
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.5], dtype=torch.bfloat16)
    result = fx.group_advantages(rewards, torch.tensor([0, 0, 1, 1]))
    assert result.dtype == torch.float32
    assert_close(result, fx.group_advantages(rewards.float(), torch.tensor([0, 0, 1, 1])))


def test_group_advantages_and_ratio_reject_invalid_input() -> None:
    with pytest.raises(ValueError, match=r"rewards\[1\] is nan .* expected finite values\. .*repair their rewards"):
        fx.group_advantages(torch.tensor([1.0, math.nan]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"group has shape \(2,\); expected \(3,\), one prompt index a reward"):
        fx.group_advantages(torch.ones(3), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"old_logprobs has shape \(2, 1\); expected that of logprobs, \(2, 3\)"):
        fx.clipped_ratio(torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2))


def with_value(shape: tuple[int, ...], index: tuple[int, ...], value: float) -> Tensor:
    tensor = torch.ones(shape)
    tensor[index] = value
    return tensor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "ppo"}, r"loss_type is 'ppo'; expected one of grpo, bnpo, dapo, dr_grpo, prompt_max"),
        (
            {"completion_mask": torch.ones(N, WIDTH)},
            r"completion_mask is torch.float32 of shape \(6, 7\); expected bool",
        ),
        ({"completion_mask": make_mask()[0]}, r"completion_mask is torch.bool of shape \(7,\); expected bool \(N, T\)"),
        ({"advantages": torch.ones(5)}, r"advantages has shape \(5,\); expected \(6,\) or \(6, 7\)"),
        ({"advantages": torch.ones(6, 8)}, r"advantages has shape \(6, 8\); expected \(6,\) or \(6, 7\)"),
        ({"ratio": torch.ones(1, 7)}, r"ratio has shape \(1, 7\); expected \(6,\) or \(6, 7\)"),
        (
            {"group": torch.zeros(5, dtype=torch.long)},
            r"group has shape \(5,\); expected \(6,\), one prompt index a row",
        ),
        ({"advantages": with_value((N,), (4,), math.nan)}, r"advantages\[4\] is nan \(1 such values\).*Drop"),
        ({"advantages": with_value((N,), (0,), -math.inf)}, r"advantages\[0\] is -inf .*finite values\. Drop"),
        ({"advantages": with_value((N, WIDTH), (1, 2), math.nan)}, r"advantages\[1, 2\] is nan .*finite values\. Drop"),
        ({"ratio": with_value((N, WIDTH), (5, 6), math.inf)}, r"ratio\[5, 6\] is inf .*finite values\. Drop"),
        ({"ratio": with_value((N,), (5,), math.nan)}, r"ratio\[5\] is nan .*finite values\. Drop"),
        ({"loss_type": "prompt_max", "group": None}, r"group is None; .*'prompt_max' needs. Pass group="),
        (
            {"loss_type": "dr_grpo"},
            r"max_completion_length is None; expected at least 1, which loss_type 'dr_grpo' needs",
        ),
        ({"loss_type": "dr_grpo", "max_completion_length": 0}, r"max_completion_length is 0; .*at least 1"),
    ],
    ids=lambda value: " and ".join(value) if isinstance(value, dict) else value.partition(";")[0],
)
def test_coefficients_errors_name_field_value_and_remedy(changes: dict[str, Any], message: str) -> None:
    arguments = {"loss_type": "grpo", "advantages": torch.ones(N), "completion_mask": make_mask(), **changes}
    with pytest.raises(ValueError, match=message):
        fx.coefficients(**arguments)


def test_coefficients_ignore_values_outside_completions() -> None:
    mask = make_mask()
    wild = torch.where(mask, 1.0, math.nan)
    c = fx.coefficients("bnpo", wild, mask, ratio=wild)
    assert torch.equal(c, mask / mask.sum())


def test_group_advantages_are_zero_when_rewards_are_equal() -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.7, 0.1], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    advantages = fx.group_advantages(rewards, group)
    assert rewards[:3].mean() != rewards[0], "without a rounded mean this test is empty"
    assert advantages[:3].tolist() == [0.0, 0.0, 0.0]
    assert (advantages[3:] != 0).all()
