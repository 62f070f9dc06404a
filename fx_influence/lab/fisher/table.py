"""Print a finished Fisher run: each evaluation's figures, and the rollouts that the step moves most."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from fx_influence.core.display import printable
from fx_influence.lab.console.column_table import Column, ColumnTable
from fx_influence.lab.console.run_tables import footer
from fx_influence.lab.fisher.results import FisherKernelResults
from fx_influence.lab.results import displayed_prompt

STRONGEST = 10
"""Number of rollouts of E that are listed."""
TEXT_WIDTH = 36
"""Number of characters printed of a prompt or completion."""


def print_fisher(results: FisherKernelResults, console: Console) -> None:
    """Print the results of a Fisher run; changes of log-probability are in nats per sequence and step."""
    summary = results.summary
    console.print(_headline(summary), soft_wrap=True)
    console.print(_figure_table(summary))
    console.print(_strongest_table(results.evaluations[0].top, summary["lr"]))
    console.print(footer(summary, results.path, f"preconditioner {results.plan.preconditioner}"), soft_wrap=True)


def _headline(s: dict[str, Any]) -> Text:
    size, largest = (s[f"{name}_abs_predicted_delta_logprob"] * s["lr"] for name in ("median", "largest"))
    return Text(
        f"\nTo first order this step (lr {s['lr']:g}) changes the log-probability of a completion of E by "
        f"{size:.3g} nats in the median and {largest:.3g} nats at most."
    )


def _figure_table(s: dict[str, Any]) -> ColumnTable:
    columns = ("E", "rollouts", "mean", "mean |.|", "median |.|", "largest |.|", "baseline, mean |.|")
    more = ("one rollout of U, mean |.|", "Spearman with K_aa", "residual / sum of |terms|")
    rows = []
    for i, e in enumerate(s["evaluations"]):
        sizes = [e[f"{name}_predicted_delta_logprob"] for name in ("mean_abs", "median_abs", "largest_abs")]
        rank = e["spearman_self_kernel_prediction"]
        rows.append(
            (
                f"{i:02d}",
                f"{e['rollouts']}",
                f"{e['mean_predicted_delta_logprob'] * s['lr']:+.3e}",
                *(f"{size * s['lr']:.3e}" for size in (*sizes, e["mean_abs_baseline"], e["mean_abs_contribution"])),
                "" if rank is None else f"{rank:+.3f}",
                f"{e['relative_residual']:.1e}",
            )
        )
    return ColumnTable(
        "Predicted change of log-probability in this step, nats", [*map(Column, (*columns, *more))], rows
    )


def _strongest_table(top: list[dict[str, Any]], lr: float) -> ColumnTable:
    rows = []
    for record in _distinct(top):
        strongest = record["contributors"][0]
        advantage = strongest["advantage"]
        rows.append(
            (
                *(_abridged(text) for text in (displayed_prompt(record), record["completion"])),
                *(f"{record[field] * lr:+.2e}" for field in ("predicted_delta_logprob", "baseline")),
                strongest["id"],
                *(_abridged(text) for text in (displayed_prompt(strongest), strongest["completion"])),
                "" if advantage is None else f"{advantage:+.2f}",
                f"{strongest['contribution'] * lr:+.2e}",
            )
        )
    texts = (Column("prompt", "text"), Column("completion", "text"))
    by = (Column("by U's rollout", "name"), *texts, Column("advantage"), Column("its part"))
    return ColumnTable(
        "Rollouts of E 00 that the step moves most, and what in U moves them",
        (*texts, Column("change"), Column("baseline"), *by),
        rows,
    )


def _abridged(text: str) -> str:
    line = printable(text)
    return line if len(line) <= TEXT_WIDTH else line[: TEXT_WIDTH - 1] + "…"


def _distinct(top: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records that move most, one of each text, since equal rollouts are moved equally."""
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for record in sorted(top, key=lambda r: -abs(r["predicted_delta_logprob"])):
        first.setdefault((record["prompt"], record["completion"]), record)
    return list(first.values())[:STRONGEST]
