"""The large driver end to end on a tiny plan: two processes, one table, one file of figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.present import present

from benchmarks.evidence import run_entropy_influence_large as driver
from fx_influence.lab.plan import EntropyInfluencePlan, SampledBatch, read_plan

PLAN = {
    "update": {"prompts": "train.jsonl", "num_prompts": 3, "completions_per_prompt": 4},
    "evaluations": [
        {"prompts": "demo/eval", "num_prompts": 2, "completions_per_prompt": 2, "seed": 5},
        {"prompts": "demo/eval", "num_prompts": 3, "completions_per_prompt": 1, "seed": 6},
    ],
    "directions": ["full"],
    "eta_multiples": [1.0],
    "scaled_eta_multiples": [],
    "auto_scale": None,
    "seed": 1,
}


def arguments(folder: Path) -> list[str]:
    prompts = Path(driver.__file__).parents[2] / "fx_influence" / "lab" / "demo" / "train_prompts.jsonl"
    (folder / "train.jsonl").write_text(prompts.read_text())
    (folder / "tiny.yaml").write_text(yaml.safe_dump(PLAN))
    return [str(folder / "tiny.yaml"), "--out", str(folder / "out"), "--json", str(folder / "made" / "tiny.json")]


@pytest.mark.slow
def test_driver_compares_costs_of_runs_on_the_same_rollouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert driver.main(arguments(tmp_path)) == 0
    out, text = tmp_path / "out", (tmp_path / "made" / "tiny.json").read_text()
    runs = [out / name for name in ("entropy_influence", "fisher_kernel")]
    for name in ("update_rollouts.jsonl", "eval_00_rollouts.jsonl", "eval_01_rollouts.jsonl"):
        assert len({(run / name).read_bytes() for run in runs}) == 1
    figures = json.loads(text)
    assert (figures["plan"], figures["n_u"], figures["n_e"], figures["pairs"]) == ("tiny", 12, [4, 3], 84)
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    for (name, costs), summary in zip(figures["runs"].items(), summaries, strict=True):
        for field in ("seconds", "seconds_by_phase", "peak_memory_bytes", "peak_gpu_memory_bytes"):
            assert costs[field] == summary[field], name
        assert costs["pairs_per_second"] == pytest.approx(84 / summary["seconds"])
        assert 0 < costs["first_order_seconds"] < costs["seconds"]
        assert costs["processes"] == 1
    for field in ("seconds", "peak_memory_bytes"):
        ratio = summaries[1][field] / summaries[0][field]
        assert figures["fisher_over_entropy"][field] == pytest.approx(ratio)
    assert str(tmp_path) not in text
    page = capsys.readouterr().out
    assert "84 pairs: 12 rollouts of U, [4, 3] of E" in page
    assert f"{summaries[1]['peak_memory_bytes'] / 2**20:.1f}" in page

    kernel = np.load(runs[1] / "eval_01_kernel.npy")
    (runs[1] / "summary.json").unlink()
    assert driver.main(arguments(tmp_path)) == 0
    shown = capsys.readouterr()
    assert "fisher_kernel was continued by 2 processes; its figures are those of the last" in shown.out
    assert "fisher_kernel: fx-influence fisher" in shown.err
    assert "entropy_influence" not in shown.err, "the finished run had no process"
    assert json.loads((runs[0] / "summary.json").read_text()) == summaries[0], "the finished run was left alone"
    assert (np.load(runs[1] / "eval_01_kernel.npy") == kernel).all()


@pytest.mark.slow
def test_a_run_that_is_refused_ends_the_driver_without_figures(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    given = arguments(tmp_path)
    (tmp_path / "out" / "entropy_influence").mkdir(parents=True)
    (tmp_path / "out" / "entropy_influence" / "thesis.tex").write_text("precious")
    assert driver.main(given) == 1
    assert "is not a run directory; expected one, or nothing. Choose another --out" in capfd.readouterr().err
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "out" / "fisher_kernel").exists()


def test_the_plan_that_ships_has_a_hundred_thousand_pairs() -> None:
    plan = read_plan(Path(driver.__file__).parent / "plans" / "large.yaml", EntropyInfluencePlan)
    requests = [request for request in plan.requests() if isinstance(request, SampledBatch)]
    assert [present(r.num_prompts) * r.completions_per_prompt for r in requests] == [128, 256, 256, 256, 256]
    assert len({request.seed for request in requests[1:]}) == 4
