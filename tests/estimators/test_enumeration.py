"""Estimators and their standard errors against enumeration: the distribution over many draws of E, beside the truth.

Token values and their derivatives are computed once for every completion there is, and a draw of E picks rows of them;
``test_draw_from_space_matches_public_functions`` ties that to the public functions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from helpers.cases import (
    TinyPolicy,
    assert_close,
    dyadic_policy,
    make_apply,
    random_adamw_state,
    random_batch,
    random_direction,
)
from helpers.enumeration import (
    Space,
    enumerate_completions,
    exact_entropy,
    exact_expected,
    exact_gradient,
    exact_log_probs,
    replicate,
    take,
)
from helpers.strategies import ESTIMATORS, NORMALIZES
from torch import Tensor

import fx_influence as fx
from fx_influence.autodiff.directional import token_jvp
from fx_influence.core.tree import shift
from fx_influence.estimators.entropy import completion_values, denominator_weights, entropy_coefficients
from fx_influence.estimators.snis import snis
from fx_influence.estimators.stderr import cluster_index, cluster_stderr, random_group_index
from fx_influence.objectives import Objective, objective_coefficients
from fx_influence.testing import reference
from fx_influence.types import AdamWState, Apply, Batch, Estimator, Normalize, Params

estimates = pytest.mark.parametrize(
    ("estimator", "normalize"), [pytest.param(e, n, id=f"{e}-{n}") for e in ESTIMATORS for n in NORMALIZES]
)
VOCAB, EOS = 4, 0
PROMPTS = [torch.tensor([1]), torch.tensor([2, 3]), torch.tensor([3, 0, 2])]


class World(NamedTuple):
    """A policy with all of its completions: those that end by EOS, of unequal length by prompt, and truncated ones."""

    apply: Apply
    params: Params
    space: Space
    values: fx.TokenValues
    probabilities: Tensor

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n independent rows of the space, prompt and completion."""
        return torch.multinomial(self.probabilities, n, replacement=True, generator=generator)

    def draw_prompts(self, prompts: int, each: int, generator: torch.Generator) -> Tensor:
        """Draw prompts with replacement and ``each`` completions of every one, a prompt's rows next to each other."""
        chosen = torch.randint(self.space.prompts, (prompts,), generator=generator)
        conditional = self.probabilities * (self.space.batch.group == chosen[:, None])
        return torch.multinomial(conditional, each, replacement=True, generator=generator).flatten()

    def batch(self, rows: Tensor) -> Batch:
        """Return those rows as a batch, each row a cluster."""
        return take(self.space, rows)._replace(group=None)

    def along(self, directions: list[Params]) -> fx.TokenValues:
        """Return the derivatives of every token's values in each direction, (k, N, T)."""
        jvps = [token_jvp(self.params, v, self.space.batch, self.apply, self.space.temperature) for v in directions]
        return fx.TokenValues(*(torch.stack(field) for field in zip(*jvps, strict=True)))

    def step(self, direction: Params, spread: float) -> tuple[Params, fx.TokenValues]:
        """Return theta + eta v and its values; log-weights have standard deviation ``spread`` to first order."""
        log_weights = self.along([direction]).logprobs[0].sum(-1)
        eta = spread / (self.probabilities * log_weights**2).sum().sqrt()
        moved_params = shift(self.params, direction, eta)
        return moved_params, fx.token_values(moved_params, self.space.batch, self.apply, self.space.temperature)

    def entropy_change(self, moved_params: Params, normalize: Normalize) -> Tensor:
        """Return the exact H(moved_params) - H(theta)."""
        after, before = (exact_entropy(self.apply, p, self.space, normalize) for p in (moved_params, self.params))
        return after - before

    def snis(
        self,
        moved: fx.TokenValues,
        rows: Tensor,
        estimator: Estimator,
        normalize: Normalize,
        clusters: Tensor | None = None,
    ) -> fx.SnisDelta:
        """Return the estimate of the change of entropy from one draw."""
        mask = self.space.batch.completion_mask[rows]
        base, after = (completion_values(select_values(x, rows), mask) for x in (self.values, moved))
        return snis(base, after, estimator, normalize, clusters=clusters)


def make_world(
    seed: int, prompts: list[Tensor], vocab: int, longest: int, temperature: float, spread: float = 1.0
) -> World:
    width = max(len(p) for p in prompts) + longest
    apply, params = make_apply(TinyPolicy(vocab, 6, max_len=width, seed=seed))
    params = {name: p if "norm" in name else spread * p for name, p in params.items()}
    space = enumerate_completions(prompts, EOS, vocab, longest, temperature)
    values = fx.token_values(params, space.batch, apply, temperature)
    return World(apply, params, space, values, exact_log_probs(apply, params, space).exp())


@pytest.fixture(scope="module")
def world() -> World:
    result = make_world(4, PROMPTS, VOCAB, 4, 1.0)
    lengths = result.space.batch.completion_mask.sum(-1)
    by_prompt = [float((result.probabilities * lengths)[result.space.batch.group == k].sum() * 3) for k in range(3)]
    assert len(lengths.unique()) == 4
    assert max(by_prompt) - min(by_prompt) > 1
    return result


def select_values(values: fx.TokenValues, rows: Tensor) -> fx.TokenValues:
    return fx.TokenValues(*(v[..., rows, :] for v in values))


def first_order_rows(
    world: World, derivatives: fx.TokenValues, rows: Tensor, estimator: Estimator, normalize: Normalize
) -> Tensor:
    """Return <grad s_a, v_k> of one draw, (n, k)."""
    weight = entropy_coefficients(select_values(world.values, rows), world.batch(rows), estimator, normalize)
    return weighted_rows(weight, select_values(derivatives, rows))


def weighted_rows(weight: fx.TokenValues, derivatives: fx.TokenValues) -> Tensor:
    return (weight.logprobs * derivatives.logprobs + weight.entropies * derivatives.entropies).sum(-1).T


class Update(NamedTuple):
    """A step of four rollouts with their parts gamma g_i."""

    batch: Batch
    state: AdamWState
    parts: list[Params]


def make_update(world: World) -> Update:
    generator = torch.Generator().manual_seed(0)
    batch, state = random_batch(generator, 4, 7, VOCAB), random_adamw_state(generator, world.params)
    g = reference.sequence_gradients(world.apply, world.params, batch, world.space.temperature)
    gain = fx.adamw_decompose(reference.add(g), state, world.params).gain
    return Update(batch, state, [{name: gain[name] * x for name, x in row.items() if x is not None} for row in g])


@pytest.fixture(scope="module")
def update(world: World) -> Update:
    return make_update(world)


def derivatives_along(gradient: Params, directions: list[Params]) -> Tensor:
    return torch.tensor([reference.inner(gradient, v) for v in directions], dtype=torch.float64)


@estimates
def test_draw_from_space_matches_public_functions(
    world: World, update: Update, estimator: Estimator, normalize: Normalize
) -> None:
    rows = world.draw_prompts(12, 3, torch.Generator().manual_seed(1))
    batch, t = world.batch(rows)._replace(group=torch.arange(36) // 3), world.space.temperature
    chosen = {"apply": world.apply, "objective": fx.Entropy(estimator, normalize), "temperature": t}
    matrix = first_order_rows(world, world.along(update.parts), rows, estimator, normalize)
    out = fx.influence(world.params, update.batch, batch, update.state, matrix=True, **chosen)
    assert_close(out.matrix, matrix)
    assert_close(out.per_sequence, matrix.sum(0), matrix.abs().sum(0))
    shares = denominator_weights(batch.completion_mask, normalize)
    assert_close(out.stderr, cluster_stderr(matrix, matrix.sum(0), shares / shares.sum(), cluster_index(batch)))
    by_random_group = fx.influence(world.params, update.batch, batch, update.state, **chosen).stderr
    assert_close(
        by_random_group, cluster_stderr(matrix, matrix.sum(0), shares / shares.sum(), random_group_index(batch))
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
    generator, derivatives = torch.Generator().manual_seed(4), world.along(directions)
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
    generator, derivatives = torch.Generator().manual_seed(6), world.along(directions)
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
    chosen = {"apply": apply, "objective": fx.Entropy(estimator, normalize), "temperature": temperature}
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
        exact_gradient(apply, params, space, normalize), [{"table": gain["table"] * row["table"]} for row in g]
    )
    assert truth.abs().max() > 1e-3
    assert_close(out.per_sequence, truth, out.matrix.abs().sum())


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


class Coverage(NamedTuple):
    """Frequency with which delta_i +- 1.96 stderr_i covers the truth, by rollout i of U and by kind of cluster."""

    clusters: Tensor
    rows: Tensor
    by_random_group: Tensor


def coverage(
    world: World, update: Update, estimator: Estimator, normalize: Normalize, prompts: int, each: int
) -> Coverage:
    """Return the coverage over 1200 draws of E, with E's groups, rows and eight random groups as clusters.

    The truth is the exact delta_i under the distribution that both prompts and completions come from. With eight random
    groups 1.96 is replaced by the quantile of Student's t with seven degrees of freedom.
    """
    generator, derivatives, repeats = torch.Generator().manual_seed(8), world.along(update.parts), 1200
    truth = derivatives_along(exact_gradient(world.apply, world.params, world.space, normalize), update.parts)
    covered = torch.zeros(3, len(truth))
    for _ in range(repeats):
        rows = world.draw_prompts(prompts, each, generator)
        batch = world.batch(rows)._replace(group=torch.arange(prompts).repeat_interleave(each))
        matrix = first_order_rows(world, derivatives, rows, estimator, normalize)
        shares = denominator_weights(batch.completion_mask, normalize)
        clusterings = (
            (cluster_index(batch), 1.96),
            (torch.arange(len(rows)), 1.96),
            (random_group_index(batch), 2.365),
        )
        for k, (index, quantile) in enumerate(clusterings):
            error = cluster_stderr(matrix, matrix.sum(0), shares / shares.sum(), index)
            covered[k] += (matrix.sum(0) - truth).abs() <= quantile * error
    return Coverage(*(covered / repeats))


def within_bounds(share: Tensor) -> bool:
    """Return whether a share of 1200 draws is near 95%; with true coverage 95% its standard deviation is 0.6%."""
    return bool(share.min() >= 0.90 and share.max() <= 0.98)


@estimates
@pytest.mark.parametrize(("prompts", "each"), [(96, 1), (48, 4)], ids=["rows", "prompts"])
def test_cluster_stderr_covers_truth_in_95_percent(
    world: World,
    update: Update,
    estimator: Estimator,
    normalize: Normalize,
    prompts: int,
    each: int,
) -> None:
    covered_share = coverage(world, update, estimator, normalize, prompts, each)
    assert within_bounds(covered_share.clusters), covered_share.clusters
    assert within_bounds(covered_share.by_random_group), covered_share.by_random_group
    if each > 1:
        assert covered_share.rows.min() < 0.9, (
            "completions of a prompt are dependent, and error bars by row are too short"
        )


@pytest.mark.xfail(
    strict=True,
    reason="per token, the stated formula leaves out that the H in the centre of E is estimated too: the part of row a "
    "in delta_i's error is M_ai - delta_i f_a / sum f - lambda_i (h_a - H f_a) / sum f, lambda_i = d log E[T] / d eta",
)
def test_cluster_stderr_covers_truth_when_lengths_change() -> None:
    world = make_world(19, PROMPTS, VOCAB, 4, 1.3)
    covered_share = coverage(world, make_update(world), "per_decision", "token", 48, 4)
    assert within_bounds(covered_share.clusters), covered_share.clusters


@estimates
@pytest.mark.parametrize("seed", [4, 19])
def test_snis_stderr_covers_truth_in_95_percent(seed: int, estimator: Estimator, normalize: Normalize) -> None:
    """The jackknife also holds for the policy whose completion lengths change much: it recomputes each E's centre."""
    world, generator = make_world(seed, PROMPTS, VOCAB, 4, 1.3), torch.Generator().manual_seed(9)
    moved_params, moved = world.step(make_update(world).parts[0], 0.4)
    truth, clusters = world.entropy_change(moved_params, normalize), torch.arange(48).repeat_interleave(4)
    covered = []
    for _ in range(1200):
        out = world.snis(moved, world.draw_prompts(48, 4, generator), estimator, normalize, clusters)
        covered.append((out.delta_h - truth).abs() <= 1.96 * out.stderr)
    share = torch.stack(covered).double().mean()
    assert within_bounds(share), share
