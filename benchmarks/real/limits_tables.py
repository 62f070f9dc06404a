"""The tables and the picture of the limits of influences: bfloat16, small E and large steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import svg_figure

MULTIPLES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Steps over the learning rate."""
ROUNDED = ("passes", "directions")
"""Names of what is in bfloat16."""
TITLES = {"float32": "float32"} | {name: f"{name} in bfloat16" for name in ROUNDED}


def markdown(report: Mapping[str, Any]) -> str:
    """Return the three tables."""
    return "\n\n".join([precision_table(report), sizes_table(report), learning_rate_table(report)])


def precision_table(report: Mapping[str, Any]) -> str:
    """Return the errors of float32 and bfloat16 by state."""
    lines = [
        "| against float64, after steps | largest, median error / largest influence | median error bar over E likewise "
        "| error / error bar, median | share of the squares: error, noise by error bars | rank correlation "
        "| wrong signs | total: error / error bar | conditioning |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for steps, figures in report["precision"].items():
        lines += [
            f"| {TITLES[name]}, {steps} | {100 * x['largest']:.2g}%, {100 * x['median']:.2g}% | {x['errorbar']:.1%} "
            f"| {x['over_errorbar']:.2g} | {x['share']:.2g}, {x['noise_share']:.2g} | {x['rank']:.4f} "
            f"| {x['wrong_signs']:.0%} | {x['total']:.2g} | {x['conditioning']:.2f} |"
            for name, x in figures.items()
        ]
    return "\n".join(lines)


def sizes_table(report: Mapping[str, Any]) -> str:
    """Return the agreement by size of E and state."""
    lines = [
        "| rollouts in E, after steps | noise share by error bars | rank correlation with the truth | right signs "
        "| squared error / signal | noise share of the truth |",
        "|---|---|---|---|---|---|",
    ]
    for size in next(iter(report["size of E"].values())):
        lines += [
            f"| {size}, {steps} | {x['noise_share']:.2f} | {x['rank']:.2f} | {x['right_signs']:.0%} "
            f"| {x['squared_error']:.2f} | {x['truth_noise_share']:.2f} |"
            for steps, figures in report["size of E"].items()
            for x in [figures[size]]
        ]
    return "\n".join(lines)


def learning_rate_table(report: Mapping[str, Any]) -> str:
    """Return the change over its first order by multiple of the learning rate."""
    heads = [f"{x:g} lr" for x in MULTIPLES]
    lines = [
        f"| ΔH / first order (effective sample size, share of E) | {' | '.join(heads)} | 10% off at | 50% off at "
        "| η_trust / lr |",
        "|---|" + "---|" * (len(MULTIPLES) + 3),
    ]
    for steps, figures in report["learning rate"].items():
        for x in figures:
            cells = [f"{ratio:.2f} ({ess:.0%})" for ratio, ess in zip(x["ratios"], x["ess"], strict=True)]
            cells += [multiple_cell(x["off"][share]) for share in ("0.1", "0.5")]
            cells.append("" if x["trusted"] is None else f"{x['trusted']:.1f}")
            lines.append(f"| {x['name']}, after {steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def multiple_cell(multiple: float | None) -> str:
    """Return a multiple of the learning rate as a cell."""
    return "beyond" if multiple is None else f"{multiple:.2g} lr"


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw the error of bfloat16, the agreement by noise share, and the change over its first order."""
    colors = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
    with svg_figure(path, 1, 3, (11, 3.6)) as [[rounding, size, step]]:
        for color, (steps, x) in zip(colors, report["parts"]["precision"].items(), strict=False):
            exact, bars = (np.array(x["float64"][name]) for name in ("per_sequence", "stderr"))
            moving = exact != 0
            largest = np.abs(exact).max()
            for name, marker in zip(ROUNDED, "ox", strict=True):
                error = np.abs(np.array(x[name]["per_sequence"]) - exact)[moving] / largest
                label = f"{name} in bfloat16, after {steps}"
                rounding.loglog(bars[moving] / largest, error, marker, ms=3.5, color=color, label=label)
        ends = [1e-3, 1.0]
        rounding.plot(ends, ends, color="black", lw=0.8)
        rounding.set(title="bfloat16", xlabel="error bar / largest influence", ylabel="error / largest influence")
        for marker, number in zip("^soD", next(iter(report["size of E"].values())), strict=False):
            points = [figures[number] for figures in report["size of E"].values()]
            shares, ranks = ([x[name] for x in points] for name in ("noise_share", "rank"))
            size.semilogx(shares, ranks, marker, ms=5, color=colors[0], alpha=0.8, label=f"E of {number}")
        size.set(title="small E", xlabel="noise share by error bars", ylabel="rank correlation with the truth")
        for figures in report["learning rate"].values():
            for color, x in zip(colors, figures, strict=False):
                step.semilogx(MULTIPLES, x["ratios"], "o-", ms=3, lw=1, color=color, label=x["name"])
        step.axhline(1.0, color="black", lw=0.8)
        step.set(title="large step", xlabel="step / lr", ylabel="ΔH / first order")
        for axes in (rounding, size, step):
            axes.legend(frameon=False, fontsize=7)
