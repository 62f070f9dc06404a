"""Steps of a window in files, where they do not fit memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from fx_influence.core.checks import wrong_type
from fx_influence.optim.adamw import MOMENTS
from fx_influence.optim.step import AdamWStep


class StepFile(NamedTuple):
    """A step whose tensors of the parameters' size are in a file.

    Attributes:
        path: the file.
        step: the step without them.
    """

    path: Path
    step: AdamWStep

    @classmethod
    def write(cls, step: AdamWStep, path: Path) -> StepFile:
        """Return the step with its tensors in a new file.

        Raises:
            OSError: where the file cannot be written.
        """
        moments = {name: {**getattr(step.opt_state, name)} for name in MOMENTS}
        torch.save({"params": {**step.params}, "grads": {**step.grads}, **moments}, path)
        without: dict[str, Any] = {name: {} for name in MOMENTS}
        return cls(path, replace(step, params={}, grads={}, opt_state=step.opt_state._replace(**without)))

    def read(self) -> AdamWStep:
        """Return the step, its tensors on the devices that they were on; on a CPU they stay in the file."""
        tensors = torch.load(self.path, weights_only=True, mmap=True)
        params, grads = tensors.pop("params"), tensors.pop("grads")
        return replace(self.step, params=params, grads=grads, opt_state=self.step.opt_state._replace(**tensors))


@contextmanager
def step_directory(states_dir: str | os.PathLike[str] | None) -> Iterator[Path | None]:
    """Give a new directory within ``states_dir`` that is deleted with its files at the end; None where it is None."""
    if states_dir is None:
        yield None
        return
    with TemporaryDirectory(prefix="fx_influence_window_", dir=states_dir) as directory:
        yield Path(directory)


def check_states_dir(states_dir: object, size: int) -> None:
    """Check the directory for files of ``size`` bytes in all.

    Raises:
        TypeError: for something else than a path.
        ValueError: where there is no such directory, or less space.
    """
    remedy = "Pass a directory on a disk with space for the window's states, or a larger memory_budget"
    if states_dir is None:
        return
    if not isinstance(states_dir, (str, os.PathLike)):
        raise wrong_type("states_dir", states_dir, "a path", remedy)
    if not os.path.isdir(states_dir):
        raise ValueError(f"states_dir is {os.fspath(states_dir)!r}; expected an existing directory. {remedy}")
    if (free := shutil.disk_usage(states_dir).free) < size:
        raise ValueError(
            f"states_dir {os.fspath(states_dir)!r} has {free / 2**30:.1f} GiB free; expected {size / 2**30:.1f} GiB, "
            f"16 bytes for each parameter and step in float32. {remedy}"
        )
