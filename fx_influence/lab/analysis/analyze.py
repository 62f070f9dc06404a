"""``fx-influence analyze``: the statistics of a run as values, as tables on the console and as files."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fx_influence.lab.analysis.correlation import CONFIDENCE, RESAMPLES, Row
from fx_influence.lab.analysis.covariates import Tokens
from fx_influence.lab.analysis.directions import direction_rows
from fx_influence.lab.analysis.reward_price import reward_price
from fx_influence.lab.analysis.rollout_correlations import rollout_correlations
from fx_influence.lab.analysis.token_correlations import proxy_rows, token_correlations
from fx_influence.lab.analysis.token_sums import concentration_rows, sign_rows
from fx_influence.lab.console.column_table import Column, ColumnTable, printable
from fx_influence.lab.results import EntropyInfluenceResults

FOLDER = "analysis"
TITLES = {
    "rollout_correlations": "Influence of the rollouts, the baseline left out (none) or dealt out, against",
    "token_correlations": "Influence of the tokens against",
    "proxy": "The covariance proxy (log pi - mean)(A - mean) beside the influence; it foretells a fall of the entropy",
    "concentration": "Share of the influence in the strongest tokens",
    "advantage_by_probability": "Influence of the tokens by sign of advantage and probability, nats per unit lr",
    "directions": "AdamW's direction beside the RMSProp-style one",
    "reward_price": "What reward costs in entropy",
    "pareto": "Rollouts that no other beats both in entropy and in reward, per unit lr",
}
"""The tables in their order: name, as in ``analyze`` and of the CSV file, and title on the console."""


def analyze(results: EntropyInfluenceResults, evaluation: int = 0) -> dict[str, Any]:
    """The statistics of one E as plain values: ``settings``, and by name of ``TITLES`` a list of rows.

    Influences are in nats per unit lr, positive raising the entropy. Intervals are percentiles of a bootstrap over the
    prompts of U, always with the same draws: they say what other prompts would give, not what another E would, which
    ``stderr`` of a run does. What is constant or was not stored has None and a note that says so.

    - ``rollout_correlations``: see ``rollout_statistics.rollout_correlations``
    - ``token_correlations``, ``proxy``, ``concentration``, ``advantage_by_probability``: see ``token_statistics``,
      ``token_correlations``, ``proxy_rows``, ``concentration_rows``, ``sign_rows``
    - ``directions``: see ``rollout_statistics.direction_rows``
    - ``reward_price``, ``pareto``: see ``rollout_statistics.reward_price``

    Raises ``IndexError`` for an evaluation that the run does not have.

    Example, after ``make demo``: ``analyze(fx.load_run("runs/demo"))["proxy"][0]["measure"]``.
    """
    tokens = Tokens(results, evaluation)
    price, best = reward_price(results, evaluation)
    tables = {
        "rollout_correlations": rollout_correlations(results, evaluation),
        "token_correlations": token_correlations(tokens),
        "proxy": proxy_rows(tokens),
        "concentration": concentration_rows(tokens.influence),
        "advantage_by_probability": sign_rows(tokens),
        "directions": direction_rows(results, evaluation),
        "reward_price": price,
        "pareto": best,
    }
    settings = {
        "evaluation": evaluation,
        "rollouts": len(results.sequences),
        "tokens": len(tokens.influence),
        "resamples": RESAMPLES,
        "clusters": "prompts of U",
        "confidence": CONFIDENCE,
        "p": "Student's t of atanh(r) over its bootstrap standard error, prompts - 1 degrees of freedom",
        "q": "Benjamini-Hochberg over each table",
    }
    return _plain({"settings": settings, **tables})


def write_analysis(results: EntropyInfluenceResults) -> list[dict[str, Any]]:
    """``analyze`` for every E, written to ``analysis`` in the run directory; no other file is touched.

    One CSV for each table, with the column ``evaluation`` first, and all of it in ``analysis.json``. Returns what
    ``analysis.json`` holds, in the order of the evaluations.
    """
    found = [analyze(results, i) for i in range(len(results.evaluations))]
    folder = results.path / FOLDER
    folder.mkdir(exist_ok=True)
    for name in TITLES:
        rows = [{"evaluation": i, **row} for i, one in enumerate(found) for row in one[name]]
        _write(folder / f"{name}.csv", _csv(rows))
    _write(folder / "analysis.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    return found


def print_analysis(found: Mapping[str, Any], console: Console) -> None:
    """Print what ``analyze`` found."""
    for table in analysis_tables(found):
        console.print(table)
    s = found["settings"]
    console.print(
        Text(
            f"{s['rollouts']} rollouts, {s['tokens']} tokens; {s['confidence']:.0%} intervals over the draw of prompts "
            f"({s['resamples']} resamples); p: {s['p']}; q: {s['q']}."
        ),
        soft_wrap=True,
    )


def analysis_tables(found: Mapping[str, Any]) -> list[ColumnTable]:
    """What ``analyze`` found as tables for a rich console; an empty one is left out."""
    shown = {**found, "rollout_correlations": _side_by_side(found["rollout_correlations"])}
    return [_table(title, shown[name]) for name, title in TITLES.items() if shown[name]]


def _side_by_side(rows: list[Row]) -> list[Row]:
    """The allocations as columns: a row for each covariate and measure."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        line = found.setdefault((row["with"], row["measure"]), {"with": row["with"], "measure": row["measure"]})
        if row["influence"] == "none":
            line |= {name: row[name] for name in ("value", "low", "high", "p", "q")} | {"reason": row["note"]}
        else:
            line[row["influence"]] = "not defined" if row["value"] is None and not line["reason"] else row["value"]
    return [{**{k: v for k, v in line.items() if k != "reason"}, "note": line["reason"]} for line in found.values()]


def _table(title: str, rows: list[Row]) -> ColumnTable:
    columns = [
        Column(name.replace("_", " "), "name" if any(isinstance(row[name], str) for row in rows) else "number")
        for name in rows[0]
    ]
    return ColumnTable(title, columns, [[_cell(name, value) for name, value in row.items()] for row in rows])


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, int):
        return str(value)
    if name in ("p", "q"):
        return f"{value:.2g}"
    return f"{value:g}" if name in ("fraction", "eta") else f"{value:+.3g}"


def _csv(rows: list[Row]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Without NaN and infinity, which neither JSON nor a reader of a table can use."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
