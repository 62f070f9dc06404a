"""Proxies of the field for the entropy that a token's update adds, from statistics of that token's softmax alone.

Each is one pure function. With p = pi(y), h = -sum_j pi_j log pi_j, P2 = sum_j pi_j^2, Q2 = sum_j pi_j^2 log pi_j, the
coefficient c = -dL/dlog pi(y) (0 where the loss clips) and the advantage A, per completion token

    exact_tabular        -c [p (log p + h) - (h P2 + Q2)]
    steer                -c p (1 - p) (log p + h)
    repo                 -A p (log p + h)
    covariance           -(log p - mean log p) (A - mean A)
    relative_surprisal   -log p / h, without a sign

and per rollout of G completions to its prompt

    grpo_dropout         (A / G) (-log pi(y_1..T) - sum_t h_t)

Positive raises the entropy. None of them knows the optimizer (AdamW's denominators, momentum, weight decay, clipping of
the gradient), that tokens share parameters, or that a step also changes which prefixes are sampled (the score term):
``influence`` computes all of it. They cost a forward, and are for comparison.

All but ``token_moments`` raise ``TypeError`` for arguments of another kind, and ``ValueError`` for shapes that disagree
and for coefficients and advantages that are not finite.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fx_influence.core.batch_checks import check_batch, check_is_batch
from fx_influence.core.checks import check_options, check_tensor, wrong_type
from fx_influence.core.parameter_checks import check_policy
from fx_influence.core.tree import detached
from fx_influence.distributed.engine import make_engine
from fx_influence.policy.precision import in_float32
from fx_influence.types import Apply, Batch, Params, TokenMoments, TokenValues

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def token_moments(
    params: Params,
    batch: Batch,
    *,
    apply: Apply,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    mesh: DeviceMesh | None = None,
) -> TokenMoments:
    """Return log pi(y), h, P2 and Q2 of every completion token under pi = softmax(logits / temperature).

    One forward, without an autograd graph; the LM head forms a chunk of logits at a time. The first two are those of
    ``token_values``.

    Args:
        params: theta by name. Weights in half precision are raised to float32 first.
        batch: rollouts (B, T); only completion tokens are scored.
        apply: the policy, from ``make_functional``.
        temperature: divides the logits, before all four.
        chunk_size: rows per forward; None chooses by tokens.
        mesh: ranks with rows of their own, as in ``influence``. The result then has the rows of all ranks, rank 0's
            first, at the width of the widest rank: gather coefficients and advantages likewise. Without it, and with
            parameters that are not sharded, each rank scores its own rows alone.

    Returns:
        ``TokenMoments``, (B, T) each, aligned with ``input_ids`` and 0 outside completions; float64 for float64
        parameters, else float32. Logits of -inf count as probability 0 and give no NaN.

    Raises:
        TypeError: for arguments of another kind.
        ValueError: for a batch that cannot be scored, and options outside their range.

    Example:
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True, True]]))
        >>> apply = lambda p, ids, mask: p["b"].expand(*ids.shape, 4)
        >>> token_moments({"b": torch.zeros(4)}, batch, apply=apply).collision.tolist()
        [[0.0, 0.25, 0.25]]
    """
    check_policy(params, apply)
    check_options(temperature, chunk_size)
    check_is_batch("batch", batch)
    params = detached(params)
    engine = make_engine(params, apply, temperature, chunk_size, mesh)
    batch = engine.full_batch("batch", batch)
    engine.check_consistent(params=params)
    check_batch("batch", batch, params, apply, may_be_empty=True)
    params, apply = in_float32(params, apply, batch)
    return replace(engine, apply=apply).moments(params, batch)


def exact_tabular(moments: TokenMoments, coefficients: Tensor, completion_mask: Tensor) -> Tensor:
    """Return -c [p (log p + h) - (h P2 + Q2)], exact for a tabular softmax policy that plain SGD trains.

    If every prefix had logits of its own, which the step z' = z + lr c (e_y - pi) moves, the entropy of this token's
    softmax would change by lr times this, to first order. h P2 + Q2 = Cov_pi(pi, log pi) >= 0 is the policy's mean of
    pi_j (log pi_j + h). z are the logits over the temperature; per step on the logits themselves divide by its square.
    Where one prefix occurs several times, the changes of its softmax add up. An entropy bonus is not included.

    Args:
        moments: (B, T), from ``token_moments``.
        coefficients: (B, T), c of each token, 0 where the loss clips; from ``coefficients``.
        completion_mask: bool (B, T); nothing is read outside it.

    Returns:
        (B, T), nats per unit lr of SGD on the logits; positive raises the entropy; 0 outside the mask.

    Raises:
        TypeError: for ``TokenValues`` too, which lack the moments.

    Source:
        Wang et al., On the Entropy Dynamics in Reinforcement Fine-Tuning of Large Language Models, arXiv 2602.03392.

    Example:
        >>> p = torch.tensor([0.75, 0.25], dtype=torch.float64)
        >>> h, squares = -(p * p.log()).sum(), p.square()
        >>> moments = TokenMoments(*(x.reshape(1, 1) for x in (p[0].log(), h, squares.sum(), squares @ p.log())))
        >>> one = torch.ones(1, 1)
        >>> round(exact_tabular(moments, one, one > 0).item(), 4)
        -0.103
    """
    if not isinstance(moments, TokenMoments):
        remedy = "Pass fx.proxies.token_moments(params, batch, apply=apply)"
        raise wrong_type("moments", moments, "TokenMoments", remedy)
    _check_statistics(moments, completion_mask)
    c = _weights("coefficients", coefficients, completion_mask, per_rollout=False)
    policy_mean = moments.entropies * moments.collision + moments.collision_logprobs
    return torch.where(completion_mask, -c * (_discriminant(moments) - policy_mean), 0.0)


def steer(values: TokenValues | TokenMoments, coefficients: Tensor, completion_mask: Tensor) -> Tensor:
    """Return -c p (1 - p) (log p + h), the part of ``exact_tabular`` through the sampled token's logit.

    That logit moves by lr c (1 - p), and -p (log p + h) is the entropy's derivative with respect to it. What is left
    out, c sum_{j != y} pi_j^2 (log pi_j + h), comes from the other logits, which move by -lr c pi_j.

    Args:
        values: (B, T), from ``token_values`` or ``token_moments``.
        coefficients: (B, T), c of each token, 0 where the loss clips; from ``coefficients``.
        completion_mask: bool (B, T); nothing is read outside it.

    Returns:
        (B, T), nats per unit lr of SGD on the logits; positive raises the entropy; 0 outside the mask.

    Source:
        Hao et al., Rethinking Entropy Interventions in RLVR: An Entropy Change Perspective, arXiv 2510.10150.

    Example:
        >>> values = TokenValues(torch.tensor([[0.75]]).log(), torch.tensor([[0.5623]]))
        >>> one = torch.ones(1, 1)
        >>> round(steer(values, one, one > 0).item(), 4)
        -0.0515
    """
    _check_statistics(values, completion_mask)
    c = _weights("coefficients", coefficients, completion_mask, per_rollout=False)
    return torch.where(completion_mask, c * values.logprobs.expm1() * _discriminant(values), 0.0)


def repo(values: TokenValues | TokenMoments, advantages: Tensor, completion_mask: Tensor) -> Tensor:
    """Return -A p (log p + h), the advantage times the entropy's derivative with respect to the sampled token's logit.

    Args:
        values: (B, T), from ``token_values`` or ``token_moments``.
        advantages: (B,), or (B, T) where they differ by token.
        completion_mask: bool (B, T); nothing is read outside it.

    Returns:
        (B, T), nats per unit of that logit times units of the advantage; positive raises the entropy; 0 outside the
        mask.

    Source:
        Petrenko et al., Entropy-Preserving Reinforcement Learning, arXiv 2603.11682.

    Example:
        >>> values = TokenValues(torch.tensor([[0.75]]).log(), torch.tensor([[0.5623]]))
        >>> round(repo(values, torch.ones(1), torch.ones(1, 1).bool()).item(), 4)
        -0.206
    """
    _check_statistics(values, completion_mask)
    a = _weights("advantages", advantages, completion_mask)
    return torch.where(completion_mask, -a * _discriminant(values), 0.0)


def covariance(values: TokenValues | TokenMoments, advantages: Tensor, completion_mask: Tensor) -> Tensor:
    """Return -(log p - mean log p) (A - mean A), each token's part of minus the covariance of log p and A.

    Means are over all completion tokens passed, so that the mean of the result over them is -Cov(log p, A), without
    Bessel's correction. Pass the rows of the step at once: a micro-batch has other means.

    Args:
        values: (B, T), from ``token_values`` or ``token_moments``.
        advantages: (B,), or (B, T) where they differ by token.
        completion_mask: bool (B, T); nothing is read outside it.

    Returns:
        (B, T), nats times units of the advantage; positive raises the entropy; 0 outside the mask.

    Raises:
        ValueError: for a token of probability 0 too, which the policy cannot sample.

    Source:
        Cui et al., The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models, arXiv 2505.22617.

    Example:
        >>> values = TokenValues(torch.tensor([[-1.0, -3.0]]), torch.ones(1, 2))
        >>> covariance(values, torch.tensor([[1.0, -1.0]]), torch.ones(1, 2).bool()).tolist()
        [[-1.0, -1.0]]
    """
    _check_statistics(values, completion_mask, finite=True)
    a = _weights("advantages", advantages, completion_mask)
    logprobs = values.logprobs
    centred = [x - x[completion_mask].sum() / completion_mask.sum().clamp(min=1) for x in (logprobs, a)]
    return torch.where(completion_mask, -centred[0] * centred[1], 0.0)


def relative_surprisal(values: TokenValues | TokenMoments, completion_mask: Tensor) -> Tensor:
    """Return -log p / h, the surprisal of the token over its mean under the policy: 1 is the boundary of two signs.

    It has no sign of an advantage in it. ``steer`` is c p (1 - p) h (r - 1) and ``repo`` is A p h (r - 1), with r this
    ratio, so that for both raising a token's probability raises the entropy if and only if r > 1. For
    ``exact_tabular`` the boundary is 1 - Cov_pi(pi, log pi) / (p h): it is 1 for two tokens or a uniform softmax, and
    below 1 otherwise, so r > 1 still suffices and r < 1 does not decide.

    Args:
        values: (B, T), from ``token_values`` or ``token_moments``.
        completion_mask: bool (B, T); nothing is read outside it.

    Returns:
        (B, T), at least 0, without unit; 0 outside the mask, and for a token of probability 1, whose h is 0; infinity
        for a token of probability 0.

    Source:
        Lv et al., Which Tokens Matter? Adaptive Token Selection for RLVR with the Relative Surprisal Index, arXiv
        2606.31575.

    Example:
        >>> values = TokenValues(torch.tensor([[-0.5, -2.0]]), torch.ones(1, 2))
        >>> relative_surprisal(values, torch.ones(1, 2).bool()).tolist()
        [[0.5, 2.0]]
    """
    _check_statistics(values, completion_mask)
    surprisal, h = values.logprobs.neg(), values.entropies
    return torch.where(completion_mask & (surprisal > 0), surprisal / h, 0.0)


def grpo_dropout(
    values: TokenValues | TokenMoments, advantages: Tensor, completion_mask: Tensor, group: Tensor
) -> Tensor:
    """Return (A / G) (-log pi(y_1..T) - sum_t h_t) of each rollout, the excess of its surprisal over what is expected.

    The excess has mean 0 over rollouts of the policy, because E[-log pi(y_t) | y_<t] = h_t.

    Args:
        values: (B, T), from ``token_values`` or ``token_moments``.
        advantages: (B,).
        completion_mask: bool (B, T); nothing is read outside it.
        group: int64 (B,), the prompt of each row; G is the number of rows of that prompt, rows without a completion
            token included.

    Returns:
        (B,), nats times units of the advantage; positive raises the entropy; 0 for a row without a completion token.

    Raises:
        ValueError: for a token of probability 0 too, which the policy cannot sample.

    Source:
        GRPODropout's score h_g.

    Example:
        >>> values = TokenValues(torch.tensor([[-1.0, -3.0], [-1.0, -1.0]]), torch.ones(2, 2))
        >>> mask = torch.ones(2, 2).bool()
        >>> grpo_dropout(values, torch.tensor([1.0, -1.0]), mask, torch.tensor([5, 5])).tolist()
        [1.0, 0.0]
    """
    _check_statistics(values, completion_mask, finite=True)
    for name, value in (("advantages", advantages), ("group", group)):
        check_tensor(name, value)
        if value.shape != completion_mask.shape[:1]:
            expected = tuple(completion_mask.shape[:1])
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {expected}, a number for each rollout")
    a = _weights("advantages", advantages, completion_mask)
    _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
    excess = torch.where(completion_mask, -values.logprobs - values.entropies, 0.0)
    return (a * excess).sum(-1) / count[index]


def _discriminant(values: TokenValues | TokenMoments) -> Tensor:
    """Return p (log p + h), minus the derivative of h with respect to the logit of y; 0 where p is 0."""
    p = values.logprobs.exp()
    return p * (torch.where(p > 0, values.logprobs, 0.0) + values.entropies)


def _check_statistics(values: object, completion_mask: Tensor, finite: bool = False) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless these are token statistics (B, T) with their mask.

    ``finite``: whether every token must have a probability above 0.
    """
    if not isinstance(values, (TokenValues, TokenMoments)):
        remedy = "Pass fx.token_values(params, batch, apply)"
        raise wrong_type("values", values, "TokenValues or TokenMoments", remedy)
    check_tensor("completion_mask", completion_mask)
    shape = tuple(values.logprobs.shape)
    if completion_mask.dtype != torch.bool or tuple(completion_mask.shape) != shape or len(shape) != 2:
        raise ValueError(
            f"completion_mask is {completion_mask.dtype} of shape {tuple(completion_mask.shape)}; expected bool (B, T) "
            f"of the shape of the log-probabilities, {shape}. Pass batch.completion_mask of the same rows"
        )
    bad = (completion_mask & ~values.logprobs.isfinite()).nonzero().tolist() if finite else []
    if bad:
        raise ValueError(
            f"values.logprobs{bad[0]} is {values.logprobs[tuple(bad[0])].item()} ({len(bad)} such tokens); expected "
            "finite values. Drop rollouts with tokens that the policy cannot sample"
        )


def _weights(field: str, weights: Tensor, completion_mask: Tensor, per_rollout: bool = True) -> Tensor:
    """Return coefficients or advantages of tokens (B, T), 0 outside the mask, at least float32.

    Args:
        field: name of the argument, for errors.
        weights: (B, T), or (B,) with ``per_rollout``.
        completion_mask: bool (B, T).
        per_rollout: whether one number for each rollout is allowed.
    """
    check_tensor(field, weights)
    shape = tuple(completion_mask.shape)
    allowed = (shape, shape[:1]) if per_rollout else (shape,)
    if tuple(weights.shape) not in allowed:
        expected = " or ".join(map(str, allowed))
        remedy = "" if per_rollout else ". Make them by fx.coefficients(...)"
        raise ValueError(f"{field} has shape {tuple(weights.shape)}; expected {expected}{remedy}")
    by_token = weights.unsqueeze(-1) if weights.dim() == 1 else weights
    by_token = torch.where(completion_mask, by_token.to(torch.promote_types(weights.dtype, torch.float32)), 0.0)
    bad = (~by_token.isfinite()).nonzero().tolist()
    if bad:
        raise ValueError(
            f"{field} of token {bad[0]} is {by_token[tuple(bad[0])].item()} ({len(bad)} such tokens); expected finite "
            "values. Drop those rollouts or repair their rewards"
        )
    return by_token
