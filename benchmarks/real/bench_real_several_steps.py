"""Do influences over windows of a pretrained chat model's steps predict its entropy after them? Windows, replayed.

    python -m benchmarks real_several_steps            SmolLM2-135M-Instruct; half an hour a window on a core, resumed
                                                       where it stopped
    python -m benchmarks real_several_steps --quick    the embedded policy, one and two steps, written nowhere

From a training state on tasks of reasoning-gym, one generation serves all steps of a window, eight rollouts each:
sixteen steps with LoRA, at learning rates below the training run's, and eight of all weights at their training run's.
``torch.optim.AdamW`` makes them again without each of some rollouts of the first, with the same batches, and the
entropy after 1, 2, 4, 8 and 16 steps is measured by importance sampling on rollouts of the policy there, the same for
all, on which the influences over as many steps are taken too: with so few rollouts another E would compare draws.
Predictors are those of the benchmark ``several_steps``. Figures are stored after each window.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fx_influence as fx
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
    trainable,
    without_row,
)
from benchmarks.harness import EVIDENCE, Tables, one_thread, parser, peak_extra, store, write_json
from benchmarks.real.__main__ import prepare_policy
from benchmarks.real.bench_main_command import processor_seconds
from benchmarks.real.bench_real_counterfactual import batch, embedded_plan, progress, real_plan
from benchmarks.real.language_model import FOLDER, prepare_model
from benchmarks.real.several_lengths_tables import SHARES, WINDOWS, appendix, markdown
from benchmarks.real.training_run import LEARNING_RATES
from benchmarks.real.window_recording import Recorded, Setting, record
from fx_influence.autodiff.rollout_gradients import rollout_gradients
from fx_influence.interop.runtime.environment import environment
from fx_influence.types import Params

NAME = "bench_real_several_steps"
LENGTHS = (1, 2, 4, 8, 16)
"""Numbers of steps after which the entropy is measured."""
PROMPTS, COMPLETIONS = 2, 4
"""Prompts of a step and completions of each."""
EVALUATED = 32
"""Rollouts of E before the window, one of each prompt, and of E after each length, two of each of other prompts."""
TRAINED = (
    ("lora", 1e-4, LENGTHS, "several_lengths_lora_1e-4"),
    ("lora", 1e-5, LENGTHS, "several_lengths_lora_1e-5"),
    ("full", LEARNING_RATES["full"], LENGTHS[:-1], "several_lengths_full_1e-5"),
)
"""Weights that are trained, learning rate of a window, its lengths, and folder of its figures. The first window of the
same weights has the rollouts from before it. States of sixteen steps of all weights would be 34 GB."""
LEFT_OUT = 6
"""Rollouts of the first step that are left out."""


def measure(setting: Setting) -> dict[str, Any]:
    """Return for each length rank correlations of every predictor with the measured effects, changes, and costs."""
    for length in setting.lengths:
        setting.after(length).mkdir(parents=True, exist_ok=True)
    # Figures that are stored need no window.
    recorded = cache(partial(record, setting))
    first, *others = WINDOWS
    steps = stored(setting.folder / "steps.json", lambda: figures_of_steps(recorded(), setting.left_out))
    windows = {length: {first: window_figures(setting, recorded, length, first)} for length in setting.lengths}
    measured = changes(setting, recorded, steps["left_out"])
    one_step = stored(setting.folder / "one_step.json", lambda: one_step_figures(recorded()))
    # A window of one step has no curvature.
    for length in setting.lengths[1:]:
        windows[length] |= {name: window_figures(setting, recorded, length, name) for name in others}
    return {
        "weights": setting.weights,
        "lr": setting.lr,
        "rollouts": steps["rollouts"],
        "left_out": len(steps["left_out"]),
        "lengths": [
            {
                "steps": length,
                "training_seconds": steps["seconds"][str(length)],
                **compared(
                    measured[:, k], predictions(windows[length], one_step, length, setting.lr), steps["left_out"]
                ),
                "costs": {
                    "share": {"seconds": one_step["seconds"]},
                    **{name: {k: x[k] for k in ("seconds", "peak_extra_bytes")} for name, x in windows[length].items()},
                },
            }
            for k, length in enumerate(setting.lengths)
        ],
    }


def stored(file: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a file, made and written there at the first call."""
    if not file.exists():
        write_json(file, work())
        progress(f"{file.parent.name}, {file.stem}", 1, 1)
    return dict(json.loads(file.read_text(encoding="utf-8")))


def figures_of_steps(recorded: Recorded, left_out: int) -> dict[str, Any]:
    """Return seconds of the steps by length, the number of rollouts of the first, and which of them are left out."""
    rows = recorded.advantages.nonzero().flatten().tolist()[:left_out]
    return {"seconds": recorded.seconds, "rollouts": len(recorded.advantages), "left_out": rows}


def window_figures(setting: Setting, recorded: Callable[[], Recorded], length: int, name: str) -> dict[str, Any]:
    """Return influences of the first step's rollouts over a window, seconds, and bytes added to the peak.

    Args:
        setting: has the folders.
        recorded: gives the window.
        length: number of its steps.
        name: predictor, of ``WINDOW_OPTIONS``.
    """

    def figures() -> dict[str, Any]:
        apply, results, seconds = recorded().apply, [], []
        window = recorded_window(recorded().batches[:length], setting.lr, recorded().params, recorded().state)
        options = {"apply": apply, "states_dir": setting.folder, **WINDOW_OPTIONS[name]}

        def work() -> None:
            results.append(fx.influence_over_steps(window, recorded().e[length], **options))

        peak = peak_extra(lambda: seconds.append(processor_seconds(work)))
        return {"seconds": seconds[0], "peak_extra_bytes": peak, "per_sequence": results[0].per_sequence[0].tolist()}

    return stored(setting.after(length) / f"{name.replace(', ', '_')}.json", figures)


def one_step_figures(recorded: Recorded) -> dict[str, Any]:
    """Return what measures of the first step say of its rollouts, and the seconds of ``influence``.

    "at_end" has the step's share by length, on the E that measures there.
    """
    params, first, results = recorded.params, recorded.batches[0], []
    gradients = rollout_gradients(params, first, recorded.apply)
    step = Step(params, recorded.apply, recorded.state, first, recorded.advantages, gradients)
    options: dict[str, Any] = {"apply": recorded.apply, "max_grad_norm": MAX_NORM, "stderr": False}
    seconds = processor_seconds(
        lambda: results.append(fx.influence(params, first, recorded.first_e, recorded.state, **options))
    )
    moments = fx.proxies.token_moments(params, first, apply=recorded.apply)
    predicted = {
        "share": results[0].per_sequence,
        **proxies(moments, first, recorded.advantages.double()),
        "advantage": -recorded.advantages,
    }
    return {
        "seconds": seconds,
        "per_sequence": {name: x.tolist() for name, x in predicted.items()},
        "at_end": {
            length: share_at_end(step, end, recorded.e[length], fx.Entropy()).tolist()
            for length, end in recorded.ends.items()
        },
    }


def changes(setting: Setting, recorded: Callable[[], Recorded], left_out: Sequence[int]) -> Tensor:
    """Return Delta H at each length of the window without each rollout, and of undoing it, stored one by one.

    Args:
        setting: has the folder and the lengths.
        recorded: gives the window.
        left_out: rollouts of its first step, (n,).

    Returns:
        Contributions by pair, (n + 1, lengths, pairs).
    """
    file = setting.folder / "changes.json"
    rows: list[list[list[float]]] = json.loads(file.read_text(encoding="utf-8"))["changes"] if file.exists() else []
    # The entropy before a change is computed once a length.
    change_at = cache(lambda k: sampled_change(recorded().ends[k], recorded().e[k], recorded().apply))

    def contributions(length: int, moved: Params) -> list[float]:
        step = {name: (moved[name] - p).unsqueeze(0) for name, p in recorded().ends[length].items()}
        return list(change_at(length)(step)[0].tolist())

    for row in range(len(rows), len(left_out) + 1):
        model, optimizer, (first, *later) = recorded().model, recorded().optimizer, recorded().batches
        moved = (
            replayed(model, optimizer, [without_row(first, left_out[row]), *later], setting.lengths)
            if row < len(left_out)
            else [trainable(model)] * len(setting.lengths)
        )
        rows.append([contributions(k, x) for k, x in zip(setting.lengths, moved, strict=True)])
        write_json(file, {"changes": rows})
        progress("replayed windows", row + 1, len(left_out) + 1)
    return torch.tensor(rows, dtype=torch.float64)


def predictions(
    windows: Mapping[str, Mapping[str, Any]], one_step: Mapping[str, Any], length: int, lr: float
) -> dict[str, Tensor]:
    """Return each predictor of the first step's rollouts, (n,), influences in nats.

    Args:
        windows: figures of windows of this length by predictor.
        one_step: figures of the first step.
        length: number of steps.
        lr: their learning rate.
    """
    given = {name: x["per_sequence"] for name, x in windows.items()}
    given |= one_step["per_sequence"] | {"share, same E": one_step["at_end"][str(length)]}
    return {name: torch.tensor(x, dtype=torch.float64) * (lr if name in SHARES else 1.0) for name, x in given.items()}


def compared(measured: Tensor, predicted: Mapping[str, Tensor], left_out: Sequence[int]) -> dict[str, Any]:
    """Return rank correlations with the measured effects, ratios of sizes, and the change over the window.

    Args:
        measured: Delta H without each rollout and of undoing the window, (n + 1, pairs).
        predicted: by predictor, of all rollouts of the first step.
        left_out: which of them were left out, (n,).
    """
    effects, undone = -measured[:-1], measured[-1]
    effect, chosen = effects.mean(1), {name: x[left_out] for name, x in predicted.items()}
    return {
        "effect": float(effect.square().mean().sqrt()),
        "effect_stderr": stderr_of_mean(effects),
        "ranks": {name: rank_correlation(x, effect) for name, x in chosen.items()} | {"ceiling": ceiling(effects)},
        "slopes": {name: float((effect @ x) / (x @ x)) for name, x in chosen.items() if name in (*WINDOWS, *SHARES)},
        "realised": -float(undone.mean()),
        "realised_stderr": float((undone.var() / len(undone)).sqrt()),
        "realised_degrees_of_freedom": len(undone) - 1,
    }


def settings() -> Iterator[Setting]:
    """Yield the windows of the pretrained model, each when its training state has been made."""
    base = prepare_model()
    evaluations = batch("eval", 0, EVALUATED, 1), batch("eval", EVALUATED, EVALUATED // 2, 2)
    before: dict[str, Path] = {}
    for weights, lr, lengths, folder in TRAINED:
        update = batch("train", 0, lengths[-1] * PROMPTS, COMPLETIONS, resample_zero_advantage=1)
        plan = real_plan(prepare_policy(FOLDER, base, weights), base, *evaluations)
        # A checkpoint of all weights needs no model below it.
        plan = dataclasses.replace(plan, update=update, base=plan.base if weights == "lora" else None)
        before.setdefault(weights, FOLDER / folder)
        yield Setting(plan, weights, before[weights], FOLDER / folder, lr, lengths, LEFT_OUT)


def tables(report: dict[str, Any]) -> Tables:
    """Return the tables of the page."""
    return {EVIDENCE: {NAME: markdown(report), f"{NAME}_appendix": appendix(report)}}


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__, "the embedded policy, windows of one and two steps, written nowhere").parse_args(argv)
    one_thread()
    report: dict[str, Any] = {"environment": environment(), "policy": "SmolLM2-135M", "windows": []}
    if arguments.quick:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "run"
            windows = [measure(Setting(embedded_plan(), "full", folder, folder, 1e-4, (1, 2), 4))]
        report |= {"policy": "embedded policy", "windows": windows}
        print(*tables(report)[EVIDENCE].values(), sep="\n\n")
        return 0
    for setting in settings():
        report["windows"].append(measure(setting))
        store(NAME, report, tables(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
