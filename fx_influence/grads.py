"""Per-sample gradients in one batched pass, and the inner products of two batches' gradients under a memory budget."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vmap

from fx_influence.logprobs import TOKENS_PER_CHUNK, row_chunks, surrogate, token_values
from fx_influence.tree import promote
from fx_influence.types import Apply, Batch, Params

MEMORY_BUDGET = 2**30
"""Bytes of per-sequence gradients that ``gradient_kernel`` holds at once where the caller names none."""


def per_sample_grads(
    loss_fn: Callable[[Params, Batch], Tensor], params: Params, batch: Batch, chunk_size: int | None = None
) -> Params:
    """The gradient of ``loss_fn`` for every row of ``batch``: ``vmap(grad(loss_fn))`` over rows.

    ``loss_fn(params, row)`` gives a scalar from an unbatched row, a ``Batch`` of (T,) tensors. ``chunk_size`` rows go
    through one vmap (None: all of them); it bounds the memory of activations and changes nothing else. Returns (B, ...)
    per parameter in the parameter's dtype; zeros where the loss does not reach it.

    Raises torch's ``RuntimeError`` where ``loss_fn`` draws random numbers (dropout left on), whose per-sample gradients
    would not add up to the batch's. Source: https://pytorch.org/functorch/stable/notebooks/per_sample_grads.html

    Example:
        >>> ids = torch.tensor([[1, 2], [2, 3]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True], [False, True]]))
        >>> loss = lambda params, row: params["w"] * row.input_ids.sum()
        >>> per_sample_grads(loss, {"w": torch.tensor(1.0)}, batch)["w"].tolist()
        [3.0, 5.0]
    """
    present = [name for name, field in zip(batch._fields, batch, strict=True) if field is not None]

    def loss_of(params: Params, fields: tuple[Tensor, ...]) -> Tensor:
        # vmap refuses None among its inputs, so the fields that are absent are put back inside.
        given = dict(zip(present, fields, strict=True))
        return loss_fn(params, Batch._make(given.get(name) for name in Batch._fields))

    fields = tuple(getattr(batch, name) for name in present)
    frozen = {name: p.detach() for name, p in params.items()}
    return vmap(grad(loss_of), in_dims=(None, 0), chunk_size=chunk_size)(frozen, fields)


def rollout_loss(apply: Apply, temperature: float = 1.0) -> Callable[[Params, Batch], Tensor]:
    """The loss of one rollout for ``per_sample_grads``: l_i = -sum_t (c_it log pi(y_it) + b_it h_it).

    The batch's loss is their sum, so the per-sample gradients add up to its gradient.

    Example:
        >>> ids = torch.tensor([[1, 2]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True]]), coefficients=torch.tensor([[0.0, 1.0]]))
        >>> apply = lambda params, ids, mask: params["b"].expand(*ids.shape, 4)
        >>> per_sample_grads(rollout_loss(apply), {"b": torch.zeros(4)}, batch)["b"].tolist()
        [[0.25, 0.25, -0.75, 0.25]]
    """

    def loss(params: Params, row: Batch) -> Tensor:
        one = Batch._make(None if field is None else field.unsqueeze(0) for field in row)
        return surrogate(token_values(params, one, apply, temperature), one)

    return loss


def gradient_kernel(
    params: Params,
    batch_a: Batch,
    batch_b: Batch,
    diagonal: Params,
    apply: Apply,
    temperature: float = 1.0,
    memory_budget: int = MEMORY_BUDGET,
    chunk_size: int | None = None,
) -> Tensor:
    """K_ai = <g_a, D g_i> for the rollout losses of two batches, D diagonal; (n_a, n_b), at least float32.

    Per-sequence gradients are made in blocks: those of ``batch_b`` take up to half of ``memory_budget`` bytes at a
    time and those of ``batch_a`` pass by them in blocks of the other half. Sums over parameters are in float64.
    """
    loss = rollout_loss(apply, temperature)
    names = [name for name in params if name in diagonal]
    first = next(iter(params.values()))
    if not names:
        return first.new_zeros(len(batch_a.input_ids), len(batch_b.input_ids), dtype=promote(first.dtype))
    per_row = sum(params[name].numel() * promote(params[name].dtype).itemsize for name in params)
    block = max(1, memory_budget // 2 // max(per_row, 1))
    vmapped = chunk_size or max(1, TOKENS_PER_CHUNK // batch_a.input_ids.shape[1])
    columns = []
    for part_b in row_chunks(batch_b, block):
        right = per_sample_grads(loss, params, part_b, vmapped)
        weighted = {name: diagonal[name] * right.pop(name) for name in names}
        column = []
        for part_a in row_chunks(batch_a, block):
            left = per_sample_grads(loss, params, part_a, vmapped)
            column.append(_inner(left, weighted, names))
        columns.append(torch.cat(column))
    return torch.cat(columns, dim=1).to(promote(first.dtype))


def _inner(left: Params, right: Params, names: list[str]) -> Tensor:
    total = None
    for name in names:
        part = (left[name].to(right[name].dtype).flatten(1) @ right[name].flatten(1).T).double()
        total = part if total is None else total + part
    assert total is not None
    return total
