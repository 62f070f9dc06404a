"""Valid arguments of every function of the mathematics, and the check that others are rejected."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fx_influence as fx
from helpers.cases import TinyPolicy, random_batch, random_direction

WIDTH, VOCAB = 7, 5


class CallCounter:
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
        self.policy, self.apply = policy, CallCounter(policy)
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
