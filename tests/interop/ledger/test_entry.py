"""A step as an entry of a ledger: sums beside loops, the strongest rollouts, figures of the rollouts."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from typing import Any

import pytest
import torch
from helpers.tolerances import assert_close_to_rounding

import fx_influence as fx
from fx_influence import labels
from fx_influence.estimators.deviations import NOTHING_LEFT_OUT, Deviations
from fx_influence.interop.ledger.entry import (
    MAX_PROMPT_TEXT,
    MAX_TEXT,
    STRONGEST,
    ledger_entry,
    lifetime_factor,
    prompt_key,
    rollout_figures,
    step_labels,
)
from fx_influence.types import Batch, TokenValues

COUNT, WIDTH, PROMPT, PARTS, LR = 10, 9, 3, 6, 1e-3


def rollout(i: int, reward: float | None, source: str | None) -> fx.Rollout:
    return fx.Rollout(
        id=f"{i // 2}/{i % 2}",
        prompt_id=str(i // 2),
        group=i // 2,
        prompt="p" * (MAX_TEXT + i),
        completion=f"completion {i}",
        prompt_ids=(1,) * PROMPT,
        completion_ids=(2,) * (WIDTH - PROMPT),
        finished=i % 3 > 0,
        reward=reward,
        advantage=0.0 if i == 4 else 0.5 - i % 2,
        source=source,
    )


@pytest.fixture
def case() -> tuple[fx.Influence, Batch, TokenValues, list[fx.Rollout]]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(COUNT, WIDTH, dtype=torch.bool)
    for i in range(COUNT):
        mask[i, PROMPT : PROMPT + 1 + i % (WIDTH - PROMPT)] = True
    per_token = torch.randn(COUNT, WIDTH, generator=generator, dtype=torch.float64) * mask
    by_part = torch.randn(PARTS, COUNT, generator=generator, dtype=torch.float64)
    deviations = Deviations(by_part - by_part.mean(0), torch.full((COUNT,), NOTHING_LEFT_OUT))
    fields: dict[str, Any] = dict.fromkeys(fx.Influence._fields, torch.zeros((), dtype=torch.float64))
    fields |= {"per_sequence": per_token.sum(-1), "per_token": per_token, "stderr": torch.ones(COUNT)}
    influence = fx.Influence(**{**fields, "deviations": deviations})
    batch = Batch(mask.long(), mask | True, mask, coefficients=per_token)
    logprobs = -torch.rand(COUNT, WIDTH, generator=generator, dtype=torch.float64)
    rollouts = [rollout(i, float(i % 2), None if i == 3 else "ab"[i % 2]) for i in range(COUNT)]
    return influence, batch, TokenValues(logprobs, -logprobs.flip(0)), rollouts


def test_sums_of_rollouts_are_those_of_a_loop(case: tuple[fx.Influence, Batch, TokenValues, list[fx.Rollout]]) -> None:
    influence, batch, values, rollouts = case
    kinds = step_labels(rollouts, batch, values)
    assert list(kinds) == ["third", "band", "advantage", "end", "reward", "reward value", "difficulty", "source"]
    entry = ledger_entry(7, LR, influence, kinds, {"total": 1.0}, rollouts, {"normalize": "token"})
    assert (entry["step"], entry["normalize"], entry["figures"]) == (7, "token", {"total": 1.0})
    label_of = {
        "advantage": lambda r: "A=0" if r.advantage == 0 else "A>0" if r.advantage > 0 else "A<0",
        "end": lambda r: "finished" if r.finished else "truncated",
        "reward": lambda r: f"reward {r.reward:g}",
        "reward value": lambda r: f"reward {r.reward:g}",
        "source": lambda r: r.source or "unknown",
    }
    assert influence.deviations is not None
    for kind, label in label_of.items():
        members: dict[str, list[int]] = defaultdict(list)
        for i, r in enumerate(rollouts):
            members[label(r)].append(i)
        rows = {row[0]: row[1:] for row in entry["sums"][kind]}
        assert set(rows) == set(members)
        for name, indices in members.items():
            total, stderr, count, share = rows[name]
            assert_close_to_rounding(total, LR * sum(float(influence.per_sequence[i]) for i in indices), terms=COUNT)
            parts = [sum(float(influence.deviations.by_part[k, i]) for i in indices) for k in range(PARTS)]
            expected = LR * math.sqrt(PARTS / (PARTS - 1) * sum(x * x for x in parts))
            assert_close_to_rounding(stderr, expected, terms=100)
            assert count == len(indices)
            size = sum(abs(float(x)) for x in influence.per_sequence)
            assert_close_to_rounding(
                share, sum(abs(float(influence.per_sequence[i])) for i in indices) / size, terms=20
            )


def test_sums_of_tokens_partition_the_rollouts(case: tuple[fx.Influence, Batch, TokenValues, list[fx.Rollout]]) -> None:
    influence, batch, values, rollouts = case
    entry = ledger_entry(1, LR, influence, step_labels(rollouts, batch, values), {}, rollouts)
    tokens = int(batch.completion_mask.sum())
    for kind, rows in entry["sums"].items():
        total, of_tokens = sum(row[1] for row in rows), kind in ("third", "band")
        assert_close_to_rounding(total, LR * float(influence.per_sequence.sum()), terms=100, scale=LR * 30)
        assert sum(row[3] for row in rows) == (tokens if of_tokens else COUNT)
        assert all(math.isnan(row[2]) == of_tokens for row in rows)


def test_strongest_rollouts_come_from_both_ends(
    case: tuple[fx.Influence, Batch, TokenValues, list[fx.Rollout]],
) -> None:
    influence, _, _, rollouts = case
    entry = ledger_entry(1, LR, influence, {}, {}, rollouts)
    ranked = sorted((float(x), r.id) for x, r in zip(influence.per_sequence, rollouts, strict=True))
    expected = [*ranked[::-1][:STRONGEST], *ranked[:STRONGEST][::-1]]
    assert [(x["id"]) for x in entry["strongest"]] == [name for _, name in expected]
    assert [x["influence"] for x in entry["strongest"]] == [LR * value for value, _ in expected]
    assert all(len(x["prompt"]) == MAX_TEXT for x in entry["strongest"])
    two = influence._replace(per_sequence=influence.per_sequence[:2], deviations=None)
    few = ledger_entry(1, LR, two, {}, {}, rollouts[:2])
    assert len(few["strongest"]) == 2


def test_prompts_are_summed_up_by_their_tokens(case: tuple[fx.Influence, Batch, TokenValues, list[fx.Rollout]]) -> None:
    """Rollouts of one prompt may have different numbers in different steps, and different groups in one step."""
    influence, _, _, rollouts = case
    rollouts = [dataclasses.replace(r, prompt_ids=(1, r.group % 3), question=f"ask {r.group % 3}") for r in rollouts]
    rows = ledger_entry(1, LR, influence, {}, {}, rollouts)["prompts"]
    assert influence.deviations is not None
    members = {f"ask {k}": [i for i, r in enumerate(rollouts) if r.group % 3 == k] for k in range(3)}
    size = {name: sum(abs(float(influence.per_sequence[i])) for i in indices) for name, indices in members.items()}
    assert [row[5] for row in rows] == sorted(size, key=lambda name: -size[name])
    for key, total, stderr, count, reward, text in rows:
        indices = members[text]
        assert key == prompt_key(rollouts[indices[0]])
        assert_close_to_rounding(total, LR * sum(float(influence.per_sequence[i]) for i in indices), terms=COUNT)
        parts = [sum(float(influence.deviations.by_part[k, i]) for i in indices) for k in range(PARTS)]
        assert_close_to_rounding(stderr, LR * math.sqrt(PARTS / (PARTS - 1) * sum(x * x for x in parts)), terms=100)
        assert (count, reward) == (len(indices), sum(i % 2 for i in indices) / len(indices))


def test_prompts_of_a_large_step_are_the_strongest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fx_influence.interop.ledger.entry.MAX_PROMPTS", 2)
    rollouts = [dataclasses.replace(rollout(i, None, None), prompt_ids=(i,)) for i in range(COUNT)]
    values = torch.tensor([0.0, 1.0, -3.0, *[0.5] * 7], dtype=torch.float64)
    fields: dict[str, Any] = dict.fromkeys(fx.Influence._fields, torch.zeros(()))
    influence = fx.Influence(**{**fields, "per_sequence": values, "stderr": values, "deviations": None})
    rows = ledger_entry(1, LR, influence, {}, {}, rollouts)["prompts"]
    assert [row[0] for row in rows] == [prompt_key(rollouts[i]) for i in (2, 1)]
    assert all(math.isnan(row[2]) and row[4] is None for row in rows)
    assert [len(row[5]) for row in rows] == [MAX_PROMPT_TEXT] * 2


def test_kinds_without_their_values_are_left_out(
    case: tuple[fx.Influence, Batch, TokenValues, list[fx.Rollout]],
) -> None:
    _, batch, values, _ = case
    without = step_labels([rollout(i, None if i else 1.0, None) for i in range(COUNT)], batch, values)
    assert list(without) == ["third", "band", "advantage", "end"]
    equal = step_labels([rollout(i, 1.0, None) for i in range(COUNT)], batch, values)
    assert list(equal) == ["third", "band", "advantage", "end", "reward", "reward value"]
    many = step_labels([rollout(i, i / 10, None) for i in range(COUNT)], batch, values)
    assert list(many) == ["third", "band", "advantage", "end", "reward", "difficulty"]


def test_figures_are_means_over_the_rollouts(case: tuple[fx.Influence, Batch, TokenValues, list[fx.Rollout]]) -> None:
    influence, batch, _, rollouts = case
    figures = rollout_figures(influence, batch, rollouts, LR)
    assert figures["reward"] == 0.5
    assert figures["truncated"] == 0.4
    assert figures["length"] == sum(1 + i % 6 for i in range(COUNT)) / COUNT
    assert figures["update_count"] == COUNT
    everything = influence.sums(labels.Labels(torch.zeros(COUNT, dtype=torch.int64), ("all",)))
    assert figures["rollouts_stderr"] == LR * float(everything.stderr)
    assert_close_to_rounding(figures["absolute"], LR * float(influence.per_sequence.abs().sum()), terms=20)


@pytest.mark.parametrize("step", [0, 3])
def test_lifetime_factor_is_the_ratio_of_two_preconditioners(step: int) -> None:
    """The parameters are in groups of other learning rates and second-moment decays."""
    generator = torch.Generator().manual_seed(step)

    def random() -> dict[str, torch.Tensor]:
        return {name: torch.rand(4, generator=generator, dtype=torch.float64) + 0.1 for name in ("w", "b")}

    hyper = {"w": fx.AdamWHyper(beta1=0.8), "b": fx.AdamWHyper(beta1=0.8, beta2=0.9, lr_scale=0.5, weight_decay=0.1)}
    state = fx.AdamWState(random(), random(), {}, dict.fromkeys(hyper, step), hyper, 1e-3)
    grads, params = random(), random()
    frozen, over_lifetime = (
        fx.adamw_decompose(grads, state, params, preconditioner=name, max_grad_norm=0.3).gain
        for name in ("frozen", "lifetime")
    )
    factor = lifetime_factor(state._replace(step=dict.fromkeys(hyper, step + 1)))
    for name in hyper:
        assert_close_to_rounding(factor * frozen[name], over_lifetime[name], terms=20)


def test_lifetime_factor_is_unknown_where_parameters_differ() -> None:
    hyper = {"w": fx.AdamWHyper(beta1=0.8), "b": fx.AdamWHyper(beta1=0.9)}
    assert math.isnan(lifetime_factor(fx.AdamWState({}, {}, {}, {"w": 1, "b": 1}, hyper, 1e-3)))
    same = dict.fromkeys(hyper, hyper["w"])
    assert math.isnan(lifetime_factor(fx.AdamWState({}, {}, {}, {"w": 1, "b": 2}, same, 1e-3)))
    # A parameter that has never been updated has no part in the step.
    assert lifetime_factor(fx.AdamWState({}, {}, {}, {"w": 1, "b": 0}, same, 1e-3)) == pytest.approx(1.0)
