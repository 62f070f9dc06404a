"""A finished run as a page of text: the step's parts, the checks, the strongest rollouts and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from fx_influence.interop.runtime.run_files import PLAN
from fx_influence.lab.console.column_table import Column, ColumnTable, printable
from fx_influence.lab.console.finite_step_tables import finite_step_tables
from fx_influence.lab.console.headline import Change, headline, per, step_terms
from fx_influence.lab.results import EntropyInfluenceResults, displayed_prompt

STRONGEST = 10


def print_run(results: EntropyInfluenceResults, console: Console) -> None:
    """Print what a run found. Influences are in nats per unit lr and, times the optimizer's lr, in nats per step."""
    summary, sequences, arrays = results.summary, results.sequences, results.evaluations[0].arrays
    first = headline(results)
    console.print(Text(f"\n{first.sentence}"), soft_wrap=True)
    console.print(_changes(first.changes, per(results)))
    for finding in first.findings:
        if finding.level == "attention":
            console.print(Text(f"{finding.name}: {finding.text}"), soft_wrap=True)
    console.print(_parts(summary))
    # A step measured inside a training took one finite step, the real one.
    for table in (
        [_realised(summary)] if "in_this_step" in summary else [_checks(summary), *finite_step_tables(summary)]
    ):
        console.print(table)
    for verb, sign in (("LOWER", -1), ("RAISE", 1)):
        console.print(_rollouts(verb, sequences, _strongest(sign * arrays["per_sequence"]), summary["lr"]))
    console.print(_tokens(sequences, arrays["per_token"], summary["lr"]))
    console.print(_blocks(summary["per_parameter"]))
    console.print(footer(summary, results.path, f"{summary['rollouts']} in E"), soft_wrap=True)


def footer(s: dict[str, Any], path: Path, what: str) -> Text:
    """The last line of a page: sizes, cost, and where the run is stored."""
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


def _parts(s: dict[str, Any]) -> ColumnTable:
    columns = (Column("part", "name"), *map(Column, ("nats per unit lr", "stderr", "nats in this step")))
    rows = [
        (p.name, f"{p.value:+.5g}", "" if p.stderr is None else f"{p.stderr:.2g}", f"{p.value * s['lr']:+.3e}")
        for p in step_terms(s)
    ]
    return ColumnTable("What the step does to the entropy, to first order", columns, rows)


def _realised(s: dict[str, Any]) -> ColumnTable:
    logged = s["in_this_step"].items()
    return ColumnTable(
        f"Step {s['step']} of a training, nats in this step",
        (Column("figure", "name"), Column("")),
        [(name.replace("_", " "), "" if value is None else f"{value:.4g}") for name, value in logged],
    )


def _checks(s: dict[str, Any]) -> ColumnTable:
    rows = [
        ("identity: residual / sum of |influence|", f"{s['relative_residual']:.1e}"),
        ("total by JVP less total by parts, relative", f"{_relative(s['total_by_jvp'], s['total']):.1e}"),
        ("first order is 10% off at eta", _trusted_step(s)),
        ("sampled against scored log-probs, largest gap", _largest(s["off_policy"], s["update_off_policy"])),
    ]
    if s["rounding_floor"] is not None:
        rows.append(("|Delta H| that rounding of the weights makes", f"{s['rounding_floor']:.1e}"))
    if "auto_scale" in s and s["auto_scale"]["eta_median"] is not None:
        auto = s["auto_scale"]
        rows += [
            ("auto-scaled steps of the rollouts, median eta", f"{auto['eta_median']:.2e}"),
            ("  they clear the rounding by, median", _times(auto["median_clearance"])),
            ("  off the JVP, median", f"{auto['median_relative_error']:.1%}"),
        ]
    beyond = f"{s['rollouts_beyond_two_stderr']} of {s['update_rollouts']}"
    rows.append(("rollouts more than two standard errors from 0", beyond))
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


def _strongest(sizes: np.ndarray) -> np.ndarray:
    """The places of the positive sizes, the largest first."""
    order = np.argsort(-sizes, kind="stable")
    return order[sizes[order] > 0]


def _distinct(sequences: list[dict[str, Any]], order: np.ndarray) -> list[tuple[dict[str, Any], int]]:
    """The first of ``order`` with different texts, and how often each occurs: equal rollouts have equal influence."""
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


def _blocks(per_parameter: dict[str, float]) -> ColumnTable:
    size = sum(abs(value) for value in per_parameter.values()) or 1.0
    strongest = sorted(per_parameter.items(), key=lambda item: -abs(item[1]))[:5]
    return ColumnTable(
        "Parameters that carry the rollouts' influence",
        (Column("parameter", "name"), Column("nats per unit lr"), Column("share of sum |.|")),
        [(name, f"{value:+.4g}", f"{abs(value) / size:.1%}") for name, value in strongest],
    )


def _short(text: str, width: int = 60) -> str:
    shown = printable(text)
    return shown if len(shown) <= width else shown[: width - 1] + "…"


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
