"""Faults of the disk leave what is stored as it is, and the error says what to do."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.run_files import stored_bytes
from safetensors.torch import load_file, save_file

from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.runtime.run_files import RunDirectoryError
from fx_influence.lab.cli import main
from fx_influence.lab.experiment import entropy as run_module
from fx_influence.lab.plan import DEMO_DIRECTORY, EntropyInfluencePlan, RolloutFile, read_plan
from fx_influence.lab.results import load_run
from fx_influence.lab.store import RunDirectory

PLAN: dict[str, Any] = {
    "update": {"prompts": "demo/train", "num_prompts": 2, "completions_per_prompt": 4},
    "evaluations": [{"prompts": "demo/eval", "num_prompts": 2, "completions_per_prompt": 2}],
    "directions": ["full", "grad"],
    "eta_multiples": [1.0],
    "scaled_eta_multiples": [],
    "sequences_per_block": 2,
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    path.write_text(yaml.safe_dump(PLAN))
    return str(path)


@pytest.fixture(scope="module")
def finished(plan: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    assert main(["run", plan, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def interrupted_run(plan: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that was interrupted in its sweep, with a block stored."""
    out, real = tmp_path_factory.mktemp("interrupted") / "out", RunDirectory.write_arrays

    def stop(directory: RunDirectory, name: str, arrays: dict) -> None:
        if "block_00002" in name:
            raise KeyboardInterrupt
        real(directory, name, arrays)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "write_arrays", stop)
        assert main(["run", plan, "--out", str(out)]) == 130
    return out


@pytest.fixture
def interrupted(interrupted_run: Path, tmp_path: Path) -> Path:
    """Return a copy of the interrupted run, to be damaged or continued."""
    shutil.copytree(interrupted_run, tmp_path / "out")
    return tmp_path / "out"


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [8, 40, 300])
def test_run_names_full_disk_and_continues_afterwards(
    finished: Path, plan: str, tmp_path: Path, kilobytes: int
) -> None:
    """No file may grow beyond a limit, so that a write fails half way, as on a full disk."""
    out = tmp_path / "out"
    command = f"ulimit -f {kilobytes}; exec {sys.executable} -m fx_influence.lab.cli run {plan} --out {out}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    message = r"fx-influence: (\S+) could not be written in .*out'.*File too large.*Make room"
    file_name = re.search(message, done.stderr)
    assert file_name, done.stderr
    before = contents(out)
    assert "plan.yaml" in before
    assert file_name.group(1) not in before
    assert not [name for name in before if name.endswith(".tmp")]
    assert main(["run", plan, "--out", str(out)]) == 0
    figures = load_run(out).summary
    assert figures["per_parameter"] == load_run(finished).summary["per_parameter"]
    surviving = {name: data for name, data in contents(out).items() if name in before and name != "SHA256SUMS"}
    assert surviving == {name: before[name] for name in surviving}, "what was stored before was not written again"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "eval_00_block_00001.npz",
        "eval_00_first_order_00000.npz",
        "step_gradient.safetensors",
        "step_gradient_norms.npy",
        "update_rollouts.jsonl",
        "eval_00_rollouts.jsonl",
        "plan.yaml",
        "environment.json",
    ],
)
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_run_names_damaged_result_and_overwrites_nothing(
    interrupted: Path, plan: str, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    data = bytearray((interrupted / name).read_bytes())
    data[len(data) // 2] ^= 0xFF
    (interrupted / name).write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    before = contents(interrupted)
    assert main(["run", plan, "--out", str(interrupted)]) == 1
    assert re.search(r"out.* is damaged: .*into another --out", capsys.readouterr().err)
    assert contents(interrupted) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eval_00.npz", "eval_00_delta_matrix.npy", "baseline.safetensors"])
@pytest.mark.parametrize("position", [0.5, 0.99])
def test_load_run_detects_one_wrong_byte(finished: Path, tmp_path: Path, name: str, position: float) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    load_run(copy).baseline()
    data = bytearray((copy / name).read_bytes())
    data[int(position * len(data))] ^= 0x01
    (copy / name).write_bytes(data)
    with pytest.raises(RunDirectoryError, match=r"copy' is damaged: .*Run its plan\.yaml into another --out"):
        load_run(copy).baseline()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["optimizer.pt", "model.safetensors", "prompts.jsonl"])
def test_run_rejects_inputs_changed_since_it_began(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Otherwise one directory would hold finite steps of two training states."""
    shutil.copytree(DEMO_DIRECTORY / "policy", tmp_path / "policy")
    shutil.copy(DEMO_DIRECTORY / "eval_prompts.jsonl", tmp_path / "prompts.jsonl")
    evaluations = [{**PLAN["evaluations"][0], "prompts": "prompts.jsonl"}]
    training = {"checkpoint": "policy", "reward": "fx_influence.interop.rewards:exact_match", "loss": "dr_grpo"}
    values = {**PLAN, **training, "max_new_tokens": 20, "evaluations": evaluations}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values))
    command = ["run", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "first_order", interrupt)
        assert main(command) == 130
    file = tmp_path / ("prompts.jsonl" if what == "prompts.jsonl" else f"policy/{what}")
    original = file.read_bytes()
    if what == "optimizer.pt":
        state = torch.load(file, weights_only=True)
        state["state"][0]["exp_avg"].neg_()
        torch.save(state, file)
    elif what == "model.safetensors":
        save_file({name: 1.001 * x for name, x in load_file(file).items()}, file, {"format": "pt"})
    else:
        file.write_text(file.read_text() + '{"prompt": "1+1=", "answer": "2"}\n')
    before = contents(tmp_path / "out")
    assert main(command) == 1
    assert re.search(rf"{re.escape(what.replace('.jsonl', ''))}.* has changed since", capsys.readouterr().err)
    assert contents(tmp_path / "out") == before
    file.write_bytes(original)
    assert main(command) == 0
    shutil.rmtree(tmp_path / "policy")
    assert main(command) == 0, "a finished run needs its inputs no more"


def interrupt(*args: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("plan.yaml", b"a: ["),
        ("summary.json", b"[]"),
        ("summary.json", b"{"),
        ("eval_00.json", b"[]"),
        ("update_sequences.jsonl", None),
        ("eval_00_rollouts.jsonl", None),
        ("environment.json", b"{}"),
    ],
)
def test_report_rejects_records_that_do_not_fit_arrays(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: bytes | None
) -> None:
    """A damage of None removes the last line."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    lines = (copy / name).read_bytes().splitlines(keepends=True)
    (copy / name).write_bytes(b"".join(lines[:-1]) if damage is None else damage)
    assert main(["report", str(copy)]) == 1
    assert re.search(r"copy' is damaged: ", capsys.readouterr().err)


def test_sha256sums_are_those_of_sha256sum(finished: Path) -> None:
    done = subprocess.run(
        ["sha256sum", "--check", "SHA256SUMS"], cwd=finished, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "eval_00_delta_matrix.npy: OK" in done.stdout


def test_run_leaves_folder_with_a_users_plan_alone(
    plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(plan, tmp_path / "plan.yaml")
    assert main(["run", str(tmp_path / "plan.yaml"), "--out", str(tmp_path)]) == 1
    assert "is not a run directory" in capsys.readouterr().err
    assert contents(tmp_path) == {"plan.yaml": Path(plan).read_bytes()}


@pytest.mark.slow
def test_run_stores_relative_paths_as_absolute(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(finished / "update_rollouts.jsonl", tmp_path / "u.jsonl")
    monkeypatch.chdir(tmp_path)
    plan = dataclasses.replace(load_run(finished).plan, update=RolloutFile("u.jsonl"))
    first = run_module.run(plan, "out")
    assert main(["run", str(tmp_path / "out" / "plan.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert stored_bytes(tmp_path / "again") == stored_bytes(tmp_path / "out")
    assert first.plan.update == RolloutFile(str(tmp_path / "u.jsonl"))


def test_partial_results_are_stored_by_number(tmp_path: Path) -> None:
    directory = RunDirectory.start(tmp_path / "run", EntropyInfluencePlan(), {})
    arrays, rollouts = directory.partial_arrays("block"), directory.partial_rollouts("rollouts")
    arrays[3], arrays[0] = {"x": np.arange(2)}, {}
    rollouts[12] = [Rollout("0/0", "0", 0, "a", "b", (1,), (2,), True, (-0.5,))]
    assert list(arrays) == [0, 3]
    assert list(rollouts) == [12]
    assert arrays[3]["x"].tolist() == [0, 1]
    assert rollouts[12][0].completion_ids == (2,)
    assert 1 not in arrays
    with pytest.raises(KeyError):
        arrays[1]
    arrays.clear()
    assert not list(directory.path.glob("block_*"))
    assert list(rollouts) == [12]


@pytest.mark.slow
def test_run_names_directory_after_plan_without_path(
    plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    value = read_plan(Path(plan), EntropyInfluencePlan)
    first = run_module.run(value)
    assert first.path.parent == Path("runs")
    assert run_module.run(value).path == first.path
    assert run_module.run(dataclasses.replace(value, seed=5)).path != first.path
