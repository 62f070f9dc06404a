"""The head of a policy, from features to token values, and its derivatives in closed form, some tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fx_influence.core.tree import accumulate, promote
from fx_influence.policy.modes.forward_ad import forward_mode_jvp
from fx_influence.policy.split import SplitPolicy
from fx_influence.types import Gradients, Params, TokenValues

MAX_LOGITS = 2**25
"""Logits that are formed at once: 128 MiB of float32, and up to four times that with their derivatives."""

TokenWeights = tuple[Tensor | None, Tensor | None]
"""c and b of the loss -sum (c log pi(y) + b h), (n,) each."""


def head_token_values(
    policy: SplitPolicy,
    params: Params,
    features: Tensor,
    targets: Tensor,
    temperature: float,
    max_logits: int = MAX_LOGITS,
) -> TokenValues:
    """log pi(y) and h of the tokens that features (n, d) score, (n,) each, at least float32; ``targets``: y, (n,)."""
    found = []
    for piece in _pieces(len(targets), policy, max_logits):
        log_pi = _log_softmax(policy.head(params, features[piece]), temperature)
        entropies = -_sum_of_products(log_pi.exp(), _finite(log_pi))
        found.append(TokenValues(_at(log_pi, targets[piece]), entropies))
    return _concatenated(found)


def head_vjp(
    policy: SplitPolicy, params: Params, features: Tensor, targets: Tensor, weights: TokenWeights, temperature: float
) -> tuple[Tensor, Gradients]:
    """The gradient of -sum (c log pi(y) + b h) by the features, (n, d), and by the parameters through the head alone.

    Parameters that require no gradient are left out, and those that the head does not hold have None.
    """
    leaves = {name: p for name, p in params.items() if p.requires_grad}
    total: Gradients = dict.fromkeys(leaves)
    out = torch.empty_like(features)
    for piece in _pieces(len(features), policy):
        own = features[piece].detach().requires_grad_()
        with torch.enable_grad():
            # Not the leaf itself: hooks on modules (torch's flop counter sets some) do not bear one in autograd.grad.
            logits = policy.head(params, own.view_as(own))
        c, b = (w if w is None else w[piece] for w in weights)
        toward = logit_gradient(logits.detach(), targets[piece], (c, b), temperature)
        out[piece], *grads = torch.autograd.grad(logits, [own, *leaves.values()], toward, allow_unused=True)
        accumulate(total, zip(leaves, grads, strict=True))
    return out, total


def head_jvp(
    policy: SplitPolicy,
    params: Params,
    tangent: Params,
    features: Tensor,
    d_features: Tensor,
    targets: Tensor,
    temperature: float,
) -> TokenValues:
    """Of log pi(y) and h, (n,): dz_y - sum pi dz and -sum pi (log pi + h) dz, z the logits over the temperature."""
    found = []
    own, d_own = ({name: x for name, x in tree.items() if name in policy.head_parameters} for tree in (params, tangent))
    for piece in _pieces(len(targets), policy):
        # The features move with the parameters, under a name that none of them has.
        at, toward = {**own, "": features[piece]}, {**d_own, "": d_features[piece]}
        logits, d_logits = forward_mode_jvp(lambda p: policy.head(p, p[""]), at, toward)
        log_pi = _log_softmax(logits, temperature)
        d_logits = d_logits.to(log_pi.dtype)
        pi = log_pi.exp()
        log_pi = _finite(log_pi)
        entropies = -_sum_of_products(pi, log_pi)
        weighted = pi.mul_(d_logits)
        mean = weighted.sum(-1)
        d_entropies = -_sum_of_products(weighted, log_pi) - entropies * mean
        found.append(TokenValues((_at(d_logits, targets[piece]) - mean) / temperature, d_entropies / temperature))
    return _concatenated(found)


def logit_gradient(logits: Tensor, targets: Tensor, weights: TokenWeights, temperature: float) -> Tensor:
    """The gradient of -sum (c log pi(y) + b h): [c (pi - 1_y) + b pi (log pi + h)] / temperature, (..., V)."""
    log_pi = _log_softmax(logits, temperature)
    pi = log_pi.exp()
    c, b = (None if w is None else (w.to(pi.dtype) / temperature).unsqueeze(-1) for w in weights)
    if b is None:
        out = pi if c is None else pi.mul_(c)
    else:
        log_pi = _finite(log_pi)
        slope = log_pi.sub_(_sum_of_products(pi, log_pi).unsqueeze(-1)).mul_(b)
        out = (slope if c is None else slope.add_(c)).mul_(pi)
    if c is not None:
        out.scatter_add_(-1, targets.unsqueeze(-1), -c)
    return out.to(logits.dtype)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.to(promote(logits.dtype))
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def _finite(log_pi: Tensor) -> Tensor:
    # pi log pi is 0 where pi is, and not 0 times -inf; pi is 0 in any dtype long before log pi is as low as this.
    return log_pi.clamp(min=-1e4)


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _at(values: Tensor, targets: Tensor) -> Tensor:
    return values.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _concatenated(found: list[TokenValues]) -> TokenValues:
    return TokenValues(*(torch.cat(field, -1) for field in zip(*found, strict=True)))


def _pieces(count: int, policy: SplitPolicy, max_logits: int = MAX_LOGITS) -> Iterator[slice]:
    size = max(1, count) if policy.vocab_size is None else max(1, max_logits // policy.vocab_size)
    for start in range(0, max(1, count), size):
        yield slice(start, min(start + size, count))
