"""A measured step of a TRL run as a run directory, which the readers of all runs read."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from fx_influence.interop.checkpoints.directory import PARAM_NAMES
from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.runtime.environment import environment, peak_gpu_memory_bytes, peak_memory_bytes
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
from fx_influence.interop.runtime.run_records import sequence_records, token_arrays
from fx_influence.interop.trl.capture import CapturedStep
from fx_influence.interop.trl.metrics import MeasuredStep
from fx_influence.interop.trl.sampling import rollout_of
from fx_influence.types import Batch, Params, TokenValues

STATE = "state"
TRAINING = "training"
"""Field of a step's environment.json: which training made it."""

CHECKPOINT_FILE = "entropy_influence.json"
"""In a trainer's checkpoint: which training it is of, by the name of what measured it."""


def training_directory(base: Path, training: str) -> Path:
    """Where a training's steps go: the directory that has some of them, or else the first that has nothing in it.

    ``base``, ``base_2``, ``base_3``, ... in turn, so that no training writes over another's steps.
    """
    places = (base if k == 1 else base.with_name(f"{base.name}_{k}") for k in itertools.count(1))
    return next(
        place
        for place in places
        if not place.exists() or (place.is_dir() and not any(place.iterdir())) or training in _trainings(place)
    )


def _trainings(place: Path) -> Iterator[str]:
    for file in place.glob(f"step_*/{ENVIRONMENT}"):
        with suppress(OSError, ValueError):
            yield str(json.loads(file.read_text(encoding="utf-8")).get(TRAINING))


def note_training(checkpoint: Path, name: str, training: str) -> None:
    """Leave in a checkpoint which training it is of, for what is attached as ``name``."""
    file = checkpoint / CHECKPOINT_FILE
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**known, name: training}), encoding="utf-8")


def noted_training(checkpoint: Path, name: str, log_history: list[Any]) -> str | None:
    """Which training a checkpoint is of; None where it does not tell, or is not the one with this log."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        known = json.loads((checkpoint / CHECKPOINT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # As text, because NaN differs from itself.
    same = json.dumps(state.get("log_history")) == json.dumps(log_history)
    return known.get(name) if same else None


class StepStore:
    """Where one step goes: written beside its place, and put there when it is whole."""

    def __init__(self, out: Path, step: int) -> None:
        self._place = out / f"step_{step:06d}"
        self._making = out / f".step_{step:06d}.tmp"
        self._replaced = out / f".step_{step:06d}.replaced"

    def discard(self) -> None:
        """Remove what has been written of a step that is not to be, and the directory where that was all it had."""
        shutil.rmtree(self._making, ignore_errors=True)
        with suppress(OSError):
            self._making.parent.rmdir()

    def write_state(self, trainer: Any, baseline: Params) -> None:
        """The trainer's model, tokenizer and optimizer as they are now, as a checkpoint, and v_baseline."""
        folder = self._making / STATE
        shutil.rmtree(self._making, ignore_errors=True)
        folder.mkdir(parents=True)
        trainer.model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        optimizer = trainer.optimizer.optimizer
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        name_of = {p: name for name, p in trainer.model.named_parameters()}
        names = [[name_of[p] for p in group["params"]] for group in optimizer.param_groups]
        (folder / PARAM_NAMES).write_text(json.dumps(names))
        RunFiles(self._making).write_tensors(BASELINE, baseline)

    def write(self, measured: MeasuredStep, plan: dict[str, Any], trainer: Any, training: str) -> None:
        """All files of the step; a directory of the same training's same step, from before a resumption, is replaced.

        ``training``: an identity of this training, which no other has.
        """
        self._making.mkdir(parents=True, exist_ok=True)
        files = RunFiles(self._making)
        rollouts = update_rollouts(measured.captured, trainer)
        files.write_text(PLAN, yaml.safe_dump({**_inputs(), **plan}, sort_keys=False))
        made_by = {"trainer": type(trainer).__name__, "processes": trainer.accelerator.num_processes}
        made_by[TRAINING] = training
        files.write_json(ENVIRONMENT, {**environment(), "inputs_sha256": {}, **made_by})
        files.write_rollouts(UPDATE_ROLLOUTS, rollouts)
        batch, values = _right_padded(measured.captured, rollouts)
        files.write_arrays(UPDATE_TOKENS, token_arrays(batch, values))
        files.write_rollouts(eval_file(0, "_rollouts.jsonl"), measured.evaluation)
        files.write_arrays(eval_file(0, ".npz"), _arrays(measured, batch))
        if measured.influence.matrix is not None:
            files.write_array(eval_file(0, "_delta_matrix.npy"), measured.influence.matrix.cpu().numpy())
        files.write_jsonl(SEQUENCES, _sequences(measured, rollouts, trainer))
        summary = _summary(measured)
        files.write_json(eval_file(0, ".json"), summary)
        files.write_json(SUMMARY, summary)
        if self._place.exists():
            shutil.rmtree(self._replaced, ignore_errors=True)
            os.replace(self._place, self._replaced)
        os.replace(self._making, self._place)
        shutil.rmtree(self._replaced, ignore_errors=True)


def update_rollouts(captured: CapturedStep, trainer: Any) -> list[Rollout]:
    """U as records with their captured coefficients, in the order of the batch."""
    batch = captured.batch
    assert batch.group is not None
    seen: Counter[int] = Counter()
    found = []
    for i, group in enumerate(batch.group.tolist()):
        found.append(_rollout(captured, trainer, i, group, seen[group]))
        seen[group] += 1
    return found


def _rollout(captured: CapturedStep, trainer: Any, i: int, group: int, k: int) -> Rollout:
    batch = captured.batch
    real, counted = batch.attention_mask[i], batch.completion_mask[i]
    # Prompts are padded on the left to one width, so that every completion begins in the same column.
    begins = torch.arange(len(real), device=real.device) >= captured.prompt_widths[i]
    prompt_ids, completion_ids = batch.input_ids[i][real & ~begins].tolist(), batch.input_ids[i][real & begins].tolist()

    def values(tokens: Tensor | None) -> tuple[float, ...] | None:
        return None if tokens is None else tuple(tokens[i][real & begins].tolist())

    reward = float(captured.rewards[i])
    return rollout_of(
        trainer,
        group,
        k,
        prompt_ids,
        completion_ids,
        behaviour_logprobs=values(captured.old_logprobs),
        # JSON has no number for a reward that is not finite.
        reward=reward if np.isfinite(reward) else None,
        advantage=float(captured.advantages[i]),
        completion_mask=None if bool(counted[real & begins].all()) else tuple(counted[real & begins].tolist()),
        coefficients=values(batch.coefficients),
        entropy_coefficients=values(batch.entropy_coefficients),
    )


def _inputs() -> dict[str, Any]:
    return {
        "checkpoint": STATE,
        "update": {"rollouts": UPDATE_ROLLOUTS},
        "evaluations": [{"rollouts": eval_file(0, "_rollouts.jsonl")}],
    }


def _right_padded(captured: CapturedStep, rollouts: list[Rollout]) -> tuple[Batch, TokenValues]:
    """U and its token values in the columns that every run stores them in."""
    batch = collate(rollouts, pad_id=0)
    assert captured.entropies is not None
    values = (_moved(x, captured.batch, batch) for x in (captured.logprobs, captured.entropies))
    return batch, TokenValues(*values)


def _moved(tokens: Tensor, captured: Batch, batch: Batch) -> Tensor:
    out = torch.zeros(batch.completion_mask.shape, dtype=torch.float64)
    out[batch.completion_mask] = tokens[captured.completion_mask].double().cpu()
    return out


def _arrays(measured: MeasuredStep, batch: Batch) -> dict[str, Any]:
    out, change = measured.influence, measured.measured_change
    assert out.per_token is not None
    arrays: dict[str, Any] = {
        "per_sequence": out.per_sequence.cpu().numpy(),
        "per_token": _moved(out.per_token, measured.captured.batch, batch).numpy(),
        "stderr": out.stderr.cpu().numpy(),
        "rounding": out.rounding.cpu().numpy(),
        "per_parameter": np.array([float(x) for x in out.per_parameter.values()]),
        "eta": np.array([measured.lr] if change is not None else []),
    }
    if change is not None:
        found = {"full": change.delta_h, "full_stderr": change.stderr, "ess": change.ess}
        arrays |= {name: np.array([float(value)]) for name, value in found.items()}
    return arrays


def _sequences(measured: MeasuredStep, rollouts: list[Rollout], trainer: Any) -> list[dict[str, Any]]:
    captured, out = measured.captured, measured.influence
    count = captured.batch.completion_mask.sum(-1).clamp(min=1)
    assert captured.entropies is not None
    return sequence_records(
        rollouts,
        trainer._tokenizer,
        mean_entropy=(captured.entropies.sum(-1) / count).tolist(),
        mean_logprob=(captured.logprobs.sum(-1) / count).tolist(),
        gradient_norm=None,
        influence=out.per_sequence.tolist(),
        stderr=out.stderr.tolist(),
    )


def _summary(measured: MeasuredStep) -> dict[str, Any]:
    out, captured = measured.influence, measured.captured
    names = (
        "total",
        "baseline",
        "momentum",
        "weight_decay",
        "residual",
        "unattributed",
        "total_stderr",
        "conditioning",
    )
    return {
        "step": measured.step,
        "lr": measured.lr,
        **{name: float(getattr(out, name)) for name in names},
        "sum_per_sequence": float(out.per_sequence.sum()),
        "conditioning": float(out.conditioning),
        "entropy": measured.entropy,
        "in_this_step": measured.metrics(),
        "update_rollouts": len(captured.advantages),
        "rollouts": len(measured.evaluation),
        "update_mean_reward": float(captured.rewards.nanmean()),
        "clip": captured.clip,
        "trainable_parameters": sum(g.numel() for g in captured.gradient.values() if g is not None),
        "per_parameter": {name: float(x) for name, x in out.per_parameter.items()},
        "seconds": measured.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_gpu_memory_bytes": peak_gpu_memory_bytes(),
    }
