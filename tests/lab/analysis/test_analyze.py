"""Statistics of a run against explicit loops and against correlations that were planted."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.synthetic_runs import PROMPT, synthetic_run
from helpers.tolerances import rounding_bound
from rich.console import Console
from scipy import stats

from fx_influence.estimators.concentration import top_share
from fx_influence.lab.analysis.analyze import FOLDER, TITLES, analyze, print_analysis, write_analysis
from fx_influence.lab.analysis.covariates import Tokens, importance_weights, rollout_covariates
from fx_influence.lab.analysis.directions import direction_rows
from fx_influence.lab.analysis.reward_price import pareto, reward_price
from fx_influence.lab.analysis.rollout_correlations import rollout_correlations
from fx_influence.lab.analysis.token_correlations import proxy_rows, token_correlations
from fx_influence.lab.analysis.token_sums import FRACTIONS, concentration_rows, sign_rows, source_rows

RNG = np.random.default_rng(5)
# Correlations are sums over at most some hundred values, which are centred and ranked by sums as long.
ROUNDING = rounding_bound(torch.float64, 1000)
TIED = np.round(RNG.standard_normal((3, 40)), 1)


def row_of(rows: list[dict], **wanted: object) -> dict:
    [row] = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return row


def test_covariates_match_the_rollouts(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    columns = rollout_covariates(run)
    rewards = np.array([r.reward for r in run.update_rollouts])
    assert columns["prompt_difficulty"][4:8] == pytest.approx(1 - rewards[4:8].mean())
    assert np.array_equal(columns["importance_weight"], np.ones(len(rewards)))
    older = [
        dataclasses.replace(r, behaviour_logprobs=tuple(x - 0.25 for x in r.behaviour_logprobs or ()))
        for r in run.update_rollouts
    ]
    off = dataclasses.replace(run, update_rollouts=older)
    assert importance_weights(off) == pytest.approx(np.exp(6 * 0.25), rel=rounding_bound(torch.float32, 6, 6))
    masked_rollouts = [dataclasses.replace(r, completion_mask=(True, False) * 3) for r in older]
    masked = dataclasses.replace(run, update_rollouts=masked_rollouts)
    assert importance_weights(masked) == pytest.approx(np.exp(3 * 0.25), rel=rounding_bound(torch.float32, 6, 6))
    tokens = Tokens(masked)
    assert tokens.position[:4].tolist() == [0, 1, 2, 0]
    expected = run.evaluations[0].arrays["per_token"][:, PROMPT::2]
    assert tokens.influence == pytest.approx(expected.ravel())
    unscored = [dataclasses.replace(r, behaviour_logprobs=None) for r in older]
    assert isinstance(importance_weights(dataclasses.replace(run, update_rollouts=unscored)), str)


def test_rollout_correlations_detect_a_planted_correlate(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    advantage = np.array([r["advantage"] for r in run.sequences])
    influence = run.evaluations[0].arrays["per_sequence"]
    norms = np.array([r["gradient_norm"] for r in run.sequences])
    rows = rollout_correlations(run)
    for name, weights in (("none", 0 * norms), ("uniform", 1 + 0 * norms), ("grad_norm", norms)):
        allocated = influence - 3.0 * weights / max(weights.sum(), 1)
        row = row_of(rows, influence=name, measure="spearman", **{"with": "advantage"})
        assert row["value"] == pytest.approx(stats.spearmanr(allocated, advantage).statistic)
        assert row["low"] > 0.3
        assert row["q"] < 0.01
    reward = row_of(rows, influence="none", measure="partial_pearson", **{"with": "reward"})
    assert (
        abs(reward["value"]) < 0.35 < row_of(rows, influence="none", measure="pearson", **{"with": "reward"})["value"]
    )
    assert row_of(rows, influence="none", measure="pearson", **{"with": "completion_length"})["note"].endswith(
        "completion_length is constant, 6"
    )


def test_proxy_rows_detect_influences_made_of_the_proxy(tmp_path: Path) -> None:
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


def test_token_correlations_note_the_subset_of_intervals(tmp_path: Path) -> None:
    tokens = Tokens(synthetic_run(tmp_path, tokens=20))
    full = token_correlations(tokens)
    subset = token_correlations(tokens, interval_tokens=200)
    assert [row["value"] for row in subset] == pytest.approx([row["value"] for row in full])
    assert all(row["note"] == "interval and p from 200 of 960 tokens" for row in subset)
    assert all(row["note"] == "" for row in full)
    widths = [[row["high"] - row["low"] for row in rows] for rows in (subset, full)]
    assert np.mean(widths[0]) > 1.2 * np.mean(widths[1])


def test_concentration_rows_match_top_share() -> None:
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
    zeros = concentration_rows(np.zeros(10))
    assert [row["absolute_share"] for row in zeros] == [None] * 5


def test_sign_rows_add_up_to_the_influence(tmp_path: Path) -> None:
    tokens = Tokens(synthetic_run(tmp_path))
    rows, advantage = sign_rows(tokens), np.asarray(tokens.advantage)
    logprob, entropy = np.asarray(tokens.logprob), np.asarray(tokens.entropy)
    for split in ("expected", "median"):
        cells = [row for row in rows if row["split"] == split]
        assert sum(row["sum"] for row in cells) == pytest.approx(tokens.influence.sum())
        assert sum(row["tokens"] for row in cells) == len(tokens.influence)
        assert sum(row["absolute_share"] for row in cells) == pytest.approx(1)
    mask = (advantage > 0) & (logprob < -entropy)
    low = row_of(rows, split="expected", advantage="positive", probability="low")
    assert (low["tokens"], low["sum"]) == (mask.sum(), pytest.approx(tokens.influence[mask].sum()))
    sums = [tokens.influence[mask & (tokens.prompt == k)].sum() for k in range(12)]
    draws = np.random.default_rng(2).choice(sums, (4000, 12)).sum(1)
    assert [low["low"], low["high"]] == pytest.approx(np.quantile(draws, [0.025, 0.975]), rel=0.1)
    assert low["low"] > 0, "tokens of low probability with a positive advantage raise the entropy of this run"


def test_pareto_matches_comparison_of_all_pairs() -> None:
    points = np.round(RNG.standard_normal((2, 60)), 1)
    beaten = [
        any((points[:, j] >= points[:, i]).all() and (points[:, j] > points[:, i]).any() for j in range(60))
        for i in range(60)
    ]
    assert sorted(pareto(*points)) == [i for i in range(60) if not beaten[i]]
    assert 1 < len(pareto(*points)) < 15
    assert pareto(np.array([1.0, 1.0, 1.0]), np.array([2.0, 1.0, 2.0])) == [0, 2], "equal points are both in the set"


def test_reward_price_is_the_ratio_of_the_changes(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    arrays, summary = run.evaluations[0].arrays, run.evaluations[0].summary
    rows, pareto_set = reward_price(run)
    reward = arrays["per_sequence_reward"].sum() + 1.0
    price = row_of(rows, quantity="price, whole step (nats per unit of reward)")
    assert price["value"] == pytest.approx(summary["total"] / reward)
    assert row_of(rows, quantity="reward, whole step (per unit lr)")["stderr"] == 0.25
    both = (arrays["per_sequence"] > 0) & (arrays["per_sequence_reward"] > 0)
    assert row_of(rows, quantity="rollouts that raise entropy and reward")["value"] == both.sum()
    assert {row["id"] for row in pareto_set} == {
        run.sequences[i]["id"] for i in pareto(arrays["per_sequence"], arrays["per_sequence_reward"])
    }
    [missing], none = reward_price(synthetic_run(tmp_path, per_sequence_reward=None))
    assert missing["note"].startswith("not defined: influences on the reward were not stored")
    assert none == []


def test_direction_rows_list_both_directions(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    rows = direction_rows(run)
    assert row_of(rows, quantity="multiple")["rmsprop"] == pytest.approx(10)
    assert row_of(rows, quantity="off the multiple")["rmsprop"] == pytest.approx(0, abs=ROUNDING)
    row = row_of(rows, quantity="whole step", eta=1e-3)
    assert (row["adamw"], row["rmsprop"]) == (pytest.approx(-2e-3), pytest.approx(1e-2))
    skewed = run.evaluations[0].arrays["per_sequence"].copy()
    skewed[0] += 100.0
    other = direction_rows(synthetic_run(tmp_path, per_sequence_rmsprop=skewed))
    assert row_of(other, quantity="off the multiple")["rmsprop"] > 0.5


def test_analyze_notes_what_a_training_step_lacks(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    arrays = {name: run.evaluations[0].arrays[name] for name in ("per_sequence", "per_token", "stderr", "eta", "full")}
    evaluation = dataclasses.replace(run.evaluations[0], arrays=arrays, matrix=None)
    sequences = [{**record, "gradient_norm": None} for record in run.sequences]
    analysis = analyze(dataclasses.replace(run, evaluations=(evaluation,), sequences=sequences, tokens={}))
    rows = analysis["rollout_correlations"]
    assert row_of(rows, influence="none", measure="pearson", **{"with": "gradient_norm"})["note"].endswith(
        "gradient_norm was not recorded for every rollout"
    )
    assert {row["note"] for row in rows if row["influence"] == "grad_norm" and row["with"] == "reward"} == {
        "not defined: the influence needs gradient_norm, which was not recorded for every rollout"
    }
    assert "not stored" in row_of(analysis["token_correlations"], measure="pearson", **{"with": "logprob"})["note"]
    assert analysis["directions"][0]["note"].startswith("not defined")
    assert analysis["advantage_by_probability"][0]["note"].startswith("not defined")
    json.dumps(analysis, allow_nan=False)


def test_analyze_has_no_nan_when_all_influences_are_zero(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    zeros: dict[str, Any] = {
        name: 0 * run.evaluations[0].arrays[name] for name in ("per_sequence", "per_token", "stderr")
    }
    analysis = analyze(synthetic_run(tmp_path, **zeros, per_sequence_rmsprop=zeros["per_sequence"]))
    assert all(row["value"] is None for row in analysis["rollout_correlations"] if row["influence"] == "none")
    json.dumps(analysis, allow_nan=False)


def test_sums_by_source_match_loops(tmp_path: Path) -> None:
    """A rollout without a source is of the unknown one; where none has a source there is no table."""
    run = synthetic_run(tmp_path)
    assert source_rows(Tokens(run)) == []
    names = [("math", "code", None)[i % 3] for i in range(len(run.update_rollouts))]
    rollouts = [dataclasses.replace(r, source=name) for r, name in zip(run.update_rollouts, names, strict=True)]
    rows = source_rows(Tokens(dataclasses.replace(run, update_rollouts=rollouts)))
    per_token = run.evaluations[0].arrays["per_token"]
    for name in ("math", "code", "unknown"):
        chosen = [i for i, source in enumerate(names) if (source or "unknown") == name]
        row = row_of(rows, source=name)
        assert row["rollouts"] == len(chosen)
        assert row["sum"] == pytest.approx(
            sum(per_token[i].sum() for i in chosen), abs=ROUNDING * np.abs(per_token).sum()
        )
        assert row["low"] < row["sum"] < row["high"]
    assert sum(row["absolute_share"] for row in rows) == pytest.approx(1.0)
    assert [row["absolute_share"] for row in rows] == sorted((row["absolute_share"] for row in rows), reverse=True)


def test_write_analysis_writes_reproducible_tables(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    analyses = write_analysis(run)
    files = {path.name: path.read_bytes() for path in (tmp_path / FOLDER).iterdir()}
    assert set(files) == {"analysis.json", *(f"{name}.csv" for name in TITLES)}
    assert json.loads(files["analysis.json"]) == analyses == [analyze(run)]
    rows = list(csv.DictReader(files["rollout_correlations.csv"].decode().splitlines()))
    assert len(rows) == len(analyses[0]["rollout_correlations"])
    assert float(rows[0]["value"]) == analyses[0]["rollout_correlations"][0]["value"]
    assert rows[0]["evaluation"] == "0"
    write_analysis(run)
    assert {path.name: path.read_bytes() for path in (tmp_path / FOLDER).iterdir()} == files


def test_print_analysis_escapes_text_and_prints_all_tables(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    run.sequences[int(np.argmax(run.evaluations[0].arrays["per_sequence_reward"]))]["id"] = "[red]\x1b[31m"
    run = dataclasses.replace(
        run, update_rollouts=[dataclasses.replace(r, source="\x1b[2m") for r in run.update_rollouts]
    )
    console = Console(width=200, file=io.StringIO())
    with console.capture() as captured:
        print_analysis(analyze(run), console)
    page = " ".join(captured.get().split())
    assert "[red]\\x1b[31m" in page
    assert "\\x1b[2m" in page
    assert "\x1b[2m" not in page
    assert all(title in page for title in TITLES.values())
