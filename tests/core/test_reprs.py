"""The repr of every result, run, plan and checkpoint fits a screen, however large it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.synthetic_runs import synthetic_run

import fx_influence as fx
from fx_influence.core.display import brief
from fx_influence.lab.plan import SampledBatch, demo_path

SCREEN = 24 * 80


def test_checkpoint_repr_fits_screen() -> None:
    checkpoint = fx.load_checkpoint(demo_path("demo"))
    assert len(repr(checkpoint)) < SCREEN
    assert "exp_avg=50 tensors of 174,080 numbers" in repr(checkpoint.optimizer_state)


def test_run_repr_fits_screen(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path)
    assert len(repr(run)) < SCREEN
    assert len(repr(run.evaluations[0])) < SCREEN
    assert "EntropyInfluencePlan(" in repr(run)


def test_plan_repr_shows_only_non_defaults() -> None:
    assert repr(fx.lab.EntropyInfluencePlan()) == "EntropyInfluencePlan()"
    long = SampledBatch(("a" * 99,) * 1000, chat=True)
    assert repr(fx.lab.FisherKernelPlan(seed=3, update=long)) == (
        "FisherKernelPlan(update=SampledBatch(prompts=1000 of str, chat=True), seed=3)"
    )


def test_batch_repr_shows_shapes() -> None:
    ids = torch.ones(64, 1000, dtype=torch.int64)
    text = repr(fx.Batch(ids, ids > 0, ids > 0))
    assert text.startswith("Batch(input_ids=int64 (64, 1000), attention_mask=bool (64, 1000), ")
    assert text.endswith("coefficients=None, entropy_coefficients=None, group=None, behaviour_logprobs=None)")


def test_batch_repr_works_under_vmap() -> None:
    text: list[str] = []

    def record(x: torch.Tensor) -> torch.Tensor:
        text.append(repr(fx.TokenValues(x, x.sum())))
        return x

    torch.func.vmap(record)(torch.ones(2, 3))
    assert text == ["TokenValues(logprobs=float32 (3,), entropies=float32 ())"]


def test_rollout_repr_counts_tokens() -> None:
    rollout = fx.Rollout("0/0", "0", 0, "a" * 5000, "b", tuple(range(5000)), (5, 1), True, reward=1.0)
    assert len(repr(rollout)) < SCREEN
    assert "prompt_ids=5000 of int, completion_ids=[5, 1], finished=True, reward=1.0)" in repr(rollout)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (np.zeros((2, 3)), "float64 (2, 3)"),
        (torch.tensor(2.5), "2.5"),
        ({}, "{}"),
        ({"lr": 0.1}, "{'lr': 0.1}"),
        ({"w": torch.ones(2, 2), "b": torch.ones(3)}, "2 tensors of 7 numbers"),
        (dict.fromkeys(range(9), 1), "9 by name"),
        ([], "[]"),
        ([1, "a"], "[1, 'a']"),
        ([1, "a", 2.0, None], "4 of NoneType or float or int or str"),
        (torch.nn.Linear(2, 2), "Linear"),
    ],
)
def test_brief_describes_value(value: object, text: str) -> None:
    assert brief(value) == text
