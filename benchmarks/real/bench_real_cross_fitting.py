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
from benchmarks.evidence.bench_cross_fitting import compare, markdown, seconds_of, summary
from benchmarks.evidence.bench_estimators import noise_share
from benchmarks.harness import EVIDENCE, one_thread, parser, store, write_json
from benchmarks.real.bench_real_counterfactual import embedded_plan
from benchmarks.real.pretrained_states import MODEL, load_pretrained_state, pretrained_plans
from fx_influence.interop.runtime.environment import environment
from fx_influence.lab.plan import EntropyInfluencePlan

NAME, PAGE = "bench_real_cross_fitting", EVIDENCE


def measure(plan: EntropyInfluencePlan, folder: Path) -> dict[str, Any]:
    """Return errors and processor seconds by kind of E; those that ``folder`` has are not measured again.

    Args:
        plan: of U, a fresh E and the E of the truth.
        folder: of the rollouts and the figures.
    """
    file = folder / "figures.json"
    if not file.exists():
        write_json(file, errors_and_seconds(plan, folder))
    return dict(json.loads(file.read_text(encoding="utf-8")))


def errors_and_seconds(plan: EntropyInfluencePlan, folder: Path) -> dict[str, Any]:
    """Return errors and processor seconds by kind of E; rollouts that ``folder`` has are not sampled again."""
    state = load_pretrained_state(plan, folder)
    regions = fx.labels.regions(state.update, state.u.values)
    truth = state.influence(state.others, labels=regions)
    kinds = {"cross-fitted": None, "fresh E": state.fresh, "plug-in": state.update._replace(coefficients=None)}
    errors = {name: compare(state.influence(chosen, labels=regions), truth, regions) for name, chosen in kinds.items()}
    seconds = {name: seconds_of(state.influence, partial(kinds.get, name)) for name in ("cross-fitted", "fresh E")}
    return {"errors": errors, "seconds": seconds, "truth_noise_share": noise_share(truth)}


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__, "the embedded policy, few rollouts, written nowhere").parse_args(argv)
    one_thread()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as temporary:
            states = [measure(embedded_plan(), Path(temporary) / "run")]
    else:
        states = [measure(*plan_and_folder) for plan_and_folder in pretrained_plans().values()]
    model = "embedded policy" if arguments.quick else MODEL
    # Every state counts as a run of its own, so that intervals are over states.
    runs = [{"policy": model, "found": [state]} for state in states]
    report = {"environment": environment(), "summary": summary(runs), "runs": runs}
    print(markdown(report))
    if not arguments.quick:
        store(NAME, report, {PAGE: {NAME: markdown(report)}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
