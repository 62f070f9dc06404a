"""Run the command line under torchrun: equal results, faults of one process, and continuing afterwards."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import launch, run_on_ranks
from helpers.run_files import read_summary, stored_bytes, write_plan
from helpers.tolerances import assert_close_to_rounding

import fx_influence as fx
from fx_influence.interop.runtime.job import picklable_error
from fx_influence.lab.cli import main
from fx_influence.lab.plan import DEMO_DIRECTORY

PLAN: dict[str, Any] = {
    "update": {"prompts": "demo/train", "num_prompts": 5, "completions_per_prompt": 4},
    "evaluations": [{"prompts": "demo/eval", "num_prompts": 2, "completions_per_prompt": 40}],
    "directions": ["full", "grad"],
    "eta_multiples": [1.0],
    "scaled_eta_multiples": [],
    "sequences_per_block": 3,
}
BLOCKS = 4
"""Number of blocks of rollouts in the sweep."""
BLOCK = "a block of rollouts is measured"
"""Line that a rank prints as it begins with a block."""
FISHER = {
    "dtype": "float64",
    "update": {"prompts": "demo/train", "num_prompts": 3, "completions_per_prompt": 4},
    "evaluations": [{"prompts": "demo/eval", "num_prompts": 4, "completions_per_prompt": 2}],
    "sequences_per_block": 3,
}


@pytest.fixture(autouse=True)
def launchers_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the launcher, which leaves an empty folder for each job, a temporary folder."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("plan")
    shutil.copytree(DEMO_DIRECTORY, folder / "other")
    prompts = folder / "other" / "eval_prompts.jsonl"
    prompts.write_text(prompts.read_text() + '{"prompt": "1+1=", "answer": "2"}\n')
    return write_plan(folder, PLAN)


@pytest.fixture(scope="module")
def alone(plan: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("alone") / "out"
    assert main(["run", plan, "--out", str(out)]) == 0
    return of_any_job(out)


def of_any_job(out: Path) -> dict[str, bytes]:
    """Return the bytes that a run stores, whatever the number of processes that finished it."""
    files = stored_bytes(out)
    return {**files, "summary.json": json.dumps({**json.loads(files["summary.json"]), "ranks": 1}).encode()}


def partial_results(out: Path) -> dict[str, tuple[bytes, int]]:
    """Return the rollouts and blocks that are stored, and when they were written."""
    files = [*out.glob("*_rollouts.jsonl"), *out.glob("*_first_order_*"), *out.glob("*_block_*")]
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


@pytest.mark.slow
def test_run_on_two_processes_stores_the_bytes_of_one(plan: str, alone: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = launch(2, "ranks_run.py", "nothing", "run", plan, "--out", out)
    assert done.returncode == 0, done.stdout
    assert read_summary(out)["ranks"] == 2
    assert done.stdout.count(BLOCK) == BLOCKS, "shared, not repeated"
    assert of_any_job(out) == alone
    for line in ("Stored in", "The page with every rollout and token", "finite steps 5/5"):
        assert done.stdout.count(line) == 1, done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tmp"]


@pytest.mark.slow
def test_run_continues_on_other_ranks_after_kill(plan: str, alone: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = launch(2, "ranks_run.py", "killed", "run", plan, "--out", out)
    assert done.returncode == 1
    assert "Signal 9 (SIGKILL)" in done.stdout.partition("Root Cause")[2]
    before = partial_results(out)
    assert {"eval_00_block_00000.npz", "eval_00_block_00001.npz"} <= before.keys()
    assert not list(out.glob("*_block_00003*"))
    again = launch(3, "ranks_run.py", "nothing", "run", plan, "--out", out)
    assert again.returncode == 0, again.stdout
    assert again.stdout.count(BLOCK) == BLOCKS - 1, "but for the whole step's block the first alone was stored"
    assert of_any_job(out) == alone
    for name in ("update_rollouts.jsonl", "eval_00_rollouts.jsonl"):
        assert (out / name).stat().st_mtime_ns == before[name][1], "sampled again"


@pytest.mark.slow
def test_run_ends_all_ranks_and_reports_the_failing_one(plan: str, alone: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = launch(2, "ranks_run.py", "failing", "run", plan, "--out", out)
    assert done.returncode == 1
    report = done.stdout.partition("Root Cause")[2]
    assert "RuntimeError: the device is on fire" in report
    assert "rank      : 1" in report
    assert "eval_00_block_00001.npz" in partial_results(out)
    assert main(["run", plan, "--out", str(out)]) == 0
    assert of_any_job(out) == alone


@pytest.mark.slow
def test_run_continues_after_launcher_is_interrupted(plan: str, alone: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = launch(2, "ranks_run.py", "interrupted", "run", plan, "--out", out)
    assert done.returncode != 0
    assert done.stdout.count("interrupted; the same command continues where it stopped") == 1, done.stdout
    assert "eval_00_block_00001.npz" in partial_results(out)
    assert main(["run", plan, "--out", str(out)]) == 0
    assert of_any_job(out) == alone


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            "other seed",
            "fx-influence: seed is 0 on rank 0 and 7 on rank 1; expected the same. Give every process the same",
        ),
        ("other prompts", "fx-influence: evaluations[0].prompts is '"),
        ("no plan", "fx-influence: plan file 'absent.yaml' does not exist"),
        ("refusing", "fx-influence: a derivative was lost on the last rank"),
    ],
)
def test_run_fails_on_all_ranks_with_one_message(plan: str, tmp_path: Path, mistake: str, message: str) -> None:
    out = tmp_path / "out"
    done = launch(2, "ranks_run.py", mistake, "run", plan, "--out", out)
    assert done.returncode == 1
    # Progress is told in lines that begin alike and count.
    said = [line for line in done.stdout.splitlines() if re.match(r"fx-influence: (?!.* \d+/\d+)", line)]
    assert len(said) == done.stdout.count(message) == 1, done.stdout
    # The one traceback is the launcher's.
    assert done.stdout.count("Traceback") == 1, done.stdout
    assert out.exists() == (mistake == "refusing"), "a mistake is found before anything is written"


def test_picklable_error_keeps_text_of_unpicklable() -> None:
    class Damaged(Exception):
        """Pickles know no class of a function."""

    told = picklable_error(Damaged("half of a file"))
    assert type(told) is ValueError
    assert str(told) == "Damaged: half of a file"
    known = FileNotFoundError(2, "absent", "plan.yaml")
    assert picklable_error(known) is known


@pytest.mark.slow
def test_run_fisher_in_callers_processes_equals_one(tmp_path: Path) -> None:
    write_plan(tmp_path, FISHER)
    expected = fx.lab.run_fisher(fx.lab.FisherKernelPlan.from_dict(FISHER), tmp_path / "alone").evaluations[0]
    arrays = {**expected.arrays, "kernel": expected.kernel, "matrix": expected.delta_logprob_matrix}
    for answer in run_on_ranks(2, "ranks_fisher.py", tmp_path):
        for measured in answer:
            assert measured.keys() == arrays.keys()
            for name, value in arrays.items():
                size = abs(value if name != "residual" else arrays["predicted_delta_logprob"]).max()
                # Products over all 174 000 parameters.
                assert_close_to_rounding(measured[name], value, terms=200_000, scale=size, name=name)
