"""Cross-fitted influences against enumeration: without bias, and with error bars that cover the truth."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from helpers.enumeration import exact_gradient
from helpers.world import World, derivatives_along, estimates, select_values
from torch import Tensor

from fx_influence.estimators.deviations import Deviations, deviations_of, estimate_over_others
from fx_influence.estimators.entropy import (
    denominator_weights,
    entropy_coefficients,
    excess_entropies,
    length_coefficients,
)
from fx_influence.testing import reference
from fx_influence.types import Estimator, Normalize

PROMPTS, EACH, UPDATES = 12, 3, 800


class RowSlopes(NamedTuple):
    """Derivatives along the score of each completion i, the gradient of its log-probability, of everything else.

    ``logprobs``, ``entropies``: (N, T, N), of every token's values. ``exact``: (N,), of the exact entropy.
    """

    logprobs: Tensor
    entropies: Tensor
    exact: Tensor


def row_slopes(world: World, normalize: Normalize) -> RowSlopes:
    space = world.space.batch
    weighted = space._replace(coefficients=-space.completion_mask.double())
    gradients = reference.sequence_gradients(world.apply, world.params, weighted, world.space.temperature)
    scores = [{name: x for name, x in g.items() if x is not None} for g in gradients]
    derivatives = world.jvp(scores)
    exact = derivatives_along(exact_gradient(world.apply, world.params, world.space, normalize), scores)
    return RowSlopes(derivatives.logprobs.movedim(0, -1), derivatives.entropies.movedim(0, -1), exact)


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
) -> Draw:
    """Return an update whose advantages are rewards minus the prompt's mean, so that siblings depend on one another."""
    rows = world.draw_prompts(PROMPTS, EACH, generator)
    batch, values = world.batch(rows), select_values(world.values, rows)
    mask, logprobs, entropies = batch.completion_mask, *(x[rows][..., rows] for x in slopes[:2])
    reward = ((batch.input_ids == 2) & mask).sum(-1).double() - 0.3 * mask.sum(-1)
    by_prompt = reward.view(PROMPTS, EACH)
    advantages = (by_prompt - by_prompt.mean(-1, keepdim=True)).flatten()
    weights = entropy_coefficients(values, batch, estimator, normalize)
    parts = (weights.logprobs.unsqueeze(-1) * logprobs + weights.entropies.unsqueeze(-1) * entropies).sum(1)
    if normalize == "token":
        of_lengths = (length_coefficients(mask, estimator).unsqueeze(-1) * logprobs).sum((0, 1))
        parts = parts - excess_entropies(values, mask).unsqueeze(1) * of_lengths
    f = denominator_weights(mask, normalize)
    return Draw(-advantages * parts, f / f.sum(), -advantages * slopes.exact[rows], advantages.abs() > 1e-9)


@pytest.mark.slow
@estimates
def test_cross_fitting_is_unbiased_and_covers_the_truth(
    world: World, estimator: Estimator, normalize: Normalize
) -> None:
    """The plug-in, which leaves nothing out, is biased over the same updates.

    One of eight folds is left out, so 1.96 is replaced by the quantile of Student's t with six degrees of freedom.
    """
    generator, slopes = torch.Generator().manual_seed(5), row_slopes(world, normalize)
    fold = torch.arange(PROMPTS).repeat_interleave(EACH) % 8
    errors, covered = [], []
    for _ in range(UPDATES):
        draw = draw_update(world, slopes, estimator, normalize, generator)
        parts = draw.parts.new_zeros(8, len(fold)).index_add(0, fold, draw.parts)
        shares = draw.shares.new_zeros(8).index_add(0, fold, draw.shares)
        delta = estimate_over_others(parts, shares, fold)
        errors.append(torch.stack([delta.sum(), draw.parts.sum()]) - draw.truth.sum())
        stderr = Deviations(deviations_of(parts, delta, shares, fold), fold).stderr()
        within = (delta - draw.truth).abs() <= 2.447 * stderr
        covered.append(within[draw.moves].double())
    by_update = torch.stack(errors)
    cross_fitted, plug_in = (by_update.mean(0) / (by_update.std(0) / math.sqrt(UPDATES))).tolist()
    assert abs(cross_fitted) < 4
    assert abs(plug_in) > 4
    coverage = torch.cat(covered).mean()
    assert 0.92 <= coverage <= 0.97
