"""The benchmark for CUDA devices, its logic exercised on the CPU: what it measures, skips, survives and writes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu
from fx_influence.estimators.consistency import TOLERANCE

FULL, LORA = (gpu.Setting("tiny", lora, "bfloat16") for lora in (False, True))
WHOLE = {
    "seconds",
    "tokens_per_second",
    "fraction_of_matmul_rate",
    "peak_memory_bytes",
    "correctness",
    "seconds_over_step",
    "goal_seconds",
    "goal_met",
}


def cases(*routes: str, setting: gpu.Setting = FULL) -> list[gpu.Case]:
    return [gpu.Case(setting, route, 10, 10, 12) for route in routes]


def product(_: object, left: list[int], right: list[int], **others: object) -> int:
    return 2 * math.prod(left) * right[-1]


@pytest.mark.slow
def test_quick_measures_every_route_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main(["--quick", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(gpu.QUICK), "the rates and every case"
    for kind in ("full", "LoRA"):
        measured = [line for line in lines if f" {kind} bfloat16 " in line and " tokens/s, " in line]
        assert [line.split()[3] for line in measured] == list(gpu.ROUTES)
    assert not list(tmp_path.iterdir())


def test_the_cases_that_ship_have_the_goals_first_and_every_route() -> None:
    goals = [(c.setting.model, c.setting.lora, c.route, c.n_u, c.n_e, c.width, c.goal_seconds) for c in gpu.CASES[:2]]
    assert goals == [
        ("1.5B", False, "adjoint", 512, 512, 512, 26.0),
        ("1.5B", True, "matrix", 512, 512, 512, 12.0),
    ]
    assert {case.route for case in gpu.CASES} == set(gpu.ROUTES)
    trained = [gpu.weights(gpu.Setting(model, False, "bfloat16")).trained for model in ("0.5B", "1.5B")]
    assert trained == [494_032_768, 1_543_714_304], "as Qwen2 counts its own"


def test_without_cuda_it_says_so_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 1
    said = capsys.readouterr()
    assert "no CUDA device" in said.err
    assert "--quick" in said.err
    assert not said.out
    assert not list(tmp_path.iterdir())


def test_a_case_that_the_time_left_does_not_suffice_for_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "made" / "gpu.json"
    small, large = cases("step")[0], gpu.Case(FULL, "step", 10**9, 10**9, 12)
    found = gpu.run([large, small], "cpu", 1.0, out)
    assert "seconds" not in found[0]
    assert re.match(r"(59|60) s are left and it may take", found[0]["skipped"])
    assert found[1]["seconds"] > 0, "what comes after and is short enough is measured"
    assert json.loads(out.read_text())["cases"] == found
    monkeypatch.setattr(gpu, "problem", lambda *_: pytest.fail("a model was made for a case that is skipped"))
    assert all("skipped" in o for o in gpu.run(cases("step", "adjoint"), "cpu", 0.2, None))


def test_a_case_that_fails_leaves_its_error_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(task: gpu.Task) -> gpu.Work:
        raise torch.OutOfMemoryError("CUDA out of memory.\nof which a second line")

    monkeypatch.setitem(gpu.ROUTES, "adjoint", fails)
    monkeypatch.setattr(gpu, "QUICK", cases("step", "adjoint", "matrix"))
    out = tmp_path / "gpu.json"
    found = gpu.run(gpu.QUICK, "cpu", 8.0, out)
    assert found[1]["error"] == "OutOfMemoryError: CUDA out of memory."
    assert [("seconds" in o, "error" in o) for o in found] == [(True, False), (False, True), (True, False)]
    assert json.loads(out.read_text())["cases"] == found
    assert gpu.main(["--quick"]) == 1
    assert "adjoint 10 x 10 x 12: OutOfMemoryError" in capsys.readouterr().out


def test_where_float32_has_no_room_the_seconds_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(made: gpu.Problem) -> gpu.Problem:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(gpu, "_widened", fails)
    [found] = gpu.run(cases("adjoint"), "cpu", 8.0, None)
    assert found["seconds"] > 0
    assert found["correctness"] == {"error": "OutOfMemoryError: CUDA out of memory."}


def test_an_interruption_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(task: gpu.Task) -> gpu.Work:
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu.ROUTES, "sweep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu.run(cases("step", "matrix", "sweep"), "cpu", 8.0, tmp_path / "gpu.json")
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert [o["route"] for o in stored["cases"]] == ["step", "matrix"]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_a_report_says_what_was_asked_of_it(tmp_path: Path) -> None:
    wanted = gpu.Case(LORA, "adjoint", 10, 10, 12, goal_seconds=1e-9)
    gpu.run([*cases("step", setting=LORA), wanted], "cpu", 8.0, tmp_path / "gpu.json")
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert {"environment", "device", "matmul_flops_per_second", "tf32", "cases"} <= stored.keys()
    step, adjoint = stored["cases"]
    assert adjoint.keys() >= WHOLE
    assert adjoint["seconds_over_step"] == pytest.approx(adjoint["seconds"] / step["seconds"])
    assert adjoint["tokens_per_second"] == pytest.approx(240 / adjoint["seconds"])
    rate = stored["matmul_flops_per_second"]["bfloat16"]
    assert adjoint["fraction_of_matmul_rate"] == pytest.approx(adjoint["flops"] / adjoint["seconds"] / rate)
    assert (adjoint["goal_met"], step["goal_met"]) == (False, None)
    assert step["correctness"] is None
    assert adjoint["correctness"]["rows"] == gpu.SUBSET
    assert adjoint["correctness"]["largest_error"] < 0.2, "half precision, and of the same rollouts"
    assert adjoint["correctness"]["relative_residual_float32"] < TOLERANCE[torch.float32]
    assert adjoint["within_tolerance"]


@pytest.mark.parametrize(("setting", "off"), [(FULL, 0.05), (LORA, 0.15)], ids=["full", "lora"])
@pytest.mark.parametrize("route", gpu.ROUTES)
def test_the_formula_is_what_is_counted_where_nothing_is_computed_twice(
    setting: gpu.Setting, off: float, route: str
) -> None:
    """By what more rows cost: trials of a few tokens, which tell how a model may be taken, cost all the same."""
    setting = setting._replace(dtype="float32")
    [few] = cases(route, setting=setting)
    counts, formula = [], []
    for case in (few, few._replace(n_u=3 * few.n_u, n_e=3 * few.n_e)):
        task = gpu.task(case, gpu.problem(setting, "cpu"), "cpu")
        work = gpu.ROUTES[route](task)
        # What is added up in place torch does not count of itself.
        in_place = dict.fromkeys((torch.ops.aten.addmm_, torch.ops.aten.baddbmm_), product)
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            work()
        counts.append(counter.get_total_flops())
        formula.append(gpu.flops(case, gpu.has_factors(task)))
    # The formula leaves out attention and what autograd makes of frozen weights without need.
    assert counts[1] - counts[0] == pytest.approx(formula[1] - formula[0], rel=off)


@pytest.mark.parametrize("route", gpu.ROUTES)
def test_every_tensor_is_made_where_the_inputs_are(route: str) -> None:
    [case] = cases(route)
    work: Any = gpu.ROUTES[route](gpu.task(case, gpu.problem(LORA, "cpu"), "cpu"))
    # What is made on no named device lies on this one, and meets with nothing on the other.
    with torch.device("meta"):
        work()


def test_what_a_small_card_has_no_factors_for_costs_what_the_jvp_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "HELD", 0)
    [case] = cases("per_sequence")
    assert not gpu.has_factors(gpu.task(case, gpu.problem(FULL, "cpu"), "cpu"))
    assert gpu.flops(case, factored=False) == gpu.flops(case._replace(route="adjoint"), factored=False)
