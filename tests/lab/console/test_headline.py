"""The headline: which direction it names, when it names none, and that the checks beside it agree."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.synthetic_runs import synthetic_run
from rich.console import Console

from fx_influence.lab.console.headline import headline, step_terms
from fx_influence.lab.console.run_tables import print_run
from fx_influence.lab.report import report_page
from fx_influence.lab.results import EntropyInfluenceResults

LR = 1e-3
DOUBT = ("does not determine", "uncertain", "too long", "Do not trust")


def run_with(path: Path, total: float, stderr: float | None, measured: float | None, **more: Any) -> Any:
    """Return a run whose step changes the entropy by ``total`` a unit lr, and by ``measured`` +- 5e-4 nats."""
    results = synthetic_run(path)
    [evaluation] = results.evaluations
    eta = np.array([LR])
    arrays = {**evaluation.arrays, "eta": eta, "ess": np.array([more.pop("ess", 8.0)])}
    arrays |= {"full": np.array([measured if measured is not None else 0.0]), "full_stderr": np.array([5e-4])}
    if measured is None:
        arrays = {name: value for name, value in arrays.items() if not name.startswith("full")}
    summary = {**evaluation.summary, "total": total, "total_stderr": stderr, "residual": 0.0, **more}
    summary |= {"sum_per_sequence": total - summary["baseline"] - summary.get("unattributed", 0.0)}
    summary |= {"update_rollouts": 48, "seconds": 1.0}
    summary |= {"trainable_parameters": 1, "peak_memory_bytes": 1, "per_parameter": {"w": 1.0}}
    return dataclasses.replace(
        results,
        summary={**results.summary, **summary},
        evaluations=(dataclasses.replace(evaluation, arrays=arrays, summary=summary),),
    )


@pytest.mark.parametrize(
    ("total", "stderr", "measured", "begins", "holds"),
    [
        (-4.0, 0.5, -3.5e-3, "This step lowers", ["0.00400 ± 0.00050", "0.00350 ± 0.00050 as measured"]),
        (4.0, 0.5, 3.5e-3, "This step raises", ["0.00400 ± 0.00050", "0.00350 ± 0.00050 as measured"]),
        (-4.0, 0.5, None, "This step lowers", ["0.00400 ± 0.00050"]),
        (-4.0, None, None, "This step lowers", ["0.004", "E gives no error bar"]),
        (-4.0, 2.5, -3.5e-3, "E does not determine whether", ["−0.0040 ± 0.0025", "measured −0.00350 ± 0.00050"]),
        (-4.0, 0.5, -0.9e-3, "The sign is uncertain", ["lowers", "0.00400", "−0.00090 ± 0.00050 is measured"]),
        (-4.0, 0.5, -1.5e-3, "The sign is uncertain", ["−0.00150 ± 0.00050 is measured"]),
        (-4.0, 0.5, 3.5e-3, "This step is too long", ["raises", "0.00350", "−0.00400 ± 0.00050 is predicted"]),
        (0.0, 0.0, None, "To first order this step leaves", ["1.0000"]),
    ],
)
def test_headline_names_a_direction_only_if_determined(
    total: float, stderr: float | None, measured: float | None, begins: str, holds: list[str], tmp_path: Path
) -> None:
    """E has four prompts, so that a 95% interval is 3.18 standard errors to each side."""
    sentence = headline(run_with(tmp_path, total, stderr, measured)).sentence
    assert sentence.startswith(begins)
    assert all(words in sentence for words in holds), sentence


@pytest.mark.parametrize("measured", [None, -3.5e-3, -0.5e-3, 3.5e-3])
@pytest.mark.parametrize("stderr", [0.4, 1.9, 2.1, 9.0])
@pytest.mark.parametrize("total", [-4.0, 4.0])
def test_headline_agrees_with_the_check_of_the_sign(
    total: float, stderr: float, measured: float | None, tmp_path: Path
) -> None:
    first = headline(run_with(tmp_path, total, stderr, measured))
    [check] = [finding for finding in first.findings if finding.name == "Sign of the total"]
    assert first.sentence.startswith("E does not determine") == (check.level == "attention")


@pytest.mark.parametrize(("spoils", "name"), [({"residual": 9.0}, "Identity"), ({"off_policy": 0.3}, "Policy of E")])
def test_headline_begins_with_a_failed_essential_check(spoils: dict[str, float], name: str, tmp_path: Path) -> None:
    first = headline(run_with(tmp_path, -4.0, 0.5, -3.5e-3, **spoils))
    assert first.sentence.startswith(f"Do not trust these figures ({name}). This step lowers")
    assert first.findings[0].name == name, "the gravest check is the first"


def test_headline_omits_measurement_when_ess_is_small(tmp_path: Path) -> None:
    first = headline(run_with(tmp_path, -4.0, 0.5, 3.5e-3, ess=2.0))
    assert first.sentence.startswith("This step lowers")
    assert "measured" not in first.sentence
    assert [change.name for change in first.changes][-1].startswith("measured"), "the table has it, with its check"


def test_headline_and_page_list_predicted_and_measured(tmp_path: Path) -> None:
    results = run_with(tmp_path, -4.0, 0.5, -3.5e-3, second_order=900.0, in_this_step={"total": -4e-3}, step=1)
    changes = {change.name: (change.value, change.stderr) for change in headline(results).changes}
    assert changes["predicted, first order"] == (pytest.approx(-4e-3), pytest.approx(5e-4))
    assert changes["predicted, second order"] == (pytest.approx(-4e-3 + 900 * LR**2 / 2), None)
    assert changes["measured, importance sampling"] == (-3.5e-3, 5e-4)
    console = Console(width=100, file=io.StringIO())
    with console.capture() as captured:
        print_run(results, console)
    text, page = captured.get(), report_page(results, figures=False)
    sentence = headline(results).sentence
    assert sentence in text
    assert f"<h1>{sentence.replace(chr(39), '&#39;')}</h1>" in page
    for figure in ("-4.000e-03", "-3.550e-03", "-3.500e-03"):
        assert text.index(figure) < text.index("What the step does")
    first_screen = page[: page.index('<section id="explorer"')]
    cells = re.findall(r'row">(predicted[^<]*|measured)</th>.*?</td>\s*<td>([^<]*)</td>', first_screen, re.DOTALL)
    assert "10⁻³ nats per token" in first_screen
    values = {name: float(text.replace("−", "-")) for name, text in cells}
    expected = {"predicted, first order": -4.0, "predicted, second order": -3.55, "measured": -3.5}
    assert values == pytest.approx(expected, abs=1e-3)


def test_step_terms_add_up_to_the_total(tmp_path: Path) -> None:
    results: EntropyInfluenceResults = run_with(tmp_path, -4.0, 0.5, None, unattributed=-0.75)
    rows = {term.name: term.value for term in step_terms(results.summary)}
    terms = ("momentum", "weight decay", "all rollouts", "unattributed")
    assert sum(rows[name] for name in terms) == pytest.approx(rows["total"])
    assert "unattributed" not in {term.name for term in step_terms({**results.summary, "unattributed": 0.0})}


def test_headline_of_a_cross_fitted_step_is_that_of_the_ledger(tmp_path: Path) -> None:
    """Importance sampling on all rollouts has what they do through their own prompts, which is no evidence."""
    logged = {"total": -4e-3, "measured": -3.9e-3}
    first = headline(run_with(tmp_path, -4.0, 0.5, -9e-3, in_this_step=logged))
    assert (first.changes[-1].value, first.changes[-1].stderr) == (-3.9e-3, 5e-4)
    assert "by 0.00390 ± 0.00050 as measured" in first.sentence
