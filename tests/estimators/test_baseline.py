"""The baselines of the score term from other completions, against the reference and enumeration."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.cases import assert_close, random_direction
from helpers.enumeration import exact_gradient
from helpers.present import present
from helpers.strategies import Case, cases, influence_options
from helpers.world import Update, World, derivatives_along, estimates, select_values, weighted_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import fx_influence as fx
from fx_influence.estimators.entropy import entropy_coefficients
from fx_influence.estimators.score_term import shrunk_mean
from fx_influence.testing import reference
from fx_influence.types import Baseline, Estimator, Normalize

values_by_rank = st.lists(
    st.lists(st.integers(-64, 64).map(lambda k: k / 8), min_size=2, max_size=2), min_size=1, max_size=9
)


baselines = pytest.mark.parametrize("baseline", ["prompt", "shrunk"])


@pytest.mark.slow
@baselines
@given(case=cases())
def test_influence_with_baseline_matches_reference(case: Case, baseline: Baseline) -> None:
    n = len(case.batch_e.input_ids)
    e = case.batch_e._replace(group=torch.arange(n) // 2)
    objective = fx.Entropy(case.estimator, case.normalize, baseline)
    options = {**influence_options(case), "objective": objective}
    out = fx.influence(case.params, case.batch_u, e, case.opt_state, **options)
    slow = reference.influence(
        case.apply,
        case.params,
        case.batch_u,
        e,
        case.opt_state,
        case.estimator,
        case.normalize,
        case.preconditioner,
        case.temperature,
        case.max_grad_norm,
        baseline=baseline,
    )
    size = slow.matrix.abs().sum()
    assert_close(out.per_sequence, slow.per_sequence, size)
    assert_close(present(out.per_token), slow.per_token, size)


@settings(max_examples=5)
@given(case=cases())
def test_second_derivative_takes_the_batch_baseline(case: Case) -> None:
    """Only the first derivative follows the baseline, as ``jvp_delta`` says."""
    n = len(case.batch_e.input_ids)
    e = case.batch_e._replace(group=torch.arange(n) // 2)
    v = random_direction(torch.Generator().manual_seed(3), case.params)
    by_batch, by_prompt = (
        fx.jvp_delta(
            case.params,
            v,
            e,
            apply=case.apply,
            objective=fx.Entropy(case.estimator, case.normalize, baseline=baseline),
            temperature=case.temperature,
        )
        for baseline in ("batch", "prompt")
    )
    assert torch.equal(by_batch.second, by_prompt.second)


@given(y=values_by_rank, sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_shrunk_mean_matches_loops(y: list[list[float]], sizes: list[int]) -> None:
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    rows = [y[a % len(y)] for a in range(len(groups))]
    expected = torch.tensor(reference.shrunk_baselines(rows, groups), dtype=torch.float64)
    actual = shrunk_mean(torch.tensor(rows, dtype=torch.float64), torch.tensor(groups))
    assert_close(actual, expected, 100 * torch.tensor(y, dtype=torch.float64).abs().sum())


def test_shrunk_mean_excludes_row_from_its_baseline() -> None:
    generator, prompt = torch.Generator().manual_seed(2), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3])
    y = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    for a in range(9):
        changed = y.clone()
        changed[a] += 5.0
        before, after = shrunk_mean(y, prompt), shrunk_mean(changed, prompt)
        assert_close(after[a], before[a], y.abs().sum() + 5)
        assert (after - before).abs().max() > 0.1


def test_shrunk_mean_follows_the_variance_between_prompts() -> None:
    """Prompts far apart keep the mean of their rows; with none apart all rows share one mean."""
    generator, prompt = torch.Generator().manual_seed(3), torch.arange(400) // 4
    noise = torch.randn(400, generator=generator, dtype=torch.float64)
    prompt_means = 100.0 * torch.randn(100, generator=generator, dtype=torch.float64)[prompt]
    of_siblings = (noise + prompt_means).reshape(100, 4)
    of_siblings = ((of_siblings.sum(1, keepdim=True) - of_siblings) / 3).flatten()
    assert (shrunk_mean(noise + prompt_means, prompt) - of_siblings).abs().max() < 0.1
    assert shrunk_mean(noise, prompt).abs().max() < 0.5


@pytest.mark.parametrize("baseline", ["prompt", pytest.param("shrunk", marks=pytest.mark.slow)])
@estimates
def test_baseline_is_unbiased(
    world: World, update: Update, estimator: Estimator, normalize: Normalize, baseline: Baseline
) -> None:
    """Over 1500 draws of 12 prompts x 4 the mean is within 4 standard errors of the truth."""
    generator, derivatives = torch.Generator().manual_seed(6), world.jvp(update.parts)
    truth = derivatives_along(exact_gradient(world.apply, world.params, world.space, normalize), update.parts)
    estimates_of_draws = []
    for _ in range(1500):
        rows = world.draw_prompts(12, 4, generator)
        batch = world.batch(rows)._replace(group=torch.arange(12).repeat_interleave(4))
        weight = entropy_coefficients(select_values(world.values, rows), batch, estimator, normalize, baseline)
        estimates_of_draws.append(weighted_rows(weight, select_values(derivatives, rows)).sum(0))
    draws = torch.stack(estimates_of_draws)
    assert ((draws.mean(0) - truth) / (draws.std(0) / math.sqrt(1500))).abs().max() < 4


def test_prompt_baseline_needs_groups_and_derivatives(world: World) -> None:
    batch = world.batch(torch.arange(6))
    options = {"apply": world.apply, "objective": fx.Entropy(baseline="prompt")}
    direction = {name: torch.ones_like(p) for name, p in world.params.items()}
    with pytest.raises(ValueError, match=r"batch_e\.group is None with baseline='prompt'"):
        fx.jvp_delta(world.params, direction, batch, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"objective\.baseline is 'prompt'; expected 'batch'"):
        fx.snis_delta(world.params, direction, 1e-3, batch, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="baseline is 'batches'; expected one of"):
        fx.jvp_delta(world.params, direction, batch, apply=world.apply, objective=fx.Entropy(baseline="batches"))  # type: ignore[arg-type]
