"""Arguments of a wrong type are rejected before any forward, with the field, its type and the remedy."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import TinyPolicy, random_batch, random_direction
from transformers import BatchEncoding

import fx_influence as fx
from fx_influence.types import Batch

WIDTH, VOCAB = 7, 5


class Counted:
    """A policy that counts its calls."""

    def __init__(self, apply: fx.Policy) -> None:
        self.apply, self.calls = apply, 0
        self.parameter_shapes, self.trainable = apply.parameter_shapes, apply.trainable

    def __call__(self, *args: Any) -> torch.Tensor:
        self.calls += 1
        return self.apply(*args)


class Arguments:
    """Valid arguments of every function, and the objects that users mistake for them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = TinyPolicy(VOCAB, 6, 1, 2, WIDTH)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        policy, self.params = fx.make_functional(self.model)
        self.policy, self.apply = policy, Counted(policy)
        self.u = random_batch(generator, 4, WIDTH, VOCAB)
        self.e = random_batch(generator, 4, WIDTH, VOCAB, groups=2, coefficients=False)
        self.state = fx.adamw_state(self.optimizer, self.model)
        self.direction = random_direction(generator, self.params)

    def influence(self, **changes: Any) -> Any:
        arguments = {"params": self.params, "batch_u": self.u, "batch_e": self.e, "opt_state": self.state}
        return fx.influence(**{**arguments, "apply": self.apply, **changes})

    def snis(self, **changes: Any) -> Any:
        arguments = {
            "params": self.params,
            "direction": self.direction,
            "eta": 0.1,
            "batch_e": self.e,
            "apply": self.apply,
        }
        return fx.snis_delta(**{**arguments, **changes})

    def sweep(self, **changes: Any) -> Any:
        return fx.snis_sweep(**{"params": self.params, "batch_e": self.e, "apply": self.apply, **changes})

    def jvp(self, **changes: Any) -> Any:
        arguments = {"params": self.params, "direction": self.direction, "batch_e": self.e, "apply": self.apply}
        return fx.jvp_delta(**{**arguments, **changes})

    def fisher(self, **changes: Any) -> Any:
        arguments = {"params": self.params, "batch_a": self.e, "batch_b": self.u, "opt_state": self.state}
        return fx.fisher_kernel(**{**arguments, "apply": self.apply, **changes})

    def values(self, **changes: Any) -> Any:
        return fx.token_values(**{"params": self.params, "batch": self.e, "apply": self.apply, **changes})

    def per_sample(self, **changes: Any) -> Any:
        arguments = {"loss_fn": fx.rollout_loss(self.apply), "params": self.params, "batch": self.u}
        return fx.per_sample_grads(**{**arguments, **changes})

    def decompose(self, **changes: Any) -> Any:
        arguments = {"grads": self.direction, "opt_state": self.state, "params": self.params}
        return fx.adamw_decompose(**{**arguments, **changes})


@functools.cache
def shared_arguments() -> Arguments:
    """Return arguments that no test changes."""
    return Arguments()


Call = Callable[..., Any]
POLICY: tuple[Call, ...] = (
    Arguments.influence,
    Arguments.snis,
    Arguments.sweep,
    Arguments.jvp,
    Arguments.fisher,
    Arguments.values,
)
PARAMS: tuple[Call, ...] = (*POLICY, Arguments.per_sample, Arguments.decompose)
STATE: tuple[Call, ...] = (Arguments.influence, Arguments.fisher, Arguments.decompose)
BATCHES: tuple[tuple[Call, str], ...] = (
    (Arguments.influence, "batch_u"),
    (Arguments.influence, "batch_e"),
    (Arguments.snis, "batch_e"),
    (Arguments.sweep, "batch_e"),
    (Arguments.jvp, "batch_e"),
    (Arguments.fisher, "batch_a"),
    (Arguments.fisher, "batch_b"),
    (Arguments.values, "batch"),
    (Arguments.per_sample, "batch"),
)


def assert_rejected(
    call: Call, message: str, kind: type[Exception] = TypeError, **changes: Callable[[Arguments], Any]
) -> None:
    arguments = shared_arguments()
    calls = arguments.apply.calls
    with pytest.raises(kind, match=message):
        call(arguments, **{name: change(arguments) for name, change in changes.items()})
    assert arguments.apply.calls == calls, "the check came after a forward"


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
        (lambda b: None, r"{f} is None; expected a fx\.Batch"),
        (lambda b: b._replace(input_ids=b.input_ids.tolist()), r"{f}\.input_ids is of type list; .*torch\.as_tensor"),
        (lambda b: b._replace(completion_mask=None), r"{f}\.completion_mask is None; expected a tensor"),
        (lambda b: b._replace(group=np.arange(4)), r"{f}\.group is of type ndarray; expected a tensor"),
        (lambda b: b._replace(coefficients=0.5), r"{f}\.coefficients is of type float; expected a tensor"),
    ],
    ids=["dict", "encoding", "list", "none", "ids as list", "no mask", "group as array", "coefficient as number"],
)
def test_check_is_batch_rejects_other_types(
    call: Call, field: str, wrong: Callable[[Batch], Any], message: str
) -> None:
    of = {"batch_u": "u", "batch_b": "u"}.get(field, "u" if call is Arguments.per_sample else "e")
    assert_rejected(call, message.replace("{f}", field), **{field: lambda g: wrong(getattr(g, of))})


@pytest.mark.parametrize(
    "call", [c for c, _ in BATCHES[:1]] + [Arguments.snis, Arguments.jvp, Arguments.fisher, Arguments.values]
)
@pytest.mark.parametrize("name", ["attention_mask", "completion_mask"])
def test_check_fields_names_cast_of_integer_mask(call: Call, name: str) -> None:
    field = {Arguments.fisher: "batch_a", Arguments.values: "batch"}.get(call, "batch_e")
    message = (
        rf"{field}\.{name} is torch\.int64 of shape \(4, 7\); pass bool of the shape of input_ids, .*: mask\.bool\(\)"
    )
    assert_rejected(call, message, ValueError, **{field: lambda g: g.e._replace(**{name: getattr(g.e, name).long()})})


def test_check_fields_rejects_float_ids() -> None:
    message = r"batch\.input_ids is torch\.float32 of shape \(4, 7\); pass int64 \(B, T\), a row for each rollout"
    assert_rejected(
        Arguments.values, message, ValueError, batch=lambda g: g.e._replace(input_ids=g.e.input_ids.float())
    )


def test_influence_names_swapped_batches() -> None:
    message = r"batch_u\.coefficients is None and batch_e has some; .*Swap the two batches"
    assert_rejected(Arguments.influence, message, ValueError, batch_u=lambda g: g.e, batch_e=lambda g: g.u)


NUMBERS: list[tuple[str, Any, type[Exception], str]] = [
    ("temperature", None, TypeError, r"temperature is None; expected a number\. Pass the positive one"),
    ("temperature", "1", TypeError, r"temperature is of type str; expected a number"),
    ("temperature", torch.tensor(1.0), TypeError, r"temperature is of type Tensor; .* by \.item\(\)"),
    ("temperature", True, TypeError, r"temperature is of type bool; expected a number"),
    ("temperature", math.inf, ValueError, r"temperature is inf; pass the positive one"),
    ("chunk_size", 2.0, TypeError, r"chunk_size is of type float; expected an integer\. .*None to choose by size"),
    ("memory_budget", -1, ValueError, r"memory_budget is -1; pass a number of bytes"),
    ("memory_budget", 1e9, TypeError, r"memory_budget is of type float; expected an integer\. Pass a number of bytes"),
    ("max_grad_norm", "1.0", TypeError, r"max_grad_norm is of type str; .* None where nothing is clipped"),
    ("max_grad_norm", -1.0, ValueError, r"max_grad_norm is -1\.0; pass a positive number, or None"),
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
            r"preconditioner is 'frozn'; use one of frozen, .* \(the nearest is 'frozen'\)",
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
            r"normalize is 'tokens'; use one of token, sequence \(the nearest is 'tok",
        ),
        (
            Arguments.decompose,
            "preconditioner",
            None,
            r"preconditioner is None; use one of frozen, jacobian, rmsprop, lifetime$",
        ),
        (Arguments.snis, "clip", -1.0, r"clip is -1\.0; pass a positive cumulative log-weight, or None"),
        (Arguments.snis, "eta", math.nan, r"eta is nan; pass a finite number"),
        (Arguments.influence, "tolerance", math.nan, r"tolerance is nan; pass a relative residual"),
    ],
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
    assert_rejected(call, message, **{field: wrong})


def test_snis_sweep_names_list_when_eta_is_scalar() -> None:
    arguments = shared_arguments()
    measure = arguments.sweep()
    block = {name: v.unsqueeze(0) for name, v in arguments.direction.items()}
    with pytest.raises(TypeError, match=r"etas is of type float; expected a list of numbers\. Pass \[eta\] for one"):
        measure(block, 0.1)


# --- Parameters of another model


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
        r"params\['model\.token\.weight'\] is not among .*the nearest is 'token\.weight'",
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


# --- Values that users prepare before a call


@pytest.mark.parametrize("wrong", [[1.0, -1.0], np.ones(2), 0.5, None])
def test_losses_reject_other_types_than_tensors(wrong: Any) -> None:
    mask, two = torch.ones(2, 3, dtype=torch.bool), torch.ones(2)
    kind = "None" if wrong is None else f"of type {type(wrong).__name__}"
    rest = rf" is {kind}; expected a tensor\. Make it one: torch\.as_tensor"
    with pytest.raises(TypeError, match="advantages" + rest):
        fx.coefficients("grpo", wrong, mask)
    with pytest.raises(TypeError, match="completion_mask" + rest):
        fx.coefficients("grpo", two, wrong)
    with pytest.raises(TypeError, match="rewards" + rest):
        fx.group_advantages(wrong, two)
    with pytest.raises(TypeError, match="group" + rest):
        fx.group_advantages(two, wrong)
    with pytest.raises(TypeError, match="old_logprobs" + rest):
        fx.clipped_ratio(torch.zeros(2, 3), wrong, two)
    with pytest.raises(TypeError, match="rewards" + rest):
        fx.expected_reward(wrong)
    with pytest.raises(TypeError, match="reference_logprobs" + rest):
        fx.kl_to_reference(wrong)


def test_coefficients_names_cast_of_integer_mask() -> None:
    with pytest.raises(ValueError, match=r"completion_mask is torch\.int64 of shape \(2, 3\); .*: mask\.bool\(\)"):
        fx.coefficients("grpo", torch.ones(2), torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"loss_type is 'dr-grpo'; .*the nearest is 'dr_grpo'"):
        fx.coefficients("dr-grpo", torch.ones(2), torch.ones(2, 3, dtype=torch.bool))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"max_completion_length is of type float; expected an integer"):
        fx.coefficients("dr_grpo", torch.ones(2), torch.ones(2, 3, dtype=torch.bool), max_completion_length=3.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_reject_nonfinite_values_where_they_count(bad: float) -> None:
    mask = torch.tensor([[False, True], [False, False]])
    with pytest.raises(ValueError, match=r"advantages\[0\] is .*drop those rollouts"):
        fx.coefficients("grpo", torch.tensor([bad, 1.0]), mask)
    with pytest.raises(ValueError, match=r"rewards\[1\] is .*drop those rollouts or repair their rewards"):
        fx.group_advantages(torch.tensor([1.0, bad]), torch.zeros(2))
    # A row without completion tokens is never read.
    assert fx.coefficients("grpo", torch.tensor([1.0, bad]), mask).tolist() == [[0.0, 0.5], [0.0, 0.0]]
    per_token = torch.tensor([[bad, 1.0], [bad, bad]])
    assert fx.coefficients("grpo", per_token, mask).tolist() == [[0.0, 0.5], [0.0, 0.0]]


def test_collate_rejects_other_types() -> None:
    one = fx.Rollout("0/0", "0", 0, "a", "b", (7,), (8, 1), True)
    with pytest.raises(TypeError, match=r"rollouts is of type Rollout; expected a list of them\. Pass \[rollout\]"):
        fx.collate(one, 0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"rollouts\[1\] is of type dict; expected a fx\.Rollout\. .*fx\.read_rollouts"):
        fx.collate([one, {"id": "1"}], 0)  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"pad_id is None; expected an integer\. Pass any token's id, such as 0"):
        fx.collate([one], None)  # type: ignore[arg-type]


def test_read_rollouts_rejects_other_types(tmp_path: Any) -> None:
    class Tokenizer:
        def decode(self) -> str:
            return ""

    with pytest.raises(TypeError, match=r"path is of type Tokenizer; expected a path\. Give the file first"):
        fx.read_rollouts(Tokenizer(), tmp_path)
    with pytest.raises(TypeError, match=r"tokenizer is of type str; .*AutoTokenizer\.from_pretrained"):
        fx.read_rollouts(tmp_path, "gpt2")


def test_adamw_state_and_make_functional_reject_other_types() -> None:
    arguments = shared_arguments()
    with pytest.raises(TypeError, match=r"model is of type AdamW; .*Swap the two: fx\.adamw_state\(optimizer, model\)"):
        fx.adamw_state(arguments.model, arguments.optimizer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model is of type dict; expected a torch\.nn\.Module"):
        fx.adamw_state(arguments.optimizer, arguments.params)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizer is of type dict; .*load_state_dict"):
        fx.adamw_state(arguments.optimizer.state_dict(), arguments.model)  # type: ignore[arg-type]
    for wrong in ("gpt2", arguments.params):
        with pytest.raises(TypeError, match=rf"model is of type {type(wrong).__name__}; expected a torch\.nn\.Module"):
            fx.make_functional(wrong)  # type: ignore[arg-type]

    class Trainer:
        model = arguments.model

    with pytest.raises(TypeError, match=r"model is of type Trainer; expected .*\. Pass trainer\.model"):
        fx.make_functional(Trainer())  # type: ignore[arg-type]


def test_select_rejects_other_types() -> None:
    out = shared_arguments().influence()
    with pytest.raises(TypeError, match=r"influence_reward is of type Tensor; expected an Influence"):
        fx.lab.select(out, out.per_sequence, floor=0.0)
    with pytest.raises(TypeError, match=r"floor is None; expected a number"):
        fx.lab.select(out, out, floor=None)


def test_entropy_estimate_rejects_other_types() -> None:
    arguments = shared_arguments()
    values = arguments.values()
    with pytest.raises(TypeError, match=r"values is of type Tensor; expected TokenValues\. Pass fx\.token_values"):
        fx.entropy_estimate(values.entropies, arguments.e)
    with pytest.raises(ValueError, match=r"normalize is 'batch'; use one of token, sequence"):
        fx.entropy_estimate(values, arguments.e, "batch")  # type: ignore[arg-type]


# --- Values that are never read


@pytest.mark.parametrize("options", [{}, {"matrix": True}, {"per_token": False}, {"memory_budget": 0}], ids=str)
def test_influence_ignores_coefficients_outside_completions(options: dict[str, Any]) -> None:
    arguments = shared_arguments()
    nonfinite = arguments.u._replace(
        coefficients=arguments.u.coefficients.masked_fill(~arguments.u.completion_mask, math.nan)
    )
    plain, out = arguments.influence(**options), arguments.influence(batch_u=nonfinite, **options)
    assert torch.equal(out.per_sequence, plain.per_sequence)
    assert torch.equal(out.total, plain.total)
    grads = [
        fx.per_sample_grads(fx.rollout_loss(arguments.policy), arguments.params, u) for u in (nonfinite, arguments.u)
    ]
    for name, g in grads[0].items():
        assert torch.equal(g, grads[1][name])


def test_coefficients_of_eval_batch_are_ignored() -> None:
    arguments = shared_arguments()
    nonfinite = arguments.e._replace(coefficients=torch.full((4, WIDTH), math.nan))
    assert torch.equal(arguments.influence(batch_e=nonfinite).per_sequence, arguments.influence().per_sequence)
    assert torch.equal(arguments.jvp(batch_e=nonfinite).first, arguments.jvp().first)
    kernel = arguments.fisher(preconditioner="identity", batch_a=nonfinite)
    assert torch.equal(kernel, arguments.fisher(preconditioner="identity"))


def test_fisher_kernel_checks_coefficients_when_adam() -> None:
    def nonfinite(arguments: Arguments) -> Batch:
        return arguments.u._replace(coefficients=torch.full((4, WIDTH), math.nan))

    assert_rejected(Arguments.fisher, r"batch_b\.coefficients is not finite in row 0", ValueError, batch_b=nonfinite)
    arguments = shared_arguments()
    assert arguments.fisher(preconditioner="identity", batch_b=nonfinite(arguments)).isfinite().all()
