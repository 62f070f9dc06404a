"""The reference's AdamW against torch.optim and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import (
    assert_close,
    random_adamw_state,
    random_batch,
)
from helpers.reference_cases import generator, policy
from helpers.tolerances import assert_within, central_difference
from torch import Tensor

from fx_influence.testing import reference as ref
from fx_influence.types import (
    AdamWHyper,
    AdamWState,
    Gradients,
    Params,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"warm": 0},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "clipped": {"max_grad_norm": 0.05},
    "all": {"amsgrad": True, "maximize": True, "max_grad_norm": 0.1, "eps": 1e-3, "betas": (0.7, 0.9), "warm": 1},
}


def torch_step(
    params: Params,
    gradients: Gradients,
    *,
    warm: int = 4,
    max_grad_norm: float | None = None,
    amsgrad: bool = False,
    maximize: bool = False,
    eps: float = 1e-8,
    betas: tuple[float, float] = (0.9, 0.99),
) -> tuple[AdamWState, Params]:
    """Step a warm ``torch.optim.AdamW`` of two groups; return its state and (theta' - theta) / lr_ref.

    The step starts at ``params``. The last name is in no group.
    """
    leaves = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    names_held = list(leaves)[:-1]
    shared = {"amsgrad": amsgrad, "maximize": maximize, "eps": eps, "betas": betas}
    groups: list[dict[str, Any]] = [
        {"params": [leaves[name] for name in names_held[0::2]], "lr": 0.02, "weight_decay": 0.1},
        {"params": [leaves[name] for name in names_held[1::2]], "lr": 0.005, "weight_decay": 0.4},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=9.0, **shared)  # type: ignore[arg-type]
    noise = generator(3)
    for _ in range(warm):
        for p in leaves.values():
            p.grad = torch.randn(p.shape, generator=noise, dtype=p.dtype)
        optimizer.step()
    state = AdamWState({}, {}, {}, {}, {}, 0.02)
    for i, name in enumerate(names_held):
        saved, group = optimizer.state[leaves[name]], groups[i % 2]
        zero = torch.zeros_like(params[name])
        state.exp_avg[name] = saved.get("exp_avg", zero).clone()
        state.exp_avg_sq[name] = saved.get("exp_avg_sq", zero).clone()
        if amsgrad:
            state.max_exp_avg_sq[name] = saved.get("max_exp_avg_sq", zero).clone()
        state.step[name] = int(saved.get("step", 0))
        state.hyper[name] = AdamWHyper(
            lr_scale=group["lr"] / 0.02,
            beta1=betas[0],
            beta2=betas[1],
            eps=eps,
            weight_decay=group["weight_decay"],
            amsgrad=amsgrad,
            maximize=maximize,
        )
    for name, p in leaves.items():
        p.data.copy_(params[name])
        g = gradients[name]
        p.grad = None if g is None else g.clone()
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(leaves.values(), max_grad_norm)
    optimizer.step()
    return state, {name: (p.detach() - params[name]) / 0.02 for name, p in leaves.items()}


@pytest.mark.parametrize("setting", SETTINGS)
def test_adamw_matches_torch_step(setting: str) -> None:
    apply, params = policy(idle=True)
    batch = random_batch(generator(), 4, 6, 5, entropy_coefficients=True)
    rows = ref.sequence_gradients(apply, params, batch)
    assert all(row["idle"] is None for row in rows)
    options = SETTINGS[setting]
    names = ["idle"] + [name for name in params if name != "idle"]
    params = {name: params[name] for name in names}
    state, expected = torch_step(params, ref.add(rows), **options)
    step = ref.adamw(rows, state, params, "frozen", options.get("max_grad_norm"))
    assert (step.clip < 1) == ("max_grad_norm" in options)
    for name in names:
        assert_close(step.direction[name], expected[name])
    assert "idle" in state.exp_avg
    assert names[-1] not in state.exp_avg
    assert not expected["idle"].any()
    assert not expected[names[-1]].any()


@pytest.mark.parametrize("setting", SETTINGS)
def test_adamw_parts_add_up_and_jacobian_is_derivative(setting: str) -> None:
    apply, params = policy()
    batch = random_batch(generator(1), 3, 6, 5)
    rows = ref.sequence_gradients(apply, params, batch)
    options = SETTINGS[setting]
    clip = options.get("max_grad_norm")
    state, _ = torch_step(params, ref.add(rows), **options)
    frozen, jacobian_step = (
        ref.adamw(rows, state, params, preconditioner, clip) for preconditioner in ("frozen", "jacobian")
    )
    assert ref.inner(frozen.momentum, frozen.momentum) > 0 or setting == "cold"
    for name in params:
        shares = [g for g in (ref.scale(frozen.gain, row)[name] for row in rows) if g is not None]
        assert_close(frozen.momentum[name] + frozen.weight_decay[name] + sum(shares), frozen.direction[name])
    # Central differences in relative coordinates: each gradient is scaled by 1 + e, with the clip frozen.
    g = ref.add(rows)
    for name in state.exp_avg:
        expected, g_name = jacobian_step.gain[name], g[name]
        assert g_name is not None

        def direction_at(e: float, name: str = name) -> Tensor:
            moved = {k: None if x is None else frozen.clip * (1 + e) * x for k, x in g.items()}
            return ref.adamw([moved], state, params).direction[name]

        # In a first step 1 - beta^step loses three digits.
        derivative, bound = central_difference(direction_at, 1e-4, terms=1e6)
        assert_within(expected * g_name, derivative, bound)
        assert torch.equal(jacobian_step.direction[name], frozen.direction[name])


def test_adamw_rmsprop_gain_has_right_sign() -> None:
    apply, params = policy()
    rows = ref.sequence_gradients(apply, params, random_batch(generator(1), 3, 6, 5))
    for maximize in (False, True):
        state = random_adamw_state(generator(), params, maximize=maximize, lr_scale=0.25)
        step = ref.adamw(rows, state, params, "rmsprop", 0.1)
        for name, g in ref.add(rows).items():
            hyper, tau = state.hyper[name], state.step[name] + 1
            assert g is not None
            s = hyper.beta2 * state.exp_avg_sq[name] + (1 - hyper.beta2) * (step.clip * g) ** 2
            den = (s / (1 - hyper.beta2**tau)).sqrt() + hyper.eps
            assert_close(step.direction[name], (1 if maximize else -1) * 0.25 * g / den)
            assert_close(step.gain[name] * den, torch.full_like(g, 0.25 if maximize else -0.25))
            assert not step.momentum[name].any()
            assert not step.weight_decay[name].any()
