"""First derivatives of a batch's token values: the gradient of a loss on them, and their slopes along a direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fx_influence.autodiff.token_values import scaled_loss_weights, scatter_to_batch, scored_features
from fx_influence.batching.microbatch import MicroBatch
from fx_influence.core.dtensor import to_local
from fx_influence.core.tree import accumulate
from fx_influence.policy.lm_head import head_token_values, head_vjp
from fx_influence.policy.modes.linear_cache import LinearOutputCache, ReuseLinearOutputs
from fx_influence.policy.split import SplitPolicy, split_policy
from fx_influence.types import Apply, Batch, Gradients, Params, TokenValues

LinearOutputCaches = list[list[Tensor] | None]
"""What leaves the linear maps of each part of a batch, or None where it is not kept."""


def batch_gradient(
    params: Params, batch: Batch, apply: Apply, temperature: float = 1.0, chunk_size: int | None = None
) -> Gradients:
    """g = grad of -sum_it (c_it log pi(y_it) + b_it h_it) by reverse mode, accumulated over parts of the batch.

    ``batch.coefficients`` is c and ``batch.entropy_coefficients`` b, (B, T). Returns one tensor per parameter, at
    least float32, and None where backward never reaches the parameter, as ``p.grad`` would be.
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
    """``batch_gradient``, and for ``token_jvp`` of the same batch what its linear maps put out in the forwards.

    As many parts of the batch have their outputs kept as fit ``memory_budget`` bytes.
    """
    policy, leaves = split_policy(apply), as_leaves(params)
    total: Gradients = dict.fromkeys(params)
    caches: LinearOutputCaches = []
    for part in policy.micro_batches(batch, chunk_size):
        cache = LinearOutputCache(memory_budget)
        with _active(cache, policy):
            features = _forward(leaves, part, policy)
        caches.append(cache.outputs or None)
        memory_budget -= cache.bytes if caches[-1] else 0
        _add_gradient(total, leaves, features, part, batch, policy, temperature)
    return unscaled(total, policy.loss_scale), caches


def reweighted_gradient(
    params: Params,
    batch: Batch,
    apply: Apply,
    coefficients_fn: Callable[[TokenValues], Batch],
    temperature: float = 1.0,
    chunk_size: int | None = None,
    memory_budget: int = 0,
) -> tuple[Batch, Gradients]:
    """Return ``coefficients_fn(values)``, the batch with coefficients made from its token values, and its gradient.

    The first part goes forward once for both, and so do as many others as have room for their graphs in
    ``memory_budget`` bytes beside what the linear maps of the rest put out, with which these go forward again.
    """
    policy, leaves = split_policy(apply), as_leaves(params)
    pending = policy.micro_batches(batch, chunk_size)
    graphs: dict[int, Tensor] = {}
    caches: dict[int, list[Tensor]] = {}
    found = []
    wanted = 1
    for k, part in enumerate(pending):
        # That of the first is only measured.
        cache = LinearOutputCache(0 if 0 < k < wanted or len(pending) == 1 else memory_budget)
        with _Graph(leaves) as graph, torch.set_grad_enabled(k < wanted), _active(cache, policy):
            features = scored_features(policy.backbone(leaves, part), part)
        if k == 0:
            graphs[k] = features
            wanted += graphs_within_budget(len(pending) - 1, graph.bytes, cache.bytes, memory_budget)
        elif features.requires_grad and graph.bytes <= memory_budget:
            graphs[k] = features
            memory_budget -= graph.bytes
        elif cache.outputs:
            caches[k] = cache.outputs
            memory_budget -= cache.bytes
        with torch.no_grad():
            found.append((part, head_token_values(policy, params, features.detach(), part.targets, temperature)))
    weighted = coefficients_fn(scatter_to_batch(found, batch))
    total: Gradients = dict.fromkeys(params)
    for k, part in enumerate(pending):
        features = graphs.pop(k) if k in graphs else _forward(leaves, part, policy, caches.pop(k, None))
        _add_gradient(total, leaves, features, part, weighted, policy, temperature)
    return weighted, unscaled(total, policy.loss_scale)


def graphs_within_budget(micro_batches: int, graph: int, cache: int, memory_budget: int) -> int:
    """Of so many parts how many, if a graph and a tape take these bytes: all, or what tapes of the others leave."""
    if graph * micro_batches <= memory_budget:
        return micro_batches
    return max(0, memory_budget - cache * micro_batches) // max(1, graph - cache)


def _active(cache: LinearOutputCache, policy: SplitPolicy) -> AbstractContextManager[object]:
    # A compiled pass is seen by no mode, and made anew under one.
    return nullcontext() if policy.compiled or cache.max_bytes == 0 else cache


class _Graph(saved_tensors_hooks):
    """Counts the bytes that a graph made inside holds besides the leaves."""

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

    def __enter__(self) -> _Graph:  # type: ignore[override]
        super().__enter__()
        return self


def as_leaves(params: Params) -> Params:
    """The parameters as leaves of a graph of their own."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def _forward(leaves: Params, part: MicroBatch, policy: SplitPolicy, outputs: Sequence[Tensor] | None = None) -> Tensor:
    replay = ReuseLinearOutputs(outputs or [])
    with torch.enable_grad(), replay if outputs else nullcontext():
        features = scored_features(policy.backbone(leaves, part), part)
    return features if replay.outputs_fit else _forward(leaves, part, policy)


def _add_gradient(
    total: Gradients,
    leaves: Params,
    features: Tensor,
    part: MicroBatch,
    batch: Batch,
    policy: SplitPolicy,
    temperature: float,
) -> None:
    """Add the gradient of the micro-batch's share of the loss, times the loss scale, to ``total`` in place.

    Each leaf's gradient is added and dropped as soon as backward has made it, so that beside the total there is one
    parameter's at a time.
    """
    weights = scaled_loss_weights(batch, part, policy)
    if all(w is None for w in weights):
        return
    toward, of_head = head_vjp(policy, leaves, features, part.targets, weights, temperature)
    accumulate(total, of_head.items())
    del of_head
    if not features.requires_grad:
        return

    def add_and_drop(name: str) -> Callable[[Tensor], None]:
        def hook(leaf: Tensor) -> None:
            grad, leaf.grad = leaf.grad, None
            accumulate(total, [(name, grad)])

        return hook

    handles = [leaf.register_post_accumulate_grad_hook(add_and_drop(name)) for name, leaf in leaves.items()]
    try:
        torch.autograd.backward([features], [toward], inputs=list(leaves.values()))
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
