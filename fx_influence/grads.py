"""Per-sample gradients of any loss in one batched pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import Tensor
from torch.func import grad, vmap

from fx_influence.logprobs import surrogate, token_values
from fx_influence.tree import promote
from fx_influence.types import Apply, Batch, Params


def per_sample_grads(
    loss_fn: Callable[[Params, Batch], Tensor], params: Params, batch: Batch, chunk_size: int | None = None
) -> Params:
    """The gradient of ``loss_fn`` for every row of ``batch``: ``vmap(grad(loss_fn))`` over rows.

    ``loss_fn(params, row)`` gives a scalar from an unbatched row, a ``Batch`` of (T,) tensors. ``chunk_size`` rows go
    through one vmap (None: all of them); it bounds the memory of activations and changes nothing else. Returns (B, ...)
    per parameter, float64 for float64 parameters, else float32; zeros where the loss does not reach it. Parameters in
    half precision are raised to float32 for the loss, unless it refuses them, with a ``UserWarning``.

    Raises torch's ``RuntimeError`` where ``loss_fn`` draws random numbers (dropout left on), whose per-sample gradients
    would not add up to the batch's. Source: https://pytorch.org/functorch/stable/notebooks/per_sample_grads.html

    Example:
        >>> import torch
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
    per_row = vmap(grad(loss_of), in_dims=(None, 0), chunk_size=chunk_size)
    frozen = {name: p.detach() for name, p in params.items()}
    raised = {name: p.to(promote(p.dtype)) for name, p in frozen.items()}
    half = [p.dtype for name, p in frozen.items() if p.dtype != raised[name].dtype]
    try:
        return per_row(raised, fields)
    except RuntimeError as error:
        if not half:
            raise
        found = per_row(frozen, fields)
        warnings.warn(
            f"params are {half[0]} and loss_fn takes them in no other precision ({str(error).splitlines()[0]}), so the "
            "gradients are rounded to it; let loss_fn cast what it holds itself to the parameters' dtype",
            stacklevel=2,
        )
        return {name: g.to(promote(g.dtype)) for name, g in found.items()}


def rollout_loss(apply: Apply, temperature: float = 1.0) -> Callable[[Params, Batch], Tensor]:
    """The loss of one rollout for ``per_sample_grads``: l_i = -sum_t (c_it log pi(y_it) + b_it h_it).

    The batch's loss is their sum, so the per-sample gradients add up to its gradient.

    Example:
        >>> import torch
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
