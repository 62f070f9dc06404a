"""Tables at the widths of terminals: numbers and names are complete, and no line is too wide."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.synthetic_runs import synthetic_run
from rich.cells import cell_len
from rich.console import Console

from fx_influence.lab.analysis.analyze import analysis_tables, analyze
from fx_influence.lab.console.column_table import Column, ColumnTable
from fx_influence.lab.console.run_tables import print_run
from fx_influence.lab.report.blobs import unpack
from fx_influence.lab.report.data import explorer_blobs
from fx_influence.lab.results import EntropyInfluenceResults

WIDTHS = (60, 80, 100, 120, 160)
LONG_ID = "hotpotqa/validation/5a7166395542994082a3e814/0000000012345678901234567/31"
HOSTILE = "漢字仮名交じり文の長い問題文である" * 8 + "\x1b[31m\u202e\ud800[bold]"


def printed(table: object, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as captured:
        console.print(table)
    return captured.get().splitlines()


def cells(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]


def extreme_run(path: Path) -> EntropyInfluenceResults:
    """Return a run with influences from 1e-150 to 1e150, ids of 70 characters, wide and control characters in texts."""
    results = synthetic_run(path)
    sizes = 10.0 ** np.linspace(-150, 150, len(results.sequences)) * np.resize([1.2345678, -1.2345678], 48)
    records = [
        {
            **record,
            "id": f"{LONG_ID}-{i:03d}",
            "prompt": HOSTILE,
            "completion": f"{HOSTILE}{i}",
            "tokens": [HOSTILE] * len(record["tokens"]),
            "influence": float(size),
            "stderr": abs(float(size)) / 3,
        }
        for i, (record, size) in enumerate(zip(results.sequences, sizes, strict=True))
    ]
    [evaluation] = results.evaluations
    arrays = {**evaluation.arrays, "per_sequence": sizes, "stderr": np.abs(sizes) / 3}
    logged = {"total": -1.25e-12, "measured": -3.5e-101}
    more = {"sum_per_sequence": 1.5e-12, "step": 3, "in_this_step": logged, "residual": 0.0, "entropy": 1.0}
    more |= {"update_rollouts": 48, "trainable_parameters": 10, "seconds": 1.0, "peak_memory_bytes": 2**20}
    per_parameter = {f"base_model.model.layers.{k}.self_attn.q_proj.lora_A.default.weight": 1e-9 / k for k in (1, 2)}
    summary = {**evaluation.summary, **more, "total": -1.25e-9, "per_parameter": per_parameter}
    return dataclasses.replace(
        results,
        sequences=records,
        summary={**results.summary, **summary},
        evaluations=(dataclasses.replace(evaluation, arrays=arrays, summary=summary),),
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_column_table_keeps_numbers_and_names(width: int) -> None:
    numbers = [f"{10.0**k:+.5e}" for k in (-300, -7, 0, 7, 300)]
    names = [f"{LONG_ID}-{k}" for k in range(5)]
    columns = [Column("id", "name"), Column("text", "text"), *(Column(f"a number {k}") for k in range(8))]
    content = [(name, HOSTILE, *[number] * 8) for name, number in zip(names, numbers, strict=True)]
    lines = printed(ColumnTable("Figures", columns, content), width)
    rows = cells(lines)
    assert max(map(cell_len, lines)) <= width
    for number in numbers:
        assert sum(row.count(number) for row in rows) == 8, "in eight columns, none cut or folded"
    joined, tables = "".join(row[0] for row in rows), sum(line.startswith("┏") for line in lines)
    assert [joined.count(name) for name in names] == [tables] * 5, "each table names every row in full"


@pytest.mark.parametrize("width", WIDTHS)
def test_print_run_fits_the_terminal(width: int, tmp_path: Path) -> None:
    results = extreme_run(tmp_path)
    console = Console(width=width, file=io.StringIO())
    with console.capture() as captured:
        print_run(results, console)
    page = captured.get()
    boxed = [line for line in page.splitlines() if line[:1] in "┏┃┡│└"]
    assert boxed
    assert max(map(cell_len, boxed)) <= width
    printed_cells = {cell for row in cells(boxed) for cell in row}
    for sign in (-1, 1):
        strongest = sorted(
            (r for r in results.sequences if r["influence"] * sign > 0), key=lambda r: -abs(r["influence"])
        )
        for record in strongest[:10]:
            assert f"{record['influence']:+.4g} ± {record['stderr']:.2g}" in printed_cells
            assert f"{record['influence'] * 1e-3:+.2e}" in printed_cells
            assert record["id"] in "".join(row[0] for row in cells(boxed))
    assert "+1.5e-12" in printed_cells
    assert not any(c in page for c in ("\x1b", "\u202e", "\ud800"))


def test_analysis_tables_fit_the_terminal(tmp_path: Path) -> None:
    tables = analysis_tables(analyze(extreme_run(tmp_path)))
    for table, width in itertools.product(tables, WIDTHS):
        lines = printed(table, width)
        assert max(map(cell_len, lines)) <= width
        assert not any("…" in line for line in lines), "no number or name is cut"


def test_column_without_content_is_left_out() -> None:
    table = ColumnTable("", [Column("id", "name"), Column("never"), Column("one")], [("a", "", "1"), ("b", "", "")])
    assert cells(printed(table, 80)) == [["a", "1"], ["b", ""]]


def test_print_run_lists_rollouts_by_sign_of_influence(tmp_path: Path) -> None:
    """The table of rollouts that raise the entropy has fewer than ten rows if fewer raise it."""
    results = extreme_run(tmp_path)
    for raising in (3, 0):
        sizes = np.where(np.arange(48) < raising, 1.0, -1.0) * np.linspace(1, 2, 48)
        records = [{**r, "influence": float(x)} for r, x in zip(results.sequences, sizes, strict=True)]
        [evaluation] = results.evaluations
        arrays = {**evaluation.arrays, "per_sequence": sizes}
        changed = dataclasses.replace(
            results, sequences=records, evaluations=(dataclasses.replace(evaluation, arrays=arrays),)
        )
        console = Console(width=160, file=io.StringIO())
        with console.capture() as captured:
            print_run(changed, console)
        page = captured.get()
        lower, _, rest = page.partition("Rollouts that LOWER")[2].partition("RAISE")
        tokens = rest.partition("Strongest tokens")[0]
        assert len(re.findall(r"│ +-\S+ ± ", lower)) == 10
        assert not re.findall(r"│ +\+\S+ ± ", lower)
        assert len(re.findall(r"│ +\+\S+ ± ", tokens)) == raising
        assert not re.findall(r"│ +-\S+ ± ", tokens)
        assert ("No rollout RAISES the entropy." in page) == (not raising)


def test_tables_and_page_show_a_conversations_question(tmp_path: Path) -> None:
    run = extreme_run(tmp_path)
    template = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    questions = [f"{i} apples?" for i in range(48)]
    records = [
        {**record, "prompt": template + question, "question": question}
        for record, question in zip(run.sequences, questions, strict=True)
    ]
    [evaluation] = run.evaluations
    rollouts = [dataclasses.replace(r, prompt=template + "pears?", question="pears?") for r in evaluation.rollouts]
    evaluations = (dataclasses.replace(evaluation, rollouts=rollouts),)
    run = dataclasses.replace(run, sequences=records, evaluations=evaluations)
    console = Console(width=80, file=io.StringIO())
    with console.capture() as captured:
        print_run(run, console)
    assert "apples?" in captured.get()
    assert "im_start" not in captured.get()
    blobs = explorer_blobs(run)
    prompts = json.loads(unpack(blobs["index"]))["prompts"]
    assert {prompt["asked"] for prompt in prompts} == set(questions)
    assert all(prompt["text"].startswith(template) for prompt in prompts), "an opened rollout shows all of it"
    assert {text["prompt"] for text in json.loads(unpack(blobs["affected-0"]))["texts"]} == {"pears?"}
