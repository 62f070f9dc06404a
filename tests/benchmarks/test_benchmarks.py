"""Benchmarks: their tables are those of the stored figures, and every one works on a tiny problem."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.__main__ import main, module, modules
from benchmarks.costs import bench_large_models
from benchmarks.evidence import bench_four_numbers, bench_linearity
from benchmarks.harness import COSTS, EVIDENCE, RESULTS, ROOT, result_path, tables_of, with_block
from benchmarks.versions import SETS

NAMES = list(modules())
STORED = [name for name in NAMES if result_path(name).exists()]


@pytest.mark.parametrize("name", STORED)
def test_tables_match_the_stored_figures(name: str) -> None:
    tables = tables_of(module(name), json.loads(result_path(name).read_text(encoding="utf-8")))
    assert tables
    for path, blocks in tables.items():
        page = path.read_text(encoding="utf-8")
        for mark, text in blocks.items():
            assert with_block(page, mark, text) == page
            assert text in page


@pytest.mark.parametrize("page", [COSTS, EVIDENCE], ids=["costs", "evidence"])
def test_pages_have_marks_of_stored_benchmarks_only(page: Path) -> None:
    marks = re.findall(r"begin: bench_(\w+)", page.read_text(encoding="utf-8"))
    assert {mark.removesuffix("_appendix") for mark in marks} <= set(STORED)
    assert len(set(marks)) == len(marks)


def test_with_block_rejects_a_page_without_marks() -> None:
    with pytest.raises(ValueError, match="page has no marks routes; expected"):
        with_block("# A page", "routes", "| a |")


def test_costs_page_states_the_stored_cost_of_the_large_run() -> None:
    report = json.loads(result_path("run_entropy_influence_large").read_text(encoding="utf-8"))
    entropy, fisher = (report["runs"][name] for name in ("entropy_influence", "fisher_kernel"))
    memory = {name: f"{run['peak_memory_bytes'] / 2**20:.0f} MiB" for name, run in report["runs"].items()}
    text = " ".join(COSTS.read_text(encoding="utf-8").split())
    assert f"{report['pairs']:,} pairs, took {entropy['seconds']:.0f} s and {memory['entropy_influence']}" in text
    assert f"the Fisher run {fisher['seconds']:.0f} s and {memory['fisher_kernel']}" in text


def test_large_models_follow_from_the_stored_figures() -> None:
    """The table is of the bytes and rates as they are stored now, and 1.5B fits on one GPU beside its training."""
    stored = json.loads(result_path(bench_large_models.NAME).read_text(encoding="utf-8"))
    assert stored == bench_large_models.report()
    smallest = stored["table"][0]
    assert (smallest["model"], smallest["gpus"], smallest["how"]) == ("1.5B", 1, "replicated")
    assert max(smallest["gigabytes"].values()) < stored["assumed"]["memory"] / 1e9


def test_four_numbers_follow_from_the_stored_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are of the other results as they are stored now, with rows of a pretrained model where it is stored."""
    stored = json.loads(result_path(bench_four_numbers.NAME).read_text(encoding="utf-8"))
    assert stored == bench_four_numbers.report(), "run python -m benchmarks four_numbers"
    real = json.loads(result_path("cross_fitting").read_text(encoding="utf-8"))
    real["summary"] = [{**row, "policy": "pretrained"} for row in real["summary"] if row["policy"] == "demo"]
    real["runs"] = [{"policy": "pretrained", "found": []}]
    (tmp_path / "real.json").write_text(json.dumps(real), encoding="utf-8")
    monkeypatch.setattr(
        bench_four_numbers,
        "result_path",
        lambda name: tmp_path / "real.json" if name == "real_cross_fitting" else result_path(name),
    )
    rows = [line for line in bench_four_numbers.markdown(bench_four_numbers.report()).splitlines() if "pret" in line]
    assert [row.split(" | ")[1] for row in rows] == ["pretrained, 32"] * 3


def test_main_lists_benchmarks_and_names_an_unknown_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert listed == set(NAMES)
    assert listed >= {"linearity", "loops", "memory", "precision", "routes", "trl_run", "trl_steps"}
    assert main(["nothing"]) == 1
    assert f"NAME is 'nothing'; expected all, or one of {', '.join(NAMES)}" in capsys.readouterr().err


def test_versions_leave_out_tests_that_exist() -> None:
    """A renamed test would otherwise run again where it is known to fail."""
    for chosen in SETS.values():
        for test in (test for tests in chosen.left_out.values() for test in tests):
            path, _, name = test.partition("::")
            assert (ROOT / path).is_file(), test
            function = name.partition("[")[0]
            assert not function or f"def {function}(" in (ROOT / path).read_text(encoding="utf-8"), test


@pytest.mark.slow
def test_linearity_benchmark_works_on_a_small_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_linearity.main(["--quick", "--out", str(tmp_path / "run")]) == 0
    page = capsys.readouterr().out
    assert "R² of the whole step's ΔH against η" in page
    assert "one direction at a time" in page


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "linearity"])
def test_quick_benchmark_works_and_writes_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    stored = {path: path.read_bytes() for path in RESULTS.iterdir()}
    assert main([name, "--quick"]) == 0
    page = capsys.readouterr().out
    assert sum(line.startswith("|") for line in page.splitlines()) >= 3, "a table with at least one row of figures"
    assert "nan" not in page
    assert {path: path.read_bytes() for path in RESULTS.iterdir()} == stored
