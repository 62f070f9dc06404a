"""Tell by a short probe which parameters have layer IO, and how much memory that takes."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_influence.autodiff.layer_io.collect import record_head
from fx_influence.autodiff.layer_io.recorder import LayerRecorder, split_rows
from fx_influence.policy.split import split_policy
from fx_influence.types import Apply, Batch, Params

PROBE_ROWS, PROBE_COLUMNS = 3, 4
"""Rows of the probe, and its width unless the batch is narrower."""


def supported_names(params: Params, batch: Batch, apply: Apply) -> frozenset[str]:
    """Return the parameters whose per-row gradients are the sums of their ``LayerIO`` products.

    A probe of three short rows decides, with the batch's tokens and padding. A parameter w has layer IO where

    - every differentiable path from w to the logits is a use of a kind of ``LayerIO``: recorded uses take w detached,
      so a path that remains in the graph (``w.T``, a slice, w in a list, a custom function) is one that was not
      recorded;
    - d logits[i] / d y[j] is exactly 0 for rows i != j and the output y of every use, split as ``LayerIO`` splits it:
      tokens in another order than that of the batch, an axis that has the length of the rows by chance, and rows that
      see one another all break this.

    Every other parameter is left to ``per_sample_grads``. Cost: one forward and three reverse passes of 12 tokens
    without the products that make weights' gradients.

    Args:
        params: theta, by name.
        batch: rollouts (B, T).
        apply: policy, see ``make_functional``.
    """
    policy, leaves = split_policy(apply), {name: p.detach().requires_grad_() for name, p in params.items()}
    ids, mask = _probe_rows(batch, policy.left_alignable)
    names = frozenset(params)
    backbone, head = (LayerRecorder(leaves, ids.shape, names, detached=True) for _ in range(2))
    with torch.enable_grad(), backbone:
        hidden = policy.backbone_eager(leaves, ids, mask)
    inputs = hidden.detach().requires_grad_()
    with torch.enable_grad(), head:
        logits = policy.head(leaves, inputs.view_as(inputs))
    rejected: set[str] = set()
    for output, recorder in ((hidden, backbone), (logits, head)):
        rejected |= recorder.unsupported() | _reached_leaves(output, leaves) | _row_mixing_uses(output, recorder)
    return frozenset({use.name for use in (*backbone.uses, *head.uses)} - rejected)


def layer_io_bytes_per_token(params: Params, batch: Batch, apply: Apply, names: frozenset[str]) -> int:
    """Return the bytes that the layer IO of ``names`` takes for one token of one row, at most.

    Args:
        params: theta, by name.
        batch: rollouts (B, T), whose tokens the probe takes.
        apply: policy, see ``make_functional``.
        names: the parameters to record.
    """
    policy, (ids, mask) = split_policy(apply), _probe_rows(batch, left_alignable=True)
    backbone = LayerRecorder(params, ids.shape, names)
    with torch.no_grad(), backbone:
        hidden = policy.backbone_eager(params, ids, mask)
    head = record_head(params, hidden, policy, names)
    sizes = {
        id(x): x.numel() * x.element_size()
        for use in (*backbone.uses, *head.uses)
        for x in (use.inputs, use.output)
        if x is not None
    }
    return sum(sizes.values()) // ids.numel()


def _probe_rows(batch: Batch, left_alignable: bool) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask (3, L <= 4) of the batch's tokens, of three lengths where the batch is padded."""
    width = min(PROBE_COLUMNS, batch.input_ids.shape[1])
    columns = torch.arange(width, device=batch.input_ids.device)
    rows = torch.arange(PROBE_ROWS, device=columns.device) % len(batch.input_ids)
    attended = batch.attention_mask[rows]
    # The attended columns first, in order; their number stays on the device, as reading it would hold up the host.
    order, count = (~attended).byte().argsort(dim=1, stable=True), attended.sum(1, keepdim=True)
    source = order.gather(1, columns % torch.where(count > 0, count, attended.shape[1]))
    ids = batch.input_ids[rows].gather(1, source)
    if left_alignable or bool(batch.attention_mask.all()):
        return ids, torch.ones_like(ids, dtype=torch.bool)
    # Neither ascending nor descending, so that a model which sorts rows by length changes their order.
    lengths = columns.new_tensor([width - 1, width, width - 2]).clamp(min=1).unsqueeze(1)
    padded_left = bool((~batch.attention_mask[:, 0]).any())
    return ids, columns >= width - lengths if padded_left else columns < lengths


def _reached_leaves(output: Tensor, leaves: Params) -> set[str]:
    """Return the names of the leaves that the autograd graph of ``output`` leads to."""
    names = {id(p): name for name, p in leaves.items()}
    reached = {names[id(output)]} if id(output) in names else set()
    pending, seen = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if id(variable) in names:
            reached.add(names[id(variable)])
        pending.extend(following for following, _ in node.next_functions)
    return reached


def _row_mixing_uses(output: Tensor, recorder: LayerRecorder) -> set[str]:
    """Return the names of uses whose output, where one row's layer IO is read, affects another row of ``output``."""
    rows = len(output)
    outputs = [use.output for use in recorder.uses]
    if not output.requires_grad or not outputs:
        return set()
    # Random, because structure hides dependence: the sum of a layer norm's output, for one, is constant.
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(output)
    mixes = [torch.zeros((), dtype=torch.bool, device=output.device)] * len(outputs)
    for i in range(rows):
        row = torch.arange(i, i + 1, device=cotangent.device)
        row_cotangent = torch.zeros_like(cotangent).index_copy(0, row, cotangent[i : i + 1])
        grads = torch.autograd.grad(output, outputs, row_cotangent, allow_unused=True, retain_graph=True)
        for k, g in enumerate(grads):
            if g is not None:
                # NaN differs from 0, so it counts as dependence too.
                others = split_rows(g, rows).index_fill(0, row, 0.0)
                mixes[k] = mixes[k] | (others != 0).any()
    flags = torch.stack(mixes).tolist()
    return {use.name for use, flag in zip(recorder.uses, flags, strict=True) if flag}
