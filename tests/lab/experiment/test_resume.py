"""A run repeats, continues where it was interrupted, and refuses a directory of another."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.run_files import ENTROPY_PLAN, TIMES, kill_and_resume, read_summary, stored_bytes, write_plan

from fx_influence.interop.rollouts.native_format import read_native_rollouts
from fx_influence.lab import store
from fx_influence.lab.cli import main
from fx_influence.lab.experiment import entropy as run_module
from fx_influence.lab.inputs import rollouts as batches


@pytest.mark.slow
def test_run_repeats_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    stored = str(finished / "plan.yaml")
    assert main(["run", stored, "--out", str(tmp_path / "again")]) == 0
    names = sorted(path.name for path in finished.iterdir())
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == names
    for name in set(names) - {"report"}:
        if name == "summary.json":
            ours, theirs = read_summary(finished), read_summary(tmp_path / "again")
            assert {k: v for k, v in ours.items() if k not in TIMES} == {
                k: v for k, v in theirs.items() if k not in TIMES
            }
        else:
            assert (finished / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


@pytest.mark.slow
def test_run_gives_other_rollouts_with_another_seed(finished: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, ENTROPY_PLAN, evaluations=ENTROPY_PLAN["evaluations"][1:], eta_multiples=[1.0])
    assert main(["run", plan, "--seed", "2", "--out", str(tmp_path / "out")]) == 0
    assert yaml.safe_load((tmp_path / "out" / "plan.yaml").read_text())["seed"] == 2
    ours, theirs = (read_native_rollouts(d / "update_rollouts.jsonl") for d in (finished, tmp_path / "out"))
    assert [r.completion for r in ours] != [r.completion for r in theirs]


@pytest.mark.slow
def test_run_continues_without_redoing_evaluations(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    real, calls = run_module.evaluate, []

    def interrupted(*args: Any) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(run_module, "evaluate", interrupted)
    assert main(["run", str(finished / "plan.yaml"), "--out", str(out)]) == 130
    assert (out / "eval_00.npz").exists()
    assert not (out / "summary.json").exists()
    assert main(["report", str(out)]) == 1
    assert main(["run", str(finished / "plan.yaml"), "--out", str(out)]) == 0
    assert len(calls) == 3
    for name in ("eval_00.npz", "eval_01.npz", "update_sequences.jsonl", "eval_01_delta_matrix.npy"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.slow
def test_run_continues_from_every_write(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is interrupted before every single write in turn; what was written is never computed again."""
    out, real, written, resumed = tmp_path / "out", store.RunDirectory._store, [], 0
    monkeypatch.setattr(batches, "ROLLOUTS_PER_TASK", 8)

    def interrupted(directory: store.RunDirectory, name: str, write: Callable[[str], object]) -> None:
        if name not in allowed:
            allowed.add(name)
            raise KeyboardInterrupt
        written.append(name)
        real(directory, name, write)

    monkeypatch.setattr(store.RunDirectory, "_store", interrupted)
    allowed: set[str] = {"plan.yaml"}
    while main(["run", str(finished / "plan.yaml"), "--out", str(out)]) == 130:
        resumed += 1
    assert resumed == len(allowed) - 1
    assert {"eval_00_block_00001.npz", "eval_01_first_order_00000.npz", "step_gradient.safetensors"} < allowed
    assert {"update_rollouts_00002.jsonl", "eval_00_rollouts_00001.jsonl"} < allowed
    results = [name for name in written if re.search(r"_block_|_first_order_|_rollouts|step_gradient", name)]
    assert len(results) == len(set(results)), "a result was measured twice"


@pytest.mark.slow
def test_run_stores_same_bytes_when_killed_at_random(finished: Path, tmp_path: Path) -> None:
    assert kill_and_resume("run", finished / "plan.yaml", tmp_path / "out", 4) == stored_bytes(finished)


def test_run_does_not_recompute_finished_run(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "measure_step", lambda *args: pytest.fail("computed again"))
    before = (finished / "summary.json").read_bytes()
    assert main(["run", str(finished / "plan.yaml"), "--out", str(finished)]) == 0
    assert (finished / "summary.json").read_bytes() == before


def test_run_rejects_directory_of_another_plan(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    assert main(["run", write_plan(tmp_path, ENTROPY_PLAN), "--seed", "9", "--out", str(copy)]) == 1
    assert (
        "holds a run of another plan; expected one of this plan, or nothing. Choose another --out"
        in capsys.readouterr().err
    )
    assert (copy / "summary.json").read_bytes() == (finished / "summary.json").read_bytes()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    assert main(["run", write_plan(tmp_path, ENTROPY_PLAN), "--out", str(tmp_path / "mine")]) == 1
    assert "is not a run directory; expected one, or nothing. Choose another --out" in capsys.readouterr().err


@pytest.mark.slow
def test_run_stores_its_own_thread_count(finished: Path, tmp_path: Path) -> None:
    """Small models run on one thread, so that a run continued by a process with more ends with the same bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert main(["run", str(finished / "plan.yaml"), "--out", str(tmp_path / "out")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert stored_bytes(tmp_path / "out") == stored_bytes(finished)
