"""The files of a window that is being recorded: AdamW's state before it, and each step's batch and settings.

All are safetensors with JSON in their headers, written under another name and renamed when they are complete. There is
one window at a time, and it is removed when it has been attributed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fx_influence.labels import Labels
from fx_influence.trajectory.window import RecordedStep
from fx_influence.types import AdamWHyper, AdamWState, Batch, Params

STATE = "state.safetensors"
"""Name of the file with the parameters and moments before the first step."""

HEADER = "window"
"""Field of a file's header that holds what is no tensor, as JSON."""

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
KIND = "kind/"

TOKEN_BYTES, ROW_BYTES, STEP_BYTES, TENSOR_BYTES = 40, 64, 2**16, 512
"""Bounds on the bytes of a step's file for a token of its padded batch, a rollout, and the header with its names of
labels; and on those of a header for a tensor of the state, which the hyperparameters of each step have too."""


class WindowStep(NamedTuple):
    """A recorded step of a training run.

    Attributes:
        number: of the optimizer's step, from 1.
        step: its batch and settings.
        kinds: labels of its rollouts or tokens by the name of the kind.
        prompt_widths: int64 (n,), columns of each row that hold its prompt and the prompt's padding.
    """

    number: int
    step: RecordedStep
    kinds: Mapping[str, Labels]
    prompt_widths: Tensor


def bound_in_bytes(params: Params, opt_state: AdamWState, length: int, rows: int, width: int) -> int:
    """Return a bound on the bytes of a window's files.

    Args:
        params: trainable parameters by name.
        opt_state: AdamW's.
        length: number of steps K.
        rows: rollouts of a step, at most.
        width: columns of a step's padded batch, at most.

    Example:
        >>> zero = {"w": torch.zeros(1000)}
        >>> bound_in_bytes(zero, AdamWState(zero, zero, {}, {"w": 0}, {"w": AdamWHyper()}, 1e-3), 8, 64, 512)
        11068640
    """
    state = _state_tensors(params, opt_state)
    names = TENSOR_BYTES * len(state)
    step = rows * (TOKEN_BYTES * width + ROW_BYTES) + STEP_BYTES
    return sum(x.nbytes for x in state.values()) + names + length * (step + names)


class WindowFiles:
    """The files of one window in a folder of their own.

    Args:
        folder: made with the first file, removed by ``discard``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, params: Params, opt_state: AdamWState) -> None:
        """Write the state before the first step, in place of any other window.

        Raises:
            OSError: where the disk has less space than the state takes.
        """
        self.discard()
        self.folder.mkdir(parents=True)
        tensors = _state_tensors(params, opt_state)
        needed, free = sum(x.nbytes for x in tensors.values()), shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                f"{str(self.folder)!r} has {free} bytes free; expected the {needed} of the parameters and moments "
                "before the window. Make space on disk"
            )
        header = {"step": opt_state.step, "lr": opt_state.lr, **_hyper_fields(opt_state.hyper)}
        self._write(STATE, tensors, header)

    def append(self, record: WindowStep) -> None:
        """Write one more step."""
        step, batch = record.step, record.step.batch
        tensors = {name: x for name, x in batch._asdict().items() if x is not None}
        # No vocabulary and no number of labels comes near the bounds of these integers.
        tensors["input_ids"] = batch.input_ids.to(torch.int32)
        tensors["prompt_widths"] = record.prompt_widths
        tensors |= {KIND + name: x.index.to(torch.int16) for name, x in record.kinds.items()}
        header = {
            "lr": step.lr,
            "max_grad_norm": step.max_grad_norm,
            "follows_ratio": step.coefficient_slopes is not None,
            "kinds": {name: x.names for name, x in record.kinds.items()},
            **({} if step.hyper is None else _hyper_fields(step.hyper)),
        }
        self._write(f"step_{record.number:09d}.safetensors", tensors, header)

    def state(self, device: torch.device) -> tuple[Params, AdamWState]:
        """Return the parameters and AdamW's state before the window."""
        tensors, header = _read(self.folder / STATE, device)
        by_part: dict[str, Params] = {name: {} for name in ("params", *MOMENTS)}
        for key, x in tensors.items():
            part, _, name = key.partition("/")
            by_part[part][name] = x
        m, s, maximum = (by_part[name] for name in MOMENTS)
        return by_part["params"], AdamWState(m, s, maximum, header["step"], _hyper(header), header["lr"])

    def steps(self, device: torch.device) -> list[WindowStep]:
        """Return the recorded steps, in their order."""
        return [_read_step(path, device) for path in sorted(self.folder.glob("step_*.safetensors"))]

    def size(self) -> int:
        """Return the bytes of all files."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def discard(self) -> None:
        """Remove the window."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, name: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        temporary = self.folder / f"{name}.tmp"
        on_cpu = {key: x.detach().cpu().contiguous() for key, x in tensors.items()}
        save_file(on_cpu, temporary, metadata={HEADER: json.dumps(header)})
        os.replace(temporary, self.folder / name)


def _state_tensors(params: Params, opt_state: AdamWState) -> dict[str, Tensor]:
    parts = {"params": params, **{name: getattr(opt_state, name) for name in MOMENTS}}
    return {f"{part}/{name}": x for part, by_name in parts.items() for name, x in by_name.items()}


def _hyper_fields(hyper: Mapping[str, AdamWHyper]) -> dict[str, Any]:
    """Return hyperparameters as fields of a header: those that differ, and the place of each parameter's."""
    distinct = list(dict.fromkeys(hyper.values()))
    return {"hyper": [asdict(x) for x in distinct], "hyper_of": {name: distinct.index(x) for name, x in hyper.items()}}


def _hyper(header: Mapping[str, Any]) -> dict[str, AdamWHyper]:
    distinct = [AdamWHyper(**fields) for fields in header["hyper"]]
    return {name: distinct[place] for name, place in header["hyper_of"].items()}


def _read(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt", device=str(device)) as file:
        header: dict[str, Any] = json.loads(file.metadata()[HEADER])
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, header


def _read_step(path: Path, device: torch.device) -> WindowStep:
    tensors, header = _read(path, device)
    tensors["input_ids"] = tensors["input_ids"].long()
    batch = Batch(**{name: tensors[name] for name in Batch._fields if name in tensors})
    step = RecordedStep(
        batch=batch,
        lr=header["lr"],
        max_grad_norm=header["max_grad_norm"],
        coefficient_slopes=batch.coefficients if header["follows_ratio"] else None,
        hyper=_hyper(header) if "hyper" in header else None,
    )
    kinds = {name: Labels(tensors[KIND + name].long(), tuple(names)) for name, names in header["kinds"].items()}
    return WindowStep(int(path.stem.removeprefix("step_")), step, kinds, tensors["prompt_widths"])
