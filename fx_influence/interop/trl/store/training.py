"""Identify a training run, so that its steps go to one directory over resumptions and overwrite no other's."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fx_influence.interop.ledger.file import LEDGER, read_ledger
from fx_influence.interop.runtime.environment import environment
from fx_influence.interop.runtime.run_files import ENVIRONMENT

TRAINING = "training"
"""Field of a step's environment.json, and of its entry in the ledger, that holds the id of its training run."""

WINDOW = ".window-"
"""Beginning of the name of the folder with a window's files, before the id of its training run."""

CHECKPOINT_FILE = "entropy_influence.json"
"""File in a trainer's checkpoint that holds the id of its training run, by the name of each ``EntropyInfluence``."""


def environment_of(trainer: Any, training_id: str) -> dict[str, Any]:
    """Return what environment.json has in every step of a training run: versions, machine, trainer and the run's id."""
    origin = {"trainer": type(trainer).__name__, "processes": trainer.accelerator.num_processes}
    return {**environment(), "inputs_sha256": {}, **origin, TRAINING: training_id}


def training_directory(base: Path, training_id: str) -> Path:
    """Return the directory for a training run's steps: the one that has some of them, or else the first that is empty.

    ``base``, ``base_2``, ``base_3``, ... are tried in turn, so that no training run overwrites another's steps.
    """
    candidates = (base if k == 1 else base.with_name(f"{base.name}_{k}") for k in itertools.count(1))
    return next(
        path
        for path in candidates
        if not path.exists() or (path.is_dir() and not any(path.iterdir())) or training_id in _training_ids(path)
    )


def window_folder(directory: Path, training_id: str) -> Path:
    """Return the folder for the files of a window that is recorded, in the directory of the training run's steps."""
    return directory / f"{WINDOW}{training_id}"


def _training_ids(path: Path) -> Iterator[str]:
    yield from (folder.name.removeprefix(WINDOW) for folder in path.glob(f"{WINDOW}*"))
    for file in path.glob(f"step_*/{ENVIRONMENT}"):
        with suppress(OSError, ValueError):
            yield str(json.loads(file.read_text(encoding="utf-8")).get(TRAINING))
    # The ledger stays where the directories of steps have been deleted to free space.
    if (path / LEDGER).is_file():
        with suppress(OSError, ValueError):
            yield from {str(entry.get(TRAINING)) for entry in read_ledger(path)}


def write_training_id(checkpoint: Path, name: str, training_id: str) -> None:
    """Store in a trainer's checkpoint the id of its training run.

    Args:
        checkpoint: its directory.
        name: of the ``EntropyInfluence`` that measures it.
        training_id: id of the training run, which no other has.
    """
    file = checkpoint / CHECKPOINT_FILE
    ids = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**ids, name: training_id}), encoding="utf-8")


def read_training_id(checkpoint: Path, name: str, log_history: list[Any]) -> str | None:
    """Return the id of the training run that wrote a checkpoint.

    Args:
        checkpoint: its directory.
        name: of the ``EntropyInfluence`` that measures it.
        log_history: of the trainer that resumes.

    Returns:
        None where the checkpoint has no id, or is not the one with this log.
    """
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        ids = json.loads((checkpoint / CHECKPOINT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # Compared as text, because NaN differs from itself.
    same_log = json.dumps(state.get("log_history")) == json.dumps(log_history)
    return ids.get(name) if same_log else None
