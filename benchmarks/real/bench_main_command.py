"""Compare the main command with its parts: the processor time of `fx-influence run` beside direct calls of the library.

    python -m benchmarks main_command            the plan that `make real` prepares; a quarter of an hour
    python -m benchmarks main_command --quick    the embedded policy, written nowhere

Every round, on one thread, runs the plan on rollouts that are sampled already, then makes the same measurements by
direct calls.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fx_influence as fx
from benchmarks.harness import COSTS, one_thread, parser, store
from benchmarks.real.__main__ import PLAN
from benchmarks.real.__main__ import main as prepare
from benchmarks.real.language_model import FOLDER
from fx_influence.autodiff.rollout_gradients import rollout_gradients
from fx_influence.interop.runtime import run_files
from fx_influence.interop.runtime.environment import environment
from fx_influence.lab.experiment.derivatives import derivative_check
from fx_influence.lab.experiment.entropy import run
from fx_influence.lab.experiment.rounding import rounding_floor
from fx_influence.lab.inputs.rollouts import load_rollouts, load_state
from fx_influence.lab.inputs.update import update_batch
from fx_influence.lab.plan import EntropyInfluencePlan, SampledBatch
from fx_influence.lab.plan.files import read_plan
from fx_influence.lab.store import RunDirectory

NAME = "bench_main_command"
COMMAND = "fx-influence run"
INFLUENCE = "influence(..., matrix=True)"
ROUNDS = 3
ROLLOUTS = (run_files.UPDATE_ROLLOUTS, run_files.eval_file(0, "_rollouts.jsonl"))
BEGUN = (run_files.PLAN, run_files.ENVIRONMENT, run_files.SUMS, *ROLLOUTS)
"""Files of a run directory that has sampled, and measured nothing."""
Seconds = dict[str, float]


def quick_plan(plan: EntropyInfluencePlan) -> EntropyInfluencePlan:
    """Return a plan that asks for the same of the embedded policy, on a few rollouts."""
    sizes: dict[str, Any] = {"num_prompts": 16, "completions_per_prompt": 2}
    measured = ("directions", "eta_multiples", "scaled_eta_multiples", "auto_scale", "second_order", "reward_influence")
    return dataclasses.replace(
        EntropyInfluencePlan(),
        update=SampledBatch("demo/train", **sizes),
        evaluations=(SampledBatch("demo/eval", **sizes),),
        **{name: getattr(plan, name) for name in measured},
    )


def measure_round(plan: EntropyInfluencePlan, sampled: Path, folder: Path) -> Seconds:
    """Return the processor seconds of a run on rollouts that exist, and of its parts called directly.

    Args:
        plan: asks for the finite step along the whole step alone, as docs/smollm2.yaml does.
        sampled: directory of a run of the same plan, which has the rollouts.
        folder: does not exist; the directory of this run.
    """
    again = RunDirectory(Path(shutil.copytree(sampled, folder)))
    again.remove(*(file.name for file in folder.iterdir() if file.name not in BEGUN))
    started: dict[str, Any] = {}

    def load() -> None:
        state, directory = load_state(plan), RunDirectory(sampled)
        u, e = (load_rollouts(plan, state, directory, k, name, lambda *_: None) for k, name in enumerate(ROLLOUTS))
        started.update(state=state, u=update_batch(plan, u), e=e.batch)

    seconds = {
        COMMAND: processor_seconds(lambda: run(plan, folder)),
        "load the state, score U and E": processor_seconds(load),
    }
    state, u, e = started["state"], started["u"], started["e"]
    options: dict[str, Any] = {"apply": state.apply, **plan.estimation()}
    budget: dict[str, Any] = {"memory_budget": plan.memory_budget, "max_grad_norm": plan.max_grad_norm}
    # A direction of the step's size; what it points to does not change the time.
    v = {name: -p for name, p in state.params.items()}
    parts: dict[str, Callable[[], object]] = {
        "check_derivatives, 4 rows of U": lambda: derivative_check(plan, state, u),
        "gradient of every rollout of U, for its norm": lambda: rollout_gradients(state.params, u, state.apply),
        INFLUENCE: lambda: fx.influence(state.params, u, e, state.opt_state, matrix=True, **budget, **options),
        "jvp_delta along the step and its baseline": lambda: [
            fx.jvp_delta(state.params, v, e, second_order=False, **options) for _ in range(2)
        ],
        "snis_delta along the step": lambda: fx.snis_delta(state.params, v, state.reference_lr, e, **options),
        "change of entropy by rounding alone, 8 draws": lambda: rounding_floor(plan, state, e),
    }
    return seconds | {name: processor_seconds(work) for name, work in parts.items()}


def processor_seconds(work: Callable[[], object]) -> float:
    """Return the processor seconds of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def report_of(plan: EntropyInfluencePlan, model: str, rounds: int) -> dict[str, Any]:
    """Return the seconds of all rounds, by round."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(plan, folder / "first")
        measured = []
        for k in range(rounds):
            measured.append(measure_round(plan, folder / "first", folder / str(k)))
            print({name: round(value, 1) for name, value in measured[-1].items()}, flush=True)
    return {"environment": environment(), "model": model, "rounds": measured}


def markdown(report: dict[str, Any]) -> str:
    """Return the table of the page."""
    rounds: list[Seconds] = report["rounds"]
    median = {name: statistics.median(seconds[name] for seconds in rounds) for name in rounds[0]}
    ratios = [seconds[COMMAND] / sum(value for name, value in seconds.items() if name != COMMAND) for seconds in rounds]
    lines = [f"| {report['model']}, {len(rounds)} of {ROUNDS} rounds | processor seconds |", "|---|---|"]
    lines += [f"| {name if name == COMMAND else 'part: ' + name} | {value:.1f} |" for name, value in median.items()]
    lines += [
        f"| the command / the sum of its parts | {statistics.median(ratios):.2f} |",
        f"| the command / `{INFLUENCE}` | {statistics.median(s[COMMAND] / s[INFLUENCE] for s in rounds):.1f} |",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__, "the embedded policy, written nowhere").parse_args(argv)
    one_thread()
    if arguments.quick:
        report = report_of(quick_plan(read_plan(PLAN, EntropyInfluencePlan, print)), "embedded policy", 1)
        print(markdown(report))
        return 0
    prepare([str(FOLDER)])
    plan = read_plan(FOLDER / PLAN.name, EntropyInfluencePlan, print)
    report = report_of(plan, "SmolLM2-135M-Instruct, LoRA", ROUNDS)
    store(NAME, report, {COSTS: {NAME: markdown(report)}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
