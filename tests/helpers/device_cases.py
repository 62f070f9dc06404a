"""Calls of the public functions on small cases, on the CPU or on the simulated device, for a process of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import fx_influence as fx
from fx_influence.types import AdamWState, Apply, Batch, Params
from helpers.cases import TinyPolicy, random_adamw_state, random_batch
from helpers.simulated_device import DEVICE_TYPE, MixedDevices, Transfer, count_transfers, to_device

VOCAB, WIDTH, ROWS_U, ROWS_E = 11, 9, 10, 8


class Case(NamedTuple):
    """The arguments of the calls; ``direction`` also serves as a trainer's gradient."""

    model: nn.Module
    apply: Apply
    params: Params
    batch_u: Batch
    batch_e: Batch
    state: AdamWState
    direction: Params


class Outcome(NamedTuple):
    """Arrays of a result by path; the devices that its tensors were on; the transfers that made them."""

    results: dict[str, np.ndarray]
    devices: set[str]
    transfers: list[Transfer]


@cache
def make_case(device: str, family: str) -> Case:
    """Return the case with the same numbers on every device.

    ``family``: "plain" for a module in float64, or one of ``hf_models`` in float32.
    """
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float64
    if family == "plain":
        model: nn.Module = TinyPolicy(VOCAB)
    else:
        from helpers.hf_models import make_model

        # Moving a module to tensors of a subclass makes new parameters, so that tied ones would no longer be.
        model, dtype = make_model(family, tied=False), torch.float32
    named = {name: p.detach() for name, p in model.named_parameters()}
    batch_u = random_batch(generator, ROWS_U, WIDTH, VOCAB, groups=5, entropy_coefficients=True)
    batch_e = random_batch(generator, ROWS_E, WIDTH, VOCAB, groups=5, coefficients=False)
    state = random_adamw_state(generator, named)
    direction = {
        name: 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, p in named.items()
    }
    if device == DEVICE_TYPE:
        model.to(device)
        batch_u, batch_e, state, direction = map(to_device, (batch_u, batch_e, state, direction))
    apply, params = fx.make_functional(model)
    return Case(model, apply, params, batch_u, batch_e, state, direction)


def influence(case: Case, chunk_size: int | None, **options: Any) -> Any:
    batch_e = options.pop("batch_e", case.batch_e)
    return fx.influence(
        case.params, case.batch_u, batch_e, case.state, apply=case.apply, chunk_size=chunk_size, **options
    )


def influence_with_grad(case: Case, chunk_size: int | None) -> Any:
    return influence(case, chunk_size, grad=case.direction)


def influence_with_labels(case: Case, chunk_size: int | None) -> Any:
    labels = (case.batch_u.input_ids > 3).long()
    out = influence(case, chunk_size, labels=labels)
    return out, out.sums(labels), out.sums(case.batch_u.group)


def snis_delta(case: Case, chunk_size: int | None) -> Any:
    return fx.snis_delta(case.params, case.direction, 0.1, case.batch_e, apply=case.apply, chunk_size=chunk_size)


def snis_sweep(case: Case, chunk_size: int | None) -> Any:
    measure = fx.snis_sweep(case.params, case.batch_e, apply=case.apply, chunk_size=chunk_size)
    return measure({name: torch.stack([v, -2 * v]) for name, v in case.direction.items()}, [0.1, 0.2])


def jvp_delta(case: Case, chunk_size: int | None) -> Any:
    return fx.jvp_delta(case.params, case.direction, case.batch_e, apply=case.apply, chunk_size=chunk_size)


def fisher_kernel(case: Case, chunk_size: int | None) -> Any:
    return fx.fisher_kernel(
        case.params, case.batch_u, case.batch_e, case.state, apply=case.apply, chunk_size=chunk_size
    )


def check_derivatives(case: Case, chunk_size: int | None) -> Any:
    check = fx.check_derivatives(case.params, case.batch_e, apply=case.apply, chunk_size=chunk_size)
    # Its figures are roundings, divided by small steps, so they are compared with their bounds alone.
    assert check.conclusive
    return ()


def token_values(case: Case, chunk_size: int | None) -> Any:
    return fx.token_values(case.params, case.batch_e, case.apply)


def per_sample_grads(case: Case, chunk_size: int | None) -> Any:
    return fx.per_sample_grads(fx.rollout_loss(case.apply), case.params, case.batch_u, chunk_size=chunk_size)


def adamw_decompose(case: Case, chunk_size: int | None) -> Any:
    return fx.adamw_decompose(case.direction, case.state, case.params, max_grad_norm=0.5)


def coefficients(case: Case, chunk_size: int | None) -> Any:
    advantages, mask = case.batch_u.coefficients, case.batch_u.completion_mask
    assert advantages is not None
    return [fx.coefficients(kind, advantages[:, -1], mask, group=case.batch_u.group) for kind in ("grpo", "prompt_max")]


def collate(case: Case, chunk_size: int | None) -> Any:
    from fx_influence.interop.rollouts.batch import collate as collate_rollouts
    from helpers.made_rollouts import PAD, rollout

    rollouts = [rollout(completion_ids=(3,) * n, behaviour_logprobs=None, coefficients=(0.5,) * n) for n in (1, 3)]
    return collate_rollouts(rollouts, PAD, case.batch_u.input_ids.device)


CALLS: Mapping[str, Callable[[Case, int | None], Any]] = {
    "influence": influence,
    "influence, no stderr": partial(influence, stderr=False),
    "influence, per_token=False": partial(influence, per_token=False),
    "influence, matrix": partial(influence, matrix=True),
    "influence, matrix, per_token=False": partial(influence, matrix=True, per_token=False),
    "influence, cross-fitted": partial(influence, batch_e=None),
    "influence, grad": influence_with_grad,
    "influence, labels": influence_with_labels,
    "influence, memory_budget=0": partial(influence, memory_budget=0),
    "influence, bfloat16 directions": partial(influence, direction_dtype=torch.bfloat16),
    "snis_delta": snis_delta,
    "snis_sweep": snis_sweep,
    "jvp_delta": jvp_delta,
    "fisher_kernel": fisher_kernel,
    "check_derivatives": check_derivatives,
    "token_values": token_values,
    "per_sample_grads": per_sample_grads,
    "adamw_decompose": adamw_decompose,
    "coefficients": coefficients,
    "collate": collate,
}


def compute(name: str, device: str, family: str = "plain", chunk_size: int | None = None) -> Outcome:
    """Return what a call of ``CALLS`` returns, and the transfers of that call without those of its arguments."""
    torch.set_num_threads(1)
    case = make_case(device, family)
    with count_transfers() as transfers:
        out = CALLS[name](case, chunk_size)
    tensors = flatten(out)
    return Outcome(
        {path: x.detach().cpu().double().numpy() for path, x in tensors.items()},
        {x.device.type for x in tensors.values()},
        transfers,
    )


def self_check() -> tuple[str, list[Transfer]]:
    """Return the message of an operation on two devices, and the transfers of one read by every way there is."""
    x = torch.arange(3.0, device=DEVICE_TYPE)
    try:
        x + torch.ones(3)
    except MixedDevices as error:
        message = str(error)
    with count_transfers() as transfers:
        x.sum().item(), bool(x.sum() > 0), x.tolist(), x.cpu(), x.nonzero(), x[x > 0], torch.equal(x, x)
        torch.tensor([1.0], device=DEVICE_TYPE)
        x * 2.0 + torch.tensor(3.0)
    return message, transfers


def flatten(x: Any, path: str = "") -> dict[str, Tensor]:
    """Return the tensors inside a result by path."""
    if isinstance(x, Tensor):
        return {path: x}
    items: Any = {}
    if isinstance(x, dict):
        items = x
    elif is_dataclass(x):
        items = {field.name: getattr(x, field.name) for field in fields(x)}
    elif isinstance(x, list | tuple):
        items = x._asdict() if hasattr(x, "_asdict") else dict(enumerate(x))
    return {name: y for key, value in items.items() for name, y in flatten(value, f"{path}.{key}").items()}
