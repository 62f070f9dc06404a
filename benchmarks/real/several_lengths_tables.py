"""Tables of windows of several lengths of a pretrained model: ranks, sizes and costs by weights, rate and length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import fx_influence as fx
from benchmarks.evidence.several_steps_tables import RANKED

WINDOWS = ("window, same E", "window, no curvature, same E")
"""Predictors by the derivative through the window, the first one measured at each length."""
SHARES = ("share, same E", "share")
"""Predictors by one step's influence, per unit of its learning rate."""
WEIGHTS = {"lora": "LoRA", "full": "all weights"}
COMPARED = (*WINDOWS, *SHARES)
TIMED = (*WINDOWS, "share")


def markdown(report: Mapping[str, Any]) -> str:
    """Return the table of ranks, of measured over predicted effects, of changes of entropy, and of costs."""
    window = report["windows"][0]
    sampled = f"{report['policy']}, steps of {window['rollouts']} rollouts, {window['left_out']} left out of the first"
    head = [
        f"{sampled}: weights, lr, steps",
        *(f"{RANKED[name]}: rank, measured / predicted" for name in COMPARED),
        "covariance proxy: rank",
        "ceiling",
        "effect, 1e-4 nats",
        "ΔH over the window, nats",
        "processor seconds over those of the steps: window, without curvature, one step",
        "GiB added to the peak: window, without curvature",
    ]
    lines = [_row(head), "|---" * len(head) + "|"]
    for title, x in _by_length(report):
        cells = [*(_agreement(x, name) for name in COMPARED), _rank(x, "covariance proxy"), _rank(x, "ceiling")]
        effect = f"{1e4 * x['effect']:.3g} ± {1e4 * x['effect_stderr']:.3g}"
        seconds = _costs(x, TIMED, "seconds", x["training_seconds"])
        lines.append(_row([title, *cells, effect, _change(x), seconds, _costs(x, WINDOWS, "peak_extra_bytes", 2**30)]))
    return "\n".join(lines)


def appendix(report: Mapping[str, Any]) -> str:
    """Return the table of ranks of every predictor."""
    measured = {name for _, x in _by_length(report) for name in x["ranks"]}
    names = [name for name in RANKED if name in measured]
    head = [f"{report['policy']}, rank correlation with leaving one out: weights, lr, steps", *map(RANKED.get, names)]
    lines = [_row(head), "|---" * len(head) + "|"]
    return "\n".join([*lines, *(_row([title, *(_rank(x, name) for name in names)]) for title, x in _by_length(report))])


def _by_length(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the title and the figures of each row."""
    for window in report["windows"]:
        for x in window["lengths"]:
            yield f"{WEIGHTS[window['weights']]}, {window['lr']:g}, {x['steps']}", x


def _row(cells: list[Any]) -> str:
    return f"| {' | '.join(cells)} |"


def _rank(x: Mapping[str, Any], name: str) -> str:
    """Return a rank correlation as a cell, empty where there is none."""
    rank = x["ranks"].get(name)
    return "" if rank is None else f"{rank:+.2f}"


def _agreement(x: Mapping[str, Any], name: str) -> str:
    """Return the rank correlation and the ratio of sizes as a cell."""
    slope = f"{x['slopes'][name]:.3g}" if name in x["slopes"] else ""
    return ", ".join(filter(None, (_rank(x, name), slope)))


def _costs(x: Mapping[str, Any], names: Sequence[str], cost: str, unit: float) -> str:
    """Return a cost of each predictor in a unit as a cell, a dash where it was not measured."""
    costs = (x["costs"].get(name) for name in names)
    return ", ".join("–" if each is None else f"{each[cost] / unit:.1f}" for each in costs)


def _change(x: Mapping[str, Any]) -> str:
    half_width = fx.interval_half_width(x["realised_stderr"], x["realised_degrees_of_freedom"])
    return f"{x['realised']:+.4f} ± {half_width:.4f}"
