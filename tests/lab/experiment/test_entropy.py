"""Run the main experiment end to end on the embedded checkpoint with small batches, through the command line."""

from __future__ import annotations

import json
import math
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.present import present
from helpers.run_files import (
    ENTROPY_PLAN,
    TIMES,
    demo_state,
    read_summary,
    write_plan,
)
from helpers.tolerances import ROOM, assert_close_to_rounding, assert_within, policy_terms
from safetensors.torch import load_file

import fx_influence as fx
from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.native_format import read_native_rollouts
from fx_influence.lab.analysis.allocation import ALLOCATIONS
from fx_influence.lab.cli import main
from fx_influence.lab.experiment import entropy as run_module


def test_run_directory_holds_every_file(finished: Path) -> None:
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
    shapes |= dict.fromkeys(("reward_baseline", "reward_total_stderr", "reward_degrees_of_freedom"), ())
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
    assert required <= set(read_summary(finished))
    assert set(load_file(finished / "baseline.safetensors")) == set(demo_state()[1])
    derivatives = read_summary(finished)["derivative_check"]
    assert (derivatives["agrees"], derivatives["conclusive"], derivatives["parameters"]) == (True, True, [])
    assert derivatives["deviation"] <= derivatives["bound"]
    assert [set(evaluation["advantage"]) for evaluation in read_summary(finished)["allocations"]] == [
        set(ALLOCATIONS)
    ] * 2
    auto = read_summary(finished)["auto_scale"]
    assert auto["capped"] == int((arrays["auto_eta"] >= 1e4 * read_summary(finished)["lr"]).sum())
    assert 0 < auto["smallest_clearance"] <= auto["median_clearance"]
    assert json.loads((finished / "environment.json").read_text())["packages"]["torch"] == version("torch")
    sequence_files = (
        "update_rollouts.jsonl",
        "eval_00_rollouts.jsonl",
        "eval_01_rollouts.jsonl",
        "update_sequences.jsonl",
    )
    evaluations = [f"eval_0{i}{what}" for i in (0, 1) for what in (".json", ".npz", "_delta_matrix.npy")]
    expected_names = {
        "SHA256SUMS",
        "plan.yaml",
        "environment.json",
        "summary.json",
        "baseline.safetensors",
        "update_tokens.npz",
        "report",
        *sequence_files,
        *evaluations,
    }
    assert {path.name for path in finished.iterdir()} == expected_names, (
        "nothing that only a run in progress needs is left"
    )


def rounding_of(params: fx.Params, batch: fx.Batch, size: Any) -> dict[str, Any]:
    """Return the arguments of ``assert_close_to_rounding`` for the float32 passes of the demo's policy."""
    return {"terms": policy_terms(params, batch.input_ids.shape[1]), "scale": size, "dtype": torch.float32}


def test_run_stores_the_numbers_of_influence(finished: Path) -> None:
    apply, params, state = demo_state()
    rollouts = read_native_rollouts(finished / "update_rollouts.jsonl")
    u = collate(rollouts, pad_id=0)
    advantages = torch.tensor([r.advantage for r in rollouts])
    c = fx.coefficients("dr_grpo", advantages, u.completion_mask, max_completion_length=20)
    e = collate(read_native_rollouts(finished / "eval_00_rollouts.jsonl"), pad_id=0)
    out = fx.influence(params, u._replace(coefficients=c), e, state, apply=apply, max_grad_norm=1.0, matrix=True)
    arrays = dict(np.load(finished / "eval_00.npz"))
    near = rounding_of(params, u, present(out.per_token).abs().sum())
    for name in ("per_sequence", "per_token", "stderr"):
        assert_close_to_rounding(arrays[name], getattr(out, name), name=name, **near)
    matrix = np.load(finished / "eval_00_delta_matrix.npy")
    assert_close_to_rounding(matrix.sum(0), arrays["per_sequence"], **near)
    s = read_summary(finished)
    near["scale"] = near["scale"] + abs(s["momentum"]) + abs(s["weight_decay"])
    assert_close_to_rounding(s["total"], out.total.item(), **near)
    assert_close_to_rounding(s["baseline"], s["momentum"] + s["weight_decay"], **near)
    assert_close_to_rounding(s["total"], s["baseline"] + s["sum_per_sequence"], **near)
    assert_close_to_rounding(s["residual"], 0.0, **near)
    baseline = load_file(finished / "baseline.safetensors")
    delta_h = fx.snis_delta(params, baseline, float(arrays["eta"][0]), e, apply=apply).delta_h.item()
    assert_within(arrays["baseline"][0], delta_h, ROOM * s["rounding_floor"])
    assert abs(delta_h) > ROOM**2 * s["rounding_floor"]


def test_run_stores_rmsprop_and_reward_influences(finished: Path) -> None:
    apply, params, state = demo_state()
    u, e = (read_native_rollouts(finished / name) for name in ("update_rollouts.jsonl", "eval_00_rollouts.jsonl"))
    batch_u, batch_e = collate(u, pad_id=0), collate(e, pad_id=0)
    advantages = torch.tensor([r.advantage for r in u])
    c = fx.coefficients("dr_grpo", advantages, batch_u.completion_mask, max_completion_length=20)
    batch_u, arrays = batch_u._replace(coefficients=c), dict(np.load(finished / "eval_00.npz"))
    reward = fx.expected_reward(torch.tensor([r.reward for r in e]))
    for name, options in (
        ("per_sequence_rmsprop", {"preconditioner": "rmsprop"}),
        ("per_sequence_reward", {"objective": reward}),
    ):
        out = fx.influence(params, batch_u, batch_e, state, apply=apply, max_grad_norm=1.0, **options)
        near = rounding_of(params, batch_u, present(out.per_token).abs().sum())
        assert_close_to_rounding(arrays[name], out.per_sequence, **near)
    near["scale"] = near["scale"] + out.momentum.abs() + out.weight_decay.abs()
    assert_close_to_rounding(arrays["reward_baseline"], out.baseline, **near)
    assert_close_to_rounding(arrays["per_sequence_reward_stderr"], out.stderr, **near)
    # With one beta1 and one step for all parameters the gains differ by a number.
    multiple = arrays["per_sequence_rmsprop"].sum() / arrays["per_sequence"].sum()
    size = abs(arrays["per_token"]).sum() * abs(multiple)
    near = rounding_of(params, batch_u, size)
    assert_close_to_rounding(arrays["per_sequence_rmsprop"], multiple * arrays["per_sequence"], **near)


@pytest.mark.slow
def test_run_skips_reward_influence_without_rewards(finished: Path, tmp_path: Path) -> None:
    for name in ("update", "eval_00"):
        records = [json.loads(line) for line in (finished / f"{name}_rollouts.jsonl").read_text().splitlines()]
        if name == "eval_00":
            records[3]["reward"] = None
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    files: dict[str, Any] = {"update": {"rollouts": str(tmp_path / "update.jsonl")}}
    files["evaluations"] = [{"rollouts": str(tmp_path / "eval_00.jsonl")}]
    plan = write_plan(
        tmp_path, ENTROPY_PLAN, **files, directions=["full"], eta_multiples=[1.0], scaled_eta_multiples=[]
    )
    assert main(["run", plan, "--out", str(tmp_path / "out")]) == 0
    arrays = dict(np.load(tmp_path / "out" / "eval_00.npz"))
    assert "per_sequence_rmsprop" in arrays
    assert not any("reward" in name for name in arrays)


def test_run_finite_steps_tend_to_first_order(finished: Path) -> None:
    s, arrays = read_summary(finished), dict(np.load(finished / "eval_00.npz"))
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
        ({"reward": "no_such_module:f"}, r"reward is 'no_such_module:f' and module"),
        ({"reward": "bad_rewards:raises"}, r"reward bad_rewards:raises raised RuntimeError: boom"),
        ({"reward": "bad_rewards:nan"}, r"reward bad_rewards:nan returned nan"),
        ({"reward": "bad_rewards:equal"}, r"every advantage in U is 0"),
        ({"update": {"prompts": "absent.jsonl"}}, r"absent\.jsonl' does not exist"),
        (
            {"update": {"prompts": "demo/train", "num_prompts": 10**6}},
            r"num_prompts is 1000000; expected .* Ask for fewer",
        ),
        ({"max_new_tokens": 63}, r"model has 64 positions and max_new_tokens is 63"),
    ],
)
def test_run_rejects_bad_input_before_passes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict,
    message: str,
) -> None:
    (tmp_path / "bad_rewards.py").write_text(BAD_REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(run_module, "evaluate", lambda *args: pytest.fail("the long work began"))
    assert main(["run", write_plan(tmp_path, ENTROPY_PLAN, **changes), "--out", str(tmp_path / "out")]) == 1
    assert re.search(message, capsys.readouterr().err)
