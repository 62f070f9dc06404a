"""The benchmark on two sources of tasks: its tasks and rewards, and what it compares the ledger with."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.made_trainings import write_made_ledger
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fx_influence as fx
from benchmarks.real.bench_real_ledger import APART, levels, same_policy, until
from benchmarks.real.language_model import tiny_model
from benchmarks.real.two_sources.agreement import Pair, agreement, label_totals, pairs
from benchmarks.real.two_sources.entropy import BATCH_SIZE, SEED, entropy, entropy_change, prompt_sums
from benchmarks.real.two_sources.tasks import COUNTS, EASY, FILES, HARD, SOURCES, of_sources, tasks
from benchmarks.real.two_sources.training import PROMPTS, last_step, saved_policies
from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.sampling import sample
from fx_influence.lab.training.account import account, label_sums


def test_steps_have_as_many_prompts_of_each_source() -> None:
    sources = [task.source for task in tasks("train")]
    assert len(sources) % PROMPTS == 0
    for start in range(0, len(sources), PROMPTS):
        assert sources[start : start + PROMPTS] == list(SOURCES) * (PROMPTS // 2)


def test_two_sources_share_no_question_between_splits() -> None:
    texts = {split: {str(task.question) for task in tasks(split)} for split in FILES}
    assert {split: len(x) for split, x in texts.items()} == {split: 2 * count for split, count in COUNTS.items()}
    assert not texts["train"] & texts["eval"]


def test_silenced_source_has_no_rewards() -> None:
    def reward(completions: list[str], source: list[str], **columns: object) -> list[float]:
        return [float(len(text)) for text in completions]

    texts, sources = ["a", "bb", "ccc"], [EASY, HARD, EASY]
    assert of_sources(reward, SOURCES)(completions=texts, source=sources) == [1.0, 2.0, 3.0]
    assert of_sources(reward, (EASY,))(completions=texts, source=sources) == [1.0, 0.0, 3.0]


def pair(first: float, second: float, stderr: float = 0.5, label: str = "a") -> Pair:
    return Pair(1, "source", label, first, stderr, second, stderr)


def test_agreement_gives_slopes_and_share_inside_errors() -> None:
    compared = [pair(1.0, 2.0), pair(2.0, 4.0), pair(-1.0, -2.0, 0.1), pair(3.0, 6.0, math.nan)]
    figures = agreement(compared, [6.0, 6.0])
    assert (figures["count"], figures["with_error"]) == (4, 3)
    assert figures["correlation"] == pytest.approx(1.0)
    assert (figures["slope"], figures["slope_back"]) == (2.0, 0.5)
    # Differences of 1, 2 and 1 beside 2.179, with 12 degrees of freedom, times sqrt(2) times 0.5, 0.5 and 0.1.
    assert figures["inside"] == pytest.approx(1 / 3)


def test_agreement_of_too_few_sums_is_unknown() -> None:
    figures = agreement([pair(1.0, 2.0, math.nan)], [6.0, 6.0])
    assert (figures["correlation"], figures["slope"], figures["inside"]) == (None, None, None)


def test_label_totals_add_values_and_squared_errors() -> None:
    [a, b] = label_totals([pair(1.0, 2.0, 3.0), pair(0.5, 0.0, 4.0), pair(7.0, 7.0, 1.0, "b")], "source")
    assert (a["label"], a["steps"], a["first"], a["second"]) == ("a", 2, 1.5, 2.0)
    assert (a["first_stderr"], a["second_stderr"]) == (5.0, 5.0)
    assert (b["label"], b["first"]) == ("b", 7.0)
    assert label_totals([], "source") == []


def test_pairs_are_the_sums_that_both_ledgers_have(tmp_path: Path) -> None:
    for name, steps in (("first", 3), ("second", 5)):
        write_made_ledger(tmp_path / name, steps)
    first, second = (fx.load_training(tmp_path / name) for name in ("first", "second"))
    compared = pairs(first, second)
    assert {x.step for x in compared} == {1, 2, 3}
    assert {x.kind for x in compared} == set(first.kinds)
    for kind in first.kinds:
        sums = {x["label"]: x["first"] for x in label_totals(compared, kind)}
        expected = {x.term.name: x.term.value for x in label_sums(first, kind) if x.term.value}
        assert sums == pytest.approx(expected)


def test_until_adds_up_the_first_steps(tmp_path: Path) -> None:
    write_made_ledger(tmp_path, 6)
    training = fx.load_training(tmp_path)
    first = until(training, 4)
    assert (first.last_step, account(first).num_steps) == (4, 4)
    assert account(first).measured.value == pytest.approx(training.steps["measured"][:4].sum())
    by_source = sum(x.term.value for x in label_sums(first, "source"))
    rows = (training.labels["kind"] == "source") & (training.labels["step"] <= 4)
    assert by_source == pytest.approx(training.labels["influence"][rows].sum())


def test_entropy_change_pairs_the_prompts() -> None:
    """A change that is the same for each prompt has no error, however the prompts differ."""
    rng = np.random.default_rng(0)
    before = [{"entropy": float(x), "tokens": 10} for x in rng.uniform(5, 15, 20)]
    after = [{**row, "entropy": row["entropy"] + 2.0} for row in before]
    level, change = entropy(before), entropy_change(before, after)
    assert level.value == pytest.approx(sum(row["entropy"] for row in before) / 200)
    assert level.stderr == pytest.approx(np.std([row["entropy"] / 10 for row in before], ddof=1) / math.sqrt(20))
    assert change.value == pytest.approx(0.2)
    assert change.stderr == pytest.approx(0.0, abs=1e-12)


def test_saved_policies_are_in_the_order_of_steps(tmp_path: Path) -> None:
    assert last_step(tmp_path / "nothing") == 0
    for step in (12, 4, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert list(saved_policies(tmp_path)) == [4, 8, 12]
    assert last_step(tmp_path) == 12


def test_levels_compare_rollouts_with_the_ledger(tmp_path: Path) -> None:
    write_made_ledger(tmp_path, 6)
    training = fx.load_training(tmp_path)
    changes = training.steps["measured"][:] = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    training.steps["entropy"][:] = 7.0 + changes.cumsum() - changes
    figures = levels(training)
    assert figures["steps"] == 3
    assert figures["change"].value == pytest.approx(figures["ledger"].value)
    # Sums before the steps: 0, 1, 3 and 6, 10, 15.
    assert figures["ledger"].value == pytest.approx(31 / 3 - 4 / 3)
    # Shares of the last three steps less those of the first three that come after each step.
    weights = np.array([1 - 2 / 3, 1 - 1 / 3, 1, 2 / 3, 1 / 3, 0])
    errors = training.steps["measured_stderr"]
    assert figures["ledger"].stderr == pytest.approx(math.sqrt(((weights * errors) ** 2).sum()))
    assert figures["change"].stderr == pytest.approx(math.sqrt((7 / 3 + 61 / 3) / 3))


def test_policies_are_compared_to_the_last_bit(tmp_path: Path) -> None:
    weights = {"lora_A.weight": torch.ones(2), "lora_B.weight": torch.ones(2)}
    for folder, b in (("both", 1.0), ("easy", 1.0), ("hard", 0.0)):
        path = tmp_path / folder / "checkpoint-4"
        path.mkdir(parents=True)
        save_file({**weights, "lora_B.weight": torch.full((2,), b)}, path / "adapter_model.safetensors")
    assert [same_policy(tmp_path, run, 4) for run in APART] == ["both", "model"]
    save_file({**weights, "lora_A.weight": torch.zeros(2)}, tmp_path / "easy/checkpoint-4/adapter_model.safetensors")
    assert same_policy(tmp_path, APART[0], 4) is None


@pytest.mark.slow
def test_prompt_sums_are_those_of_scored_rollouts(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    rollouts = sample(
        policy,
        tokenizer,
        tasks("eval")[:3],
        completions_per_prompt=2,
        max_new_tokens=6,
        temperature=1.0,
        seed=SEED,
        batch_size=BATCH_SIZE,
    )
    apply, params = fx.make_functional(policy)
    batch = collate(rollouts, pad_id=0)
    entropies = (fx.token_values(params, batch, apply).entropies.double() * batch.completion_mask).sum(-1)
    sums = prompt_sums(model, None, 6, prompts=3, completions=2)
    assert [row["source"] for row in sums] == [EASY, HARD, EASY]
    assert [row["tokens"] for row in sums] == batch.completion_mask.sum(-1).view(3, 2).sum(1).tolist()
    actual, expected = torch.tensor([row["entropy"] for row in sums]), entropies.view(3, 2).sum(1)
    assert_close_to_rounding(actual, expected, terms=TINY_POLICY, scale=expected.abs().max(), dtype=torch.float32)
