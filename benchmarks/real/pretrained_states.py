"""Eight training states of a pretrained chat model, each with a step's rollouts, a fresh E and other rollouts.

The states are of one GRPO run on tasks of reasoning-gym with LoRA; their rollouts are sampled once. A benchmark over
them stores what it measures state by state.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fx_influence as fx
from benchmarks.evidence.bench_counterfactual import MAX_NORM
from benchmarks.harness import EVIDENCE, Tables, one_thread, parser, store
from benchmarks.real.__main__ import prepare_policies
from benchmarks.real.bench_real_counterfactual import (
    COMPLETIONS,
    PROMPTS,
    ROLLOUTS,
    batch,
    embedded_plan,
    progress,
    real_plan,
)
from benchmarks.real.language_model import FOLDER, prepare_model
from fx_influence.interop.rollouts.batch import collate
from fx_influence.lab.inputs.rollouts import ScoredRollouts, load_rollouts, load_state
from fx_influence.lab.inputs.update import update_batch
from fx_influence.lab.plan import EntropyInfluencePlan
from fx_influence.lab.store import RunDirectory
from fx_influence.types import AdamWState, Batch, Params

STEPS = tuple(range(3, 27, 3))
"""Optimizer steps before the states."""
TASKS = 64
MODEL = "SmolLM2-135M, LoRA"


class PretrainedState(NamedTuple):
    """A training state before a step on ``update``, with two E of the same policy."""

    params: Params
    apply: fx.Policy
    opt_state: AdamWState
    u: ScoredRollouts
    """32 rollouts, 8 prompts x 4."""
    update: Batch
    """Their batch with the coefficients of the loss."""
    fresh: Batch
    """32 rollouts of 8 other prompts."""
    others: Batch
    """112 rollouts of 56 further prompts, two of each."""
    held_out: Batch
    """The rollouts of both, 144 of 64 prompts."""

    def influence(self, evaluation: Batch | None, **options: Any) -> fx.Influence:
        """Return ``fx.influence`` of the step on an E, None for cross-fitting, as the trainer clips."""
        options = {"apply": self.apply, "max_grad_norm": MAX_NORM, **options}
        return fx.influence(self.params, self.update, evaluation, self.opt_state, **options)


def load_pretrained_state(plan: EntropyInfluencePlan, folder: Path) -> PretrainedState:
    """Return a state with its rollouts; those that ``folder`` has are not sampled again."""
    folder.mkdir(parents=True, exist_ok=True)
    state, directory = load_state(plan), RunDirectory(folder)
    u, e, others = (load_rollouts(plan, state, directory, k, name, progress) for k, name in enumerate(ROLLOUTS))
    batches = (update_batch(plan, u), e.batch, others.batch, joined(e.rollouts, others.rollouts))
    return PretrainedState(state.params, state.apply, state.opt_state, u, *batches)


def joined(*parts: Sequence[fx.Rollout]) -> Batch:
    """Return the batch of rollouts of several parts, between which no prompt is shared."""
    shifted: list[fx.Rollout] = []
    for part in parts:
        first = 1 + max((r.group for r in shifted), default=-1)
        shifted += [dataclasses.replace(r, group=r.group + first) for r in part]
    return collate(shifted, 0)


def pretrained_plans() -> dict[int, tuple[EntropyInfluencePlan, Path]]:
    """Return the plan of each state and the folder of its rollouts, by the number of optimizer steps before it."""
    base = prepare_model()
    evaluations = (batch("eval", 0, PROMPTS, COMPLETIONS), batch("eval", PROMPTS, TASKS - PROMPTS, 2))
    policies = prepare_policies(FOLDER, base, STEPS)
    return {
        steps: (real_plan(policy, base, *evaluations), FOLDER / f"cross_fitting_{steps}")
        for steps, policy in zip(STEPS, policies, strict=True)
    }


class StateBenchmark(NamedTuple):
    """A benchmark over the states.

    ``measure(plan, rollouts, file)`` measures at the state of a plan, whose rollouts are in the folder ``rollouts``,
    and returns the figures that it stores in ``file``, none of them twice. ``report(model, figures)`` summarises those
    of several states, ``markdown(report)`` returns the table, ``appendix(report)`` a long one for the end of the page.
    """

    name: str
    doc: str | None
    measure: Callable[[EntropyInfluencePlan, Path, Path], Mapping[str, Any]]
    report: Callable[[str, Sequence[Mapping[str, Any]]], dict[str, Any]]
    markdown: Callable[[Mapping[str, Any]], str]
    appendix: Callable[[Mapping[str, Any]], str] | None = None

    def tables(self, report: Mapping[str, Any]) -> Tables:
        """Return the tables by page and mark."""
        tables = {self.name: self.markdown(report)}
        return {EVIDENCE: tables | ({f"{self.name}_appendix": self.appendix(report)} if self.appendix else {})}

    def file(self, steps: int) -> Path:
        """Return the file of the figures at the state after ``steps`` optimizer steps."""
        return FOLDER / f"{self.name.removeprefix('bench_real_')}_{steps}" / "figures.json"

    def main(self, argv: list[str] | None = None) -> int:
        """Run the benchmark from the command line."""
        command = parser(self.doc, "the embedded policy, few rollouts, written nowhere")
        command.add_argument("--collect", action="store_true", help="measure nothing; tables of the measured states")
        arguments = command.parse_args(argv)
        one_thread()
        if arguments.quick:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                figures = [self.measure(embedded_plan(), folder / "run", folder / "figures.json")]
        else:
            for k, (steps, plan_and_folder) in enumerate(() if arguments.collect else pretrained_plans().items()):
                self.measure(*plan_and_folder, self.file(steps))
                progress("states", k + 1, len(STEPS))
            figures = [json.loads(f.read_text(encoding="utf-8")) for f in map(self.file, STEPS) if f.exists()]
        if not figures:
            command.error(f"{self.file(STEPS[0])} and those of later states are missing; measure without --collect")
        report = self.report("embedded policy" if arguments.quick else MODEL, figures)
        print("\n\n".join(self.tables(report)[EVIDENCE].values()))
        if not arguments.quick:
            store(self.name, report, self.tables(report))
        return 0
