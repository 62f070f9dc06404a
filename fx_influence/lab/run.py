"""The main job: sample U and E from a saved training state, attribute the step, check it at finite steps, store it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fx_influence.lab.analysis.allocation import allocation_correlations
from fx_influence.lab.batches import Progress, Sampled, State, load_state, sampled, update_batch
from fx_influence.lab.environment import environment, peak_gpu_memory_bytes, peak_memory_bytes, threads_for, timed
from fx_influence.lab.measure import evaluate, first_order, mean_reward
from fx_influence.lab.plan import EntropyInfluencePlan
from fx_influence.lab.results import EntropyInfluenceResults, bare_numbers, load_run
from fx_influence.lab.step import STEP_PIECES, Step, measure_step
from fx_influence.lab.store import (
    BASELINE,
    ENVIRONMENT,
    SEQUENCES,
    SUMMARY,
    UPDATE_ROLLOUTS,
    Pieces,
    RunDirectory,
    eval_name,
    readable,
)
from fx_influence.lab.sweep import Arrays


def run(
    plan: EntropyInfluencePlan, path: Path, progress: Progress = lambda phase, done, total: None
) -> EntropyInfluenceResults:
    """Do what ``plan`` says and store it in ``path``; a directory that holds part of the same run is continued.

    Raises ``PlanError`` and the errors of checkpoints, prompts and rewards before anything is sampled or written, and
    ``RunDirectoryError`` where ``path`` holds something else. With one seed a run repeats bit for bit on one machine,
    figures of time and memory apart.
    """
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        state = load_state(plan)
    directory = RunDirectory.start(path, plan)
    if not directory.has(SUMMARY):
        with threads_for(sum(p.numel() for p in state.model.parameters())):
            _measure(plan, state, directory, seconds, progress)
    directory.remove(*STEP_PIECES)
    return load_run(path)


def _measure(
    plan: EntropyInfluencePlan, state: State, directory: RunDirectory, seconds: dict[str, float], progress: Progress
) -> None:
    directory.write_json(ENVIRONMENT, environment())
    with timed(seconds, "sampling"):
        u = sampled(plan, state, directory, 0, UPDATE_ROLLOUTS, progress)
    with timed(seconds, "step"):
        step = measure_step(plan, state, update_batch(plan, u), plan.gain, directory, progress)
        directory.write_tensors(BASELINE, step.parts.baseline)
    for i in range(len(plan.evaluations)):
        if not directory.has(eval_name(i, ".json")):
            _evaluation(plan, state, directory, step, i, seconds, progress)
        for pieces in _pieces(directory, i):
            pieces.clear()
    with readable(directory.path):
        sequences = _sequences(state, u, step, directory.read_arrays(eval_name(0, ".npz")))
        directory.write_jsonl(SEQUENCES, sequences)
        figures = _summary(plan, state, directory, u, sequences, seconds)
    # Last of all: its presence says that the run is whole.
    directory.write_json(SUMMARY, figures)


def _evaluation(
    plan: EntropyInfluencePlan,
    state: State,
    directory: RunDirectory,
    step: Step,
    i: int,
    seconds: dict[str, float],
    progress: Progress,
) -> None:
    with timed(seconds, "sampling"):
        e = sampled(plan, state, directory, i + 1, eval_name(i, "_rollouts.jsonl"), progress)
    first, blocks = _pieces(directory, i)
    with timed(seconds, "first order"):
        progress("first order", 0, 1)
        if 0 not in first:
            first[0] = first_order(plan, state, step, e)
        progress("first order", 1, 1)
    with timed(seconds, "finite steps"):
        result = evaluate(plan, state, step, e, first[0], blocks, progress)
    directory.write_array(eval_name(i, "_delta_matrix.npy"), result.matrix)
    directory.write_arrays(eval_name(i, ".npz"), result.arrays)
    # Written last: its presence says that the evaluation is whole.
    directory.write_json(eval_name(i, ".json"), result.summary)


def _pieces(directory: RunDirectory, i: int) -> tuple[Pieces[Arrays], Pieces[Arrays]]:
    """What an evaluation keeps while it lasts: its first order, under 0, and the blocks of its sweep."""
    return directory.array_pieces(eval_name(i, "_first_order")), directory.array_pieces(eval_name(i, "_block"))


def _sequences(state: State, u: Sampled, step: Step, arrays: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    mask = u.batch.completion_mask
    count = mask.sum(-1).clamp(min=1)
    entropies, logprobs = (v.sum(-1) / count for v in (u.values.entropies, u.values.logprobs))
    return [
        {
            "id": r.id,
            "prompt_id": r.prompt_id,
            "prompt": r.prompt,
            "completion": r.completion,
            "tokens": [state.tokenizer.decode([token]) for token in r.completion_ids],
            "reward": r.reward,
            "advantage": r.advantage,
            "prompt_length": len(r.prompt_ids),
            "completion_length": len(r.completion_ids),
            "finished": r.finished,
            "mean_entropy": entropies[i].item(),
            "mean_logprob": logprobs[i].item(),
            "gradient_norm": step.gradient_norms[i].item(),
            "influence": float(arrays["per_sequence"][i]),
            "stderr": float(arrays["stderr"][i]),
        }
        for i, r in enumerate(u.rollouts)
    ]


def _summary(
    plan: EntropyInfluencePlan,
    state: State,
    directory: RunDirectory,
    u: Sampled,
    sequences: list[dict[str, Any]],
    seconds: dict[str, float],
) -> dict[str, Any]:
    evaluations = [directory.read_json(eval_name(i, ".json")) for i in range(len(plan.evaluations))]
    return {
        **evaluations[0],
        "evaluations": evaluations,
        "allocations": allocation_correlations(sequences, evaluations[0]["baseline"]),
        "lr": state.opt_state.lr,
        "update_rollouts": len(u.rollouts),
        "update_mean_reward": mean_reward(u.rollouts),
        "update_off_policy": u.off_policy,
        "trainable_parameters": sum(p.numel() for p in state.params.values()),
        "seconds": sum(seconds.values()),
        "seconds_by_phase": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_gpu_memory_bytes": peak_gpu_memory_bytes(),
        "torch_threads": torch.get_num_threads(),
        "sha256": {name: directory.sha256(name) for name in bare_numbers(len(plan.evaluations))},
    }
