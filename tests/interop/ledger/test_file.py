"""The ledger's file: lines that are complete or ignored, at any cut; resumptions; damage."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from fx_influence.interop.ledger.file import LEDGER, append_entry, read_ledger
from fx_influence.interop.runtime.run_files import RunDirectoryError

ROOT = Path(__file__).parents[3]


def steps(directory: Path) -> list[int]:
    return [entry["step"] for entry in read_ledger(directory)]


def test_entries_come_back_as_they_were_appended(tmp_path: Path) -> None:
    entries = [{"step": k, "figures": {"total": -0.1 / k}, "text": "</script> \ud800 \u202e\n"} for k in (1, 2, 3)]
    for entry in entries:
        append_entry(tmp_path / "new" / "steps", entry)
    assert read_ledger(tmp_path / "new" / "steps") == entries
    assert len((tmp_path / "new" / "steps" / LEDGER).read_bytes().splitlines()) == 3


def test_figures_that_are_not_finite_are_null(tmp_path: Path) -> None:
    append_entry(tmp_path, {"step": 1, "figures": {"a": math.nan, "b": math.inf}, "sums": {"x": [["y", math.nan]]}})
    assert read_ledger(tmp_path) == [{"step": 1, "figures": {"a": None, "b": None}, "sums": {"x": [["y", None]]}}]


def test_ledger_cut_at_any_byte_has_the_complete_lines(tmp_path: Path) -> None:
    """A process that is killed while it writes leaves any beginning of its line; the next append removes it."""
    for k in (1, 2):
        append_entry(tmp_path, {"step": k, "figures": {"total": -0.5}})
    data = (tmp_path / LEDGER).read_bytes()
    first = data.index(b"\n") + 1
    for end in range(first, len(data)):
        (tmp_path / LEDGER).write_bytes(data[:end])
        assert steps(tmp_path) == [1]
        append_entry(tmp_path, {"step": 2, "figures": {"total": -0.5}})
        assert (tmp_path / LEDGER).read_bytes() == data


def test_killed_writer_leaves_a_readable_ledger(tmp_path: Path) -> None:
    """The writer is killed by SIGKILL while it appends, and read while it does."""
    code = (
        "import sys; from pathlib import Path; from fx_influence.interop.ledger.file import append_entry\n"
        "for k in range(1, 10**6): append_entry(Path(sys.argv[1]), {'step': k, 'text': 'x' * 20_000}); print(k)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        acknowledged = 0
        for _ in range(20):
            acknowledged = int(writer.stdout.readline())
            assert len(steps(tmp_path)) >= acknowledged
        writer.kill()
    present = steps(tmp_path)
    assert present == list(range(1, len(present) + 1))
    assert len(present) >= acknowledged
    append_entry(tmp_path, {"step": len(present) + 1})
    assert steps(tmp_path) == [*present, len(present) + 1]


def test_resumed_steps_replace_those_given_up(tmp_path: Path) -> None:
    """Resumed from step 25, a run that had reached 40 measures 30 again; its former steps 30 and 40 are given up."""
    for k, name in ((10, "a"), (20, "a"), (30, "a"), (40, "a"), (30, "b"), (30, "c"), (50, "c")):
        append_entry(tmp_path, {"step": k, "name": name})
    assert [(entry["step"], entry["name"]) for entry in read_ledger(tmp_path)] == [
        (10, "a"),
        (20, "a"),
        (30, "c"),
        (50, "c"),
    ]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"step": 0}', '{"step": true}', "\\xff", ""])
def test_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    append_entry(tmp_path, {"step": 1})
    with open(tmp_path / LEDGER, "a", encoding="utf-8") as file:
        file.write(f"{line}\n{json.dumps({'step': 2})}\n")
    with pytest.raises(RunDirectoryError, match=r"line 2 of .* is damaged"):
        read_ledger(tmp_path)


def test_missing_ledger_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"expected the ledger of a training run\. Name the directory"):
        read_ledger(tmp_path)


@pytest.mark.parametrize("step", [0, -1, True, None, 1.5])
def test_entry_without_a_step_is_refused(tmp_path: Path, step: object) -> None:
    with pytest.raises(ValueError, match=r"step is .*; expected a number from 1"):
        append_entry(tmp_path, {"step": step})
    assert not (tmp_path / LEDGER).exists()
