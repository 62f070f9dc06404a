"""The benchmark for CUDA devices, exercised on the CPU: what it measures, skips, survives and writes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.cases import CASES, QUICK, SUBSET, Case, Setting
from benchmarks.gpu.methods import METHODS, Work
from benchmarks.gpu.operations import has_layer_io, operations, weights
from benchmarks.gpu.problems import Problem, Task, problem, task
from benchmarks.gpu.run import run
from fx_influence.estimators.consistency import TOLERANCE

FULL, LORA = (Setting("tiny", lora, "bfloat16") for lora in (False, True))
FIELDS = {
    "seconds",
    "tokens_per_second",
    "fraction_of_matmul_rate",
    "peak_memory_bytes",
    "correctness",
    "seconds_over_step",
    "goal_seconds",
    "goal_met",
}


def cases(*methods: str, setting: Setting = FULL) -> list[Case]:
    return [Case(setting, method, 10, 10, 12) for method in methods]


def product(_: object, left: list[int], right: list[int], **others: object) -> int:
    return 2 * math.prod(left) * right[-1]


@pytest.mark.slow
def test_quick_measures_every_method_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    assert command.main(["--quick", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(QUICK), "the rates and every case"
    for kind in ("full", "LoRA"):
        measured = [line for line in lines if f" {kind} bfloat16 " in line and " tokens/s, " in line]
        assert [line.split()[3] for line in measured] == list(METHODS)
    assert not list(tmp_path.iterdir())


def test_cases_have_goals_first_and_every_method() -> None:
    goals = [(c.setting.model, c.setting.lora, c.method, c.n_u, c.n_e, c.width, c.goal_seconds) for c in CASES[:2]]
    assert goals == [
        ("1.5B", False, "adjoint", 512, 512, 512, 26.0),
        ("1.5B", True, "matrix", 512, 512, 512, 12.0),
    ]
    assert {case.method for case in CASES} == set(METHODS)
    trained = [weights(Setting(model, False, "bfloat16")).trained for model in ("0.5B", "1.5B")]
    assert trained == [494_032_768, 1_543_714_304], "as Qwen2 counts them"


def test_main_fails_without_cuda_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--out", str(tmp_path / "gpu.json")]) == 1
    output = capsys.readouterr()
    assert "no CUDA device" in output.err
    assert "--quick" in output.err
    assert not output.out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_run_skips_a_case_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "made" / "gpu.json"
    small, large = cases("step")[0], Case(FULL, "step", 10**9, 10**9, 12)
    outcomes = run([large, small], "cpu", 1.0, out)
    assert "seconds" not in outcomes[0]
    assert re.match(r"\d+ s remain and it may take", outcomes[0]["skipped"])
    assert outcomes[1]["seconds"] > 0, "a later case that is short enough is measured"
    assert json.loads(out.read_text())["cases"] == outcomes
    monkeypatch.setattr("benchmarks.gpu.run.problem", lambda *_: pytest.fail("a skipped case created a model"))
    assert all("skipped" in o for o in run(cases("step", "adjoint"), "cpu", 0.2, None))


@pytest.mark.slow
def test_run_reports_a_failed_case_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(batches: Task) -> Work:
        raise torch.OutOfMemoryError("CUDA out of memory.\nof which a second line")

    monkeypatch.setitem(METHODS, "adjoint", fails)
    quick = cases("step", "adjoint", "matrix")
    monkeypatch.setattr(command, "QUICK", quick)
    out = tmp_path / "gpu.json"
    outcomes = run(quick, "cpu", 8.0, out)
    assert outcomes[1]["error"] == "OutOfMemoryError: CUDA out of memory."
    assert [("seconds" in o, "error" in o) for o in outcomes] == [(True, False), (False, True), (True, False)]
    assert json.loads(out.read_text())["cases"] == outcomes
    assert command.main(["--quick"]) == 1
    assert "adjoint 10 x 10 x 12: OutOfMemoryError" in capsys.readouterr().out


@pytest.mark.slow
def test_measure_reports_seconds_if_float32_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(half: Problem) -> Problem:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("benchmarks.gpu.measure.in_float32", fails)
    [record] = run(cases("adjoint"), "cpu", 8.0, None)
    assert record["seconds"] > 0
    assert record["correctness"] == {"error": "OutOfMemoryError: CUDA out of memory."}


@pytest.mark.slow
def test_run_keeps_finished_cases_when_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(batches: Task) -> Work:
        raise KeyboardInterrupt

    monkeypatch.setitem(METHODS, "sweep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(cases("step", "matrix", "sweep"), "cpu", 8.0, tmp_path / "gpu.json")
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert [o["method"] for o in stored["cases"]] == ["step", "matrix"]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


@pytest.mark.slow
def test_report_has_all_figures_of_a_case(tmp_path: Path) -> None:
    timed = Case(LORA, "adjoint", 10, 10, 12, goal_seconds=1e-9)
    run([*cases("step", setting=LORA), timed], "cpu", 8.0, tmp_path / "gpu.json")
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert {"environment", "device", "matmul_flops_per_second", "tf32", "cases"} <= stored.keys()
    step, adjoint = stored["cases"]
    assert adjoint.keys() >= FIELDS
    assert adjoint["seconds_over_step"] == pytest.approx(adjoint["seconds"] / step["seconds"])
    assert adjoint["tokens_per_second"] == pytest.approx(240 / adjoint["seconds"])
    rate = stored["matmul_flops_per_second"]["bfloat16"]
    assert adjoint["fraction_of_matmul_rate"] == pytest.approx(adjoint["flops"] / adjoint["seconds"] / rate)
    assert (adjoint["goal_met"], step["goal_met"]) == (False, None)
    assert step["correctness"] is None
    assert adjoint["correctness"]["rows"] == SUBSET
    assert adjoint["correctness"]["largest_error"] < 0.2, "half precision on the same rollouts"
    assert adjoint["correctness"]["relative_residual_float32"] < TOLERANCE[torch.float32]
    assert adjoint["within_tolerance"]


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "rel"), [(FULL, 0.05), (LORA, 0.15)], ids=["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_operations_match_counted_flops_of_more_rows(setting: Setting, rel: float, method: str) -> None:
    """Compares the difference between two sizes, since probing forwards of a few tokens cost the same for both."""
    setting = setting._replace(dtype="float32")
    [few] = cases(method, setting=setting)
    counts, formula = [], []
    for case in (few, few._replace(n_u=3 * few.n_u, n_e=3 * few.n_e)):
        batches = task(case, problem(setting, "cpu"), "cpu")
        work = METHODS[method](batches)
        # Torch's counter does not count in-place products.
        in_place = dict.fromkeys((torch.ops.aten.addmm_, torch.ops.aten.baddbmm_), product)
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            work()
        counts.append(counter.get_total_flops())
        formula.append(operations(case, has_layer_io(batches)))
    # The formula omits attention and gradients of frozen weights that autograd computes without need.
    assert counts[1] - counts[0] == pytest.approx(formula[1] - formula[0], rel=rel)


@pytest.mark.parametrize("method", METHODS)
def test_methods_create_tensors_on_the_inputs_device(method: str) -> None:
    [case] = cases(method)
    work: Any = METHODS[method](task(case, problem(LORA, "cpu"), "cpu"))
    # A tensor created without a device would be on meta, and fail beside those on the CPU.
    with torch.device("meta"):
        work()


def test_operations_without_layer_io_are_those_of_the_jvp() -> None:
    [case] = cases("per_sequence")
    assert not has_layer_io(task(case, problem(FULL, "cpu"), "cpu"), budget=0)
    assert operations(case, layer_io_fits=False) == operations(case._replace(method="adjoint"), layer_io_fits=False)
