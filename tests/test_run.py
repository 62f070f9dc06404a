"""The main job, end to end on the embedded checkpoint with small batches, through the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from run_files import TIMES, killed_and_resumed, stored_bytes, summary, write_plan
from safetensors.torch import load_file
from tolerances import ROOM, assert_close_to_rounding, assert_within, policy_terms

import fx_influence as fx
from fx_influence.interop.checkpoint import load_checkpoint
from fx_influence.interop.rollouts import collate, read_rollouts
from fx_influence.lab import batches, store
from fx_influence.lab import run as run_module
from fx_influence.lab.analysis.allocation import ALLOCATIONS
from fx_influence.lab.cli import main
from fx_influence.lab.column_table import printable
from fx_influence.lab.health import health
from fx_influence.lab.plan import demo_path, read_plan

PLAN = {
    "update": {"prompts": "demo/train", "num_prompts": 5, "completions_per_prompt": 4},
    "evaluations": [
        {"prompts": "demo/eval", "num_prompts": 8, "completions_per_prompt": 2},
        {"prompts": "demo/eval", "num_prompts": 3, "completions_per_prompt": 3},
    ],
    "eta_multiples": [1.0, 0.05, 0.2],
    "scaled_eta_multiples": [20.0],
    "sequences_per_block": 4,
    "seed": 1,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert main(["run", write_plan(folder, PLAN), "--out", str(folder / "out")]) == 0
    return folder / "out"


def test_the_directory_holds_everything_that_is_promised(finished: Path) -> None:
    n_u, n_e, n_eta = 20, 16, 4
    sequences = [json.loads(line) for line in (finished / "update_sequences.jsonl").read_text().splitlines()]
    arrays = dict(np.load(finished / "eval_00.npz"))
    shapes = {
        "per_sequence": (n_u,),
        "stderr": (n_u,),
        "eta": (n_eta,),
        "full": (n_eta,),
        "baseline": (n_eta,),
        "ess": (n_eta,),
        "grad": (n_eta, n_u),
        "baseline_plus_grad": (n_eta, n_u),
    }
    for name in ("full", "baseline", "momentum", "weight_decay", "rmsprop"):
        shapes |= {name: (n_eta,), f"{name}_contributions": (n_eta, n_e), f"{name}_log_weights": (n_eta, n_e)}
        shapes |= {f"{name}_{field}": (n_eta,) for field in ("stderr", "ess", "clip_fraction")}
        shapes |= {f"{name}_first": (), f"{name}_second": ()}
    for name in ("grad", "baseline_plus_grad"):
        shapes |= {name: (n_eta, n_u), f"{name}_contributions": (n_eta, n_u, n_e)}
        fields = ("stderr", "ess", "clip_fraction", "log_weight_mean", "log_weight_max")
        shapes |= {f"{name}_{field}": (n_eta, n_u) for field in fields}
        shapes |= {f"{name}_{field}": (n_u,) for field in ("slope", "r2", "curvature", "eta_trust", "spread")}
    shapes |= dict.fromkeys(("per_sequence_rmsprop", "per_sequence_reward", "per_sequence_reward_stderr"), (n_u,))
    shapes |= dict.fromkeys(("reward_baseline", "reward_total_stderr"), ())
    shapes |= dict.fromkeys(("auto_eta", "auto_grad", "auto_grad_stderr", "auto_grad_ess"), (n_u,))
    assert {name: arrays[name].shape for name in shapes} == shapes
    assert arrays["per_token"].shape[0] == n_u
    assert np.load(finished / "eval_00_delta_matrix.npy").shape == (n_e, n_u)
    assert np.load(finished / "eval_01_delta_matrix.npy").shape == (9, n_u)
    tokens = np.load(finished / "update_tokens.npz")
    assert {name: tokens[name].shape for name in tokens.files} == dict.fromkeys(
        ("logprobs", "entropies", "coefficients"), arrays["per_token"].shape
    )
    means = [record["mean_entropy"] * record["completion_length"] for record in sequences]
    assert_close_to_rounding(tokens["entropies"].sum(1), means, terms=tokens["entropies"].shape[1], dtype=torch.float32)
    assert len(sequences) == n_u
    keys = {"id", "prompt", "completion", "reward", "advantage", "mean_entropy", "mean_logprob", "gradient_norm"}
    keys |= {"influence", "stderr", "prompt_length", "completion_length"}
    assert all(keys <= set(record) for record in sequences)
    required = {"total", "baseline", "momentum", "weight_decay", "sum_per_sequence", "residual", *TIMES}
    assert required <= set(summary(finished))
    assert set(load_file(finished / "baseline.safetensors")) == set(_state()[1])
    derivatives = summary(finished)["derivative_check"]
    assert (derivatives["agrees"], derivatives["conclusive"], derivatives["parameters"]) == (True, True, [])
    assert derivatives["deviation"] <= derivatives["bound"]
    assert [set(found["advantage"]) for found in summary(finished)["allocations"]] == [set(ALLOCATIONS)] * 2
    auto = summary(finished)["auto_scale"]
    assert auto["capped"] == int((arrays["auto_eta"] >= 1e4 * summary(finished)["lr"]).sum())
    assert 0 < auto["smallest_clearance"] <= auto["median_clearance"]
    assert json.loads((finished / "environment.json").read_text())["packages"]["torch"] == torch.__version__
    pieces = ("update_rollouts.jsonl", "eval_00_rollouts.jsonl", "eval_01_rollouts.jsonl", "update_sequences.jsonl")
    evaluations = [f"eval_0{i}{what}" for i in (0, 1) for what in (".json", ".npz", "_delta_matrix.npy")]
    named = {
        "SHA256SUMS",
        "plan.yaml",
        "environment.json",
        "summary.json",
        "baseline.safetensors",
        "update_tokens.npz",
        "report",
        *pieces,
        *evaluations,
    }
    assert {path.name for path in finished.iterdir()} == named, "nothing that only a run in progress needs is left"


def _state() -> tuple[fx.Policy, fx.Params, fx.AdamWState]:
    checkpoint = load_checkpoint(demo_path("demo"))
    apply, params = fx.functionalize(checkpoint.model)
    return apply, params, checkpoint.optimizer_state


def rounding_of(params: fx.Params, batch: fx.Batch, size: Any) -> dict[str, Any]:
    """What ``assert_close_to_rounding`` is to know of the float32 passes of the demo's policy."""
    return {"terms": policy_terms(params, batch.input_ids.shape[1]), "scale": size, "dtype": torch.float32}


def test_the_stored_numbers_are_those_of_the_library_on_the_stored_rollouts(finished: Path) -> None:
    apply, params, state = _state()
    rollouts = read_rollouts(finished / "update_rollouts.jsonl")
    u = collate(rollouts, pad_id=0)
    advantages = torch.tensor([r.advantage for r in rollouts])
    c = fx.coefficients("dr_grpo", advantages, u.completion_mask, max_completion_length=20)
    e = collate(read_rollouts(finished / "eval_00_rollouts.jsonl"), pad_id=0)
    out = fx.influence(params, u._replace(coefficients=c), e, state, apply=apply, max_grad_norm=1.0, matrix=True)
    arrays = dict(np.load(finished / "eval_00.npz"))
    near = rounding_of(params, u, out.per_token.abs().sum())
    for name in ("per_sequence", "per_token", "stderr"):
        assert_close_to_rounding(arrays[name], getattr(out, name), name=name, **near)
    matrix = np.load(finished / "eval_00_delta_matrix.npy")
    assert_close_to_rounding(matrix.sum(0), arrays["per_sequence"], **near)
    s = summary(finished)
    near["scale"] = near["scale"] + abs(s["momentum"]) + abs(s["weight_decay"])
    assert_close_to_rounding(s["total"], out.total.item(), **near)
    assert_close_to_rounding(s["baseline"], s["momentum"] + s["weight_decay"], **near)
    assert_close_to_rounding(s["total"], s["baseline"] + s["sum_per_sequence"], **near)
    assert_close_to_rounding(s["residual"], 0.0, **near)
    baseline = load_file(finished / "baseline.safetensors")
    along = fx.snis_delta(params, baseline, float(arrays["eta"][0]), e, apply=apply).delta_h.item()
    assert_within(arrays["baseline"][0], along, ROOM * s["rounding_floor"])
    assert abs(along) > ROOM**2 * s["rounding_floor"]


def test_the_other_influences_are_those_of_their_gain_and_query(finished: Path) -> None:
    apply, params, state = _state()
    u, e = (read_rollouts(finished / name) for name in ("update_rollouts.jsonl", "eval_00_rollouts.jsonl"))
    batch_u, batch_e = collate(u, pad_id=0), collate(e, pad_id=0)
    advantages = torch.tensor([r.advantage for r in u])
    c = fx.coefficients("dr_grpo", advantages, batch_u.completion_mask, max_completion_length=20)
    batch_u, arrays = batch_u._replace(coefficients=c), dict(np.load(finished / "eval_00.npz"))
    query = fx.expected_reward(torch.tensor([r.reward for r in e]))
    for name, options in (("per_sequence_rmsprop", {"gain": "rmsprop"}), ("per_sequence_reward", {"query": query})):
        out = fx.influence(params, batch_u, batch_e, state, apply=apply, max_grad_norm=1.0, **options)
        near = rounding_of(params, batch_u, out.per_token.abs().sum())
        assert_close_to_rounding(arrays[name], out.per_sequence, **near)
    near["scale"] = near["scale"] + out.momentum.abs() + out.weight_decay.abs()
    assert_close_to_rounding(arrays["reward_baseline"], out.baseline, **near)
    assert_close_to_rounding(arrays["per_sequence_reward_stderr"], out.stderr, **near)
    # With one beta1 and one step for all parameters the gains differ by a number.
    multiple = arrays["per_sequence_rmsprop"].sum() / arrays["per_sequence"].sum()
    size = abs(arrays["per_token"]).sum() * abs(multiple)
    near = rounding_of(params, batch_u, size)
    assert_close_to_rounding(arrays["per_sequence_rmsprop"], multiple * arrays["per_sequence"], **near)


def test_an_evaluation_that_was_not_judged_has_no_influence_on_reward(finished: Path, tmp_path: Path) -> None:
    for name in ("update", "eval_00"):
        records = [json.loads(line) for line in (finished / f"{name}_rollouts.jsonl").read_text().splitlines()]
        if name == "eval_00":
            records[3]["reward"] = None
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    files = {"update": {"rollouts": str(tmp_path / "update.jsonl")}}
    files["evaluations"] = [{"rollouts": str(tmp_path / "eval_00.jsonl")}]
    plan = write_plan(tmp_path, PLAN, **files, directions=["full"], eta_multiples=[1.0], scaled_eta_multiples=[])
    assert main(["run", plan, "--out", str(tmp_path / "out")]) == 0
    arrays = dict(np.load(tmp_path / "out" / "eval_00.npz"))
    assert "per_sequence_rmsprop" in arrays
    assert not any("reward" in name for name in arrays)


def test_analyze_prints_and_writes_beside_a_run_that_stays_as_it_was(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    assert main(["analyze", str(copy)]) == 0
    page = capsys.readouterr().out
    assert page.count("What reward costs in entropy") == 2
    assert json.loads((copy / "analysis" / "analysis.json").read_text())[1]["settings"]["evaluation"] == 1
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()} == {
        path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()
    }
    assert main(["analyze", str(tmp_path)]) == 1
    assert "has no plan.yaml" in capsys.readouterr().err


def test_finite_steps_tend_to_the_first_order(finished: Path) -> None:
    s, arrays = summary(finished), dict(np.load(finished / "eval_00.npz"))
    at_lr = s["finite_steps"][0]
    assert at_lr["eta"] == pytest.approx(s["lr"])
    gap = abs(at_lr["full"] - at_lr["full_jvp"])
    assert abs(at_lr["full"] - at_lr["full_jvp_second_order"]) < gap
    nearer = s["finite_steps"][1]
    assert abs(nearer["full"] - nearer["full_jvp"]) / nearer["eta"] < 0.2 * gap / at_lr["eta"]
    slopes = arrays["grad"] / arrays["eta"][:, None]
    size = np.abs(arrays["per_sequence"]).max()
    far, near, _, _ = np.abs(slopes - arrays["per_sequence"]).max(1) / size
    assert near < 0.03
    assert near < 0.5 * far
    for name in ("momentum", "weight_decay"):
        assert arrays[name][1] / arrays["eta"][1] == pytest.approx(s[name], rel=0.05, abs=1e-2 * abs(s["momentum"]))
    for name in ("full", "grad", "baseline_plus_grad"):
        contributions = arrays[f"{name}_contributions"]
        # Differences of entropies up to log 14.
        near = {"terms": contributions.shape[-1], "scale": math.log(14)}
        assert_close_to_rounding(contributions.sum(-1), arrays[name], **near)
    assert np.abs(arrays["rmsprop"]).min() > 0
    derived = (arrays["baseline_plus_grad"] - arrays["baseline"][:, None]) / arrays["eta"][:, None]
    assert np.abs(derived[1] - arrays["per_sequence"]).max() < 0.1 * size
    assert np.all((arrays["ess"] > 1) & (arrays["ess"] <= 16))


def test_the_same_plan_repeats_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    stored = str(finished / "plan.yaml")
    assert main(["run", stored, "--out", str(tmp_path / "again")]) == 0
    names = sorted(path.name for path in finished.iterdir())
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == names
    for name in set(names) - {"report"}:
        if name == "summary.json":
            ours, theirs = summary(finished), summary(tmp_path / "again")
            assert {k: v for k, v in ours.items() if k not in TIMES} == {
                k: v for k, v in theirs.items() if k not in TIMES
            }
        else:
            assert (finished / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_another_seed_gives_other_rollouts(finished: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, PLAN, evaluations=PLAN["evaluations"][1:], eta_multiples=[1.0])
    assert main(["run", plan, "--seed", "2", "--out", str(tmp_path / "out")]) == 0
    assert yaml.safe_load((tmp_path / "out" / "plan.yaml").read_text())["seed"] == 2
    ours, theirs = (read_rollouts(d / "update_rollouts.jsonl") for d in (finished, tmp_path / "out"))
    assert [r.completion for r in ours] != [r.completion for r in theirs]


def test_an_interrupted_run_continues_without_redoing_what_is_stored(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    real, calls = run_module.evaluate, []

    def interrupted(*args: object) -> object:
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
def test_whatever_is_interrupted_goes_on_with_the_pieces_that_are_stored(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before every single write in turn: what was written is never made again."""
    out, real, written, resumed = tmp_path / "out", store.RunDirectory._whole, [], 0
    monkeypatch.setattr(batches, "ROLLOUTS_PER_PIECE", 8)

    def interrupted(directory: store.RunDirectory, name: str, write: Callable[[str], object]) -> None:
        if name not in allowed:
            allowed.add(name)
            raise KeyboardInterrupt
        written.append(name)
        real(directory, name, write)

    monkeypatch.setattr(store.RunDirectory, "_whole", interrupted)
    allowed: set[str] = {"plan.yaml"}
    while main(["run", str(finished / "plan.yaml"), "--out", str(out)]) == 130:
        resumed += 1
    assert resumed == len(allowed) - 1
    assert {"eval_00_block_00001.npz", "eval_01_first_order_00000.npz", "step_gradient.safetensors"} < allowed
    assert {"update_rollouts_00002.jsonl", "eval_00_rollouts_00001.jsonl"} < allowed
    once = [name for name in written if re.search(r"_block_|_first_order_|_rollouts|step_gradient", name)]
    assert len(once) == len(set(once)), "a piece was measured twice"


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_bytes_of_one_that_was_not(finished: Path, tmp_path: Path) -> None:
    assert killed_and_resumed("run", finished / "plan.yaml", tmp_path / "out", 20) == stored_bytes(finished)


def test_a_finished_run_is_not_computed_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "measure_step", lambda *args: pytest.fail("computed again"))
    before = (finished / "summary.json").read_bytes()
    assert main(["run", str(finished / "plan.yaml"), "--out", str(finished)]) == 0
    assert (finished / "summary.json").read_bytes() == before


def test_a_directory_of_another_plan_or_of_other_files_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    assert main(["run", write_plan(tmp_path, PLAN), "--seed", "9", "--out", str(copy)]) == 1
    assert "holds a run of another plan; choose another --out" in capsys.readouterr().err
    assert (copy / "summary.json").read_bytes() == (finished / "summary.json").read_bytes()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    assert main(["run", write_plan(tmp_path, PLAN), "--out", str(tmp_path / "mine")]) == 1
    assert "is not a run directory; choose another --out" in capsys.readouterr().err


def test_the_report_shows_totals_checks_rollouts_and_tokens(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(finished)]) == 0
    page, s = capsys.readouterr().out, summary(finished)
    for figure in (f"{s['momentum']:+.5g}", f"{s['weight_decay']:+.5g}", f"{s['total']:+.5g}"):
        assert figure in page
    assert f"{s['relative_residual']:.1e}" in page
    assert f"{s['finite_steps'][0]['full']:+.4e}" in page
    sequences = [json.loads(line) for line in (finished / "update_sequences.jsonl").read_text().splitlines()]
    strongest = max(sequences, key=lambda r: r["influence"])
    row = next(line for line in page.splitlines() if strongest["id"] in line and strongest["completion"] in line)
    assert f"{strongest['influence']:+.4g} ± {strongest['stderr']:.2g}" in row
    assert f"{strongest['advantage']:+.2f}" in row
    warnings = [f"{f.name}: {f.text}" for f in health(fx.load_run(finished)) if f.level == "attention"]
    assert any("E is too small" in text for text in warnings)
    assert all(text in page for text in warnings)


def test_hostile_text_in_a_rollout_is_shown_literally(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    records = [json.loads(line) for line in (copy / "update_sequences.jsonl").read_text().splitlines()]
    for record in records:
        record["completion"] = "[bold]x[/bold]\x1b[31m\u202e\ud800"
        record["tokens"] = ["\x1b]0;title\x07"] * len(record["tokens"])
    (copy / "update_sequences.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert main(["report", str(copy)]) == 0
    page = capsys.readouterr().out
    assert "[bold]x[/bold]\\x1b[31m\\u202e\\ud800" in page
    assert not any(c in page for c in ("\x1b]", "\x1b[31m", "\u202e", "\x07"))
    assert printable("plain ü 漢") == "plain ü 漢"


BAD_REWARDS = """
def raises(prompts, completions, **columns):
    raise RuntimeError("boom")

def nan(prompts, completions, **columns):
    return [float("nan")] * len(completions)

def equal(prompts, completions, **columns):
    return [1.0] * len(completions)
"""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "absent"}, r"absent"),
        ({"reward": "no_such_module:f"}, r"reward is 'no_such_module:f', but module"),
        ({"reward": "bad_rewards:raises"}, r"reward bad_rewards:raises raised RuntimeError: boom"),
        ({"reward": "bad_rewards:nan"}, r"reward bad_rewards:nan returned nan"),
        ({"reward": "bad_rewards:equal"}, r"every advantage in U is 0"),
        ({"update": {"prompts": "absent.jsonl"}}, r"absent\.jsonl' does not exist"),
        ({"update": {"prompts": "demo/train", "num_prompts": 10**6}}, r"num_prompts is 1000000 but .* ask for fewer"),
        ({"max_new_tokens": 63}, r"63 .* passes the model's 64 positions"),
    ],
)
def test_bad_input_is_refused_before_the_long_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict,
    message: str,
) -> None:
    (tmp_path / "bad_rewards.py").write_text(BAD_REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(run_module, "evaluate", lambda *args: pytest.fail("the long work began"))
    assert main(["run", write_plan(tmp_path, PLAN, **changes), "--out", str(tmp_path / "out")]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_the_installed_command_runs_prints_help_and_refuses_nonsense(finished: Path) -> None:
    command = [sys.executable, "-m", "fx_influence.lab.cli"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "run" in shown
    assert "report" in shown
    wrong = subprocess.run([*command, "report", "/nonexistent"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert "has no plan.yaml" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_a_stored_run_is_read_back_as_values(finished: Path) -> None:
    results = fx.load_run(finished)
    assert results.plan.to_dict() == yaml.safe_load((finished / "plan.yaml").read_text())
    assert [e.matrix.shape for e in results.evaluations] == [(16, 20), (9, 20)]
    assert [r["id"] for r in results.sequences] == [r.id for r in results.update_rollouts]
    assert [r["influence"] for r in results.sequences] == results.evaluations[0].arrays["per_sequence"].tolist()
    assert set(results.baseline()) == set(_state()[1])
    assert results.summary["evaluations"] == [e.summary for e in results.evaluations]


def test_a_stored_run_gives_tables(finished: Path) -> None:
    results = fx.load_run(finished)
    table = results.table()
    assert table["influence"].tolist() == [r["influence"] for r in results.sequences]
    steps, arrays = results.finite_steps(1), results.evaluations[1].arrays
    assert len(steps) == 4 * 20
    picked = steps[(steps["eta"] == arrays["eta"][1]) & (steps["id"] == results.sequences[3]["id"])]
    assert picked["grad"].tolist() == [arrays["grad"][1, 3]]
    assert picked["grad_stderr"].tolist() == [arrays["grad_stderr"][1, 3]]
    assert picked["baseline_plus_grad"].tolist() == [arrays["baseline_plus_grad"][1, 3] - arrays["baseline"][1]]
    assert picked["first_order"].tolist() == [arrays["eta"][1] * arrays["per_sequence"][3]]


def test_a_table_without_pandas_names_the_remedy(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="a table needs pandas: pip install pandas"):
        fx.load_run(finished).table()


def test_a_run_is_a_function_of_its_plan(finished: Path) -> None:
    plan = read_plan(finished / "plan.yaml", fx.EntropyInfluencePlan)
    results = fx.run(plan, finished)
    assert isinstance(results, fx.EntropyInfluenceResults)
    assert results.plan == plan
    with pytest.raises(dataclasses.FrozenInstanceError):
        results.plan = plan  # type: ignore[misc]


@pytest.mark.parametrize("name", ["eval_00.npz", "eval_01_delta_matrix.npy", "summary.json", "update_rollouts.jsonl"])
def test_a_truncated_or_missing_file_of_a_run_is_an_error(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: len(whole) // 2])
    assert main(["report", str(copy)]) == 1
    assert "is damaged" in capsys.readouterr().err
    (copy / name).unlink()
    assert main(["report", str(copy)]) == 1
    assert re.search(rf"is damaged|has no {re.escape(name)}", capsys.readouterr().err)


@pytest.mark.slow
def test_the_environment_that_is_stored_is_the_runs_own_whatever_the_process_is_set_to(
    finished: Path, tmp_path: Path
) -> None:
    """Small models run on one thread, so that a run continued by a process with more ends with the same bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert main(["run", str(finished / "plan.yaml"), "--out", str(tmp_path / "out")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert stored_bytes(tmp_path / "out") == stored_bytes(finished)
