"""The influence of every rollout and token, from one gradient per sequence and token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.testing.adamw import adamw
from fx_influence.testing.entropy import entropy_gradients, length_gradients
from fx_influence.testing.gradients import add, gradient, inner, scale, sequence_gradients, tracked
from fx_influence.testing.scores import score_row, token_losses
from fx_influence.types import (
    AdamWState,
    Apply,
    Baseline,
    Batch,
    Estimator,
    Gradients,
    Normalize,
    Params,
    Preconditioner,
)


class Influence(NamedTuple):
    """Influences in nats per unit learning rate.

    ``per_sequence``: (n_u,). ``per_token``: (n_u, T). ``matrix``, ``parts``: (n_e, n_u), see
    ``deviating_parts``. ``baseline``, ``momentum``, ``weight_decay``, ``total``: scalars. ``stderr``: (n_u,).
    """

    per_sequence: Tensor
    per_token: Tensor
    matrix: Tensor
    parts: Tensor
    baseline: Tensor
    momentum: Tensor
    weight_decay: Tensor
    total: Tensor
    stderr: Tensor


def deviating_parts(
    apply: Apply,
    params: Params,
    batch_e: Batch,
    matrix: Tensor,
    parts_of_step: Sequence[Gradients],
    estimator: Estimator,
    normalize: Normalize,
    temperature: float,
) -> Tensor:
    """Return M_ai - lambda_i x_a, what row a carries to delta_i with its part in the H that centres E, (n_e, n_u).

    lambda_i = d log E[T] / d eta along v_i and x_a = (h_a - H-hat T_a) / sum T per token; both are 0 per sequence.

    Args:
        apply: the policy.
        params: theta by name.
        batch_e: (n_e, T), the evaluation batch.
        matrix: M, (n_e, n_u).
        parts_of_step: v_i by name, of every row of U.
        estimator: ``"per_decision"`` or ``"sequence"``.
        normalize: ``"token"`` or ``"sequence"``.
        temperature: divisor of the logits.
    """
    if normalize == "sequence":
        return matrix
    lengths = add(length_gradients(apply, params, batch_e, estimator, temperature))
    rows = [score_row(apply, params, batch_e, a, temperature).entropies for a in range(len(matrix))]
    h, t = [sum(float(x.detach()) for x in row) for row in rows], [len(row) for row in rows]
    excess = [(h[a] - sum(h) / sum(t) * t[a]) / sum(t) for a in range(len(rows))]
    slopes = [inner(lengths, v) for v in parts_of_step]
    moved = [[excess[a] * slopes[i] for i in range(matrix.shape[1])] for a in range(len(rows))]
    return matrix - torch.tensor(moved, dtype=torch.float64)


def standard_error(parts: Tensor, lengths: Sequence[int], group: Tensor | None, normalize: Normalize) -> Tensor:
    """Return stderr_i of delta_i = sum_a parts_ai over the draw of E, by its clusters c: groups, or rows without any.

    stderr_i^2 = C/(C-1) sum_c (sum_{a in c} (parts_ai - delta_i f_a / sum f))^2; NaN if C < 2.

    Args:
        parts: (n_e, n_u), see ``deviating_parts``.
        lengths: completion tokens of each row of E.
        group: (n_e,), the cluster of each row; None: every row is one.
        normalize: ``"token"`` (f_a is the length) or ``"sequence"`` (f_a is 1).
    """
    f = [float(length) if normalize == "token" else 1.0 for length in lengths]
    labels = list(range(len(f))) if group is None else group.tolist()
    count = len(set(labels))
    errors = []
    for i in range(parts.shape[1]):
        column, total = parts[:, i].tolist(), 0.0
        for label in set(labels):
            members = [a for a in range(len(f)) if labels[a] == label]
            total += sum(column[a] - sum(column) * f[a] / sum(f) for a in members) ** 2
        errors.append(math.sqrt(count / (count - 1) * total) if count >= 2 else math.nan)
    return torch.tensor(errors, dtype=torch.float64)


class CrossFitted(NamedTuple):
    """Influences over the other folds: ``per_sequence`` (n,), ``stderr`` (n,), in nats per unit learning rate."""

    per_sequence: Tensor
    stderr: Tensor


def cross_fitted(
    parts: Tensor, lengths: Sequence[int], fold: Sequence[int], left_out: Sequence[int], normalize: Normalize
) -> CrossFitted:
    """Return delta_i over the rows of E outside i's own fold, and its standard error over the other folds.

    delta_i = sum_{a not in fold} parts_ai / (1 - share of the fold); with C the number of other folds,
    stderr_i^2 = C/(C-1) sum_{k other} (sum_{a in k} (parts_ai - delta_i share_a) / (1 - share of the fold))^2.

    Args:
        parts: (n_e, n_u), see ``deviating_parts``.
        lengths: completion tokens of each row of E.
        fold: the fold of each row of E.
        left_out: the fold that each row of U leaves out.
        normalize: ``"token"`` (shares by length) or ``"sequence"`` (by row).
    """
    f = [float(length) if normalize == "token" else 1.0 for length in lengths]
    share = [x / sum(f) for x in f]
    deltas, errors = [], []
    for i in range(parts.shape[1]):
        others = [a for a in range(len(f)) if fold[a] != left_out[i]]
        left = sum(share[a] for a in others)
        delta = sum(float(parts[a, i]) for a in others) / left
        squares = []
        for k in set(fold) - {left_out[i]}:
            members = [a for a in others if fold[a] == k]
            squares.append(sum((float(parts[a, i]) - delta * share[a]) / left for a in members) ** 2)
        deltas.append(delta)
        errors.append(math.sqrt(len(squares) / (len(squares) - 1) * sum(squares)))
    return CrossFitted(torch.tensor(deltas, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64))


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
    baseline: Baseline = "batch",
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
        baseline: of the score term, ``"batch"``, ``"prompt"`` or ``"shrunk"``.
    """
    params = tracked(params)
    g = sequence_gradients(apply, params, batch_u, temperature)
    step = adamw(g, state, params, preconditioner, max_grad_norm)
    grad_s = entropy_gradients(apply, params, batch_e, estimator, normalize, temperature, baseline)
    grad_h = add(grad_s)
    u = scale(step.gain, grad_h)
    matrix = torch.tensor([[inner(s, scale(step.gain, g_i)) for g_i in g] for s in grad_s], dtype=torch.float64)
    per_token = torch.zeros(batch_u.input_ids.shape, dtype=torch.float64)
    for i in range(len(g)):
        score = score_row(apply, params, batch_u, i, temperature)
        for t, loss in zip(score.positions, token_losses(batch_u, i, score), strict=True):
            per_token[i, t] = inner(u, gradient(loss, params))
    total, momentum, decay = (inner(grad_h, v) for v in (step.direction, step.momentum, step.weight_decay))
    without_u = total - float(matrix.sum()) if preconditioner == "jacobian" else momentum + decay
    v = [scale(step.gain, g_i) for g_i in g]
    parts = deviating_parts(apply, params, batch_e, matrix, v, estimator, normalize, temperature)
    stderr = standard_error(parts, batch_e.completion_mask.sum(1).tolist(), batch_e.group, normalize)
    scalars = [torch.tensor(x, dtype=torch.float64) for x in (without_u, momentum, decay, total)]
    return Influence(matrix.sum(0), per_token, matrix, parts, scalars[0], scalars[1], scalars[2], scalars[3], stderr)
