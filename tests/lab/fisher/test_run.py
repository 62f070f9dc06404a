"""The Fisher run, end to end on the embedded checkpoint in float64, against the reference and finite differences."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from helpers.cases import assert_close
from helpers.run_files import TIMES, kill_and_resume, stored_bytes, write_plan
from helpers.tolerances import assert_close_to_rounding, assert_within, central_difference, policy_terms
from torch import Tensor

import fx_influence as fx
from fx_influence.core.tree import shift
from fx_influence.interop.checkpoints.load import load_checkpoint
from fx_influence.interop.rollouts.batch import collate
from fx_influence.lab.cli import main
from fx_influence.lab.fisher import measure as fisher_measure
from fx_influence.lab.fisher import run as fisher_module
from fx_influence.lab.fisher.results import FisherKernelResults, load_fisher_run
from fx_influence.lab.plan import demo_path
from fx_influence.testing import reference

PLAN = {
    "dtype": "float64",
    "update": {"prompts": "demo/train", "num_prompts": 5, "completions_per_prompt": 4},
    "evaluations": [
        {"prompts": "demo/eval", "num_prompts": 4, "completions_per_prompt": 3},
        {"prompts": "demo/eval", "num_prompts": 2, "completions_per_prompt": 3},
    ],
    "sequences_per_block": 3,
    "top": 4,
    "seed": 1,
}
N_U, N_E = 20, 12


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fisher")
    assert main(["fisher", write_plan(folder, PLAN), "--out", str(folder / "out")]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def results(finished: Path) -> FisherKernelResults:
    return load_fisher_run(finished)


class Known(NamedTuple):
    """The training state, the batches of the stored rollouts, and the step by its slow definition."""

    apply: fx.Policy
    params: fx.Params
    state: fx.AdamWState
    u: fx.Batch
    e: fx.Batch
    step: reference.Step
    gradients: list[fx.Params]


@pytest.fixture(scope="module")
def known(results: FisherKernelResults) -> Known:
    checkpoint = load_checkpoint(demo_path("demo"), dtype=torch.float64)
    apply, params = fx.make_functional(checkpoint.model)
    u, e = (collate(rollouts, pad_id=0) for rollouts in (results.update_rollouts, results.evaluations[0].rollouts))
    advantages = torch.tensor([r.advantage for r in results.update_rollouts])
    u = u._replace(
        coefficients=fx.coefficients("dr_grpo", advantages, u.completion_mask, max_completion_length=20).double()
    )
    gradients = reference.sequence_gradients(apply, params, u)
    step = reference.adamw(gradients, checkpoint.optimizer_state, params, max_grad_norm=1.0)
    return Known(apply, params, checkpoint.optimizer_state, u, e, step, gradients)


def logprobs(known: Known, params: fx.Params) -> Tensor:
    """S_a of E's rollouts, (n_e,)."""
    return fx.token_values(params, known.e, known.apply).logprobs.sum(-1)


def score_gradients(known: Known) -> list[fx.Params]:
    """grad S_a of E's rollouts, one backward pass each."""
    leaves = {name: p.clone().requires_grad_() for name, p in known.params.items()}
    scores = logprobs(known, leaves)
    return [
        dict(zip(leaves, torch.autograd.grad(s, list(leaves.values()), retain_graph=True), strict=True)) for s in scores
    ]


def inner(a: fx.Params, b: fx.Params) -> Tensor:
    return torch.stack([(a[name] * b[name]).sum() for name in b]).sum()


def test_the_directory_holds_everything_that_is_promised(finished: Path, results: FisherKernelResults) -> None:
    names = {"plan.yaml", "environment.json", "summary.json", "update_rollouts.jsonl", "update_self_kernel.npy"}
    ends = ("_kernel.npy", "_delta_logprob_matrix.npy", ".npz", "_top.jsonl", "_rollouts.jsonl", ".json")
    names |= {"SHA256SUMS", *(f"eval_0{i}{end}" for i in range(2) for end in ends)}
    assert {path.name for path in finished.iterdir()} == names
    assert results.update_self_kernel.shape == (N_U,)
    for evaluation, n_e in zip(results.evaluations, (N_E, 6), strict=True):
        assert evaluation.kernel.shape == evaluation.delta_logprob_matrix.shape == (n_e, N_U)
        arrays = ("self_kernel", "predicted_delta_logprob", "predicted_delta_logprob_baseline", "residual")
        assert {name: a.shape for name, a in evaluation.arrays.items()} == dict.fromkeys(arrays, (n_e,))
        assert len(evaluation.top) == len(evaluation.rollouts) == n_e
    summary = results.summary
    assert {*TIMES, "torch_threads", "reference_lr", "lr", "update_rollouts", "relative_residual"} <= set(summary)
    assert summary["evaluations"] == [e.summary for e in results.evaluations]
    assert {"load", "sampling", "step", "self-kernel", "kernel", "change"} == set(summary["seconds_by_phase"])
    assert results.environment["packages"]["torch"] == torch.__version__


def test_the_kernel_and_both_diagonals_are_those_of_the_slow_definition(
    results: FisherKernelResults, known: Known
) -> None:
    diagonals = reference.adam_diagonals(known.state, known.step)
    stored = results.evaluations[0]
    slow = reference.fisher_kernel(known.apply, known.params, known.e, known.u, diagonals)
    assert_close(torch.from_numpy(stored.kernel), slow)
    fast = fx.fisher_kernel(
        known.params, known.e, known.u, known.state, apply=known.apply, preconditioner="adam", max_grad_norm=1.0
    )
    assert_close(torch.from_numpy(stored.kernel), fast)
    own = torch.stack([inner(g, {n: diagonals[n] * g[n] for n in diagonals}) for g in score_gradients(known)])
    assert_close(torch.from_numpy(stored.arrays["self_kernel"]), own)
    u_with_u = fx.fisher_kernel(known.params, known.u, known.u, None, apply=known.apply, preconditioner=diagonals)
    assert_close(torch.from_numpy(results.update_self_kernel), u_with_u.diagonal())


def test_the_change_by_each_rollout_is_its_gradient_against_its_part_of_the_step(
    results: FisherKernelResults, known: Known
) -> None:
    own = [{name: known.step.gain[name] * g[name] for name in g} for g in known.gradients]
    expected = torch.stack([torch.stack([inner(s, v) for v in own]) for s in score_gradients(known)])
    assert_close(torch.from_numpy(results.evaluations[0].delta_logprob_matrix), expected)
    for rollouts in (results.update_rollouts, results.evaluations[0].rollouts):
        texts = {(r.prompt_ids, r.completion_ids) for r in rollouts}
        assert len(texts) < len(rollouts), "equal rollouts, which are measured once"
    still = np.array([r.advantage == 0 for r in results.update_rollouts])
    assert still.any()
    assert not results.evaluations[0].delta_logprob_matrix[:, still].any()
    assert results.evaluations[0].kernel[:, still].any(0).all()


@pytest.mark.parametrize(
    ("name", "field"),
    [("predicted_delta_logprob", "direction"), ("predicted_delta_logprob_baseline", "baseline")],
)
def test_the_prediction_is_the_slope_of_the_log_probability_along_the_step(
    results: FisherKernelResults, known: Known, name: str, field: str
) -> None:
    step = fx.adamw_decompose(
        {name: sum(g[name] for g in known.gradients) for name in known.params},
        known.state,
        known.params,
        max_grad_norm=1.0,
    )
    direction, terms = getattr(step, field), policy_terms(known.params, known.u.input_ids.shape[1])
    slope, bound = central_difference(
        lambda eta: logprobs(known, shift(known.params, direction, eta)), 1e-6, terms=terms
    )
    assert bound < 1e-2 * slope.abs().max()
    assert_within(results.evaluations[0].arrays[name], slope, bound)


def test_baseline_and_rollouts_add_up_to_the_prediction(results: FisherKernelResults, known: Known) -> None:
    for evaluation in results.evaluations:
        arrays, matrix = evaluation.arrays, evaluation.delta_logprob_matrix
        whole, baseline = arrays["predicted_delta_logprob"], arrays["predicted_delta_logprob_baseline"]
        size = np.abs(baseline).sum() + np.abs(matrix).sum()
        near = {"terms": policy_terms(known.params, known.u.input_ids.shape[1]), "scale": size}
        assert_close_to_rounding(arrays["residual"], whole - baseline - matrix.sum(1), **near)
        assert_close_to_rounding(arrays["residual"], 0 * whole, **near)
        assert evaluation.summary["relative_residual"] == pytest.approx(np.abs(arrays["residual"]).sum() / size, abs=0)


def test_a_derivative_that_is_lost_on_the_way_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = fisher_measure.gradient_gram
    monkeypatch.setattr(fisher_measure, "gradient_kernel", lambda *args: 0.9 * real(*args))
    assert main(["fisher", write_plan(tmp_path, PLAN), "--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert re.search(r"v_baseline and the matrix gives .* the JVP along the whole step .* allowed 1e-09", message)
    assert not (tmp_path / "out" / "eval_00.json").exists()


def test_the_figures_are_those_of_the_arrays(results: FisherKernelResults) -> None:
    for e in results.evaluations:
        size = np.abs(e.arrays["predicted_delta_logprob"])
        assert e.summary["mean_abs_predicted_delta_logprob"] == pytest.approx(size.mean())
        assert e.summary["median_abs_predicted_delta_logprob"] == pytest.approx(np.median(size))
        assert e.summary["largest_abs_predicted_delta_logprob"] == size.max()
        assert e.summary["mean_predicted_delta_logprob"] == pytest.approx(e.arrays["predicted_delta_logprob"].mean())
        assert e.summary["mean_abs_contribution"] == pytest.approx(np.abs(e.delta_logprob_matrix).mean())
        assert -1 <= e.summary["spearman_self_kernel_prediction"] <= 1


def test_the_strongest_rollouts_of_u_are_named_for_each_rollout_of_e(results: FisherKernelResults) -> None:
    of_u = {r.id: i for i, r in enumerate(results.update_rollouts)}
    e = results.evaluations[0]
    for a, (rollout, record) in enumerate(zip(e.rollouts, e.top, strict=True)):
        assert [record[field] for field in ("id", "prompt", "completion")] == [
            rollout.id,
            rollout.prompt,
            rollout.completion,
        ]
        assert record["predicted_delta_logprob"] == e.arrays["predicted_delta_logprob"][a]
        assert record["baseline"] == e.arrays["predicted_delta_logprob_baseline"][a]
        found = record["contributors"]
        assert len({c["id"] for c in found}) == 4
        sizes = sorted(np.abs(e.delta_logprob_matrix[a]), reverse=True)
        assert [abs(c["contribution"]) for c in found] == sizes[:4]
        for c in found:
            i = of_u[c["id"]]
            named = results.update_rollouts[i]
            assert (c["prompt"], c["completion"], c["advantage"]) == (named.prompt, named.completion, named.advantage)
            assert (c["contribution"], c["kernel"]) == (e.delta_logprob_matrix[a, i], e.kernel[a, i])


def test_the_identity_preconditioner_from_files_of_rollouts_through_the_package(
    results: FisherKernelResults, known: Known, tmp_path: Path
) -> None:
    files = {"update": "update_rollouts.jsonl", "evaluation": "eval_00_rollouts.jsonl"}
    plan = fx.lab.FisherKernelPlan.from_dict(
        {
            **PLAN,
            "preconditioner": "identity",
            "update": {"rollouts": str(results.path / files["update"])},
            "evaluations": [{"rollouts": str(results.path / files["evaluation"])}],
        }
    )
    again = fx.lab.run_fisher(plan, tmp_path / "out").evaluations[0]
    slow = reference.fisher_kernel(known.apply, known.params, known.e, known.u)
    assert_close(torch.from_numpy(again.kernel), slow)
    own = torch.stack([inner(g, g) for g in score_gradients(known)])
    assert_close(torch.from_numpy(again.arrays["self_kernel"]), own)
    np.testing.assert_array_equal(again.delta_logprob_matrix, results.evaluations[0].delta_logprob_matrix)


def test_an_interrupted_run_continues_and_ends_with_the_same_bytes(
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
    message = "has no summary.json, so it is no finished run of that kind; finish it with the command"
    assert message in capsys.readouterr().err
    assert main(command) == 0
    assert len(calls) == 3, "the first evaluation was measured once"
    assert stored_bytes(out) == stored_bytes(finished)


def test_a_finished_run_is_not_computed_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher_module, "measure_step", lambda *args: pytest.fail("computed again"))
    before = (finished / "summary.json").read_bytes()
    assert main(["fisher", str(finished / "plan.yaml"), "--out", str(finished)]) == 0
    assert (finished / "summary.json").read_bytes() == before


def test_a_directory_of_another_plan_or_of_another_kind_of_run_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fisher", str(finished / "plan.yaml"), "--seed", "9", "--out", str(finished)]) == 1
    assert "holds a run of another plan; choose another --out" in capsys.readouterr().err
    entropy = {name: value for name, value in PLAN.items() if name != "top"}
    (tmp_path / "entropy.yaml").write_text(yaml.safe_dump(entropy))
    assert main(["run", str(tmp_path / "entropy.yaml"), "--out", str(finished)]) == 1
    assert "holds a run of another plan; choose another --out" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    assert main(["fisher", write_plan(tmp_path, PLAN), "--out", str(tmp_path / "mine")]) == 1
    assert "is not a run directory; choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["eval_00_kernel.npy", "eval_01_delta_logprob_matrix.npy", "update_self_kernel.npy", "eval_00.npz"]
)
def test_a_damaged_file_of_a_run_is_an_error(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    whole = bytearray((copy / name).read_bytes())
    whole[len(whole) // 2] ^= 1
    (copy / name).write_bytes(whole)
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
def test_bad_plans_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, message: str
) -> None:
    assert main(["fisher", write_plan(tmp_path, PLAN, **changes), "--out", str(tmp_path / "out")]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_the_page_shows_the_change_in_nats_of_this_step(
    finished: Path, results: FisherKernelResults, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(finished)]) == 0
    page, lr = capsys.readouterr().out, results.summary["lr"]
    for e in results.evaluations:
        assert f"{e.summary['largest_abs_predicted_delta_logprob'] * lr:.3e}" in page
    most = max(results.evaluations[0].top, key=lambda r: abs(r["predicted_delta_logprob"]))
    least = min(results.evaluations[0].top, key=lambda r: abs(r["predicted_delta_logprob"]))
    first, last = (f"{r['predicted_delta_logprob'] * lr:+.2e}" for r in (most, least))
    assert page.index(first) < page.index(last)
    strongest = most["contributors"][0]
    row = next(line for line in page.splitlines() if most["completion"] in line and strongest["id"] in line)
    assert f"{most['predicted_delta_logprob'] * lr:+.2e}" in row
    assert f"{strongest['contribution'] * lr:+.2e}" in row


def test_hostile_text_in_a_rollout_is_shown_literally(
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


def test_the_default_directory_is_named_after_the_plan(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "runs" / "plan-fisher")
    assert main(["fisher", write_plan(tmp_path, PLAN)]) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["plan-fisher"]


@pytest.mark.slow
def test_a_fisher_run_killed_at_random_moments_ends_with_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    assert kill_and_resume("fisher", finished / "plan.yaml", tmp_path / "out", 20) == stored_bytes(finished)
