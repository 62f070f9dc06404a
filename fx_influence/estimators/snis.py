"""Self-normalised importance sampling: the entropy at theta + eta v from rollouts that were sampled at theta."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.core.display import record_line
from fx_influence.estimators.entropy import CompletionValues, centred_entropies
from fx_influence.estimators.importance import cumulative_log_weights, importance_weights
from fx_influence.types import Estimator, Normalize


class SnisDelta(NamedTuple):
    """Change of the entropy estimate at a finite step, raw (not divided by eta), nats; all float64.

    ``delta_h``: H(theta + eta v) - H(theta), scalar. ``contributions``: (n_e,), centred terms of E's rows, whose sum
    is ``delta_h`` exactly.
    ``ess``: effective sample size (sum w)^2 / sum w^2, the smallest over t under ``per_decision``.
    ``log_weights``: (n_e,) full-sequence and unclipped, relative to the policy that sampled E. ``clip_fraction``: share
    of the weights that were clipped.
    ``stderr``: of ``delta_h`` over the draw of E, by the jackknife over its clusters, scalar; NaN with fewer than two.
    """

    delta_h: Tensor
    contributions: Tensor
    ess: Tensor
    log_weights: Tensor
    clip_fraction: Tensor
    stderr: Tensor

    def __repr__(self) -> str:
        return record_line(self)


def snis(
    base: CompletionValues,
    moved: CompletionValues,
    estimator: Estimator,
    normalize: Normalize,
    clip: float | None = 10.0,
    clusters: Tensor | None = None,
    behaviour: Tensor | None = None,
) -> SnisDelta:
    """Return the SNIS change of entropy from token values at theta and at theta + eta v.

    ``"sequence"``: w_a = exp(S_a' - S_a) and H' = sum w h / sum w f. ``"per_decision"``: the weight of position t is
    the likelihood ratio of the tokens before it, normalised over all rows at each t; a finished rollout keeps its full
    weight with h = 0. The contributions are centred with the centre frozen at theta:

        sequence:      [w_a x_a' - x_a] / sum_b w_b f_b
        per_decision:  (1/D) sum_t [w_at x_at' - x_at] / W_t,   D = sum_t sum_a w_at ok_at / W_t per token, else 1

    Where another policy sampled E, w is relative to that policy, w at theta multiplies x_a and x_at, and H and the
    centres at theta are weighted by it.

    Works under vmap and forward-mode differentiation over leading axes of ``moved``.

    Args:
        base: (n, R), values at theta, which E was sampled from unless ``behaviour`` is given.
        moved: (n, R), values at theta + eta v.
        estimator: ``"per_decision"`` or ``"sequence"``.
        normalize: ``"token"`` or ``"sequence"``.
        clip: bound on |cumulative log-weight|; None does not clip.
        clusters: int64 (n,), 0 to C-1, the clusters that the jackknife leaves out one at a time; None skips it.
        behaviour: (n, R), log pi_theta - log pi_behaviour by rank; None where theta sampled E.

    Source:
        Precup, Sutton & Singh 2000 (per-decision weights); Owen, Monte Carlo theory, ch. 9 (SNIS); Efron & Stein 1981
        (jackknife).
    """
    log_ratio = moved.logprobs - base.logprobs
    if behaviour is not None:
        log_ratio = log_ratio + behaviour
    total, prefix = log_ratio.sum(-1), cumulative_log_weights(log_ratio, estimator)
    counted = torch.ones_like(prefix, dtype=torch.bool) if estimator == "sequence" else base.ok
    clipped = torch.zeros_like(prefix, dtype=torch.bool) if clip is None else prefix.abs() > clip

    def weight_of(log_weight: Tensor) -> Tensor:
        return (log_weight if clip is None else log_weight.clamp(-clip, clip)).exp()

    w, w0 = weight_of(prefix), torch.ones_like(cumulative_log_weights(base.logprobs, estimator))
    at_theta = None
    if behaviour is not None:
        w0 = weight_of(cumulative_log_weights(behaviour, estimator))
        at_theta = importance_weights(behaviour, estimator, clip)
    normalised = w / w.sum(0)
    ok = base.ok.double()

    before = centred_entropies(base, estimator, normalize, base, weights=at_theta)
    after = centred_entropies(moved, estimator, normalize, base, weights=at_theta)
    if estimator == "sequence":
        length = ok.sum(-1) if normalize == "token" else torch.ones_like(total)
        denominator = (w.squeeze(-1) * length).sum()
        contributions = (w.squeeze(-1) * after - w0.squeeze(-1) * before) / denominator
    else:
        denominator = (normalised * ok).sum() if normalize == "token" else torch.ones_like(total[0])
        contributions = ((w * after - w0 * before) / w.sum(0)).sum(-1) / denominator
    return SnisDelta(
        delta_h=contributions.sum(),
        contributions=contributions,
        ess=(1 / normalised.square().sum(0)).min(),
        log_weights=total,
        clip_fraction=(clipped & counted).sum().double() / counted.sum().double(),
        stderr=torch.full_like(denominator, torch.nan)
        if clusters is None
        else _jackknife(base, moved, w0, w, estimator, normalize, clusters),
    )


def _jackknife(
    base: CompletionValues,
    moved: CompletionValues,
    w0: Tensor,
    w: Tensor,
    estimator: Estimator,
    normalize: Normalize,
    clusters: Tensor,
) -> Tensor:
    """Return sqrt((C-1)/C sum_c (d_c - mean d)^2), d_c the change of entropy on E without cluster c.

    The weights are normalised again without the cluster. H' is a ratio of sums over rows at each position, so leaving a
    cluster out subtracts its sums.
    """
    count = int(clusters.max()) + 1
    if count < 2:
        return torch.full_like(w.sum(), torch.nan)

    def without_each_cluster(values: CompletionValues, w: Tensor) -> Tensor:
        h, f = values.entropies, values.ok.double()
        if estimator == "sequence":
            h, f = h.sum(-1, keepdim=True), f.sum(-1, keepdim=True)
        weight, entropy, length = (
            x.sum(0) - torch.zeros(count, x.shape[1], dtype=x.dtype, device=x.device).index_add(0, clusters, x)
            for x in (w, w * h, w * f)
        )
        mean = (entropy / weight).sum(-1)
        return mean / (length / weight).sum(-1) if normalize == "token" else mean

    change = without_each_cluster(moved, w) - without_each_cluster(base, w0)
    return ((count - 1) / count * (change - change.mean()).square().sum()).sqrt()
