"""Evidence: the exact entropy, the draws of E, the estimators, and the selection of the best predictor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers.tolerances import TINY_POLICY, assert_within, rounding_bound
from helpers.toy_policy import toy_policy

import fx_influence as fx
from benchmarks.evidence import (
    bench_acting,
    bench_collapse,
    bench_counterfactual,
    bench_estimators,
    counterfactual_tables,
    several_steps_tables,
    training_runs,
)
from benchmarks.evidence.training_runs import Policy, all_completions, exact_entropy
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.autodiff.token_values import all_token_values
from fx_influence.batching.rows import select_rows
from fx_influence.interop.rollouts.batch import collate
from fx_influence.objectives import surrogate_coefficients
from fx_influence.types import Batch, TokenValues


@pytest.fixture(scope="module")
def policy() -> Policy:
    return toy_policy(3)


@pytest.fixture(scope="module")
def every(policy: Policy) -> Batch:
    return collate(all_completions(policy), policy.tokenizer.pad_token_id)


def values_of(policy: Policy, batch: Batch) -> TokenValues:
    apply, params = fx.make_functional(policy.model)
    return TokenValues(*(v.double() for v in all_token_values(params, batch, apply)))


def test_all_completions_are_enumerated_once(policy: Policy, every: Batch) -> None:
    chances = values_of(policy, every).logprobs.sum(-1).exp().reshape(len(policy.held_out), -1)
    # Probabilities are products of a few exponentials of float32 log-probabilities.
    assert_within(chances.sum(1), torch.ones(3), rounding_bound(torch.float32, TINY_POLICY))


def test_exact_objective_has_the_gradient_of_exact_entropy(policy: Policy, every: Batch) -> None:
    logprobs, entropies = (v.requires_grad_() for v in values_of(policy, every))
    values = TokenValues(logprobs, entropies)
    expected = torch.autograd.grad(exact_entropy(values, every), [logprobs, entropies])
    grads = torch.autograd.grad(bench_counterfactual.entropy_of_all(*values, every).sum(), [logprobs, entropies])
    torch.testing.assert_close(grads, expected)


def test_stratified_draw_has_the_policys_distribution(policy: Policy, every: Batch) -> None:
    chances = values_of(policy, every).logprobs.sum(-1).exp()
    draws = [bench_estimators._stratified(chances, 3, 4, 12, np.random.default_rng(k)) for k in range(2000)]
    counts = torch.bincount(torch.cat(draws), minlength=len(chances)) / (4 * 2000)
    torch.testing.assert_close(counts.double(), chances, atol=0.006, rtol=0)
    assert {tuple(torch.bincount(draw // (len(chances) // 3)).tolist()) for draw in draws} == {(4, 4, 4)}


@pytest.mark.parametrize("name", ["per_decision", "sequence", "per_decision, by prompt", "per_decision, shrunk"])
def test_unbiased_estimator_converges_to_exact_gradient(policy: Policy, every: Batch, name: str) -> None:
    values = values_of(policy, every)
    chances = values.logprobs.sum(-1).exp()
    index = bench_estimators._stratified(chances, 3, 4000, 12000, np.random.default_rng(0))
    e = select_rows(every, index)
    weights = surrogate_coefficients(bench_estimators.OBJECTIVES[name], TokenValues(*(v[index] for v in values)), e)
    # Coefficients of each completion's log-probabilities and entropies, summed over the rows that drew it.
    summed = [torch.zeros_like(v).index_add(0, index, c) for v, c in zip(values, weights, strict=True)]
    leaves = [v.requires_grad_() for v in values]
    expected = torch.autograd.grad(exact_entropy(TokenValues(*leaves), every), leaves)
    grads = [_gradient(policy, every, *weights) for weights in (summed, expected)]
    assert float((grads[0] - grads[1]).norm() / grads[1].norm()) < 0.1


def _gradient(policy: Policy, every: Batch, logprobs: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
    apply, params = fx.make_functional(policy.model)
    weighted = every._replace(coefficients=logprobs.float(), entropy_coefficients=entropies.float())
    grads = batch_gradient(params, weighted, apply)
    return torch.cat([g.flatten() for g in grads.values() if g is not None])


def test_phases_list_the_best_predictors() -> None:
    def run(share: float, marginal: float, sgd: float) -> dict[str, Any]:
        ranks = {"share": share, "marginal": marginal, "sgd": sgd, "covariance proxy": 0.0, "advantage": 0.0}
        state = {"step": 5, "loo": {**ranks, "ceiling": 1.0}, "lds": {**ranks, "ceiling": 1.0}}
        return {"policy": "demo", "lr": 1e-4, "found": [state]}

    [phase] = counterfactual_tables.of_phases([run(0.9, 0.89, 0.5), run(0.8, 0.81, 0.4), run(0.85, 0.84, 0.47)])
    assert (phase["phase"], phase["trainings"]) == ("later", 3)
    assert phase["loo"]["best"] == ["share", "marginal"]
    assert phase["loo"]["sgd"]["mean"] == pytest.approx(1.37 / 3)


def test_best_omits_a_predictor_that_is_always_worse() -> None:
    means = {"share": {0: 0.5, 1: 0.6}, "marginal": {0: 0.25, 1: 0.35}, "sgd": {}}
    assert counterfactual_tables._best(means) == ["share"]


class Sum(NamedTuple):
    a: int
    b: int
    name: str = "sum"


def test_results_are_cached_for_the_same_plan_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_runs, "CACHE", tmp_path)
    (tmp_path / "bench").mkdir()
    done: list[Sum] = []

    def work(plan: Sum) -> int:
        done.append(plan)
        return plan.a + plan.b

    assert [training_runs._cached("bench", work, plan) for plan in (Sum(1, 2), Sum(1, 2), Sum(1, 3))] == [3, 3, 4]
    assert done == [Sum(1, 2), Sum(1, 3)]


def test_collect_summarises_finished_runs_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans, stored = [Sum(1, 2, "first"), Sum(3, 4, "second")], []

    def summarise(runs: Sequence[dict[str, Any]]) -> list[int]:
        return [run["found"] for run in runs]

    def no_work(plan: Sum) -> int:
        raise AssertionError("a run was started")

    monkeypatch.setattr(training_runs, "CACHE", tmp_path)
    monkeypatch.setattr(training_runs, "store", lambda name, report, tables: stored.append(report["summary"]))
    benchmark = training_runs.Benchmark("bench", None, lambda quick: plans, no_work, summarise, lambda report: "")
    with pytest.raises(SystemExit):
        benchmark.main(["--collect"])
    (tmp_path / "bench").mkdir()
    training_runs._cached("bench", lambda plan: plan.a + plan.b, plans[1])
    assert benchmark.main(["--collect"]) == 0
    assert stored == [[7]]


def test_covariant_tokens_have_the_highest_covariance() -> None:
    old = -torch.rand(8, 30, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(8, 30, dtype=torch.bool)
    advantages = torch.tensor([1.0, -1.0] * 4).unsqueeze(1).expand_as(old)
    covariant = bench_acting.covariant_tokens(old, advantages, mask, 0.05)
    assert covariant.sum() == round(0.05 * 240)
    centred = (old - old.mean()) * advantages
    assert centred[covariant].min() > centred[~covariant].max() - 1e-3


def test_windows_are_explained_by_what_predicts_their_change() -> None:
    """A run counts with its mean over windows, and R² is over all windows of the sampled policies."""

    def window(realised: float, window_total: float, rank: float | None) -> dict[str, Any]:
        names = (*several_steps_tables.PREDICTED, *several_steps_tables.CAUSES)
        row = dict.fromkeys(names, 0.0) | {"realised": realised, "window_total": window_total}
        row["both_ends"] = 2 * realised
        ranks = dict.fromkeys(several_steps_tables.RANKED, rank) | {"share, same E": 0.5}
        fixed = {"length": 2, "effect": 1.0, "slope": 1.0, "realised_stderr": 0.0}
        times = dict.fromkeys(several_steps_tables.WORKS, 3.0) | {"training": 1.5}
        return {"start": 1, "lengths": [{**fixed, **row, "ranks": ranks}], "seconds": times}

    runs = [
        {"policy": "toy", "lr": 1e-4, "found": [window(1.0, 1.0, 0.9)]},
        {"policy": "demo", "lr": 1e-4, "found": [window(1.0, 1.0, 0.5), window(2.0, 2.0, 0.7)]},
        {"policy": "early", "lr": 1e-4, "found": [window(4.0, 4.0, None), {**window(5.0, 5.0, 0.9), "seconds": {}}]},
    ]
    figures = several_steps_tables.summary(runs)
    assert figures["seconds"] == dict.fromkeys(several_steps_tables.WORKS, 2.0)
    assert [row["policy"] for row in figures["lengths"]] == ["demo", "early", "toy"]
    sampled, exact = figures["pooled"]
    assert (sampled["policy"], sampled["windows"], exact["policy"]) == ("demo and early", 4, "toy")
    assert sampled["ranks"]["window"]["mean"] == pytest.approx(0.75)
    assert sampled["realised"]["mean"] == pytest.approx(3.0)
    assert sampled["r2"]["window_total"] == sampled["explainable"] == pytest.approx(1.0)
    assert sampled["r2"]["steps_total"] == pytest.approx(1 - 11.5 / 2.5)
    assert sampled["slopes"] == pytest.approx({"window_total": 1.0, "both_ends": 0.5})
    assert sampled["gain"]["mean"] == pytest.approx(0.25)


def test_coverage_leaves_out_rollouts_without_a_loss() -> None:
    out: Any = SimpleNamespace(
        per_sequence=torch.tensor([0.0, 1.0, 1.0]), stderr=torch.tensor([0.0, 0.1, 0.1]), degrees_of_freedom=7
    )
    assert bench_estimators.coverage(out, torch.tensor([0.0, 1.1, 2.0])) == 0.5


def test_tokens_of_probability_one_are_unlikely_in_both_places() -> None:
    """log pi(y) = -h = 0 there, and a token is likely where log pi(y) > -h."""
    mask = torch.tensor([[False, True, True]] * 2)
    batch = Batch(mask.long(), mask | True, mask, coefficients=torch.tensor([[1.0], [-1.0]]) * mask)
    values = TokenValues(torch.tensor([[0.0, 0.0, -0.1]] * 2), torch.tensor([[0.0, 0.0, 0.5]] * 2))
    out: Any = SimpleNamespace(per_token=torch.tensor([[0.0, -1.0, 2.0]] * 2), momentum=torch.tensor(0.0))
    rollouts: Any = [SimpleNamespace(advantage=x, reward=x, group=0) for x in (1.0, -1.0)]
    cells = bench_collapse.figures_of_tokens(out, batch, values, rollouts, 1.0)["cells"]
    assert [cells[name]["sum"] for name in bench_collapse.BY_REGION] == [2.0, -1.0, 2.0, -1.0]
    assert fx.labels.regions(batch, values).index[mask].tolist() == [1, 0, 3, 2]
