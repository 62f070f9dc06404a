"""Do influences over eight steps of a pretrained chat model predict its entropy after them? Windows, replayed.

    python -m benchmarks real_several_steps            SmolLM2-135M-Instruct; half an hour a window on a core, resumed
                                                       where it stopped
    python -m benchmarks real_several_steps --quick    the embedded policy, two steps, written nowhere

From a training state on tasks of reasoning-gym, one generation of 64 rollouts serves eight steps of eight: with LoRA at
three learning rates, the training run's and lower ones, and of all weights at that of their training run.
``torch.optim.AdamW`` makes them again without each of some rollouts of the first, with the same batches, and the
entropy after them is measured by importance sampling on rollouts of the policy there, the same for all, on which the
window's influences are taken too: with so few rollouts another E would compare draws. Predictors are those of the
benchmark ``several_steps``.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fx_influence as fx
from benchmarks.evidence.arithmetic import reinforce
from benchmarks.evidence.bench_counterfactual import (
    MAX_NORM,
    Step,
    ceiling,
    proxies,
    rank_correlation,
    sampled_change,
    stderr_of_mean,
)
from benchmarks.evidence.replayed_windows import (
    WINDOW_OPTIONS,
    recorded_window,
    replayed,
    share_at_end,
    without_row,
)
from benchmarks.evidence.several_steps_tables import RANKED
from benchmarks.harness import EVIDENCE, one_thread, parser, peak_extra, store, write_json
from benchmarks.real.__main__ import prepare_policy
from benchmarks.real.bench_main_command import processor_seconds
from benchmarks.real.bench_real_counterfactual import ROLLOUTS, batch, embedded_plan, progress, real_plan
from benchmarks.real.language_model import FOLDER, prepare_model
from benchmarks.real.training_run import LEARNING_RATES
from fx_influence.autodiff.rollout_gradients import rollout_gradients
from fx_influence.batching.rows import select_rows
from fx_influence.interop.checkpoints.optimizer_state import restore_optimizer
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.runtime.environment import environment
from fx_influence.lab.inputs.rollouts import ScoredRollouts, load_rollouts, load_state
from fx_influence.lab.inputs.update import update_batch
from fx_influence.lab.plan import EntropyInfluencePlan, demo_path
from fx_influence.lab.store import RunDirectory
from fx_influence.types import AdamWState, Batch, Params, TokenValues

NAME, PAGE = "bench_real_several_steps", EVIDENCE
STEPS = 8
PROMPTS, COMPLETIONS = 2, 4
"""Prompts of a step and completions of each."""
EVALUATED = 32
"""Rollouts of E before the window, one of each prompt, and of E after it, two of each of other prompts."""
TRAINED = (
    ("lora", LEARNING_RATES["lora"], "several_steps"),
    ("lora", 1e-4, "several_steps_1e-4"),
    ("lora", 1e-5, "several_steps_1e-5"),
    ("full", LEARNING_RATES["full"], "several_steps_full"),
)
"""Weights that are trained, learning rate of a window, and folder of its figures. The first window of the same weights
has the rollouts from before it."""
WEIGHTS = {"lora": "LoRA", "full": "all weights"}
LEFT_OUT = 6
"""Rollouts of the first step that are left out."""
WINDOWS = ("window, same E", "window, no curvature, same E")
SHARES = ("share", "share, same E")
"""Influences of one step, per unit of its learning rate."""


class Recorded(NamedTuple):
    """A window: ``model`` and ``optimizer`` before it, ``batches`` of its steps, and rollouts that predict and measure.

    ``first_e`` is of the policy before it, ``e`` of the policy after it, whose parameters are ``end``; ``advantages``
    are those of the first step, ``seconds`` the processor time of all steps without sampling.
    """

    model: Any
    optimizer: torch.optim.AdamW
    batches: list[Batch]
    advantages: Tensor
    first_e: Batch
    e: Batch
    end: Params
    seconds: float


class Setting(NamedTuple):
    """A window to measure: the plan of U, which its steps share, of E before them and of E after them, and the steps.

    ``weights`` are those that are trained, "lora" or "full". ``before`` and ``folder`` are the folders of the rollouts
    of U and of E before the window, and of those after it and of all figures; what they have is not made again.
    ``left_out`` is the number of rollouts of the first step that are left out, of those with an advantage.
    """

    plan: EntropyInfluencePlan
    weights: str
    before: Path
    folder: Path
    lr: float
    steps: int = STEPS
    left_out: int = LEFT_OUT


def record(setting: Setting) -> Recorded:
    """Make the steps of a window and return it."""
    plan = setting.plan
    state = load_state(plan)
    saved = torch.load(Path(demo_path(plan.checkpoint)) / "optimizer.pt", map_location="cpu", weights_only=True)
    before = state.model, restore_optimizer(saved, state.model)
    for group in before[1].param_groups:
        group["lr"] = setting.lr
    directory = RunDirectory(setting.before)
    u, first_e = (load_rollouts(plan, state, directory, k, ROLLOUTS[k], progress) for k in range(2))
    updates = [rows_of(u, rows) for rows in rows_by_step(u.rollouts, setting.steps)]
    batches = [update_batch(plan, update) for update in updates]
    model, optimizer = copy.deepcopy(before)
    seconds = sum(processor_seconds(partial(reinforce, model, optimizer, batch)) for batch in batches)
    apply, params = fx.make_functional(model)
    moved = state._replace(model=model, apply=apply, params=params)
    e = load_rollouts(plan, moved, RunDirectory(setting.folder), 2, ROLLOUTS[2], progress)
    advantages = torch.tensor([r.advantage or 0.0 for r in updates[0].rollouts])
    return Recorded(*before, batches, advantages, first_e.batch, e.batch, trainable(model), seconds)


def rows_by_step(rollouts: Sequence[Rollout], steps: int) -> list[list[int]]:
    """Return the rows of each step: the groups are dealt to the steps, those with an advantage first."""
    groups: dict[Any, list[int]] = {}
    for row, rollout in enumerate(rollouts):
        groups.setdefault(rollout.group, []).append(row)
    by_advantage = sorted(groups.values(), key=lambda rows: not any(rollouts[row].advantage for row in rows))
    return [[row for rows in by_advantage[k::steps] for row in rows] for k in range(steps)]


def rows_of(u: ScoredRollouts, rows: Sequence[int]) -> ScoredRollouts:
    """Return some rows of scored rollouts."""
    index = torch.tensor(rows)
    values = TokenValues(*(x[index] for x in u.values))
    return u._replace(rollouts=[u.rollouts[row] for row in rows], batch=select_rows(u.batch, index), values=values)


def trainable(model: torch.nn.Module) -> Params:
    """Return a model's trainable parameters by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def measure(setting: Setting) -> dict[str, Any]:
    """Return rank correlations of every predictor with the measured effects, the change over the window, and costs."""
    folder = setting.folder
    folder.mkdir(parents=True, exist_ok=True)
    recorded = record(setting)
    apply, params = fx.make_functional(recorded.model)
    state = fx.adamw_state(recorded.optimizer, recorded.model, copy=False)
    window = recorded_window(recorded.batches, state.lr, params, state)
    chosen = recorded.advantages.nonzero().flatten().tolist()[: setting.left_out]
    first, *others = WINDOWS
    attribution = partial(window_figures, recorded, window, apply, folder)
    works: dict[str, Callable[[], dict[str, Any]]] = {
        first: partial(attribution, WINDOW_OPTIONS[first]),
        "changes": lambda: {"changes": changes(recorded, chosen, folder / "changes.json", apply).tolist()},
        "one step": lambda: one_step_figures(recorded, params, state, apply),
        **{name: partial(attribution, WINDOW_OPTIONS[name]) for name in others},
    }
    figures = {name: stored(folder / f"{name.replace(', ', '_')}_figures.json", work) for name, work in works.items()}
    return {"weights": setting.weights, **compared(recorded, figures, chosen, state.lr)}


def stored(file: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a file, made and written there at the first call."""
    if not file.exists():
        write_json(file, work())
        progress(file.stem, 1, 1)
    return dict(json.loads(file.read_text(encoding="utf-8")))


def window_figures(
    recorded: Recorded, window: fx.Window, apply: fx.Policy, states_dir: Path, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return influences of the first step's rollouts over the window, its totals, seconds, and bytes added to the peak.

    Args:
        recorded: the window as it was recorded.
        window: the same as the argument of ``influence_over_steps``.
        apply: the policy.
        states_dir: for the states of the window where they do not fit memory.
        options: of ``influence_over_steps``.
    """
    results: list[fx.InfluenceOverSteps] = []

    def work() -> None:
        results.append(fx.influence_over_steps(window, recorded.e, apply=apply, states_dir=states_dir, **options))

    seconds: list[float] = []
    peak = peak_extra(lambda: seconds.append(processor_seconds(work)))
    [out] = results
    return {
        "seconds": seconds[0],
        "peak_extra_bytes": peak,
        "per_sequence": out.per_sequence[0].tolist(),
    }


def one_step_figures(recorded: Recorded, params: Params, state: AdamWState, apply: fx.Policy) -> dict[str, Any]:
    """Return what measures of the first step say of its rollouts, and the seconds of ``influence``."""
    first, results = recorded.batches[0], []
    step = Step(params, apply, state, first, recorded.advantages, rollout_gradients(params, first, apply))
    options: dict[str, Any] = {"apply": apply, "max_grad_norm": MAX_NORM, "stderr": False}
    seconds = processor_seconds(lambda: results.append(fx.influence(params, first, recorded.first_e, state, **options)))
    predicted = {
        "share": results[0].per_sequence,
        "share, same E": share_at_end(step, recorded.end, recorded.e, fx.Entropy()),
        **proxies(fx.proxies.token_moments(params, first, apply=apply), first, recorded.advantages.double()),
        "advantage": -recorded.advantages,
    }
    return {"per_sequence": {name: x.tolist() for name, x in predicted.items()}, "seconds": seconds}


def changes(recorded: Recorded, chosen: Sequence[int], file: Path, apply: fx.Policy) -> Tensor:
    """Return Delta H of the window without each rollout, and of undoing it: contributions by pair, stored one by one.

    Args:
        recorded: the window.
        chosen: the rollouts of its first step that are left out, (n,).
        file: of the contributions, (n + 1, pairs).
        apply: the policy.
    """
    change = sampled_change(recorded.end, recorded.e, apply)
    rows: list[list[float]] = json.loads(file.read_text(encoding="utf-8"))["changes"] if file.exists() else []
    first, *later = recorded.batches
    for k in range(len(rows), len(chosen) + 1):
        if k < len(chosen):
            batches = [without_row(first, chosen[k]), *later]
            [moved] = replayed(recorded.model, recorded.optimizer, batches, [len(batches)])
        else:
            moved = trainable(recorded.model)
        rows.append(change({name: (moved[name] - p).unsqueeze(0) for name, p in recorded.end.items()})[0].tolist())
        write_json(file, {"changes": rows})
        progress("replayed windows", k + 1, len(chosen) + 1)
    return torch.tensor(rows, dtype=torch.float64)


def compared(
    recorded: Recorded, figures: Mapping[str, Mapping[str, Any]], chosen: Sequence[int], lr: float
) -> dict[str, Any]:
    """Return rank correlations with the measured effects, the change over the window, and costs by predictor.

    Args:
        recorded: the window.
        figures: those of ``measure`` by name.
        chosen: the rollouts that were left out.
        lr: learning rate, by which one step's influences are multiplied.
    """
    measured = torch.tensor(figures["changes"]["changes"], dtype=torch.float64)
    effects, undone = -measured[:-1], measured[-1]
    windows = {name: x for name, x in figures.items() if name in WINDOW_OPTIONS}
    given = {name: x["per_sequence"] for name, x in windows.items()} | figures["one step"]["per_sequence"]
    predicted = {name: torch.tensor(x, dtype=torch.float64)[chosen] for name, x in given.items()}
    influences = {name: predicted[name] * (1.0 if name in windows else lr) for name in (*windows, *SHARES)}
    one_step = figures["one step"]["seconds"]
    return {
        "lr": lr,
        "steps": len(recorded.batches),
        "rollouts": len(recorded.advantages),
        "left_out": len(chosen),
        "effect": float(effects.mean(1).square().mean().sqrt()),
        "effect_stderr": stderr_of_mean(effects),
        "ranks": {name: rank_correlation(x, effects.mean(1)) for name, x in predicted.items()}
        | {"ceiling": ceiling(effects)},
        "slopes": {name: float((effects.mean(1) @ x) / (x @ x)) for name, x in influences.items()},
        "realised": -float(undone.mean()),
        "realised_stderr": float((undone.var() / len(undone)).sqrt()),
        "realised_degrees_of_freedom": len(undone) - 1,
        "training_seconds": recorded.seconds,
        "costs": {
            "share": {"seconds": one_step},
            **{name: {k: x[k] for k in ("seconds", "peak_extra_bytes")} for name, x in windows.items()},
        },
    }


def markdown(report: dict[str, Any]) -> str:
    """Return the table of rank correlations and costs by predictor, a column for each window, and of changes."""
    windows = report["windows"]
    steps = f"{windows[0]['steps']} steps of {windows[0]['rollouts']} rollouts, {windows[0]['left_out']} left out"
    trained = [f"{WEIGHTS[window['weights']]}, lr {window['lr']:g}" for window in windows]
    head = [f"{report['policy']}, {steps} of the first", *(f"{name}: rank, measured / predicted" for name in trained)]
    by_weights = {weights: [x for x in windows if x["weights"] == weights] for weights in WEIGHTS}
    measured_weights = {weights: x for weights, x in by_weights.items() if x}
    kinds = ", ".join(WEIGHTS[weights] for weights in measured_weights)
    lines = [_row([*head, f"processor seconds over those of the steps: {kinds}", f"GiB added to the peak: {kinds}"])]
    lines.append("|---" * (len(windows) + 3) + "|")
    for name, label in RANKED.items():
        if all(name in window["ranks"] for window in windows):
            costs = [_costs(x, name) for x in measured_weights.values()]
            cells = [", ".join(filter(None, x)) for x in zip(*costs, strict=True)]
            lines.append(_row([label, *(_agreement(window, name) for window in windows), *cells]))
    lines.append(_row(["ΔH over the window, nats", *map(_change, windows), "", ""]))
    return "\n".join(lines)


def _costs(windows: Sequence[Mapping[str, Any]], name: str) -> tuple[str, str]:
    """Return medians over windows of a predictor's seconds over those of the steps, and of the GiB that it adds."""
    costs = [(window["costs"].get(name, {}), window["training_seconds"]) for window in windows]
    seconds = [cost["seconds"] / steps for cost, steps in costs if cost]
    peaks = [cost["peak_extra_bytes"] / 2**30 for cost, _ in costs if "peak_extra_bytes" in cost]
    of_seconds, of_peaks = (f"{statistics.median(x):.1f}" if x else "" for x in (seconds, peaks))
    return of_seconds, of_peaks


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _agreement(window: Mapping[str, Any], name: str) -> str:
    rank = window["ranks"][name]
    slope = f"{window['slopes'][name]:.3g}" if name in window["slopes"] else ""
    return ", ".join(filter(None, ("" if rank is None else f"{rank:+.2f}", slope)))


def _change(window: Mapping[str, Any]) -> str:
    half_width = fx.interval_half_width(window["realised_stderr"], window["realised_degrees_of_freedom"])
    return f"{window['realised']:+.4f} ± {half_width:.4f}"


def settings() -> Iterator[Setting]:
    """Yield the windows of the pretrained model, each when its training state has been made."""
    base = prepare_model()
    evaluations = batch("eval", 0, EVALUATED, 1), batch("eval", EVALUATED, EVALUATED // 2, 2)
    update = batch("train", 0, STEPS * PROMPTS, COMPLETIONS, resample_zero_advantage=1)
    before: dict[str, Path] = {}
    for weights, lr, folder in TRAINED:
        plan = real_plan(prepare_policy(FOLDER, base, weights), base, *evaluations)
        # A checkpoint of all weights needs no model below it.
        plan = dataclasses.replace(plan, update=update, base=plan.base if weights == "lora" else None)
        before.setdefault(weights, FOLDER / folder)
        yield Setting(plan, weights, before[weights], FOLDER / folder, lr)


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__, "the embedded policy, two steps, written nowhere").parse_args(argv)
    one_thread()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "run"
            windows = [measure(Setting(embedded_plan(), "full", folder, folder, 1e-4, 2, 4))]
        policy = "embedded policy"
    else:
        windows = [measure(setting) for setting in settings()]
        policy = "SmolLM2-135M"
    report = {"environment": environment(), "policy": policy, "windows": windows}
    print(markdown(report))
    if not arguments.quick:
        store(NAME, report, {PAGE: {NAME: markdown(report)}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
