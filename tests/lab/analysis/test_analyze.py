"""The statistics of a run against scipy, against loops written out, and against correlations that were planted."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.synthetic_runs import PROMPT, synthetic_run
from helpers.tolerances import rounding_bound
from rich.console import Console
from scipy import stats

from fx_influence.estimators.concentration import top_share
from fx_influence.lab.analysis.analyze import FOLDER, TITLES, analyze, print_analysis, write_analysis
from fx_influence.lab.analysis.correlation import (
    adjust,
    bootstrap,
    cluster_counts,
    correlation_rows,
    correlations,
    partial,
)
from fx_influence.lab.analysis.covariates import Tokens, importance_weights, rollout_covariates
from fx_influence.lab.analysis.directions import direction_rows
from fx_influence.lab.analysis.reward_price import pareto, reward_price
from fx_influence.lab.analysis.rollout_correlations import rollout_correlations
from fx_influence.lab.analysis.token_correlations import proxy_rows, token_correlations
from fx_influence.lab.analysis.token_sums import FRACTIONS, concentration_rows, sign_rows

RNG = np.random.default_rng(5)
# Correlations are sums over at most some hundred values, which are centred and ranked by sums as long.
ROUNDING = rounding_bound(torch.float64, 1000)
TIED = np.round(RNG.standard_normal((3, 40)), 1)


def row_of(rows: list[dict], **wanted: object) -> dict:
    [row] = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return row


def test_the_correlations_of_the_sample_are_scipys_ties_and_all() -> None:
    found = correlations(TIED, np.ones((1, 40)))
    for i, j in ((0, 1), (1, 2), (2, 0)):
        assert found.pearson[0, i, j] == pytest.approx(stats.pearsonr(TIED[i], TIED[j]).statistic, abs=ROUNDING)
        assert found.spearman[0, i, j] == pytest.approx(stats.spearmanr(TIED[i], TIED[j]).statistic, abs=ROUNDING)


def test_a_resample_is_the_sample_with_its_clusters_repeated() -> None:
    clusters = np.arange(40) // 4
    counts = cluster_counts(clusters, resamples=7, seed=3)
    assert (counts.sum(1) == 10).all()
    drawn = bootstrap(TIED, clusters, resamples=7, seed=3)
    for b, count in enumerate(counts.astype(int)):
        rows = np.concatenate([np.flatnonzero(clusters == c) for c in range(10) for _ in range(count[c])])
        x, y = TIED[0][rows], TIED[1][rows]
        assert drawn.pearson[b, 0, 1] == pytest.approx(stats.pearsonr(x, y).statistic, abs=ROUNDING)
        assert drawn.spearman[b, 0, 1] == pytest.approx(stats.spearmanr(x, y).statistic, abs=ROUNDING)


def test_the_interval_is_the_middle_95_percent_of_the_resamples() -> None:
    clusters = np.arange(40) // 4
    drawn = bootstrap(TIED, clusters).spearman[:, 0, 1]
    row = correlation_rows({"d": TIED[0]}, {"c": TIED[1]}, clusters)[1]
    assert [row["low"], row["high"]] == pytest.approx(np.percentile(drawn, [2.5, 97.5]))
    z = np.arctanh(row["value"]) / np.arctanh(drawn).std(ddof=1)
    assert row["p"] == pytest.approx(2 * stats.t(9).sf(abs(z)))


def test_blocks_of_resamples_are_those_of_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    clusters = np.arange(40) // 4
    whole = bootstrap(TIED, clusters, resamples=30)
    monkeypatch.setattr("fx_influence.lab.analysis.correlation.BLOCK", 7 * 3 * 40)
    np.testing.assert_allclose(bootstrap(TIED, clusters, resamples=30).spearman, whole.spearman, rtol=0, atol=ROUNDING)


def test_a_partial_correlation_is_that_of_what_is_left_of_two_regressions() -> None:
    g = RNG.standard_normal(60)
    x, y = 2 * g + RNG.standard_normal(60), -g + RNG.standard_normal(60)
    left = [stats.linregress(g, v) for v in (x, y)]
    residuals = [v - fit.slope * g for v, fit in zip((x, y), left, strict=True)]
    matrix = correlations(np.stack([x, y, g]), np.ones((1, 60))).pearson
    expected = stats.pearsonr(*residuals).statistic
    assert partial(matrix, 0, 1, given=2)[0] == pytest.approx(expected, abs=ROUNDING)
    assert abs(expected - matrix[0, 0, 1]) > 0.3


def test_the_interval_covers_what_prompts_share() -> None:
    """Rows that come in equal copies say no more than one of each: the interval knows, a p-value of rows does not."""
    x, noise = np.random.default_rng(8).standard_normal((2, 25))
    y = 0.4 * x + noise
    many = np.repeat(np.stack([x, y]), 40, axis=1)
    once = correlation_rows({"d": x}, {"c": y}, np.arange(25))
    copied = correlation_rows({"d": many[0]}, {"c": many[1]}, np.repeat(np.arange(25), 40))
    for a, b in zip(once, copied, strict=True):
        assert [b[name] for name in ("value", "low", "high", "p")] == pytest.approx(
            [a[name] for name in ("value", "low", "high", "p")]
        )
    assert stats.pearsonr(*many).pvalue < 1e-3 < once[0]["p"]


def test_intervals_hold_the_truth_as_often_as_they_say_and_p_is_even_where_nothing_is() -> None:
    rng, inside, values = np.random.default_rng(11), 0, []
    for _ in range(150):
        shared = rng.standard_normal((2, 30))
        x, y = np.repeat(shared, 4, axis=1) + rng.standard_normal((2, 120))
        row = correlation_rows({"d": x}, {"c": y}, np.repeat(np.arange(30), 4), measures=("pearson",))[0]
        inside += row["low"] <= 0 <= row["high"]
        values.append(row["p"])
    assert 0.86 < inside / 150 < 0.99
    assert stats.kstest(values, "uniform").pvalue > 1e-3


def test_q_is_scipys_false_discovery_rate_over_the_rows_that_have_a_p() -> None:
    rows = [{"p": p, "n": 9, "clusters": 3, "note": ""} for p in (0.01, None, 0.04, 0.03)]
    assert [row["q"] for row in adjust(rows)] == [pytest.approx(0.03), None, pytest.approx(0.04), pytest.approx(0.04)]


def test_what_is_constant_missing_or_determined_says_so() -> None:
    x, clusters = np.arange(8.0), np.arange(8) // 2
    covariates = {"advantage": x**2, "flat": np.full(8, 2.0), "absent": "was not recorded", "twice": 2 * x**2}
    rows = correlation_rows({"d": x}, covariates, clusters, "advantage", ("pearson", "partial_pearson"))
    assert {(row["with"], row["measure"]): row["note"] for row in rows if row["value"] is None} == {
        ("advantage", "partial_pearson"): "not defined: advantage is what is held fixed",
        ("flat", "pearson"): "not defined: flat is constant, 2",
        ("flat", "partial_pearson"): "not defined: flat is constant, 2",
        ("absent", "pearson"): "not defined: absent was not recorded",
        ("absent", "partial_pearson"): "not defined: absent was not recorded",
        ("twice", "partial_pearson"): "not defined: determined by what is held fixed",
    }
    still = correlation_rows({"d": np.zeros(8)}, {"c": x}, clusters)
    assert still[0]["note"] == "not defined: the influence is constant, 0"
    single = correlation_rows({"d": x}, {"c": x**2}, np.zeros(8, dtype=int))
    assert single[0]["value"] > 0.9
    assert single[0]["low"] is None
    assert single[0]["note"] == "no interval: a single prompt"


def test_the_covariates_are_those_of_the_rollouts(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    found = rollout_covariates(run)
    rewards = np.array([r.reward for r in run.update_rollouts])
    assert found["prompt_difficulty"][4:8] == pytest.approx(1 - rewards[4:8].mean())
    assert (found["importance_weight"] == 1).all()
    older = [
        dataclasses.replace(r, behaviour_logprobs=tuple(x - 0.25 for x in r.behaviour_logprobs or ()))
        for r in run.update_rollouts
    ]
    off = dataclasses.replace(run, update_rollouts=older)
    assert importance_weights(off) == pytest.approx(np.exp(6 * 0.25), rel=rounding_bound(torch.float32, 6, 6))
    half = [dataclasses.replace(r, completion_mask=(True, False) * 3) for r in older]
    masked = dataclasses.replace(run, update_rollouts=half)
    assert importance_weights(masked) == pytest.approx(np.exp(3 * 0.25), rel=rounding_bound(torch.float32, 6, 6))
    tokens = Tokens(masked)
    assert tokens.position[:4].tolist() == [0, 1, 2, 0]
    expected = run.evaluations[0].arrays["per_token"][:, PROMPT::2]
    assert tokens.influence == pytest.approx(expected.ravel())
    silent = [dataclasses.replace(r, behaviour_logprobs=None) for r in older]
    assert isinstance(importance_weights(dataclasses.replace(run, update_rollouts=silent)), str)


def test_a_planted_correlate_is_found_under_every_allocation_of_the_baseline(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    advantage = np.array([r["advantage"] for r in run.sequences])
    influence = run.evaluations[0].arrays["per_sequence"]
    norms = np.array([r["gradient_norm"] for r in run.sequences])
    rows = rollout_correlations(run)
    for name, weights in (("none", 0 * norms), ("uniform", 1 + 0 * norms), ("grad_norm", norms)):
        dealt = influence - 3.0 * weights / max(weights.sum(), 1)
        found = row_of(rows, influence=name, measure="spearman", **{"with": "advantage"})
        assert found["value"] == pytest.approx(stats.spearmanr(dealt, advantage).statistic)
        assert found["low"] > 0.3
        assert found["q"] < 0.01
    reward = row_of(rows, influence="none", measure="partial_pearson", **{"with": "reward"})
    assert (
        abs(reward["value"]) < 0.35 < row_of(rows, influence="none", measure="pearson", **{"with": "reward"})["value"]
    )
    assert row_of(rows, influence="none", measure="pearson", **{"with": "completion_length"})["note"].endswith(
        "completion_length is constant, 6"
    )


def test_the_proxy_explains_influences_that_are_made_of_it(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    proxy = np.asarray(Tokens(run).proxy())
    by_hand = run.tokens["logprobs"][:, PROMPT:].astype(float)
    advantage = np.array([r["advantage"] for r in run.sequences])[:, None] + 0 * by_hand
    assert proxy == pytest.approx(((by_hand - by_hand.mean()) * (advantage - advantage.mean())).ravel())
    noise = np.random.default_rng(1).standard_normal(len(proxy)) * proxy.std()
    per_token = np.pad((noise - 2 * proxy).reshape(by_hand.shape), ((0, 0), (PROMPT, 0)))
    rows = proxy_rows(Tokens(synthetic_run(tmp_path, per_token=per_token, per_sequence=per_token.sum(1))))
    r2 = row_of(rows, of="tokens", measure="r2")
    assert r2["value"] == pytest.approx(stats.linregress(proxy, noise - 2 * proxy).rvalue ** 2)
    assert r2["low"] < 0.8 < r2["high"]
    sums = proxy.reshape(len(by_hand), -1).sum(1)
    rollouts = row_of(rows, of="rollouts", measure="spearman")
    assert rollouts["value"] == pytest.approx(stats.spearmanr(sums, per_token.sum(1)).statistic)
    assert rollouts["high"] < -0.5


def test_of_many_tokens_the_values_are_of_all_and_the_intervals_say_of_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = Tokens(synthetic_run(tmp_path, tokens=20))
    whole = token_correlations(tokens)
    monkeypatch.setattr("fx_influence.lab.analysis.token_correlations.INTERVAL_TOKENS", 200)
    some = token_correlations(tokens)
    assert [row["value"] for row in some] == pytest.approx([row["value"] for row in whole])
    assert all(row["note"] == "interval and p from 200 of 960 tokens" for row in some)
    assert all(row["note"] == "" for row in whole)
    widths = [[row["high"] - row["low"] for row in rows] for rows in (some, whole)]
    assert np.mean(widths[0]) > 1.2 * np.mean(widths[1])


def test_the_shares_of_the_strongest_tokens_are_those_of_top_share() -> None:
    influence = RNG.standard_normal(900) ** 3
    order = np.argsort(-np.abs(influence))
    for row in concentration_rows(influence):
        assert row["absolute_share"] == pytest.approx(top_share(torch.from_numpy(influence), row["fraction"]).item())
        chosen = influence[order[: row["tokens"]]]
        assert row["raising_share"] == pytest.approx(chosen[chosen > 0].sum() / influence[influence > 0].sum())
        assert row["lowering_share"] == pytest.approx(chosen[chosen < 0].sum() / influence[influence < 0].sum())
        assert row["net_share"] == pytest.approx(chosen.sum() / influence.sum())
    assert (
        [row["fraction"] for row in concentration_rows(influence)] == list(FRACTIONS) == [0.0002, 0.002, 0.02, 0.2, 0.5]
    )
    nothing = concentration_rows(np.zeros(10))
    assert [row["absolute_share"] for row in nothing] == [None] * 5


def test_the_cells_of_advantage_and_probability_add_up(tmp_path: Path) -> None:
    tokens = Tokens(synthetic_run(tmp_path))
    rows, advantage = sign_rows(tokens), np.asarray(tokens.advantage)
    logprob, entropy = np.asarray(tokens.logprob), np.asarray(tokens.entropy)
    for split in ("expected", "median"):
        of = [row for row in rows if row["split"] == split]
        assert sum(row["sum"] for row in of) == pytest.approx(tokens.influence.sum())
        assert sum(row["tokens"] for row in of) == len(tokens.influence)
        assert sum(row["absolute_share"] for row in of) == pytest.approx(1)
    chosen = (advantage > 0) & (logprob < -entropy)
    low = row_of(rows, split="expected", advantage="positive", probability="low")
    assert (low["tokens"], low["sum"]) == (chosen.sum(), pytest.approx(tokens.influence[chosen].sum()))
    sums = [tokens.influence[chosen & (tokens.prompt == k)].sum() for k in range(12)]
    draws = np.random.default_rng(2).choice(sums, (4000, 12)).sum(1)
    assert [low["low"], low["high"]] == pytest.approx(np.quantile(draws, [0.025, 0.975]), rel=0.1)
    assert low["low"] > 0, "tokens of low probability with a positive advantage raise the entropy of this run"


def test_the_pareto_set_is_that_of_comparing_all_pairs() -> None:
    points = np.round(RNG.standard_normal((2, 60)), 1)
    beaten = [
        any((points[:, j] >= points[:, i]).all() and (points[:, j] > points[:, i]).any() for j in range(60))
        for i in range(60)
    ]
    assert sorted(pareto(*points)) == [i for i in range(60) if not beaten[i]]
    assert 1 < len(pareto(*points)) < 15
    assert pareto(np.array([1.0, 1.0, 1.0]), np.array([2.0, 1.0, 2.0])) == [0, 2], "equal ones are in together"


def test_the_price_of_reward_is_the_ratio_of_the_two_changes(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    arrays, summary = run.evaluations[0].arrays, run.evaluations[0].summary
    rows, best = reward_price(run)
    reward = arrays["per_sequence_reward"].sum() + 1.0
    price = row_of(rows, quantity="price, whole step (nats per unit of reward)")
    assert price["value"] == pytest.approx(summary["total"] / reward)
    assert row_of(rows, quantity="reward, whole step (per unit lr)")["stderr"] == 0.25
    both = (arrays["per_sequence"] > 0) & (arrays["per_sequence_reward"] > 0)
    assert row_of(rows, quantity="rollouts that raise entropy and reward")["value"] == both.sum()
    assert {row["id"] for row in best} == {
        run.sequences[i]["id"] for i in pareto(arrays["per_sequence"], arrays["per_sequence_reward"])
    }
    [missing], none = reward_price(synthetic_run(tmp_path, per_sequence_reward=None))
    assert missing["note"].startswith("not defined: influences on the reward were not stored")
    assert none == []


def test_the_two_directions_stand_beside_each_other(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    rows = direction_rows(run)
    assert row_of(rows, quantity="multiple")["rmsprop"] == pytest.approx(10)
    assert row_of(rows, quantity="off the multiple")["rmsprop"] == pytest.approx(0, abs=ROUNDING)
    at = row_of(rows, quantity="whole step", eta=1e-3)
    assert (at["adamw"], at["rmsprop"]) == (pytest.approx(-2e-3), pytest.approx(1e-2))
    skewed = run.evaluations[0].arrays["per_sequence"].copy()
    skewed[0] += 100.0
    other = direction_rows(synthetic_run(tmp_path, per_sequence_rmsprop=skewed))
    assert row_of(other, quantity="off the multiple")["rmsprop"] > 0.5


def test_a_step_of_a_training_has_every_table_and_says_what_is_missing(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    kept = {name: run.evaluations[0].arrays[name] for name in ("per_sequence", "per_token", "stderr", "eta", "full")}
    evaluation = dataclasses.replace(run.evaluations[0], arrays=kept, matrix=None)
    sequences = [{**record, "gradient_norm": None} for record in run.sequences]
    found = analyze(dataclasses.replace(run, evaluations=(evaluation,), sequences=sequences, tokens={}))
    rows = found["rollout_correlations"]
    assert row_of(rows, influence="none", measure="pearson", **{"with": "gradient_norm"})["note"].endswith(
        "gradient_norm was not recorded for every rollout"
    )
    assert {row["note"] for row in rows if row["influence"] == "grad_norm" and row["with"] == "reward"} == {
        "not defined: the influence needs gradient_norm, which was not recorded for every rollout"
    }
    assert "not stored" in row_of(found["token_correlations"], measure="pearson", **{"with": "logprob"})["note"]
    assert found["directions"][0]["note"].startswith("not defined")
    assert found["advantage_by_probability"][0]["note"].startswith("not defined")
    json.dumps(found, allow_nan=False)


def test_a_run_in_which_nothing_moves_is_analysed_without_a_number_that_is_none(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    nothing = {name: 0 * run.evaluations[0].arrays[name] for name in ("per_sequence", "per_token", "stderr")}
    still = synthetic_run(tmp_path, **nothing, per_sequence_rmsprop=nothing["per_sequence"])
    found = analyze(still)
    assert all(row["value"] is None for row in found["rollout_correlations"] if row["influence"] == "none")
    json.dumps(found, allow_nan=False)


def test_analyze_writes_a_csv_for_each_table_and_the_same_again(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    found = write_analysis(run)
    files = {path.name: path.read_bytes() for path in (tmp_path / FOLDER).iterdir()}
    assert set(files) == {"analysis.json", *(f"{name}.csv" for name in TITLES)}
    assert json.loads(files["analysis.json"]) == found == [analyze(run)]
    rows = list(csv.DictReader(files["rollout_correlations.csv"].decode().splitlines()))
    assert len(rows) == len(found[0]["rollout_correlations"])
    assert float(rows[0]["value"]) == found[0]["rollout_correlations"][0]["value"]
    assert rows[0]["evaluation"] == "0"
    write_analysis(run)
    assert {path.name: path.read_bytes() for path in (tmp_path / FOLDER).iterdir()} == files


def test_what_is_printed_is_escaped_and_complete(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    run.sequences[int(np.argmax(run.evaluations[0].arrays["per_sequence_reward"]))]["id"] = "[red]\x1b[31m"
    console = Console(width=200, file=io.StringIO())
    with console.capture() as captured:
        print_analysis(analyze(run), console)
    page = " ".join(captured.get().split())
    assert "[red]\\x1b[31m" in page
    assert all(title in page for title in TITLES.values())
