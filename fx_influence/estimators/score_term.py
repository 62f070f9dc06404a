"""The score term of the entropy's derivative: the baselines of its entropies, and the share of it that is taken."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_influence.estimators.deviations import Deviations
from fx_influence.estimators.importance import ImportanceWeights
from fx_influence.estimators.stderr import cluster_index
from fx_influence.types import Baseline, Batch

NEGLIGIBLE = 1e-12
"""Share of the rows' sum of squares below which a variance is taken for rounding."""


def prompt_of_rows(batch: Batch, kind: Baseline) -> Tensor | None:
    """Return the prompt of each row, int64 (n,), or None for a baseline that needs none, without reading any."""
    return None if kind == "batch" else cluster_index(batch)


def baseline_values(
    y: Tensor, kind: Baseline = "batch", prompt: Tensor | None = None, weights: ImportanceWeights | None = None
) -> Tensor:
    """Return the baseline b of entropies y, float64, which broadcasts to the shape of y.

        batch:   mean of y over all rows, a's included
        prompt:  mean over the prompt's other rows; over all rows where it has none
        shrunk:  (1 - lambda) mean over the prompt's other rows + lambda mean over other prompts, see ``shrunk_mean``

    The last two are independent of row a given its prompt, so that E[grad S_a b_a] = 0.

    Args:
        y: (n,) of rows or (n, R) of ranks.
        kind: which baseline.
        prompt: int64 (n,), 0 to C-1, equal for completions of one prompt; "batch" needs none.
        weights: of the rows, in all means, where another policy sampled them.
    """
    w = torch.ones_like(y) if weights is None else weights.shares
    mean = y.mean(0) if weights is None else (w * y).sum(0)
    if kind == "batch":
        return mean
    assert prompt is not None
    if kind == "shrunk":
        return shrunk_mean(y, prompt, weights)
    return _ratio(_sum_of_others(w * y, prompt), _sum_of_others(w, prompt), mean)


def shrunk_mean(y: Tensor, prompt: Tensor, weights: ImportanceWeights | None = None) -> Tensor:
    """Return (1 - lambda_p) mean of the prompt's other rows + lambda_p mean of all other prompts' rows, shape of y.

    A prompt's rows vary by sigma^2 about its mean, and the means of prompts by tau^2. Of baselines of this form the one
    nearest to the mean of prompt p, in squared error, has

        lambda_p = v / (v + tau^2),   v = sigma^2 / (m_p - 1),   m_p the prompt's rows

    with sigma^2 and tau^2 by the analysis of variance over the other prompts, tau^2 at least 0, so that no row of
    the prompt enters lambda. y of several ranks are shrunk as one vector: both variances are summed over ranks. A
    prompt with a single row takes lambda 1; one that is the only one, or beside a single other, lambda 0.

    Args:
        y: (n,) or (n, R).
        prompt: int64 (n,), 0 to C-1.
        weights: of the rows, in both means, where another policy sampled them; lambda is not weighted.

    Source: Zeng et al. 2025, arXiv 2511.03710 (two-level leave-one-out shrinkage); James & Stein 1961; Searle, Casella
    & McCulloch, Variance components, ch. 3 (unequal numbers of rows).

    Example:
        >>> shrunk_mean(torch.tensor([0.0, 2.0, 0.0, 2.0, 1.0]).double(), torch.tensor([0, 0, 1, 1, 2])).tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    w = torch.ones_like(y) if weights is None else weights.shares
    of_siblings = _ratio(_sum_of_others(w * y, prompt), _sum_of_others(w, prompt), torch.zeros_like(y))
    beside = w.sum(0) - _sums_by_prompt(w, prompt)
    of_others = _ratio((w * y).sum(0) - _sums_by_prompt(w * y, prompt), beside, torch.zeros_like(y[:1]))
    size = _shrinkage(y, prompt)[prompt].reshape(-1, *[1] * (y.ndim - 1))
    return (1 - size) * of_siblings + size * of_others[prompt]


def _shrinkage(y: Tensor, prompt: Tensor) -> Tensor:
    """Return lambda of each prompt from the variances of the other prompts' rows, float64 (C,)."""
    # Variances do not depend on a common mean; without it their differences of squares lose fewer digits.
    y = y.reshape(len(y), -1) - y.reshape(len(y), -1).mean(0)
    m = torch.bincount(prompt).to(y).unsqueeze(-1)
    sums = _sums_by_prompt(y, prompt)
    within = (_sums_by_prompt(y * y, prompt) - sums * sums / m).sum(-1, keepdim=True)
    others, n = len(m) - 1, m.sum() - m
    excess = (m * m).sum() - m * m
    total = sums.sum(0) - sums
    between = ((sums * sums / m).sum(0) - sums * sums / m - total * total / n.clamp(min=1)).sum(-1, keepdim=True)
    sigma2 = _ratio(within.sum() - within, n - others, torch.zeros_like(m))
    # The number of rows a prompt, corrected for unequal numbers.
    each = (n - excess / n.clamp(min=1)) / max(1, others - 1)
    tau2 = _ratio(between / max(1, others - 1) - sigma2, each, torch.zeros_like(m)).clamp(min=0)
    v = sigma2 / (m - 1).clamp(min=1)
    # What rounding leaves of two variances that are 0 has no ratio.
    known = v + tau2 > NEGLIGIBLE * y.square().sum() if others >= 2 else torch.zeros_like(v, dtype=torch.bool)
    size = torch.where(known, v / torch.where(known, v + tau2, 1.0), 0.0)
    return torch.where(m > 1, size, 1.0).squeeze(-1)


def optimal_share(direct: Tensor, full: Tensor, of_direct: Deviations, of_full: Deviations) -> float:
    """Return the share c of the score term whose influences d_i + c s_i have the smallest squared error.

    With d_i the influences through the entropies of tokens and s_i those through the score term, the sum of squared
    errors over the draw of E is (1 - c)^2 sum E[s_i]^2 + sum Var(d_i + c s_i), which is smallest at

        c = (sum E[s_i]^2 - sum Cov(d_i, s_i)) / (sum E[s_i]^2 + sum Var(s_i)),   within [0, 1]

    Variances come from the deviations by part of E, and sum E[s_i]^2 is estimated by sum s_i^2 - Var(s_i), at least 0.

    Args:
        direct: (n,), d_i.
        full: (n,), d_i + s_i.
        of_direct: deviations of ``direct``.
        of_full: deviations of ``full``, by the same parts.

    Returns:
        A share; 1 where the score term is 0 on every part, NaN with fewer than two parts.

    Source: the positive-part estimator of James & Stein 1961, for a term whose error correlates with the remainder's.

    Example:
        >>> nothing, both = torch.zeros(1), torch.full((1,), 2.0)
        >>> none_left_out = torch.full((1,), -1)
        >>> of_direct = Deviations(torch.zeros(2, 1), none_left_out)
        >>> optimal_share(nothing, both, of_direct, Deviations(torch.tensor([[0.5], [-0.5]]), none_left_out))
        0.75
    """
    score, of_score = full - direct, of_full._replace(by_part=of_full.by_part - of_direct.by_part)
    variance = of_score.stderr().square().sum()
    with_direct = (of_full.stderr().square().sum() - of_direct.stderr().square().sum() - variance) / 2
    signal = (score.square().sum() - variance).clamp(min=0)
    size = signal + variance
    return float(torch.where(size == 0, 1.0, ((signal - with_direct) / size).clamp(0, 1)))


def _sums_by_prompt(x: Tensor, prompt: Tensor) -> Tensor:
    """Return sums over the rows of each prompt, (C, ...)."""
    count = int(prompt.max()) + 1
    return x.new_zeros(count, *x.shape[1:]).index_add(0, prompt, x)


def _sum_of_others(x: Tensor, prompt: Tensor) -> Tensor:
    """Return the sum over the prompt's rows without the row itself, shape of x; exactly 0 where it has no other."""
    alone = (torch.bincount(prompt) == 1)[prompt].reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(alone, 0.0, _sums_by_prompt(x, prompt)[prompt] - x)


def _ratio(numerator: Tensor, denominator: Tensor, otherwise: Tensor) -> Tensor:
    """Return the ratio, and ``otherwise`` where the denominator is not positive; nothing is divided by 0."""
    positive = denominator > 0
    return torch.where(positive, numerator / torch.where(positive, denominator, 1.0), otherwise)
