"""The sweep of a run against the library's per_rollout functions, and the steps that are chosen to clear rounding."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers.present import present
from helpers.tolerances import ROOM, assert_close_to_rounding, assert_within, policy_terms, rounding_bound

import fx_influence as fx
from fx_influence.lab.experiment.finite_steps import Arrays, StepSizes, sweep
from fx_influence.lab.experiment.first_order import first_order
from fx_influence.lab.experiment.rounding import LARGEST_MULTIPLE, etas_above_rounding, rounding_floor
from fx_influence.lab.experiment.step import Step, distinct_update_rows, measure_step, step_directions
from fx_influence.lab.inputs.rollouts import ScoredRollouts, load_rollouts, load_state
from fx_influence.lab.inputs.training_state import TrainingState
from fx_influence.lab.inputs.update import update_batch
from fx_influence.lab.plan import DIRECTIONS, EntropyInfluencePlan, SampledBatch
from fx_influence.lab.store import RunDirectory
from fx_influence.types import Batch

ETAS = [1e-4, 1e-5]


class Setting(NamedTuple):
    plan: EntropyInfluencePlan
    state: TrainingState
    step: Step
    e: ScoredRollouts


def setting_of(folder: Path, **fields: Any) -> Setting:
    plan = EntropyInfluencePlan(
        update=SampledBatch("demo/train", num_prompts=3, completions_per_prompt=4),
        evaluations=(SampledBatch("demo/eval", num_prompts=4, completions_per_prompt=3),),
        sequences_per_block=3,
        **{"compare_float64": True, "second_order_per_sequence": True, "seed": 1, **fields},
    )
    state, directory = load_state(plan), RunDirectory.start(folder / "run", plan, {})
    u, e = (load_rollouts(plan, state, directory, k, f"{k}.jsonl", lambda *done: None) for k in (0, 1))
    step = measure_step(plan, state, update_batch(plan, u), plan.preconditioner, directory, lambda *done: None)
    return Setting(plan, state, step, e)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return setting_of(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def swept(setting: Setting) -> Arrays:
    per_rollout = etas_per_rollout(setting)
    return sweep(*setting[:3], setting.e.batch, StepSizes(ETAS, per_rollout), {}, lambda *done: None) | {
        "per_rollout": per_rollout.numpy()
    }


def etas_per_rollout(setting: Setting) -> torch.Tensor:
    """Return a step size for each rollout, equal for equal rollouts."""
    return torch.linspace(1e-5, 2e-4, 12, dtype=torch.float64)[first_copy(setting.step.batch)]


def depth(setting: Setting, dtype: torch.dtype, size: Any) -> float:
    return rounding_bound(dtype, policy_terms(setting.state.params, setting.e.batch.input_ids.shape[1]), size)


def first_copy(batch: Batch) -> torch.Tensor:
    index = distinct_update_rows(batch)[1]
    return torch.tensor([index.tolist().index(k) for k in index.tolist()])


def rollout_directions(setting: Setting) -> list[fx.Params]:
    """Return v_i, computed one rollout at a time."""
    loss, step = fx.rollout_loss(setting.state.apply), setting.step
    directions = []
    for i in range(len(step.batch.input_ids)):
        row = Batch._make(None if field is None else field[i : i + 1] for field in step.batch)
        g = fx.per_sample_grads(loss, setting.state.params, row)
        directions.append({name: step.decomposition.gain[name] * x[0] for name, x in g.items()})
    return directions


def snis(setting: Setting, v: fx.Params, eta: float) -> fx.SnisDelta:
    return fx.snis_delta(setting.state.params, v, eta, setting.e.batch, apply=setting.state.apply)


def test_distinct_update_rows_merges_equal_and_inert(setting: Setting) -> None:
    distinct, index = distinct_update_rows(setting.step.batch)
    assert len(distinct.input_ids) < len(index)
    assert (present(setting.step.batch.coefficients) == 0).all(-1).sum() > 1
    for i, k in enumerate(index.tolist()):
        if present(setting.step.batch.coefficients)[i].any():
            assert torch.equal(distinct.input_ids[k], setting.step.batch.input_ids[i])
            assert torch.equal(present(distinct.coefficients)[k], present(setting.step.batch.coefficients)[i])
        else:
            assert not present(distinct.coefficients)[k].any()


def in_float64(setting: Setting) -> Setting:
    params = {name: p.double() for name, p in setting.state.params.items()}
    wide = setting.state._replace(params=params, apply=setting.state.apply.with_min_precision(torch.float64))
    return setting._replace(state=wide)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Setting, Arrays]:
    """Return a setting in float64, where the smallest step is far above rounding, and its sweep."""
    plain = {"dtype": "float64", "compare_float64": False, "second_order_per_sequence": False}
    setting = setting_of(tmp_path_factory.mktemp("exact"), **plain)
    per_rollout = etas_per_rollout(setting)
    steps = StepSizes(ETAS, per_rollout)
    return setting, sweep(*setting[:3], setting.e.batch, steps, {}, lambda *done: None) | {
        "per_rollout": per_rollout.numpy()
    }


@pytest.mark.slow
def test_sweep_equals_snis_delta_along_every_direction(exact: tuple[Setting, Arrays]) -> None:
    setting, swept = exact
    baseline, near = setting.step.decomposition.baseline, depth(setting, torch.float64, math.log(14))
    for k, eta in enumerate(ETAS):
        for name, v in step_directions(setting.plan, setting.state, setting.step).items():
            single = snis(setting, v, eta)
            for field, stored in (("delta_h", name), ("stderr", f"{name}_stderr"), ("ess", f"{name}_ess")):
                assert_within(swept[stored][k], getattr(single, field), near * (12 if field == "ess" else 1))
            assert_within(swept[f"{name}_contributions"][k], single.contributions, near)
            assert_within(swept[f"{name}_log_weights"][k], single.log_weights, 12 * near)
        for i, v in enumerate(rollout_directions(setting)):
            for name, w in (("grad", v), ("baseline_plus_grad", {key: baseline[key] + x for key, x in v.items()})):
                single = snis(setting, w, eta)
                assert_within(swept[name][k, i], single.delta_h, near)
                assert_within(swept[f"{name}_contributions"][k, i], single.contributions, near)
                assert_within(swept[f"{name}_log_weight_mean"][k, i], single.log_weights.mean(), 12 * near)
                assert_within(swept[f"{name}_log_weight_max"][k, i], single.log_weights.abs().max(), 12 * near)
    assert np.abs(swept["grad"]).max() > 1e-6 > 1e4 * near


@pytest.mark.slow
def test_sweep_float64_differs_by_rounding_only(setting: Setting, swept: Arrays) -> None:
    floor = rounding_floor(setting.plan, setting.state, setting.e.batch)
    assert_within(swept["grad"], swept["grad_float64"], ROOM * floor)
    v = {name: x.double() for name, x in rollout_directions(setting)[0].items()}
    exact = snis(in_float64(setting), v, ETAS[0]).delta_h
    # Entropies of unit size in float64; the direction itself was made in float32.
    bound = depth(setting, torch.float64, 1.0) + depth(setting, torch.float32, np.abs(swept["grad_float64"]).max())
    assert_within(swept["grad_float64"][0, 0], exact, bound)


@pytest.mark.slow
def test_sweep_second_derivatives_are_those_of_jvp_delta(setting: Setting, swept: Arrays) -> None:
    seconds_by_name = {"grad_second": rollout_directions(setting)}
    for name, directions in seconds_by_name.items():
        seconds = [
            fx.jvp_delta(setting.state.params, v, setting.e.batch, apply=setting.state.apply).second for v in directions
        ]
        expected = torch.stack(seconds)
        assert_within(swept[name], expected, depth(setting, torch.float32, expected))
    inert = ~present(setting.step.batch.coefficients).any(-1).numpy()
    for name in ("grad", "grad_contributions", "grad_float64"):
        assert not swept[name][:, inert].any()
    assert not swept["grad_second"][inert].any()
    repeated = swept["baseline"][:, None].repeat(inert.sum(), 1)
    floor = rounding_floor(setting.plan, setting.state, setting.e.batch)
    assert_within(swept["baseline_plus_grad"][:, inert], repeated, ROOM * floor)


@pytest.mark.slow
def test_sweep_auto_step_is_along_v_i(exact: tuple[Setting, Arrays]) -> None:
    setting, swept = exact
    near = depth(setting, torch.float64, math.log(14))
    for i, v in enumerate(rollout_directions(setting)):
        single = snis(setting, v, float(swept["per_rollout"][i]))
        assert_within(swept["auto_grad"][i], single.delta_h, near)
        assert_within(swept["auto_grad_ess"][i], single.ess, 12 * near)
    assert swept["auto_grad_contributions"].shape == (12, 12)


@pytest.mark.slow
def test_sweep_does_not_measure_stored_blocks(setting: Setting, swept: Arrays) -> None:
    stored: dict[int, Arrays] = {}
    done: list[int] = []
    options = (*setting[:3], setting.e.batch, StepSizes(ETAS, None), stored)
    first = sweep(*options, lambda phase, k, total: done.append(k))
    assert len(stored) == done[-1] > 2
    stored[1]["grad"] = stored[1]["grad"] + 7.0
    del stored[2]
    again = sweep(*options, lambda *done: None)
    changed = ~np.isclose(again["grad"], first["grad"]).all(0)
    assert 0 < changed.sum() < 12
    np.testing.assert_allclose(again["grad"][:, changed], first["grad"][:, changed] + 7.0)
    assert "auto_grad" not in again


def test_sweep_measures_only_planned_directions(tmp_path: Path) -> None:
    few = setting_of(tmp_path, directions=("grad",), compare_float64=False, second_order_per_sequence=False)
    arrays = sweep(*few[:3], few.e.batch, StepSizes(ETAS[:1], None), {}, lambda *done: None)
    assert "grad" in arrays
    assert not [name for name in arrays if name.startswith(tuple(d for d in DIRECTIONS if d != "grad"))]
    assert not [name for name in arrays if "float64" in name or "second" in name]
    step_only = setting_of(tmp_path / "step_only", directions=("full",), compare_float64=False)
    arrays = sweep(*step_only[:3], step_only.e.batch, StepSizes(ETAS[:1], None), {}, lambda *done: None)
    assert {name for name in arrays if not name.startswith("full")} == set()
    assert arrays["full"].shape == (1,)


def test_rounding_floor_is_the_size_of_tiny_steps(setting: Setting) -> None:
    """Steps of 1e-8 lr are lost in the weights' rounding, and change the entropy by noise of the floor's size."""
    floor = rounding_floor(setting.plan, setting.state, setting.e.batch)
    assert floor == rounding_floor(setting.plan, setting.state, setting.e.batch)
    generator = torch.Generator().manual_seed(0)
    unit = {name: torch.rand(p.shape, generator=generator) - 0.5 for name, p in setting.state.params.items()}
    noise = [
        snis(setting, {name: x.roll(k) * 1.2e-7 * setting.state.params[name].abs() for name, x in unit.items()}, 1.0)
        for k in range(8)
    ]
    measured = torch.stack([delta.delta_h for delta in noise]).square().mean().sqrt().item()
    assert 0.2 < floor / measured < 5
    assert rounding_floor(setting.plan, in_float64(setting).state, setting.e.batch) < 1e-6 * floor


@pytest.mark.slow
def test_etas_above_rounding_exceed_the_floor(setting: Setting) -> None:
    first, lr = first_order(setting.plan, setting.state, setting.step, setting.e), setting.state.reference_lr
    floor, influence = float(first["rounding_floor"]), torch.from_numpy(first["per_sequence"])
    per_rollout = etas_above_rounding(influence, floor, 100.0, lr)
    moving = influence != 0
    assert torch.equal(per_rollout == 0, ~moving)
    assert per_rollout.max() <= LARGEST_MULTIPLE * lr
    assert_close_to_rounding(
        (per_rollout * influence.abs())[moving], torch.full_like(per_rollout[moving], 100 * floor), terms=4
    )
    arrays = sweep(*setting[:3], setting.e.batch, StepSizes([lr], per_rollout), {}, lambda *done: None)
    measured = np.abs(arrays["auto_grad"][moving.numpy()]) / floor
    assert 60 < np.median(measured) < 160
    assert etas_above_rounding(torch.tensor([1e-30]), floor, 100.0, lr).item() == pytest.approx(LARGEST_MULTIPLE * lr)


@pytest.mark.slow
def test_sweep_gives_same_numbers_in_small_blocks(setting: Setting, swept: Arrays) -> None:
    size = sum(p.numel() * 4 for p in setting.state.params.values())
    blocks: dict[int, Arrays] = {}
    plan = dataclasses.replace(setting.plan, memory_budget=7 * size, compare_float64=False, auto_scale=None)
    small = sweep(plan, *setting[1:3], setting.e.batch, StepSizes(ETAS, None), blocks, lambda *done: None)
    assert len(blocks) == 1 + len(distinct_update_rows(setting.step.batch)[0].input_ids)
    assert {block["grad"].shape for k, block in blocks.items() if k > 0} == {(2, 1)}
    assert_within(small["grad"], swept["grad"], ROOM * rounding_floor(plan, setting.state, setting.e.batch))
