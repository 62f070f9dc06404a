"""A Fisher run continues where it was interrupted; its directory is read back, printed, or refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.run_files import FISHER_PLAN, kill_and_resume, stored_bytes, write_plan

from fx_influence.lab.cli import main
from fx_influence.lab.fisher import run as fisher_module
from fx_influence.lab.fisher.results import FisherKernelResults


@pytest.mark.slow
def test_run_fisher_continues_with_the_same_bytes(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, real, calls = tmp_path / "out", fisher_module.kernel, []

    def interrupted(*args: Any) -> np.ndarray:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(fisher_module, "kernel", interrupted)
    command = ["fisher", str(finished / "plan.yaml"), "--out", str(out)]
    assert main(command) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert (out / "eval_00.json").exists()
    assert not (out / "eval_01.json").exists()
    assert main(["report", str(out)]) == 1
    message = "has no summary.json; expected a finished run of that kind. Finish it with the command"
    assert message in capsys.readouterr().err
    assert main(command) == 0
    assert len(calls) == 3, "the first evaluation was measured once"
    assert stored_bytes(out) == stored_bytes(finished)


@pytest.mark.slow
def test_run_fisher_does_not_recompute_finished_run(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher_module, "measure_step", lambda *args: pytest.fail("computed again"))
    before = (finished / "summary.json").read_bytes()
    assert main(["fisher", str(finished / "plan.yaml"), "--out", str(finished)]) == 0
    assert (finished / "summary.json").read_bytes() == before


def test_run_fisher_rejects_directory_of_another_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fisher", str(finished / "plan.yaml"), "--seed", "9", "--out", str(finished)]) == 1
    assert (
        "holds a run of another plan; expected one of this plan, or nothing. Choose another --out"
        in capsys.readouterr().err
    )
    entropy = {name: value for name, value in FISHER_PLAN.items() if name != "top"}
    (tmp_path / "entropy.yaml").write_text(yaml.safe_dump(entropy))
    assert main(["run", str(tmp_path / "entropy.yaml"), "--out", str(finished)]) == 1
    assert (
        "holds a run of another plan; expected one of this plan, or nothing. Choose another --out"
        in capsys.readouterr().err
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    assert main(["fisher", write_plan(tmp_path, FISHER_PLAN), "--out", str(tmp_path / "mine")]) == 1
    assert "is not a run directory; expected one, or nothing. Choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["eval_00_kernel.npy", "eval_01_delta_logprob_matrix.npy", "update_self_kernel.npy", "eval_00.npz"]
)
def test_report_rejects_damaged_fisher_file(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    change = bytearray((copy / name).read_bytes())
    change[len(change) // 2] ^= 1
    (copy / name).write_bytes(change)
    assert main(["report", str(copy)]) == 1
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top": 0}, r"top is 0; expected at least 1 rollout"),
        ({"preconditioner": "kfac"}, r"preconditioner is 'kfac'"),
        ({"estimator": "sequence"}, r"estimator is 'sequence'; expected one of the fields .* preconditioner, top"),
        ({"checkpoint": "absent"}, r"absent"),
    ],
)
def test_run_fisher_rejects_bad_plans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, message: str
) -> None:
    assert main(["fisher", write_plan(tmp_path, FISHER_PLAN, **changes), "--out", str(tmp_path / "out")]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_print_fisher_shows_changes_in_nats_per_step(
    finished: Path, results: FisherKernelResults, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(finished)]) == 0
    page, lr = capsys.readouterr().out, results.summary["lr"]
    for e in results.evaluations:
        assert f"{e.summary['largest_abs_predicted_delta_logprob'] * lr:.3e}" in page
    most_moved = max(results.evaluations[0].top, key=lambda r: abs(r["predicted_delta_logprob"]))
    least = min(results.evaluations[0].top, key=lambda r: abs(r["predicted_delta_logprob"]))
    first, last = (f"{r['predicted_delta_logprob'] * lr:+.2e}" for r in (most_moved, least))
    assert page.index(first) < page.index(last)
    strongest = most_moved["contributors"][0]
    row = next(line for line in page.splitlines() if most_moved["completion"] in line and strongest["id"] in line)
    assert f"{most_moved['predicted_delta_logprob'] * lr:+.2e}" in row
    assert f"{strongest['contribution'] * lr:+.2e}" in row


def test_fisher_report_prints_hostile_text_literally(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    records = [json.loads(line) for line in (copy / "eval_00_top.jsonl").read_text().splitlines()]
    for record in records:
        record["prompt"] = "[red]p[/red]\x1b]0;title\x07"
        record["contributors"][0]["completion"] = "[bold]x\x1b[31m\u202e\ud800"
    (copy / "eval_00_top.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert main(["report", str(copy)]) == 0
    page = capsys.readouterr().out
    assert "[red]p[/red]\\x1b]0;title\\x07" in page
    assert "[bold]x\\x1b[31m\\u202e\\ud800" in page
    assert not any(c in page for c in ("\x1b]", "\x1b[31m", "\u202e", "\x07"))


def test_fisher_default_directory_is_named_after_plan(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "runs" / "plan-fisher")
    assert main(["fisher", write_plan(tmp_path, FISHER_PLAN)]) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["plan-fisher"]


@pytest.mark.slow
def test_run_fisher_same_bytes_when_killed_at_random(finished: Path, tmp_path: Path) -> None:
    assert kill_and_resume("fisher", finished / "plan.yaml", tmp_path / "out", 4) == stored_bytes(finished)
