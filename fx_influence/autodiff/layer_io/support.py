"""Decide by a probe which parameters have layer IO."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_influence.autodiff.layer_io.collect import _by_row, _seen_in_head
from fx_influence.autodiff.layer_io.recorder import _Recorder
from fx_influence.policy.split import split_policy
from fx_influence.types import Apply, Batch, Params


def supported_names(params: Params, batch: Batch, apply: Apply) -> frozenset[str]:
    """Return the parameters whose per-row gradients are the sums of their ``LayerIO`` products.

    A probe of three short rows decides, with those of the batch's tokens and padding. A parameter w has factors where

    - every differentiable path from w to the logits is a use of a kind of ``LayerIO``: recorded uses take w detached,
      so a path that is left in the graph (``w.T``, a slice, w in a list, a custom function) is one that none records;
    - d logits[i] / d y[j] is exactly 0 for rows i != j and the output y of every use, split as ``LayerIO`` splits it:
      tokens in another order than that of the batch, an axis that has the length of the rows by chance, and rows that
      see one another all break this.

    Every other parameter is left to ``per_sample_grads``. Cost: one forward and three reverse passes of 12 tokens
    without the products that make weights' gradients.
    """
    policy, leaves = split_policy(apply), {name: p.detach().requires_grad_() for name, p in params.items()}
    ids, mask = _probe_rows(batch, policy.left_alignable)
    names = frozenset(params)
    body, head = (_Recorder(leaves, ids.shape, names, detached=True) for _ in range(2))
    with torch.enable_grad(), body:
        features = policy.backbone_eager(leaves, ids, mask)
    inputs = features.detach().requires_grad_()
    with torch.enable_grad(), head:
        logits = policy.head(leaves, inputs.view_as(inputs))
    rejected: set[str] = set()
    for output, recorder in ((features, body), (logits, head)):
        rejected |= recorder.unfactored() | _in_graph(output, leaves) | _mixed(output, recorder)
    return frozenset({use.name for use in (*body.uses, *head.uses)} - rejected)


PROBE_ROWS, PROBE_COLUMNS = 3, 4


def _probe_rows(batch: Batch, left_alignable: bool) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, (3, L <= 4), of the batch's tokens, padded to three lengths where the batch is padded."""
    width = min(PROBE_COLUMNS, batch.input_ids.shape[1])
    columns = torch.arange(width, device=batch.input_ids.device)
    rows = []
    for i in range(PROBE_ROWS):
        row, attended = (field[i % len(batch.input_ids)] for field in batch[:2])
        tokens = row[attended] if bool(attended.any()) else row
        rows.append(tokens[columns % len(tokens)])
    ids = torch.stack(rows)
    if left_alignable or bool(batch.attention_mask.all()):
        return ids, torch.ones_like(ids, dtype=torch.bool)
    # Neither ascending nor descending, so that a model which sorts rows by length changes their order.
    lengths = columns.new_tensor([width - 1, width, width - 2]).clamp(min=1).unsqueeze(1)
    left = bool((~batch.attention_mask[:, 0]).any())
    return ids, columns >= width - lengths if left else columns < lengths


def _in_graph(output: Tensor, leaves: Params) -> set[str]:
    """Names of the leaves that the graph of ``output`` leads to."""
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


def _mixed(output: Tensor, recorder: _Recorder) -> set[str]:
    """Names of the uses that put out, where the factors of one row are read, what another row's output depends on."""
    rows = len(output)
    outputs = [use.output for use in recorder.uses]
    if not output.requires_grad or not outputs:
        return set()
    # Without structure: the sum of a layer norm's output, for one, depends on nothing.
    toward = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(output)
    mixed = [torch.zeros((), dtype=torch.bool, device=output.device)] * len(outputs)
    for i in range(rows):
        one = torch.zeros_like(toward).index_copy(0, torch.tensor([i], device=toward.device), toward[i : i + 1])
        grads = torch.autograd.grad(output, outputs, one, allow_unused=True, retain_graph=True)
        for k, g in enumerate(grads):
            if g is not None:
                # Not a number counts too.
                others = _by_row(g, rows)[torch.arange(rows, device=g.device) != i]
                mixed[k] = mixed[k] | (others != 0).any()
    flags = torch.stack(mixed).tolist()
    return {use.name for use, flag in zip(recorder.uses, flags, strict=True) if flag}


def layer_io_bytes_per_token(params: Params, batch: Batch, apply: Apply, names: frozenset[str]) -> int:
    """What the factors of ``names`` take for one token of one row, at most."""
    policy, (ids, mask) = split_policy(apply), _probe_rows(batch, left_alignable=True)
    body = _Recorder(params, ids.shape, names)
    with torch.no_grad(), body:
        features = policy.backbone_eager(params, ids, mask)
    head = _seen_in_head(params, features, policy, names)
    held = {
        id(x): x.numel() * x.element_size()
        for use in (*body.uses, *head.uses)
        for x in (use.inputs, use.output)
        if x is not None
    }
    return sum(held.values()) // ids.numel()
