"""Do bfloat16, a small E or a large learning rate break the influences of a pretrained chat model, and from when on?

    python -m benchmarks real_limits            SmolLM2-135M-Instruct with LoRA; half an hour on a core, resumed at the
                                                part at which it stopped
    python -m benchmarks real_limits --quick    the embedded policy, few rollouts, written nowhere
    python -m benchmarks.real.bench_real_limits --collect    stores the parts that an interrupted benchmark has made

The states and rollouts are those of ``real_cross_fitting``. Influences of a step's rollouts in float32, and with passes
or directions in bfloat16, are compared with float64; those on E of fewer rollouts with those on rollouts of other
prompts; and the change of entropy at multiples of the learning rate, for the step and for single rollouts, with its
first order.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fx_influence as fx
from benchmarks.evidence.bench_counterfactual import MAX_NORM, rank_correlation
from benchmarks.evidence.bench_estimators import noise_share
from benchmarks.harness import EVIDENCE, one_thread, parser, result_path, store, write_json
from benchmarks.real.bench_real_counterfactual import embedded_plan, progress
from benchmarks.real.language_model import FOLDER
from benchmarks.real.limits_tables import MULTIPLES, ROUNDED, markdown, plot
from benchmarks.real.pretrained_states import MODEL, PretrainedState, load_pretrained_state, pretrained_plans
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.batching.rows import select_rows
from fx_influence.interop.runtime.environment import environment
from fx_influence.types import Batch, Params

NAME, PAGE = "bench_real_limits", EVIDENCE
STATES = {"learning rate": (9,), "precision": (9, 3), "size of E": (9, 3, 15, 21)}
"""Optimizer steps before the states, by part."""
SIZES = (4, 8, 16)
"""Rollouts of a small E, of eight prompts at most; all of the fresh ones are 32."""
SWEPT = 28
"""Rollouts on which steps of all sizes are measured, each of another prompt."""
PASSES: dict[str, Any] = {"chunk_size": 4}
"""Rows in a pass, which bound the memory."""
BFLOAT16: dict[str, dict[str, Any]] = {
    name: {option: torch.bfloat16} for name, option in zip(ROUNDED, ("compute_dtype", "direction_dtype"), strict=True)
}

EXACT = "float64"
"""Precision with which others are compared."""

FIGURES = {
    "precision": (EXACT, "float32", *BFLOAT16),
    "learning rate": ("first order", "learning rate"),
    "size of E": ("float32", "truth", *(f"E of {size}" for size in SIZES)),
}
"""Names of the figures of each part."""


class Limits:
    """Parts of the benchmark at one training state; figures are stored, and made once.

    Args:
        state: makes the training state, where figures are missing.
        folder: of the figures.
    """

    def __init__(self, state: Callable[[], PretrainedState], folder: Path) -> None:
        self._make, self._folder = state, folder
        self._state: PretrainedState | None = None
        self._gradient: dict[str, Tensor] = {}

    def has(self, part: str) -> bool:
        """Return whether a part of ``STATES`` has been made."""
        return all(self._file(name).exists() for name in FIGURES[part])

    def _file(self, name: str) -> Path:
        return self._folder / f"{name.replace(' ', '_')}.json"

    def stored(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return figures by their name, made and written at the first call."""
        file = self._file(name)
        if not file.exists():
            write_json(file, work())
            progress(f"{self._folder.name}, {name}", 1, 1)
        return dict(json.loads(file.read_text(encoding="utf-8")))

    @property
    def state(self) -> PretrainedState:
        """Return the training state."""
        if self._state is None:
            self._state = self._make()
            gradient = batch_gradient(self._state.params, self._state.update, self._state.apply)
            self._gradient = {name: g for name, g in gradient.items() if g is not None}
        return self._state

    def influences(self, name: str, evaluation: Callable[[], Batch], **options: Any) -> dict[str, Any]:
        """Return the influences of a step's rollouts on an E, with error bars and what a user sees of them."""

        def work() -> dict[str, Any]:
            e = evaluation()
            return seen(e, self.state.influence(e, grad=self._gradient, per_token=False, **PASSES, **options))

        return self.stored(name, work)

    def exact(self) -> dict[str, Any]:
        """Return the influences on the fresh E in float64, U's gradient included."""

        def work() -> dict[str, Any]:
            state = in_float64(self.state)
            return seen(state.fresh, state.influence(state.fresh, per_token=False, **PASSES))

        return self.stored(EXACT, work)

    def float32(self) -> dict[str, Any]:
        """Return the influences on the fresh E in float32."""
        return self.influences("float32", lambda: self.state.fresh)

    def precision(self) -> dict[str, dict[str, Any]]:
        """Return the influences on the fresh E by precision, or by what is in bfloat16."""
        rounded = {
            name: self.influences(name, lambda: self.state.fresh, **options) for name, options in BFLOAT16.items()
        }
        return {EXACT: self.exact(), "float32": self.float32(), **rounded}

    def sizes(self, sizes: Sequence[int]) -> dict[str, dict[str, Any]]:
        """Return the influences by number of rollouts in E, and those on rollouts of other prompts, the "truth"."""

        def small(size: int) -> Batch:
            return small_batch(self.state.fresh, size)

        influences = {str(size): self.influences(f"E of {size}", partial(small, size)) for size in sizes}
        truth = self.influences("truth", lambda: one_of_each(self.state.others))
        everything = self.float32()
        return {**influences, str(everything["rollouts"]): everything, "truth": truth}

    def learning_rate(self) -> dict[str, Any]:
        """Return the change of entropy at multiples of the learning rate, of the step and of single rollouts."""
        first = self.influences("first order", lambda: small_batch(self.state.others, SWEPT), stderr=False)
        return self.stored("learning rate", lambda: self._sweep(first))

    def _sweep(self, first: Mapping[str, Any]) -> dict[str, Any]:
        state, e = self.state, small_batch(self.state.others, SWEPT)
        step = fx.adamw_decompose(self._gradient, state.opt_state, state.params, max_grad_norm=MAX_NORM)
        rows = strongest(first["per_sequence"])
        directions = [step.direction, *(self._direction(step.gain, row) for row in rows)]
        block = {name: torch.stack([v[name] for v in directions]) for name in state.params}
        lr = state.opt_state.lr
        change = fx.snis_sweep(state.params, e, apply=state.apply, **PASSES)(block, [lr * x for x in MULTIPLES])
        derivatives = fx.jvp_delta(state.params, step.direction, e, apply=state.apply, **PASSES)
        return {
            "lr": lr,
            "rows": rows,
            "rollouts": len(e.input_ids),
            "first": [first["total"], *(first["per_sequence"][row] for row in rows)],
            "first_by_jvp": float(derivatives.first),
            "eta_trust": float((0.2 * derivatives.first / derivatives.second).abs()),
            **{name: getattr(change, name).tolist() for name in ("delta_h", "stderr", "ess")},
        }

    def _direction(self, gain: Params, row: int) -> Params:
        rollout = select_rows(self.state.update, slice(row, row + 1))
        gradient = batch_gradient(self.state.params, rollout, self.state.apply)
        return {
            name: torch.zeros_like(p) if (g := gradient[name]) is None else gain[name] * g
            for name, p in self.state.params.items()
        }


def seen(e: Batch, out: fx.Influence) -> dict[str, Any]:
    """Return what a user sees of a result on an E."""
    return {
        "rollouts": len(e.input_ids),
        "per_sequence": out.per_sequence.tolist(),
        "stderr": out.stderr.tolist(),
        "noise_share": noise_share(out),
        **{field: float(getattr(out, field)) for field in ("total", "total_stderr", "conditioning")},
    }


def in_float64(state: PretrainedState) -> PretrainedState:
    """Return the state with weights, frozen ones too, and moments in float64."""
    moments = (state.opt_state.exp_avg, state.opt_state.exp_avg_sq)
    params, exp_avg, exp_avg_sq = ({name: x.double() for name, x in tree.items()} for tree in (state.params, *moments))
    return state._replace(
        params=params,
        apply=state.apply.with_min_precision(torch.float64),
        opt_state=state.opt_state._replace(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq),
    )


def small_batch(batch: Batch, size: int) -> Batch:
    """Return ``size`` rollouts of as many prompts as there are, the same number of each."""
    assert batch.group is not None
    prompts = batch.group.unique()[:size]
    each = size // len(prompts)
    return select_rows(batch, torch.cat([(batch.group == prompt).nonzero().flatten()[:each] for prompt in prompts]))


def one_of_each(batch: Batch) -> Batch:
    """Return the first rollout of every prompt."""
    assert batch.group is not None
    return small_batch(batch, len(batch.group.unique()))


def strongest(influences: Sequence[float]) -> list[int]:
    """Return the rollouts that raise and lower the entropy most."""
    values = np.array(influences)
    return [int(values.argmax()), int(values.argmin())]


def precision_figures(influences: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the errors of float32, and by what is in bfloat16, relative to the largest influence in float64.

    ``errorbar`` is the median error bar over E likewise; ``share`` is that of the errors in the squared influences, as
    ``noise_share`` is by the error bars.
    """
    reference = influences[EXACT]
    exact, error_bars = (np.array(reference[name]) for name in ("per_sequence", "stderr"))
    moving = exact != 0
    largest = np.abs(exact).max()
    figures = {}
    for name in ("float32", *BFLOAT16):
        rounded = np.array(influences[name]["per_sequence"])
        error = np.abs(rounded - exact)[moving]
        figures[name] = {
            "largest": float(error.max() / largest),
            "median": float(np.median(error) / largest),
            "errorbar": float(np.median(error_bars[moving]) / largest),
            "over_errorbar": float(np.median(error / error_bars[moving])),
            "share": float(np.square(error).sum() / np.square(exact).sum()),
            "noise_share": reference["noise_share"],
            "rank": rank_correlation(torch.tensor(rounded[moving]), torch.tensor(exact[moving])) or 0.0,
            "wrong_signs": float((np.sign(rounded) != np.sign(exact))[moving].mean()),
            "total": abs(influences[name]["total"] - reference["total"]) / reference["total_stderr"],
            "conditioning": reference["conditioning"],
        }
    return figures


def size_figures(influences: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return how far the influences on E of each size agree with those on rollouts of other prompts.

    ``squared_error`` is over the signal; both are without the noise of the truth, by its error bars.
    """
    truth, noise = (np.array(influences["truth"][name]) for name in ("per_sequence", "stderr"))
    moving, spread = truth != 0, np.square(noise).sum()
    figures = {}
    for size, x in influences.items():
        if size != "truth":
            estimate = np.array(x["per_sequence"])
            figures[size] = {
                "rank": rank_correlation(torch.tensor(estimate[moving]), torch.tensor(truth[moving])) or 0.0,
                "squared_error": float(
                    (np.square(estimate - truth).sum() - spread) / (np.square(truth).sum() - spread)
                ),
                "noise_share": x["noise_share"],
                "right_signs": float((np.sign(estimate) == np.sign(truth))[moving].mean()),
                "truth_noise_share": influences["truth"]["noise_share"],
            }
    return figures


def off_at(ratios: Sequence[float], share: float) -> float | None:
    """Return the multiple of the learning rate at which a change is ``share`` off its first order, or None.

    Between two measured multiples it is interpolated, both axes logarithmic; 0 where the smallest is as far off.
    """
    errors = np.abs(np.array(ratios) - 1)
    beyond = np.flatnonzero(errors >= share)
    if not len(beyond):
        return None
    if not (k := int(beyond[0])):
        return 0.0
    x, y = (np.log(np.array(values)[k - 1 : k + 1]) for values in (MULTIPLES, np.maximum(errors, 1e-12)))
    return float(np.exp(x[0] + (np.log(share) - y[0]) * (x[1] - x[0]) / (y[1] - y[0])))


def learning_rate_figures(sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return for the step and each rollout the change over its first order, by multiple, and where it is off."""
    changes, ess = np.array(sweep["delta_h"]), np.array(sweep["ess"])
    names = ["the step", "the rollout that raises most", "the rollout that lowers most"]
    figures = []
    for k, first in enumerate(sweep["first"]):
        ratios = (changes[:, k] / (sweep["lr"] * first * np.array(MULTIPLES))).tolist()
        figures.append(
            {
                "name": names[k],
                "ratios": ratios,
                "ess": (ess[:, k] / sweep["rollouts"]).tolist(),
                "off": {f"{share:g}": off_at(ratios, share) for share in (0.1, 0.5)},
                "trusted": sweep["eta_trust"] / sweep["lr"] if k == 0 else None,
            }
        )
    return figures


def measure(states: Mapping[int, Limits], chosen: Mapping[str, Sequence[int]], sizes: Sequence[int]) -> dict[str, Any]:
    """Return the figures of all parts, by the steps before the states.

    Args:
        states: the states.
        chosen: numbers of steps before the states, by part.
        sizes: rollouts of a small E.
    """
    sweeps = {str(steps): states[steps].learning_rate() for steps in chosen["learning rate"]}
    rounded = {str(steps): states[steps].precision() for steps in chosen["precision"]}
    small = {str(steps): states[steps].sizes(sizes) for steps in chosen["size of E"]}
    return {
        "parts": {"learning rate": sweeps, "precision": rounded, "size of E": small},
        "learning rate": {steps: learning_rate_figures(x) for steps, x in sweeps.items()},
        "precision": {steps: precision_figures(x) for steps, x in rounded.items()},
        "size of E": {steps: size_figures(x) for steps, x in small.items()},
    }


def main(argv: list[str] | None = None) -> int:
    command = parser(__doc__, "the embedded policy, few rollouts, written nowhere")
    command.add_argument("--collect", action="store_true", help="store the states that an interrupted benchmark ended")
    arguments = command.parse_args(argv)
    one_thread()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            quick = Limits(partial(load_pretrained_state, embedded_plan(), folder / "run"), folder / "figures")
            print(markdown(measure({0: quick}, dict.fromkeys(STATES, (0,)), (2,))))
        return 0
    limits = {
        steps: Limits(partial(load_pretrained_state, *x), FOLDER / "limits" / str(steps))
        for steps, x in pretrained_plans().items()
    }
    chosen = {
        part: [k for k in steps if not arguments.collect or limits[k].has(part)] for part, steps in STATES.items()
    }
    report = {"environment": environment(), "policy": MODEL, **measure(limits, chosen, SIZES)}
    print(markdown(report))
    store(NAME, report, {PAGE: {NAME: markdown(report)}})
    plot(report, result_path(NAME).with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
