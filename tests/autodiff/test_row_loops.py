"""Models that vmap cannot take: the same per-row gradients and finite steps by a loop, or an error with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cases import random_adamw_state, random_batch, random_direction
from torch import Tensor
from torch.nn import functional as F

import fx_influence as fx
from fx_influence.autodiff.directional import curvature
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.autodiff.gram import gradient_gram
from fx_influence.autodiff.per_sample import can_vmap_rows
from fx_influence.autodiff.perturbed_values import can_vmap_directions
from fx_influence.autodiff.rollout_gradients import rollout_gradients
from fx_influence.core.tree import dot
from fx_influence.types import Apply, Batch, Params

VOCAB, WIDTH = 7, 4
BOUND = 2**10 * torch.finfo(torch.float64).eps
"""Relative to the largest value: float64 rounds each of fewer than 2**8 terms, with a margin for their signs."""


def value_dependent(p: Params, x: Tensor) -> Tensor:
    return x @ p["w"] if bool((x.sum() > 1e9).item()) else x @ p["w"].T


def data_dependent_shape(p: Params, x: Tensor) -> Tensor:
    flat = x.reshape(-1, WIDTH)
    large = (flat[:, 0] > 0).nonzero()[:, 0]
    return (flat @ p["w"].T).index_add(0, large, flat[large] @ p["v"]).view(x.shape)


def in_place_write(p: Params, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=x.dtype)
    for k in range(x.shape[1]):
        out[:, k] += x[:, k] @ p["w"].T
    return out


def no_batching_rule(p: Params, x: Tensor) -> Tensor:
    return x + torch.stack([torch.pdist(row + row @ p["w"]).mean() for row in x])[:, None, None]


MODELS: dict[str, Callable[[Params, Tensor], Tensor]] = {
    "value_dependent": value_dependent,
    "data_dependent_shape": data_dependent_shape,
    "in_place_write": in_place_write,
    "no_batching_rule": no_batching_rule,
}


def policy(name: str) -> Apply:
    """Return a policy with one of ``MODELS`` between embedding and head."""

    def apply(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = F.embedding(input_ids, params["embed"])
        return F.linear(torch.tanh(x + MODELS[name](params, x)), params["embed"])

    return apply


def plain(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    x = F.embedding(input_ids, params["embed"])
    return F.linear(torch.tanh(x + x @ params["w"].T), params["embed"])


def problem(rows: int = 4) -> tuple[Params, Batch]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"embed": (VOCAB, WIDTH), "w": (WIDTH, WIDTH), "v": (WIDTH, WIDTH)}
    params = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return params, random_batch(generator, rows, 6, VOCAB, groups=2)


def looped(apply: Apply, params: Params, batch: Batch) -> Params:
    """Return the gradient of every row by one reverse pass per row."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    by_row = []
    for i in range(len(batch.input_ids)):
        loss = fx.rollout_loss(apply)(leaves, Batch._make(None if field is None else field[i] for field in batch))
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        by_row.append(dict(zip(leaves, grads, strict=True)))
    return {name: torch.stack([g[name] for g in by_row]) for name in params}


@pytest.mark.parametrize("model", MODELS)
def test_gradient_gram_loops_when_vmap_fails(model: str) -> None:
    params, batch = problem()
    apply, ones = policy(model), {name: torch.ones_like(p) for name, p in params.items()}
    assert not can_vmap_rows(fx.rollout_loss(apply), params, batch)
    expected = looped(apply, params, batch)
    stacked = torch.cat([g.flatten(1) for g in expected.values()], 1)
    bound = BOUND * float(stacked.square().sum(1).max())
    for chunk_size in (None, 3):
        gram = gradient_gram(params, batch, batch, ones, apply, chunk_size=chunk_size)
        torch.testing.assert_close(gram, stacked @ stacked.T, rtol=0, atol=bound)
    for name, g in rollout_gradients(params, batch, apply).items():
        torch.testing.assert_close(g, expected[name], rtol=0, atol=BOUND * float(stacked.abs().max()))
    assert expected["w"].abs().max() > 1e-3


@pytest.mark.parametrize("model", ["value_dependent", "data_dependent_shape"])
@pytest.mark.parametrize("options", [{"matrix": True}, {"per_token": False}, {}])
def test_influence_is_equal_when_vmap_fails(model: str, options: dict[str, Any]) -> None:
    params, batch = problem(6)
    state = random_adamw_state(torch.Generator().manual_seed(1), params)
    on: dict[str, Any] = {"apply": policy(model)}
    out, by_jvp = (
        fx.influence(params, batch, batch, state, **on, **selected) for selected in (options, {"stderr": False})
    )
    scale = float(by_jvp.per_sequence.abs().sum())
    torch.testing.assert_close(out.per_sequence, by_jvp.per_sequence, rtol=0, atol=BOUND * scale)
    assert scale > 0
    if out.matrix is not None:
        torch.testing.assert_close(out.matrix.sum(0), by_jvp.per_sequence, rtol=0, atol=BOUND * scale)


@pytest.mark.parametrize("model", MODELS)
def test_snis_sweep_loops_when_vmap_fails(model: str) -> None:
    params, batch = problem()
    apply, generator = policy(model), torch.Generator().manual_seed(4)
    block = [random_direction(generator, params) for _ in range(3)]
    assert not can_vmap_directions(params, batch, apply)
    measure = fx.snis_sweep(params, batch, apply=apply)
    stacked = {name: torch.stack([v[name] for v in block]) for name in params}
    swept = measure(stacked, [0.0, 0.3]).delta_h
    assert torch.equal(swept[0], torch.zeros(3, dtype=torch.float64))
    for k, v in enumerate(block):
        single = fx.snis_delta(params, v, 0.3, batch, apply=apply).delta_h
        torch.testing.assert_close(single, swept[1, k], rtol=0, atol=BOUND)
        assert single.abs() > 1e-4


def test_snis_delta_takes_no_vmap() -> None:
    seen = []

    def apply(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen.append(torch._C._functorch.peek_interpreter_stack() is None)
        return plain(params, input_ids, attention_mask)

    params, batch = problem()
    v = random_direction(torch.Generator().manual_seed(4), params)
    assert can_vmap_directions(params, batch, plain)
    fx.snis_delta(params, v, 0.1, batch, apply=apply)
    assert seen
    assert all(seen)
    assert fx.snis_delta(params, v, 0.0, batch, apply=plain).delta_h == 0


@pytest.mark.parametrize("model", ["value_dependent", "data_dependent_shape", "in_place_write"])
def test_per_sample_grads_names_the_remedy_when_vmap_fails(model: str) -> None:
    params, batch = problem()
    loss = fx.rollout_loss(policy(model))
    with pytest.raises(RuntimeError, match=r"loss_fn fails under torch.func.vmap.* Pass chunk_size=1"):
        fx.per_sample_grads(loss, params, batch)
    grads, expected = fx.per_sample_grads(loss, params, batch, chunk_size=1), looped(policy(model), params, batch)
    for name, g in expected.items():
        assert torch.equal(grads[name], g)


def test_per_sample_grads_are_0_for_a_loss_of_no_parameter() -> None:
    params, batch = problem()
    grads = fx.per_sample_grads(lambda p, row: row.input_ids.double().sum(), params, batch, chunk_size=1)
    assert all(torch.equal(g, torch.zeros_like(g)) and len(g) == 4 for g in grads.values())


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_per_sample_grads_refuses_random_losses(chunk_size: int | None) -> None:
    params, batch = problem()

    def apply(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return F.dropout(plain(params, input_ids, attention_mask), 0.5)

    with pytest.raises(RuntimeError, match="random"):
        fx.per_sample_grads(fx.rollout_loss(apply), params, batch, chunk_size)
    with pytest.raises(RuntimeError, match="random"):
        gradient_gram(params, batch, batch, params, apply)


def test_failed_passes_leave_no_modes_or_transforms() -> None:
    """The failure is inside the model, in forward mode, under vmap and in reverse mode."""
    params, batch = problem()
    state = random_adamw_state(torch.Generator().manual_seed(1), params)
    fail = [False]

    def apply(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = plain(params, input_ids, attention_mask)
        if fail[0]:
            raise ArithmeticError("inside the model")
        return logits

    v = random_direction(torch.Generator().manual_seed(4), params)
    calls: list[Callable[[], Tensor]] = [
        lambda: fx.influence(params, batch, batch, state, apply=apply).per_sequence,
        lambda: fx.jvp_delta(params, v, batch, apply=apply).first,
        lambda: fx.fisher_kernel(params, batch, batch, None, apply=apply, preconditioner="identity"),
        lambda: fx.snis_delta(params, v, 0.1, batch, apply=apply).delta_h,
    ]
    before = [call() for call in calls]
    for call in calls:
        fail[0] = True
        with pytest.raises(ArithmeticError, match="inside the model"):
            call()
        fail[0] = False
        assert torch._C._functorch.peek_interpreter_stack() is None
        assert torch.overrides._get_current_function_mode_stack() == []
        for again, value in zip(calls, before, strict=True):
            assert torch.equal(again(), value)


@pytest.mark.parametrize("model", ["value_dependent", "data_dependent_shape", "in_place_write"])
def test_curvature_matches_central_differences(model: str) -> None:
    """Against the central difference of the first, whose error is of order step^2."""
    params, batch = problem()
    v = random_direction(torch.Generator().manual_seed(4), params, 1.0)
    apply, step = policy(model), 1e-4
    grads = fx.jvp_delta(params, v, batch, apply=apply)
    weighted = batch._replace(entropy_coefficients=batch.completion_mask.double())

    def first_derivative(eta: float) -> Tensor:
        moved = {name: p + eta * v[name] for name, p in params.items()}
        return -dot(batch_gradient(moved, weighted, apply), v)

    expected = (first_derivative(step) - first_derivative(-step)) / (2 * step)
    second_derivative = curvature(params, v, weighted, apply)
    torch.testing.assert_close(second_derivative, expected, rtol=step, atol=0)
    assert grads.second.isfinite()
    zero = curvature(params, {name: torch.zeros_like(p) for name, p in params.items()}, weighted, apply)
    assert zero == 0
