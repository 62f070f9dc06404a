"""Gradients of the rollout losses of a batch's rows, from layer IO where a parameter has it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fx_influence.autodiff.layer_io.collect import collect_layer_io
from fx_influence.autodiff.layer_io.row_gradients import row_gradients
from fx_influence.autodiff.layer_io.support import supported_names
from fx_influence.autodiff.per_sample import can_vmap_rows, per_sample_grads, rollout_loss
from fx_influence.batching.microbatch import MicroBatch, micro_batches
from fx_influence.batching.rows import select_rows
from fx_influence.core.tree import promote
from fx_influence.policy.split import split_policy
from fx_influence.types import Apply, Batch, Params

Rows = Callable[[str, slice, Tensor], None]
"""``rows(name, part, out)`` writes every row's gradient of entries of a parameter's first axis to ``out``, (B, n)."""


def rollout_gradients(params: Params, batch: Batch, apply: Apply, temperature: float = 1.0) -> Params:
    """The gradient of every row's rollout loss, (B, ...) by name, at least float32; see ``grads.rollout_loss``.

    What ``per_sample_grads(rollout_loss(apply, temperature), params, batch)`` gives, from factors where there are some.

    Example:
        >>> ids = torch.tensor([[1, 2]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True]]), coefficients=torch.tensor([[0.0, 1.0]]))
        >>> apply = lambda params, ids, mask: params["b"].expand(*ids.shape, 4)
        >>> rollout_gradients({"b": torch.zeros(4)}, batch, apply)["b"].tolist()
        [[0.25, 0.25, -0.75, 0.25]]
    """
    params = {name: p.detach() for name, p in params.items()}
    factored = supported_names(params, batch, apply)
    others = {name: p for name, p in params.items() if name not in factored}
    [part] = micro_batches(batch, len(batch.input_ids), split_policy(apply).left_alignable)
    vmapped = _vmapped(params, batch, others, apply, temperature)
    rows_of = _rows(params, batch, part, factored, others, apply, temperature, vmapped)
    back = part.row_index.argsort()
    found = {}
    for name, p in params.items():
        out = p.new_empty(len(back), p.numel(), dtype=promote(p.dtype))
        rows_of(name, slice(0, _length(p)), out)
        found[name] = out[back].reshape(-1, *p.shape)
    return found


def _rows(
    params: Params,
    batch: Batch,
    part: MicroBatch,
    factored: frozenset[str],
    others: Params,
    apply: Apply,
    temperature: float,
    vmapped: bool,
) -> Rows:
    count = len(part.row_index)
    factors = collect_layer_io(params, batch, part, apply, factored, temperature)[0] if factored else {}
    loss, chunk_size = _loss(params, apply, temperature), None if vmapped else 1
    rest = per_sample_grads(loss, others, select_rows(batch, part.row_index), chunk_size) if others else {}

    def rows_of(name: str, part: slice, out: Tensor) -> None:
        p = params[name]
        if name in rest:
            out.copy_(rest[name].reshape(count, _length(p), -1)[:, part].flatten(1))
        else:
            row_gradients(factors, name, p, part, count, out.view(count, *p[part].shape))

    return rows_of


def _loss(params: Params, apply: Apply, temperature: float) -> Callable[[Params, Batch], Tensor]:
    return rollout_loss(lambda p, ids, mask: apply({**params, **p}, ids, mask), temperature)


def _vmapped(params: Params, batch: Batch, others: Params, apply: Apply, temperature: float) -> bool:
    """Whether rows go through ``vmap`` for the parameters that have no factors."""
    return not others or can_vmap_rows(_loss(params, apply, temperature), others, batch)


def _length(p: Tensor) -> int:
    return len(p) if p.dim() else 1
