"""The estimators and their error bars against enumeration: what many draws of E say, next to what is true.

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
    """A policy with all that it can say: completions that end by EOS, of unequal length by prompt, and cut off ones."""

    apply: Apply
    params: Params
    space: Space
    values: fx.TokenValues
    probabilities: Tensor

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """n independent rows of the space, prompt and completion."""
        return torch.multinomial(self.probabilities, n, replacement=True, generator=generator)

    def draw_prompts(self, prompts: int, each: int, generator: torch.Generator) -> Tensor:
        """Prompts drawn with replacement and ``each`` completions of every one, a prompt's rows next to each other."""
        chosen = torch.randint(self.space.prompts, (prompts,), generator=generator)
        given = self.probabilities * (self.space.batch.group == chosen[:, None])
        return torch.multinomial(given, each, replacement=True, generator=generator).flatten()

    def batch(self, picked: Tensor) -> Batch:
        """Those rows, each a cluster of its own."""
        return take(self.space, picked)._replace(group=None)

    def along(self, directions: list[Params]) -> fx.TokenValues:
        """Derivatives of every token's values in each direction, (k, N, T)."""
        found = [token_jvp(self.params, v, self.space.batch, self.apply, self.space.temperature) for v in directions]
        return fx.TokenValues(*(torch.stack(field) for field in zip(*found, strict=True)))

    def step(self, direction: Params, spread: float) -> tuple[Params, fx.TokenValues]:
        """theta + eta v with eta such that log-weights have that standard deviation to first order, and its values."""
        log_weights = self.along([direction]).logprobs[0].sum(-1)
        eta = spread / (self.probabilities * log_weights**2).sum().sqrt()
        there = shift(self.params, direction, eta)
        return there, fx.token_values(there, self.space.batch, self.apply, self.space.temperature)

    def entropy_change(self, there: Params, normalize: Normalize) -> Tensor:
        """The exact H(there) - H(theta)."""
        after, before = (exact_entropy(self.apply, p, self.space, normalize) for p in (there, self.params))
        return after - before

    def snis(
        self,
        moved: fx.TokenValues,
        picked: Tensor,
        estimator: Estimator,
        normalize: Normalize,
        clusters: Tensor | None = None,
    ) -> fx.SnisDelta:
        """The estimate of that change from one draw."""
        mask = self.space.batch.completion_mask[picked]
        base, after = (completion_values(picked_values(x, picked), mask) for x in (self.values, moved))
        return snis(base, after, estimator, normalize, clusters=clusters)


def world_of(
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
    made = world_of(4, PROMPTS, VOCAB, 4, 1.0)
    lengths = made.space.batch.completion_mask.sum(-1)
    by_prompt = [float((made.probabilities * lengths)[made.space.batch.group == k].sum() * 3) for k in range(3)]
    assert len(lengths.unique()) == 4
    assert max(by_prompt) - min(by_prompt) > 1
    return made


def picked_values(values: fx.TokenValues, picked: Tensor) -> fx.TokenValues:
    return fx.TokenValues(*(v[..., picked, :] for v in values))


def first_order_rows(
    world: World, slopes: fx.TokenValues, picked: Tensor, estimator: Estimator, normalize: Normalize
) -> Tensor:
    """<grad s_a, v_k> of one draw, (n, k)."""
    weight = entropy_coefficients(picked_values(world.values, picked), world.batch(picked), estimator, normalize)
    return weighted_rows(weight, picked_values(slopes, picked))


def weighted_rows(weight: fx.TokenValues, slopes: fx.TokenValues) -> Tensor:
    return (weight.logprobs * slopes.logprobs + weight.entropies * slopes.entropies).sum(-1).T


class Update(NamedTuple):
    """A step of four rollouts and its parts gamma g_i."""

    batch: Batch
    state: AdamWState
    parts: list[Params]


def update_of(world: World) -> Update:
    generator = torch.Generator().manual_seed(0)
    batch, state = random_batch(generator, 4, 7, VOCAB), random_adamw_state(generator, world.params)
    g = reference.sequence_gradients(world.apply, world.params, batch, world.space.temperature)
    gain = fx.adamw_decompose(reference.add(g), state, world.params).gain
    return Update(batch, state, [{name: gain[name] * x for name, x in row.items() if x is not None} for row in g])


@pytest.fixture(scope="module")
def update(world: World) -> Update:
    return update_of(world)


def slopes_of(gradient: Params, directions: list[Params]) -> Tensor:
    return torch.tensor([reference.inner(gradient, v) for v in directions], dtype=torch.float64)


@estimates
def test_draw_from_space_matches_public_functions(
    world: World, update: Update, estimator: Estimator, normalize: Normalize
) -> None:
    picked = world.draw_prompts(12, 3, torch.Generator().manual_seed(1))
    batch, t = world.batch(picked)._replace(group=torch.arange(36) // 3), world.space.temperature
    chosen = {"apply": world.apply, "objective": fx.Entropy(estimator, normalize), "temperature": t}
    matrix = first_order_rows(world, world.along(update.parts), picked, estimator, normalize)
    out = fx.influence(world.params, update.batch, batch, update.state, matrix=True, **chosen)
    assert_close(out.matrix, matrix)
    assert_close(out.per_sequence, matrix.sum(0), matrix.abs().sum(0))
    shares = denominator_weights(batch.completion_mask, normalize)
    assert_close(out.stderr, cluster_stderr(matrix, matrix.sum(0), shares / shares.sum(), cluster_index(batch)))
    unions = fx.influence(world.params, update.batch, batch, update.state, **chosen).stderr
    assert_close(unions, cluster_stderr(matrix, matrix.sum(0), shares / shares.sum(), random_group_index(batch)))
    v, eta = update.parts[0], 0.05
    single = fx.jvp_delta(world.params, v, batch, **chosen)
    assert_close(single.contributions, matrix[:, 0])
    moved = fx.token_values(shift(world.params, v, eta), world.space.batch, world.apply, t)
    whole = fx.snis_delta(world.params, v, eta, batch, **chosen)
    for a, b in zip(world.snis(moved, picked, estimator, normalize, cluster_index(batch)), whole, strict=True):
        assert_close(a, b)


def standard_errors_off(draws: Tensor, truth: Tensor) -> Tensor:
    """(mean - truth) / standard error of the mean, over draws (R, k)."""
    return (draws.mean(0) - truth) / (draws.std(0) / math.sqrt(len(draws)))


@pytest.fixture(scope="module")
def directions(world: World) -> list[Params]:
    generator = torch.Generator().manual_seed(3)
    own = [exact_gradient(world.apply, world.params, world.space, normalize) for normalize in NORMALIZES]
    return [*own, *(random_direction(generator, world.params) for _ in range(3))]


@estimates
def test_entropy_gradient_is_consistent(
    world: World, directions: list[Params], estimator: Estimator, normalize: Normalize
) -> None:
    """800 draws of 512 rollouts: the mean within 4 standard errors in every direction, and those 1% of the slope."""
    generator, slopes = torch.Generator().manual_seed(4), world.along(directions)
    truth = slopes_of(exact_gradient(world.apply, world.params, world.space, normalize), directions)
    draws = torch.stack(
        [first_order_rows(world, slopes, world.draw(512, generator), estimator, normalize).sum(0) for _ in range(800)]
    )
    own = NORMALIZES.index(normalize)
    assert draws[:, own].std() / math.sqrt(800) < 0.01 * truth[own]
    assert standard_errors_off(draws, truth).abs().max() < 4


@estimates
def test_snis_at_a_finite_step_is_consistent(world: World, estimator: Estimator, normalize: Normalize) -> None:
    """400 draws of 1024 rollouts along a step so long that its first order would be seen to be wrong."""
    generator = torch.Generator().manual_seed(5)
    v = random_direction(generator, world.params)
    there, moved = world.step(v, 0.7)
    truth = world.entropy_change(there, normalize)
    first = slopes_of(
        exact_gradient(world.apply, world.params, world.space, normalize),
        [{name: there[name] - p for name, p in world.params.items()}],
    )
    draws = torch.stack(
        [world.snis(moved, world.draw(1024, generator), estimator, normalize).delta_h[None] for _ in range(400)]
    )
    assert standard_errors_off(draws, truth).abs() < 4
    assert standard_errors_off(draws, first).abs() > 10
    assert standard_errors_off(draws, torch.zeros(1)).abs() > 10


@pytest.mark.parametrize("kind", ["reward", "kl"])
def test_objectives_are_consistent(world: World, directions: list[Params], kind: str) -> None:
    """Their baselines are taken over E itself, which may cost a bias of order 1/n and no more."""
    generator, slopes = torch.Generator().manual_seed(6), world.along(directions)
    ids, mask = world.space.batch.input_ids, world.space.batch.completion_mask
    reward = ((ids == 2) & mask).sum(-1).double() - 0.5 * mask.sum(-1)
    other = shift(world.params, directions[2], 1.5)
    theirs = fx.token_values(other, world.space.batch, world.apply, world.space.temperature).logprobs

    def score(logprobs: Tensor, entropies: Tensor, batch: Batch) -> Tensor:
        return reward if kind == "reward" else (logprobs - theirs).sum(-1)

    def query(picked: Tensor) -> Objective:
        return fx.expected_reward(reward[picked]) if kind == "reward" else fx.kl_to_reference(theirs[picked])

    leaves = reference.tracked(world.params)
    truth = slopes_of(reference.gradient(exact_expected(world.apply, leaves, world.space, score), leaves), directions)
    draws = []
    for _ in range(500):
        picked = world.draw(512, generator)
        values = picked_values(world.values, picked)
        weight = objective_coefficients(query(picked), values, world.batch(picked))
        draws.append(weighted_rows(weight, picked_values(slopes, picked)).sum(0))
    found = torch.stack(draws)
    assert (found.std(0) / math.sqrt(len(draws)) / truth.abs()).min() < 0.01
    assert standard_errors_off(found, truth).abs().max() < 4


@estimates
def test_every_order_is_exact_on_full_distribution(estimator: Estimator, normalize: Normalize) -> None:
    """E holds each completion as often as it is probable, so nothing is left of the sampling error."""
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
    here = exact_entropy(apply, {name: p + eta * v[name] for name, p in params.items()}, space, normalize)
    first = torch.autograd.grad(here, eta, create_graph=True)[0]
    second = torch.autograd.grad(first, eta)[0]
    found = fx.jvp_delta(params, v, batch, **chosen)
    assert min(first.abs(), second.abs()) > 1e-3
    assert_close(found.first, first.detach())
    assert_close(found.second, second)

    there = exact_entropy(apply, shift(params, v, 5.0), space, normalize)
    assert (there - here).abs() > 10 * (5 * first + 12.5 * second - (there - here)).abs().clamp(max=1e-3)
    assert_close(fx.snis_delta(params, v, 5.0, batch, clip=None, **chosen).delta_h, (there - here).detach())

    update = random_batch(generator, 3, 5, 3)
    state = random_adamw_state(generator, params)
    out = fx.influence(params, update, batch, state, matrix=True, **chosen)
    g = reference.sequence_gradients(apply, params, update, temperature)
    gain = fx.adamw_decompose(reference.add(g), state, params).gain
    truth = slopes_of(
        exact_gradient(apply, params, space, normalize), [{"table": gain["table"] * row["table"]} for row in g]
    )
    assert truth.abs().max() > 1e-3
    assert_close(out.per_sequence, truth, out.matrix.abs().sum())


@pytest.mark.parametrize("normalize", NORMALIZES)
@pytest.mark.parametrize("seed", [1, 3, 6, 7])
def test_snis_per_decision_has_smaller_error_than_sequence(normalize: Normalize, seed: int) -> None:
    """Up to nine tokens, 800 draws of 64 rollouts: smaller by four standard errors of the paired difference."""
    generator = torch.Generator().manual_seed(7)
    world = world_of(seed, [torch.tensor([1]), torch.tensor([2])], 3, 9, 2.0, spread=0.5)
    assert (world.probabilities * world.space.batch.completion_mask.sum(-1)).sum() > 3
    there, moved = world.step(random_direction(generator, world.params), 0.7)
    truth = world.entropy_change(there, normalize)
    errors = []
    for _ in range(800):
        picked = world.draw(64, generator)
        errors.append(torch.stack([world.snis(moved, picked, e, normalize).delta_h - truth for e in ESTIMATORS]))
    per_decision, sequence = torch.stack(errors).square().T
    saved = sequence - per_decision
    assert saved.mean() > 4 * saved.std() / math.sqrt(len(saved))


class Coverage(NamedTuple):
    """How often delta_i +- 1.96 stderr_i holds the truth, by rollout i of U."""

    clusters: Tensor
    rows: Tensor
    unions: Tensor


def coverage(
    world: World, update: Update, estimator: Estimator, normalize: Normalize, prompts: int, each: int
) -> Coverage:
    """Over 1200 draws of E: the stated error bars, those that take rows for clusters, those of eight unions.

    The truth is the exact delta_i under the distribution that both prompts and completions come from. With eight
    unions 1.96 is replaced by the quantile of Student's t with seven degrees of freedom.
    """
    generator, slopes, repeats = torch.Generator().manual_seed(8), world.along(update.parts), 1200
    truth = slopes_of(exact_gradient(world.apply, world.params, world.space, normalize), update.parts)
    hits = torch.zeros(3, len(truth))
    for _ in range(repeats):
        picked = world.draw_prompts(prompts, each, generator)
        batch = world.batch(picked)._replace(group=torch.arange(prompts).repeat_interleave(each))
        matrix = first_order_rows(world, slopes, picked, estimator, normalize)
        shares = denominator_weights(batch.completion_mask, normalize)
        kinds = ((cluster_index(batch), 1.96), (torch.arange(len(picked)), 1.96), (random_group_index(batch), 2.365))
        for k, (index, quantile) in enumerate(kinds):
            error = cluster_stderr(matrix, matrix.sum(0), shares / shares.sum(), index)
            hits[k] += (matrix.sum(0) - truth).abs() <= quantile * error
    return Coverage(*(hits / repeats))


def within_bounds(share: Tensor) -> bool:
    """Of 1200 draws with true coverage 95%, the share has a standard deviation of 0.6%."""
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
    found = coverage(world, update, estimator, normalize, prompts, each)
    assert within_bounds(found.clusters), found.clusters
    assert within_bounds(found.unions), found.unions
    if each > 1:
        assert found.rows.min() < 0.9, "prompts move together, and bars that take rows for clusters are too short"


@pytest.mark.xfail(
    strict=True,
    reason="per token, the stated formula leaves out that the H in the centre of E is estimated too: the part of row a "
    "in delta_i's error is M_ai - delta_i f_a / sum f - lambda_i (h_a - H f_a) / sum f, lambda_i = d log E[T] / d eta",
)
def test_cluster_stderr_covers_truth_when_lengths_change() -> None:
    world = world_of(19, PROMPTS, VOCAB, 4, 1.3)
    found = coverage(world, update_of(world), "per_decision", "token", 48, 4)
    assert within_bounds(found.clusters), found.clusters


@estimates
@pytest.mark.parametrize("seed", [4, 19])
def test_snis_stderr_covers_truth_in_95_percent(seed: int, estimator: Estimator, normalize: Normalize) -> None:
    """The jackknife, on the policy too whose completion lengths change much: it estimates each E's own centre anew."""
    world, generator = world_of(seed, PROMPTS, VOCAB, 4, 1.3), torch.Generator().manual_seed(9)
    there, moved = world.step(update_of(world).parts[0], 0.4)
    truth, clusters = world.entropy_change(there, normalize), torch.arange(48).repeat_interleave(4)
    hits = []
    for _ in range(1200):
        out = world.snis(moved, world.draw_prompts(48, 4, generator), estimator, normalize, clusters)
        hits.append((out.delta_h - truth).abs() <= 1.96 * out.stderr)
    share = torch.stack(hits).double().mean()
    assert within_bounds(share), share
