"""The entropy of a policy over tasks that are not trained, from fresh rollouts, and how two policies differ in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch.distributions import Categorical
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.real.two_sources.tasks import tasks
from fx_influence.interop.generation import eos_token_ids, full_softmax_config, sampling_mode
from fx_influence.interop.prompts import text_for

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
        policy = PeftModel.from_pretrained(policy, adapter).merge_and_unload()
    tokenizer, chosen = AutoTokenizer.from_pretrained(model, padding_side="left"), tasks("eval")[:prompts]
    texts = [text_for(tokenizer, task) for task in chosen]
    config = full_softmax_config(eos_token_ids(policy, tokenizer), tokenizer.pad_token_id, tokens)
    config.return_dict_in_generate = config.output_logits = True
    sums: list[dict[str, Any]] = [{"source": task.source, "entropy": 0.0, "tokens": 0} for task in chosen]
    rows = [k for k in range(len(chosen)) for _ in range(completions)]
    with sampling_mode(policy, config, SEED):
        for start in range(0, len(rows), BATCH_SIZE):
            chunk = rows[start : start + BATCH_SIZE]
            batch = tokenizer([texts[k] for k in chunk], padding=True, add_special_tokens=False, return_tensors="pt")
            for k, (length, entropy) in zip(chunk, _completions(policy, batch, config), strict=True):
                sums[k]["entropy"] += entropy
                sums[k]["tokens"] += length
    return sums


@torch.no_grad()
def _completions(policy: Any, batch: Any, config: Any) -> list[tuple[int, float]]:
    """Sample a completion of each prompt; return their lengths and the sums of the entropies sampled from."""
    output = policy.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        generation_config=config,
    )
    tokens = output.sequences[:, batch["input_ids"].shape[1] :]
    entropies = torch.stack([Categorical(logits=x.double()).entropy() for x in output.logits], dim=1)
    ended = torch.isin(tokens, torch.tensor(config.eos_token_id)).long()
    mask = ended.cumsum(1) - ended == 0
    return list(zip(mask.sum(1).tolist(), (entropies * mask).sum(1).tolist(), strict=True))


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
