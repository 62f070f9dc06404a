"""Read the ledger of a training run as columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fx_influence.core.display import record_line
from fx_influence.interop.ledger.entry import DEGREES, MAX_REWARDS, MEASURED_DEGREES, REWARD_VALUE
from fx_influence.interop.ledger.file import LEDGER, STEP, read_ledger
from fx_influence.interop.runtime.run_files import RunDirectoryError
from fx_influence.lab.results import require_pandas
from fx_influence.lab.training.windows import Windows, window_columns

SPLITS_OF_A_STEP = ("frozen", "jacobian")
"""Preconditioners under which ``total`` is the step that is made, so that its terms explain what is measured."""

REWARD = "reward"
"""Kind of the labels by reward."""

EXPECTED = (
    *("total", "stderr", "measured", "measured_stderr", "unexplained_stderr", "rollouts", "rollouts_stderr"),
    *("momentum", "weight_decay", "unattributed", "entropy", "absolute", "residual", "rounding", "conditioning"),
    *("step_rounding", "ess", "lr", "reward", "length", "truncated", "clip_fraction"),
    *("evaluation_count", "update_count", "seconds", "lifetime_factor", DEGREES, MEASURED_DEGREES),
)
"""Columns that ``Training.steps`` always has, NaN where no step has them."""


@dataclass(frozen=True, repr=False)
class Training:
    """The measured steps of a training run, in their order. Changes of entropy are in nats; positive raises it.

    Attributes:
        path: directory of the measured steps.
        steps: columns (S,), one entry a measured step: ``step`` (int64) and its figures (float64, NaN where a step does
            not have one), named as in the trainer's log: ``total`` (predicted to first order), ``stderr``,
            ``measured``, ``momentum``, ..., and those that the ledger adds, see ``interop/README.md``.
        labels: columns, one entry a measured step, kind and label: ``step``, ``kind``, ``label``, ``influence``,
            ``stderr`` (NaN where it is not known), ``count`` of rollouts or tokens, ``share`` of the sum of
            |influence|. Labels of the kind ``reward`` are its values where the training run has four at most, else
            bands.
        strongest: the rollouts of each step that move the entropy most, with their ``step``.
        prompts: columns, one entry a measured step and prompt: ``step``, ``key`` (the same for the same prompt),
            ``influence`` and ``stderr`` of its rollouts' sum, ``count`` of rollouts, mean ``reward`` (NaN where it has
            none), ``prompt``, the beginning of its text.
        settings: ``preconditioner`` and ``normalize`` of the last step, as far as they are known.
        windows: the accounts of several steps, where the training run records windows.

    Example:
        >>> columns = {"step": np.array([10, 20]), "total": np.array([-0.5, -0.25])}
        >>> training = Training(Path("steps"), columns, {}, [], {}, {})
        >>> training.last_step, training.coverage
        (20, 0.1)
    """

    path: Path
    steps: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    strongest: list[dict[str, Any]]
    prompts: dict[str, np.ndarray]
    settings: dict[str, str]
    windows: Windows = field(default_factory=lambda: window_columns([]))

    @property
    def last_step(self) -> int:
        """Return the number of the last measured step: how many steps the run has made, as far as the ledger tells."""
        return int(self.steps[STEP][-1])

    @property
    def coverage(self) -> float:
        """Return the share of the run's steps up to the last measured one that are measured."""
        return len(self.steps[STEP]) / self.last_step

    @property
    def splits_the_step(self) -> bool:
        """Return whether the predicted change is that of the step that is made, and not of another preconditioner."""
        return self.settings.get("preconditioner", "frozen") in SPLITS_OF_A_STEP

    @property
    def kinds(self) -> list[str]:
        """Return the kinds of labels, in the order of the ledger."""
        return list(dict.fromkeys(self.labels["kind"].tolist()))

    def table(self) -> Any:
        """Return ``steps`` as a pandas DataFrame. Raises ``ImportError``, naming the remedy, without pandas."""
        return require_pandas().DataFrame(self.steps)

    def label_table(self) -> Any:
        """Return ``labels`` as a pandas DataFrame. Raises ``ImportError`` as ``table`` does."""
        return require_pandas().DataFrame(self.labels)

    def window_table(self) -> Any:
        """Return ``windows.figures`` as a pandas DataFrame. Raises ``ImportError`` as ``table`` does."""
        return require_pandas().DataFrame(self.windows.figures)

    def __repr__(self) -> str:
        return record_line(self)


def load_training(path: str | Path) -> Training:
    """Return the measured steps of a training run, finished or under way, from the ledger in their directory.

    Args:
        path: directory of the measured steps, by default ``entropy_influence`` in the trainer's ``output_dir``.

    Raises:
        RunDirectoryError: where there is no ledger or no step in it, and for a damaged one.

    Example, after a training run: ``load_training("runs/grpo/entropy_influence").steps["total"].sum()``.
    """
    directory = Path(path)
    entries = read_ledger(directory)
    if not entries:
        raise RunDirectoryError(
            f"{str(directory / LEDGER)!r} has no complete line; expected at least one measured step. Wait for the first"
        )
    try:
        return Training(
            path=directory,
            steps=_step_columns(entries),
            labels=_label_columns(entries),
            strongest=[{STEP: e[STEP], **rollout} for e in entries for rollout in e.get("strongest", [])],
            prompts=_prompt_columns(entries),
            settings={name: str(entries[-1][name]) for name in ("preconditioner", "normalize") if name in entries[-1]},
            windows=window_columns(entries),
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RunDirectoryError(
            f"{str(directory / LEDGER)!r} has entries of another form: {error!r}; expected figures, sums and strongest "
            "rollouts, as append_entry stores them. Read it with the version that wrote it"
        ) from error


def _step_columns(entries: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    names = dict.fromkeys([*EXPECTED, *(name for entry in entries for name in entry["figures"])])
    figures = {name: np.array([_number(e["figures"].get(name)) for e in entries]) for name in names}
    return {STEP: np.array([entry[STEP] for entry in entries], dtype=np.int64), **figures}


def _label_columns(entries: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    exact = _has_few_rewards(entries)
    rows = [
        (entry[STEP], REWARD if kind == REWARD_VALUE else kind, *row)
        for entry in entries
        for kind, sums in entry.get("sums", {}).items()
        if kind != (REWARD if exact else REWARD_VALUE)
        for row in sums
    ]
    step, kind, label, influence, stderr, count, share = zip(*rows, strict=True) if rows else ((),) * 7
    return {
        STEP: np.array(step, dtype=np.int64),
        "kind": np.array(kind, dtype=object),
        "label": np.array(label, dtype=object),
        "influence": np.array([_number(x) for x in influence], dtype=np.float64),
        "stderr": np.array([_number(x) for x in stderr], dtype=np.float64),
        "count": np.array(count, dtype=np.int64),
        "share": np.array([_number(x) for x in share], dtype=np.float64),
    }


def _has_few_rewards(entries: Sequence[dict[str, Any]]) -> bool:
    """Return whether the labels by value of the reward are known in all steps and few; bands are taken otherwise."""
    with_rewards = [entry["sums"] for entry in entries if REWARD in entry.get("sums", {})]
    names = {row[0] for sums in with_rewards for row in sums.get(REWARD_VALUE, [])}
    return 0 < len(names) <= MAX_REWARDS and all(REWARD_VALUE in sums for sums in with_rewards)


def _prompt_columns(entries: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    rows = [(entry[STEP], *row) for entry in entries for row in entry.get("prompts", [])]
    step, key, influence, stderr, count, reward, prompt = zip(*rows, strict=True) if rows else ((),) * 7
    return {
        STEP: np.array(step, dtype=np.int64),
        "key": np.array(key, dtype=object),
        "influence": np.array([_number(x) for x in influence], dtype=np.float64),
        "stderr": np.array([_number(x) for x in stderr], dtype=np.float64),
        "count": np.array(count, dtype=np.int64),
        "reward": np.array([_number(x) for x in reward], dtype=np.float64),
        "prompt": np.array(prompt, dtype=object),
    }


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
