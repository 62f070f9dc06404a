"""Per-row gradients as factors: what enters each linear map and the gradient of what leaves it, from one plain pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_influence.autodiff.layer_io.recorder import _Recorder, _Use
from fx_influence.autodiff.layer_io.row_gradients import LayerIO, LayerIOs
from fx_influence.autodiff.token_values import scaled_loss_weights
from fx_influence.batching.microbatch import MicroBatch
from fx_influence.core.tree import accumulate, promote
from fx_influence.policy.lm_head import TokenWeights, head_vjp, logit_gradient
from fx_influence.policy.split import SplitPolicy, split_policy
from fx_influence.types import Apply, Batch, Gradients, Params


def collect_layer_io(
    params: Params, batch: Batch, part: MicroBatch, apply: Apply, names: frozenset[str], temperature: float = 1.0
) -> tuple[LayerIOs, Gradients]:
    """Factors of the gradient of every row's rollout loss, for the parameters ``names``, see ``supported_names``.

    Rows stand in the order of ``part.row_index``. One forward and one reverse pass, as in a training step. The gradient
    of the whole part's loss, at least float32, comes along for the parameters that require one; where none does, the
    reverse pass stops short of the weights. Memory: inputs and output gradients of every use, (b, S, in + out), inputs
    that uses share only once. Raises ``ValueError`` where a parameter of ``names`` is used in a way that has no factor.

    Example:
        >>> ids = torch.tensor([[1, 2], [1, 3]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True]] * 2), coefficients=torch.tensor([[0.0, 1.0]] * 2))
        >>> from fx_influence.batching.microbatch import micro_batches
        >>> [part], params = micro_batches(batch, None, left_alignable=False), {"w": torch.zeros(4, 4)}
        >>> table = lambda p, ids, mask: F.embedding(ids, p["w"])
        >>> factors, _ = collect_layer_io(params, batch, part, table, frozenset({"w"}))
        >>> row_gradients(factors, "w", params["w"], slice(0, 4), rows=2)[0, 1].tolist()
        [0.25, 0.25, -0.75, 0.25]
    """
    policy, count = split_policy(apply), len(part.row_index)
    total: Gradients = dict.fromkeys(params)
    body = _Recorder(params, part.input_ids.shape, names)
    with torch.enable_grad(), body:
        features = policy.backbone_eager(params, part.input_ids, part.attention_mask)
    weights = scaled_loss_weights(batch, part, policy)
    if all(w is None for w in weights):
        return {}, total
    head, toward = _through_head(params, features.detach(), part, weights, policy, names, temperature, total)
    if body.unfactored() | head.unfactored():
        name = min(body.unfactored() | head.unfactored())
        raise ValueError(f"parameter {name!r} is used in a way that has no factor; leave it out of names")
    factors = _factors(head, count)
    if features.requires_grad:
        accumulate(total, _differentiate(features, toward, body, params))
        for name, uses in _factors(body, count).items():
            factors[name] = uses + factors.get(name, [])
    if policy.loss_scale != 1:
        factors = {name: [_unscaled(use, policy.loss_scale) for use in uses] for name, uses in factors.items()}
        total = {name: None if g is None else g / policy.loss_scale for name, g in total.items()}
    return factors, total


def _unscaled(use: LayerIO, loss_scale: float) -> LayerIO:
    return use._replace(grads=use.grads.to(promote(use.grads.dtype)) / loss_scale)


_FEATURES = "what enters the head"


def _through_head(
    params: Params,
    features: Tensor,
    part: MicroBatch,
    weights: TokenWeights,
    policy: SplitPolicy,
    names: frozenset[str],
    temperature: float,
    total: Gradients,
) -> tuple[_Recorder, Tensor]:
    """What the head makes of the scored features, recorded, and the loss's gradient by all features."""
    toward = torch.zeros_like(features)
    at = part.row, part.position
    if not _seen_in_head(params, features[:, :1], policy, names).uses:
        toward[at], found = head_vjp(policy, params, features[at], part.targets, weights, temperature)
        accumulate(total, found.items())
        return _Recorder(params, features.shape[:2], frozenset()), toward
    # Row by row: the scored tokens of each from the left, those of short rows followed by tokens of no weight.
    counts = torch.bincount(part.row, minlength=len(features))
    slot = torch.arange(len(part.row), device=part.row.device) - (counts.cumsum(0) - counts)[part.row]
    shape = len(features), int(counts.max())
    own = features.new_zeros(*shape, features.shape[-1]).index_put((part.row, slot), features[at]).requires_grad_()
    targets = part.targets.new_zeros(shape).index_put((part.row, slot), part.targets)
    c, b = (w if w is None else w.new_zeros(shape).index_put((part.row, slot), w) for w in weights)
    recorder = _Recorder(params, own.shape[:2], names)
    with torch.enable_grad(), recorder:
        logits = policy.head(params, own.view_as(own))
    d_logits = logit_gradient(logits.detach(), targets, (c, b), temperature)
    found = dict(_differentiate(logits, d_logits, recorder, {_FEATURES: own, **params}))
    d_own = found.pop(_FEATURES)
    assert d_own is not None
    toward[at] = d_own[part.row, slot]
    accumulate(total, found.items())
    return recorder, toward


def _seen_in_head(params: Params, features: Tensor, policy: SplitPolicy, names: frozenset[str]) -> _Recorder:
    recorder = _Recorder(params, features.shape[:2], names)
    with torch.no_grad(), recorder:
        policy.head(params, features)
    return recorder


def _differentiate(
    output: Tensor, toward: Tensor, recorder: _Recorder, params: Params
) -> list[tuple[str, Tensor | None]]:
    """Gradients of the parameters that require one, by name; those of the recorded uses are left with the uses."""
    leaves = {name: p for name, p in params.items() if p.requires_grad}
    wanted = [use.output for use in recorder.uses]
    grads = torch.autograd.grad(output, [*wanted, *leaves.values()], toward, allow_unused=True)
    recorder.grads = grads[: len(wanted)]
    return list(zip(leaves, grads[len(wanted) :], strict=True))


def _factor(use: _Use, g: Tensor, rows: int) -> LayerIO:
    inputs = use.inputs if use.inputs is None or use.kind == "embedding" else _by_row(use.inputs.detach(), rows)
    if use.padding is not None and inputs is not None:
        g = g.masked_fill((inputs == use.padding).unsqueeze(-1), 0.0)
    return LayerIO(use.kind, inputs, _by_row(g, rows))


def _by_row(x: Tensor, rows: int) -> Tensor:
    return x.reshape(rows, -1, x.shape[-1])


def _factors(recorder: _Recorder, rows: int) -> LayerIOs:
    factors: LayerIOs = {}
    for use, g in zip(recorder.uses, recorder.grads, strict=True):
        if g is not None:
            factors.setdefault(use.name, []).append(_factor(use, g, rows))
    return factors
