"""First derivatives of a batch's token values: the gradient of a loss on them, and their slopes along a direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fx_influence.autodiff.token_values import in_place, scaled_weights, scored_features
from fx_influence.batching.microbatch import Part
from fx_influence.core.dtensor import own_part
from fx_influence.core.tree import accumulate
from fx_influence.policy.linear_cache import Replay, Tape
from fx_influence.policy.lm_head import pull, scores
from fx_influence.policy.split import Halves, halves
from fx_influence.types import Apply, Batch, Gradients, Params, TokenValues

Tapes = list[list[Tensor] | None]
"""What leaves the linear maps of each part of a batch, or None where it is not kept."""


def batch_gradient(
    params: Params, batch: Batch, apply: Apply, temperature: float = 1.0, chunk_size: int | None = None
) -> Gradients:
    """g = grad of -sum_it (c_it log pi(y_it) + b_it h_it) by reverse mode, accumulated over parts of the batch.

    ``batch.coefficients`` is c and ``batch.entropy_coefficients`` b, (B, T). Returns one tensor per parameter, at
    least float32, and None where backward never reaches the parameter, as ``p.grad`` would be.
    """
    return taped_gradient(params, batch, apply, temperature, chunk_size)[0]


def taped_gradient(
    params: Params,
    batch: Batch,
    apply: Apply,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    memory_budget: int = 0,
) -> tuple[Gradients, Tapes]:
    """``batch_gradient``, and for ``token_jvp`` of the same batch what its linear maps put out in the forwards.

    As many parts of the batch have their outputs kept as fit ``memory_budget`` bytes.
    """
    policy, leaves = halves(apply), live(params)
    total: Gradients = dict.fromkeys(params)
    tapes: Tapes = []
    for part in policy.parts(batch, chunk_size):
        tape = Tape(memory_budget)
        with _active(tape, policy):
            features = _forward(leaves, part, policy)
        tapes.append(tape.outputs or None)
        memory_budget -= tape.bytes if tapes[-1] else 0
        accumulate(total, _reverse(leaves, features, part, batch, policy, temperature).items())
    return total, tapes


def weighted_gradient(
    params: Params,
    batch: Batch,
    apply: Apply,
    weigh: Callable[[TokenValues], Batch],
    temperature: float = 1.0,
    chunk_size: int | None = None,
    memory_budget: int = 0,
) -> tuple[Batch, Gradients]:
    """``weigh(values)``, the batch with coefficients that depend on all its token values, and its ``batch_gradient``.

    The first part goes forward once for both, and so do as many others as have room for their graphs in
    ``memory_budget`` bytes beside what the linear maps of the rest put out, with which these go forward again.
    """
    policy, leaves = halves(apply), live(params)
    pending = policy.parts(batch, chunk_size)
    graphs: dict[int, Tensor] = {}
    tapes: dict[int, list[Tensor]] = {}
    found = []
    wanted = 1
    for k, part in enumerate(pending):
        # That of the first is only measured.
        tape = Tape(0 if 0 < k < wanted or len(pending) == 1 else memory_budget)
        with _Graph(leaves) as graph, torch.set_grad_enabled(k < wanted), _active(tape, policy):
            features = scored_features(policy.features(leaves, part), part)
        if k == 0:
            graphs[k] = features
            wanted += _graphs_to_keep(len(pending) - 1, graph.bytes, tape.bytes, memory_budget)
        elif features.requires_grad and graph.bytes <= memory_budget:
            graphs[k] = features
            memory_budget -= graph.bytes
        elif tape.outputs:
            tapes[k] = tape.outputs
            memory_budget -= tape.bytes
        with torch.no_grad():
            found.append((part, scores(policy, params, features.detach(), part.targets, temperature)))
    weighted = weigh(in_place(found, batch))
    total: Gradients = dict.fromkeys(params)
    for k, part in enumerate(pending):
        features = graphs.pop(k) if k in graphs else _forward(leaves, part, policy, tapes.pop(k, None))
        accumulate(total, _reverse(leaves, features, part, weighted, policy, temperature).items())
    return weighted, total


def _graphs_to_keep(parts: int, graph: int, tape: int, memory_budget: int) -> int:
    """Of so many parts how many, if a graph and a tape take these bytes: all, or what tapes of the others leave."""
    if graph * parts <= memory_budget:
        return parts
    return max(0, memory_budget - tape * parts) // max(1, graph - tape)


def _active(tape: Tape, policy: Halves) -> AbstractContextManager[object]:
    # A compiled pass is seen by no mode, and made anew under one.
    return nullcontext() if policy.compiled or tape.room == 0 else tape


class _Graph(saved_tensors_hooks):
    """Counts the bytes that a graph made inside holds besides the leaves."""

    def __init__(self, leaves: Params) -> None:
        self.bytes = 0
        seen = {own_part(p).untyped_storage().data_ptr() for p in leaves.values()}

        def pack(x: Tensor) -> Tensor:
            storage = own_part(x).untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
            return x

        super().__init__(pack, lambda x: x)

    def __enter__(self) -> _Graph:  # type: ignore[override]
        super().__enter__()
        return self


def live(params: Params) -> Params:
    """The parameters as leaves of a graph of their own."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def _forward(leaves: Params, part: Part, policy: Halves, outputs: Sequence[Tensor] | None = None) -> Tensor:
    replay = Replay(outputs or [])
    with torch.enable_grad(), replay if outputs else nullcontext():
        features = scored_features(policy.features(leaves, part), part)
    return features if replay.outputs_fit else _forward(leaves, part, policy)


def _reverse(leaves: Params, features: Tensor, part: Part, batch: Batch, policy: Halves, temperature: float) -> Params:
    """The gradient of the leaves that the part's share of the loss reaches, at least float32."""
    weights = scaled_weights(batch, part, policy)
    if all(w is None for w in weights):
        return {}
    toward, total = pull(policy, leaves, features, part.targets, weights, temperature)
    if features.requires_grad:
        grads = torch.autograd.grad(features, list(leaves.values()), toward, allow_unused=True)
        accumulate(total, zip(leaves, grads, strict=True))
    return {name: g if policy.loss_scale == 1 else g / policy.loss_scale for name, g in total.items() if g is not None}
