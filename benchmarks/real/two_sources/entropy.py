"""The entropy of a policy over tasks that are not trained, from fresh rollouts, and how two policies differ in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import fx_influence as fx
from benchmarks.real.two_sources.tasks import tasks
from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.sampling import sample

BATCH_SIZE = 40
SEED = 0


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    stderr: float


def prompt_sums(model: Path, adapter: Path | None, tokens: int, prompts: int, completions: int) -> list[dict[str, Any]]:
    """Return for each task its source, and the sums of entropies and of tokens over its rollouts.

    Args:
        model: directory of the model.
        adapter: directory of the adapter, None for the model alone.
        tokens: length of the longest completion.
        prompts: number of tasks, the first of "eval".
        completions: rollouts of each.
    """
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        policy = PeftModel.from_pretrained(policy, adapter, is_trainable=True)
    rollouts = sample(
        policy,
        AutoTokenizer.from_pretrained(model),
        tasks("eval")[:prompts],
        completions_per_prompt=completions,
        max_new_tokens=tokens,
        temperature=1.0,
        seed=SEED,
        batch_size=BATCH_SIZE,
    )
    apply, params = fx.make_functional(policy)
    batch = collate(rollouts, pad_id=0)
    entropies = fx.token_values(params, batch, apply).entropies.double()
    sums = (entropies * batch.completion_mask).sum(-1).tolist()
    figures: dict[str, dict[str, Any]] = {}
    for rollout, entropy in zip(rollouts, sums, strict=True):
        row = figures.setdefault(rollout.prompt_id, {"source": rollout.source, "entropy": 0.0, "tokens": 0})
        row["entropy"] += entropy
        row["tokens"] += len(rollout.completion_ids)
    return list(figures.values())


def entropy(rows: Sequence[dict[str, Any]]) -> Estimate:
    """Return the entropy in nats per token, with the standard error over the draw of prompts and rollouts."""
    ratio, deviations = _linearised(rows)
    return Estimate(ratio, _stderr(deviations))


def entropy_change(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> Estimate:
    """Return the difference of the entropies of two policies over the same prompts, with its standard error."""
    (start, left), (end, right) = _linearised(before), _linearised(after)
    return Estimate(end - start, _stderr(right - left))


def _linearised(rows: Sequence[dict[str, Any]]) -> tuple[float, np.ndarray]:
    """Return the ratio of sums and each prompt's part of its deviation from the expectation."""
    sums, counts = (np.array([row[name] for row in rows], dtype=np.float64) for name in ("entropy", "tokens"))
    ratio = sums.sum() / counts.sum()
    return float(ratio), (sums - ratio * counts) / counts.sum()


def _stderr(deviations: np.ndarray) -> float:
    count = len(deviations)
    return float(np.sqrt(count / (count - 1) * np.square(deviations - deviations.mean()).sum()))
