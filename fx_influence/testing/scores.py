"""Log-probabilities and entropies of completion tokens, one row at a time."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.types import Apply, Batch, Params


class RowScore(NamedTuple):
    """Scores of one row's completion: ``positions`` (columns), and a scalar of ``logprobs`` and ``entropies`` at each.

    ``zero`` is a 0 that depends on the row's logits, so that a row without tokens has a gradient too, of zeros.
    """

    positions: list[int]
    logprobs: list[Tensor]
    entropies: list[Tensor]
    zero: Tensor


class TokenValues(NamedTuple):
    """Log-probabilities and entropies, (n, T), at completion positions; 0 elsewhere."""

    logprobs: Tensor
    entropies: Tensor


def score_row(apply: Apply, params: Params, batch: Batch, row: int, temperature: float = 1.0) -> RowScore:
    """Score one row: with z = logits[t-1] / temperature, log pi = z[y_t] - logsumexp z and h = -sum_y pi log pi.

    A token of probability 0 adds nothing to h, since 0 log 0 = 0.

    Args:
        apply: the policy.
        params: the parameters by name.
        batch: (n, T).
        row: which row of the batch.
        temperature: divisor of the logits.
    """
    logits = apply(params, batch.input_ids[row : row + 1], batch.attention_mask[row : row + 1])[0]
    zero = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool), 0.0).sum().double()
    score = RowScore([], [], [], zero)
    for t in range(batch.input_ids.shape[1]):
        if not batch.completion_mask[row, t]:
            continue
        if t == 0:
            raise ValueError(
                f"batch.completion_mask[{row}, 0] is True; expected False: no logits score column 0. Clear it"
            )
        z = logits[t - 1].double() / temperature
        possible = z[z > -math.inf]
        log_pi = possible - possible.logsumexp(0)
        score.positions.append(t)
        score.logprobs.append(z[batch.input_ids[row, t]] - possible.logsumexp(0))
        score.entropies.append(-(log_pi.exp() * log_pi).sum())
    return score


def token_values(apply: Apply, params: Params, batch: Batch, temperature: float = 1.0) -> TokenValues:
    """Return every row's ``score_row``, padded with zeros to the batch's (n, T).

    Args:
        apply: the policy.
        params: theta by name.
        batch: (n, T).
        temperature: divisor of the logits.
    """
    n, width = batch.input_ids.shape
    logprobs, entropies = torch.zeros(n, width, dtype=torch.float64), torch.zeros(n, width, dtype=torch.float64)
    for i in range(n):
        score = score_row(apply, params, batch, i, temperature)
        for t, log_pi, h in zip(score.positions, score.logprobs, score.entropies, strict=True):
            logprobs[i, t], entropies[i, t] = log_pi.detach(), h.detach()
    return TokenValues(logprobs, entropies)


def token_losses(batch: Batch, row: int, score: RowScore) -> list[Tensor]:
    """Return one row's token losses l_it = -(c_it log pi(y_it) + b_it h_it), by rank.

    Args:
        batch: (n, T), with coefficients c and, if there is an entropy bonus, b.
        row: i, which row of the batch.
        score: ``score_row`` of that row.
    """
    if batch.coefficients is None:
        raise ValueError("batch.coefficients is None; expected (n, T). Pass an update batch")
    losses = []
    for t, log_pi, h in zip(score.positions, score.logprobs, score.entropies, strict=True):
        b = 0.0 if batch.entropy_coefficients is None else float(batch.entropy_coefficients[row, t])
        losses.append(-(float(batch.coefficients[row, t]) * log_pi + b * h))
    return losses
