"""The figures of what breaks influences of a real model: bfloat16, a small E, and a large learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.real.bench_real_limits import (
    FIGURES,
    MULTIPLES,
    Limits,
    learning_rate_figures,
    off_at,
    one_of_each,
    precision_figures,
    size_figures,
    small_batch,
    strongest,
)
from benchmarks.real.pretrained_states import PretrainedState
from fx_influence.types import Batch


def influences(per_sequence: list[float], stderr: float = 0.5, **figures: Any) -> dict[str, Any]:
    totals = {"total": 1.0, "total_stderr": 0.5, "conditioning": 0.1, "noise_share": 0.2}
    return {"per_sequence": per_sequence, "stderr": [stderr] * len(per_sequence), **totals, **figures}


def test_precision_errors_are_over_the_largest_influence() -> None:
    """A rollout without a loss has no influence in any precision, and does not count."""
    exact = influences([4.0, 1.0, 0.0, 1.0])
    rounded = {"passes": influences([4.0, -1.0, 0.0, 1.5], total=1.25), "directions": exact, "float32": exact}
    figures = precision_figures({"float64": exact, **rounded})
    passes = figures["passes"]
    assert (passes["largest"], passes["median"], passes["errorbar"]) == (2 / 4, 0.5 / 4, 0.5 / 4)
    assert (passes["wrong_signs"], passes["over_errorbar"], passes["total"]) == (1 / 3, 1.0, 0.5)
    assert passes["share"] == pytest.approx((2**2 + 0.5**2) / (4**2 + 1 + 1))
    assert {name: figures["directions"][name] for name in ("largest", "rank")} == {"largest": 0.0, "rank": 1.0}


def test_size_errors_leave_out_the_noise_of_the_truth() -> None:
    truth = influences([3.0, -4.0, 0.0], stderr=1.0)
    figures = size_figures({"4": influences([3.0, 1.0, 0.0]), "truth": truth})
    # 25 of error and 25 of signal and noise, 3 of them noise.
    assert figures["4"]["squared_error"] == pytest.approx(1.0)
    assert (figures["4"]["right_signs"], figures["4"]["rank"]) == (0.5, pytest.approx(1.0))
    assert list(figures) == ["4"]


def test_changes_are_off_between_two_multiples() -> None:
    assert off_at([1.0] * 6, 0.1) is None
    assert off_at([1.2, 1.3, 1.4, 1.5, 1.6, 1.7], 0.1) == 0.0
    # Errors as large as the step's share of 100 learning rates: 10% off at ten of them, and 50% between 30 and 100.
    proportional = [1 - x / 100 for x in MULTIPLES]
    assert off_at(proportional, 0.1) == pytest.approx(10.0)
    assert off_at(proportional, 0.2) == pytest.approx(20.0)


def test_learning_rate_figures_are_over_the_first_order() -> None:
    lr, first = 0.5, [2.0, -1.0]
    changes = [[0.5 * x * f * (1 + 0.01 * x) for f in first] for x in MULTIPLES]
    ess = [[16.0, 8.0]] * len(MULTIPLES)
    sweep = {"lr": lr, "first": first, "delta_h": changes, "ess": ess, "rollouts": 16, "eta_trust": 3.0}
    step, rollout = learning_rate_figures(sweep)
    assert step["ratios"] == pytest.approx([1 + 0.01 * x for x in MULTIPLES])
    assert rollout["ratios"] == pytest.approx(step["ratios"])
    assert (step["trusted"], rollout["trusted"], rollout["ess"][0]) == (6.0, None, 0.5)


def batch(group: list[int]) -> Batch:
    ids = torch.arange(2 * len(group)).reshape(-1, 2)
    return Batch(ids, ids >= 0, torch.tensor([[False, True]] * len(group)), group=torch.tensor(group))


def test_small_batches_have_as_many_prompts_as_possible() -> None:
    rollouts = batch([0, 0, 0, 1, 1, 1, 2, 2, 2])
    chosen = {size: small_batch(rollouts, size).input_ids[:, 0] // 2 for size in (2, 3, 6)}
    assert {size: rows.tolist() for size, rows in chosen.items()} == {2: [0, 3], 3: [0, 3, 6], 6: [0, 1, 3, 4, 6, 7]}
    assert one_of_each(rollouts).group is not None
    assert one_of_each(rollouts).input_ids[:, 0].tolist() == [0, 6, 12]


def test_strongest_rollouts_have_either_sign() -> None:
    assert strongest([0.0, 5.0, -7.0, 0.0, 2.0]) == [1, 2]


def test_figures_are_made_once(tmp_path: Path) -> None:
    def no_state() -> PretrainedState:
        raise AssertionError("the state is loaded")

    limits = Limits(no_state, tmp_path)
    names = FIGURES["precision"]
    for k, name in enumerate(names):
        assert not limits.has("precision")
        assert limits.stored(name, lambda k=k: {"figure": k})["figure"] == k  # type: ignore[misc]
    assert limits.has("precision")
    again = Limits(no_state, tmp_path)
    assert {name: x["figure"] for name, x in again.precision().items()} == {name: k for k, name in enumerate(names)}
