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

from fx_influence.core.display import printable
from fx_influence.lab.analysis.correlation import CONFIDENCE, RESAMPLES, Row
from fx_influence.lab.analysis.covariates import Tokens
from fx_influence.lab.analysis.directions import direction_rows
from fx_influence.lab.analysis.reward_price import reward_price
from fx_influence.lab.analysis.rollout_correlations import rollout_correlations
from fx_influence.lab.analysis.token_correlations import proxy_rows, token_correlations
from fx_influence.lab.analysis.token_sums import concentration_rows, sign_rows, source_rows
from fx_influence.lab.console.column_table import Column, ColumnTable
from fx_influence.lab.results import EntropyInfluenceResults

FOLDER = "analysis"
TITLES = {
    "rollout_correlations": "Influence of the rollouts, the baseline omitted (none) or allocated to them, against",
    "token_correlations": "Influence of the tokens against",
    "proxy": "The covariance proxy (log pi - mean)(A - mean) beside the influence; it predicts a fall of the entropy",
    "concentration": "Share of the influence in the strongest tokens",
    "advantage_by_probability": "Influence of the tokens by sign of advantage and probability, nats per unit lr",
    "source": "Influence by data source, nats per unit lr",
    "directions": "AdamW's direction beside the RMSProp-style one",
    "reward_price": "Entropy price of reward",
    "pareto": "Pareto set of rollouts in entropy and reward, per unit lr",
}
"""Titles on the console by name of the table, which is its key in ``analyze`` and the stem of its CSV file."""


def analyze(results: EntropyInfluenceResults, evaluation: int = 0) -> dict[str, Any]:
    """Return the statistics of one E as plain values: ``settings``, and by name of ``TITLES`` a list of rows.

    Influences are in nats per unit lr, positive raising the entropy. Intervals are percentiles of a bootstrap over the
    prompts of U, always with the same draws: they describe the variation over other prompts, not over another E, which
    ``stderr`` of a run describes. A quantity that is constant or was not stored is None, with a note that says so.

    - ``rollout_correlations``: see ``rollout_correlations.rollout_correlations``
    - ``token_correlations``, ``proxy``, ``concentration``, ``advantage_by_probability``: see ``token_correlations`` and
      ``proxy_rows`` in ``token_correlations``, ``concentration_rows`` and ``sign_rows`` in ``token_sums``
    - ``source``: see ``token_sums.source_rows``; empty where no source was recorded
    - ``directions``: see ``directions.direction_rows``
    - ``reward_price``, ``pareto``: see ``reward_price.reward_price``

    Raises:
        IndexError: for an evaluation that the run does not have.

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
        "source": source_rows(tokens),
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
    """Write ``analyze`` of every E to ``analysis`` in the run directory; no other file is touched.

    One CSV for each table, with the column ``evaluation`` first, and all of it in ``analysis.json``. Returns the
    content of ``analysis.json``, in the order of the evaluations.
    """
    analyses = [analyze(results, i) for i in range(len(results.evaluations))]
    folder = results.path / FOLDER
    folder.mkdir(exist_ok=True)
    for name in TITLES:
        rows = [{"evaluation": i, **row} for i, analysis in enumerate(analyses) for row in analysis[name]]
        _write(folder / f"{name}.csv", _csv(rows))
    _write(folder / "analysis.json", json.dumps(analyses, indent=1, allow_nan=False) + "\n")
    return analyses


def print_analysis(analysis: Mapping[str, Any], console: Console) -> None:
    """Print the tables and settings that ``analyze`` returned."""
    for table in analysis_tables(analysis):
        console.print(table)
    s = analysis["settings"]
    console.print(
        Text(
            f"{s['rollouts']} rollouts, {s['tokens']} tokens; {s['confidence']:.0%} intervals over the draw of prompts "
            f"({s['resamples']} resamples); p: {s['p']}; q: {s['q']}."
        ),
        soft_wrap=True,
    )


def analysis_tables(analysis: Mapping[str, Any]) -> list[ColumnTable]:
    """Return the tables of an analysis for a rich console; an empty one is omitted."""
    tables = {**analysis, "rollout_correlations": _allocations_as_columns(analysis["rollout_correlations"])}
    return [_table(title, tables[name]) for name, title in TITLES.items() if tables[name]]


def _allocations_as_columns(rows: list[Row]) -> list[Row]:
    """Return a row for each covariate and measure, with the allocations as columns."""
    lines: dict[tuple[str, str], Row] = {}
    for row in rows:
        line = lines.setdefault((row["with"], row["measure"]), {"with": row["with"], "measure": row["measure"]})
        if row["influence"] == "none":
            line |= {name: row[name] for name in ("value", "low", "high", "p", "q")} | {"reason": row["note"]}
        else:
            line[row["influence"]] = "not defined" if row["value"] is None and not line["reason"] else row["value"]
    return [{**{k: v for k, v in line.items() if k != "reason"}, "note": line["reason"]} for line in lines.values()]


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
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
