"""Rewards and advantages of sampled rollouts, and groups that are sampled again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
from helpers.sampling_models import (
    EOS,
    ON_POLICY,
    OPTIONS,
    PROMPTS,
    TALK,
    gap,
    make_model,
    make_tokenizer,
)

from fx_influence.interop.prompts import Prompt
from fx_influence.interop.rewards import exact_match
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.sampling import sample, sample_rewarded, with_rewards


def test_with_rewards_passes_conversation_as_messages() -> None:
    prompts = [Prompt("talk", "", {"answer": "4"}, TALK)]
    rollouts = [Rollout("talk/0", "talk", 0, "<bos>...", "4", (2,), (6, EOS), True, (-1.0, -1.0))]
    seen: dict[str, Any] = {}

    def reward(**arguments: Any) -> list[float]:
        seen.update(arguments)
        arguments["prompts"][0].append("mine to change")
        arguments["prompts"][0][0]["content"] = "as well"
        return [1.0]

    with_rewards(rollouts, prompts, reward)
    assert seen["prompts"] == [[{"role": "user", "content": "as well"}, *TALK[1:], "mine to change"]]
    assert seen["completions"] == [[{"role": "assistant", "content": "4"}]]
    assert seen["completion_ids"] == [[6, EOS]]
    assert seen["answer"] == ["4"]
    assert prompts[0].messages is not None
    assert prompts[0].messages[0]["content"] == "1+2"


def judged(rewards: Sequence[float | None], groups: Sequence[int], **options: Any) -> list[Rollout]:
    prompts = [Prompt(str(g), f"{g}=", {"answer": g, **({"rare": "x"} if g == 1 else {})}) for g in range(3)]
    rollouts = [Rollout(f"{g}/{i}", str(g), g, f"{g}=", "t", (2,), (3,), False, (-1.0,)) for i, g in enumerate(groups)]

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        rare = ["x" if g == 1 else None for g in groups]
        assert columns == {"answer": list(groups), "rare": rare, "completion_ids": [[3]] * len(groups)}
        assert prompts == [f"{g}=" for g in groups]
        assert completions == ["t"] * len(groups)
        return list(rewards)

    return with_rewards(rollouts, prompts, reward, **options)


def test_with_rewards_computes_group_relative_advantages() -> None:
    out = judged([1.0, 0.0, 1.0, 4.0, 2.0, 0.1, 0.1, 0.1], [0, 0, 0, 1, 1, 2, 2, 2], scale_advantages=False)
    assert [r.reward for r in out] == [1.0, 0.0, 1.0, 4.0, 2.0, 0.1, 0.1, 0.1]
    assert [r.advantage for r in out[:5]] == pytest.approx([1 / 3, -2 / 3, 1 / 3, 1.0, -1.0])
    assert [r.advantage for r in out[5:]] == [0.0, 0.0, 0.0]
    scaled = judged([4.0, 2.0], [1, 1])
    assert scaled[0].advantage == pytest.approx(1 / (math.sqrt(2) + 1e-4))


@pytest.mark.parametrize("scale", [True, False])
def test_with_rewards_leaves_out_none_rewards(scale: bool) -> None:
    out = judged([1.0, None, 0.0, 4.0, 2.0, None, None], [0, 0, 0, 1, 1, 2, 2], scale_advantages=scale)
    without = judged([1.0, 0.0, 4.0, 2.0], [0, 0, 1, 1], scale_advantages=scale)
    assert [r.reward for r in out] == [1.0, None, 0.0, 4.0, 2.0, None, None]
    assert [r.advantage for r in out if r.reward is not None] == [r.advantage for r in without]
    assert [r.advantage for r in out if r.reward is None] == [0.0, 0.0, 0.0]
    assert [r.advantage for r in judged([None, None], [0, 0], scale_advantages=scale)] == [0.0, 0.0]


def test_with_rewards_names_rollout_of_unknown_prompt() -> None:
    rollout = Rollout("x/0", "x", 0, "", "", (2,), (3,), False, (-1.0,))
    with pytest.raises(ValueError, match="prompt_id of rollout 'x/0' is 'x'"):
        with_rewards([rollout], PROMPTS, exact_match)


class Judge:
    """Reward that counts its calls; groups of the prompts in ``flat`` have equal rewards until call ``until``."""

    def __init__(self, flat: str, until: int) -> None:
        self.flat, self.until, self.calls = flat, until, list[list[str]]()

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        self.calls.append(prompts)
        return [
            0.0 if p in self.flat and len(self.calls) <= self.until else float(i % 2) for i, p in enumerate(prompts)
        ]


def test_sample_rewarded_resamples_up_to_the_bound() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    prompts = [Prompt(name, f"{name}=") for name in "123"]
    first = sample_rewarded(model, tokenizer, prompts, Judge("1=3=", 99), **OPTIONS)
    always = Judge("1=3=", 99)
    again = sample_rewarded(model, tokenizer, prompts, always, **OPTIONS, resample_zero_advantage=2)
    assert [sorted(set(call)) for call in always.calls] == [["1=", "2=", "3="], ["1=", "3="], ["1=", "3="]]
    assert [(r.id, r.group) for r in again] == [(r.id, r.group) for r in first]
    assert again[8:16] == first[8:16]
    assert again[:8] != first[:8]
    assert again[16:] != first[16:]
    assert all(r.advantage == 0.0 for r in (*again[:8], *again[16:]))
    assert gap(model, again) < ON_POLICY


def test_sample_rewarded_stops_when_all_groups_differ() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    once = Judge("3=", 1)
    prompts = [Prompt(name, f"{name}=") for name in "123"]
    out = sample_rewarded(model, tokenizer, prompts, once, **OPTIONS, resample_zero_advantage=5)
    assert len(once.calls) == 2
    assert all(r.advantage for r in out)
    assert [r.group for r in out[16:]] == [2] * 8
    assert out == sample_rewarded(model, tokenizer, prompts, Judge("3=", 1), **OPTIONS, resample_zero_advantage=5)
    redrawn = {dataclasses.replace(r, group=0, reward=None, advantage=None) for r in out[16:]}
    assert not redrawn & set(sample(model, tokenizer, prompts[2:], **{**OPTIONS, "seed": OPTIONS["seed"] + 1}))
    with pytest.raises(ValueError, match="resample_zero_advantage is -1"):
        sample_rewarded(model, tokenizer, prompts, once, **OPTIONS, resample_zero_advantage=-1)


def test_sample_rewarded_resamples_group_with_none() -> None:
    calls: list[int] = []

    def reward(completions: list[str], **_: Any) -> list[float | None]:
        calls.append(len(completions))
        return [1.0 if i % 2 else None for i in range(len(completions))]

    arguments = (make_model(), make_tokenizer(), [Prompt("1", "1=")], reward)
    sample_rewarded(*arguments, **OPTIONS, resample_zero_advantage=2)
    assert calls == [8, 8, 8]


def test_sample_rewarded_uses_new_seed_each_round() -> None:
    model, tokenizer, draws = make_model(), make_tokenizer(), list[list[Rollout]]()
    for rounds in range(3):
        judge = Judge("1=", 99)
        draws.append(
            sample_rewarded(model, tokenizer, [Prompt("1", "1=")], judge, **OPTIONS, resample_zero_advantage=rounds)
        )
        assert len(judge.calls) == len(draws)
    texts = [[r.completion for r in draw] for draw in draws]
    assert texts[0] != texts[1] != texts[2] != texts[0]
