"""Per-sample gradients of any loss by ``vmap(grad)``, and the loss of one rollout."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vmap

from fx_influence.autodiff.token_values import surrogate, token_values
from fx_influence.batching.rows import select_rows
from fx_influence.core.batch_checks import check_is_batch
from fx_influence.core.checks import check_function, check_options
from fx_influence.core.parameter_checks import check_apply, check_params
from fx_influence.core.tree import promote
from fx_influence.types import Apply, Batch, Params

FieldsLoss = Callable[[Params, tuple[Tensor, ...]], Tensor]
"""Loss of one row as a function of the parameters and of the fields that the batch has."""


def per_sample_grads(
    loss_fn: Callable[[Params, Batch], Tensor], params: Params, batch: Batch, chunk_size: int | None = None
) -> Params:
    """Return the gradient of ``loss_fn`` for every row of ``batch``: ``vmap(grad(loss_fn))`` over rows.

    Args:
        loss_fn: ``loss_fn(params, row)`` returns a scalar for an unbatched row, a ``Batch`` of (T,) tensors.
        params: parameters by name. Those in half precision are raised to float32 for the loss, unless it refuses them,
            which a ``UserWarning`` tells.
        batch: (B, T).
        chunk_size: rows per vmap (None: all of them); bounds the memory of activations and changes nothing else. With 1
            there is no vmap: rows go one by one in plain reverse mode, at a pass per row. That also takes losses which
            depend on values in Python, write in place or have no batching rule; it is never chosen automatically.

    Returns:
        (B, ...) per parameter, float64 for float64 parameters, else float32; zeros where the loss does not reach it.

    Raises:
        RuntimeError: where vmap cannot take ``loss_fn``, and where it draws random numbers (dropout left on), since
            per-sample gradients would not add up to the batch's.

    Example:
        >>> import torch
        >>> ids = torch.tensor([[1, 2], [2, 3]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True], [False, True]]))
        >>> loss = lambda params, row: params["w"] * row.input_ids.sum()
        >>> per_sample_grads(loss, {"w": torch.tensor(1.0)}, batch)["w"].tolist()
        [3.0, 5.0]

    Source: https://pytorch.org/functorch/stable/notebooks/per_sample_grads.html
    """
    check_function("loss_fn", loss_fn, "Pass fx.rollout_loss(apply), or a function of (params, row)")
    check_params(params)
    check_is_batch("batch", batch)
    check_options(1.0, chunk_size)
    present = [name for name, field in zip(batch._fields, batch, strict=True) if field is not None]

    def fields_loss(params: Params, fields: tuple[Tensor, ...]) -> Tensor:
        # vmap refuses None among its inputs, so absent fields are put back inside.
        by_name = dict(zip(present, fields, strict=True))
        return loss_fn(params, Batch._make(by_name.get(name) for name in Batch._fields))

    fields = tuple(getattr(batch, name) for name in present)
    per_row = _looped if chunk_size == 1 else _vmapped
    frozen = {name: p.detach() for name, p in params.items()}
    raised = {name: p.to(promote(p.dtype)) for name, p in frozen.items()}
    half = [p.dtype for name, p in frozen.items() if p.dtype != raised[name].dtype]
    try:
        return per_row(fields_loss, raised, fields, chunk_size)
    except RuntimeError as error:
        if not half:
            raise
        grads = per_row(fields_loss, frozen, fields, chunk_size)
        warnings.warn(
            f"params are {half[0]} and loss_fn takes them in no other precision ({str(error).splitlines()[0]}), so the "
            "gradients are rounded to it; expected a loss in any precision. Let loss_fn cast its own tensors to the "
            "parameters' dtype",
            stacklevel=2,
        )
        return {name: g.to(promote(g.dtype)) for name, g in grads.items()}


def _vmapped(fields_loss: FieldsLoss, params: Params, fields: tuple[Tensor, ...], chunk_size: int | None) -> Params:
    """Return the gradient of every row, (B, ...) by name, from one batched pass per chunk."""
    try:
        return vmap(grad(fields_loss), in_dims=(None, 0), chunk_size=chunk_size)(params, fields)
    except RuntimeError as error:
        raise RuntimeError(
            f"loss_fn fails under torch.func.vmap(grad) ({str(error).splitlines()[0]}); expected a loss that neither "
            "draws random numbers (switch dropout off) nor depends on values in Python nor writes in place. Pass "
            "chunk_size=1 for the latter two: rows then go one by one, without vmap"
        ) from error


def _looped(fields_loss: FieldsLoss, params: Params, fields: tuple[Tensor, ...], chunk_size: int | None) -> Params:
    """Return the gradient of every row, (B, ...) by name, from one reverse pass per row."""
    count = len(fields[0])
    out = {name: p.new_zeros(count, *p.shape) for name, p in params.items()}
    for i in range(count):
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        before = _random_state(fields[0].device)
        with torch.enable_grad():
            loss = fields_loss(leaves, tuple(field[i] for field in fields))
        if not torch.equal(_random_state(fields[0].device), before):
            raise RuntimeError(
                "loss_fn draws random numbers; expected the same loss whenever it is called, or per-sample gradients "
                "do not add up to the batch's. Switch dropout off"
            )
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for name, g in zip(leaves, grads, strict=True):
                if g is not None:
                    out[name][i] = g.to_dense()
    return out


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def can_vmap_rows(loss_fn: Callable[[Params, Batch], Tensor], params: Params, batch: Batch) -> bool:
    """Return whether ``torch.func.vmap`` takes rows through ``loss_fn``'s gradient, tried on two.

    It is False too where an operation has no batching rule, so that torch would loop over rows with a warning.

    Args:
        loss_fn: loss of one row, see ``per_sample_grads``.
        params: parameters by name.
        batch: (B, T); its first and last rows are tried.
    """
    two = select_rows(batch, torch.tensor([0, len(batch.input_ids) - 1], device=batch.input_ids.device))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop")
        try:
            per_sample_grads(loss_fn, params, two)
        # A model may raise anything, its own exceptions too, where vmap hides values or shapes.
        except Exception:
            return False
    return True


def rollout_loss(apply: Apply, temperature: float = 1.0) -> Callable[[Params, Batch], Tensor]:
    """Return the loss of one rollout for ``per_sample_grads``: l_i = -sum_t (c_it log pi(y_it) + b_it h_it).

    The batch's loss is the sum over rows, so the per-sample gradients add up to its gradient.

    Args:
        apply: policy, see ``make_functional``.
        temperature: divisor of the logits.

    Example:
        >>> import torch
        >>> ids = torch.tensor([[1, 2]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True]]), coefficients=torch.tensor([[0.0, 1.0]]))
        >>> apply = lambda params, ids, mask: params["b"].expand(*ids.shape, 4)
        >>> per_sample_grads(rollout_loss(apply), {"b": torch.zeros(4)}, batch)["b"].tolist()
        [[0.25, 0.25, -0.75, 0.25]]
    """
    check_apply(apply)
    check_options(temperature, None)

    def loss(params: Params, row: Batch) -> Tensor:
        batch = Batch._make(None if field is None else field.unsqueeze(0) for field in row)
        return surrogate(token_values(params, batch, apply, temperature), batch)

    return loss
