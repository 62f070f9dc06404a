"""The diagonals of a step by preconditioner, against finite differences of real steps of AdamW."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.cases import assert_close
from helpers.present import present
from helpers.tolerances import ROOM, assert_close_to_rounding, assert_within
from helpers.trainings import LOST, STEP, Training, add_gradient, assert_made, assert_same, real_step, trainings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fx_influence.testing import reference


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
            expected = add_gradient(expected, step.gain, weighted)
            total = reference.add([total, weighted])
        assert_made(expected, training, real_step(training, total, None))


@given(training=trainings())
@settings(max_examples=100)
def test_jacobian_gain_matches_finite_differences(training: Training) -> None:
    """Every coordinate's step depends on its own gradient alone, so one central difference gives the whole diagonal.

    From theta = 0 the step is exact to a rounding unit of itself. Each coordinate moves by 1e-4 of its gradient; one
    whose gradient is 0 moves by 1e-8 eps, which also says what the derivative is where r = 0.
    """
    step, frozen = training.decompose("jacobian"), training.decompose("frozen")
    assert_same(step.direction, frozen.direction, 0.0)
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
            assert torch.all((slope - step.gain[name]).abs() <= (ROOM * 1e-4) ** 2 * frozen.gain[name].abs())


EPS, WIDTH = 0.1, 1e-8


def one_coordinate(
    m: float, s: float, maximum: float | None, *, g: float, eps: float = EPS, maximize: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the frozen and the jacobian gain, and the central difference of a real step, of one coordinate."""
    model = nn.ParameterDict({"p": nn.Parameter(torch.zeros(1, dtype=torch.float64))})
    group: dict[str, Any] = {"lr": 0.5, "betas": (0.9, 0.99), "eps": eps, "weight_decay": 0.0, "maximize": maximize}
    optimizer = torch.optim.AdamW([{"params": [model["p"]]}], **{**group, "amsgrad": maximum is not None})
    state = {"exp_avg": torch.tensor([m]), "exp_avg_sq": torch.tensor([s])}
    if maximum is not None:
        state["max_exp_avg_sq"] = torch.tensor([maximum])
    optimizer.state[model["p"]] = {"step": torch.tensor(5.0), **{k: v.double() for k, v in state.items()}}
    training = Training(model, optimizer, [{"p": torch.tensor([g], dtype=torch.float64)}], None)
    up, down = (
        real_step(training, {"p": torch.tensor([g + h], dtype=torch.float64)}, None)["p"] for h in (WIDTH, -WIDTH)
    )
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
    frozen, jacobian, slope = one_coordinate(m, s, maximum, g=g, maximize=maximize)
    # The denominator's kink at 0 is seen over the width, beside eps; the step's rounding is divided by the width.
    bound = ROOM * (WIDTH / EPS + torch.finfo(torch.float64).eps / WIDTH)
    assert_within(jacobian, slope, bound * float(frozen.abs()))
    assert bool((jacobian - frozen).abs() > 1e-2 * frozen.abs()) == bends
    assert bends or torch.equal(jacobian, frozen)


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
            assert_close(step.direction[name], step.gain[name] * present(total[name]))
    for part in (step.baseline, step.momentum, step.weight_decay):
        assert not any(x.any() for x in part.values())
