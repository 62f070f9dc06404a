"""Check what a training run is measured with: its log-probabilities and completions, and the objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fx_influence.interop.live.guard import CaptureError, GenerationError
from fx_influence.objectives import Entropy, check_entropy
from fx_influence.policy.four_bit import four_bit_dtypes
from fx_influence.types import Batch

TEMPERATURE_FACTORS = (0.5, 0.7, 0.85, 1.2, 1.5, 2.0)
"""Multiples of the policy's temperature that completions are tested for."""

FALSE_ALARM_RATE = 3e-7
"""Share of training runs in which completions that are sampled from the policy are wrongly refused."""


def check_measured_objective(objective: object) -> None:
    """Raise ``TypeError`` or ``ValueError`` for what a measured change of entropy cannot stand beside."""
    check_entropy(objective, finite_step=False)
    assert isinstance(objective, Entropy)
    if objective.score != 1:
        raise ValueError(
            f"objective.score is {objective.score!r}; expected 1, since what is measured beside the prediction has no "
            "such bias, and the ledger would add it up. Leave it out, or call fx.influence on a stored step"
        )


def rounding_bound(model: nn.Module, lower: Iterable[torch.dtype] = ()) -> float:
    """Return the largest mean difference between two forwards by rounding alone, in nats per token: 2 sqrt(eps).

    eps belongs to the lowest precision in use: the weights', that which 4-bit layers compute in, TF32's (float32 on a
    GPU), or one of ``lower``, such as an autocast's.
    """
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    dtypes = {*lower, *(p.dtype for p in parameters), *four_bit_dtypes(model)}
    if any(p.device.type == "cuda" for p in parameters) and torch.get_float32_matmul_precision() != "highest":
        # TF32 has the mantissa of float16.
        dtypes.add(torch.float16)
    return float(2 * max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5)


def mean_distance(a: Tensor, b: Tensor) -> float:
    """Return the mean |a - b| over log-probs of the same tokens, in nats; 0 where there are none."""
    return float((a.double() - b.double()).abs().mean()) if a.numel() else 0.0


def check_scored(captured: Tensor, scored: Tensor, bound: float, remedy: str) -> None:
    """Raise ``CaptureError`` where the trainer's log-probs of completion tokens are not those of the policy.

    Args:
        captured: log-probs from the trainer's forward, any shape, nats.
        scored: log-probs of the same tokens by the policy.
        bound: on their mean distance by rounding, nats.
        remedy: a sentence for the user, the last one of the error.
    """
    gap = mean_distance(captured, scored)
    if not gap <= bound:
        raise CaptureError(
            "the trainer's log-probabilities of its rollouts and those of the model by ids and masks alone differ "
            f"by {gap:.2g} nats a token on average; expected at most {bound:.2g}, the bound of rounding. {remedy}"
        )


def check_sampled_logprobs(behaviour: Tensor, scored: Tensor, bound: float) -> None:
    """Raise ``GenerationError`` where the log-probs that tokens were sampled with are not those of the policy.

    Args:
        behaviour: log-probs that the tokens were sampled with, any shape, nats.
        scored: log-probs of the same tokens by the policy.
        bound: on their mean distance by rounding, nats.
    """
    gap = mean_distance(behaviour, scored)
    if not gap <= bound:
        raise GenerationError(
            "the completions of E were not sampled from the policy: the log-probabilities they were sampled "
            f"with and its own differ by {gap:.2g} nats a token on average; expected at most {bound:.2g}, the "
            "bound of rounding. Sample from the full softmax at its temperature"
        )


def check_temperature(logprobs_at: Callable[[float], Tensor], batch: Batch) -> None:
    """Raise ``GenerationError`` where another temperature explains completions far better than the policy's own.

    The test is a mixture of likelihood ratios. Such a ratio has mean 1 under the policy, whatever the number of tokens,
    and so exceeds x with probability 1/x at most (Markov's inequality).

    Args:
        logprobs_at: returns log-probs (n, T) of the batch's tokens at a multiple of the temperature.
        batch: the completions, (n, T).
    """
    policy_logprobs, mask = logprobs_at(1.0).double(), batch.completion_mask
    log_ratios = torch.stack(
        [(logprobs_at(factor).double() - policy_logprobs)[mask].sum() for factor in TEMPERATURE_FACTORS]
    )
    evidence = float(log_ratios.logsumexp(0)) - math.log(len(TEMPERATURE_FACTORS))
    if not evidence <= -math.log(FALSE_ALARM_RATE):
        likeliest = TEMPERATURE_FACTORS[int(log_ratios.argmax())]
        raise GenerationError(
            "the completions of E were not sampled from the policy: they are "
            f"{math.exp(min(evidence, 700)):.1g} times likelier at {likeliest} times its temperature; expected "
            "likeliest at 1. Sample from the full softmax at its temperature"
        )
