"""Gradients of the surrogate loss of a batch by reverse mode, with linear layers' outputs cached for later passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fx_influence.autodiff.token_values import scaled_loss_weights, scatter_to_batch, scored_hidden_states
from fx_influence.batching.microbatch import MicroBatch
from fx_influence.batching.rows import select_rows
from fx_influence.core.dtensor import to_local
from fx_influence.core.tree import accumulate, addresses_of
from fx_influence.policy.lm_head import head_token_values, head_vjp
from fx_influence.policy.modes.linear_cache import LinearOutputCache, ReuseLinearOutputs
from fx_influence.policy.split import SplitPolicy, split_policy
from fx_influence.types import Apply, Batch, Gradients, Params, TokenValues

LinearOutputCaches = list[list[Tensor] | None]
"""Outputs of the linear layers by micro-batch; None for a micro-batch whose outputs are not cached."""


def batch_gradient(
    params: Params, batch: Batch, apply: Apply, temperature: float = 1.0, chunk_size: int | None = None
) -> Gradients:
    """Return g = grad of -sum_it (c_it log pi(y_it) + b_it h_it) by reverse mode, accumulated over micro-batches.

    Args:
        params: theta, by name.
        batch: rollouts with c = ``coefficients`` and b = ``entropy_coefficients``, (B, T) each.
        apply: policy, see ``make_functional``.
        temperature: divisor of the logits.
        chunk_size: rows per forward; None chooses by tokens.

    Returns:
        One tensor per parameter, at least float32, and None where backward never reaches the parameter, as ``p.grad``.
    """
    return gradient_with_cache(params, batch, apply, temperature, chunk_size)[0]


def gradient_with_cache(
    params: Params,
    batch: Batch,
    apply: Apply,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    memory_budget: int = 0,
) -> tuple[Gradients, LinearOutputCaches]:
    """Return ``batch_gradient`` and the outputs of the linear layers, which ``token_jvp`` of the same batch reuses.

    Args:
        params: theta, by name.
        batch: rollouts with coefficients, (B, T).
        apply: policy, see ``make_functional``.
        temperature: divisor of the logits.
        chunk_size: rows per forward; None chooses by tokens.
        memory_budget: bytes of outputs that are cached, for as many micro-batches as fit.
    """
    policy, leaves = split_policy(apply), as_leaves(params)
    total: Gradients = dict.fromkeys(params)
    caches: LinearOutputCaches = []
    remaining = memory_budget
    for micro_batch in policy.micro_batches(batch, chunk_size):
        cache = LinearOutputCache(remaining)
        with _activate(cache, remaining, policy):
            hidden = _forward(leaves, micro_batch, policy)
        caches.append(cache.outputs or None)
        remaining -= cache.bytes if caches[-1] else 0
        _add_gradient(total, leaves, hidden, micro_batch, batch, policy, temperature)
    return unscaled(total, policy.loss_scale), caches


def reweighted_gradients(
    params: Params,
    batch: Batch,
    groups: Sequence[Tensor],
    apply: Apply,
    coefficients_fn: Callable[[TokenValues], Sequence[Batch]],
    temperature: float = 1.0,
    chunk_size: int | None = None,
    memory_budget: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[Sequence[Batch], Iterator[Gradients]]:
    """Return ``coefficients_fn(values)``, the batch with coefficients made from its token values, and its gradients.

    The coefficients need the values of all rows, so every micro-batch goes forward before the first goes backward.
    The first micro-batch keeps its autograd graph between the two, and so do as many others as fit the budget beside
    the linear layers' outputs of the rest, which are forwarded a second time with these outputs.

    Args:
        params: theta, by name.
        batch: rollouts (B, T).
        groups: K index tensors into the rows; every row is in one of them.
        apply: policy, see ``make_functional``.
        coefficients_fn: maps the batch's token values, (B, T) each, to the batch with coefficients, or to several such
            batches.
        temperature: divisor of the logits.
        chunk_size: rows per forward; None chooses by tokens.
        memory_budget: bytes of graphs and cached outputs beside the first micro-batch's graph.
        dtype: in which gradients are accumulated; None takes at least float32.

    Returns:
        The batches with coefficients, and an iterator over gradients, each computed when the iterator reaches it: first
        those of all rows with the coefficients of the second and any further batch, then those of the K groups with the
        coefficients of the first batch, which add up to the gradient of all rows.
    """
    policy, leaves = split_policy(apply), as_leaves(params)
    by_group = [
        [x.of_rows(index, batch) for x in policy.micro_batches(select_rows(batch, index), chunk_size)]
        if len(index)
        else []
        for index in groups
    ]
    pending = [micro_batch for group_batches in by_group for micro_batch in group_batches]
    graphs: dict[int, Tensor] = {}
    caches: dict[int, list[Tensor]] = {}
    values = []
    num_graphs, remaining = 1, memory_budget
    for k, micro_batch in enumerate(pending):
        # The first micro-batch keeps its graph; its cache is only sized.
        budget = 0 if 0 < k < num_graphs or len(pending) == 1 else remaining
        cache = LinearOutputCache(budget)
        with _GraphSize(leaves) as graph, torch.set_grad_enabled(k < num_graphs), _activate(cache, budget, policy):
            hidden = scored_hidden_states(policy.backbone(leaves, micro_batch), micro_batch)
        if k == 0:
            graphs[k] = hidden
            num_graphs += graphs_within_budget(len(pending) - 1, graph.bytes, cache.bytes, remaining)
        elif hidden.requires_grad and graph.bytes <= remaining:
            graphs[k] = hidden
            remaining -= graph.bytes
        elif cache.outputs:
            caches[k] = cache.outputs
            remaining -= cache.bytes
        with torch.no_grad():
            scored = head_token_values(policy, params, hidden.detach(), micro_batch.targets, temperature)
            values.append((micro_batch, scored))
    weighted = coefficients_fn(scatter_to_batch(values, batch))

    def gradient_of(order: Sequence[int], batch: Batch, is_last: bool) -> Gradients:
        total: Gradients = dict.fromkeys(params)
        for k in order:
            # A compiled graph cannot be differentiated twice, since its backward reuses the buffers.
            keeps_graph = not is_last and not policy.compiled
            hidden = graphs.pop(k, None) if is_last else graphs.get(k) if keeps_graph else None
            outputs = caches.pop(k, None) if is_last else caches.get(k)
            if hidden is None:
                hidden = _forward(leaves, pending[k], policy, outputs)
            _add_gradient(total, leaves, hidden, pending[k], batch, policy, temperature, dtype, keeps_graph)
            del hidden, outputs
        return unscaled(total, policy.loss_scale)

    def gradients() -> Iterator[Gradients]:
        for further in weighted[1:]:
            yield gradient_of(range(len(pending)), further, is_last=False)
        order = iter(range(len(pending)))
        for group_batches in by_group:
            yield gradient_of([next(order) for _ in group_batches], weighted[0], is_last=True)

    return weighted, gradients()


def graphs_within_budget(micro_batches: int, graph: int, cache: int, memory_budget: int) -> int:
    """Return how many micro-batches' graphs fit in the budget when the remaining ones keep only linear outputs.

    Args:
        micro_batches: number of micro-batches.
        graph: bytes of the autograd graph of one.
        cache: bytes of the linear layers' outputs of one.
        memory_budget: bytes for both.
    """
    if graph * micro_batches <= memory_budget:
        return micro_batches
    return max(0, memory_budget - cache * micro_batches) // max(1, graph - cache)


def as_leaves(params: Params) -> Params:
    """Return the parameters as leaves of a new autograd graph."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def _activate(cache: LinearOutputCache, budget: int, policy: SplitPolicy) -> AbstractContextManager[object]:
    # Function modes do not see compiled code, and would trigger a recompile.
    return nullcontext() if policy.compiled or budget == 0 else cache


class _GraphSize(saved_tensors_hooks):
    """Count the ``bytes`` that an autograd graph built inside the block saves, the leaves left out."""

    def __init__(self, leaves: Params) -> None:
        self.bytes = 0
        seen = {to_local(p).untyped_storage().data_ptr() for p in leaves.values()}

        def pack(x: Tensor) -> Tensor:
            storage = to_local(x).untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
            return x

        super().__init__(pack, lambda x: x)

    def __enter__(self) -> _GraphSize:  # type: ignore[override]
        super().__enter__()
        return self


def _forward(
    leaves: Params, micro_batch: MicroBatch, policy: SplitPolicy, outputs: Sequence[Tensor] | None = None
) -> Tensor:
    """Return the scored hidden states with their graph, reusing the linear layers' ``outputs`` where they fit."""
    reuse = ReuseLinearOutputs(outputs or [])
    with torch.enable_grad(), reuse if outputs else nullcontext():
        hidden = scored_hidden_states(policy.backbone(leaves, micro_batch), micro_batch)
    return hidden if reuse.outputs_fit else _forward(leaves, micro_batch, policy)


def _add_gradient(
    total: Gradients,
    leaves: Params,
    hidden: Tensor,
    micro_batch: MicroBatch,
    batch: Batch,
    policy: SplitPolicy,
    temperature: float,
    dtype: torch.dtype | None = None,
    retain_graph: bool = False,
) -> None:
    """Add the gradient of the micro-batch's part of the loss, times the loss scale, to ``total`` in place.

    Each leaf's gradient is added and dropped as soon as backward has made it, so that beside the total there is one
    parameter's at a time.

    Args:
        total: gradients by name, None where backward has not reached the parameter.
        leaves: theta by name, as leaves of the graph of ``hidden``.
        hidden: hidden states that score the micro-batch's tokens, (n, d).
        micro_batch: those tokens.
        batch: rollouts with coefficients, (B, T).
        policy: the split policy.
        temperature: divisor of the logits.
        dtype: of the total; None takes at least float32.
        retain_graph: whether the graph will be differentiated again.
    """
    weights = scaled_loss_weights(batch, micro_batch, policy)
    if all(w is None for w in weights):
        return
    d_hidden, head_gradient = head_vjp(policy, leaves, hidden, micro_batch.targets, weights, temperature)
    addresses = addresses_of(total)
    accumulate(total, head_gradient.items(), dtype, addresses)
    del head_gradient
    if not hidden.requires_grad:
        return

    def add_and_drop(name: str) -> Callable[[Tensor], None]:
        def hook(leaf: Tensor) -> None:
            grad, leaf.grad = leaf.grad, None
            accumulate(total, [(name, grad)], dtype, addresses)

        return hook

    handles = [leaf.register_post_accumulate_grad_hook(add_and_drop(name)) for name, leaf in leaves.items()]
    try:
        torch.autograd.backward([hidden], [d_hidden], retain_graph, inputs=list(leaves.values()))
    finally:
        for handle in handles:
            handle.remove()


def unscaled(gradient: Gradients, loss_scale: float) -> Gradients:
    """Divide a gradient by the loss scale, in place, and return it."""
    if loss_scale != 1:
        for g in gradient.values():
            if g is not None:
                g.div_(loss_scale)
    return gradient
