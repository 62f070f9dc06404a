"""Read a finished Fisher run back as values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fx_influence.core.display import record_line
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.runtime.run_files import (
    ENVIRONMENT,
    PLAN,
    SUMMARY,
    UPDATE_ROLLOUTS,
    eval_file,
    raise_if_damaged,
)
from fx_influence.lab.plan import FisherKernelPlan
from fx_influence.lab.store import RunDirectory

UPDATE_SELF_KERNEL = "update_self_kernel.npy"
KERNEL, CHANGE_MATRIX = "_kernel.npy", "_delta_logprob_matrix.npy"


@dataclass(frozen=True, repr=False)
class FisherEvaluationResults:
    """One evaluation batch E. S_a is the log-probability of its rollout a, unnormalised, in nats.

    Attributes:
        kernel: (n_e, n_u), K_ai = <grad S_a, P grad S_i>, see ``fx.fisher_kernel``.
        delta_logprob_matrix: (n_e, n_u), <grad S_a, v_i>, effect on S_a of rollout i's part of the step, nats per unit
            lr.
        arrays: each (n_e,). ``self_kernel``: K_aa. ``predicted_delta_logprob``: <grad S_a, v> along the whole step,
            nats per unit lr. ``predicted_delta_logprob_baseline``: the contribution of momentum and weight
            decay. ``residual``: the prediction less that contribution and less the sum of the matrix's row.
        summary: figures of the evaluation.
        rollouts: of E, in the order of every axis over E.
        top: for every rollout of E the rollouts of U that move it most.
    """

    kernel: np.ndarray
    delta_logprob_matrix: np.ndarray
    arrays: dict[str, np.ndarray]
    summary: dict[str, Any]
    rollouts: list[Rollout]
    top: list[dict[str, Any]]

    def __repr__(self) -> str:
        return record_line(self)


@dataclass(frozen=True, repr=False)
class FisherKernelResults:
    """A Fisher run as it was stored. Changes are in nats per unit lr; times ``summary["lr"]``, in nats per step.

    Attributes:
        path: the run directory.
        plan: what was measured.
        environment: packages, hardware, and hashes of the files that were read.
        summary: figures of the run.
        update_rollouts: of U, in the order of every axis over U.
        update_self_kernel: (n_u,), K_ii of U's rollouts.
        evaluations: one for each E.
    """

    path: Path
    plan: FisherKernelPlan
    environment: dict[str, Any]
    summary: dict[str, Any]
    update_rollouts: list[Rollout]
    update_self_kernel: np.ndarray
    evaluations: tuple[FisherEvaluationResults, ...]

    def __repr__(self) -> str:
        return record_line(self)


def load_fisher_run(path: str | Path) -> FisherKernelResults:
    """Return the finished Fisher run in a directory.

    Raises:
        RunDirectoryError: naming the file that is missing or damaged.
    """
    directory = RunDirectory.finished(path, UPDATE_SELF_KERNEL)
    with raise_if_damaged(directory.path):
        plan = FisherKernelPlan.from_dict(directory.read_yaml(PLAN))
        return FisherKernelResults(
            path=directory.path,
            plan=plan,
            environment=directory.read_json(ENVIRONMENT),
            summary=directory.read_json(SUMMARY),
            update_rollouts=directory.read_rollouts(UPDATE_ROLLOUTS),
            update_self_kernel=directory.read_array(UPDATE_SELF_KERNEL),
            evaluations=tuple(_evaluation(directory, i) for i in range(len(plan.evaluations))),
        )


def _evaluation(directory: RunDirectory, index: int) -> FisherEvaluationResults:
    return FisherEvaluationResults(
        kernel=directory.read_array(eval_file(index, KERNEL)),
        delta_logprob_matrix=directory.read_array(eval_file(index, CHANGE_MATRIX)),
        arrays=directory.read_arrays(eval_file(index, ".npz")),
        summary=directory.read_json(eval_file(index, ".json")),
        rollouts=directory.read_rollouts(eval_file(index, "_rollouts.jsonl")),
        top=directory.read_jsonl(eval_file(index, "_top.jsonl")),
    )
