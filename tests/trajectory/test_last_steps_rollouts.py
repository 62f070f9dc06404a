"""The rollouts of the window's last step as E: their weights, the prompts that are left out, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.cases import random_batch
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding
from helpers.windows import VOCAB, WIDTH, Run, over_steps, random_run, size_of, with_prompts
from torch import Tensor

import fx_influence as fx
from fx_influence.types import Batch


def numbered(run: Run) -> Run:
    """Return the run with prompts that no two steps share by number."""
    batches = [b if b.group is None else b._replace(group=b.group + 100 * k) for k, b in enumerate(run.advantages)]
    return replace(run, advantages=batches)


def assert_same(a: fx.InfluenceOverSteps, b: fx.InfluenceOverSteps) -> None:
    size = size_of(a)
    for x, y in zip((*a.per_sequence, *a.stderr), (*b.per_sequence, *b.stderr), strict=True):
        assert_close_to_rounding(x, y, terms=TINY_POLICY, scale=size)
    assert_close_to_rounding(a.total_stderr, b.total_stderr, terms=TINY_POLICY, scale=size)


@pytest.mark.parametrize("recorded", [False, True])
def test_last_steps_rollouts_are_weighted_to_the_end(recorded: bool) -> None:
    """Take the recorded log-probabilities, or those of the policy before the last step."""
    run = numbered(with_prompts(random_run(3, 2, ratio=False, temperature=1.3), prompts=5, each=2))
    window = run.window()
    last = window.steps[-1].batch
    behaviour = run.values(run.made(run.ones())[1][-1], last)[0]
    if recorded:
        behaviour = behaviour + 0.1 * torch.sin(torch.arange(behaviour.numel())).view_as(behaviour)
        steps = [window.steps[0], replace(window.steps[1], batch=last._replace(behaviour_logprobs=behaviour))]
        window = replace(window, steps=steps)
    e = last._replace(coefficients=None, behaviour_logprobs=behaviour)
    options: dict[str, Any] = {"apply": run.apply, "temperature": 1.3, "stderr": True}
    out = fx.influence_over_steps(window, None, **options)
    given = fx.influence_over_steps(window, e, cross_fit=True, **options)
    plain = fx.influence_over_steps(window, e, **options)
    assert_same(out, given)
    assert out.ess is not None
    assert given.ess is not None
    assert 1 < float(out.ess) < 10
    assert_close_to_rounding(out.ess, given.ess, terms=TINY_POLICY)
    assert_close_to_rounding(out.per_sequence[0], plain.per_sequence[0], terms=TINY_POLICY, scale=size_of(out))
    assert (out.per_sequence[1] - plain.per_sequence[1]).abs().max() > 0.01 * out.per_sequence[1].abs().max()


def entropy_of(rows: Tensor) -> Callable[[Tensor, Tensor, Batch], Tensor]:
    """Return the objective of some rows of E beside others: their part in the gradient of the mean entropy of all."""

    def objective(logprobs: Tensor, entropies: Tensor, batch_e: Batch) -> Tensor:
        h = entropies.sum(-1)
        surrogate = h + logprobs.sum(-1) * (h.detach() - h.detach().mean())
        return torch.where(rows, surrogate, 0 * surrogate) / len(h)

    return objective


def test_prompts_are_left_out_in_every_step_they_are_in() -> None:
    """Each row over the prompts of E that it has not, from one attribution to each prompt's rollouts alone."""
    run = with_prompts(random_run(4, 2, ratio=False), prompts=5, each=2)
    e = random_batch(torch.Generator().manual_seed(1), 12, WIDTH, VOCAB, coefficients=False)
    e = e._replace(group=torch.arange(12) // 2 + 1)
    run = replace(run, batch_e=e)
    out = over_steps(run, cross_fit=True, objective=fx.Entropy("sequence", "sequence"))
    assert e.group is not None
    by_prompt = {p: over_steps(run, objective=entropy_of(e.group == p)) for p in range(1, 7)}
    for k in range(2):
        for row, prompt in enumerate(torch.arange(10) // 2):
            others = [by_prompt[p].per_sequence[k][row] for p in by_prompt if p != int(prompt)]
            expected = torch.stack(others).sum() * 6 / len(others)
            assert_close_to_rounding(out.per_sequence[k][row], expected, terms=TINY_POLICY, scale=size_of(out))


def test_steps_that_share_rollouts_are_refused_without_cross_fit() -> None:
    run = with_prompts(random_run(4, 2, ratio=False, rate=1e-3), prompts=5, each=2)
    run = replace(run, advantages=[run.advantages[0]] * 2)
    with pytest.raises(ValueError, match="share the last one's rollouts"):
        over_steps(run, own_rollouts=True)
    out = over_steps(run, own_rollouts=True, cross_fit=True, stderr=True)
    assert out.deviations is not None
    assert (out.deviations.left_out == torch.arange(20) % 10 // 2).all()


def ungrouped(run: Run) -> Run:
    return replace(run, advantages=[b._replace(group=None) for b in run.advantages])


@pytest.mark.parametrize(
    ("prompts", "rate", "change", "options", "message"),
    [
        (3, 1e-3, None, {}, "rollouts of 3 prompts"),
        (5, 0.5, None, {}, "effective sample size of batch_e is"),
        (5, 1e-3, None, {"objective": fx.expected_reward(torch.ones(10))}, "batch_e is None with another objective"),
        (5, 1e-3, ungrouped, {"cross_fit": True}, "group is None with cross_fit=True"),
    ],
    ids=["prompts", "ess", "objective", "group"],
)
def test_rollouts_that_cannot_be_e_are_refused(
    prompts: int, rate: float, change: Callable[[Run], Run] | None, options: dict[str, Any], message: str
) -> None:
    run = with_prompts(random_run(4, 2, ratio=False, rate=rate), prompts=prompts, each=2)
    with pytest.raises(ValueError, match=message):
        over_steps(run if change is None else change(run), own_rollouts=True, **options)
