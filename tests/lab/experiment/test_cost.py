"""A run computes what its plan asks for, each quantity once, and nothing along directions that are zero."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import Any, cast

import numpy as np
import pytest
import torch

import fx_influence as fx
from fx_influence.lab.experiment import finite_steps as sweep
from fx_influence.lab.experiment import first_order as first_order_module
from fx_influence.lab.experiment.derivatives import derivative_check
from fx_influence.lab.experiment.evaluate import evaluate
from fx_influence.lab.experiment.first_order import first_order
from fx_influence.lab.experiment.step import Step, measure_step
from fx_influence.lab.inputs.rollouts import ScoredRollouts, load_rollouts, load_state
from fx_influence.lab.inputs.training_state import TrainingState
from fx_influence.lab.inputs.update import update_batch
from fx_influence.lab.plan import EntropyInfluencePlan, SampledBatch
from fx_influence.lab.store import RunDirectory

Setting = tuple[EntropyInfluencePlan, TrainingState, Step, ScoredRollouts]


def quiet(*done: object) -> None:
    pass


def plan_of(**fields: Any) -> EntropyInfluencePlan:
    update = SampledBatch("demo/train", num_prompts=2, completions_per_prompt=4)
    evaluations = (SampledBatch("demo/eval", num_prompts=2, completions_per_prompt=2),)
    few = {"eta_multiples": (1.0, 2.0), "scaled_eta_multiples": (), **fields}
    return EntropyInfluencePlan(update=update, evaluations=evaluations, **few)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Return the demo without moments or weight decay, as at the first step of a LoRA training."""
    plan = plan_of()
    state = load_state(plan)
    opt = state.opt_state
    zero = {name: torch.zeros_like(x) for name, x in opt.exp_avg.items()}
    hyper = {name: dataclasses.replace(h, weight_decay=0.0) for name, h in opt.hyper.items()}
    opt = opt._replace(exp_avg=zero, exp_avg_sq=zero, step=dict.fromkeys(opt.step, 0), hyper=hyper)
    state = state._replace(opt_state=opt)
    directory = RunDirectory.start(tmp_path_factory.mktemp("cost") / "run", plan, {})
    u, e = (load_rollouts(plan, state, directory, k, f"{k}.jsonl", quiet) for k in (0, 1))
    return plan, state, measure_step(plan, state, update_batch(plan, u), plan.preconditioner, directory, quiet), e


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the calls that a run's cost consists of."""
    counts: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            counts[f"{name} second" if options.get("second_order") else name] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    for module, name in (
        (first_order_module, "influence"),
        (first_order_module, "jvp_delta"),
        (first_order_module, "rounding_floor"),
        (sweep, "snis_sweep"),
        (sweep, "rollout_gradients"),
    ):
        counted(module, name)
    return counts


def test_run_without_finite_steps_costs_two_calls(fresh: Setting, calls: Counter[str]) -> None:
    _, state, step, e = fresh
    plan = plan_of(directions=(), reward_influence=False)
    first = first_order(plan, state, step, e)
    result = evaluate(plan, state, step, e, first, {}, quiet)
    assert calls == {"influence": 1, "jvp_delta second": 1}
    assert result.summary["baseline"] == first["baseline_first"] == first["baseline_second"] == 0.0
    assert result.summary["eta_trust"] > 0
    assert np.isnan(result.summary["rounding_floor"])
    assert not {name for name in result.arrays if name.startswith(("grad", "momentum", "rmsprop"))}


def test_second_derivatives_are_those_of_the_plan(fresh: Setting, calls: Counter[str]) -> None:
    _, state, step, e = fresh
    plan = plan_of(directions=("full", "rmsprop", "baseline", "momentum"), second_order=("rmsprop",))
    first = first_order(plan, state, step, e)
    assert calls == {"influence": 2, "jvp_delta": 1, "jvp_delta second": 1, "rounding_floor": 1}
    assert np.isnan(first["full_second"])
    assert np.isfinite(first["rmsprop_second"])
    assert first["momentum_first"] == first["momentum_second"] == 0.0


def test_rmsprop_influences_are_a_multiple_of_frozen(fresh: Setting) -> None:
    _, state, step, e = fresh
    plan = plan_of(directions=("rmsprop",), reward_influence=False)
    arrays = first_order(plan, state, step, e)["per_sequence_rmsprop"]
    options: dict[str, Any] = {
        "grad": step.gradient,
        "preconditioner": "rmsprop",
        "max_grad_norm": plan.max_grad_norm,
        "stderr": False,
    }
    out = fx.influence(state.params, step.batch, e.batch, state.opt_state, apply=state.apply, **options)
    # Both are sums of as many float32 products as there are parameters, by passes that round differently.
    terms = sum(p.numel() for p in state.params.values())
    bound = 8 * torch.finfo(torch.float32).eps * terms**0.5 * out.per_sequence.abs().sum().item()
    assert np.abs(arrays - out.per_sequence.numpy()).max() <= bound
    assert np.abs(arrays).max() > 10 * bound


def test_rmsprop_multiple_is_none_when_betas_differ(fresh: Setting) -> None:
    plan, state, step, _ = fresh
    hyper = dict(state.opt_state.hyper)
    name = next(iter(hyper))
    hyper[name] = dataclasses.replace(hyper[name], beta1=0.5)
    steps = dict.fromkeys(hyper, 3)
    other = state._replace(opt_state=state.opt_state._replace(hyper=hyper, step=steps))
    assert first_order_module.rmsprop_multiple(plan, other, step) is None
    assert first_order_module.rmsprop_multiple(plan_of(preconditioner="jacobian"), state, step) is None


def test_sweep_measures_zero_directions_once(fresh: Setting) -> None:
    _, state, step, e = fresh
    plan = plan_of(directions=("full", "baseline", "momentum", "weight_decay"))
    arrays = sweep.sweep(plan, state, step, e.batch, sweep.StepSizes([1e-4, 2e-4], None), {}, quiet)
    n_e = len(e.rollouts)
    for name in ("baseline", "momentum", "weight_decay"):
        assert arrays[name].tolist() == [0.0, 0.0]
        assert arrays[f"{name}_contributions"].shape == arrays[f"{name}_log_weights"].shape == (2, n_e)
        assert arrays[f"{name}_ess"] == pytest.approx(n_e)
        assert arrays[f"{name}_clip_fraction"].tolist() == [0.0, 0.0]
    single = fx.snis_delta(state.params, step.decomposition.direction, 1e-4, e.batch, apply=state.apply)
    assert arrays["full"][0] == pytest.approx(single.delta_h.item(), rel=1e-3)
    assert arrays["full"][0] != arrays["full"][1]


def test_sweep_fits_step_directions_to_memory_budget(fresh: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    _, state, step, e = fresh
    sizes: list[int] = []
    real = sweep.measure_in_chunks

    def recording(measure: Any, block: fx.Params, *more: Any) -> Any:
        sizes.append(len(next(iter(block.values()))))
        return real(measure, block, *more)

    monkeypatch.setattr(sweep, "measure_in_chunks", recording)
    steps = sweep.StepSizes([1e-4], None)
    arrays = {}
    for budget in (1, 2**40):
        plan = plan_of(directions=("full", "rmsprop"), memory_budget=budget)
        arrays[budget] = sweep.sweep(plan, state, step, e.batch, steps, {}, quiet)
    assert sizes == [1, 1, 2]
    for name in ("full", "rmsprop"):
        assert arrays[1][name] == pytest.approx(arrays[2**40][name], rel=1e-3)


def test_jvp_delta_has_same_first_without_second(fresh: Setting) -> None:
    _, state, step, e = fresh
    both, first = (
        fx.jvp_delta(state.params, step.decomposition.direction, e.batch, apply=state.apply, second_order=second)
        for second in (True, False)
    )
    assert torch.equal(both.first, first.first)
    assert torch.equal(both.contributions, first.contributions)
    assert torch.isnan(first.second)
    assert both.second.item() != 0.0


def test_second_order_of_rollouts_needs_the_baselines() -> None:
    assert plan_of(second_order_per_sequence=True, second_order=()).second_order_directions() == {"baseline"}
    assert plan_of(directions=("grad",), second_order_per_sequence=True).second_order_directions() == {"full"}


@pytest.mark.slow
def test_derivative_check_warns_of_a_detached_parameter(fresh: Setting) -> None:
    plan, state, step, _ = fresh
    record = derivative_check(plan, state, step.batch)
    assert record is not None
    assert record["agrees"]
    assert record["conclusive"]
    assert record == derivative_check(plan, state, step.batch)

    def detached(params: fx.Params, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return state.apply({**params, name: params[name].detach()}, ids, mask)

    name = next(name for name in state.params if name.endswith("norm.weight"))
    with pytest.warns(UserWarning, match=rf"JVP that is .* along '{re.escape(name)}'; .*The run goes on"):
        record = derivative_check(plan, state._replace(apply=cast(Any, detached)), step.batch)
    assert record is not None
    assert not record["agrees"]
    assert record["parameters"] == [name]

    def numpy(params: fx.Params, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(state.apply(params, ids, mask).detach().numpy())

    with pytest.raises(fx.DerivativeError, match="has no"):
        derivative_check(plan, state._replace(apply=cast(Any, numpy)), step.batch)
    blank = step.batch._replace(completion_mask=torch.zeros_like(step.batch.completion_mask))
    assert derivative_check(plan, state, blank) is None
