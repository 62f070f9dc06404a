"""Parameters of another model, and values that are not finite, are rejected by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.arguments import (
    POLICY,
    VOCAB,
    WIDTH,
    Arguments,
    Call,
    assert_rejected,
    shared_arguments,
)
from helpers.cases import TinyPolicy

import fx_influence as fx


@pytest.mark.parametrize("call", POLICY[:-1])
def test_check_policy_rejects_params_of_other_model(call: Call) -> None:
    other = fx.make_functional(TinyPolicy(VOCAB, 8, 1, 2, WIDTH))[1]
    assert_rejected(
        call,
        r"params\['token\.weight'\] has shape \(5, 8\); expected \(5, 6\)\. .*another model's",
        ValueError,
        params=lambda g: other,
    )
    extended = {f"model.{name}": p for name, p in other.items()}
    assert_rejected(
        call,
        r"params\['model\.token\.weight'\] is unknown; .*the nearest is 'token\.weight'",
        ValueError,
        params=lambda g: extended,
    )
    assert_rejected(
        call,
        r"params has no 'head\.bias' \(1 such\); expected all trained ones",
        ValueError,
        params=lambda g: {name: p for name, p in g.params.items() if name != "head.bias"},
    )


def test_check_policy_accepts_params_in_any_order() -> None:
    arguments = shared_arguments()
    reversed_params = dict(reversed(arguments.params.items()))
    torch.testing.assert_close(
        arguments.influence(params=reversed_params).per_sequence, arguments.influence().per_sequence
    )


def test_check_policy_accepts_frozen_params() -> None:
    """A frozen weight of the policy that is passed in ``params`` is read like any other parameter."""
    arguments = Arguments()
    arguments.model.head.bias.requires_grad_(False)
    apply, params = fx.make_functional(arguments.model)
    extended = {**params, "head.bias": arguments.model.head.bias.detach()}
    assert fx.jvp_delta(extended, {"head.bias": torch.ones(VOCAB)}, arguments.e, apply=apply).first.isfinite()


@pytest.mark.parametrize("call", POLICY[:-1])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_check_policy_names_nonfinite_param(call: Call, value: float) -> None:
    def nonfinite(arguments: Arguments) -> Any:
        bias = arguments.params["head.bias"].clone()
        bias[2] = value
        return {**arguments.params, "head.bias": bias}

    assert_rejected(
        call, r"params\['head\.bias'\] holds NaN or infinity; .*The training has diverged", ValueError, params=nonfinite
    )


@pytest.mark.parametrize("call", [Arguments.snis, Arguments.jvp])
def test_direction_nonfinite_entry_is_named(call: Call) -> None:
    message = r"direction\['head\.bias'\] holds NaN or infinity; expected a finite direction"
    assert_rejected(call, message, ValueError, direction=lambda g: {"head.bias": torch.full((VOCAB,), math.nan)})
