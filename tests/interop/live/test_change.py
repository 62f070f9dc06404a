"""The change of entropy over a step, measured on the step's own rollouts."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers.loops import COMPLETIONS, COUNT, PROMPTS, Loop, Rollouts, completion_values, grpo_loss, sample_rollouts
from helpers.present import present
from helpers.tolerances import assert_close_to_rounding, policy_terms
from torch import Tensor, nn

import fx_influence as fx
from fx_influence.estimators.deviations import Deviations
from fx_influence.interop.live.change.measured import difference_stderr
from fx_influence.types import Normalize

EVERY_STEP = {"every": 1}
GROUP = torch.arange(PROMPTS).repeat_interleave(COMPLETIONS)


class Table(nn.Module):
    """Logits of the next token by the first token of the prompt and the last one read: prompts share no parameters."""

    def __init__(self, vocabulary: int = 11) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(vocabulary, vocabulary, vocabulary, generator=generator, dtype=torch.float64)
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.logits[input_ids[:, :1], input_ids]


def loop_with_fixed_denominator(lr: float, normalize: Normalize) -> Loop:
    """Return a loop whose AdamW has second moments beside which those of the next gradients are nothing."""
    loop = Loop(1, 1, {**EVERY_STEP, "objective": fx.Entropy(normalize=normalize)})
    loop.optimizer.param_groups[0].update(lr=lr, weight_decay=0.0)
    for p in loop.model.parameters():
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.full_like(p, 1e6)}
        loop.optimizer.state[p] = {"step": torch.tensor(1000.0), **moments}
    return loop


def measured_loop(loop: Loop) -> dict[str, float]:
    capture = loop.run()
    assert capture is not None
    (metrics,) = capture.history
    return metrics


def gradients_by_prompt(model: nn.Module, rollouts: Rollouts) -> list[list[Tensor]]:
    """Return for each prompt the gradient of its rollouts' loss by parameter."""
    out = []
    for k in range(PROMPTS):
        part = rollouts.part(k == GROUP)  # type: ignore[arg-type]
        loss = grpo_loss(completion_values(model, part)[0], part)
        out.append([present(g) for g in torch.autograd.grad(loss, list(model.parameters()))])
    return out


@pytest.mark.parametrize(
    ("lr", "memory_budget", "silent"),
    [(1e-3, None, 0), (3e-2, None, 0), (3e-2, 0, 0), (3e-2, None, 3), (3e-2, 0, 3), (3e-2, None, PROMPTS)],
)
def test_change_has_rollouts_at_steps_without_their_prompt(lr: float, memory_budget: int | None, silent: int) -> None:
    """Each prompt's rollouts are scored after torch's own step from the other prompts' gradients; some have none."""

    def with_silent(rollouts: Rollouts) -> Rollouts:
        advantages = rollouts.advantages
        return rollouts._replace(advantages=torch.where(silent > GROUP[: len(advantages)], 0.0, advantages))

    loop = Loop(1, 1, {**EVERY_STEP, "memory_budget": memory_budget})
    loop.loss = lambda logprobs, _, r: grpo_loss(logprobs, with_silent(r))
    loop.optimizer.param_groups[0]["lr"] = lr
    before = copy.deepcopy(loop.model)
    rollouts = with_silent(sample_rollouts(before, 0))
    metrics = measured_loop(loop)
    lengths = rollouts.completion_mask.sum(1).double()
    shares = [float(lengths[k == GROUP].sum() / lengths.sum()) for k in range(PROMPTS)]
    by_prompt = gradients_by_prompt(before, rollouts)
    columns = list(zip(*by_prompt, strict=True))
    norm = sum(float(sum(column).square().sum()) for column in columns) ** 0.5  # type: ignore[union-attr]
    clip = min(1.0, 0.05 / (norm + 1e-6))
    weights, entropies = torch.zeros(COUNT, 4).double(), torch.zeros(COUNT, 4).double()
    for k in range(PROMPTS):
        model = copy.deepcopy(before)
        for p, column in zip(model.parameters(), columns, strict=True):
            others = [g / (1 - f) for j, (g, f) in enumerate(zip(column, shares, strict=True)) if j != k]
            p.grad = clip * sum(others)  # type: ignore[assignment]
        torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1).step()
        rows = k == GROUP
        with torch.no_grad():
            logprobs, entropies[rows] = (x[rows] for x in completion_values(model, rollouts))
            change = (logprobs - completion_values(before, rollouts)[0][rows]) * rollouts.completion_mask[rows]
        weights[rows] = (change.cumsum(1) - change).exp()
    ok = rollouts.completion_mask.double()
    normalised = weights / weights.sum(0)
    with torch.no_grad():
        at_theta = (completion_values(before, rollouts)[1] * ok).sum() / ok.sum()
    expected = (normalised * entropies * ok).sum() / (normalised * ok).sum() - at_theta
    terms = 100 * policy_terms(dict(before.named_parameters()), 8)
    scale = math.log(11)
    assert_close_to_rounding(metrics["measured"], float(expected), terms=terms, scale=scale, dtype=torch.float64)
    assert abs(float(expected)) > 1e-6


def test_change_is_zero_where_prompts_share_nothing() -> None:
    """No step on some prompts changes the entropy on others, however long it is and whatever it does to its own."""
    loop = Loop(1, 1, EVERY_STEP)
    loop.model = Table()
    loop.optimizer = torch.optim.AdamW(loop.model.parameters(), lr=0.3, weight_decay=0.0)
    rollouts = sample_rollouts(loop.model, 0)
    assert len(set(rollouts.input_ids[::COMPLETIONS, 0].tolist())) == PROMPTS, "prompts share no parameters"
    metrics = measured_loop(loop)
    assert abs(metrics["self_influence"]) > 1e-3
    assert_close_to_rounding(metrics["measured"], 0.0, terms=1000, scale=math.log(11), dtype=torch.float64)


def test_unexplained_vanishes_with_the_step() -> None:
    """Check a denominator that does not respond: measured - predicted is 0 to first order, and so is its error."""
    differences, errors = [], []
    for lr in (100.0, 10.0):
        metrics = measured_loop(loop_with_fixed_denominator(lr, "sequence"))
        differences.append(abs(metrics["measured"] - metrics["total"]) / lr)
        errors.append(metrics["unexplained_stderr"] / lr)
        assert metrics["unexplained_stderr"] < 1e-3 * metrics["stderr"]
    # Both are of second order: ten times less a unit of the learning rate at a tenth of it.
    assert differences[1] == pytest.approx(differences[0] / 10, rel=0.2)
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.2)


def test_error_of_the_difference_covers_lengths() -> None:
    """Check per token, where the two differ by a term of the lengths, which is small beside the errors of either."""
    metrics = measured_loop(loop_with_fixed_denominator(10.0, "token"))
    assert abs(metrics["measured"] - metrics["total"]) < 2 * metrics["unexplained_stderr"] < 0.4 * metrics["stderr"]


def made_influence(deviations: Tensor, total: Tensor) -> fx.Influence:
    rest = dict.fromkeys(fx.Influence._fields, torch.tensor(0.0))
    count = deviations.shape[1]
    by_part = Deviations(deviations, torch.full((count,), -1))
    values: dict[str, Any] = {
        "per_sequence": torch.ones(count).double(),
        "deviations": by_part,
        "total_deviations": total,
    }
    return fx.Influence(**{**rest, **values})


def test_error_of_the_difference_is_below_both_in_a_first_step() -> None:
    """A fresh optimizer's influences are huge and cancel, and so would be what leaving one out of them does."""
    metrics = measured_loop(Loop(1, 1, EVERY_STEP))
    assert metrics["conditioning"] > 0.5
    assert 0 < metrics["unexplained_stderr"] < math.hypot(metrics["stderr"], metrics["measured_stderr"])


def test_errors_common_to_both_cancel_in_the_difference() -> None:
    predicted = torch.tensor([3.0, -1.0, -2.0]).double()
    influence, shares = made_influence(predicted.unsqueeze(1), predicted), torch.full((3,), 1 / 3).double()
    assert difference_stderr(0.1 * predicted, influence, shares, 0.1) == pytest.approx(0.0, abs=1e-15)
    further = torch.tensor([0.5, -0.5, 0.0]).double()
    stderr = difference_stderr(0.1 * predicted + further, influence, shares, 0.1)
    assert stderr == pytest.approx(math.sqrt(3 / 2 * 0.5))
    assert math.isnan(difference_stderr(further, influence._replace(total_deviations=None), shares, 0.1))


class Factors(nn.Module):
    """Logits from the prompt's token and the last one read, by factors that all prompts share."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.prompt, self.last, self.head = (
            nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))
            for shape in ((8, 6), (8, 6), (6, 8))
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return (self.prompt[input_ids[:, :1]] + self.last[input_ids]).tanh() @ self.head


def exact_entropy(model: nn.Module) -> float:
    """Return H per token of completions of two tokens, over all prompts of one token."""
    with torch.no_grad():
        pairs = torch.cartesian_prod(torch.arange(8), torch.arange(8))
        logprobs = model(pairs, torch.ones_like(pairs)).log_softmax(-1).view(8, 8, 2, 8)
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        first = logprobs[:, 0, 0].exp()
        return float((entropies[:, 0, 0] + (first * entropies[:, :, 1]).sum(-1)).mean() / 2)


def draw_step(seed: int) -> tuple[float, dict[str, float]]:
    """Return the exact change of entropy by a fresh AdamW's step on drawn rollouts, and the step's metrics."""
    model, generator = Factors(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    capture = fx.attach(optimizer, model, every=1)
    ids = torch.randint(8, (6,), generator=generator).repeat_interleave(2)[:, None]
    with torch.no_grad():
        for _ in range(2):
            probabilities = model(ids, torch.ones_like(ids))[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], 1)
    advantages = ((ids[:, 1:] < 3).sum(1) + 0.1 * ids[:, 2]).double().view(6, 2)
    advantages = (advantages - advantages.mean(1, keepdim=True)).flatten()
    mask = torch.ones_like(ids, dtype=torch.bool)
    logprobs = model(ids, mask)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    group = torch.arange(6).repeat_interleave(2)
    capture.add(
        logprobs=logprobs,
        input_ids=ids,
        attention_mask=mask,
        completion_mask=mask[:, 1:],
        advantages=advantages,
        group=group,
    )
    (-(advantages[:, None] * logprobs).mean()).backward()
    before = exact_entropy(model)
    optimizer.step()
    (metrics,) = capture.history
    return exact_entropy(model) - before, metrics


@pytest.mark.slow
def test_change_is_the_exact_one_in_a_first_step() -> None:
    """Over draws of U, measured has no bias, an error of the size that it says, and far less noise than predicted."""
    draws = [draw_step(seed) for seed in range(40)]
    exact = torch.tensor([change for change, _ in draws])
    measured, stderr, total = (
        torch.tensor([metrics[name] for _, metrics in draws]) for name in ("measured", "measured_stderr", "total")
    )
    error = measured - exact
    assert abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(len(draws))
    # The mean square of 40 draws is known to a part in sqrt(20), and their errors come from six prompts each.
    assert 0.3 < float(error.square().mean() / stderr.square().mean()) < 3
    assert float(error.square().mean().sqrt()) < 0.7 * float((total - exact).square().mean().sqrt())
