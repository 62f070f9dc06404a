"""A policy with all of its completions, and estimates from draws of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import fx_influence as fx
from fx_influence.autodiff.directional import token_jvp
from fx_influence.core.tree import shift
from fx_influence.estimators.entropy import (
    TokenCoefficients,
    behaviour_log_ratios,
    behaviour_weights,
    completion_values,
    entropy_coefficients,
    excess_entropies,
    length_coefficients,
)
from fx_influence.estimators.off_policy import spread_by_rank
from fx_influence.estimators.snis import snis
from fx_influence.testing import reference
from fx_influence.types import AdamWState, Apply, Batch, Estimator, Normalize, Params
from helpers.cases import TinyPolicy, make_apply, random_adamw_state, random_batch
from helpers.enumeration import Space, enumerate_completions, exact_entropy, exact_log_probs, take
from helpers.strategies import ESTIMATORS, NORMALIZES

estimates = pytest.mark.parametrize(
    ("estimator", "normalize"), [pytest.param(e, n, id=f"{e}-{n}") for e in ESTIMATORS for n in NORMALIZES]
)

VOCAB, EOS = 4, 0

PROMPTS = [torch.tensor([1]), torch.tensor([2, 3]), torch.tensor([3, 0, 2])]


class World(NamedTuple):
    """A policy with all of its completions: those that end by EOS, of unequal length by prompt, and truncated ones.

    ``values`` are those of the policy; ``probabilities`` those of the policy that samples, and ``behaviour`` its token
    log-probabilities where it is another one.
    """

    apply: Apply
    params: Params
    space: Space
    values: fx.TokenValues
    probabilities: Tensor
    behaviour: Tensor | None = None

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
        behaviour = None if self.behaviour is None else self.behaviour[rows]
        return take(self.space, rows)._replace(group=None, behaviour_logprobs=behaviour)

    def sampled_by(self, sampler: Params) -> World:
        """Return the same policy with completions that another one samples."""
        behaviour = fx.token_values(sampler, self.space.batch, self.apply, self.space.temperature).logprobs
        probabilities = exact_log_probs(self.apply, sampler, self.space).exp()
        return self._replace(probabilities=probabilities, behaviour=behaviour)

    def jvp(self, directions: list[Params]) -> fx.TokenValues:
        """Return the derivatives of every token's values in each direction, (k, N, T)."""
        jvps = [token_jvp(self.params, v, self.space.batch, self.apply, self.space.temperature) for v in directions]
        return fx.TokenValues(*(torch.stack(field) for field in zip(*jvps, strict=True)))

    def step(self, direction: Params, spread: float) -> tuple[Params, fx.TokenValues]:
        """Return theta + eta v and its values; log-weights have standard deviation ``spread`` to first order."""
        log_weights = self.jvp([direction]).logprobs[0].sum(-1)
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
        batch = self.batch(rows)
        base, after = (completion_values(select_values(x, rows), batch.completion_mask) for x in (self.values, moved))
        behaviour = behaviour_log_ratios(base, batch)
        return snis(base, after, estimator, normalize, clusters=clusters, behaviour=behaviour)


def make_world(
    seed: int, prompts: list[Tensor], vocab: int, longest: int, temperature: float, spread: float = 1.0
) -> World:
    width = max(len(p) for p in prompts) + longest
    apply, params = make_apply(TinyPolicy(vocab, 6, max_len=width, seed=seed))
    params = {name: p if "norm" in name else spread * p for name, p in params.items()}
    space = enumerate_completions(prompts, EOS, vocab, longest, temperature)
    values = fx.token_values(params, space.batch, apply, temperature)
    return World(apply, params, space, values, exact_log_probs(apply, params, space).exp())


def select_values(values: fx.TokenValues, rows: Tensor) -> fx.TokenValues:
    return fx.TokenValues(*(v[..., rows, :] for v in values))


def first_order_rows(
    world: World, derivatives: fx.TokenValues, rows: Tensor, estimator: Estimator, normalize: Normalize
) -> Tensor:
    """Return <grad s_a, v_k> of one draw, (n, k)."""
    weight = entropy_coefficients(select_values(world.values, rows), world.batch(rows), estimator, normalize)
    return weighted_rows(weight, select_values(derivatives, rows))


def weighted_rows(weight: TokenCoefficients, derivatives: fx.TokenValues) -> Tensor:
    return (weight.logprobs * derivatives.logprobs + weight.entropies * derivatives.entropies).sum(-1).T


def deviating_rows(
    world: World, derivatives: fx.TokenValues, rows: Tensor, estimator: Estimator, normalize: Normalize
) -> Tensor:
    """Return what each row of one draw carries to <grad H, v_k> with its part in the H that centres E, (n, k)."""
    parts = first_order_rows(world, derivatives, rows, estimator, normalize)
    batch, values, tangents = world.batch(rows), select_values(world.values, rows), select_values(derivatives, rows)
    weights, mask = behaviour_weights(values, batch, estimator), batch.completion_mask
    if weights is not None and estimator == "per_decision":
        spread = vmap(lambda *tangents: spread_by_rank(values, fx.TokenValues(*tangents), batch, normalize, "batch"))
        parts = parts + spread(*tangents).T
    if normalize == "sequence":
        return parts
    c = length_coefficients(mask, estimator, weights)
    lengths = TokenCoefficients(c, torch.zeros(mask.shape, dtype=torch.float64))
    slopes = weighted_rows(lengths, tangents).sum(0)
    return parts - excess_entropies(values, mask, estimator, weights).unsqueeze(1) * slopes


class Update(NamedTuple):
    """A step of four rollouts, with each rollout's part of it, gamma g_i."""

    batch: Batch
    state: AdamWState
    parts: list[Params]


def make_update(world: World) -> Update:
    generator = torch.Generator().manual_seed(0)
    batch, state = random_batch(generator, 4, 7, VOCAB), random_adamw_state(generator, world.params)
    g = reference.sequence_gradients(world.apply, world.params, batch, world.space.temperature)
    gain = fx.adamw_decompose(reference.add(g), state, world.params).gain
    return Update(batch, state, [{name: gain[name] * x for name, x in row.items() if x is not None} for row in g])


def derivatives_along(gradient: Mapping[str, Tensor | None], directions: Sequence[Params]) -> Tensor:
    return torch.tensor([reference.inner(gradient, v) for v in directions], dtype=torch.float64)
