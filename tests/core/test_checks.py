"""Bad input to the mathematics is rejected before any forward, with the field, the value and the remedy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cases import TinyPolicy, random_adamw_state, random_batch
from helpers.present import present
from torch import Tensor, nn

import fx_influence as fx
from fx_influence.types import Batch, Params

N, WIDTH, VOCAB = 4, 7, 5


class CallCounter:
    """A policy that counts its calls; ``vocab_size`` is the only attribute that the checks may read."""

    def __init__(self, model: nn.Module) -> None:
        self.apply, self.params = fx.make_functional(model)
        self.vocab_size = VOCAB
        self.calls = 0

    def __call__(self, params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.calls += 1
        return self.apply(params, input_ids, attention_mask)


def valid_arguments() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    apply = CallCounter(TinyPolicy(VOCAB, 6, 1, 2, WIDTH))
    return {
        "params": apply.params,
        "batch_u": random_batch(generator, N, WIDTH, VOCAB, groups=2, entropy_coefficients=True),
        "batch_e": random_batch(generator, N, WIDTH, VOCAB, groups=2, coefficients=False),
        "opt_state": random_adamw_state(generator, apply.params),
        "apply": apply,
    }


def influence(arguments: dict[str, Any]) -> Any:
    return fx.influence(**arguments)


def snis(arguments: dict[str, Any]) -> Any:
    batch, direction = arguments.pop("batch_e"), arguments.pop("direction", arguments["params"])
    del arguments["batch_u"], arguments["opt_state"]
    return fx.snis_delta(arguments.pop("params"), direction, 0.1, batch, **arguments)


def jvp(arguments: dict[str, Any]) -> Any:
    batch, direction = arguments.pop("batch_e"), arguments.pop("direction", arguments["params"])
    del arguments["batch_u"], arguments["opt_state"]
    return fx.jvp_delta(arguments.pop("params"), direction, batch, **arguments)


def fisher(arguments: dict[str, Any]) -> Any:
    return fx.fisher_kernel(arguments.pop("params"), arguments.pop("batch_e"), arguments.pop("batch_u"), **arguments)


Call = Callable[[dict[str, Any]], Any]
EVERY: tuple[Call, ...] = (influence, snis, jvp, fisher)


def assert_rejected(call: Call, message: str, **changes: Any) -> None:
    """Assert that ``call`` with ``changes`` raises ``ValueError(message)`` before the first forward."""
    arguments = valid_arguments()
    apply = arguments["apply"]
    with pytest.raises(ValueError, match=message):
        call({**arguments, **{name: x(arguments[name]) if callable(x) else x for name, x in changes.items()}})
    assert apply.calls == 0, "the check came after a forward"


@pytest.mark.parametrize("call", EVERY)
def test_functions_accept_valid_input(call: Call) -> None:
    arguments = valid_arguments()
    apply = arguments["apply"]
    call(arguments)
    assert apply.calls > 0


def with_entry(field: str, index: tuple[int | slice, ...], value: Any) -> Callable[[Batch], Batch]:
    def change(batch: Batch) -> Batch:
        tensor = getattr(batch, field).clone()
        tensor[index] = value
        return batch._replace(**{field: tensor})

    return change


def with_fields(**fields: Any) -> Callable[[Batch], Batch]:
    return lambda batch: batch._replace(**fields)


def drop_prompt(batch: Batch) -> Batch:
    """Mask a token before a completion token of row 1 as padding, as happens where pad and eos share an id."""
    position = int(batch.completion_mask[1].nonzero()[-1]) - 1
    return with_entry("attention_mask", (1, position), False)(batch)


BAD_BATCHES: dict[str, tuple[Callable[[Batch], Batch], str]] = {
    "ids of one row": (
        lambda b: b._replace(input_ids=b.input_ids[0]),
        r"{batch}\.input_ids is torch.int64 of shape \(7,\); expected int64 \(B, T\)",
    ),
    "int32 ids": (
        lambda b: b._replace(input_ids=b.input_ids.int()),
        r"{batch}\.input_ids is torch.int32 of shape \(4, 7\); expected int64 \(B, T\)",
    ),
    "attention mask of numbers": (
        lambda b: b._replace(attention_mask=b.attention_mask.long()),
        r"{batch}\.attention_mask is torch.int64 of shape \(4, 7\); expected bool of the shape of input_ids, \(4, 7\)",
    ),
    "completion mask of numbers": (
        lambda b: b._replace(completion_mask=b.completion_mask.float()),
        r"{batch}\.completion_mask is torch.float32 of shape \(4, 7\); expected bool",
    ),
    "attention mask of fewer columns": (
        lambda b: b._replace(attention_mask=b.attention_mask[:, :-1]),
        r"{batch}\.attention_mask is torch.bool of shape \(4, 6\); expected bool of the shape of input_ids, \(4, 7\)",
    ),
    "completion mask of more rows": (
        lambda b: b._replace(completion_mask=torch.cat([b.completion_mask] * 2)),
        r"{batch}\.completion_mask is torch.bool of shape \(8, 7\); expected bool of the shape",
    ),
    "group of fewer rows": (
        lambda b: b._replace(group=present(b.group)[:3]),
        r"{batch}\.group has shape \(3,\); expected \(4,\), one prompt a row",
    ),
    "no row": (
        lambda b: fx.Batch._make(None if field is None else field[:0] for field in b),
        r"{batch}\.input_ids is of shape \(0, 7\); expected at least one rollout",
    ),
    "first column completed": (
        with_entry("completion_mask", (2, 0), True),
        r"{batch}\.completion_mask\[2, 0\] is True; expected False.* Prepend the prompt",
    ),
    "hidden token before a completion token": (
        drop_prompt,
        r"{batch}\.attention_mask\[1, \d\] is False; expected True.* Make the mask from lengths",
    ),
    "id past the vocabulary": (
        with_entry("input_ids", (3, 2), VOCAB),
        r"{batch}\.input_ids has values from 0 to 5; expected .* 5, .*Tokenize with the model's own tokenizer",
    ),
    "negative id": (
        with_entry("input_ids", (3, 2), -100),
        r"{batch}\.input_ids has values from -100 to 4; expected at least 0.* Tokenize",
    ),
}


@pytest.mark.parametrize("call", EVERY)
@pytest.mark.parametrize("case", BAD_BATCHES)
def test_check_batch_rejects_unscorable_batch(call: Call, case: str) -> None:
    change, message = BAD_BATCHES[case]
    # fisher_kernel names its batches a and b.
    fields = {"batch_e": "batch_a", "batch_u": "batch_b"} if call is fisher else {"batch_e": "batch_e"}
    fields = {**fields, "batch_u": "batch_u"} if call is influence else fields
    for arguments, field in fields.items():
        assert_rejected(call, message.replace("{batch}", field), **{arguments: change})


@pytest.mark.parametrize("call", [influence, snis, jvp])
def test_check_batch_rejects_eval_batch_without_completion(call: Call) -> None:
    message = r"batch_e\.completion_mask has no True at all; expected at least one completion token, since the entropy"
    assert_rejected(call, message, batch_e=with_fields(completion_mask=torch.zeros(N, WIDTH, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            with_fields(coefficients=None, entropy_coefficients=None),
            r"batch_u\.coefficients is None; expected .*Fill it with fx\.coefficients\(\.\.\.\)",
        ),
        (
            with_entry("coefficients", (2, 3), math.nan),
            r"batch_u\.coefficients is not finite in row 2 \(1 such rows\); expected finite values. Drop",
        ),
        (
            with_entry("entropy_coefficients", (slice(1, 3), 3), math.inf),
            r"batch_u\.entropy_coefficients is not finite in row 1 \(2 such rows\); expected finite values",
        ),
        (
            with_fields(coefficients=torch.ones(N)),
            r"batch_u\.coefficients is torch.float32 of shape \(4,\); expected float \(4, 7\)",
        ),
        (
            with_fields(coefficients=torch.ones(N, WIDTH, dtype=torch.long)),
            r"batch_u\.coefficients is torch.int64 of shape \(4, 7\); expected float \(4, 7\)",
        ),
    ],
    ids=["none", "nan", "infinity", "shape", "dtype"],
)
def test_check_coefficients_rejects_unusable_values(change: Callable[[Batch], Batch], message: str) -> None:
    assert_rejected(influence, message, batch_u=change)


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


def test_check_batch_rejects_other_device() -> None:
    arguments = valid_arguments()
    other_device = arguments["batch_e"]._replace(input_ids=arguments["batch_e"].input_ids.to("meta"))
    assert_rejected(jvp, r"batch_e\.input_ids is on meta; expected cpu.* Move one of them", batch_e=other_device)


def test_check_batch_rejects_negative_ids_without_vocab_size() -> None:
    arguments = valid_arguments()
    arguments["apply"].vocab_size = None
    arguments["batch_e"] = with_entry("input_ids", (0, 0), -1)(arguments["batch_e"])
    with pytest.raises(ValueError, match=r"batch_e\.input_ids has values from -1 to 4"):
        jvp(arguments)


@pytest.mark.parametrize("call", EVERY)
def test_check_batch_rejects_call_under_autocast(call: Call) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_rejected(call, r"autocast.*outside of it")
