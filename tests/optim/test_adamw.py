"""``adamw_decompose`` against real ``torch.optim.AdamW`` steps in float64, at whatever hyperparameters and state."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from helpers.cases import TinyPolicy, assert_close, make_apply, random_adamw_state, random_batch
from helpers.strategies import PRECONDITIONERS, Case, cases, seeds
from helpers.tolerances import ROOM, assert_close_to_rounding, assert_within, rounding_bound
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fx_influence as fx
from fx_influence.testing import reference
from fx_influence.types import AdamWHyper, AdamWState, Gradients, Params, Preconditioner

Warm = tuple[Gradients, AdamWState, Params]
"""A policy's gradient, a warm state, and its parameters."""

# What the optimizers here are built with, and which no step may see: their param_groups are changed afterwards.
DEFAULTS: dict[str, Any] = {
    "lr": 7.0,
    "betas": (0.11, 0.22),
    "eps": 3.0,
    "weight_decay": 5.0,
    "amsgrad": False,
    "maximize": False,
}


class Training(NamedTuple):
    """A warm optimizer over ``model`` (an ``nn.ParameterDict``), and the next batch's gradients by sequence.

    The last parameter is held by no group; ``unreached`` has no gradient. Coordinate 0 of every parameter has never
    had a gradient other than 0.
    """

    model: nn.ParameterDict
    optimizer: torch.optim.AdamW
    grads: list[Gradients]
    max_grad_norm: float | None

    @property
    def params(self) -> Params:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    @property
    def state(self) -> AdamWState:
        return fx.adamw_state(self.optimizer, self.model)

    @property
    def lr(self) -> float:
        return next(group["lr"] for group in self.optimizer.param_groups if group["lr"])

    def decompose(self, preconditioner: Preconditioner = "frozen") -> fx.AdamWDecomposition:
        return fx.adamw_decompose(
            reference.add(self.grads), self.state, self.params, preconditioner, self.max_grad_norm
        )


group_settings = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.5, 0.02, 1e-3]),
        "betas": st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.3, 0.95, 0.999])),
        "eps": st.sampled_from([1e-8, 1e-3, 0.1]),
        "weight_decay": st.sampled_from([0.0, 0.1, 0.7]),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
    }
)


@st.composite
def trainings(draw: st.DrawFn) -> Training:
    """Two param_groups unlike each other (the first lr may be 0), state of some real steps, a clip or none."""
    generator = torch.Generator().manual_seed(draw(seeds))

    def normal(shape: tuple[int, ...], size: float = 1.0) -> Tensor:
        return size * torch.randn(shape, generator=generator, dtype=torch.float64)

    def gradient(shape: tuple[int, ...], size: float) -> Tensor:
        g = normal(shape, size)
        g.flatten()[0] = 0.0
        return g

    shapes = draw(st.lists(st.sampled_from([(3,), (2, 3), (2, 1, 2), (5,)]), min_size=4, max_size=6))
    model = nn.ParameterDict({f"p{i}": nn.Parameter(normal(shape)) for i, shape in enumerate(shapes)})
    in_optimizer = list(model.values())[:-1]
    optimizer = torch.optim.AdamW([{"params": in_optimizer[0::2]}, {"params": in_optimizer[1::2]}], **DEFAULTS)
    for group in optimizer.param_groups:
        group.update(draw(group_settings))
    warm_size = draw(st.sampled_from([0.1, 1.0, 20.0]))
    for step in range(draw(st.integers(0, 4))):
        for i, p in enumerate(in_optimizer):
            # Parameter 0 misses the first step, so step counts differ.
            p.grad = None if (step, i) == (0, 0) else gradient(p.shape, warm_size)
        optimizer.step()
    if draw(st.booleans()):
        optimizer.param_groups[0]["lr"] = 0.0
    unreached = draw(st.sampled_from([None, "p1"]))
    grads: list[Gradients] = [
        {name: None if name == unreached else gradient(p.shape, 1.0) for name, p in model.items()}
        for _ in range(draw(st.integers(1, 4)))
    ]
    return Training(model, optimizer, grads, draw(st.sampled_from([None, 0.3, 1e3])))


def real_step(training: Training, grads: Gradients, max_grad_norm: float | None, at_zero: bool = False) -> Params:
    """(theta' - theta) / lr_ref of the optimizer's own next step, made on a copy; ``at_zero``: from theta = 0."""
    model, optimizer = copy.deepcopy((training.model, training.optimizer))
    for name, p in model.named_parameters():
        p.data.mul_(0.0 if at_zero else 1.0)
        g = grads[name]
        p.grad = None if g is None else g.clone()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    return {name: (p.detach() - before[name]) / training.lr for name, p in model.named_parameters()}


# Roundings of one coordinate's step; 1 - beta^step of the betas here may have lost three digits, and den has its root.
STEP, LOST = 100, 1e3


def same(actual: Params, expected: Params, scale: float = LOST) -> None:
    """Equal to the rounding of a step of AdamW, beside ``scale`` times the largest entry; bit for bit at 0."""
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert_close_to_rounding(x, expected[name], terms=STEP, scale=scale * expected[name].abs(), name=name)


def assert_made(actual: Params, training: Training, step: Params) -> None:
    """Equal to a step that was made: theta' - theta carries the rounding of theta, and is divided by lr."""
    moved = max(float(p.abs().max()) for p in training.params.values()) / training.lr
    for name, x in step.items():
        size = moved + LOST * float(x.abs().max())
        assert_close_to_rounding(actual[name], x, terms=STEP, scale=size, name=name)


def plus(a: Params, gain: Params, g: Gradients) -> Params:
    """Return a + gain * g, where None adds nothing."""
    return {name: x if (y := g[name]) is None else x + gain[name] * y for name, x in a.items()}


@given(training=trainings())
@settings(max_examples=100)
def test_direction_matches_torch_adamw(training: Training) -> None:
    step = training.decompose()
    assert_made(step.direction, training, real_step(training, reference.add(training.grads), training.max_grad_norm))
    assert (step.clip < 1) == (training.max_grad_norm == 0.3)


@given(training=trainings(), preconditioner=st.sampled_from(["frozen", "jacobian"]), split=st.integers(0, 4))
@settings(max_examples=100)
def test_parts_add_up_to_torch_step_for_any_grouping(
    training: Training, preconditioner: Preconditioner, split: int
) -> None:
    step = training.decompose(preconditioner)
    real = real_step(training, reference.add(training.grads), training.max_grad_norm)
    alone = step.baseline
    for g in training.grads:
        alone = plus(alone, step.gain, g)
    assert_made(alone, training, real)
    grouped = step.baseline
    for part in (training.grads[:split], training.grads[split:]):
        if part:
            grouped = plus(grouped, step.gain, reference.add(part))
    assert_made(grouped, training, real)
    if preconditioner == "frozen":
        same({name: step.momentum[name] + step.weight_decay[name] for name in real}, step.baseline)


@given(training=trainings(), weights=st.lists(st.sampled_from([0.0, 1.0, -1.5, 2.0]), min_size=4, max_size=4))
@settings(max_examples=50)
def test_frozen_gain_is_linear_in_sequences(training: Training, weights: list[float]) -> None:
    """amsgrad's maximum, set out of reach, holds the denominator: then reweighting the batch is affine, exactly."""
    training = training._replace(max_grad_norm=None)
    for group in training.optimizer.param_groups:
        group["amsgrad"] = True
        for p in group["params"]:
            state = training.optimizer.state[p]
            if not state:
                state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["max_exp_avg_sq"] = torch.full_like(p, 1e4)
    for preconditioner in ("frozen", "jacobian"):
        step = training.decompose(preconditioner)
        expected, total = step.baseline, dict.fromkeys(training.params)
        for w, g in zip(weights, training.grads, strict=False):
            weighted = {name: None if x is None else w * x for name, x in g.items()}
            expected = plus(expected, step.gain, weighted)
            total = reference.add([total, weighted])
        assert_made(expected, training, real_step(training, total, None))


@given(training=trainings())
@settings(max_examples=100)
def test_jacobian_gain_matches_finite_differences(training: Training) -> None:
    """Every coordinate's step depends on its own gradient alone, so one central difference gives the whole diagonal.

    From theta = 0 the step is exact to a rounding unit of itself. Each coordinate moves by 1e-4 of its gradient; one
    whose gradient is 0 moves by 1e-8 eps, which also says what the derivative is where r = 0.
    """
    step, share = training.decompose("jacobian"), training.decompose("frozen")
    same(step.direction, share.direction, 0.0)
    g = {name: None if x is None else step.clip * x for name, x in reference.add(training.grads).items()}
    group_of = {id(p): group for group in training.optimizer.param_groups for p in group["params"]}
    widths = {}
    for name, p in training.model.named_parameters():
        eps, x = group_of.get(id(p), {"eps": 1.0})["eps"], g[name]
        widths[name] = torch.zeros_like(p) if x is None else torch.where(x == 0, 1e-8 * eps, 1e-4 * x.abs())
    up, down = (
        real_step(training, {k: None if x is None else x + sign * widths[k] for k, x in g.items()}, None, at_zero=True)
        for sign in (1, -1)
    )
    for name, x in g.items():
        if x is not None:
            slope = step.clip * (up[name] - down[name]) / (2 * widths[name])
            # The truncation of a relative width of 1e-4, with room.
            assert torch.all((slope - step.gain[name]).abs() <= (ROOM * 1e-4) ** 2 * share.gain[name].abs())


EPS, WIDTH = 0.1, 1e-8


def one_coordinate(
    m: float, s: float, maximum: float | None, *, g: float, eps: float = EPS, maximize: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(share gain, marginal gain, central difference of a real step) of one coordinate in a state made by hand."""
    model = nn.ParameterDict({"p": nn.Parameter(torch.zeros(1, dtype=torch.float64))})
    group = {"lr": 0.5, "betas": (0.9, 0.99), "eps": eps, "weight_decay": 0.0, "maximize": maximize}
    optimizer = torch.optim.AdamW([{"params": [model["p"]]}], **{**group, "amsgrad": maximum is not None})
    state = {"exp_avg": torch.tensor([m]), "exp_avg_sq": torch.tensor([s])}
    if maximum is not None:
        state["max_exp_avg_sq"] = torch.tensor([maximum])
    optimizer.state[model["p"]] = {"step": torch.tensor(5.0), **{k: v.double() for k, v in state.items()}}
    training = Training(model, optimizer, [{"p": torch.tensor([g], dtype=torch.float64)}], None)
    up, down = (real_step(training, {"p": training.grads[0]["p"] + h}, None)["p"] for h in (WIDTH, -WIDTH))
    return training.decompose("frozen").gain["p"], training.decompose("jacobian").gain["p"], (up - down) / (2 * WIDTH)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("m", "s", "maximum", "g", "bends"),
    [
        pytest.param(0.3, 0.2, None, 0.7, True, id="plain"),
        pytest.param(0.3, 0.2, 0.201, 0.7, True, id="amsgrad, the new second moment wins"),
        pytest.param(0.3, 0.2, 0.9, 0.7, False, id="amsgrad, the old maximum wins"),
        pytest.param(0.0, 0.0, None, 0.0, False, id="r = 0"),
        pytest.param(0.3, 0.0, None, 0.0, False, id="r = 0 under momentum"),
        pytest.param(0.3, 0.0, 0.4, 0.0, False, id="r = 0 under amsgrad"),
    ],
)
def test_jacobian_gain_is_frozen_where_denominator_is(
    m: float, s: float, maximum: float | None, g: float, bends: bool, maximize: bool
) -> None:
    share, marginal, slope = one_coordinate(m, s, maximum, g=g, maximize=maximize)
    # The denominator's kink at 0 is seen over the width, beside eps; the step's rounding is divided by the width.
    bound = ROOM * (WIDTH / EPS + torch.finfo(torch.float64).eps / WIDTH)
    assert_within(marginal, slope, bound * float(share.abs()))
    assert bool((marginal - share).abs() > 1e-2 * share.abs()) == bends
    assert bends or torch.equal(marginal, share)


@given(training=trainings())
@settings(max_examples=80)
def test_rmsprop_gain_is_minus_rho_over_denominator(training: Training) -> None:
    step = training.decompose("rmsprop")
    model, optimizer = copy.deepcopy((training.model, training.optimizer))
    total = reference.add(training.grads)
    for name, p in model.named_parameters():
        p.grad = None if (g := total[name]) is None else g.clone()
    if training.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
    optimizer.step()
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = next(k for k, q in model.named_parameters() if q is p)
            if p.grad is None:
                continue
            saved = optimizer.state[p]
            s = saved["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
            den = (s / (1 - group["betas"][1] ** float(saved["step"]))).sqrt() + group["eps"]
            sign = 1.0 if group["maximize"] else -1.0
            expected = torch.full_like(den, sign * group["lr"] / training.lr)
            assert_close_to_rounding(step.gain[name] * den, expected, terms=STEP, scale=LOST * expected.abs())
            assert_close(step.direction[name], step.gain[name] * total[name])
    for part in (step.baseline, step.momentum, step.weight_decay):
        assert not any(x.any() for x in part.values())


@given(training=trainings(), preconditioner=st.sampled_from(PRECONDITIONERS))
def test_parameters_without_gradient_or_group_do_not_move(training: Training, preconditioner: Preconditioner) -> None:
    last = list(training.params)[-1]
    grads = [{**g, "p0": None} for g in training.grads]
    step = training._replace(grads=grads).decompose(preconditioner)
    real = real_step(training, reference.add(grads), training.max_grad_norm)
    assert last not in training.state.hyper
    assert not real[last].any()
    assert not real["p0"].any()
    for part in step[:-1]:
        assert not part[last].any()
        assert not part["p0"].any()
    absent = [{name: x for name, x in g.items() if x is not None} for g in grads]
    for part, other in zip(step[:-1], training._replace(grads=absent).decompose(preconditioner)[:-1], strict=True):
        same(part, other, 0.0)


@pytest.mark.parametrize(("betas", "rate"), [((0.8, 0.9), 0.02), ((0.95, 0.999), 0.3)])
def test_hyperparameters_follow_param_groups(betas: tuple[float, float], rate: float) -> None:
    model = nn.ParameterDict({"p": nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))})
    optimizer = torch.optim.AdamW(model.parameters(), **DEFAULTS)
    training = Training(model, optimizer, [{"p": torch.tensor([0.5, 3.0], dtype=torch.float64)}], None)
    as_built = training.decompose().direction
    optimizer.param_groups[0].update(lr=rate, betas=betas, eps=1e-6, weight_decay=0.2, maximize=True)
    assert_made(training.decompose().direction, training, real_step(training, training.grads[0], None))
    assert (training.decompose().direction["p"] - as_built["p"]).abs().min() > 0.1


def test_direction_uses_initial_lr_when_all_lr_are_0() -> None:
    values = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = nn.ParameterDict({"p0": nn.Parameter(values[0].clone()), "p1": nn.Parameter(values[1].clone())})
    groups = [{"params": [model["p0"]], "lr": 0.02}, {"params": [model["p1"]], "lr": 0.005}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    grads: Gradients = {"p0": values[1].clone(), "p1": values[0].clone()}
    training = Training(model, optimizer, [grads], None)
    expected, before = real_step(training, grads, None), copy.deepcopy(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: k / 10)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    assert training.state.lr == 0.0
    assert_made(training.decompose().direction, training._replace(optimizer=before), expected)
    optimizer.step()
    schedule.step()
    assert training.state.lr == pytest.approx(0.002)
    assert_made(training.decompose().direction, training, real_step(training, grads, None))


@given(training=trainings(), preconditioner=st.sampled_from(PRECONDITIONERS))
@settings(max_examples=50)
def test_adamw_decompose_matches_the_reference(training: Training, preconditioner: Preconditioner) -> None:
    fast = training.decompose(preconditioner)
    slow = reference.adamw(training.grads, training.state, training.params, preconditioner, training.max_grad_norm)
    assert float(fast.clip) == pytest.approx(slow.clip, abs=rounding_bound(torch.float64, STEP, slow.clip))
    for part in ("direction", "momentum", "weight_decay", "gain"):
        for name, x in getattr(slow, part).items():
            assert_close(getattr(fast, part)[name], x)


@given(case=cases())
@settings(max_examples=10)
def test_adamw_decompose_matches_the_reference_on_a_policy(case: Case) -> None:
    rows = reference.sequence_gradients(case.apply, case.params, case.batch_u, case.temperature)
    arguments = (case.opt_state, case.params, case.preconditioner, case.max_grad_norm)
    fast, slow = fx.adamw_decompose(reference.add(rows), *arguments), reference.adamw(rows, *arguments)
    for part in ("direction", "momentum", "weight_decay", "gain"):
        for name, x in getattr(slow, part).items():
            assert_close(getattr(fast, part)[name], x)


@given(training=trainings(), preconditioner=st.sampled_from(PRECONDITIONERS))
@settings(max_examples=10)
def test_adamw_decompose_is_pure(training: Training, preconditioner: Preconditioner) -> None:
    grads, state, params = reference.add(training.grads), training.state, training.params
    given_values = (grads, state, params)
    before = copy.deepcopy(given_values)
    first = fx.adamw_decompose(grads, state, params, preconditioner, training.max_grad_norm)
    second = fx.adamw_decompose(grads, state, params, preconditioner, training.max_grad_norm)
    for a, b in zip(first[:-1], second[:-1], strict=True):
        same(a, b, 0.0)
    for old, new in zip((before[0], *before[1][:3], before[2]), (grads, *state[:3], params), strict=True):
        assert old.keys() == new.keys()
        assert all(x is None if (y := new[name]) is None else torch.equal(x, y) for name, x in old.items())
    assert before[1][3:] == state[3:]


def test_adamw_decompose_drops_autograd_history(
    warm: Warm,
) -> None:
    grads, state, params = warm
    live = {name: p.clone().requires_grad_() for name, p in params.items()}
    step = fx.adamw_decompose(grads, state, live)
    assert not any(x.requires_grad for part in step[:-1] for x in part.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_parameters_step_in_float32(warm: Warm, dtype: torch.dtype) -> None:
    grads, state, params = warm
    low = {name: p.to(dtype) for name, p in params.items()}
    given_grads = {name: None if g is None else g.float() for name, g in grads.items()}
    moments = [{name: x.float() for name, x in part.items()} for part in state[:2]]
    given_state = AdamWState._make([*moments, *state[2:]])
    step = fx.adamw_decompose(given_grads, given_state, low, max_grad_norm=0.5)
    exact = fx.adamw_decompose(grads, state, {name: p.double() for name, p in low.items()}, max_grad_norm=0.5)
    for name, x in step.direction.items():
        assert x.dtype == torch.float32
        assert_close_to_rounding(x, exact.direction[name], terms=STEP)


@pytest.fixture
def warm() -> Warm:
    generator = torch.Generator().manual_seed(0)
    apply, params = make_apply(TinyPolicy(5, 4, 1, 2, 6))
    rows = reference.sequence_gradients(apply, params, random_batch(generator, 3, 6, 5))
    return reference.add(rows), random_adamw_state(generator, params), params


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "unknown preconditioner": (
        {"preconditioner": "loo"},
        r"preconditioner is 'loo'; expected one of frozen, jacobian, rmsprop, lifetime",
    ),
    "clip of 0": ({"max_grad_norm": 0.0}, r"max_grad_norm is 0\.0; expected a positive number"),
    "clip of NaN": ({"max_grad_norm": float("nan")}, r"max_grad_norm is nan"),
    "gradient of another model": (
        {"grads": {"foreign": torch.ones(2)}},
        r"grads\['foreign'\] is unknown; expected names",
    ),
    "gradient of another shape": ({"grads": {"head.bias": torch.ones(2)}}, r"grads\['head.bias'\] has shape \(2,\)"),
    "NaN gradient": ({"grads": {"head.bias": torch.full((5,), torch.nan)}}, r"grads\['head.bias'\] is not finite"),
    "infinite gradient": ({"grads": {"head.bias": torch.full((5,), torch.inf)}}, r"\['head.bias'\] is not finite"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_adamw_decompose_rejects_bad_arguments(warm: Warm, what: str) -> None:
    grads, state, params = warm
    changes, message = BROKEN[what]
    with pytest.raises(ValueError, match=message):
        fx.adamw_decompose(**{"grads": grads, "opt_state": state, "params": params, **changes})


def test_adamw_decompose_rejects_another_models_state(warm: Warm) -> None:
    grads, state, params = warm
    wider = make_apply(TinyPolicy(6, 4, 1, 2, 6))[1]
    remedy = r"the optimizer state is another model's: make it with adamw_state\(optimizer, model\)"
    with pytest.raises(ValueError, match=r"opt_state.exp_avg\['.*'\] has shape .* the parameter .*" + remedy):
        fx.adamw_decompose({}, state, wider)
    with pytest.raises(
        ValueError, match=r"opt_state.exp_avg\['.*'\] is unknown; expected names of the 1 trainable.*" + remedy
    ):
        fx.adamw_decompose({}, state, {"head.bias": params["head.bias"]})
    nothing = AdamWState({}, {}, {}, {}, {}, 0.1)
    with pytest.raises(ValueError, match=r"opt_state.hyper has none of the \d+ trainable parameters; " + remedy):
        fx.adamw_decompose(grads, nothing, params)


@pytest.mark.parametrize("field", ["exp_avg", "exp_avg_sq", "step"])
def test_adamw_decompose_names_a_missing_moment(warm: Warm, field: str) -> None:
    grads, state, params = warm
    part = {name: x for name, x in getattr(state, field).items() if name != "norm.bias"}
    with pytest.raises(ValueError, match=r"opt_state has no .* for 'norm.bias'"):
        fx.adamw_decompose(grads, state._replace(**{field: part}), params)


def test_adamw_decompose_names_a_missing_amsgrad_maximum(
    warm: Warm,
) -> None:
    grads, state, params = warm
    hyper: dict[str, AdamWHyper] = {name: dataclasses.replace(h, amsgrad=True) for name, h in state.hyper.items()}
    with pytest.raises(ValueError, match=r"opt_state has no max_exp_avg_sq for 'token.weight'"):
        fx.adamw_decompose(grads, state._replace(hyper=hyper), params)
