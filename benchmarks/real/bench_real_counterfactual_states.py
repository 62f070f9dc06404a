"""Rank the rollouts of a pretrained model by every predictor, and by a step redone without them.

    python -m benchmarks real_counterfactual_states            SmolLM2-135M-Instruct, its last six layers trained;
                                                               a quarter of an hour a state on a core, resumed at the
                                                               step at which it stopped
    python -m benchmarks.real.bench_real_counterfactual_states --collect
                                                               measures nothing: the tables of the measured states
    python -m benchmarks real_counterfactual_states --quick    a tiny random model, written nowhere

After 1, 10 and 40 steps of GRPO on tasks of reasoning-gym, by LoRA in the last six layers and by all weights of these
layers, AdamW's next step on 32 rollouts of 8 prompts is redone without each of them and on 40 random halves, and the
entropy measured by importance sampling on 64 rollouts of other prompts, the same for all steps. Rollouts whose prompt
has equal rewards have no effect, so that the 8 prompts are the first ones with unequal rewards. Predictors and
correlations are those of the benchmark ``counterfactual``, with the estimators of ``estimators`` on 32 rollouts of
further prompts and cross-fitted on the step's own. The tables also have the states of ``real_counterfactual``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import EVIDENCE, Tables, one_thread, parser, result_path, store
from benchmarks.real.bench_real_counterfactual import NAME as ALL_LAYERS
from benchmarks.real.language_model import FOLDER, prepare_model, prepare_verifiers, tiny_model
from benchmarks.real.predicted_run import (
    Settings,
    Weights,
    held_out_tasks,
    initial_policy,
    load_state,
    state_file,
    train,
    training_tasks,
    unpredicted_step,
)
from benchmarks.real.predictor_tables import by_predictor, by_state, predictors
from benchmarks.real.redone_steps import figures_of, measure
from benchmarks.real.tasks import by_length, tasks, verified
from benchmarks.real.training_run import LEARNING_RATES
from fx_influence.interop.runtime.environment import environment

NAME, PAGE = "bench_real_counterfactual_states", EVIDENCE
LAYERS = range(24, 30)
TOKENS, EVALUATED = 16, 32
TITLES: dict[Weights, str] = {"lora": "LoRA, last six layers", "full": "all weights of the last six layers"}
"""Titles of training runs by the weights that they train."""
LRS = {weights: LEARNING_RATES[weights] for weights in TITLES}
ALL_LAYERS_TITLE = "LoRA, all layers"


class Study(NamedTuple):
    """Training runs and the states of each that are measured.

    Attributes:
        settings: of a training run by its weights.
        states: weights and number of optimizer steps before the state, in the order of measuring.
        prompts: of the step that is redone.
        halves: random halves of its rollouts.
    """

    settings: Mapping[Weights, Settings]
    states: Sequence[tuple[Weights, int]]
    prompts: int
    halves: int


STATES: tuple[tuple[Weights, int], ...] = tuple((weights, n) for n in (10, 40, 1) for weights in ("lora", "full"))


def real_study() -> Study:
    """Return the study of SmolLM2."""
    model = prepare_model()
    prepare_verifiers()
    steps = max(n for _, n in STATES)
    train_on, held_out = training_tasks(), held_out_tasks(2 * EVALUATED * (steps + 1))
    settings: dict[Weights, Settings] = {
        weights: Settings(model, LAYERS, LRS[weights], verified, train_on, held_out, steps, TOKENS, EVALUATED, weights)
        for weights in TITLES
    }
    return Study(settings, STATES, prompts=8, halves=40)


def tiny_study(folder: Path) -> Study:
    """Return a small one of a random model, which is written into ``folder``."""
    model = tiny_model(folder)
    settings: dict[Weights, Settings] = {
        weights: Settings(model, (0, 1), 1e-3, by_length, tasks("train"), tasks("eval"), 2, 4, 4, weights)
        for weights in TITLES
    }
    return Study(settings, (("lora", 1), ("full", 2)), prompts=4, halves=4)


def measure_states(study: Study, folder: Path) -> None:
    """Make the training runs and measure their states, into ``folder``; what it has is not made again."""
    for weights, steps in study.states:
        settings, target = study.settings[weights], folder / weights
        if figures_of(redone_folder(target, steps), steps + 1) is not None:
            continue
        train(target, settings, unpredicted_step, [n for w, n in study.states if w == weights])
        policy = initial_policy(settings)
        load_state(policy, state_file(target, steps))
        measure(policy, settings, steps + 1, redone_folder(target, steps), study.prompts, study.halves)


def redone_folder(folder: Path, steps: int) -> Path:
    """Return the folder of the step after ``steps`` steps of the training run in ``folder``."""
    return folder / f"redone_{steps + 1}"


def measured_runs(
    folder: Path, states: Sequence[tuple[Weights, int]], lrs: Mapping[Weights, float]
) -> list[dict[str, Any]]:
    """Return the training runs in ``folder`` with the figures of their states that are measured to the end.

    Args:
        folder: of the training runs.
        states: weights and number of optimizer steps before each state.
        lrs: learning rates by weights.
    """
    runs = []
    for weights, title in TITLES.items():
        figures = [
            figures_of(redone_folder(folder / weights, n), n + 1) for n in sorted(n for w, n in states if w == weights)
        ]
        if measured := [x for x in figures if x]:
            runs.append({"policy": title, "lr": lrs[weights], "found": measured})
    return runs


def all_layers_run() -> dict[str, Any]:
    """Return the stored training run with LoRA in all layers."""
    [run] = json.loads(result_path(ALL_LAYERS).read_text(encoding="utf-8"))["runs"]
    return {**run, "policy": ALL_LAYERS_TITLE}


def report_of(runs: Sequence[Mapping[str, Any]], earlier: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Return the report of training runs with measured states; those of ``earlier`` are in no mean over all states."""
    return {
        "environment": environment(),
        "predictors": predictors(runs),
        "runs": list(runs),
        "earlier": list(earlier),
    }


def tables(report: Mapping[str, Any]) -> Tables:
    """Return the table by predictor, and for the end of the page that by state."""
    return {PAGE: {NAME: by_predictor(report), f"{NAME}_appendix": by_state(report)}}


def main(argv: list[str] | None = None) -> int:
    command = parser(__doc__, "a tiny random model, written nowhere")
    command.add_argument("--collect", action="store_true", help="measure nothing; tables of the measured states")
    arguments = command.parse_args(argv)
    one_thread()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as name:
            study = tiny_study(Path(name) / "model")
            measure_states(study, Path(name))
            report = report_of(measured_runs(Path(name), study.states, {w: s.lr for w, s in study.settings.items()}))
    else:
        folder = FOLDER / "counterfactual_states"
        if not arguments.collect:
            measure_states(real_study(), folder)
        if not (runs := measured_runs(folder, STATES, LRS)):
            command.error(f"states measured to the end in {folder} are 0; expected one. Measure without --collect")
        report = report_of(runs, [all_layers_run()])
    print("\n\n".join(tables(report)[PAGE].values()))
    if not arguments.quick:
        store(NAME, report, tables(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
