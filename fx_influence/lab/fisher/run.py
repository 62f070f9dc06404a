"""The Fisher job: how U's rollouts, and the step that they make, move the log-probability of each rollout of E."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.runtime.environment import timed
from fx_influence.interop.runtime.run_files import eval_file, raise_if_damaged
from fx_influence.lab.experiment.finite_steps import Arrays
from fx_influence.lab.experiment.runner import Experiment, carry_out
from fx_influence.lab.experiment.step import Step, measure_step
from fx_influence.lab.fisher.measure import Measured, figures, kernel, kernel_diagonal, logprob_change, self_kernel
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
from fx_influence.lab.store import Pieces, RunDirectory
from fx_influence.types import Params


def run_fisher(
    plan: FisherKernelPlan, path: str | Path | None = None, progress: Progress = lambda phase, done, total: None
) -> FisherKernelResults:
    """Do what ``plan`` says and store it in ``path``, see ``run``; a directory with part of the same run is continued.

    With S_a the log-probability of E's rollout a, P the preconditioner and v = v_baseline + sum_i v_i the step of U,

        K_ai = <grad S_a, P grad S_i>        <grad S_a, v> = <grad S_a, v_baseline> + sum_i <grad S_a, v_i>

    K says how raising rollout i's probability would move a's, whatever its advantage; <grad S_a, v_i> what it does in
    this step, in nats per unit lr. The left side of the second is one JVP, the right per-sequence gradients.

    Raises ``PlanError`` and the errors of checkpoints, prompts and rewards before anything is sampled or written,
    ``RunDirectoryError`` where ``path`` holds something else, and ``IdentityError`` where the two sides differ by more
    than rounding. With one seed a run repeats bit for bit on one machine, figures of time and memory apart.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from fx_influence.lab.plan.batch_request import CustomSequence
        >>> answer = CustomSequence("3+14+9=", "26")
        >>> plan = FisherKernelPlan(update=answer, evaluations=(answer,))
        >>> with TemporaryDirectory() as folder:
        ...     results = run_fisher(plan, Path(folder) / "fisher")
        >>> results.evaluations[0].kernel.shape, bool(results.evaluations[0].delta_logprob_matrix > 0)
        ((1, 1), True)
    """
    return carry_out(plan, path, _measure, load_fisher_run, progress)


def _measure(plan: FisherKernelPlan, now: Experiment) -> dict[str, Any]:
    state, directory = now.state, now.directory
    with timed(now.seconds, "step"):
        step = measure_step(plan, state, update_batch(plan, now.u), "frozen", directory, now.progress)
        diagonal = kernel_diagonal(plan, state, step)
    if not directory.has(UPDATE_SELF_KERNEL):
        with timed(now.seconds, "self-kernel"):
            directory.write_array(UPDATE_SELF_KERNEL, self_kernel(plan, state, step.batch, diagonal))
    for i in range(len(plan.evaluations)):
        if not directory.has(eval_file(i, ".json")):
            _evaluation(plan, now, step, diagonal, i)
        _pieces(directory, i).clear()
    with raise_if_damaged(directory.path):
        evaluations = [directory.read_json(eval_file(i, ".json")) for i in range(len(plan.evaluations))]
    return {**evaluations[0], "evaluations": evaluations}


def _evaluation(plan: FisherKernelPlan, now: Experiment, step: Step, diagonal: Params, i: int) -> None:
    state, directory = now.state, now.directory
    e = now.sampled_evaluation(plan, i)
    works: dict[str, Callable[[], Arrays]] = {
        "self-kernel": lambda: {"self_kernel": self_kernel(plan, state, e.batch, diagonal)},
        "kernel": lambda: {"kernel": kernel(plan, state, e.batch, step.batch, diagonal)},
        "change": lambda: logprob_change(plan, state, step, e.batch),
    }
    kept = _pieces(directory, i)
    for k, (phase, work) in enumerate(works.items()):
        now.progress(phase, 0, 1)
        with timed(now.seconds, phase):
            if k not in kept:
                kept[k] = work()
        now.progress(phase, 1, 1)
    arrays = {name: value for k in range(len(works)) for name, value in kept[k].items()}
    found = Measured(arrays.pop("kernel"), arrays.pop("matrix"), arrays)
    directory.write_array(eval_file(i, KERNEL), found.kernel)
    directory.write_array(eval_file(i, CHANGE_MATRIX), found.matrix)
    directory.write_arrays(eval_file(i, ".npz"), found.arrays)
    directory.write_jsonl(eval_file(i, "_top.jsonl"), _top(plan.top, e.rollouts, now.u.rollouts, found))
    # Written last: its presence says that the evaluation is whole.
    directory.write_json(eval_file(i, ".json"), figures(e, found))


def _pieces(directory: RunDirectory, i: int) -> Pieces[Arrays]:
    return directory.array_pieces(eval_file(i, "_part"))


def _top(count: int, of_e: Sequence[Rollout], of_u: Sequence[Rollout], found: Measured) -> list[dict[str, Any]]:
    # Stable, so that of equal contributions the first in U comes first on every machine.
    order = np.argsort(-np.abs(found.matrix), axis=1, kind="stable")[:, :count]
    return [
        {
            **_text(rollout),
            "predicted_delta_logprob": float(found.arrays["predicted_delta_logprob"][a]),
            "baseline": float(found.arrays["predicted_delta_logprob_baseline"][a]),
            "contributors": [
                {
                    **_text(of_u[i]),
                    "advantage": of_u[i].advantage,
                    "contribution": float(found.matrix[a, i]),
                    "kernel": float(found.kernel[a, i]),
                }
                for i in order[a].tolist()
            ],
        }
        for a, rollout in enumerate(of_e)
    ]


def _text(rollout: Rollout) -> dict[str, Any]:
    question = {} if rollout.question is None else {"question": rollout.question}
    return {"id": rollout.id, "prompt": rollout.prompt, **question, "completion": rollout.completion}
