"""Correlations of the rollouts' influence with their recorded properties, under each allocation of the baseline."""

from __future__ import annotations

import numpy as np

from fx_influence.lab.analysis.allocation import ALLOCATIONS, allocate
from fx_influence.lab.analysis.correlation import Column, Row, adjust, correlation_rows
from fx_influence.lab.analysis.covariates import prompts, recorded, rollout_covariates
from fx_influence.lab.results import EntropyInfluenceResults

MEASURES = ("pearson", "spearman", "partial_pearson", "partial_spearman")


def rollout_correlations(results: EntropyInfluenceResults, evaluation: int = 0) -> list[Row]:
    """Return correlations of delta_i, and of delta_i with its share of the baseline, with every covariate.

    Fields: those of ``correlation_rows``, ``influence`` being the allocation, and ``q``, corrected over all rows.
    """
    targets = _allocated(results, evaluation)
    rows = correlation_rows(targets, rollout_covariates(results), prompts(results), "advantage", MEASURES)
    return adjust(rows)


def _allocated(results: EntropyInfluenceResults, evaluation: int) -> dict[str, Column]:
    evaluated = results.evaluations[evaluation]
    influence, baseline = evaluated.arrays["per_sequence"].astype(float), float(evaluated.summary["baseline"])
    norms = recorded(results, "gradient_norm")
    return {
        name: f"needs gradient_norm, which {norms}"
        if name == "grad_norm" and isinstance(norms, str)
        else allocate(influence, baseline, np.ones_like(influence) if isinstance(norms, str) else norms, name)
        for name in ALLOCATIONS
    }
