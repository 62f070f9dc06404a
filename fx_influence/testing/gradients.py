"""Gradients by parameter name, one scalar at a time, and arithmetic on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fx_influence.testing.scores import score_row, token_losses
from fx_influence.types import Apply, Batch, Gradients, Params


def gradient(scalar: Tensor, params: Params) -> Gradients:
    """Return d scalar / d theta by name; ``None`` where the scalar does not depend on the parameter."""
    grads = torch.autograd.grad(scalar, list(params.values()), retain_graph=True, allow_unused=True)
    return dict(zip(params, grads, strict=True))


def inner(a: Mapping[str, Tensor | None], b: Mapping[str, Tensor | None]) -> float:
    """Return <a, b> over the names that both have; ``None`` is zero."""
    total = 0.0
    for name, x in a.items():
        y = b.get(name)
        if x is not None and y is not None:
            total += float((x.double() * y.double()).sum())
    return total


def add(gradients: Sequence[Gradients]) -> Gradients:
    """Return the sum of gradients by name; ``None`` only where every one of them is ``None``."""
    total: Gradients = {}
    for g in gradients:
        for name, x in g.items():
            old = total.get(name)
            total[name] = x if old is None else old if x is None else old + x
    return total


def scale(gain: Params, g: Gradients) -> Gradients:
    """Return gain * g, coordinate by coordinate."""
    return {name: None if x is None else gain[name] * x for name, x in g.items()}


def tracked(params: Params) -> Params:
    """Return the same values as leaves that require gradients."""
    return {name: p.detach().clone().requires_grad_(True) for name, p in params.items()}


def sequence_gradients(apply: Apply, params: Params, batch: Batch, temperature: float = 1.0) -> list[Gradients]:
    """Return g_i = grad l_i for each row, l_i = -sum_t (c_it log pi(y_it) + b_it h_it), with L's sign and no 1/n.

    Args:
        apply: the policy.
        params: theta by name.
        batch: (n, T), with coefficients.
        temperature: divisor of the logits.
    """
    params, rows = tracked(params), []
    for i in range(len(batch.input_ids)):
        score = score_row(apply, params, batch, i, temperature)
        rows.append(gradient(sum(token_losses(batch, i, score), score.zero), params))
    return rows
