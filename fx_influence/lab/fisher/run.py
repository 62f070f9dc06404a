"""Run the Fisher experiment: how U's rollouts, and the step that they make, move the log-probabilities of E."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.runtime.environment import timed
from fx_influence.interop.runtime.run_files import eval_file, raise_if_damaged
from fx_influence.lab.experiment.finite_steps import Arrays
from fx_influence.lab.experiment.runner import RunContext, run_experiment
from fx_influence.lab.experiment.step import Step, measure_step
from fx_influence.lab.fisher.measure import (
    FisherEvaluation,
    fisher_figures,
    kernel,
    kernel_diagonal,
    logprob_change,
    self_kernel,
)
from fx_influence.lab.fisher.results import (
    CHANGE_MATRIX,
    KERNEL,
    UPDATE_SELF_KERNEL,
    FisherKernelResults,
    load_fisher_run,
)
from fx_influence.lab.inputs.rollouts import Progress
from fx_influence.lab.inputs.update import update_batch
from fx_influence.lab.plan import FisherKernelPlan
from fx_influence.lab.store import PartialResults, RunDirectory
from fx_influence.types import Params


def run_fisher(
    plan: FisherKernelPlan, path: str | Path | None = None, progress: Progress = lambda phase, done, total: None
) -> FisherKernelResults:
    """Run ``plan`` and store the results in ``path``, see ``run``; a directory with part of the same run is continued.

    With S_a the log-probability of E's rollout a, P the preconditioner and v = v_baseline + sum_i v_i the step of U,

        K_ai = <grad S_a, P grad S_i>        <grad S_a, v> = <grad S_a, v_baseline> + sum_i <grad S_a, v_i>

    K_ai is the effect on S_a of raising rollout i's probability, whatever its advantage; <grad S_a, v_i> is rollout i's
    effect on S_a in this step, in nats per unit lr. The left side of the second equation is one JVP, the right side
    per-sequence gradients. With one seed a run repeats bit for bit on one machine, figures of time and memory excepted.

    Args:
        plan: what to measure.
        path: run directory; None: one in ``runs`` that is named after the plan's content.
        progress: called with (phase, done, total) as the work goes on.

    Returns:
        What the run directory holds, see ``load_fisher_run``.

    Raises:
        PlanError: before anything is sampled or written; so are the errors of checkpoints, prompts and rewards.
        RunDirectoryError: where ``path`` holds something else.
        IdentityError: where the two sides differ by more than rounding.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from fx_influence.lab.plan import CustomSequence
        >>> answer = CustomSequence("3+14+9=", "26")
        >>> plan = FisherKernelPlan(update=answer, evaluations=(answer,))
        >>> with TemporaryDirectory() as folder:
        ...     results = run_fisher(plan, Path(folder) / "fisher")
        >>> results.evaluations[0].kernel.shape, bool(results.evaluations[0].delta_logprob_matrix > 0)
        ((1, 1), True)
    """
    return run_experiment(plan, path, _measure, load_fisher_run, progress)


def _measure(plan: FisherKernelPlan, context: RunContext) -> dict[str, Any]:
    state, directory = context.state, context.directory
    with timed(context.seconds, "step"):
        step = measure_step(plan, state, update_batch(plan, context.u), "frozen", directory, context.progress)
        diagonal = kernel_diagonal(plan, state, step)
    if not directory.has(UPDATE_SELF_KERNEL):
        with timed(context.seconds, "self-kernel"):
            directory.write_array(UPDATE_SELF_KERNEL, self_kernel(plan, state, step.batch, diagonal))
    for i in range(len(plan.evaluations)):
        if not directory.has(eval_file(i, ".json")):
            _measure_evaluation(plan, context, step, diagonal, i)
        _partial_results(directory, i).clear()
    with raise_if_damaged(directory.path):
        evaluations = [directory.read_json(eval_file(i, ".json")) for i in range(len(plan.evaluations))]
    return {**evaluations[0], "evaluations": evaluations}


def _measure_evaluation(plan: FisherKernelPlan, context: RunContext, step: Step, diagonal: Params, i: int) -> None:
    state, directory = context.state, context.directory
    e = context.load_evaluation(plan, i)
    tasks: dict[str, Callable[[], Arrays]] = {
        "self-kernel": lambda: {"self_kernel": self_kernel(plan, state, e.batch, diagonal)},
        "kernel": lambda: {"kernel": kernel(plan, state, e.batch, step.batch, diagonal)},
        "change": lambda: logprob_change(plan, state, step, e.batch),
    }
    results = _partial_results(directory, i)
    for k, (phase, task) in enumerate(tasks.items()):
        context.progress(phase, 0, 1)
        with timed(context.seconds, phase):
            if k not in results:
                results[k] = task()
        context.progress(phase, 1, 1)
    arrays = {name: value for k in range(len(tasks)) for name, value in results[k].items()}
    evaluation = FisherEvaluation(arrays.pop("kernel"), arrays.pop("matrix"), arrays)
    directory.write_array(eval_file(i, KERNEL), evaluation.kernel)
    directory.write_array(eval_file(i, CHANGE_MATRIX), evaluation.matrix)
    directory.write_arrays(eval_file(i, ".npz"), evaluation.arrays)
    directory.write_jsonl(
        eval_file(i, "_top.jsonl"), _top_records(plan.top, e.rollouts, context.u.rollouts, evaluation)
    )
    # Written last, because its presence says that the evaluation is complete.
    directory.write_json(eval_file(i, ".json"), fisher_figures(e, evaluation))


def _partial_results(directory: RunDirectory, i: int) -> PartialResults[Arrays]:
    """Return what is stored while an evaluation lasts: the result of each of its tasks."""
    return directory.partial_arrays(eval_file(i, "_part"))


def _top_records(
    count: int, e_rollouts: Sequence[Rollout], u_rollouts: Sequence[Rollout], evaluation: FisherEvaluation
) -> list[dict[str, Any]]:
    """Return a record for each rollout of E, with the ``count`` rollouts of U that move it most."""
    # A stable sort, so that equal contributions stay in the order of U on every machine.
    order = np.argsort(-np.abs(evaluation.matrix), axis=1, kind="stable")[:, :count]
    return [
        {
            **_text_fields(rollout),
            "predicted_delta_logprob": float(evaluation.arrays["predicted_delta_logprob"][a]),
            "baseline": float(evaluation.arrays["predicted_delta_logprob_baseline"][a]),
            "contributors": [
                {
                    **_text_fields(u_rollouts[i]),
                    "advantage": u_rollouts[i].advantage,
                    "contribution": float(evaluation.matrix[a, i]),
                    "kernel": float(evaluation.kernel[a, i]),
                }
                for i in order[a].tolist()
            ],
        }
        for a, rollout in enumerate(e_rollouts)
    ]


def _text_fields(rollout: Rollout) -> dict[str, Any]:
    question = {} if rollout.question is None else {"question": rollout.question}
    return {"id": rollout.id, "prompt": rollout.prompt, **question, "completion": rollout.completion}
