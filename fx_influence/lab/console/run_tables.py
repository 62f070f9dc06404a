"""Tables of a finished run for a terminal: the step's terms, the checks, the strongest rollouts and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from fx_influence.core.display import printable
from fx_influence.interop.runtime.run_files import PLAN
from fx_influence.lab.console.column_table import Column, ColumnTable
from fx_influence.lab.console.finite_step_tables import finite_step_tables
from fx_influence.lab.console.headline import Change, entropy_unit, headline, step_terms
from fx_influence.lab.results import EntropyInfluenceResults, displayed_prompt

STRONGEST = 10


def print_run(results: EntropyInfluenceResults, console: Console) -> None:
    """Print a run. Influences are in nats per unit lr and, times the optimizer's lr, in nats per step."""
    summary, sequences, arrays = results.summary, results.sequences, results.evaluations[0].arrays
    first = headline(results)
    console.print(Text(f"\n{first.sentence}"), soft_wrap=True)
    console.print(_changes(first.changes, entropy_unit(results)))
    for finding in first.findings:
        if finding.level == "attention":
            console.print(Text(f"{finding.name}: {finding.text}"), soft_wrap=True)
    console.print(_terms(summary))
    # A step of a training run has one finite step, the one that the trainer took, and so no sweep to tabulate.
    told = int(results.evaluations[0].told().sum())
    for table in (
        [_logged(summary)] if "in_this_step" in summary else [_checks(summary, told), *finite_step_tables(summary)]
    ):
        console.print(table)
    for verb, sign in (("LOWER", -1), ("RAISE", 1)):
        console.print(_rollouts(verb, sequences, _strongest(sign * arrays["per_sequence"]), summary["lr"]))
    console.print(_tokens(sequences, arrays["per_token"], summary["lr"]))
    console.print(_parameters(summary["per_parameter"]))
    console.print(footer(summary, results.path, f"{summary['rollouts']} in E"), soft_wrap=True)


def footer(s: dict[str, Any], path: Path, what: str) -> Text:
    """Return the last line of a run's output: sizes, cost, and where the run is stored.

    Args:
        s: summary of the run.
        path: run directory.
        what: text on the evaluation batches.
    """
    return Text(
        f"{s['update_rollouts']} rollouts in U, {what}, {s['trainable_parameters']:,} trainable parameters; "
        f"{s['seconds']:.1f} s, {s['peak_memory_bytes'] / 2**20:.0f} MiB at the peak. Stored in "
        f"{printable(str(path))}, repeated by its {PLAN}."
    )


def _changes(changes: Sequence[Change], unit: str) -> ColumnTable:
    return ColumnTable(
        f"Delta H of this step, nats {unit}",
        (Column("", "name"), Column("Delta H"), Column("stderr")),
        [(c.name, f"{c.value:+.3e}", "" if c.stderr is None else f"{c.stderr:.1e}") for c in changes],
    )


def _terms(s: dict[str, Any]) -> ColumnTable:
    columns = (Column("term", "name"), *map(Column, ("nats per unit lr", "stderr", "nats in this step")))
    rows = [
        (t.name, f"{t.value:+.5g}", "" if t.stderr is None else f"{t.stderr:.2g}", f"{t.value * s['lr']:+.3e}")
        for t in step_terms(s)
    ]
    return ColumnTable("What the step does to the entropy, to first order", columns, rows)


def _logged(s: dict[str, Any]) -> ColumnTable:
    logged = s["in_this_step"].items()
    return ColumnTable(
        f"Step {s['step']} of a training run, nats in this step",
        (Column("figure", "name"), Column("")),
        [(printable(name.replace("_", " ")), "" if value is None else f"{value:.4g}") for name, value in logged],
    )


def _checks(s: dict[str, Any], told: int) -> ColumnTable:
    rows = [
        ("adjoint test: residual / sum of |influence|", f"{s['relative_residual']:.1e}"),
        ("total by JVP minus sum of its terms, relative", f"{_relative(s['total_by_jvp'], s['total']):.1e}"),
        ("first order is 10% off at eta", _trusted_step(s)),
        ("sampled minus scored log-probs, largest", _largest(s["off_policy"], s["update_off_policy"])),
    ]
    if s["rounding_floor"] is not None:
        rows.append(("|Delta H| caused by rounding the weights", f"{s['rounding_floor']:.1e}"))
    if "auto_scale" in s and s["auto_scale"]["eta_median"] is not None:
        auto = s["auto_scale"]
        rows += [
            ("auto-scaled steps of the rollouts, median eta", f"{auto['eta_median']:.2e}"),
            ("  their |Delta H| over the rounding, median", _times(auto["median_clearance"])),
            ("  relative error against the JVP, median", f"{auto['median_relative_error']:.1%}"),
        ]
    rows.append(("rollouts whose 95% interval excludes 0", f"{told} of {s['update_rollouts']}"))
    return ColumnTable("Checks", (Column("check", "name"), Column("figure")), rows)


def _rollouts(verb: str, sequences: list[dict[str, Any]], order: np.ndarray, lr: float) -> ColumnTable | Text:
    if not len(order):
        return Text(f"No rollout {verb}S the entropy.")
    texts = (Column("id", "name"), Column("prompt", "text"), Column("completion", "text"))
    numbers = ("influence ± stderr", "nats in this step", "same", "reward", "advantage")
    rows = [
        (
            r["id"],
            _short(displayed_prompt(r)),
            _short(r["completion"]),
            f"{r['influence']:+.4g}" + ("" if r["stderr"] is None else f" ± {r['stderr']:.2g}"),
            f"{r['influence'] * lr:+.2e}",
            f"x{count}",
            "" if r["reward"] is None else f"{r['reward']:g}",
            "" if r["advantage"] is None else f"{r['advantage']:+.2f}",
        )
        for r, count in _distinct(sequences, order)
    ]
    return ColumnTable(f"Rollouts that {verb} the entropy most", (*texts, *map(Column, numbers)), rows)


def _strongest(values: np.ndarray) -> np.ndarray:
    """Return the indices of the positive values, the largest first."""
    order = np.argsort(-values, kind="stable")
    return order[values[order] > 0]


def _distinct(sequences: list[dict[str, Any]], order: np.ndarray) -> list[tuple[dict[str, Any], int]]:
    """Return the first of ``order`` with distinct texts and the count of each: equal rollouts have equal influence."""
    counts: dict[tuple[str, str], int] = {}
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for i in order:
        r = sequences[int(i)]
        key = (r["prompt"], r["completion"])
        counts[key] = counts.get(key, 0) + 1
        first.setdefault(key, r)
    return [(r, counts[key]) for key, r in list(first.items())[:STRONGEST]]


def _tokens(sequences: list[dict[str, Any]], per_token: np.ndarray, lr: float) -> ColumnTable | Text:
    strongest = _strongest(np.abs(per_token).ravel())[:STRONGEST]
    if not len(strongest):
        return Text("No token moves the entropy.")
    rows = []
    for row, column in zip(*np.unravel_index(strongest, per_token.shape), strict=True):
        r = sequences[int(row)]
        # Columns of per_token are those of the right-padded batch: prompt first, then the completion.
        k = int(column) - r["prompt_length"]
        value = float(per_token[row, column])
        before, token, after = ("".join(r["tokens"][a:b]) for a, b in ((0, k), (k, k + 1), (k + 1, None)))
        context = Text.assemble(printable(before[-20:]), (printable(token), "bold reverse"), printable(after[:20]))
        rows.append((r["id"], repr(token), context, f"{value:+.4g}", f"{value * lr:+.2e}"))
    texts = (Column("rollout", "name"), Column("token", "text"), Column("in its completion", "text"))
    return ColumnTable("Strongest tokens", (*texts, Column("influence"), Column("nats in this step")), rows)


def _parameters(per_parameter: dict[str, float]) -> ColumnTable:
    norm = sum(abs(value) for value in per_parameter.values()) or 1.0
    strongest = sorted(per_parameter.items(), key=lambda item: -abs(item[1]))[:5]
    return ColumnTable(
        "Parameters through which the rollouts act",
        (Column("parameter", "name"), Column("nats per unit lr"), Column("share of sum |.|")),
        [(name, f"{value:+.4g}", f"{abs(value) / norm:.1%}") for name, value in strongest],
    )


def _short(text: str, width: int = 60) -> str:
    escaped = printable(text)
    return escaped if len(escaped) <= width else escaped[: width - 1] + "…"


def _trusted_step(s: dict[str, Any]) -> str:
    trust = s["eta_trust"]
    if s.get("second_order", 0.0) is None:
        return "not computed"
    if trust is None:
        return "never"
    return f"{trust:.2e} ({trust / s['lr']:.2g} lr)" if s["lr"] else f"{trust:.2e}"


def _largest(*gaps: float | None) -> str:
    known = [gap for gap in gaps if gap is not None]
    return f"{max(known):.1e}" if known else "not recorded"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} times"


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), 1e-300)
