"""Run the Fisher experiment in float64 and compare it with the reference and finite differences."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers.cases import assert_close
from helpers.present import present
from helpers.run_files import FISHER_PLAN, TIMES, write_plan
from helpers.tolerances import assert_close_to_rounding, assert_within, central_difference, policy_terms
from torch import Tensor

import fx_influence as fx
from fx_influence.core.tree import shift
from fx_influence.interop.checkpoints.load import load_checkpoint
from fx_influence.interop.rollouts.batch import collate
from fx_influence.lab.cli import main
from fx_influence.lab.fisher import measure as fisher_measure
from fx_influence.lab.fisher.results import FisherKernelResults
from fx_influence.lab.plan import demo_path
from fx_influence.testing import reference
from fx_influence.types import Gradients

N_U, N_E = 20, 12


class Known(NamedTuple):
    """Training state, batches of the stored rollouts, and the step by its slow definition."""

    apply: fx.Policy
    params: fx.Params
    state: fx.AdamWState
    u: fx.Batch
    e: fx.Batch
    step: reference.Step
    gradients: list[Gradients]


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
    step = reference.adamw(gradients, present(checkpoint.optimizer_state), params, max_grad_norm=1.0)
    return Known(apply, params, present(checkpoint.optimizer_state), u, e, step, gradients)


def logprobs(known: Known, params: fx.Params) -> Tensor:
    """Return S_a of E's rollouts, (n_e,)."""
    return fx.token_values(params, known.e, known.apply).logprobs.sum(-1)


def score_gradients(known: Known) -> list[fx.Params]:
    """Return grad S_a of E's rollouts, one backward pass each."""
    leaves = {name: p.clone().requires_grad_() for name, p in known.params.items()}
    scores = logprobs(known, leaves)
    return [
        dict(zip(leaves, torch.autograd.grad(s, list(leaves.values()), retain_graph=True), strict=True)) for s in scores
    ]


def inner(a: fx.Params, b: fx.Params) -> Tensor:
    return torch.stack([(a[name] * b[name]).sum() for name in b]).sum()


@pytest.mark.slow
def test_fisher_directory_holds_every_file(finished: Path, results: FisherKernelResults) -> None:
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
    assert results.environment["packages"]["torch"] == version("torch")


@pytest.mark.slow
def test_kernel_and_diagonals_match_reference(results: FisherKernelResults, known: Known) -> None:
    diagonals = reference.adam_diagonals(known.state, known.step)
    stored = results.evaluations[0]
    slow = reference.fisher_kernel(known.apply, known.params, known.e, known.u, diagonals)
    assert_close(torch.from_numpy(stored.kernel), slow)
    fast = fx.fisher_kernel(
        known.params, known.e, known.u, known.state, apply=known.apply, preconditioner="adam", max_grad_norm=1.0
    )
    assert_close(torch.from_numpy(stored.kernel), fast)
    self_products = torch.stack([inner(g, {n: diagonals[n] * g[n] for n in diagonals}) for g in score_gradients(known)])
    assert_close(torch.from_numpy(stored.arrays["self_kernel"]), self_products)
    u_with_u = fx.fisher_kernel(known.params, known.u, known.u, None, apply=known.apply, preconditioner=diagonals)
    assert_close(torch.from_numpy(results.update_self_kernel), u_with_u.diagonal())


def test_logprob_change_by_rollout_matches_reference(results: FisherKernelResults, known: Known) -> None:
    directions = [{name: known.step.gain[name] * present(g[name]) for name in g} for g in known.gradients]
    expected = torch.stack([torch.stack([inner(s, v) for v in directions]) for s in score_gradients(known)])
    assert_close(torch.from_numpy(results.evaluations[0].delta_logprob_matrix), expected)
    for rollouts in (results.update_rollouts, results.evaluations[0].rollouts):
        texts = {(r.prompt_ids, r.completion_ids) for r in rollouts}
        assert len(texts) < len(rollouts), "equal rollouts, which are measured once"
    inert = np.array([r.advantage == 0 for r in results.update_rollouts])
    assert inert.any()
    assert not results.evaluations[0].delta_logprob_matrix[:, inert].any()
    assert results.evaluations[0].kernel[:, inert].any(0).all()


@pytest.mark.parametrize(
    ("name", "field"),
    [("predicted_delta_logprob", "direction"), ("predicted_delta_logprob_baseline", "baseline")],
)
def test_predicted_change_is_finite_difference_slope(
    results: FisherKernelResults, known: Known, name: str, field: str
) -> None:
    step = fx.adamw_decompose(
        {name: torch.stack([present(g[name]) for g in known.gradients]).sum(0) for name in known.params},
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


def test_baseline_and_rollouts_sum_to_prediction(results: FisherKernelResults, known: Known) -> None:
    for evaluation in results.evaluations:
        arrays, matrix = evaluation.arrays, evaluation.delta_logprob_matrix
        change, baseline = arrays["predicted_delta_logprob"], arrays["predicted_delta_logprob_baseline"]
        size = np.abs(baseline).sum() + np.abs(matrix).sum()
        near = {"terms": policy_terms(known.params, known.u.input_ids.shape[1]), "scale": size}
        assert_close_to_rounding(arrays["residual"], change - baseline - matrix.sum(1), **near)
        assert_close_to_rounding(arrays["residual"], 0 * change, **near)
        assert evaluation.summary["relative_residual"] == pytest.approx(np.abs(arrays["residual"]).sum() / size, abs=0)


@pytest.mark.slow
def test_run_fisher_rejects_a_lost_derivative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = fisher_measure.gradient_gram
    monkeypatch.setattr(fisher_measure, "gradient_gram", lambda *args: 0.9 * real(*args))
    assert main(["fisher", write_plan(tmp_path, FISHER_PLAN), "--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert re.search(
        r"expected at most 1e-09 of it: .*v_baseline and the matrix gives .* the JVP along the whole step", message
    )
    assert not (tmp_path / "out" / "eval_00.json").exists()


def test_fisher_figures_are_those_of_the_arrays(results: FisherKernelResults) -> None:
    for e in results.evaluations:
        size = np.abs(e.arrays["predicted_delta_logprob"])
        assert e.summary["mean_abs_predicted_delta_logprob"] == pytest.approx(size.mean())
        assert e.summary["median_abs_predicted_delta_logprob"] == pytest.approx(np.median(size))
        assert e.summary["largest_abs_predicted_delta_logprob"] == size.max()
        assert e.summary["mean_predicted_delta_logprob"] == pytest.approx(e.arrays["predicted_delta_logprob"].mean())
        assert e.summary["mean_abs_contribution"] == pytest.approx(np.abs(e.delta_logprob_matrix).mean())
        assert -1 <= e.summary["spearman_self_kernel_prediction"] <= 1


def test_top_lists_rollouts_that_move_e_most(results: FisherKernelResults) -> None:
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
        contributors = record["contributors"]
        assert len({c["id"] for c in contributors}) == 4
        sizes = sorted(np.abs(e.delta_logprob_matrix[a]), reverse=True)
        assert [abs(c["contribution"]) for c in contributors] == sizes[:4]
        for c in contributors:
            i = of_u[c["id"]]
            rollout_u = results.update_rollouts[i]
            assert (c["prompt"], c["completion"], c["advantage"]) == (
                rollout_u.prompt,
                rollout_u.completion,
                rollout_u.advantage,
            )
            assert (c["contribution"], c["kernel"]) == (e.delta_logprob_matrix[a, i], e.kernel[a, i])


@pytest.mark.slow
def test_run_fisher_with_identity_from_rollout_files(
    results: FisherKernelResults, known: Known, tmp_path: Path
) -> None:
    files = {"update": "update_rollouts.jsonl", "evaluation": "eval_00_rollouts.jsonl"}
    plan = fx.lab.FisherKernelPlan.from_dict(
        {
            **FISHER_PLAN,
            "preconditioner": "identity",
            "update": {"rollouts": str(results.path / files["update"])},
            "evaluations": [{"rollouts": str(results.path / files["evaluation"])}],
        }
    )
    again = fx.lab.run_fisher(plan, tmp_path / "out").evaluations[0]
    slow = reference.fisher_kernel(known.apply, known.params, known.e, known.u)
    assert_close(torch.from_numpy(again.kernel), slow)
    self_products = torch.stack([inner(g, g) for g in score_gradients(known)])
    assert_close(torch.from_numpy(again.arrays["self_kernel"]), self_products)
    np.testing.assert_array_equal(again.delta_logprob_matrix, results.evaluations[0].delta_logprob_matrix)
