"""Updates whose rollouts are their own E, drawn from a policy that can be enumerated."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import fx_influence as fx
from fx_influence.estimators.entropy import behaviour_weights, denominator_weights
from fx_influence.estimators.off_policy import weighted_denominator_shares
from fx_influence.testing import reference
from fx_influence.types import Estimator, Normalize
from helpers.enumeration import exact_gradient
from helpers.strategies import NORMALIZES
from helpers.world import World, derivatives_along, deviating_rows, select_values

PROMPTS, EACH = 12, 3


class RowSlopes(NamedTuple):
    """Derivatives along the score of each completion, the gradient of its log-probability, of everything else.

    ``values``: (N, N, T), of every token's values, by direction. ``exact``: (N,), of the exact entropy, by its mean.
    """

    values: fx.TokenValues
    exact: dict[Normalize, Tensor]


def row_slopes(world: World) -> RowSlopes:
    space = world.space.batch
    weighted = space._replace(coefficients=-space.completion_mask.double())
    gradients = reference.sequence_gradients(world.apply, world.params, weighted, world.space.temperature)
    scores = [{name: x for name, x in g.items() if x is not None} for g in gradients]
    by_mean = {mean: exact_gradient(world.apply, world.params, world.space, mean) for mean in NORMALIZES}
    return RowSlopes(world.jvp(scores), {mean: derivatives_along(g, scores) for mean, g in by_mean.items()})


class Draw(NamedTuple):
    """One update: ``parts`` (n, n) of its rows in the influences of its rows, ``shares`` (n,), and the ``truth`` (n,).

    ``moves``: whether the row has an advantage, (n,).
    """

    parts: Tensor
    shares: Tensor
    truth: Tensor
    moves: Tensor


def draw_update(
    world: World,
    slopes: RowSlopes,
    estimator: Estimator,
    normalize: Normalize,
    generator: torch.Generator,
    prompts: int = PROMPTS,
) -> Draw:
    """Return an update whose advantages are rewards minus the prompt's mean, so that siblings depend on one another."""
    rows = world.draw_prompts(prompts, EACH, generator)
    batch, mask = world.batch(rows), world.space.batch.completion_mask[rows]
    reward = ((batch.input_ids == 2) & mask).sum(-1).double() - 0.3 * mask.sum(-1)
    by_prompt = reward.view(prompts, EACH)
    advantages = (by_prompt - by_prompt.mean(-1, keepdim=True)).flatten()
    derivatives = fx.TokenValues(slopes.values.logprobs[rows], slopes.values.entropies[rows])
    parts = deviating_rows(world, derivatives, rows, estimator, normalize)
    weights = behaviour_weights(select_values(world.values, rows), batch, estimator)
    if weights is None:
        f = denominator_weights(mask, normalize)
        shares = f / f.sum()
    else:
        shares = weighted_denominator_shares(weights, mask, estimator, normalize)
    return Draw(-advantages * parts, shares, -advantages * slopes.exact[normalize][rows], advantages.abs() > 1e-9)
