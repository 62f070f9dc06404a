"""The main job: sample U and E from a saved training state, attribute the step, check it at finite steps, store it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fx_influence.interop.environment import timed
from fx_influence.interop.run_files import (
    BASELINE,
    SEQUENCES,
    UPDATE_TOKENS,
    eval_name,
    readable,
    sequence_records,
    token_arrays,
)
from fx_influence.lab.analysis.allocation import allocation_correlations
from fx_influence.lab.batches import Progress, Sampled, State, update_batch
from fx_influence.lab.derivatives import derivative_check
from fx_influence.lab.experiment import Experiment, carry_out
from fx_influence.lab.measure import evaluate, first_order
from fx_influence.lab.plan import EntropyInfluencePlan
from fx_influence.lab.results import EntropyInfluenceResults, load_run
from fx_influence.lab.step import Step, measure_step
from fx_influence.lab.store import Pieces, RunDirectory
from fx_influence.lab.sweep import Arrays


def run(
    plan: EntropyInfluencePlan, path: str | Path | None = None, progress: Progress = lambda phase, done, total: None
) -> EntropyInfluenceResults:
    """Do what ``plan`` says and store it in ``path``; a directory that holds part of the same run is continued.

    ``path``: None stands for a directory in ``runs`` that is the plan's own. ``progress(phase, done, total)`` is called
    as the work goes on.

    Where a launcher has started several processes, or the caller a process group, all of them make the call, share the
    work and have the results; ``path`` is that of the first, which alone reads and writes there.

    Raises ``PlanError`` and the errors of checkpoints, prompts and rewards before anything is sampled or written, and
    ``RunDirectoryError`` where ``path`` holds something else. With one seed a run repeats bit for bit on one machine,
    figures of time and memory apart.
    """
    return carry_out(plan, path, _measure, load_run, progress)


def _measure(plan: EntropyInfluencePlan, now: Experiment) -> dict[str, Any]:
    directory, batch = now.directory, update_batch(plan, now.u)
    with timed(now.seconds, "derivative check"):
        derivatives = derivative_check(plan, now.state, now.u.batch)
    with timed(now.seconds, "step"):
        directory.write_arrays(UPDATE_TOKENS, token_arrays(batch, now.u.values))
        step = measure_step(plan, now.state, batch, plan.gain, directory, now.progress)
        directory.write_tensors(BASELINE, step.parts.baseline)
    for i in range(len(plan.evaluations)):
        if not directory.has(eval_name(i, ".json")):
            _evaluation(plan, now, step, i)
        for pieces in _pieces(directory, i):
            pieces.clear()
    with readable(directory.path):
        arrays = [directory.read_arrays(eval_name(i, ".npz")) for i in range(len(plan.evaluations))]
        sequences = _sequences(now.state, now.u, step, arrays[0])
        evaluations = [directory.read_json(eval_name(i, ".json")) for i in range(len(plan.evaluations))]
    directory.write_jsonl(SEQUENCES, sequences)
    allocations = [
        allocation_correlations(sequences, found["per_sequence"], evaluation["baseline"])
        for found, evaluation in zip(arrays, evaluations, strict=True)
    ]
    figures = {"evaluations": evaluations, "allocations": allocations, "derivative_check": derivatives}
    return {**evaluations[0], **figures}


def _evaluation(plan: EntropyInfluencePlan, now: Experiment, step: Step, i: int) -> None:
    directory, progress = now.directory, now.progress
    e = now.sampled_evaluation(plan, i)
    first, blocks = _pieces(directory, i)
    with timed(now.seconds, "first order"):
        slopes = first_order(plan, now.state, step, e, first, progress)
    with timed(now.seconds, "finite steps"):
        result = evaluate(plan, now.state, step, e, slopes, blocks, progress)
    directory.write_array(eval_name(i, "_delta_matrix.npy"), result.matrix)
    directory.write_arrays(eval_name(i, ".npz"), result.arrays)
    # Written last: its presence says that the evaluation is whole.
    directory.write_json(eval_name(i, ".json"), result.summary)


def _pieces(directory: RunDirectory, i: int) -> tuple[Pieces[Arrays], Pieces[Arrays]]:
    """What an evaluation keeps while it lasts: the parts of its first order, and the blocks of its sweep."""
    return directory.array_pieces(eval_name(i, "_first_order")), directory.array_pieces(eval_name(i, "_block"))


def _sequences(state: State, u: Sampled, step: Step, arrays: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    mask = u.batch.completion_mask
    count = mask.sum(-1).clamp(min=1)
    entropies, logprobs = (v.sum(-1) / count for v in (u.values.entropies, u.values.logprobs))
    return sequence_records(
        u.rollouts,
        state.tokenizer,
        mean_entropy=entropies.tolist(),
        mean_logprob=logprobs.tolist(),
        gradient_norm=step.gradient_norms.tolist(),
        influence=arrays["per_sequence"].tolist(),
        stderr=arrays["stderr"].tolist(),
    )
