"""Arguments that ``adamw_decompose`` rejects, each by name and with its remedy."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.cases import TinyPolicy, make_apply
from helpers.trainings import warm_state

import fx_influence as fx
from fx_influence.types import AdamWHyper, AdamWState

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
def test_adamw_decompose_rejects_bad_arguments(what: str) -> None:
    grads, state, params = warm_state()
    changes, message = BROKEN[what]
    with pytest.raises(ValueError, match=message):
        fx.adamw_decompose(**{"grads": grads, "opt_state": state, "params": params, **changes})


def test_adamw_decompose_rejects_another_models_state() -> None:
    grads, state, params = warm_state()
    wider = make_apply(TinyPolicy(6, 4, 1, 2, 6))[1]
    remedy = r"[Tt]he optimizer state is another model's: make it with adamw_state\(optimizer, model\)"
    with pytest.raises(
        ValueError, match=r"opt_state.exp_avg\['.*'\] has shape .*; expected the parameter's, .*" + remedy
    ):
        fx.adamw_decompose({}, state, wider)
    with pytest.raises(
        ValueError, match=r"opt_state.exp_avg\['.*'\] is unknown; expected names of the 1 trainable.*" + remedy
    ):
        fx.adamw_decompose({}, state, {"head.bias": params["head.bias"]})
    nothing = AdamWState({}, {}, {}, {}, {}, 0.1)
    with pytest.raises(ValueError, match=r"opt_state.hyper has none of the \d+ trainable parameters; " + remedy):
        fx.adamw_decompose(grads, nothing, params)


@pytest.mark.parametrize("field", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"])
def test_adamw_decompose_names_missing_state(field: str) -> None:
    grads, state, params = warm_state()
    hyper: dict[str, AdamWHyper] = {name: dataclasses.replace(h, amsgrad=True) for name, h in state.hyper.items()}
    trees: dict[str, Any] = {**state._asdict(), "hyper": hyper, "max_exp_avg_sq": state.exp_avg_sq}
    trees[field] = {name: x for name, x in trees[field].items() if name != "norm.bias"}
    with pytest.raises(ValueError, match=r"opt_state has no .* for 'norm.bias'"):
        fx.adamw_decompose(grads, AdamWState(**trees), params)
