"""The influence of every rollout and token, from one gradient per sequence and token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.testing.adamw import adamw
from fx_influence.testing.entropy import entropy_gradients
from fx_influence.testing.gradients import add, gradient, inner, scale, sequence_gradients, tracked
from fx_influence.testing.scores import score_row, token_losses
from fx_influence.types import AdamWState, Apply, Batch, Estimator, Normalize, Params, Preconditioner


class Influence(NamedTuple):
    """Influences in nats per unit learning rate.

    ``per_sequence``: (n_u,). ``per_token``: (n_u, T). ``matrix``: (n_e, n_u). ``baseline``, ``momentum``,
    ``weight_decay``, ``total``: scalars. ``stderr``: (n_u,).
    """

    per_sequence: Tensor
    per_token: Tensor
    matrix: Tensor
    baseline: Tensor
    momentum: Tensor
    weight_decay: Tensor
    total: Tensor
    stderr: Tensor


def standard_error(matrix: Tensor, lengths: Sequence[int], group: Tensor | None, normalize: Normalize) -> Tensor:
    """Return stderr_i of delta_i = sum_a M_ai over the draw of E, by clusters c: E's groups, or its rows without any.

    stderr_i^2 = C/(C-1) sum_c (sum_{a in c} (M_ai - delta_i f_a / sum f))^2; NaN if C < 2.

    Args:
        matrix: M, (n_e, n_u).
        lengths: completion tokens of each row of E.
        group: (n_e,), the cluster of each row; None: every row is one.
        normalize: ``"token"`` (f_a is the length) or ``"sequence"`` (f_a is 1).
    """
    f = [float(length) if normalize == "token" else 1.0 for length in lengths]
    labels = list(range(len(f))) if group is None else group.tolist()
    count = len(set(labels))
    errors = []
    for i in range(matrix.shape[1]):
        column, total = matrix[:, i].tolist(), 0.0
        for label in set(labels):
            members = [a for a in range(len(f)) if labels[a] == label]
            total += sum(column[a] - sum(column) * f[a] / sum(f) for a in members) ** 2
        errors.append(math.sqrt(count / (count - 1) * total) if count >= 2 else math.nan)
    return torch.tensor(errors, dtype=torch.float64)


def influence(
    apply: Apply,
    params: Params,
    batch_u: Batch,
    batch_e: Batch,
    state: AdamWState,
    estimator: Estimator = "per_decision",
    normalize: Normalize = "token",
    preconditioner: Preconditioner = "frozen",
    temperature: float = 1.0,
    max_grad_norm: float | None = None,
) -> Influence:
    """Return delta_i = <grad H-hat, gamma g_i> for every update row i, M_ai = <grad s_a, gamma g_i> and delta_it.

    delta_it is <gamma grad H-hat, grad l_it> for the token's own loss l_it, at its column. total = <grad H-hat, v>;
    momentum and weight_decay likewise; baseline is their sum, for "jacobian" total - sum_i delta_i.

    Args:
        apply: the policy.
        params: theta by name.
        batch_u: (n_u, T), the update batch, with coefficients.
        batch_e: (n_e, T), the evaluation batch.
        state: the optimizer's state before the step.
        estimator: ``"per_decision"`` or ``"sequence"``.
        normalize: ``"token"`` or ``"sequence"``.
        preconditioner: which diagonal gamma.
        temperature: divisor of the logits.
        max_grad_norm: bound on the norm of the gradient; None does not clip.
    """
    params = tracked(params)
    g = sequence_gradients(apply, params, batch_u, temperature)
    step = adamw(g, state, params, preconditioner, max_grad_norm)
    grad_s = entropy_gradients(apply, params, batch_e, estimator, normalize, temperature)
    grad_h = add(grad_s)
    u = scale(step.gain, grad_h)
    matrix = torch.tensor([[inner(s, scale(step.gain, g_i)) for g_i in g] for s in grad_s], dtype=torch.float64)
    per_token = torch.zeros(batch_u.input_ids.shape, dtype=torch.float64)
    for i in range(len(g)):
        score = score_row(apply, params, batch_u, i, temperature)
        for t, loss in zip(score.positions, token_losses(batch_u, i, score), strict=True):
            per_token[i, t] = inner(u, gradient(loss, params))
    total, momentum, decay = (inner(grad_h, v) for v in (step.direction, step.momentum, step.weight_decay))
    baseline = total - float(matrix.sum()) if preconditioner == "jacobian" else momentum + decay
    stderr = standard_error(matrix, batch_e.completion_mask.sum(1).tolist(), batch_e.group, normalize)
    scalars = [torch.tensor(x, dtype=torch.float64) for x in (baseline, momentum, decay, total)]
    return Influence(matrix.sum(0), per_token, matrix, scalars[0], scalars[1], scalars[2], scalars[3], stderr)
