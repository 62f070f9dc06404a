"""``fx-influence watch``: the lines of a ledger, while it grows; hostile texts stay inert in the terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.made_trainings import made_entry, write_made_ledger
from rich.console import Console

from fx_influence.interop.ledger.file import append_entry
from fx_influence.lab.cli import main
from fx_influence.lab.training.watch import watch_training


def test_watch_prints_steps_and_account_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_made_ledger(tmp_path, 3, every=10)
    assert main(["watch", str(tmp_path), "--once"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^step (\d+) ", out, flags=re.MULTILINE) == ["10", "20", "30"]
    assert "The 3 measured steps of 30 (10%)" in out
    for words in ("The account", "momentum", "unexplained", "A<0 unlikely", "Sources"):
        assert words in out


def test_watch_escapes_hostile_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = made_entry(1, np.random.default_rng(0), 0.8)
    entry["sums"]["source"] = [["\x1b[31m[bold]\u202e</b>", -1e-3, 1e-5, 4, 1.0]]
    append_entry(tmp_path, entry)
    assert main(["watch", str(tmp_path), "--once"]) == 0
    out = capsys.readouterr().out
    assert "\\x1b[31m[bold]\\u202e</b>" in out
    assert not re.search("[\x1b\u202e]", out)


def test_watch_follows_the_file(tmp_path: Path) -> None:
    """Steps are printed as they are added, once each, and a check where it begins to need attention."""
    write_made_ledger(tmp_path, 2)
    out, rng, added = io.StringIO(), np.random.default_rng(5), iter([3, None, 4, 3])

    def wait() -> None:
        step = next(added, 0)
        if step == 0:
            raise KeyboardInterrupt
        if step is not None:
            entry = made_entry(step, rng, 0.5)
            entry["figures"]["conditioning"] = 0.9
            append_entry(tmp_path, entry)

    with pytest.raises(KeyboardInterrupt):
        watch_training(tmp_path, Console(file=out, width=160), wait=wait)
    text = out.getvalue()
    assert re.findall(r"^step (\d+) ", text, flags=re.MULTILINE) == ["1", "2", "3", "4", "3"]
    assert text.count("! Conditioning: ") == 1
