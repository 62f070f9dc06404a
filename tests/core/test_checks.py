"""Bad input to the mathematics is rejected before any forward, with the field, the value and the remedy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.checked_calls import (
    EVERY,
    VOCAB,
    Call,
    assert_rejected,
    fisher,
    influence,
    jvp,
    snis,
    valid_arguments,
    with_fields,
)

import fx_influence as fx
from fx_influence.types import Params


@pytest.mark.parametrize("call", EVERY)
def test_functions_accept_valid_input(call: Call) -> None:
    arguments = valid_arguments()
    apply = arguments["apply"]
    call(arguments)
    assert apply.calls > 0


@pytest.mark.parametrize("call", EVERY)
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "temperature",
            0.0,
            r"temperature is 0\.0; expected a positive number. Pass the one that the rollouts were sampled at",
        ),
        ("temperature", -1.0, r"temperature is -1\.0; expected a positive number"),
        ("temperature", math.nan, r"temperature is nan; expected a positive number"),
        ("chunk_size", 0, r"chunk_size is 0; expected at least 1. Pass None to choose by size"),
        ("chunk_size", -3, r"chunk_size is -3; expected at least 1"),
    ],
)
def test_check_options_rejects_nonpositive_number(call: Call, option: str, value: float, message: str) -> None:
    assert_rejected(call, message, **{option: value})


@pytest.mark.parametrize("call", [influence, snis, jvp])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("estimator", r"estimator is 'snis'; expected one of per_decision, sequence"),
        ("normalize", r"normalize is 'snis'; expected one of token, sequence"),
    ],
)
def test_check_estimator_rejects_unknown_name(call: Call, option: str, message: str) -> None:
    unknown: dict[str, Any] = {option: "snis"}
    assert_rejected(call, message, objective=fx.Entropy(**unknown))


def drop(name: str) -> Callable[[Params], Params]:
    return lambda tree: {key: value for key, value in tree.items() if key != name}


def other_names(state: fx.AdamWState) -> fx.AdamWState:
    trees = {field: tree for field, tree in state._asdict().items() if isinstance(tree, dict)}
    renamed: dict[str, Any] = {field: {f"model.{k}": x for k, x in tree.items()} for field, tree in trees.items()}
    return state._replace(**renamed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            other_names,
            r"opt_state\.exp_avg\['model\.token\.weight'\] is unknown; expected names of the \d+ trainable parameters"
            r".*another model's: make it with adamw_state\(optimizer, model\)",
        ),
        (
            lambda s: s._replace(exp_avg_sq={**s.exp_avg_sq, "head.bias": torch.ones(VOCAB + 1)}),
            r"opt_state\.exp_avg_sq\['head\.bias'\] has shape \(6,\); expected the parameter's, \(5,\).*another",
        ),
        (
            lambda s: s._replace(max_exp_avg_sq={"head.bias": torch.ones(1)}),
            r"opt_state\.max_exp_avg_sq\['head\.bias'\] has shape \(1,\); expected the parameter's, \(5,\)",
        ),
        (
            lambda s: s._replace(exp_avg={}, exp_avg_sq={}, hyper={}),
            r"opt_state\.hyper has none of the \d+ trainable parameters; .*another model's",
        ),
        (
            lambda s: s._replace(exp_avg=drop("head.bias")(s.exp_avg)),
            r"opt_state has no exp_avg, exp_avg_sq or step for 'head\.bias'",
        ),
        (
            lambda s: s._replace(
                hyper={**s.hyper, "head.bias": dataclasses.replace(s.hyper["head.bias"], amsgrad=True)}
            ),
            r"opt_state .*max_exp_avg_sq.*'head\.bias'",
        ),
    ],
    ids=["names", "shape", "amsgrad shape", "nothing", "missing moment", "missing maximum"],
)
@pytest.mark.parametrize("call", [influence, fisher])
def test_check_adamw_inputs_rejects_state_of_other_model(
    call: Call, change: Callable[[fx.AdamWState], fx.AdamWState], message: str
) -> None:
    assert_rejected(call, message, opt_state=change)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preconditioner": "loo"}, r"preconditioner is 'loo'; expected one of frozen, jacobian, rmsprop, lifetime"),
        (
            {"max_grad_norm": 0.0},
            r"max_grad_norm is 0\.0; expected a positive number. Pass the trainer's, or None where nothing is clipped",
        ),
        ({"max_grad_norm": math.nan}, r"max_grad_norm is nan; expected a positive number"),
        (
            {"grad": {"lm_head": torch.ones(1)}},
            r"grads\['lm_head'\] is unknown; expected names of the \d+ trainable parameters",
        ),
        (
            {"grad": {"head.bias": torch.ones(1)}},
            r"grads\['head\.bias'\] has shape \(1,\); expected the parameter's, \(5,\)",
        ),
    ],
    ids=["preconditioner", "norm 0", "norm nan", "grad name", "grad shape"],
)
def test_influence_rejects_bad_step_options(changes: dict[str, Any], message: str) -> None:
    assert_rejected(influence, message, **changes)


def test_influence_names_nonfinite_gradient() -> None:
    grads = {"head.bias": torch.full((VOCAB,), math.nan), "head.weight": torch.ones(VOCAB, 6)}
    with pytest.raises(ValueError, match=r"grads\['head\.bias'\] is not finite; .*Drop the batch"):
        influence({**valid_arguments(), "grad": grads})


@pytest.mark.parametrize("call", [snis, jvp])
def test_check_names_rejects_direction_of_other_model(call: Call) -> None:
    message = r"direction\['lm_head'\] is unknown; expected names of the \d+ trainable parameters.* Pass a direction"
    assert_rejected(call, message, direction={"lm_head": torch.ones(1)})
    message = (
        r"direction\['head\.bias'\] has shape \(1,\); expected the parameter's, \(5,\). Pass a direction made from"
    )
    assert_rejected(call, message, direction={"head.bias": torch.ones(1)})


def test_fisher_kernel_rejects_bad_preconditioner() -> None:
    assert_rejected(
        fisher, r"preconditioner is 'kfac'; expected 'adam', 'identity' or a dictionary", preconditioner="kfac"
    )
    assert_rejected(fisher, r"preconditioner\['lm_head'\] is unknown", preconditioner={"lm_head": torch.ones(1)})
    assert_rejected(fisher, r"opt_state is None; expected an AdamWState.* Pass fx.adamw_state", opt_state=None)
    assert_rejected(
        fisher,
        r"opt_state\.step\['token\.weight'\] is 0; expected at least one update.* Give batch_b coefficients",
        batch_u=with_fields(coefficients=None, entropy_coefficients=None),
        opt_state=lambda s: s._replace(step=dict.fromkeys(s.step, 0)),
    )
