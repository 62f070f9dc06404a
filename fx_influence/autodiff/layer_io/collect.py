"""Collect the layer IO of a micro-batch in one forward and one reverse pass, as in a training step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fx_influence.autodiff.layer_io.recorder import LayerRecorder
from fx_influence.autodiff.layer_io.row_gradients import LayerIO, LayerIOs
from fx_influence.autodiff.token_values import scaled_loss_weights
from fx_influence.batching.microbatch import MicroBatch
from fx_influence.core.tree import accumulate, detached, promote
from fx_influence.policy.lm_head import TokenWeights, head_vjp, logit_gradient
from fx_influence.policy.split import SplitPolicy, split_policy
from fx_influence.types import Apply, Batch, Gradients, Params


def collect_layer_io(
    params: Params,
    batch: Batch,
    micro_batch: MicroBatch,
    apply: Apply,
    names: frozenset[str],
    temperature: float = 1.0,
    observer: AbstractContextManager[object] | None = None,
) -> tuple[LayerIOs, Gradients]:
    """Return the layer IO of every row's rollout loss, and the gradient of the micro-batch's loss.

    One forward and one reverse pass. Memory: inputs and output gradients of every use, (b, S, in + out), where
    inputs that several uses share count once.

    Args:
        params: theta, by name. The reverse pass stops short of the weights where none requires a gradient.
        batch: rollouts with coefficients, (B, T).
        micro_batch: the rows to take, see ``micro_batches``.
        apply: policy, see ``make_functional``.
        names: the parameters whose layer IO is wanted, see ``supported_names``.
        temperature: divisor of the logits.
        observer: function mode that sees the backbone's forward too, such as ``LinearOutputCache``, or None.

    Returns:
        The layer IO by parameter, rows in the order of ``micro_batch.row_index``, and the gradient by name, at least
        float32, of the parameters that require one.

    Raises:
        ValueError: where a parameter of ``names`` is used in a way that has no layer IO.

    Example:
        >>> from torch.nn import functional as F
        >>> from fx_influence.autodiff.layer_io.row_gradients import row_gradients
        >>> from fx_influence.batching.microbatch import micro_batches
        >>> ids = torch.tensor([[1, 2], [1, 3]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True]] * 2), coefficients=torch.tensor([[0.0, 1.0]] * 2))
        >>> [micro_batch], params = micro_batches(batch, None, left_alignable=False), {"w": torch.zeros(4, 4)}
        >>> table = lambda p, ids, mask: F.embedding(ids, p["w"])
        >>> layer_ios, _ = collect_layer_io(params, batch, micro_batch, table, frozenset({"w"}))
        >>> row_gradients(layer_ios, "w", params["w"], slice(0, 4), rows=2)[0, 1].tolist()
        [0.25, 0.25, -0.75, 0.25]
    """
    [layer_ios], total = collect_layer_ios(params, [batch], micro_batch, apply, names, temperature, observer)
    return layer_ios, total


def collect_layer_ios(
    params: Params,
    batches: Sequence[Batch],
    micro_batch: MicroBatch,
    apply: Apply,
    names: frozenset[str],
    temperature: float = 1.0,
    observer: AbstractContextManager[object] | None = None,
) -> tuple[list[LayerIOs], Gradients]:
    """Return ``collect_layer_io`` of several losses of the same rows, from one forward and a reverse pass for each.

    Args:
        params: theta, by name.
        batches: the same rollouts with other coefficients each, (B, T).
        micro_batch: the rows to take.
        apply: policy, see ``make_functional``.
        names: the parameters whose layer IO is wanted.
        temperature: divisor of the logits.
        observer: see ``collect_layer_io``.

    Returns:
        The layer IO of each batch, whose inputs are the same tensors, and the gradient of the first.
    """
    policy = split_policy(apply)
    total: Gradients = dict.fromkeys(params)
    backbone = LayerRecorder(params, micro_batch.input_ids.shape, names)
    with torch.enable_grad(), observer or nullcontext(), backbone:
        hidden = policy.backbone_eager(params, micro_batch.input_ids, micro_batch.attention_mask)
    by_batch: list[LayerIOs] = []
    fixed = detached(params)
    for k, batch in enumerate(batches):
        gradient: Gradients = dict.fromkeys(params)
        options = params if k == 0 else fixed, policy, names, temperature, gradient
        by_batch.append(_through_policy(hidden, backbone, batch, micro_batch, k == len(batches) - 1, *options))
        total = gradient if k == 0 else total
    return by_batch, total


def _through_policy(
    hidden: Tensor,
    backbone: LayerRecorder,
    batch: Batch,
    micro_batch: MicroBatch,
    is_last: bool,
    params: Params,
    policy: SplitPolicy,
    names: frozenset[str],
    temperature: float,
    total: Gradients,
) -> LayerIOs:
    """Return the layer IO of one loss, by a reverse pass through head and backbone.

    Args:
        hidden: hidden states (b, L, d), with their graph.
        backbone: the recorder of their forward.
        batch: rollouts with the loss's coefficients, (B, T).
        micro_batch: the rows to take.
        is_last: whether the graph is not needed again.
        params: theta, by name.
        policy: the split policy.
        names: the parameters whose layer IO is wanted.
        temperature: divisor of the logits.
        total: gradients by name, to which those of the parameters that require one are added in place.
    """
    weights, rows = scaled_loss_weights(batch, micro_batch, policy), len(micro_batch.row_index)
    if all(w is None for w in weights):
        return {}
    head, d_hidden = _through_head(params, hidden.detach(), micro_batch, weights, policy, names, temperature, total)
    unsupported = backbone.unsupported() | head.unsupported()
    if unsupported:
        raise ValueError(
            f"names has {min(unsupported)!r}; expected parameters whose uses all have a layer-input rule. Exclude it"
        )
    layer_ios = head.layer_ios(rows)
    if hidden.requires_grad:
        accumulate(total, _differentiate(hidden, d_hidden, backbone, params, retain_graph=not is_last))
        for name, uses in backbone.layer_ios(rows).items():
            layer_ios[name] = uses + layer_ios.get(name, [])
    if policy.loss_scale != 1:
        layer_ios = {name: [_unscaled(use, policy.loss_scale) for use in uses] for name, uses in layer_ios.items()}
        total.update({name: None if g is None else g / policy.loss_scale for name, g in total.items()})
    return layer_ios


def _unscaled(use: LayerIO, loss_scale: float) -> LayerIO:
    return use._replace(grads=use.grads.to(promote(use.grads.dtype)) / loss_scale)


_HIDDEN = "hidden states that enter the head"
"""Key of the hidden states among the parameters of the head's reverse pass; no parameter has this name."""


def _through_head(
    params: Params,
    hidden: Tensor,
    micro_batch: MicroBatch,
    weights: TokenWeights,
    policy: SplitPolicy,
    names: frozenset[str],
    temperature: float,
    total: Gradients,
) -> tuple[LayerRecorder, Tensor]:
    """Run the head forward and backward on the scored hidden states.

    Args:
        params: theta, by name.
        hidden: hidden states (b, L, d), detached.
        micro_batch: tells which of them score a token.
        weights: c and b of the scored tokens, (n,) each or None.
        policy: the split policy.
        names: the parameters to record.
        temperature: divisor of the logits.
        total: gradients by name, to which those through the head are added in place.

    Returns:
        The recorder of the head's uses, empty where the head uses none of ``names``, and the loss's gradient by all
        hidden states, (b, L, d).
    """
    d_hidden = torch.zeros_like(hidden)
    scored = micro_batch.row, micro_batch.position
    if not record_head(params, hidden[:, :1], policy, names).uses:
        d_hidden[scored], grads = head_vjp(policy, params, hidden[scored], micro_batch.targets, weights, temperature)
        accumulate(total, grads.items())
        return LayerRecorder(params, hidden.shape[:2], frozenset()), d_hidden
    # One row of the head's input per rollout: its scored tokens from the left, then slots of zero weight.
    counts = torch.bincount(micro_batch.row, minlength=len(hidden))
    order = torch.arange(len(micro_batch.row), device=micro_batch.row.device)
    slot = micro_batch.row, order - (counts.cumsum(0) - counts)[micro_batch.row]
    shape = len(hidden), int(counts.max())
    inputs = hidden.new_zeros(*shape, hidden.shape[-1]).index_put(slot, hidden[scored]).requires_grad_()
    targets = micro_batch.targets.new_zeros(shape).index_put(slot, micro_batch.targets)
    c, b = (w if w is None else w.new_zeros(shape).index_put(slot, w) for w in weights)
    recorder = LayerRecorder(params, inputs.shape[:2], names)
    with torch.enable_grad(), recorder:
        # Pass a view: module hooks (e.g. FlopCounterMode) break when a leaf goes to autograd.grad.
        logits = policy.head(params, inputs.view_as(inputs))
    d_logits = logit_gradient(logits.detach(), targets, (c, b), temperature)
    by_name = dict(_differentiate(logits, d_logits, recorder, {_HIDDEN: inputs, **params}))
    d_inputs = by_name.pop(_HIDDEN)
    assert d_inputs is not None
    d_hidden[scored] = d_inputs[slot]
    accumulate(total, by_name.items())
    return recorder, d_hidden


def record_head(params: Params, hidden: Tensor, policy: SplitPolicy, names: frozenset[str]) -> LayerRecorder:
    """Return the recorder of the head's forward, without an autograd graph.

    Args:
        params: theta, by name.
        hidden: hidden states (b, L, d).
        policy: the split policy.
        names: the parameters to record.
    """
    recorder = LayerRecorder(params, hidden.shape[:2], names)
    with torch.no_grad(), recorder:
        policy.head(params, hidden)
    return recorder


def _differentiate(
    output: Tensor, d_output: Tensor, recorder: LayerRecorder, params: Params, retain_graph: bool = False
) -> list[tuple[str, Tensor | None]]:
    """Return gradients by name of the parameters that require one; leave those of the recorded uses in ``recorder``."""
    leaves = {name: p for name, p in params.items() if p.requires_grad}
    outputs = [use.output for use in recorder.uses]
    grads = torch.autograd.grad(output, [*outputs, *leaves.values()], d_output, retain_graph, allow_unused=True)
    recorder.grads = grads[: len(outputs)]
    return list(zip(leaves, grads[len(outputs) :], strict=True))
