"""The slow, literal definition of everything: loops, one sequence at a time, one derivative per quantity.

Only tests and benchmarks import this. It shares no code with the fast modules, only the values in ``types``, so that an
oracle cannot share a bug. Every model call sees a batch of one row; every derivative is ``torch.autograd.grad`` of one
scalar; every sum over tokens or sequences is a Python loop; every dot product is float64. Use it with float64 models.

Conventions: nats; a direction v is *per unit learning rate*, theta' = theta + eta v; a token's index k is its rank
among the completion positions of its row (masks may have gaps); what is frozen is a float taken at theta. A batch
without one completion token has no entropy per token: ``ZeroDivisionError``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.types import AdamWState, Apply, Batch, Estimator, Gradients, Normalize, Params, Preconditioner


class RowScore(NamedTuple):
    """One row's completion: ``positions`` (columns), and at each of them a scalar ``logprobs`` and ``entropies``.

    ``nothing`` is a zero that hangs on the row's logits, so a row without tokens still has a (zero) gradient.
    """

    positions: list[int]
    logprobs: list[Tensor]
    entropies: list[Tensor]
    nothing: Tensor


class TokenValues(NamedTuple):
    """``logprobs`` and ``entropies``, (n, T), at completion positions; 0 elsewhere."""

    logprobs: Tensor
    entropies: Tensor


class Step(NamedTuple):
    """``direction`` v, its parts ``momentum`` and ``weight_decay``, the ``gain`` gamma, ``den``, ``clip`` kappa."""

    direction: Params
    momentum: Params
    weight_decay: Params
    gain: Params
    den: Params
    clip: float


class Snis(NamedTuple):
    """Raw change of entropy in nats (not divided by eta), its ``contributions`` (n,), and the weights' diagnostics."""

    delta_h: Tensor
    contributions: Tensor
    ess: Tensor
    log_weights: Tensor
    clip_fraction: Tensor


class Influence(NamedTuple):
    """Nats per unit learning rate; (n_u,), (n_u, T), (n_e, n_u), () four times, (n_u,)."""

    per_sequence: Tensor
    per_token: Tensor
    matrix: Tensor
    baseline: Tensor
    momentum: Tensor
    weight_decay: Tensor
    total: Tensor
    stderr: Tensor


def score_row(apply: Apply, params: Params, batch: Batch, row: int, temperature: float = 1.0) -> RowScore:
    """With z = logits[t-1] / temperature: log pi = z[y_t] - logsumexp z and h = -sum_y pi log pi, where 0 log 0 = 0."""
    logits = apply(params, batch.input_ids[row : row + 1], batch.attention_mask[row : row + 1])[0]
    nothing = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool), 0.0).sum().double()
    score = RowScore([], [], [], nothing)
    for t in range(batch.input_ids.shape[1]):
        if not batch.completion_mask[row, t]:
            continue
        if t == 0:
            raise ValueError("the token in column 0 has no logits that score it")
        z = logits[t - 1].double() / temperature
        possible = z[z > -math.inf]
        log_pi = possible - possible.logsumexp(0)
        score.positions.append(t)
        score.logprobs.append(z[batch.input_ids[row, t]] - possible.logsumexp(0))
        score.entropies.append(-(log_pi.exp() * log_pi).sum())
    return score


def token_values(apply: Apply, params: Params, batch: Batch, temperature: float = 1.0) -> TokenValues:
    """Every row's ``score_row``, padded with zeros to the batch's (n, T)."""
    n, width = batch.input_ids.shape
    logprobs, entropies = torch.zeros(n, width, dtype=torch.float64), torch.zeros(n, width, dtype=torch.float64)
    for i in range(n):
        score = score_row(apply, params, batch, i, temperature)
        for t, log_pi, h in zip(score.positions, score.logprobs, score.entropies, strict=True):
            logprobs[i, t], entropies[i, t] = log_pi.detach(), h.detach()
    return TokenValues(logprobs, entropies)


def gradient(scalar: Tensor, params: Params) -> Gradients:
    """d scalar / d theta by name; ``None`` where the scalar does not reach the parameter."""
    found = torch.autograd.grad(scalar, list(params.values()), retain_graph=True, allow_unused=True)
    return dict(zip(params, found, strict=True))


def inner(a: Mapping[str, Tensor | None], b: Mapping[str, Tensor | None]) -> float:
    """<a, b> over the names both hold; ``None`` is zero."""
    total = 0.0
    for name, x in a.items():
        y = b.get(name)
        if x is not None and y is not None:
            total += float((x.double() * y.double()).sum())
    return total


def add(gradients: Sequence[Gradients]) -> Gradients:
    """Sum of gradients by name; ``None`` only where every one of them is ``None``."""
    total: Gradients = {}
    for g in gradients:
        for name, x in g.items():
            old = total.get(name)
            total[name] = x if old is None else old if x is None else old + x
    return total


def scale(gain: Params, g: Gradients) -> Gradients:
    """gain * g, coordinate by coordinate."""
    return {name: None if x is None else gain[name] * x for name, x in g.items()}


def tracked(params: Params) -> Params:
    """The same values as leaves that gradients can be asked of."""
    return {name: p.detach().clone().requires_grad_(True) for name, p in params.items()}


def token_losses(batch: Batch, row: int, score: RowScore) -> list[Tensor]:
    """One row's token losses l_it = -(c_it log pi(y_it) + b_it h_it), in rank order."""
    if batch.coefficients is None:
        raise ValueError("an update batch needs coefficients")
    losses = []
    for t, log_pi, h in zip(score.positions, score.logprobs, score.entropies, strict=True):
        b = 0.0 if batch.entropy_coefficients is None else float(batch.entropy_coefficients[row, t])
        losses.append(-(float(batch.coefficients[row, t]) * log_pi + b * h))
    return losses


def sequence_gradients(apply: Apply, params: Params, batch: Batch, temperature: float = 1.0) -> list[Gradients]:
    """Per row i, g_i = grad l_i with l_i = -sum_t (c_it log pi(y_it) + b_it h_it): L's own sign, no division by n."""
    params, rows = tracked(params), []
    for i in range(len(batch.input_ids)):
        score = score_row(apply, params, batch, i, temperature)
        rows.append(gradient(sum(token_losses(batch, i, score), score.nothing), params))
    return rows


def adamw(
    grads_per_sequence: Sequence[Gradients],
    state: AdamWState,
    params: Params,
    preconditioner: Preconditioner = "frozen",
    max_grad_norm: float | None = None,
) -> Step:
    """AdamW's direction v = (theta' - theta) / eta and its split v = momentum + weight_decay + sum_i gamma g_i.

    That split holds for "frozen". For "jacobian", gamma is dv/dg with the clip frozen and v is the same. For
    "rmsprop", gamma = -rho/den, v = gamma g and the other parts are 0. For "lifetime", gamma = -rho kappa/den and
    v = gamma g + weight decay. A parameter that the optimizer does not hold, or
    that no sequence's gradient reaches, has 0 everywhere. ``maximize``: the optimizer sees -g, so gamma changes sign.
    """
    g = add(grads_per_sequence)
    norm = math.sqrt(inner(g, g))
    clip = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))
    step = Step({}, {}, {}, {}, {}, clip)
    for name, theta in params.items():
        grad_name = g.get(name)
        for part in (step.direction, step.momentum, step.weight_decay, step.gain):
            part[name] = torch.zeros_like(theta)
        step.den[name] = torch.full_like(theta, math.inf)
        if name not in state.exp_avg or grad_name is None:
            continue
        hyper, tau = state.hyper[name], state.step[name] + 1
        beta1, beta2, rho = hyper.beta1, hyper.beta2, hyper.lr_scale
        bias1, bias2 = 1 - beta1**tau, 1 - beta2**tau
        sign = -1.0 if hyper.maximize else 1.0
        g_hat = sign * clip * grad_name
        m_old, theta = state.exp_avg[name], theta.detach()
        m = beta1 * m_old + (1 - beta1) * g_hat
        s = beta2 * state.exp_avg_sq[name] + (1 - beta2) * g_hat**2
        s_used = torch.maximum(state.max_exp_avg_sq[name], s) if hyper.amsgrad else s
        den = (s_used / bias2).sqrt() + hyper.eps
        step.den[name] = den
        if preconditioner == "rmsprop":
            step.gain[name] = -sign * rho / den
            step.direction[name] = step.gain[name] * grad_name
            continue
        if preconditioner == "lifetime":
            step.gain[name] = -sign * rho * clip / den
            step.weight_decay[name] = -rho * hyper.weight_decay * theta
            step.direction[name] = step.gain[name] * grad_name + step.weight_decay[name]
            continue
        step.direction[name] = rho * (-(m / bias1) / den - hyper.weight_decay * theta)
        step.momentum[name] = -rho * beta1 * m_old / (bias1 * den)
        step.weight_decay[name] = -rho * hyper.weight_decay * theta
        slope = (1 - beta1) / (bias1 * den)
        if preconditioner == "jacobian":
            root = (s / bias2).sqrt()
            second_derivative = (m / bias1) * (1 - beta2) * g_hat / (bias2 * root * den**2)
            slope = slope - torch.where(
                (root == 0) | (s_used > s), torch.zeros_like(second_derivative), second_derivative
            )
        step.gain[name] = -sign * rho * clip * slope
    return step


def weights_at(ratios: Sequence[Sequence[float]], rank: int | None, clip: float | None) -> list[float]:
    """Every row's exp(sum of its first ``rank`` log ratios, clipped to +-clip): of all, if fewer or ``None``."""
    bound = math.inf if clip is None else clip
    return [math.exp(max(-bound, min(bound, sum(d[:rank])))) for d in ratios]


def entropy(
    entropies: Sequence[Sequence[float]],
    ratios: Sequence[Sequence[float]],
    estimator: Estimator = "per_decision",
    normalize: Normalize = "token",
    clip: float | None = 10.0,
) -> tuple[float, float]:
    """(H-hat, D): the weighted entropy estimate, and the denominator of its contributions.

    ``entropies[a][k]`` is h of row a's token of rank k and ``ratios[a][k]`` its log pi_theta'(y) - log pi_theta(y).
    sequence: sum w_a h_a / D with D = sum w_a f_a. per_decision: sum_k sum_a w_ak h_ak / W_k over D, which is
    sum_k sum_a w_ak 1[k < T_a] / W_k per token and 1 per sequence.
    """
    n, total, d = len(entropies), 0.0, 0.0
    if estimator == "sequence":
        w = weights_at(ratios, None, clip)
        for a in range(n):
            total += w[a] * sum(entropies[a])
            d += w[a] * (len(entropies[a]) if normalize == "token" else 1)
        return total / d, d
    for k in range(max(len(h) for h in entropies)):
        w = weights_at(ratios, k, clip)
        for a in range(n):
            if k < len(entropies[a]):
                total += w[a] * entropies[a][k] / sum(w)
                d += w[a] / sum(w)
    d = d if normalize == "token" else 1.0
    return total / d, d


class Centre(NamedTuple):
    """What is subtracted, frozen at theta: H-hat, and for each rank the mean over all rows of h and of 1[k < T_a]."""

    h_hat: float
    h_mean: list[float]
    ok_mean: list[float]


def centre(entropies: Sequence[Sequence[float]], estimator: Estimator, normalize: Normalize) -> Centre:
    """The centre of a batch from its token entropies at theta."""
    n, ranks = len(entropies), range(max(len(h) for h in entropies))
    h_mean = [sum(h[k] for h in entropies if k < len(h)) / n for k in ranks]
    ok_mean = [sum(1 for h in entropies if k < len(h)) / n for k in ranks]
    return Centre(entropy(entropies, [[0.0] * len(h) for h in entropies], estimator, normalize)[0], h_mean, ok_mean)


def centred_sequence(h: Sequence[float], c: Centre, normalize: Normalize) -> float:
    """x_a = h_a - H-hat f_a."""
    return sum(h) - c.h_hat * (len(h) if normalize == "token" else 1)


def centred_token(h: Sequence[float], k: int, c: Centre, normalize: Normalize) -> float:
    """x_ak = h_ak - mean h_k, per token less H-hat (ok_ak - mean ok_k); h = ok = 0 once finished."""
    x = (h[k] if k < len(h) else 0.0) - c.h_mean[k]
    return x - c.h_hat * ((1.0 if k < len(h) else 0.0) - c.ok_mean[k]) if normalize == "token" else x


def snis_delta(
    apply: Apply,
    params: Params,
    direction: Mapping[str, Tensor],
    eta: float,
    batch: Batch,
    estimator: Estimator = "per_decision",
    normalize: Normalize = "token",
    clip: float | None = 10.0,
    temperature: float = 1.0,
) -> Snis:
    """H-hat(theta + eta v) - H-hat(theta) on one batch, both evaluated; a name absent from ``direction`` stays put.

    contribution_a = [w_a x_a(theta') - x_a] / D (sequence), sum_k [w_ak x_ak(theta') - x_ak] / (W_k D) (per_decision).
    """
    moved = {name: p + eta * direction[name] if name in direction else p for name, p in params.items()}
    n, before, after, ratios = len(batch.input_ids), [], [], []
    for a in range(n):
        with torch.no_grad():
            old, new = (score_row(apply, at, batch, a, temperature) for at in (params, moved))
        before.append([float(h) for h in old.entropies])
        after.append([float(h) for h in new.entropies])
        ratios.append([float(q) - float(p) for p, q in zip(old.logprobs, new.logprobs, strict=True)])
    c = centre(before, estimator, normalize)
    h_new, d = entropy(after, ratios, estimator, normalize, clip)
    contributions, ess, clipped = [0.0] * n, [], []
    for k in [None] if estimator == "sequence" else range(len(c.h_mean)):
        w = weights_at(ratios, k, clip)
        ess.append(sum(w) ** 2 / sum(x * x for x in w))
        for a in range(n):
            if k is None:
                new_x, old_x = (centred_sequence(h[a], c, normalize) for h in (after, before))
                contributions[a] += (w[a] * new_x - old_x) / d
            else:
                new_x, old_x = (centred_token(h[a], k, c, normalize) for h in (after, before))
                contributions[a] += (w[a] * new_x - old_x) / (d * sum(w))
            if k is None or k < len(before[a]):
                clipped.append(clip is not None and abs(sum(ratios[a][:k])) > clip)
    fraction = sum(clipped) / max(1, len(clipped))
    values = (h_new - c.h_hat, contributions, min(ess, default=float(n)), [sum(r) for r in ratios], fraction)
    return Snis(*(torch.tensor(x, dtype=torch.float64) for x in values))


def surrogates(
    apply: Apply,
    params: Params,
    batch: Batch,
    estimator: Estimator = "per_decision",
    normalize: Normalize = "token",
    temperature: float = 1.0,
) -> list[Tensor]:
    """Per row, the differentiable scalar s_a whose gradients sum to that of H-hat; the centre is frozen at theta.

    sequence: s_a = (h_a + S_a x_a) / sum f. per_decision: s_a = (1/Z) sum_k (h_ak + S_a,<k x_ak) with Z = sum T or n;
    k runs over all ranks of the batch, also those after the row has finished.
    """
    scores = [score_row(apply, params, batch, a, temperature) for a in range(len(batch.input_ids))]
    frozen = [[float(h.detach()) for h in score.entropies] for score in scores]
    c = centre(frozen, estimator, normalize)
    z = sum(len(h) for h in frozen) if normalize == "token" else len(frozen)
    rows = []
    for score, h in zip(scores, frozen, strict=True):
        s = sum(score.entropies, score.nothing)
        if estimator == "sequence":
            s = s + sum(score.logprobs, score.nothing) * centred_sequence(h, c, normalize)
        else:
            for k in range(len(c.h_mean)):
                s = s + sum(score.logprobs[:k], score.nothing) * centred_token(h, k, c, normalize)
        rows.append(s / z)
    return rows


def entropy_gradients(
    apply: Apply,
    params: Params,
    batch: Batch,
    estimator: Estimator = "per_decision",
    normalize: Normalize = "token",
    temperature: float = 1.0,
) -> list[Gradients]:
    """Per evaluation row, grad s_a; their sum is the gradient of H-hat."""
    params = tracked(params)
    return [gradient(s, params) for s in surrogates(apply, params, batch, estimator, normalize, temperature)]


def standard_error(matrix: Tensor, lengths: Sequence[int], group: Tensor | None, normalize: Normalize) -> Tensor:
    """stderr_i of delta_i = sum_a M_ai over the draw of E, by clusters c (E's groups, or its rows where it has none).

    stderr_i^2 = C/(C-1) sum_c (sum_{a in c} (M_ai - delta_i f_a / sum f))^2; NaN if C < 2. M is (n_e, n_u).
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
    """delta_i = <grad H-hat, gamma g_i> for every update row i, with M_ai = <grad s_a, gamma g_i> and delta_it.

    delta_it is <gamma grad H-hat, grad l_it> for the token's own loss l_it, at its column. total = <grad H-hat, v>;
    momentum and weight_decay likewise; baseline is their sum, for "jacobian" total - sum_i delta_i.
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
    total, momentum, decay = (inner(grad_h, part) for part in (step.direction, step.momentum, step.weight_decay))
    baseline = total - float(matrix.sum()) if preconditioner == "jacobian" else momentum + decay
    stderr = standard_error(matrix, batch_e.completion_mask.sum(1).tolist(), batch_e.group, normalize)
    scalars = [torch.tensor(x, dtype=torch.float64) for x in (baseline, momentum, decay, total)]
    return Influence(matrix.sum(0), per_token, matrix, scalars[0], scalars[1], scalars[2], scalars[3], stderr)


def adam_diagonals(state: AdamWState, step: Step | None = None) -> Params:
    """The Fisher kernel's P by name: 1/den of the step, or without one 1/(sqrt(s / (1 - beta2^step)) + eps).

    rho is not in it. Only parameters that the optimizer holds are in it. Under amsgrad its maximum stands for s.
    """
    if step is not None:
        return {name: 1 / step.den[name] for name in state.exp_avg}
    diagonals = {}
    for name, s in state.exp_avg_sq.items():
        hyper = state.hyper[name]
        used = state.max_exp_avg_sq[name] if hyper.amsgrad else s
        diagonals[name] = 1 / ((used / (1 - hyper.beta2 ** state.step[name])).sqrt() + hyper.eps)
    return diagonals


def fisher_kernel(
    apply: Apply,
    params: Params,
    batch_a: Batch,
    batch_b: Batch,
    diagonals: Params | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """K_ai = <grad S_a, P grad S_i>, (n_a, n_b), S = sum_t log pi; P by name (absent: 0), ``None``: identity."""
    params = tracked(params)
    sides: list[list[Gradients]] = []
    for batch in (batch_a, batch_b):
        rows = [score_row(apply, params, batch, a, temperature) for a in range(len(batch.input_ids))]
        sides.append([gradient(sum(row.logprobs, row.nothing), params) for row in rows])
    p = {name: torch.ones_like(x) for name, x in params.items()} if diagonals is None else diagonals
    return torch.tensor(
        [[inner(x, scale(p, {k: v for k, v in y.items() if k in p})) for y in sides[1]] for x in sides[0]],
        dtype=torch.float64,
    )
