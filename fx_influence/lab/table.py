"""A finished run as a page of text: the step's parts, the checks, the strongest rollouts and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fx_influence.interop.run_files import PLAN
from fx_influence.lab.finite_tables import finite_tables
from fx_influence.lab.health import health
from fx_influence.lab.results import EntropyInfluenceResults

STRONGEST = 10


def print_run(results: EntropyInfluenceResults, console: Console) -> None:
    """Print what a run found. Influences are in nats per unit lr and, times the optimizer's lr, in nats per step."""
    summary, sequences, arrays = results.summary, results.sequences, results.evaluations[0].arrays
    console.print(_headline(summary), soft_wrap=True)
    console.print(_parts(summary))
    # A step measured inside a training took one finite step, the real one.
    for table in [_realised(summary)] if "in_this_step" in summary else [_checks(summary), *finite_tables(summary)]:
        console.print(table)
    order = np.argsort(arrays["per_sequence"])
    console.print(_rollouts("Rollouts that LOWER the entropy most", sequences, order, summary["lr"]))
    console.print(_rollouts("Rollouts that RAISE the entropy most", sequences, order[::-1], summary["lr"]))
    console.print(_tokens(sequences, arrays["per_token"], summary["lr"]))
    console.print(_blocks(summary["per_parameter"]))
    for finding in health(results):
        if finding.level == "attention":
            console.print(Text(f"{finding.name}: {finding.text}"), soft_wrap=True)
    console.print(footer(summary, results.path, f"{summary['rollouts']} in E"), soft_wrap=True)


def footer(s: dict[str, Any], path: Path, what: str) -> Text:
    """The last line of a page: sizes, cost, and where the run is stored."""
    return Text(
        f"{s['update_rollouts']} rollouts in U, {what}, {s['trainable_parameters']:,} trainable parameters; "
        f"{s['seconds']:.1f} s, {s['peak_memory_bytes'] / 2**20:.0f} MiB at the peak. Stored in "
        f"{printable(str(path))}, repeated by its {PLAN}."
    )


def printable(text: str) -> str:
    """Untrusted text with every character that is not printable (controls, escapes, bidirectional marks) escaped.

    Example:
        >>> printable("a\\x1b[31m\\u202eb")
        'a\\\\x1b[31m\\\\u202eb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def _headline(s: dict[str, Any]) -> Text:
    step = s["total"] * s["lr"]
    verb = "falls" if step < 0 else "rises"
    return Text(
        f"\nEntropy now {s['entropy']:.4f} nats; in this step (lr {s['lr']:g}) it {verb} by {abs(step):.3g} nats "
        f"to first order, ± {s['total_stderr'] * s['lr']:.1g}."
        if s["total_stderr"] is not None
        else f"\nEntropy now {s['entropy']:.4f} nats; in this step (lr {s['lr']:g}) it {verb} by {abs(step):.3g} nats."
    )


def _parts(s: dict[str, Any]) -> Table:
    table = Table(title="What the step does to the entropy, to first order", title_justify="left")
    for column in ("part", "nats per unit lr", "stderr", "nats in this step"):
        table.add_column(column, justify="left" if column == "part" else "right")
    rows = (
        ("momentum", s["momentum"], None),
        ("weight decay", s["weight_decay"], None),
        ("baseline (both)", s["baseline"], s.get("baseline_stderr")),
        ("rollouts, all together", s["sum_per_sequence"], s.get("sum_per_sequence_stderr")),
        *([("unattributed", s["unattributed"], None)] if s.get("unattributed") else []),
        ("total", s["total"], s["total_stderr"]),
    )
    for name, value, error in rows:
        table.add_row(name, f"{value:+.5g}", "" if error is None else f"{error:.2g}", f"{value * s['lr']:+.3e}")
    return table


def _realised(s: dict[str, Any]) -> Table:
    table = Table(title=f"Step {s['step']} of a training, nats in this step", title_justify="left")
    table.add_column("figure")
    table.add_column("", justify="right")
    for name, value in s["in_this_step"].items():
        table.add_row(name.replace("_", " "), "" if value is None else f"{value:.4g}")
    return table


def _checks(s: dict[str, Any]) -> Table:
    table = Table(title="Checks", title_justify="left")
    table.add_column("check")
    table.add_column("figure", justify="right")
    table.add_row("identity: residual / sum of |influence|", f"{s['relative_residual']:.1e}")
    table.add_row("total by JVP less total by parts, relative", f"{_relative(s['total_by_jvp'], s['total']):.1e}")
    trust = s["eta_trust"]
    table.add_row(
        "first order is 10% off at eta",
        "never" if trust is None else f"{trust:.2e} ({trust / s['lr']:.2g} lr)" if s["lr"] else f"{trust:.2e}",
    )
    table.add_row("sampled against scored log-probs, largest gap", _largest(s["off_policy"], s["update_off_policy"]))
    table.add_row("|Delta H| that rounding of the weights makes", f"{s['rounding_floor']:.1e}")
    if "auto_scale" in s and s["auto_scale"]["eta_median"] is not None:
        auto = s["auto_scale"]
        table.add_row("auto-scaled steps of the rollouts, median eta", f"{auto['eta_median']:.2e}")
        table.add_row("  they clear the rounding by, median", _times(auto["median_clearance"]))
        table.add_row("  off the JVP, median", f"{auto['median_relative_error']:.1%}")
    beyond = f"{s['rollouts_beyond_two_stderr']} of {s['update_rollouts']}"
    table.add_row("rollouts more than two standard errors from 0", beyond)
    return table


def _rollouts(title: str, sequences: list[dict[str, Any]], order: np.ndarray, lr: float) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("id", "prompt", "completion"):
        table.add_column(column, overflow="fold")
    for column in ("same", "reward", "advantage", "influence ± stderr", "nats in this step"):
        table.add_column(column, justify="right", no_wrap=True)
    for r, count in _distinct(sequences, order):
        error = "" if r["stderr"] is None else f" ± {r['stderr']:.2g}"
        table.add_row(
            *(Text(_short(r[field])) for field in ("id", "prompt", "completion")),
            f"x{count}",
            "" if r["reward"] is None else f"{r['reward']:g}",
            f"{r['advantage']:+.2f}",
            f"{r['influence']:+.4g}{error}",
            f"{r['influence'] * lr:+.2e}",
        )
    return table


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


def _tokens(sequences: list[dict[str, Any]], per_token: np.ndarray, lr: float) -> Table:
    table = Table(title="Strongest tokens", title_justify="left")
    for column in ("rollout", "token", "in its completion", "influence", "nats in this step"):
        table.add_column(column, justify="right" if column in ("influence", "nats in this step") else "left")
    flat = np.argsort(-np.abs(per_token), axis=None)[:STRONGEST]
    for row, column in zip(*np.unravel_index(flat, per_token.shape), strict=True):
        r = sequences[int(row)]
        # Columns of per_token are those of the right-padded batch: prompt first, then the completion.
        k = int(column) - r["prompt_length"]
        value = float(per_token[row, column])
        before, token, after = ("".join(r["tokens"][a:b]) for a, b in ((0, k), (k, k + 1), (k + 1, None)))
        context = Text.assemble(printable(before[-20:]), (printable(token), "bold reverse"), printable(after[:20]))
        table.add_row(Text(_short(r["id"])), Text(repr(token)), context, f"{value:+.4g}", f"{value * lr:+.2e}")
    return table


def _blocks(per_parameter: dict[str, float]) -> Table:
    size = sum(abs(value) for value in per_parameter.values()) or 1.0
    table = Table(title="Parameters that carry the rollouts' influence", title_justify="left")
    table.add_column("parameter")
    table.add_column("nats per unit lr", justify="right")
    table.add_column("share of sum |.|", justify="right")
    for name, value in sorted(per_parameter.items(), key=lambda item: -abs(item[1]))[:5]:
        table.add_row(Text(name), f"{value:+.4g}", f"{abs(value) / size:.1%}")
    return table


def _short(text: str, width: int = 60) -> str:
    shown = printable(text)
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def _largest(*gaps: float | None) -> str:
    known = [gap for gap in gaps if gap is not None]
    return f"{max(known):.1e}" if known else "not recorded"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} times"


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), 1e-300)
