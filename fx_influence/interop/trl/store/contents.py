"""Turn a measured step into the records, arrays and summary that run directories hold."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fx_influence.core.computed import layout_of
from fx_influence.interop.live.measurement import MeasurementSettings
from fx_influence.interop.live.metrics import MeasuredStep
from fx_influence.interop.live.step import CapturedStep
from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.runtime.environment import peak_gpu_memory_bytes, peak_memory_bytes
from fx_influence.interop.runtime.run_records import sequence_records
from fx_influence.interop.trl.sampling import rollout_record
from fx_influence.types import Batch, TokenValues

SUMMARY_TOTALS = (
    "total",
    "baseline",
    "momentum",
    "weight_decay",
    "residual",
    "unattributed",
    "total_stderr",
    "conditioning",
)
"""Fields of ``fx.Influence`` that are numbers of the step, in the summary's order."""


def update_rollouts(captured: CapturedStep, trainer: Any) -> list[Rollout]:
    """Return U as records with their captured coefficients, in the order of the batch."""
    assert captured.batch.group is not None
    count_by_prompt: Counter[int] = Counter()
    rollouts = []
    for i, group in enumerate(captured.batch.group.tolist()):
        rollouts.append(_update_rollout(captured, trainer, i, group, count_by_prompt[group]))
        count_by_prompt[group] += 1
    return rollouts


def _update_rollout(captured: CapturedStep, trainer: Any, i: int, group: int, k: int) -> Rollout:
    """Return row ``i`` of U, completion number ``k`` of prompt number ``group``, as a record."""
    batch = captured.batch
    attended = batch.attention_mask[i]
    # Prompts are padded on the left to one width, so that every completion begins in the same column.
    after_prompt = torch.arange(len(attended), device=attended.device) >= captured.prompt_widths[i]
    completion = attended & after_prompt
    trained = batch.completion_mask[i][completion]

    def values(tokens: Tensor | None) -> tuple[float, ...] | None:
        return None if tokens is None else tuple(tokens[i][completion].tolist())

    reward = float(captured.rewards[i])
    return rollout_record(
        trainer,
        group,
        k,
        batch.input_ids[i][attended & ~after_prompt].tolist(),
        batch.input_ids[i][completion].tolist(),
        behaviour_logprobs=values(captured.old_logprobs),
        # JSON has no number for a reward that is not finite.
        reward=reward if np.isfinite(reward) else None,
        advantage=float(captured.advantages[i]),
        completion_mask=None if bool(trained.all()) else tuple(trained.tolist()),
        coefficients=values(batch.coefficients),
        entropy_coefficients=values(batch.entropy_coefficients),
        source=captured.sources[i] if captured.sources else None,
    )


def right_padded(captured: CapturedStep, rollouts: list[Rollout]) -> tuple[Batch, TokenValues]:
    """Return U and its token values in the columns that every run stores them in."""
    batch = collate(rollouts, pad_id=0)
    assert captured.entropies is not None
    logprobs, entropies = (_in_columns_of(batch, x, captured.batch) for x in (captured.logprobs, captured.entropies))
    return batch, TokenValues(logprobs, entropies)


def _in_columns_of(batch: Batch, tokens: Tensor, captured: Batch) -> Tensor:
    """Move values (n, T) of a captured batch's completion tokens to the columns of ``batch``, float64, else 0."""
    out = torch.zeros(batch.completion_mask.shape, dtype=torch.float64)
    out[batch.completion_mask] = tokens[captured.completion_mask].double().cpu()
    return out


def evaluation_arrays(measured: MeasuredStep, batch: Batch) -> dict[str, Any]:
    """Return the arrays of ``eval_00.npz``; ``batch`` is U with the columns of ``per_token``."""
    influence, change = measured.influence, measured.measured_change
    assert influence.per_token is not None
    arrays: dict[str, Any] = {
        "per_sequence": influence.per_sequence.cpu().numpy(),
        "per_token": _in_columns_of(batch, influence.per_token, measured.captured.batch).numpy(),
        "stderr": influence.stderr.cpu().numpy(),
        "rounding": influence.rounding.cpu().numpy(),
        "per_parameter": np.array([float(x) for x in influence.per_parameter.values()]),
        "eta": np.array([measured.lr] if change is not None else []),
    }
    if influence.deviations is not None:
        arrays["deviations"] = influence.deviations.by_part.cpu().numpy()
        arrays["left_out"] = influence.deviations.left_out.cpu().numpy()
    if change is not None:
        finite_step = {"full": change.delta_h, "full_stderr": change.stderr, "ess": change.ess}
        arrays |= {name: np.array([float(value)]) for name, value in finite_step.items()}
    return arrays


def update_sequences(measured: MeasuredStep, rollouts: list[Rollout], trainer: Any) -> list[dict[str, Any]]:
    """Return the records of ``update_sequences.jsonl``, one for each rollout of U.

    Args:
        measured: the step.
        rollouts: U as records, from ``update_rollouts``.
        trainer: has the tokenizer.
    """
    captured, influence = measured.captured, measured.influence
    count = captured.batch.completion_mask.sum(-1).clamp(min=1)
    assert captured.entropies is not None
    return sequence_records(
        rollouts,
        trainer._tokenizer,
        mean_entropy=(captured.entropies.sum(-1) / count).tolist(),
        mean_logprob=(captured.logprobs.sum(-1) / count).tolist(),
        gradient_norm=None,
        influence=influence.per_sequence.tolist(),
        stderr=influence.stderr.tolist(),
    )


def step_summary(measured: MeasuredStep) -> dict[str, Any]:
    """Return the fields of ``summary.json``: influences per unit lr, and in ``in_this_step`` what is logged."""
    influence, captured = measured.influence, measured.captured
    return {
        "step": measured.step,
        "lr": measured.lr,
        **{name: float(getattr(influence, name)) for name in SUMMARY_TOTALS},
        "sum_per_sequence": float(influence.per_sequence.sum()),
        "entropy": measured.entropy,
        "in_this_step": measured.metrics(),
        "update_rollouts": len(captured.advantages),
        "rollouts": len(measured.evaluation),
        "update_mean_reward": float(captured.rewards.nanmean()),
        "clip": captured.clip,
        "trainable_parameters": sum(g.numel() for g in layout_of(captured.gradient).values() if g is not None),
        "per_parameter": {name: float(x) for name, x in influence.per_parameter.items()},
        "seconds": measured.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_gpu_memory_bytes": peak_gpu_memory_bytes(),
    }


def settings_of_plan(measured: MeasuredStep, trainer: Any, settings: MeasurementSettings) -> dict[str, Any]:
    """Return the fields of a step's plan.yaml that say how it was measured.

    Args:
        measured: the step.
        trainer: the one that made it.
        settings: of the callback.
    """
    return {
        "max_grad_norm": measured.captured.max_grad_norm,
        "temperature": trainer.temperature,
        "max_new_tokens": trainer.max_completion_length,
        "estimator": settings.objective.estimator,
        "normalize": settings.objective.normalize,
        "preconditioner": settings.preconditioner,
        "chunk_size": settings.chunk_size,
        "memory_budget": settings.memory_budget,
    }
