"""Read a finished run back as values."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fx_influence.core.display import record_line
from fx_influence.estimators.deviations import NOTHING_LEFT_OUT, Deviations
from fx_influence.estimators.stderr import MAX_RANDOM_GROUPS, interval_half_width
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.runtime.renamed import current_summary
from fx_influence.interop.runtime.run_files import (
    BASELINE,
    ENVIRONMENT,
    PLAN,
    SEQUENCES,
    SUMMARY,
    UPDATE_ROLLOUTS,
    UPDATE_TOKENS,
    eval_file,
    raise_if_damaged,
)
from fx_influence.lab.analysis.finite_steps.figures import rollout_deltas
from fx_influence.lab.plan import EntropyInfluencePlan
from fx_influence.lab.store import RunDirectory
from fx_influence.types import Params


@dataclass(frozen=True, repr=False)
class EvaluationResults:
    """One evaluation batch E.

    Attributes:
        arrays: of its ``.npz``; their names are in ``lab.experiment.finite_steps.sweep`` and
            ``lab.analysis.finite_steps.figures.rollout_fits``.
        matrix: M (n_e, n_u), nats per unit lr; None where it was not stored, as for a step of a training run.
        summary: figures of the evaluation.
        rollouts: of E, in the order of every axis over E.
    """

    arrays: dict[str, np.ndarray]
    matrix: np.ndarray | None
    summary: dict[str, Any]
    rollouts: list[Rollout]

    def deviations(self) -> Deviations | None:
        """Return what each part of E carries beyond its expectation; None for runs of version 0.2 and before."""
        if "deviations" not in self.arrays:
            return None
        by_part = torch.from_numpy(self.arrays["deviations"])
        # A cross-fitted step of a training run has the part that each influence leaves out.
        left_out = self.arrays.get("left_out", np.full(by_part.shape[1], NOTHING_LEFT_OUT))
        return Deviations(by_part, torch.from_numpy(left_out))

    @property
    def degrees_of_freedom(self) -> int:
        """Return those of Student's t for intervals about influences and their sums, see ``fx.Influence``."""
        deviations = self.deviations()
        if deviations is not None:
            return deviations.degrees_of_freedom()
        count = self.finite_degrees_of_freedom + 1
        return (count if self.matrix is not None else min(count, MAX_RANDOM_GROUPS)) - 1

    @property
    def finite_degrees_of_freedom(self) -> int:
        """Return those for intervals about finite steps, whose errors are by the jackknife: E's prompts less one."""
        return len({rollout.group for rollout in self.rollouts}) - 1

    def told(self) -> np.ndarray:
        """Return bool (n_u,), whether the 95% interval of each rollout's influence excludes 0, so its sign is told."""
        half_width = interval_half_width(self.arrays["stderr"], self.degrees_of_freedom)
        return np.abs(self.arrays["per_sequence"]) > half_width

    def __repr__(self) -> str:
        return record_line(self)


@dataclass(frozen=True, repr=False)
class EntropyInfluenceResults:
    """A run as it was stored. Influences are in nats per unit lr; times ``summary["lr"]``, in nats per step.

    Attributes:
        path: the run directory.
        plan: what was measured.
        environment: packages, hardware, and hashes of the files that were read.
        summary: figures of the run.
        sequences: one record per rollout of U, in the order of every array over U.
        update_rollouts: of U, in the same order.
        tokens: ``logprobs``, ``entropies``, ``coefficients`` and, with an entropy bonus, ``entropy_coefficients`` of
            U's tokens, (n_u, T) in the columns of ``per_token``; empty for a run that was stored without them.
        evaluations: one for each E.
    """

    path: Path
    plan: EntropyInfluencePlan
    environment: dict[str, Any]
    summary: dict[str, Any]
    sequences: list[dict[str, Any]]
    update_rollouts: list[Rollout]
    tokens: dict[str, np.ndarray]
    evaluations: tuple[EvaluationResults, ...]

    def baseline(self) -> Params:
        """Return v_baseline by parameter name; it is read at the call, because it is as large as the model."""
        directory = RunDirectory(self.path)
        with raise_if_damaged(self.path):
            return directory.read_tensors(BASELINE)

    def table(self) -> Any:
        """Return ``sequences`` as a pandas DataFrame.

        Raises:
            ImportError: naming the remedy, where pandas is missing.
        """
        return require_pandas().DataFrame(self.sequences)

    def finite_steps(self, evaluation: int = 0) -> Any:
        """Return the finite steps as a pandas DataFrame, a row for each rollout of U and eta: Delta H in nats.

        Args:
            evaluation: number of E.

        Returns:
            Columns ``id``, ``eta``, ``first_order`` (eta delta_i) and, as far as they were measured, ``grad``,
            ``grad_stderr``, ``grad_ess`` and ``baseline_plus_grad`` (less the baseline's).

        Raises:
            ImportError: naming the remedy, where pandas is missing.
        """
        arrays = self.evaluations[evaluation].arrays
        eta, n_u = arrays["eta"], len(self.sequences)
        columns: dict[str, Any] = {
            "id": [record["id"] for record in self.sequences] * len(eta),
            "eta": np.repeat(eta, n_u),
            "first_order": np.outer(eta, arrays["per_sequence"]).ravel(),
        }
        columns |= {name: delta.ravel() for name, delta in rollout_deltas(arrays).items()}
        columns |= {name: arrays[name].ravel() for name in ("grad_stderr", "grad_ess") if name in arrays}
        return require_pandas().DataFrame(columns)

    def __repr__(self) -> str:
        return record_line(self)


def displayed_prompt(record: dict[str, Any]) -> str:
    """Return the prompt of a stored rollout as people read it: a conversation's question, or else the text."""
    return str(record.get("question") or record["prompt"])


def load_run(path: str | Path) -> EntropyInfluenceResults:
    """Return the finished run, or the measured step of a training run, that a directory holds.

    Directories of version 0.1 are read too, under the present names of fields, see ``interop.runtime.renamed``.

    Args:
        path: of the run directory.

    Raises:
        RunDirectoryError: naming the file that is missing or damaged.

    Example, after ``make demo``: ``load_run("runs/demo").summary["total"]``.
    """
    directory = RunDirectory.finished(path, SEQUENCES)
    with raise_if_damaged(directory.path):
        plan = EntropyInfluencePlan.from_dict(directory.read_yaml(PLAN))
        sequences = directory.read_jsonl(SEQUENCES)
        return EntropyInfluenceResults(
            path=directory.path,
            plan=plan,
            environment=directory.read_json(ENVIRONMENT),
            summary=current_summary(directory.read_json(SUMMARY)),
            sequences=sequences,
            update_rollouts=directory.read_rollouts(UPDATE_ROLLOUTS),
            tokens=directory.read_arrays(UPDATE_TOKENS) if directory.was_stored(UPDATE_TOKENS) else {},
            evaluations=tuple(_evaluation(directory, i, len(sequences)) for i in range(len(plan.evaluations))),
        )


def require_pandas() -> Any:
    """Return pandas. Raises ``ImportError``, naming the remedy, where it is missing."""
    if importlib.util.find_spec("pandas") is None:
        raise ImportError("a table needs pandas: pip install pandas, or read the values that the table is made of")
    return importlib.import_module("pandas")


def _evaluation(directory: RunDirectory, index: int, n_u: int) -> EvaluationResults:
    arrays, matrix = directory.read_arrays(eval_file(index, ".npz")), eval_file(index, "_delta_matrix.npy")
    if len(arrays["per_sequence"]) != n_u:
        rollouts = len(arrays["per_sequence"])
        raise ValueError(f"{SEQUENCES} has {n_u} records; expected {rollouts}, one for each rollout of U")
    return EvaluationResults(
        arrays=arrays,
        matrix=directory.read_array(matrix) if directory.was_stored(matrix) else None,
        summary=current_summary(directory.read_json(eval_file(index, ".json"))),
        rollouts=directory.read_rollouts(eval_file(index, "_rollouts.jsonl")),
    )
