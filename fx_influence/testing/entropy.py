"""Entropy estimates by importance sampling, in loops over tokens and sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.testing.gradients import gradient, tracked
from fx_influence.testing.scores import score_row
from fx_influence.types import Apply, Baseline, Batch, Estimator, Gradients, Normalize, Params


class Snis(NamedTuple):
    """Raw change of entropy in nats, not divided by eta, its ``contributions`` (n,), and the weights' diagnostics."""

    delta_h: Tensor
    contributions: Tensor
    ess: Tensor
    log_weights: Tensor
    clip_fraction: Tensor


def weights_at(ratios: Sequence[Sequence[float]], rank: int | None, clip: float | None) -> list[float]:
    """Return every row's weight exp(sum of its first ``rank`` log ratios), the sum clipped to +-clip.

    All log ratios are summed where a row has fewer than ``rank``.

    Args:
        ratios: log ratios by row and rank.
        rank: number of log ratios; ``None``: all of the row.
        clip: bound on |cumulative log-weight|; None does not clip.
    """
    bound = math.inf if clip is None else clip
    return [math.exp(max(-bound, min(bound, sum(d[:rank])))) for d in ratios]


def entropy(
    entropies: Sequence[Sequence[float]],
    ratios: Sequence[Sequence[float]],
    estimator: Estimator = "per_decision",
    normalize: Normalize = "token",
    clip: float | None = 10.0,
) -> tuple[float, float]:
    """Return (H-hat, D): the weighted entropy estimate, and the denominator of its contributions.

    ``entropies[a][k]`` is h of row a's token of rank k and ``ratios[a][k]`` its log pi_theta'(y) - log pi_theta(y).
    sequence: sum w_a h_a / D with D = sum w_a f_a. per_decision: sum_k sum_a w_ak h_ak / W_k over D, which is
    sum_k sum_a w_ak 1[k < T_a] / W_k per token and 1 per sequence.

    Args:
        entropies: nats by row and rank.
        ratios: log ratios by row and rank.
        estimator: ``"per_decision"`` or ``"sequence"``.
        normalize: ``"token"`` or ``"sequence"``.
        clip: bound on |cumulative log-weight|; None does not clip.
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
    """Centre of the contributions, frozen at theta: H-hat, and by rank the means over rows of h and of 1[k < T_a]."""

    h_hat: float
    h_mean: list[float]
    ok_mean: list[float]


def centre(entropies: Sequence[Sequence[float]], estimator: Estimator, normalize: Normalize) -> Centre:
    """Return the centre of a batch from its token entropies at theta.

    Args:
        entropies: nats by row and rank.
        estimator: ``"per_decision"`` or ``"sequence"``.
        normalize: ``"token"`` or ``"sequence"``.
    """
    n, ranks = len(entropies), range(max(len(h) for h in entropies))
    h_mean = [sum(h[k] for h in entropies if k < len(h)) / n for k in ranks]
    ok_mean = [sum(1 for h in entropies if k < len(h)) / n for k in ranks]
    return Centre(entropy(entropies, [[0.0] * len(h) for h in entropies], estimator, normalize)[0], h_mean, ok_mean)


def centred_sequence(h: Sequence[float], c: Centre, normalize: Normalize) -> float:
    """Return x_a = h_a - H-hat f_a.

    Args:
        h: the row's token entropies by rank.
        c: the centre of the batch.
        normalize: ``"token"`` (f_a is the length) or ``"sequence"`` (f_a is 1).
    """
    return sum(h) - c.h_hat * (len(h) if normalize == "token" else 1)


def centred_token(h: Sequence[float], k: int, c: Centre, normalize: Normalize) -> float:
    """Return x_ak = h_ak - mean h_k, minus H-hat (ok_ak - mean ok_k) if per token; h = ok = 0 once finished.

    Args:
        h: the row's token entropies by rank.
        k: the rank.
        c: the centre of the batch.
        normalize: ``"token"`` or ``"sequence"``.
    """
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
    """Return H-hat(theta + eta v) - H-hat(theta) on one batch; names absent from ``direction`` are not moved.

    contribution_a = [w_a x_a(theta') - x_a] / D (sequence), sum_k [w_ak x_ak(theta') - x_ak] / (W_k D) (per_decision).

    Args:
        apply: the policy.
        params: theta by name.
        direction: v by name.
        eta: size of the step.
        batch: (n, T), sampled at theta.
        estimator: ``"per_decision"`` or ``"sequence"``.
        normalize: ``"token"`` or ``"sequence"``.
        clip: bound on |cumulative log-weight|; None does not clip.
        temperature: divisor of the logits.
    """
    moved = {name: p + eta * direction[name] if name in direction else p for name, p in params.items()}
    n, before, after, ratios = len(batch.input_ids), [], [], []
    for a in range(n):
        with torch.no_grad():
            old, new = (score_row(apply, theta, batch, a, temperature) for theta in (params, moved))
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
    baseline: Baseline = "batch",
    score: float = 1.0,
) -> list[Tensor]:
    """Return the differentiable scalar s_a of each row; their gradients sum to that of H-hat, with a frozen centre.

    sequence: s_a = (h_a + S_a x_a) / sum f. per_decision: s_a = (1/Z) sum_k (h_ak + S_a,<k x_ak) with Z = sum T or n;
    k runs over all ranks of the batch, also those after the row has finished.

    Args:
        apply: the policy.
        params: theta by name.
        batch: (n, T), sampled at theta.
        estimator: ``"per_decision"`` or ``"sequence"``.
        normalize: ``"token"`` or ``"sequence"``.
        temperature: divisor of the logits.
        baseline: ``"batch"``, ``"prompt"`` for means over the group's other rows, or ``"shrunk"``.
        score: factor of S.
    """
    scores = [score_row(apply, params, batch, a, temperature) for a in range(len(batch.input_ids))]
    frozen = [[float(h.detach()) for h in score.entropies] for score in scores]
    everything = centre(frozen, estimator, normalize)
    z = sum(len(h) for h in frozen) if normalize == "token" else len(frozen)
    rows = []
    ranks = range(len(everything.h_mean))
    if baseline == "shrunk":
        assert batch.group is not None
        h_hat = everything.h_hat if normalize == "token" else 0.0
        by_rank = [[h[k] - h_hat if k < len(h) else 0.0 for k in ranks] for h in frozen]
        y = by_rank if estimator == "per_decision" else [[sum(row)] for row in by_rank]
        shrunk = shrunk_baselines(y, batch.group.tolist())
    for a, (of_row, h) in enumerate(zip(scores, frozen, strict=True)):
        c = everything
        f = len(h) if normalize == "token" else 1
        x = centred_sequence(h, c, normalize)
        if baseline == "prompt":
            assert batch.group is not None
            groups = batch.group.tolist()
            others = [frozen[b] for b in range(len(frozen)) if b != a and groups[b] == groups[a]] or frozen
            c = Centre(
                everything.h_hat,
                [sum(o[k] for o in others if k < len(o)) / len(others) for k in range(len(everything.h_mean))],
                [sum(1 for o in others if k < len(o)) / len(others) for k in range(len(everything.h_mean))],
            )
            of_others = [sum(o) - everything.h_hat * (len(o) if normalize == "token" else f) for o in others]
            x = x - sum(of_others) / len(others)
        terms = [x] if estimator == "sequence" else [centred_token(h, k, c, normalize) for k in ranks]
        if baseline == "shrunk":
            terms = [of_y - b for of_y, b in zip(y[a], shrunk[a], strict=True)]
        s = sum(of_row.entropies, of_row.zero)
        for k, term in enumerate(terms):
            prefix = of_row.logprobs if estimator == "sequence" else of_row.logprobs[:k]
            s = s + score * sum(prefix, of_row.zero) * term
        rows.append(s / z)
    return rows


def shrunk_baselines(y: Sequence[Sequence[float]], groups: Sequence[int]) -> list[list[float]]:
    """Return (1 - lambda) mean of the group's other rows + lambda mean of all other groups' rows, for each row.

    lambda = v / (v + tau^2), v = sigma^2 / (m - 1), for a group of m rows, the variances by a one-way analysis of
    variance over the other groups, summed over ranks. A row alone in its group takes lambda 1; fewer than two other
    groups, 0.

    Args:
        y: values by row and rank.
        groups: of each row.
    """
    ranks, baselines = range(len(y[0])), []

    def mean(rows: Sequence[Sequence[float]]) -> list[float]:
        return [sum(row[k] for row in rows) / max(1, len(rows)) for k in ranks]

    def distance(a: Sequence[float], b: Sequence[float]) -> float:
        return sum((p - q) ** 2 for p, q in zip(a, b, strict=True))

    for a in range(len(y)):
        siblings = [y[b] for b in range(len(y)) if b != a and groups[b] == groups[a]]
        others = [[y[b] for b in range(len(y)) if groups[b] == g] for g in sorted(set(groups) - {groups[a]})]
        beside = [row for rows in others for row in rows]
        share = 0.0
        if siblings and len(others) >= 2:
            n, k = len(beside), len(others)
            within = sum(distance(row, mean(rows)) for rows in others for row in rows)
            between = sum(len(rows) * distance(mean(rows), mean(beside)) for rows in others)
            sigma2 = within / (n - k) if n > k else 0.0
            each = (n - sum(len(rows) ** 2 for rows in others) / n) / (k - 1)
            tau2 = max(0.0, (between / (k - 1) - sigma2) / each)
            v = sigma2 / len(siblings)
            share = v / (v + tau2) if v + tau2 > 0 else 0.0
        elif not siblings:
            share = 1.0
        of_siblings, of_others = mean(siblings), mean(beside)
        baselines.append([(1 - share) * of_siblings[k] + share * of_others[k] for k in ranks])
    return baselines


def entropy_gradients(
    apply: Apply,
    params: Params,
    batch: Batch,
    estimator: Estimator = "per_decision",
    normalize: Normalize = "token",
    temperature: float = 1.0,
    baseline: Baseline = "batch",
    score: float = 1.0,
) -> list[Gradients]:
    """Return grad s_a for every evaluation row; their sum is the gradient of H-hat.

    The arguments are those of ``surrogates``.
    """
    params = tracked(params)
    rows = surrogates(apply, params, batch, estimator, normalize, temperature, baseline, score)
    return [gradient(s, params) for s in rows]


def length_gradients(
    apply: Apply, params: Params, batch: Batch, estimator: Estimator = "per_decision", temperature: float = 1.0
) -> list[Gradients]:
    """Return each row's term of the gradient of log E[T], by the score function with the batch's mean as baseline.

    sequence: S_a (T_a - mean T) / sum T. per_decision: sum_k S_a,<k (1[k < T_a] - mean_b 1[k < T_b]) / sum T.

    Args:
        apply: the policy.
        params: theta by name.
        batch: (n, T), sampled at theta.
        estimator: ``"per_decision"`` or ``"sequence"``.
        temperature: divisor of the logits.
    """
    params = tracked(params)
    n = len(batch.input_ids)
    scores = [score_row(apply, params, batch, a, temperature) for a in range(n)]
    lengths = [len(score.entropies) for score in scores]
    gradients = []
    for score, length in zip(scores, lengths, strict=True):
        s = score.zero
        if estimator == "sequence":
            s = s + sum(score.logprobs, score.zero) * (length - sum(lengths) / n)
        else:
            for k in range(max(lengths)):
                mean = sum(1 for other in lengths if k < other) / n
                s = s + sum(score.logprobs[:k], score.zero) * ((1.0 if k < length else 0.0) - mean)
        gradients.append(gradient(s / sum(lengths), params))
    return gradients
