"""The directory of a training run's measured steps, which is chosen when the first of them is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fx_influence.interop.trl.store.step import StepStore
from fx_influence.interop.trl.store.training import training_directory, window_folder


class TrainingSteps:
    """The measured steps of one training run on disk.

    Args:
        trainer: whose ``output_dir`` has the default directory.
        out: the directory, None for the default.
        name: of the ``EntropyInfluence`` that measures, empty for the first.
        training_id: id of the training run, which no other has.
        warn: called with a sentence that the user should read.
    """

    def __init__(
        self, trainer: Any, out: str | Path | None, name: str, training_id: str, warn: Callable[[str], None]
    ) -> None:
        folder = f"entropy_influence-{name}" if name else "entropy_influence"
        self._base = Path(trainer.args.output_dir) / folder if out is None else Path(out)
        self._training_id, self._warn = training_id, warn
        self._directory: Path | None = None

    def store(self, step: int) -> StepStore:
        """Return the directory of a step."""
        return StepStore(self._chosen(), step)

    def window_folder(self) -> Path:
        """Return the folder for the files of a window that is recorded."""
        return window_folder(self._chosen(), self._training_id)

    def discard(self, step: int) -> None:
        """Remove the files of a step that failed, if this process has written any."""
        if self._directory is not None:
            StepStore(self._directory, step).discard()

    def _chosen(self) -> Path:
        if self._directory is None:
            self._directory = training_directory(self._base, self._training_id)
            if self._directory != self._base:
                text = f"{self._base} holds steps of another training run; those of this one go to {self._directory}"
                self._warn(text)
        return self._directory
