"""The sweep of a run against the library's own functions, and the steps that are chosen to clear rounding."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers.tolerances import ROOM, assert_close_to_rounding, assert_within, policy_terms, rounding_bound

import fx_influence as fx
from fx_influence.lab.experiment.finite_steps import Arrays, Steps, sweep
from fx_influence.lab.experiment.measure import first_order, reference_lr
from fx_influence.lab.experiment.rounding import LARGEST_MULTIPLE, clearing_etas, rounding_floor
from fx_influence.lab.experiment.step import Step, measure_step, moving_rows, step_directions
from fx_influence.lab.inputs.rollouts import ScoredRollouts, load_rollouts
from fx_influence.lab.inputs.training_state import TrainingState, load_state
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
    own = own_steps(setting)
    return sweep(*setting[:3], setting.e.batch, Steps(ETAS, own), {}, lambda *done: None) | {"own": own.numpy()}


def own_steps(setting: Setting) -> torch.Tensor:
    """A step size for each rollout, equal for equal ones."""
    return torch.linspace(1e-5, 2e-4, 12, dtype=torch.float64)[first_of_equals(setting.step.batch)]


def depth(setting: Setting, dtype: torch.dtype, size: Any) -> float:
    return rounding_bound(dtype, policy_terms(setting.state.params, setting.e.batch.input_ids.shape[1]), size)


def first_of_equals(batch: Batch) -> torch.Tensor:
    index = moving_rows(batch)[1]
    return torch.tensor([index.tolist().index(k) for k in index.tolist()])


def parts_of(setting: Setting) -> list[fx.Params]:
    """v_i, one rollout at a time."""
    loss, step = fx.rollout_loss(setting.state.apply), setting.step
    found = []
    for i in range(len(step.batch.input_ids)):
        row = Batch._make(None if field is None else field[i : i + 1] for field in step.batch)
        g = fx.per_sample_grads(loss, setting.state.params, row)
        found.append({name: step.parts.gain[name] * x[0] for name, x in g.items()})
    return found


def snis(setting: Setting, v: fx.Params, eta: float) -> fx.SnisDelta:
    return fx.snis_delta(setting.state.params, v, eta, setting.e.batch, apply=setting.state.apply)


def test_the_setting_has_equal_rollouts_and_some_that_move_nothing(setting: Setting) -> None:
    once, index = moving_rows(setting.step.batch)
    assert len(once.input_ids) < len(index)
    assert (setting.step.batch.coefficients == 0).all(-1).sum() > 1
    for i, k in enumerate(index.tolist()):
        if setting.step.batch.coefficients[i].any():
            assert torch.equal(once.input_ids[k], setting.step.batch.input_ids[i])
            assert torch.equal(once.coefficients[k], setting.step.batch.coefficients[i])
        else:
            assert not once.coefficients[k].any()


def in_float64(setting: Setting) -> Setting:
    params = {name: p.double() for name, p in setting.state.params.items()}
    wide = setting.state._replace(params=params, apply=setting.state.apply.with_min_precision(torch.float64))
    return setting._replace(state=wide)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Setting, Arrays]:
    """In float64, where the smallest step is far above rounding, and its sweep."""
    plain = {"dtype": "float64", "compare_float64": False, "second_order_per_sequence": False}
    setting = setting_of(tmp_path_factory.mktemp("exact"), **plain)
    own = own_steps(setting)
    steps = Steps(ETAS, own)
    return setting, sweep(*setting[:3], setting.e.batch, steps, {}, lambda *done: None) | {"own": own.numpy()}


def test_every_direction_is_what_snis_delta_gives_alone(exact: tuple[Setting, Arrays]) -> None:
    setting, swept = exact
    baseline, near = setting.step.parts.baseline, depth(setting, torch.float64, math.log(14))
    for k, eta in enumerate(ETAS):
        for name, v in step_directions(setting.plan, setting.state, setting.step).items():
            alone = snis(setting, v, eta)
            for field, stored in (("delta_h", name), ("stderr", f"{name}_stderr"), ("ess", f"{name}_ess")):
                assert_within(swept[stored][k], getattr(alone, field), near * (12 if field == "ess" else 1))
            assert_within(swept[f"{name}_contributions"][k], alone.contributions, near)
            assert_within(swept[f"{name}_log_weights"][k], alone.log_weights, 12 * near)
        for i, v in enumerate(parts_of(setting)):
            for name, w in (("grad", v), ("baseline_plus_grad", {key: baseline[key] + x for key, x in v.items()})):
                alone = snis(setting, w, eta)
                assert_within(swept[name][k, i], alone.delta_h, near)
                assert_within(swept[f"{name}_contributions"][k, i], alone.contributions, near)
                assert_within(swept[f"{name}_log_weight_mean"][k, i], alone.log_weights.mean(), 12 * near)
                assert_within(swept[f"{name}_log_weight_max"][k, i], alone.log_weights.abs().max(), 12 * near)
    assert np.abs(swept["grad"]).max() > 1e-6 > 1e4 * near


@pytest.mark.slow
def test_float64_is_the_same_step_without_the_rounding(setting: Setting, swept: Arrays) -> None:
    floor = rounding_floor(setting.plan, setting.state, setting.e.batch)
    assert_within(swept["grad"], swept["grad_float64"], ROOM * floor)
    v = {name: x.double() for name, x in parts_of(setting)[0].items()}
    exact = snis(in_float64(setting), v, ETAS[0]).delta_h
    # Entropies of unit size in float64; the direction itself was made in float32.
    bound = depth(setting, torch.float64, 1.0) + depth(setting, torch.float32, np.abs(swept["grad_float64"]).max())
    assert_within(swept["grad_float64"][0, 0], exact, bound)


def test_the_second_derivative_is_the_jvps_and_a_rollout_that_moves_nothing_has_none(
    setting: Setting, swept: Arrays
) -> None:
    found = {"grad_second": parts_of(setting)}
    for name, directions in found.items():
        seconds = [
            fx.jvp_delta(setting.state.params, v, setting.e.batch, apply=setting.state.apply).second for v in directions
        ]
        expected = torch.stack(seconds)
        assert_within(swept[name], expected, depth(setting, torch.float32, expected))
    still = ~setting.step.batch.coefficients.any(-1).numpy()
    for name in ("grad", "grad_contributions", "grad_float64"):
        assert not swept[name][:, still].any()
    assert not swept["grad_second"][still].any()
    expected = swept["baseline"][:, None].repeat(still.sum(), 1)
    floor = rounding_floor(setting.plan, setting.state, setting.e.batch)
    assert_within(swept["baseline_plus_grad"][:, still], expected, ROOM * floor)


def test_each_rollouts_own_step_is_along_v_i(exact: tuple[Setting, Arrays]) -> None:
    setting, swept = exact
    near = depth(setting, torch.float64, math.log(14))
    for i, v in enumerate(parts_of(setting)):
        alone = snis(setting, v, float(swept["own"][i]))
        assert_within(swept["auto_grad"][i], alone.delta_h, near)
        assert_within(swept["auto_grad_ess"][i], alone.ess, 12 * near)
    assert swept["auto_grad_contributions"].shape == (12, 12)


def test_blocks_that_are_kept_are_not_measured_again(setting: Setting, swept: Arrays) -> None:
    kept: dict[int, Arrays] = {}
    done: list[int] = []
    options = (*setting[:3], setting.e.batch, Steps(ETAS, None), kept)
    first = sweep(*options, lambda phase, k, total: done.append(k))
    assert len(kept) == done[-1] > 2
    kept[1]["grad"] = kept[1]["grad"] + 7.0
    del kept[2]
    again = sweep(*options, lambda *done: None)
    changed = ~np.isclose(again["grad"], first["grad"]).all(0)
    assert 0 < changed.sum() < 12
    np.testing.assert_allclose(again["grad"][:, changed], first["grad"][:, changed] + 7.0)
    assert "auto_grad" not in again


def test_only_the_directions_of_the_plan_are_swept(tmp_path: Path) -> None:
    few = setting_of(tmp_path, directions=("grad",), compare_float64=False, second_order_per_sequence=False)
    arrays = sweep(*few[:3], few.e.batch, Steps(ETAS[:1], None), {}, lambda *done: None)
    assert "grad" in arrays
    assert not [name for name in arrays if name.startswith(tuple(d for d in DIRECTIONS if d != "grad"))]
    assert not [name for name in arrays if "float64" in name or "second" in name]
    whole = setting_of(tmp_path / "whole", directions=("full",), compare_float64=False)
    arrays = sweep(*whole[:3], whole.e.batch, Steps(ETAS[:1], None), {}, lambda *done: None)
    assert {name for name in arrays if not name.startswith("full")} == set()
    assert arrays["full"].shape == (1,)


def test_the_rounding_floor_is_what_steps_too_small_to_matter_show(setting: Setting) -> None:
    """Steps of 1e-8 lr are lost in the weights' rounding: what is then seen of them is noise of the floor's size."""
    floor = rounding_floor(setting.plan, setting.state, setting.e.batch)
    assert floor == rounding_floor(setting.plan, setting.state, setting.e.batch)
    generator = torch.Generator().manual_seed(0)
    unit = {name: torch.rand(p.shape, generator=generator) - 0.5 for name, p in setting.state.params.items()}
    noise = [
        snis(setting, {name: x.roll(k) * 1.2e-7 * setting.state.params[name].abs() for name, x in unit.items()}, 1.0)
        for k in range(8)
    ]
    seen = torch.stack([delta.delta_h for delta in noise]).square().mean().sqrt().item()
    assert 0.2 < floor / seen < 5
    assert rounding_floor(setting.plan, in_float64(setting).state, setting.e.batch) < 1e-6 * floor


@pytest.mark.slow
def test_the_chosen_steps_clear_the_floor_by_the_factor_asked(setting: Setting) -> None:
    first, lr = first_order(setting.plan, setting.state, setting.step, setting.e), reference_lr(setting.state)
    floor, influence = float(first["rounding_floor"]), torch.from_numpy(first["per_sequence"])
    own = clearing_etas(influence, floor, 100.0, lr)
    moving = influence != 0
    assert torch.equal(own == 0, ~moving)
    assert own.max() <= LARGEST_MULTIPLE * lr
    assert_close_to_rounding((own * influence.abs())[moving], torch.full_like(own[moving], 100 * floor), terms=4)
    arrays = sweep(*setting[:3], setting.e.batch, Steps([lr], own), {}, lambda *done: None)
    seen = np.abs(arrays["auto_grad"][moving.numpy()]) / floor
    assert 60 < np.median(seen) < 160
    assert clearing_etas(torch.tensor([1e-30]), floor, 100.0, lr).item() == pytest.approx(LARGEST_MULTIPLE * lr)


@pytest.mark.slow
def test_a_small_memory_budget_makes_small_blocks_of_the_same_numbers(setting: Setting, swept: Arrays) -> None:
    size = sum(p.numel() * 4 for p in setting.state.params.values())
    blocks: dict[int, Arrays] = {}
    plan = dataclasses.replace(setting.plan, memory_budget=7 * size, compare_float64=False, auto_scale=None)
    small = sweep(plan, *setting[1:3], setting.e.batch, Steps(ETAS, None), blocks, lambda *done: None)
    assert len(blocks) == 1 + len(moving_rows(setting.step.batch)[0].input_ids)
    assert {block["grad"].shape for k, block in blocks.items() if k > 0} == {(2, 1)}
    assert_within(small["grad"], swept["grad"], ROOM * rounding_floor(plan, setting.state, setting.e.batch))
