"""A finished Fisher run as a page of text: each evaluation's figures, and the rollouts that the step moves most."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fx_influence.lab.fisher_results import FisherKernelResults
from fx_influence.lab.table import footer, printable

STRONGEST = 10
TEXT_WIDTH = 36
"""Characters of a prompt or completion that are shown."""


def print_fisher(results: FisherKernelResults, console: Console) -> None:
    """Print what a Fisher run found; changes of log-probability are in nats per sequence and step."""
    summary = results.summary
    console.print(_headline(summary), soft_wrap=True)
    console.print(_figures(summary))
    console.print(_moved(results.evaluations[0].top, summary["lr"]))
    console.print(footer(summary, results.path, f"preconditioner {results.plan.preconditioner}"), soft_wrap=True)


def _headline(s: dict[str, Any]) -> Text:
    size, largest = (s[f"{name}_abs_predicted_delta_logprob"] * s["lr"] for name in ("median", "largest"))
    return Text(
        f"\nTo first order this step (lr {s['lr']:g}) changes the log-probability of a completion of E by "
        f"{size:.3g} nats in the median and {largest:.3g} nats at most."
    )


def _figures(s: dict[str, Any]) -> Table:
    table = Table(title="Predicted change of log-probability in this step, nats", title_justify="left")
    columns = ("E", "rollouts", "mean", "mean |.|", "median |.|", "largest |.|", "baseline, mean |.|")
    for column in (*columns, "one rollout of U, mean |.|", "Spearman with K_aa", "residual / sum of |parts|"):
        table.add_column(column, justify="right")
    for i, e in enumerate(s["evaluations"]):
        sizes = [e[f"{name}_predicted_delta_logprob"] for name in ("mean_abs", "median_abs", "largest_abs")]
        rank = e["spearman_self_kernel_prediction"]
        table.add_row(
            f"{i:02d}",
            f"{e['rollouts']}",
            f"{e['mean_predicted_delta_logprob'] * s['lr']:+.3e}",
            *(f"{size * s['lr']:.3e}" for size in (*sizes, e["mean_abs_baseline"], e["mean_abs_contribution"])),
            "" if rank is None else f"{rank:+.3f}",
            f"{e['relative_residual']:.1e}",
        )
    return table


def _moved(top: list[dict[str, Any]], lr: float) -> Table:
    table = Table(title="Rollouts of E 00 that the step moves most, and what in U moves them", title_justify="left")
    for column in ("prompt", "completion", "change", "baseline", "by U's rollout", "prompt", "completion"):
        width = TEXT_WIDTH if column in ("prompt", "completion") else None
        table.add_column(column, no_wrap=True, overflow="ellipsis", max_width=width)
    table.add_column("advantage", justify="right", no_wrap=True)
    table.add_column("its part", justify="right", no_wrap=True)
    for record in _distinct(top):
        strongest = record["contributors"][0]
        advantage = strongest["advantage"]
        table.add_row(
            *(Text(printable(record[field])) for field in ("prompt", "completion")),
            *(f"{record[field] * lr:+.2e}" for field in ("predicted_delta_logprob", "baseline")),
            *(Text(printable(strongest[field])) for field in ("id", "prompt", "completion")),
            "" if advantage is None else f"{advantage:+.2f}",
            f"{strongest['contribution'] * lr:+.2e}",
        )
    return table


def _distinct(top: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The most moved of different texts: equal rollouts are moved equally."""
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for record in sorted(top, key=lambda r: -abs(r["predicted_delta_logprob"])):
        first.setdefault((record["prompt"], record["completion"]), record)
    return list(first.values())[:STRONGEST]
