"""Windows of the pretrained model: changes of replayed windows, and tables, from what is stored of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tolerances import TINY_POLICY, assert_within, rounding_bound
from helpers.toy_policy import toy_policy

import fx_influence as fx
from benchmarks.evidence.arithmetic import fresh_optimizer, reinforce
from benchmarks.evidence.bench_several_steps import in_float64
from benchmarks.evidence.replayed_windows import trainable, without_row
from benchmarks.harness import write_json
from benchmarks.real.bench_real_several_steps import changes, compared, measure
from benchmarks.real.several_lengths_tables import appendix, markdown
from benchmarks.real.window_recording import Recorded, Setting
from fx_influence.losses import coefficients

LENGTHS, LR = (1, 2), 1e-2
# transformers computes RMSNorm in float32 whatever the dtype; entropies are of a few nats.
BOUND = rounding_bound(torch.float32, TINY_POLICY, 3.0)
ANY: Any = None


def unrecorded() -> Recorded:
    raise AssertionError("the window is recorded although all of its figures are stored")


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    """Return a window of two steps of a toy policy, in float64."""
    policy = toy_policy(4)
    model, optimizer = policy.model, fresh_optimizer(policy.model, LR)
    in_float64(model, optimizer)
    advantages, batches = torch.tensor([1.0, -1.0] * 4), []
    for seed in range(3):
        batch = policy.evaluation(4, 2, seed)
        c = coefficients("dr_grpo", advantages, batch.completion_mask, max_completion_length=2)
        batches.append(batch._replace(coefficients=c))
    reinforce(model, optimizer, batches[2])
    apply, params = fx.make_functional(model)
    moved, e, ends = copy.deepcopy((model, optimizer)), {}, {}
    for length in LENGTHS:
        reinforce(*moved, batches[length - 1])
        ends[length], e[length] = trainable(moved[0]), policy.evaluation(4, 2, 3 + length)
    state = fx.adamw_state(optimizer, model)
    seconds = dict.fromkeys(LENGTHS, 1.0)
    return Recorded(model, optimizer, params, state, apply, batches[:2], advantages, e[1], e, ends, seconds)


def test_changes_are_those_of_each_length(recorded: Recorded, tmp_path: Path) -> None:
    """They are of what AdamW makes without a rollout, then of the parameters before, and are stored one by one."""
    setting = Setting(ANY, "full", tmp_path, tmp_path, LR, LENGTHS, 1)
    measured = changes(setting, lambda: recorded, [3])
    assert measured.shape == (2, 2, 4)
    model, optimizer = copy.deepcopy((recorded.model, recorded.optimizer))
    first, second = recorded.batches
    for k, batch in enumerate((without_row(first, 3), second)):
        reinforce(model, optimizer, batch)
        for row, params in enumerate((trainable(model), recorded.params)):
            end, e = recorded.ends[LENGTHS[k]], recorded.e[LENGTHS[k]]
            step = {name: params[name] - p for name, p in end.items()}
            expected = fx.snis_delta(end, step, 1.0, e, apply=recorded.apply).delta_h
            assert_within(measured[row, k].mean(), expected, BOUND)
            assert abs(expected) > BOUND
    assert torch.equal(changes(setting, unrecorded, [3]), measured)


def test_sizes_and_signs_are_of_effects() -> None:
    """An effect is what a rollout adds, minus the change without it; the change is minus that of undoing the steps."""
    predicted = {"share": torch.tensor([0.0, 1.0, 5.0, 2.0], dtype=torch.float64)}
    measured = torch.tensor([[-1.0, -3.0], [-5.0, -3.0], [6.0, 8.0]], dtype=torch.float64)
    figures = compared(measured, predicted, [1, 3])
    assert figures["slopes"] == {"share": 2.0}
    assert round(figures["ranks"]["share"], 6) == 1.0
    assert (figures["realised"], figures["realised_stderr"]) == (-7.0, 1.0)


@pytest.fixture
def report(tmp_path: Path) -> dict[str, Any]:
    """Return the report of stored figures: effects of 2e-4 and 4e-4 nats, of one step twice and of the window once."""
    changes_at = [[-2e-4, -2e-4], [-4e-4, -4e-4], [1e-3, 3e-3]]
    write_json(tmp_path / "changes.json", {"changes": [[x, x] for x in changes_at]})
    write_json(tmp_path / "steps.json", {"seconds": {"1": 10.0, "2": 20.0}, "rollouts": 3, "left_out": [0, 2]})
    share = {"per_sequence": {"share": [0.01, 0.0, 0.02]}, "at_end": {"1": [0.02, 0.0, 0.04], "2": [0.01, 0.0, 0.02]}}
    write_json(tmp_path / "one_step.json", {"seconds": 5.0, **share})
    window = {"seconds": 40.0, "peak_extra_bytes": 2**30, "per_sequence": [2e-4, 0.0, 4e-4]}
    for file in ("after_1/window_same E", "after_2/window_same E", "after_2/window_no curvature_same E"):
        write_json(tmp_path / f"{file}.json", window)
    setting = Setting(ANY, "lora", tmp_path, tmp_path, LR, LENGTHS, 1)
    return {"policy": "a policy", "windows": [measure(setting)]}


def test_tables_have_a_row_for_each_length(report: dict[str, Any]) -> None:
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in markdown(report).splitlines()[2:]]
    cells = ["", "+1.00", "3.16 ± 0"]
    change = "-0.0020 ± 0.0127"
    assert [row[0] for row in rows] == ["LoRA, 0.01, 1", "LoRA, 0.01, 2"]
    assert rows[0][1:] == ["+1.00, 1", "", "+1.00, 1", "+1.00, 2", *cells, change, "4.0, –, 0.5", "1.0, –"]
    assert rows[1][1:] == ["+1.00, 1", "+1.00, 1", "+1.00, 2", "+1.00, 2", *cells, change, "2.0, 2.0, 0.2", "1.0, 1.0"]
    assert len(appendix(report).splitlines()) == 4
