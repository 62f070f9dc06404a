"""Estimators and their standard errors against enumeration: the distribution over many draws of E, beside the truth.

Token values and their derivatives are computed once for every completion there is, and a draw of E picks rows of them;
``test_draw_from_space_matches_public_functions`` ties that to the public functions.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.cases import (
    assert_close,
    dyadic_policy,
    make_apply,
    random_adamw_state,
    random_batch,
    random_direction,
)
from helpers.enumeration import (
    enumerate_completions,
    exact_entropy,
    exact_expected,
    exact_gradient,
    replicate,
)
from helpers.present import present
from helpers.strategies import ESTIMATORS, NORMALIZES
from helpers.world import (
    EOS,
    Update,
    World,
    derivatives_along,
    deviating_rows,
    estimates,
    first_order_rows,
    make_world,
    select_values,
    weighted_rows,
)
from torch import Tensor

import fx_influence as fx
from fx_influence.core.tree import shift
from fx_influence.estimators.entropy import denominator_weights
from fx_influence.estimators.stderr import MAX_RANDOM_GROUPS, cluster_index, cluster_stderr
from fx_influence.objectives import Objective, objective_coefficients
from fx_influence.testing import reference
from fx_influence.types import Batch, Estimator, Normalize, Params


@estimates
def test_draw_from_space_matches_public_functions(
    world: World, update: Update, estimator: Estimator, normalize: Normalize
) -> None:
    rows = world.draw_prompts(12, 3, torch.Generator().manual_seed(1))
    batch, t = world.batch(rows)._replace(group=torch.arange(36) // 3), world.space.temperature
    chosen: dict[str, Any] = {"apply": world.apply, "objective": fx.Entropy(estimator, normalize), "temperature": t}
    matrix = first_order_rows(world, world.jvp(update.parts), rows, estimator, normalize)
    out = fx.influence(world.params, update.batch, batch, update.state, matrix=True, **chosen)
    assert_close(present(out.matrix), matrix)
    assert_close(out.per_sequence, matrix.sum(0), matrix.abs().sum(0))
    shares = denominator_weights(batch.completion_mask, normalize)
    parts = deviating_rows(world, world.jvp(update.parts), rows, estimator, normalize)
    assert_close(out.stderr, cluster_stderr(parts, parts.sum(0), shares / shares.sum(), cluster_index(batch)))
    by_random_group = fx.influence(world.params, update.batch, batch, update.state, **chosen).stderr
    assert_close(
        by_random_group,
        cluster_stderr(parts, parts.sum(0), shares / shares.sum(), cluster_index(batch) % MAX_RANDOM_GROUPS),
    )
    v, eta = update.parts[0], 0.05
    single = fx.jvp_delta(world.params, v, batch, **chosen)
    assert_close(single.contributions, matrix[:, 0])
    moved = fx.token_values(shift(world.params, v, eta), world.space.batch, world.apply, t)
    estimate = fx.snis_delta(world.params, v, eta, batch, **chosen)
    for a, b in zip(world.snis(moved, rows, estimator, normalize, cluster_index(batch)), estimate, strict=True):
        assert_close(a, b)


def deviation_in_standard_errors(draws: Tensor, truth: Tensor) -> Tensor:
    """Return (mean - truth) / standard error of the mean, over draws (R, k)."""
    return (draws.mean(0) - truth) / (draws.std(0) / math.sqrt(len(draws)))


@pytest.fixture(scope="module")
def directions(world: World) -> list[Params]:
    generator = torch.Generator().manual_seed(3)
    exact_gradients = [exact_gradient(world.apply, world.params, world.space, normalize) for normalize in NORMALIZES]
    return [*exact_gradients, *(random_direction(generator, world.params) for _ in range(3))]


@estimates
def test_entropy_gradient_is_consistent(
    world: World, directions: list[Params], estimator: Estimator, normalize: Normalize
) -> None:
    """Over 800 draws of 512 rollouts the mean is within 4 standard errors, which are 1% of the derivative."""
    generator, derivatives = torch.Generator().manual_seed(4), world.jvp(directions)
    truth = derivatives_along(exact_gradient(world.apply, world.params, world.space, normalize), directions)
    draws = torch.stack(
        [
            first_order_rows(world, derivatives, world.draw(512, generator), estimator, normalize).sum(0)
            for _ in range(800)
        ]
    )
    exact_gradients = NORMALIZES.index(normalize)
    assert draws[:, exact_gradients].std() / math.sqrt(800) < 0.01 * truth[exact_gradients]
    assert deviation_in_standard_errors(draws, truth).abs().max() < 4


@estimates
def test_snis_at_a_finite_step_is_consistent(world: World, estimator: Estimator, normalize: Normalize) -> None:
    """Take 400 draws of 1024 rollouts along a step so long that its first order is visibly wrong."""
    generator = torch.Generator().manual_seed(5)
    v = random_direction(generator, world.params)
    moved_params, moved = world.step(v, 0.7)
    truth = world.entropy_change(moved_params, normalize)
    first = derivatives_along(
        exact_gradient(world.apply, world.params, world.space, normalize),
        [{name: moved_params[name] - p for name, p in world.params.items()}],
    )
    draws = torch.stack(
        [world.snis(moved, world.draw(1024, generator), estimator, normalize).delta_h[None] for _ in range(400)]
    )
    assert deviation_in_standard_errors(draws, truth).abs() < 4
    assert deviation_in_standard_errors(draws, first).abs() > 10
    assert deviation_in_standard_errors(draws, torch.zeros(1)).abs() > 10


@pytest.mark.parametrize("kind", ["reward", "kl"])
def test_objectives_are_consistent(world: World, directions: list[Params], kind: str) -> None:
    """Baselines computed on E itself may cost a bias of order 1/n and no more."""
    generator, derivatives = torch.Generator().manual_seed(6), world.jvp(directions)
    ids, mask = world.space.batch.input_ids, world.space.batch.completion_mask
    reward = ((ids == 2) & mask).sum(-1).double() - 0.5 * mask.sum(-1)
    other = shift(world.params, directions[2], 1.5)
    theirs = fx.token_values(other, world.space.batch, world.apply, world.space.temperature).logprobs

    def score(logprobs: Tensor, entropies: Tensor, batch: Batch) -> Tensor:
        return reward if kind == "reward" else (logprobs - theirs).sum(-1)

    def query(rows: Tensor) -> Objective:
        return fx.expected_reward(reward[rows]) if kind == "reward" else fx.kl_to_reference(theirs[rows])

    leaves = reference.tracked(world.params)
    truth = derivatives_along(
        reference.gradient(exact_expected(world.apply, leaves, world.space, score), leaves), directions
    )
    draws = []
    for _ in range(500):
        rows = world.draw(512, generator)
        values = select_values(world.values, rows)
        weight = objective_coefficients(query(rows), values, world.batch(rows))
        draws.append(weighted_rows(weight, select_values(derivatives, rows)).sum(0))
    stacked = torch.stack(draws)
    assert (stacked.std(0) / math.sqrt(len(draws)) / truth.abs()).min() < 0.01
    assert deviation_in_standard_errors(stacked, truth).abs().max() < 4


@estimates
def test_every_order_is_exact_on_full_distribution(estimator: Estimator, normalize: Normalize) -> None:
    """E holds each completion in proportion to its probability, so there is no sampling error."""
    generator, temperature = torch.Generator().manual_seed(5), 0.5
    apply, params = make_apply(dyadic_policy(generator))
    params = {"table": params["table"] * temperature}
    space = enumerate_completions([torch.tensor([1]), torch.tensor([2, 1])], EOS, 3, 3, temperature)
    batch = replicate(apply, params, space, 256)
    chosen: dict[str, Any] = {"apply": apply, "objective": fx.Entropy(estimator, normalize), "temperature": temperature}
    values = fx.token_values(params, batch, apply, temperature)
    assert_close(fx.entropy_estimate(values, batch, normalize), exact_entropy(apply, params, space, normalize))

    v = random_direction(generator, params)
    eta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    entropy_before = exact_entropy(apply, {name: p + eta * v[name] for name, p in params.items()}, space, normalize)
    first = torch.autograd.grad(entropy_before, eta, create_graph=True)[0]
    second = torch.autograd.grad(first, eta)[0]
    estimate = fx.jvp_delta(params, v, batch, **chosen)
    assert min(first.abs(), second.abs()) > 1e-3
    assert_close(estimate.first, first.detach())
    assert_close(estimate.second, second)

    entropy_after = exact_entropy(apply, shift(params, v, 5.0), space, normalize)
    assert (entropy_after - entropy_before).abs() > 10 * (
        5 * first + 12.5 * second - (entropy_after - entropy_before)
    ).abs().clamp(max=1e-3)
    assert_close(
        fx.snis_delta(params, v, 5.0, batch, clip=None, **chosen).delta_h, (entropy_after - entropy_before).detach()
    )

    update = random_batch(generator, 3, 5, 3)
    state = random_adamw_state(generator, params)
    out = fx.influence(params, update, batch, state, matrix=True, **chosen)
    g = reference.sequence_gradients(apply, params, update, temperature)
    gain = fx.adamw_decompose(reference.add(g), state, params).gain
    truth = derivatives_along(
        exact_gradient(apply, params, space, normalize), [{"table": gain["table"] * present(row["table"])} for row in g]
    )
    assert truth.abs().max() > 1e-3
    assert_close(out.per_sequence, truth, present(out.matrix).abs().sum())


@pytest.mark.slow
@pytest.mark.parametrize("normalize", NORMALIZES)
@pytest.mark.parametrize("seed", [1, 3, 6, 7])
def test_snis_per_decision_has_smaller_error_than_sequence(normalize: Normalize, seed: int) -> None:
    """Over 800 draws of 64 rollouts of up to nine tokens, by four standard errors of the paired difference."""
    generator = torch.Generator().manual_seed(7)
    world = make_world(seed, [torch.tensor([1]), torch.tensor([2])], 3, 9, 2.0, spread=0.5)
    assert (world.probabilities * world.space.batch.completion_mask.sum(-1)).sum() > 3
    moved_params, moved = world.step(random_direction(generator, world.params), 0.7)
    truth = world.entropy_change(moved_params, normalize)
    errors = []
    for _ in range(800):
        rows = world.draw(64, generator)
        errors.append(torch.stack([world.snis(moved, rows, e, normalize).delta_h - truth for e in ESTIMATORS]))
    per_decision, sequence = torch.stack(errors).square().T
    saved = sequence - per_decision
    assert saved.mean() > 4 * saved.std() / math.sqrt(len(saved))
