"""Cross-fitted influences against enumeration: without bias, and with error bars that cover the truth."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.cross_fitting import EACH, PROMPTS, RowSlopes, draw_update
from helpers.world import World, estimates

from fx_influence.estimators.deviations import Deviations, deviations_of, estimate_over_others
from fx_influence.types import Estimator, Normalize

UPDATES = 800


@pytest.mark.slow
@estimates
def test_cross_fitting_is_unbiased_and_covers_the_truth(
    world: World, slopes: RowSlopes, estimator: Estimator, normalize: Normalize
) -> None:
    """The plug-in, which leaves nothing out, is biased over the same updates.

    One of eight folds is left out, so 1.96 is replaced by the quantile of Student's t with six degrees of freedom.
    """
    generator, fold = torch.Generator().manual_seed(5), torch.arange(PROMPTS).repeat_interleave(EACH) % 8
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
