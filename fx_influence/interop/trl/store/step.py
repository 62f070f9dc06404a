"""Write a measured step of a TRL training run as a run directory, which ``fx.load_run`` reads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from fx_influence.interop.checkpoints.files.directory import PARAM_NAMES
from fx_influence.interop.ledger.file import append_entry, with_window
from fx_influence.interop.live.metrics import MeasuredStep
from fx_influence.interop.runtime.run_files import (
    BASELINE,
    ENVIRONMENT,
    PLAN,
    SEQUENCES,
    SUMMARY,
    UPDATE_ROLLOUTS,
    UPDATE_TOKENS,
    RunFiles,
    eval_file,
)
from fx_influence.interop.runtime.run_records import token_arrays
from fx_influence.interop.trl.store.contents import (
    evaluation_arrays,
    right_padded,
    step_summary,
    update_rollouts,
    update_sequences,
)
from fx_influence.interop.trl.store.ledger import step_entry
from fx_influence.interop.trl.store.training import TRAINING
from fx_influence.types import Params

STATE = "state"
"""Folder of a step's directory with the model and optimizer before the step."""

INPUTS: dict[str, Any] = {
    "checkpoint": STATE,
    "update": {"rollouts": UPDATE_ROLLOUTS},
    "evaluations": [{"rollouts": eval_file(0, "_rollouts.jsonl")}],
}
"""Fields of a step's plan.yaml that are the same for every step: the files it is repeated from."""


class StepStore:
    """The directory of one step, written under a temporary name and renamed when it is complete.

    Args:
        out: directory of the training run's steps.
        step: the step's number.
    """

    def __init__(self, out: Path, step: int) -> None:
        self._path = out / f"step_{step:06d}"
        self._temporary = out / f".step_{step:06d}.tmp"
        self._replaced = out / f".step_{step:06d}.replaced"

    def discard(self) -> None:
        """Remove the files of a step that failed, and the training run's directory if it is then empty."""
        shutil.rmtree(self._temporary, ignore_errors=True)
        with suppress(OSError):
            self._temporary.parent.rmdir()

    def write_state(self, trainer: Any, baseline: Params) -> None:
        """Write the trainer's model, tokenizer and optimizer as they are now, as a checkpoint, and v_baseline."""
        folder = self._temporary / STATE
        shutil.rmtree(self._temporary, ignore_errors=True)
        folder.mkdir(parents=True)
        trainer.model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        optimizer = trainer.optimizer.optimizer
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        name_of = {p: name for name, p in trainer.model.named_parameters()}
        names = [[name_of[p] for p in group["params"]] for group in optimizer.param_groups]
        (folder / PARAM_NAMES).write_text(json.dumps(names))
        RunFiles(self._temporary).write_tensors(BASELINE, baseline)

    def write(
        self,
        measured: MeasuredStep,
        plan: dict[str, Any],
        trainer: Any,
        environment: Mapping[str, Any],
        window: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Write all files of the step, append it to the training run's ledger, and return its entry.

        A directory of the same step of the same training run, from before a resumption, is replaced.

        Args:
            measured: the step.
            plan: fields of plan.yaml beside ``INPUTS``.
            trainer: the one that made the step.
            environment: of the training run, from ``environment_of``, once for all steps.
            window: account of the window that the step ends, None where it ends none.
        """
        self._temporary.mkdir(parents=True, exist_ok=True)
        files = RunFiles(self._temporary)
        rollouts = update_rollouts(measured.captured, trainer)
        files.write_text(PLAN, yaml.safe_dump({**INPUTS, **plan}, sort_keys=False))
        files.write_json(ENVIRONMENT, environment)
        files.write_rollouts(UPDATE_ROLLOUTS, rollouts)
        batch, values = right_padded(measured.captured, rollouts)
        files.write_arrays(UPDATE_TOKENS, token_arrays(batch, values))
        files.write_rollouts(eval_file(0, "_rollouts.jsonl"), measured.evaluation)
        files.write_arrays(eval_file(0, ".npz"), evaluation_arrays(measured, batch))
        if measured.influence.matrix is not None:
            files.write_array(eval_file(0, "_delta_matrix.npy"), measured.influence.matrix.cpu().numpy())
        files.write_jsonl(SEQUENCES, update_sequences(measured, rollouts, trainer))
        summary = step_summary(measured)
        files.write_json(eval_file(0, ".json"), summary)
        files.write_json(SUMMARY, summary)
        entry = with_window(step_entry(measured, rollouts, plan, trainer, environment[TRAINING]), window)
        self._publish()
        append_entry(self._path.parent, entry)
        return entry

    def _publish(self) -> None:
        """Rename the temporary directory; an older one is moved aside first, so that no reader sees a partial one."""
        if self._path.exists():
            shutil.rmtree(self._replaced, ignore_errors=True)
            os.replace(self._path, self._replaced)
        os.replace(self._temporary, self._path)
        shutil.rmtree(self._replaced, ignore_errors=True)
