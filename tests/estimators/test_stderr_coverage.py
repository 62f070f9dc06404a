"""Coverage of standard errors over many draws of E, against enumeration."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from helpers.enumeration import (
    exact_gradient,
)
from helpers.world import (
    PROMPTS,
    VOCAB,
    Update,
    World,
    derivatives_along,
    deviating_rows,
    estimates,
    make_update,
    make_world,
)
from torch import Tensor

from fx_influence.estimators.entropy import denominator_weights
from fx_influence.estimators.stderr import MAX_RANDOM_GROUPS, cluster_index, cluster_stderr
from fx_influence.types import Estimator, Normalize


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
    generator, derivatives, repeats = torch.Generator().manual_seed(8), world.jvp(update.parts), 1200
    truth = derivatives_along(exact_gradient(world.apply, world.params, world.space, normalize), update.parts)
    covered = torch.zeros(3, len(truth))
    for _ in range(repeats):
        rows = world.draw_prompts(prompts, each, generator)
        batch = world.batch(rows)._replace(group=torch.arange(prompts).repeat_interleave(each))
        matrix = deviating_rows(world, derivatives, rows, estimator, normalize)
        shares = denominator_weights(batch.completion_mask, normalize)
        clusterings = (
            (cluster_index(batch), 1.96),
            (torch.arange(len(rows)), 1.96),
            (cluster_index(batch) % MAX_RANDOM_GROUPS, 2.365),
        )
        for k, (index, quantile) in enumerate(clusterings):
            error = cluster_stderr(matrix, matrix.sum(0), shares / shares.sum(), index)
            covered[k] += (matrix.sum(0) - truth).abs() <= quantile * error
    return Coverage(*(covered / repeats))


def within_bounds(share: Tensor) -> bool:
    """Return whether a share of 1200 draws is near 95%; with true coverage 95% its standard deviation is 0.6%."""
    return bool(share.min() >= 0.90 and share.max() <= 0.98)


@pytest.mark.slow
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


@pytest.mark.slow
def test_cluster_stderr_covers_truth_when_lengths_change() -> None:
    """The H in E's centre is estimated too, which matters where a rollout changes lengths."""
    world = make_world(19, PROMPTS, VOCAB, 4, 1.3)
    covered_share = coverage(world, make_update(world), "per_decision", "token", 48, 4)
    assert within_bounds(covered_share.clusters), covered_share.clusters


@pytest.mark.slow
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
