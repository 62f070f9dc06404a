"""Compare the costs of an entropy-influence run and a Fisher kernel run of one plan.

Both runs take thousands of pairs of a rollout of E with one of U, on the same training state and the same rollouts: the
second reads those that the first stores, so that its seconds include no sampling and nothing depends on a sampler that
repeats itself on another number of threads or another device.

    python -m benchmarks.evidence.run_entropy_influence_large benchmarks/evidence/plans/large.yaml --out runs/large

Each run is a process of its own, because a process's peak memory never falls. The same command resumes what was
interrupted; seconds and memory are then those of the last process, and the table says so. The Fisher run measures
equal rollouts once, so it is faster if the policy repeats itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fx_influence.interop.runtime.run_files import ENVIRONMENT, PLAN, SUMMARY, UPDATE_ROLLOUTS, eval_file
from fx_influence.lab.plan import (
    EntropyInfluencePlan,
    FisherKernelPlan,
    PlanError,
    RolloutFile,
    StepPlan,
    plan_text,
    read_plan,
)
from fx_influence.lab.store import RunDirectory

ENTROPY, FISHER = "entropy_influence", "fisher_kernel"
COMMANDS = {ENTROPY: "run", FISHER: "fisher"}
RESULTS = Path(__file__).parents[1] / "results"
PAIR_PHASES = {ENTROPY: ("first order",), FISHER: ("self-kernel", "kernel", "change")}
"""Phases that measure pairs: no sampling, no gradient of U, no finite steps."""
FIGURES = ("seconds", "seconds_by_phase", "peak_memory_bytes", "peak_gpu_memory_bytes", "torch_threads")
PROCESSES = "processes.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Make both runs, print the table, write the JSON; return 0, or the exit status of the run that failed."""
    arguments = _arguments(argv)
    try:
        plan, out = read_plan(arguments.plan, EntropyInfluencePlan), arguments.out
    except PlanError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    for name, run_plan in ((ENTROPY, plan), (FISHER, fisher_plan(plan, out / ENTROPY))):
        if not _finished(run_plan, out / name) and (status := _run(name, run_plan, out)):
            return status
    figures = comparison(arguments.plan.stem, out)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    _print(figures)
    return 0


def fisher_plan(plan: EntropyInfluencePlan, directory: Path) -> FisherKernelPlan:
    """Return the Fisher plan with the training state and rollouts that the run of ``plan`` in ``directory`` stores."""
    shared: dict[str, Any] = {field.name: getattr(plan, field.name) for field in dataclasses.fields(StepPlan)}
    rollouts = [eval_file(i, "_rollouts.jsonl") for i in range(len(plan.evaluations))]
    update, *evaluations = (RolloutFile(str((directory / name).resolve())) for name in (UPDATE_ROLLOUTS, *rollouts))
    return FisherKernelPlan(**{**shared, "update": update, "evaluations": tuple(evaluations)})


def comparison(name: str, out: Path) -> dict[str, Any]:
    """Return the costs of the finished runs under ``out``, and the ratios of the Fisher run to the other."""
    summaries = {run: RunDirectory(out / run).read_json(SUMMARY) for run in COMMANDS}
    first = summaries[ENTROPY]
    n_u, n_e = first["update_rollouts"], [e["rollouts"] for e in first["evaluations"]]
    pairs, processes = n_u * sum(n_e), _processes(out)
    runs = {run: {**_costs(run, summary, pairs), "processes": processes[run]} for run, summary in summaries.items()}
    return {
        "plan": name,
        "environment": RunDirectory(out / ENTROPY).read_json(ENVIRONMENT),
        "trainable_parameters": first["trainable_parameters"],
        "n_u": n_u,
        "n_e": n_e,
        "pairs": pairs,
        "runs": runs,
        "fisher_over_entropy": {
            figure: _ratio(runs[FISHER][figure], runs[ENTROPY][figure])
            for figure in ("seconds", "first_order_seconds", "peak_memory_bytes", "peak_gpu_memory_bytes")
        },
    }


def _costs(run: str, summary: dict[str, Any], pairs: int) -> dict[str, Any]:
    in_pairs = sum(summary["seconds_by_phase"].get(phase, 0.0) for phase in PAIR_PHASES[run])
    return {
        **{figure: summary[figure] for figure in FIGURES},
        "first_order_seconds": in_pairs,
        "pairs_per_second": _ratio(pairs, summary["seconds"]),
        "pairs_per_first_order_second": _ratio(pairs, in_pairs),
    }


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _finished(plan: StepPlan, path: Path) -> bool:
    directory = RunDirectory(path)
    return directory.has(SUMMARY) and directory.read_yaml(PLAN) == plan.to_dict()


def _run(name: str, plan: StepPlan, out: Path) -> int:
    print(f"{name}: fx-influence {COMMANDS[name]}", file=sys.stderr, flush=True)
    RunDirectory(out).write_json(PROCESSES, {**_processes(out), name: _processes(out)[name] + 1})
    (out / f"{name}.yaml").write_text(plan_text(plan), encoding="utf-8")
    command = [sys.executable, "-m", "fx_influence.lab.cli", COMMANDS[name], str(out / f"{name}.yaml")]
    # Its output is stored; progress and errors go to the terminal.
    with open(out / f"{name}.txt", "wb") as page:
        return subprocess.run([*command, "--out", str(out / name)], stdout=page, check=False).returncode


def _processes(out: Path) -> dict[str, int]:
    """Return how many processes have worked on each run."""
    directory = RunDirectory(out)
    return directory.read_json(PROCESSES) if directory.has(PROCESSES) else dict.fromkeys(COMMANDS, 0)


def _print(figures: dict[str, Any]) -> None:
    runs = figures["runs"]
    table = Table(title=f"{figures['pairs']} pairs: {figures['n_u']} rollouts of U, {figures['n_e']} of E")
    table.add_column("cost", no_wrap=True)
    for name in runs:
        table.add_column(name, justify="right")
    table.add_column("fisher / entropy", justify="right")
    for label, figure, unit in (
        ("seconds", "seconds", 1),
        ("  of first order", "first_order_seconds", 1),
        ("peak memory, MiB", "peak_memory_bytes", 2**20),
        ("peak GPU memory, MiB", "peak_gpu_memory_bytes", 2**20),
    ):
        ratio = figures["fisher_over_entropy"][figure]
        table.add_row(label, *(_number(runs[name][figure], unit) for name in runs), _number(ratio, 1, ".3f"))
    rates = {"pairs per second": "pairs_per_second", "  of first order": "pairs_per_first_order_second"}
    for label, figure in rates.items():
        table.add_row(label, *(_number(run[figure], 1, ".0f") for run in runs.values()), "")
    for phase in dict.fromkeys(phase for run in runs.values() for phase in run["seconds_by_phase"]):
        table.add_row(f"seconds: {phase}", *(_number(run["seconds_by_phase"].get(phase)) for run in runs.values()), "")
    Console().print(table)
    for name, run in runs.items():
        if run["processes"] > 1:
            print(f"{name} was continued by {run['processes']} processes; its figures are those of the last")


def _number(value: float | None, unit: int = 1, form: str = ".1f") -> str:
    return "" if value is None else format(value / unit, form)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="a YAML plan of an entropy-influence run")
    parser.add_argument("--out", type=Path, help="folder of both runs (default: runs/ and the plan's name)")
    parser.add_argument("--json", type=Path, help="where the figures go (default: results/, by the plan's name)")
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out or Path("runs") / arguments.plan.stem
    arguments.json = arguments.json or RESULTS / f"run_entropy_influence_{arguments.plan.stem}.json"
    return arguments


if __name__ == "__main__":
    sys.exit(main())
