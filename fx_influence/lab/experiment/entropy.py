"""Run the main experiment: sample U and E from a saved training state, attribute the step, check it at finite steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fx_influence.interop.runtime.environment import timed
from fx_influence.interop.runtime.run_files import BASELINE, SEQUENCES, UPDATE_TOKENS, eval_file, raise_if_damaged
from fx_influence.interop.runtime.run_records import sequence_records, token_arrays
from fx_influence.lab.analysis.allocation import allocation_correlations
from fx_influence.lab.experiment.derivatives import derivative_check
from fx_influence.lab.experiment.evaluate import evaluate
from fx_influence.lab.experiment.finite_steps import Arrays
from fx_influence.lab.experiment.first_order import first_order
from fx_influence.lab.experiment.runner import RunContext, run_experiment
from fx_influence.lab.experiment.step import Step, measure_step
from fx_influence.lab.inputs.rollouts import Progress, ScoredRollouts
from fx_influence.lab.inputs.training_state import TrainingState
from fx_influence.lab.inputs.update import update_batch
from fx_influence.lab.plan import EntropyInfluencePlan
from fx_influence.lab.results import EntropyInfluenceResults, load_run
from fx_influence.lab.store import PartialResults, RunDirectory


def run(
    plan: EntropyInfluencePlan, path: str | Path | None = None, progress: Progress = lambda phase, done, total: None
) -> EntropyInfluenceResults:
    """Run ``plan`` and store the results in ``path``; a directory that holds part of the same run is continued.

    If a launcher has started several processes, or the caller a process group, all of them make the call, share the
    work and receive the results; only the first reads and writes, in the ``path`` that it was given. With one seed a
    run repeats bit for bit on one machine, figures of time and memory excepted.

    Args:
        plan: what to measure.
        path: run directory; None: one in ``runs`` that is named after the plan's content.
        progress: called with (phase, done, total) as the work goes on.

    Returns:
        What the run directory holds, see ``load_run``.

    Raises:
        PlanError: before anything is sampled or written; so are the errors of checkpoints, prompts and rewards.
        RunDirectoryError: where ``path`` holds something else.

    Example, some minutes long: ``run(EntropyInfluencePlan(), "runs/demo").summary["total"]``.
    """
    return run_experiment(plan, path, _measure, load_run, progress)


def _measure(plan: EntropyInfluencePlan, context: RunContext) -> dict[str, Any]:
    directory, batch = context.directory, update_batch(plan, context.u)
    with timed(context.seconds, "derivative check"):
        derivatives = derivative_check(plan, context.state, context.u.batch)
    with timed(context.seconds, "step"):
        directory.write_arrays(UPDATE_TOKENS, token_arrays(batch, context.u.values))
        step = measure_step(plan, context.state, batch, plan.preconditioner, directory, context.progress)
        directory.write_tensors(BASELINE, step.decomposition.baseline)
    for i in range(len(plan.evaluations)):
        if not directory.has(eval_file(i, ".json")):
            _measure_evaluation(plan, context, step, i)
        for results in _partial_results(directory, i):
            results.clear()
    with raise_if_damaged(directory.path):
        arrays = [directory.read_arrays(eval_file(i, ".npz")) for i in range(len(plan.evaluations))]
        sequences = _sequence_records(context.state, context.u, step, arrays[0])
        evaluations = [directory.read_json(eval_file(i, ".json")) for i in range(len(plan.evaluations))]
    directory.write_jsonl(SEQUENCES, sequences)
    allocations = [
        allocation_correlations(sequences, evaluation_arrays["per_sequence"], evaluation["baseline"])
        for evaluation_arrays, evaluation in zip(arrays, evaluations, strict=True)
    ]
    figures = {"evaluations": evaluations, "allocations": allocations, "derivative_check": derivatives}
    return {**evaluations[0], **figures}


def _measure_evaluation(plan: EntropyInfluencePlan, context: RunContext, step: Step, i: int) -> None:
    directory, progress = context.directory, context.progress
    e = context.load_evaluation(plan, i)
    first_order_results, block_results = _partial_results(directory, i)
    with timed(context.seconds, "first order"):
        first = first_order(plan, context.state, step, e, first_order_results, progress)
    with timed(context.seconds, "finite steps"):
        result = evaluate(plan, context.state, step, e, first, block_results, progress)
    directory.write_array(eval_file(i, "_delta_matrix.npy"), result.matrix)
    directory.write_arrays(eval_file(i, ".npz"), result.arrays)
    # Written last, because its presence says that the evaluation is complete.
    directory.write_json(eval_file(i, ".json"), result.summary)


def _partial_results(directory: RunDirectory, i: int) -> tuple[PartialResults[Arrays], PartialResults[Arrays]]:
    """Return what is stored while an evaluation lasts: results of first-order tasks, and of blocks of finite steps."""
    return directory.partial_arrays(eval_file(i, "_first_order")), directory.partial_arrays(eval_file(i, "_block"))


def _sequence_records(
    state: TrainingState, u: ScoredRollouts, step: Step, arrays: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
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
