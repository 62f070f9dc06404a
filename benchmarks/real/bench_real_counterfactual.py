"""Do influences predict the effect of leaving rollouts out of a step of a pretrained chat model?

    python -m benchmarks real_counterfactual            SmolLM2-135M-Instruct with LoRA; an hour a state on a core,
                                                        resumed at the step at which it stopped
    python -m benchmarks real_counterfactual --quick    the embedded policy, few rollouts, written nowhere

After some steps of GRPO on tasks of reasoning-gym, AdamW's next step is redone without each of 32 rollouts and on 40
random halves of them, and the entropy measured by importance sampling on rollouts of other prompts, the same for all
steps. Predictors and correlations are those of the benchmark ``counterfactual``; besides them "cross-fitted" uses no
rollouts but the step's own. Float32, as the model is trained.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fx_influence as fx
from benchmarks.evidence.bench_counterfactual import (
    MAX_NORM,
    Step,
    compared,
    predictions,
    random_halves,
    sampled_change,
    weights_of_steps,
)
from benchmarks.evidence.counterfactual_tables import appendix, of_states
from benchmarks.harness import EVIDENCE, one_thread, parser, store, write_json
from benchmarks.real.__main__ import PLAN, prepare_policies
from benchmarks.real.bench_main_command import quick_plan
from benchmarks.real.language_model import FOLDER, prepare_model
from benchmarks.real.tasks import FILES, SYSTEM
from fx_influence.autodiff.rollout_gradients import rollout_gradients
from fx_influence.interop.runtime import run_files
from fx_influence.interop.runtime.environment import environment
from fx_influence.lab.inputs.rollouts import load_rollouts, load_state
from fx_influence.lab.inputs.update import update_batch
from fx_influence.lab.plan import EntropyInfluencePlan, SampledBatch
from fx_influence.lab.plan.files import read_plan
from fx_influence.lab.store import RunDirectory
from fx_influence.types import Params

NAME, PAGE = "bench_real_counterfactual", EVIDENCE
STEPS = (1, 8)
"""Optimizer steps before the states."""
PROMPTS, COMPLETIONS, HALVES = 8, 4, 40
EVALUATED = 32
"""Prompts of E, one completion of each, and as many other prompts that measure the effects, two completions of each."""
ROLLOUTS = (run_files.UPDATE_ROLLOUTS, *(run_files.eval_file(k, "_rollouts.jsonl") for k in range(2)))


def batch(split: str, begin: int, count: int, each: int, **options: Any) -> SampledBatch:
    """Return the request of ``each`` completions of ``count`` tasks of a split, from number ``begin`` on."""
    ids = tuple(f"{split}-{k:02}" for k in range(begin, begin + count))
    return SampledBatch(str(FILES[split]), ids, None, each, chat=True, system=SYSTEM, **options)


def real_plan(policy: Path, model: Path, *evaluations: SampledBatch) -> EntropyInfluencePlan:
    """Return the plan of 32 rollouts in U, and E, sampled of a training state of the model."""
    return dataclasses.replace(
        read_plan(PLAN, EntropyInfluencePlan, print),
        checkpoint=str(policy),
        base=str(model),
        update=batch("train", 0, PROMPTS, COMPLETIONS, resample_zero_advantage=2),
        evaluations=evaluations,
    )


def embedded_plan() -> EntropyInfluencePlan:
    """Return the same plan for a few rollouts of the embedded policy."""
    plan = quick_plan(read_plan(PLAN, EntropyInfluencePlan, print))
    others = SampledBatch("demo/eval", num_prompts=16, completions_per_prompt=2, seed=1)
    return dataclasses.replace(plan, evaluations=(*plan.evaluations, others))


def measure(plan: EntropyInfluencePlan, folder: Path, halves: int) -> dict[str, Any]:
    """Return correlations of every predictor with the measured effects at a state.

    Args:
        plan: of U, E, and the rollouts that measure.
        folder: of rollouts and measured changes; those that are there are not made again.
        halves: number of random halves of U.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state, directory = load_state(plan), RunDirectory(folder)
    u, e, others = (load_rollouts(plan, state, directory, k, name, progress) for k, name in enumerate(ROLLOUTS))
    batch, advantages = update_batch(plan, u), torch.tensor([r.advantage or 0.0 for r in u.rollouts])
    gradients = rollout_gradients(state.params, batch, state.apply)
    step = Step(state.params, state.apply, state.opt_state, batch, advantages, gradients)
    chosen = random_halves(random.Random(0), len(advantages), halves)
    change = sampled_change(state.params, others.batch, state.apply)
    changes = measured_changes(step, weights_of_steps(chosen), change, folder / "changes.json")
    cross_fitted = fx.influence(
        state.params, batch, None, state.opt_state, apply=state.apply, max_grad_norm=MAX_NORM, stderr=False
    )
    predicted = {**predictions(step, e.batch), "cross-fitted": cross_fitted.per_sequence}
    return compared(changes, predicted, chosen)


def measured_changes(step: Step, weights: Tensor, change: Callable[[Params], Tensor], file: Path) -> Tensor:
    """Return Delta H of the steps with ``weights`` (K, n), contributions by prompt (K, prompts), stored one by one."""
    rows: list[list[float]] = json.loads(file.read_text(encoding="utf-8"))["changes"] if file.exists() else []
    for k in range(len(rows), len(weights)):
        rows.append(change(step.redone(weights[k : k + 1]))[0].tolist())
        write_json(file, {"changes": rows})
        progress("redone steps", k + 1, len(weights))
    return torch.tensor(rows, dtype=torch.float64)


def progress(phase: str, done: int, count: int) -> None:
    print(f"{phase} {done} of {count}", file=sys.stderr, flush=True)


def markdown(report: dict[str, Any]) -> str:
    """Return the tables of rank correlations by kind of effect."""
    return appendix({"summary": {"states": of_states(report["runs"])}})


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__, "the embedded policy, few rollouts, written nowhere").parse_args(argv)
    one_thread()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as temporary:
            measured = {8: measure(embedded_plan(), Path(temporary) / "run", 3)}
        model, lr = "embedded policy", 1e-4
    else:
        base, measured, model, lr = prepare_model(), {}, "SmolLM2-135M, LoRA", 2e-4
        for steps, policy in zip(STEPS, prepare_policies(FOLDER, base, STEPS), strict=True):
            measured[steps] = measure(
                real_plan(policy, base, batch("eval", 0, EVALUATED, 1), batch("eval", EVALUATED, EVALUATED, 2)),
                FOLDER / f"counterfactual_{steps}",
                HALVES,
            )
    states = [{"step": steps + 1, **figures} for steps, figures in sorted(measured.items())]
    report = {"environment": environment(), "runs": [{"policy": model, "lr": lr, "found": states}]}
    print(markdown(report))
    if not arguments.quick:
        store(NAME, report, {PAGE: {NAME: markdown(report)}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
