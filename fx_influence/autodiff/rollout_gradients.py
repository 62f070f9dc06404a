"""Gradients of the rollout losses of a batch's rows: from layer IO where a parameter has it, else by ``vmap(grad)``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

from fx_influence.autodiff.layer_io.collect import collect_layer_io
from fx_influence.autodiff.layer_io.row_gradients import LayerIOs, row_gradients
from fx_influence.autodiff.layer_io.support import supported_names
from fx_influence.autodiff.per_sample import can_vmap_rows, per_sample_grads, rollout_loss
from fx_influence.batching.microbatch import MicroBatch, micro_batches
from fx_influence.batching.rows import select_rows
from fx_influence.core.tree import detached, promote
from fx_influence.policy.split import split_policy
from fx_influence.types import Apply, Batch, Params

RowGradientWriter = Callable[[str, slice, Tensor], None]
"""``write(name, entries, out)`` writes rows' gradients of entries of a parameter's first axis to ``out``, (b, n)."""


def rollout_gradients(params: Params, batch: Batch, apply: Apply, temperature: float = 1.0) -> Params:
    """Return the gradient of every row's rollout loss, see ``per_sample.rollout_loss``.

    The result is that of ``per_sample_grads(rollout_loss(apply, temperature), params, batch)``, from layer IO where a
    parameter has it.

    Args:
        params: theta, by name.
        batch: rollouts with coefficients, (B, T).
        apply: policy, see ``make_functional``.
        temperature: divisor of the logits.

    Returns:
        (B, ...) by name, at least float32.

    Example:
        >>> import torch
        >>> ids = torch.tensor([[1, 2]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True]]), coefficients=torch.tensor([[0.0, 1.0]]))
        >>> apply = lambda params, ids, mask: params["b"].expand(*ids.shape, 4)
        >>> rollout_gradients({"b": torch.zeros(4)}, batch, apply)["b"].tolist()
        [[0.25, 0.25, -0.75, 0.25]]
    """
    params = detached(params)
    source = row_gradient_source(params, params, batch, apply, temperature)
    [micro_batch] = micro_batches(batch, len(batch.input_ids), split_policy(apply).left_alignable)
    write = source.writer(batch, micro_batch, params)
    inverse_index = micro_batch.row_index.argsort()
    gradients = {}
    for name, p in params.items():
        out = p.new_empty(len(inverse_index), p.numel(), dtype=promote(p.dtype))
        write(name, slice(0, first_axis_length(p)), out)
        gradients[name] = out[inverse_index].reshape(-1, *p.shape)
    return gradients


class RowGradientSource(NamedTuple):
    """Source of rows' gradients of a policy.

    ``params``: all parameters by name. ``supported``: the names whose gradients come from layer IO. ``vmapped``:
    whether the gradients of the others come from one ``vmap(grad)``, else from a reverse pass per row.
    """

    params: Params
    supported: frozenset[str]
    vmapped: bool
    apply: Apply
    temperature: float

    def writer(self, batch: Batch, micro_batch: MicroBatch, names: Iterable[str]) -> RowGradientWriter:
        """Run the passes over a micro-batch; return the writer of its rows' gradients.

        Args:
            batch: rollouts with coefficients, (B, T).
            micro_batch: the rows to take.
            names: the parameters whose gradients are wanted.
        """
        supported = self.supported.intersection(names)
        others = {name: self.params[name] for name in names if name not in supported}
        rows = len(micro_batch.row_index)
        layer_ios: LayerIOs = {}
        if supported:
            options = self.apply, supported, self.temperature
            layer_ios, _ = collect_layer_io(self.params, batch, micro_batch, *options)
        per_sample: Params = {}
        if others:
            loss, chunk_size = _loss(self.params, self.apply, self.temperature), None if self.vmapped else 1
            per_sample = per_sample_grads(loss, others, select_rows(batch, micro_batch.row_index), chunk_size)

        def write(name: str, entries: slice, out: Tensor) -> None:
            p = self.params[name]
            if name in per_sample:
                out.copy_(per_sample[name].reshape(rows, first_axis_length(p), -1)[:, entries].flatten(1))
            else:
                row_gradients(layer_ios, name, p, entries, rows, out.view(rows, *p[entries].shape))

        return write


def row_gradient_source(
    params: Params, names: Iterable[str], batch: Batch, apply: Apply, temperature: float
) -> RowGradientSource:
    """Return the source of the rows' gradients of ``names``, after a probe of what the policy allows.

    Args:
        params: all parameters by name.
        names: the parameters whose gradients will be asked for.
        batch: rollouts with coefficients, (B, T), which the probe takes its rows from.
        apply: policy, see ``make_functional``.
        temperature: divisor of the logits.
    """
    supported = supported_names(params, batch, apply).intersection(names)
    others = {name: params[name] for name in names if name not in supported}
    vmapped = not others or can_vmap_rows(_loss(params, apply, temperature), others, batch)
    return RowGradientSource(params, supported, vmapped, apply, temperature)


def first_axis_length(p: Tensor) -> int:
    """Return the length of the first axis, 1 for a scalar."""
    return len(p) if p.dim() else 1


def _loss(params: Params, apply: Apply, temperature: float) -> Callable[[Params, Batch], Tensor]:
    """Return the rollout loss as a function of some parameters, the others fixed at ``params``."""
    return rollout_loss(lambda p, ids, mask: apply({**params, **p}, ids, mask), temperature)
