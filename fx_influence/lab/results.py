"""A finished run read back as values."""

from __future__ import annotations

import importlib
import importlib.util
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from fx_influence.interop.rollouts import Rollout
from fx_influence.lab.plan import EntropyInfluencePlan
from fx_influence.lab.store import (
    BASELINE,
    ENVIRONMENT,
    PLAN,
    SEQUENCES,
    SUMMARY,
    UPDATE_ROLLOUTS,
    RunDirectory,
    RunDirectoryError,
    eval_name,
)
from fx_influence.types import Params


@dataclass(frozen=True)
class EvaluationResults:
    """One evaluation batch E: the arrays of its ``.npz``, M (n_e, n_u) per unit lr, its figures and its rollouts."""

    arrays: dict[str, np.ndarray]
    matrix: np.ndarray
    summary: dict[str, Any]
    rollouts: list[Rollout]


@dataclass(frozen=True)
class EntropyInfluenceResults:
    """A run as it was stored. Influences are in nats per unit lr; times ``summary["lr"]``, in nats per step.

    ``sequences``: one record per rollout of U, in the order of every array over U.
    """

    path: Path
    plan: EntropyInfluencePlan
    environment: dict[str, Any]
    summary: dict[str, Any]
    sequences: list[dict[str, Any]]
    update_rollouts: list[Rollout]
    evaluations: tuple[EvaluationResults, ...]

    def baseline(self) -> Params:
        """v_baseline by parameter name, read when asked for: it is as large as the model."""
        return load_file(self.path / BASELINE)

    def table(self) -> Any:
        """``sequences`` as a pandas DataFrame. Raises ``ImportError`` naming the remedy where pandas is missing."""
        if importlib.util.find_spec("pandas") is None:
            raise ImportError("a table needs pandas: pip install pandas, or read the records of .sequences")
        return importlib.import_module("pandas").DataFrame(self.sequences)


def load_run(path: str | Path) -> EntropyInfluenceResults:
    """The finished run in a directory. Raises ``RunDirectoryError`` naming the file that is missing or damaged."""
    directory = RunDirectory(Path(path))
    for name in (PLAN, ENVIRONMENT, SUMMARY, SEQUENCES, UPDATE_ROLLOUTS):
        if not directory.has(name):
            raise RunDirectoryError(
                f"{str(path)!r} has no {name}, so it is no finished run; finish it with fx-influence run --out, or "
                "check the path"
            )
    try:
        plan = EntropyInfluencePlan.from_dict(directory.read_yaml(PLAN))
        return EntropyInfluenceResults(
            path=directory.path,
            plan=plan,
            environment=directory.read_json(ENVIRONMENT),
            summary=directory.read_json(SUMMARY),
            sequences=directory.read_jsonl(SEQUENCES),
            update_rollouts=directory.read_rollouts(UPDATE_ROLLOUTS),
            evaluations=tuple(_evaluation(directory, i) for i in range(len(plan.evaluations))),
        )
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RunDirectoryError(
            f"{str(path)!r} is damaged: {error}; run its plan.yaml again into another --out"
        ) from error


def _evaluation(directory: RunDirectory, index: int) -> EvaluationResults:
    return EvaluationResults(
        arrays=directory.read_arrays(eval_name(index, ".npz")),
        matrix=directory.read_array(eval_name(index, "_delta_matrix.npy")),
        summary=directory.read_json(eval_name(index, ".json")),
        rollouts=directory.read_rollouts(eval_name(index, "_rollouts.jsonl")),
    )
