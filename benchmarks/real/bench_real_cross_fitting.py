"""Are the step's own rollouts as good an E as fresh ones, for a pretrained chat model?

    python -m benchmarks real_cross_fitting            SmolLM2-135M-Instruct with LoRA; ten minutes a state on a core,
                                                       resumed where it stopped
    python -m benchmarks real_cross_fitting --quick    the embedded policy, few rollouts, written nowhere

At eight states of a GRPO run on tasks of reasoning-gym the influences of 32 rollouts, 8 prompts x 4, and their sums
over the field's four regions of tokens, are compared with those on 112 rollouts of 56 other prompts: cross-fitted on
the step's own rollouts, on a fresh E of their shape, and on them with nothing left out (the plug-in). Figures and table
are those of the benchmark ``cross_fitting``; the seconds are without sampling.
"""

from __future__ import annotations

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import fx_influence as fx
from benchmarks.evidence.bench_counterfactual import MAX_NORM
from benchmarks.evidence.bench_cross_fitting import compare, markdown, seconds_of, summary
from benchmarks.evidence.bench_estimators import noise_share
from benchmarks.harness import EVIDENCE, one_thread, parser, store, write_json
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
from fx_influence.interop.runtime.environment import environment
from fx_influence.lab.inputs.rollouts import load_rollouts, load_state
from fx_influence.lab.inputs.update import update_batch
from fx_influence.lab.plan import EntropyInfluencePlan
from fx_influence.lab.store import RunDirectory
from fx_influence.types import Batch

NAME, PAGE = "bench_real_cross_fitting", EVIDENCE
STEPS = tuple(range(3, 27, 3))
"""Optimizer steps before the states."""
TASKS = 64


def measure(plan: EntropyInfluencePlan, folder: Path) -> dict[str, Any]:
    """Return errors and processor seconds by kind of E; those that ``folder`` has are not measured again.

    Args:
        plan: of U, a fresh E and the E of the truth.
        folder: of the rollouts and the figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "figures.json"
    if not file.exists():
        write_json(file, errors_and_seconds(plan, RunDirectory(folder)))
    return dict(json.loads(file.read_text(encoding="utf-8")))


def errors_and_seconds(plan: EntropyInfluencePlan, directory: RunDirectory) -> dict[str, Any]:
    """Return errors and processor seconds by kind of E; rollouts that ``directory`` has are not sampled again."""
    state = load_state(plan)
    u, e, others = (load_rollouts(plan, state, directory, k, name, progress) for k, name in enumerate(ROLLOUTS))
    update = update_batch(plan, u)
    regions = fx.labels.regions(update, u.values)

    def influences(chosen: Batch | None, **options: Any) -> fx.Influence:
        return fx.influence(
            state.params, update, chosen, state.opt_state, apply=state.apply, max_grad_norm=MAX_NORM, **options
        )

    truth = influences(others.batch, labels=regions)
    kinds = {"cross-fitted": None, "fresh E": e.batch, "plug-in": update._replace(coefficients=None)}
    errors = {name: compare(influences(chosen, labels=regions), truth, regions) for name, chosen in kinds.items()}
    seconds = {name: seconds_of(influences, partial(kinds.get, name)) for name in ("cross-fitted", "fresh E")}
    return {"errors": errors, "seconds": seconds, "truth_noise_share": noise_share(truth)}


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__, "the embedded policy, few rollouts, written nowhere").parse_args(argv)
    one_thread()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as temporary:
            states = [measure(embedded_plan(), Path(temporary) / "run")]
    else:
        base = prepare_model()
        evaluations = (batch("eval", 0, PROMPTS, COMPLETIONS), batch("eval", PROMPTS, TASKS - PROMPTS, 2))
        states = [
            measure(real_plan(policy, base, *evaluations), FOLDER / f"cross_fitting_{steps}")
            for steps, policy in zip(STEPS, prepare_policies(FOLDER, base, STEPS), strict=True)
        ]
    model = "embedded policy" if arguments.quick else "SmolLM2-135M, LoRA"
    # Every state counts as a run of its own, so that intervals are over states.
    runs = [{"policy": model, "found": [state]} for state in states]
    report = {"environment": environment(), "summary": summary(runs), "runs": runs}
    print(markdown(report))
    if not arguments.quick:
        store(NAME, report, {PAGE: {NAME: markdown(report)}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
