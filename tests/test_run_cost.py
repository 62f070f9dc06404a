"""A run computes what its plan asks for, each thing once, and nothing of directions that are zero."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, cast

import numpy as np
import pytest
import torch

import fx_influence as fx
from fx_influence.lab import measure, sweep
from fx_influence.lab.batches import Sampled, State, load_state, sampled, update_batch
from fx_influence.lab.derivatives import derivative_check
from fx_influence.lab.measure import evaluate, first_order
from fx_influence.lab.plan import EntropyInfluencePlan
from fx_influence.lab.requests import SampledBatch
from fx_influence.lab.step import Step, measure_step
from fx_influence.lab.store import RunDirectory

Setting = tuple[EntropyInfluencePlan, State, Step, Sampled]


def quiet(*done: object) -> None:
    pass


def plan_of(**fields: Any) -> EntropyInfluencePlan:
    update = SampledBatch("demo/train", num_prompts=2, completions_per_prompt=4)
    evaluations = (SampledBatch("demo/eval", num_prompts=2, completions_per_prompt=2),)
    few = {"eta_multiples": (1.0, 2.0), "scaled_eta_multiples": (), **fields}
    return EntropyInfluencePlan(update=update, evaluations=evaluations, **few)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """The demo with an optimizer that has neither moments nor weight decay, as at the first step of a LoRA training."""
    plan = plan_of()
    state = load_state(plan)
    opt = state.opt_state
    zero = {name: torch.zeros_like(x) for name, x in opt.exp_avg.items()}
    hyper = {name: h._replace(weight_decay=0.0) for name, h in opt.hyper.items()}
    opt = opt._replace(exp_avg=zero, exp_avg_sq=zero, step=dict.fromkeys(opt.step, 0), hyper=hyper)
    state = state._replace(opt_state=opt)
    directory = RunDirectory.start(tmp_path_factory.mktemp("cost") / "run", plan, {})
    u, e = (sampled(plan, state, directory, k, f"{k}.jsonl", quiet) for k in (0, 1))
    return plan, state, measure_step(plan, state, update_batch(plan, u), plan.gain, directory, quiet), e


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a run calls what its cost consists of."""
    counts: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            counts[f"{name} second" if options.get("second_order") else name] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    for module, name in (
        (measure, "influence"),
        (measure, "jvp_delta"),
        (measure, "rounding_floor"),
        (sweep, "snis_sweep"),
        (sweep, "rollout_gradients"),
    ):
        counted(module, name)
    return counts


def test_a_run_without_finite_steps_costs_an_influence_and_one_derivative(fresh: Setting, calls: Counter[str]) -> None:
    _, state, step, e = fresh
    plan = plan_of(directions=(), reward_influence=False)
    first = first_order(plan, state, step, e)
    result = evaluate(plan, state, step, e, first, {}, quiet)
    assert calls == {"influence": 1, "jvp_delta second": 1}
    assert result.summary["baseline"] == first["baseline_first"] == first["baseline_second"] == 0.0
    assert result.summary["eta_trust"] > 0
    assert np.isnan(result.summary["rounding_floor"])
    assert not {name for name in result.arrays if name.startswith(("grad", "momentum", "rmsprop"))}


def test_second_derivatives_are_those_that_the_plan_names(fresh: Setting, calls: Counter[str]) -> None:
    _, state, step, e = fresh
    plan = plan_of(directions=("full", "rmsprop", "baseline", "momentum"), second_order=("rmsprop",))
    first = first_order(plan, state, step, e)
    assert calls == {"influence": 2, "jvp_delta": 1, "jvp_delta second": 1, "rounding_floor": 1}
    assert np.isnan(first["full_second"])
    assert np.isfinite(first["rmsprop_second"])
    assert first["momentum_first"] == first["momentum_second"] == 0.0


def test_influences_along_rmsprop_are_a_multiple_where_one_factor_serves_all(fresh: Setting) -> None:
    _, state, step, e = fresh
    plan = plan_of(directions=("rmsprop",), reward_influence=False)
    found = first_order(plan, state, step, e)["per_sequence_rmsprop"]
    options = {"grad": step.gradient, "gain": "rmsprop", "max_grad_norm": plan.max_grad_norm, "stderr": False}
    out = fx.influence(state.params, step.batch, e.batch, state.opt_state, apply=state.apply, **options)
    # Both are sums of as many float32 products as there are parameters, by passes that round differently.
    terms = sum(p.numel() for p in state.params.values())
    bound = 8 * torch.finfo(torch.float32).eps * terms**0.5 * out.per_sequence.abs().sum().item()
    assert np.abs(found - out.per_sequence.numpy()).max() <= bound
    assert np.abs(found).max() > 10 * bound


def test_betas_that_differ_between_parameters_have_no_common_multiple(fresh: Setting) -> None:
    plan, state, step, _ = fresh
    hyper = dict(state.opt_state.hyper)
    name = next(iter(hyper))
    hyper[name] = hyper[name]._replace(beta1=0.5)
    steps = dict.fromkeys(hyper, 3)
    other = state._replace(opt_state=state.opt_state._replace(hyper=hyper, step=steps))
    assert measure.rmsprop_multiple(plan, other, step) is None
    assert measure.rmsprop_multiple(plan_of(gain="marginal"), state, step) is None


def test_directions_of_zero_take_one_forward_and_change_nothing(fresh: Setting) -> None:
    _, state, step, e = fresh
    plan = plan_of(directions=("full", "baseline", "momentum", "weight_decay"))
    found = sweep.sweep(plan, state, step, e.batch, sweep.Steps([1e-4, 2e-4], None), {}, quiet)
    n_e = len(e.rollouts)
    for name in ("baseline", "momentum", "weight_decay"):
        assert found[name].tolist() == [0.0, 0.0]
        assert found[f"{name}_contributions"].shape == found[f"{name}_log_weights"].shape == (2, n_e)
        assert found[f"{name}_ess"] == pytest.approx(n_e)
        assert found[f"{name}_clip_fraction"].tolist() == [0.0, 0.0]
    alone = fx.snis_delta(state.params, step.parts.direction, 1e-4, e.batch, apply=state.apply)
    assert found["full"][0] == pytest.approx(alone.delta_h.item(), rel=1e-3)
    assert found["full"][0] != found["full"][1]


def test_few_bytes_measure_one_direction_of_the_step_at_a_time(fresh: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    _, state, step, e = fresh
    sizes: list[int] = []
    real = sweep._in_parts

    def seen(measure: Any, block: fx.Params, *more: Any) -> Any:
        sizes.append(len(next(iter(block.values()))))
        return real(measure, block, *more)

    monkeypatch.setattr(sweep, "_in_parts", seen)
    steps = sweep.Steps([1e-4], None)
    found = {}
    for budget in (1, 2**40):
        plan = plan_of(directions=("full", "rmsprop"), memory_budget=budget)
        found[budget] = sweep.sweep(plan, state, step, e.batch, steps, {}, quiet)
    assert sizes == [1, 1, 2]
    for name in ("full", "rmsprop"):
        assert found[1][name] == pytest.approx(found[2**40][name], rel=1e-3)


def test_jvp_delta_without_the_second_derivative_has_the_same_first(fresh: Setting) -> None:
    _, state, step, e = fresh
    both, first = (
        fx.jvp_delta(state.params, step.parts.direction, e.batch, apply=state.apply, second_order=second)
        for second in (True, False)
    )
    assert torch.equal(both.first, first.first)
    assert torch.equal(both.contributions, first.contributions)
    assert torch.isnan(first.second)
    assert both.second.item() != 0.0


def test_a_plan_that_asks_for_rollouts_beside_the_baseline_needs_its_bend() -> None:
    assert plan_of(second_order_per_sequence=True, second_order=()).bent_directions() == {"baseline"}
    assert plan_of(directions=("grad",), second_order_per_sequence=True).bent_directions() == {"full"}


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
