"""Valid arguments of the mathematics, and the assertion that a change of them is refused before any forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_influence as fx
from fx_influence.types import Batch, Params
from helpers.cases import TinyPolicy, random_adamw_state, random_batch

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


def with_entry(field: str, index: tuple[int | slice, ...], value: Any) -> Callable[[Batch], Batch]:
    def change(batch: Batch) -> Batch:
        tensor = getattr(batch, field).clone()
        tensor[index] = value
        return batch._replace(**{field: tensor})

    return change


def with_fields(**fields: Any) -> Callable[[Batch], Batch]:
    return lambda batch: batch._replace(**fields)
