"""Arguments of a wrong type are rejected before any forward, with the field, its type and the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.arguments import (
    BATCHES,
    PARAMS,
    POLICY,
    STATE,
    VOCAB,
    Arguments,
    Call,
    assert_rejected,
    shared_arguments,
)
from transformers import BatchEncoding

import fx_influence as fx
from fx_influence.types import Batch


@pytest.mark.parametrize("call", PARAMS)
def test_functions_accept_right_types(call: Call) -> None:
    call(shared_arguments())


@pytest.mark.parametrize("call", PARAMS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda g: g.model,
            r"params is of type TinyPolicy; expected a dictionary .*apply, params = fx\.make_functional",
        ),
        (
            lambda g: list(g.params.values()),
            r"params is of type list; expected a dictionary of tensors by parameter name",
        ),
        (lambda g: g.model.parameters(), r"params is of type generator; expected a dictionary"),
        (lambda g: g.policy, r"params is of type Policy; .*The two may be swapped"),
        (lambda g: None, r"params is None; expected a dictionary"),
        (lambda g: {"head.bias": [0.0] * VOCAB}, r"params\['head\.bias'\] is of type list; expected a tensor"),
        (lambda g: {"head.bias": None}, r"params\['head\.bias'\] is None; expected a tensor"),
    ],
    ids=["model", "list", "iterator", "policy", "none", "list inside", "none inside"],
)
def test_check_params_rejects_other_types(call: Call, wrong: Callable[[Arguments], Any], message: str) -> None:
    assert_rejected(call, message, params=wrong)


@pytest.mark.parametrize("call", POLICY)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda g: g.model, r"apply is of type TinyPolicy; expected a function .*apply, params = fx\.make_functional"),
        (lambda g: (g.policy, g.params), r"apply is of type tuple; expected a function"),
        (lambda g: g.params, r"apply is of type dict; .*The two may be swapped"),
        (lambda g: "gpt2", r"apply is of type str; expected a function"),
    ],
    ids=["model", "pair", "params", "name"],
)
def test_check_apply_rejects_other_types(call: Call, wrong: Callable[[Arguments], Any], message: str) -> None:
    assert_rejected(call, message, apply=wrong)


@pytest.mark.parametrize("call", STATE)
@pytest.mark.parametrize(
    ("wrong", "name"),
    [(lambda g: g.optimizer, "AdamW"), (lambda g: g.optimizer.state_dict(), "dict"), (lambda g: g.model, "TinyPolicy")],
    ids=["optimizer", "state dict", "model"],
)
def test_check_state_rejects_other_types(call: Call, wrong: Callable[[Arguments], Any], name: str) -> None:
    message = rf"opt_state is of type {name}; expected an AdamWState .*Pass fx\.adamw_state\(optimizer, model\)"
    assert_rejected(call, message, opt_state=wrong)


@pytest.mark.parametrize(("call", "field"), BATCHES)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda b: b._asdict(), r"{f} is of type dict; expected a fx\.Batch\. Name its fields: fx\.Batch\(input_ids="),
        (lambda b: BatchEncoding(b._asdict()), r"{f} is of type BatchEncoding; .*mask\.bool\(\)"),
        (lambda b: [], r"{f} is of type list; expected a fx\.Batch\. Make one by fx\.collate\(rollouts, pad_id\)"),
        (lambda b: b._replace(input_ids=b.input_ids.tolist()), r"{f}\.input_ids is of type list; .*torch\.as_tensor"),
        (lambda b: b._replace(completion_mask=None), r"{f}\.completion_mask is None; expected a tensor"),
        (lambda b: b._replace(group=np.arange(4)), r"{f}\.group is of type ndarray; expected a tensor"),
        (lambda b: b._replace(coefficients=0.5), r"{f}\.coefficients is of type float; expected a tensor"),
    ],
    ids=["dict", "encoding", "list", "ids as list", "no mask", "group as array", "coefficient as number"],
)
def test_check_is_batch_rejects_other_types(
    call: Call, field: str, wrong: Callable[[Batch], Any], message: str
) -> None:
    of = {"batch_u": "u", "batch_b": "u"}.get(field, "u" if call is Arguments.per_sample else "e")
    assert_rejected(call, message.replace("{f}", field), TypeError, **{field: lambda g: wrong(getattr(g, of))})


@pytest.mark.parametrize(("call", "field"), [c for c in BATCHES if c != (Arguments.influence, "batch_e")])
def test_check_is_batch_rejects_none(call: Call, field: str) -> None:
    """All but ``influence``, which then takes U for E."""
    assert_rejected(call, f"{field} is None; expected a fx.Batch", TypeError, **{field: lambda g: None})


@pytest.mark.parametrize(
    "call", [c for c, _ in BATCHES[:1]] + [Arguments.snis, Arguments.jvp, Arguments.fisher, Arguments.values]
)
@pytest.mark.parametrize("name", ["attention_mask", "completion_mask"])
def test_check_fields_names_cast_of_integer_mask(call: Call, name: str) -> None:
    field = {Arguments.fisher: "batch_a", Arguments.values: "batch"}.get(call, "batch_e")
    message = rf"{field}\.{name} is torch\.int64 of shape \(4, 7\); expected bool of .*Pass mask\.bool\(\)"
    assert_rejected(call, message, ValueError, **{field: lambda g: g.e._replace(**{name: getattr(g.e, name).long()})})


def test_check_fields_rejects_float_ids() -> None:
    message = r"batch\.input_ids is torch\.float32 of shape \(4, 7\); expected int64 \(B, T\), a row for each rollout"
    assert_rejected(
        Arguments.values, message, ValueError, batch=lambda g: g.e._replace(input_ids=g.e.input_ids.float())
    )


def test_influence_names_swapped_batches() -> None:
    message = r"batch_u\.coefficients is None and batch_e has some; .*Swap the two batches"
    assert_rejected(Arguments.influence, message, ValueError, batch_u=lambda g: g.e, batch_e=lambda g: g.u)


NUMBERS: list[tuple[str, Any, type[Exception], str]] = [
    ("temperature", None, TypeError, r"temperature is None; expected a number\. Pass the one"),
    ("temperature", "1", TypeError, r"temperature is of type str; expected a number"),
    ("temperature", torch.tensor(1.0), TypeError, r"temperature is of type Tensor; .* by \.item\(\)"),
    ("temperature", True, TypeError, r"temperature is of type bool; expected a number"),
    ("temperature", math.inf, ValueError, r"temperature is inf; expected a positive number"),
    ("chunk_size", 2.0, TypeError, r"chunk_size is of type float; expected an integer\. .*None to choose by size"),
    ("memory_budget", -1, ValueError, r"memory_budget is -1; expected at least 0"),
    ("memory_budget", 1e9, TypeError, r"memory_budget is of type float; expected an integer\. Pass a number of bytes"),
    ("max_grad_norm", "1.0", TypeError, r"max_grad_norm is of type str; .* None where nothing is clipped"),
    (
        "max_grad_norm",
        -1.0,
        ValueError,
        r"max_grad_norm is -1\.0; expected a positive number. Pass the trainer's, or None",
    ),
    ("mesh", "cpu", TypeError, r"mesh is of type str; expected a DeviceMesh"),
]


@pytest.mark.parametrize(
    ("call", "case"),
    [
        (call, case)
        for call in (Arguments.influence, Arguments.fisher, Arguments.snis, Arguments.jvp)
        for case in NUMBERS
        if call in (Arguments.influence, Arguments.fisher) or case[0] not in ("memory_budget", "max_grad_norm")
    ],
    ids=lambda value: f"{value[0]}={value[1]!r}" if isinstance(value, tuple) else value.__name__,
)
def test_check_number_rejects_other_types(call: Call, case: tuple[str, Any, type[Exception], str]) -> None:
    field, value, kind, message = case
    assert_rejected(call, message, kind, **{field: lambda g: value})


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(2.0), 1])
def test_check_number_accepts_numpy_scalars(value: Any) -> None:
    assert shared_arguments().jvp(temperature=value, chunk_size=np.int64(2)).first.isfinite()


@pytest.mark.parametrize(
    ("call", "field", "value", "message"),
    [
        (
            Arguments.influence,
            "preconditioner",
            "frozn",
            r"preconditioner is 'frozn'; expected one of frozen, .* \(the nearest is 'frozen'\)",
        ),
        (
            Arguments.influence,
            "objective",
            fx.Entropy("per-decision"),  # type: ignore[arg-type]
            r"estimator is 'per-decision'; .*nearest is 'per_decision'\)",
        ),
        (
            Arguments.jvp,
            "objective",
            fx.Entropy(normalize="tokens"),  # type: ignore[arg-type]
            r"normalize is 'tokens'; expected one of token, sequence \(the nearest is 'tok",
        ),
        (
            Arguments.decompose,
            "preconditioner",
            None,
            r"preconditioner is None; expected one of frozen, jacobian, rmsprop, lifetime$",
        ),
        (Arguments.snis, "clip", -1.0, r"clip is -1\.0; expected a cumulative log-weight of at least 0. Pass None"),
        (Arguments.snis, "eta", math.nan, r"eta is nan; expected a finite number"),
        (
            Arguments.influence,
            "tolerance",
            math.nan,
            r"tolerance is nan; expected a number in its range. Pass a relative residual",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)).partition(";")[0],
)
def test_options_out_of_range_are_rejected(call: Call, field: str, value: Any, message: str) -> None:
    assert_rejected(call, message, ValueError, **{field: lambda g: value})


@pytest.mark.parametrize(
    ("call", "field", "wrong", "message"),
    [
        (
            Arguments.influence,
            "objective",
            lambda g: torch.ones(4),
            r"objective is of type Tensor; .*fx\.expected_reward",
        ),
        (Arguments.influence, "objective", lambda g: "entropy", r"objective is of type str; .*fx\.Entropy\(\)"),
        (
            Arguments.snis,
            "objective",
            lambda g: fx.expected_reward(torch.ones(4)),
            r"objective is of type function; expected fx\.Entropy\(estimator, normalize\)\. Attribute other",
        ),
        (
            Arguments.influence,
            "grad",
            lambda g: list(g.params.values()),
            r"grads is of type list; expected a dictionary",
        ),
        (
            Arguments.influence,
            "grad",
            lambda g: {"head.bias": 0.5},
            r"grads\['head\.bias'\] is of type float; .*a tensor",
        ),
        (Arguments.snis, "eta", lambda g: [0.1, 0.2], r"eta is of type list; expected a number\. .*snis_sweep"),
        (Arguments.snis, "direction", lambda g: g.state, r"direction is of type AdamWState; expected a dictionary"),
        (Arguments.jvp, "direction", lambda g: None, r"direction is None; expected a dictionary"),
        (
            Arguments.per_sample,
            "loss_fn",
            lambda g: g.model,
            r"loss_fn is of type TinyPolicy; .*fx\.rollout_loss\(apply\)",
        ),
        (Arguments.decompose, "grads", lambda g: g.model, r"grads is of type TinyPolicy; expected a dictionary"),
    ],
)
def test_arguments_of_wrong_type_are_rejected(
    call: Call, field: str, wrong: Callable[[Arguments], Any], message: str
) -> None:
    assert_rejected(call, message, TypeError, **{field: wrong})


def test_snis_sweep_names_list_when_eta_is_scalar() -> None:
    arguments = shared_arguments()
    measure = arguments.sweep()
    block = {name: v.unsqueeze(0) for name, v in arguments.direction.items()}
    with pytest.raises(TypeError, match=r"etas is of type float; expected a list of numbers\. Pass \[eta\] for one"):
        measure(block, 0.1)


# --- Parameters of another model


# --- Values that users prepare before a call


# --- Values that are never read
