"""Token values and moments of an LM head and their derivatives in closed form, a chunk of logits at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fx_influence.core.tree import accumulate, cast_like, promote
from fx_influence.policy.modes.forward_ad import forward_mode_jvp
from fx_influence.policy.split import SplitPolicy
from fx_influence.types import Gradients, Params, TokenMoments, TokenStatistics, TokenValues

TokenWeights = tuple[Tensor | None, Tensor | None]
"""c and b of the loss -sum (c log pi(y) + b h), (n,) each."""


def head_token_values(
    policy: SplitPolicy,
    params: Params,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    max_logits: int | None = None,
) -> TokenValues:
    """Return log pi(y) and h of the tokens that some hidden states score, (n,) each, at least float32.

    Args:
        policy: its head and vocabulary size are used.
        params: by name.
        hidden: (n, d).
        targets: int64 (n,), the tokens y.
        temperature: divisor of the logits.
        max_logits: logits that exist at once, None for the policy's ``max_logits``.
    """
    return _by_chunks(_values, policy, params, hidden, targets, temperature, max_logits)


def head_token_moments(
    policy: SplitPolicy, params: Params, hidden: Tensor, targets: Tensor, temperature: float
) -> TokenMoments:
    """Return ``head_token_values`` with sum pi^2 and sum pi^2 log pi, (n,) each, at least float32; for no_grad alone.

    Args:
        policy: its head, vocabulary size and ``max_logits`` are used.
        params: by name.
        hidden: (n, d).
        targets: int64 (n,), the tokens y.
        temperature: divisor of the logits.
    """
    return _by_chunks(_moments, policy, params, hidden, targets, temperature)


def _by_chunks(
    statistics_fn: Callable[[Tensor, Tensor], TokenStatistics],
    policy: SplitPolicy,
    params: Params,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    max_logits: int | None = None,
) -> TokenStatistics:
    """Return ``statistics_fn(log_pi, targets)`` of all tokens, evaluated on a chunk of logits at a time."""
    return _concatenate(
        [
            statistics_fn(_log_softmax(policy.head(params, hidden[tokens]), temperature), targets[tokens])
            for tokens in _chunks(len(targets), policy, max_logits)
        ]
    )


def _values(log_pi: Tensor, targets: Tensor) -> TokenValues:
    return TokenValues(_select(log_pi, targets), -_sum_of_products(log_pi.exp(), _finite(log_pi)))


def _moments(log_pi: Tensor, targets: Tensor) -> TokenMoments:
    selected, log_pi, pi = _select(log_pi, targets), _finite(log_pi), log_pi.exp()
    entropies = -_sum_of_products(pi, log_pi)
    # In place, so that no more tensors of the size of the logits exist than for the values alone.
    squares = pi.square_()
    return TokenMoments(selected, entropies, squares.sum(-1), _sum_of_products(squares, log_pi))


def head_vjp(
    policy: SplitPolicy, params: Params, hidden: Tensor, targets: Tensor, weights: TokenWeights, temperature: float
) -> tuple[Tensor, Gradients]:
    """Return the loss's gradients with respect to the hidden states and, through the head alone, the parameters.

    The loss is -sum (c log pi(y) + b h).

    Args:
        policy: its head and vocabulary size are used.
        params: by name.
        hidden: (n, d).
        targets: int64 (n,), the tokens y.
        weights: c and b, (n,) each or None.
        temperature: divisor of the logits.

    Returns:
        (n, d), and a gradient for every parameter that requires one, None for those that the head does not use.
    """
    leaves = {name: p for name, p in params.items() if p.requires_grad}
    total: Gradients = dict.fromkeys(leaves)
    d_hidden = torch.empty_like(hidden)
    for tokens in _chunks(len(hidden), policy):
        chunk = hidden[tokens].detach().requires_grad_()
        with torch.enable_grad():
            # Pass a view: module hooks (FlopCounterMode sets some) break when a leaf goes to autograd.grad.
            logits = policy.head(params, chunk.view_as(chunk))
        c, b = (w if w is None else w[tokens] for w in weights)
        cotangent = logit_gradient(logits.detach(), targets[tokens], (c, b), temperature)
        d_hidden[tokens], *grads = torch.autograd.grad(logits, [chunk, *leaves.values()], cotangent, allow_unused=True)
        accumulate(total, zip(leaves, grads, strict=True))
    return d_hidden, total


def head_jvp(
    policy: SplitPolicy,
    params: Params,
    tangent: Params,
    hidden: Tensor,
    d_hidden: Tensor,
    targets: Tensor,
    temperature: float,
) -> TokenValues:
    """Return the derivatives of log pi(y) and h, (n,): dz_y - sum pi dz and -sum pi (log pi + h) dz.

    z are the logits over the temperature, dz their derivatives.

    Args:
        policy: its head and vocabulary size are used.
        params: by name.
        tangent: the direction, by name.
        hidden: (n, d).
        d_hidden: (n, d), derivative of ``hidden``.
        targets: int64 (n,), the tokens y.
        temperature: divisor of the logits.
    """
    chunks = []
    names = policy.head_parameters
    head_params = {name: p for name, p in params.items() if name in names}
    # Cast once for all chunks.
    head_tangent = {name: cast_like(tangent[name], p) for name, p in head_params.items() if name in tangent}
    for tokens in _chunks(len(targets), policy):
        # The head is differentiated with respect to both; the hidden states take a name that no parameter has.
        point, direction = {**head_params, "": hidden[tokens]}, {**head_tangent, "": d_hidden[tokens]}
        logits, d_logits = forward_mode_jvp(lambda p: policy.head(p, p[""]), point, direction)
        log_pi = _log_softmax(logits, temperature)
        d_logits = d_logits.to(log_pi.dtype)
        pi = log_pi.exp()
        log_pi = _finite(log_pi)
        entropies = -_sum_of_products(pi, log_pi)
        weighted = pi.mul_(d_logits)
        mean = weighted.sum(-1)
        d_entropies = -_sum_of_products(weighted, log_pi) - entropies * mean
        chunks.append(TokenValues((_select(d_logits, targets[tokens]) - mean) / temperature, d_entropies / temperature))
    return _concatenate(chunks)


def head_hessian_product(
    policy: SplitPolicy,
    params: Params,
    tangent: Params,
    hidden: Tensor,
    d_hidden: Tensor,
    targets: Tensor,
    weights: TokenWeights,
    slopes: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Gradients]:
    """Return the derivative of ``head_vjp``'s results along a direction of parameters and hidden states.

    With logits z(x), x the hidden states and parameters, and q = dF/dz the gradient of the loss F, the gradient of F is
    J(x)^T q. Its derivative along v is J^T dq, with dq by the closed form, plus that of <J(x)^T q, v> with q fixed.

    Args:
        policy: its head and vocabulary size are used.
        params: by name, leaves of a graph.
        tangent: the direction of the parameters, by name.
        hidden: (n, d).
        d_hidden: (n, d), the direction of ``hidden``.
        targets: int64 (n,), the tokens y.
        weights: c and b, (n,) each or None.
        slopes: dc / dlog pi(y), (n,), or None where c does not depend on the policy.
        temperature: divisor of the logits.

    Returns:
        (n, d), and a tensor for every parameter that requires a gradient, None for those that the head does not use.
    """
    leaves = {name: p for name, p in params.items() if p.requires_grad}
    total: Gradients = dict.fromkeys(leaves)
    dd_hidden = torch.empty_like(hidden)
    head_tangent = {name: cast_like(tangent[name], params[name]) for name in leaves if name in tangent}
    for tokens in _chunks(len(hidden), policy):
        chunk = hidden[tokens].detach().requires_grad_()
        c, b, slope = (w if w is None else w[tokens] for w in (*weights, slopes))
        with torch.enable_grad():
            logits = policy.head(params, chunk.view_as(chunk))
            inputs, directions = [chunk, *leaves.values()], [d_hidden[tokens], *map(head_tangent.get, leaves)]
            z = logits.detach()
            q = logit_gradient(z, targets[tokens], (c, b), temperature)
            gradient = torch.autograd.grad(logits, inputs, q, create_graph=True, allow_unused=True)
            through_head = [
                (g * v).sum()
                for g, v in zip(gradient, directions, strict=True)
                if g is not None and v is not None and g.requires_grad
            ]
        point = {**{name: p.detach() for name, p in leaves.items()}, "": chunk.detach()}
        with torch.no_grad():
            d_logits = forward_mode_jvp(
                lambda p: policy.head({**params, **p}, p[""]), point, {**head_tangent, "": d_hidden[tokens]}
            )[1]
            dq = logit_gradient_jvp(z, d_logits, targets[tokens], (c, b), slope, temperature)
        outputs, cotangents = [logits, *through_head], [dq, *map(torch.ones_like, through_head)]
        dd_hidden[tokens], *grads = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
        accumulate(total, zip(leaves, grads, strict=True))
    return dd_hidden, total


def logit_gradient(logits: Tensor, targets: Tensor, weights: TokenWeights, temperature: float) -> Tensor:
    """Return the gradient of -sum (c log pi(y) + b h) with respect to the logits, (..., V).

    It is [c (pi - 1_y) + b pi (log pi + h)] / temperature.

    Args:
        logits: (..., V), not divided by the temperature.
        targets: int64 (...), the tokens y.
        weights: c and b, (...) each or None; at least one is given.
        temperature: divisor of the logits.
    """
    log_pi = _log_softmax(logits, temperature)
    pi = log_pi.exp()
    c, b = (None if w is None else (w.to(pi.dtype) / temperature).unsqueeze(-1) for w in weights)
    if b is None:
        out = pi if c is None else pi.mul_(c)
    else:
        log_pi = _finite(log_pi)
        by_entropy = log_pi.sub_(_sum_of_products(pi, log_pi).unsqueeze(-1)).mul_(b)
        out = (by_entropy if c is None else by_entropy.add_(c)).mul_(pi)
    if c is not None:
        out.scatter_add_(-1, targets.unsqueeze(-1), -c)
    return out.to(logits.dtype)


def logit_gradient_jvp(
    logits: Tensor,
    d_logits: Tensor,
    targets: Tensor,
    weights: TokenWeights,
    slopes: Tensor | None,
    temperature: float,
) -> Tensor:
    """Return the derivative of ``logit_gradient`` along ``d_logits``, (..., V).

    With r = dlog pi = (dz - <pi, dz>) / temperature and dh = -<pi r, log pi> it is

        [c pi r + dc (pi - 1_y) + b pi (r (log pi + h + 1) + dh)] / temperature,  dc = slope r_y

    Args:
        logits: (..., V), not divided by the temperature.
        d_logits: (..., V), their derivative.
        targets: int64 (...), the tokens y.
        weights: c and b, (...) each or None.
        slopes: dc / dlog pi(y), (...), or None for c that does not depend on the policy.
        temperature: divisor of the logits.
    """
    log_pi = _log_softmax(logits, temperature)
    pi, log_pi = log_pi.exp(), _finite(log_pi)
    d_logits = d_logits.to(pi.dtype) / temperature
    r = d_logits - _sum_of_products(pi, d_logits).unsqueeze(-1)
    out = torch.zeros_like(pi)
    c, b, slope = (None if w is None else w.to(pi.dtype).unsqueeze(-1) for w in (*weights, slopes))
    if c is not None:
        out += c * pi * r
    if b is not None:
        h = -_sum_of_products(pi, log_pi).unsqueeze(-1)
        dh = -_sum_of_products(pi * r, log_pi).unsqueeze(-1)
        out += b * pi * (r * (log_pi + h + 1) + dh)
    if slope is not None:
        index = targets.unsqueeze(-1)
        dc = slope * r.gather(-1, index)
        out += dc * pi
        out.scatter_add_(-1, index, -dc)
    return (out / temperature).to(logits.dtype)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.to(promote(logits.dtype))
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def _finite(log_pi: Tensor) -> Tensor:
    # Where pi is 0, pi log pi must be 0 and not 0 * -inf; in any dtype pi is 0 long before log pi is -1e4.
    return log_pi.clamp(min=-1e4)


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    # An einsum took 2.8 times as long.
    return (a * b).sum(-1)


def _select(values: Tensor, targets: Tensor) -> Tensor:
    return values.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _concatenate(chunks: list[TokenStatistics]) -> TokenStatistics:
    return type(chunks[0])(*(torch.cat(field, -1) for field in zip(*chunks, strict=True)))


def _chunks(count: int, policy: SplitPolicy, max_logits: int | None = None) -> Iterator[slice]:
    """Yield slices of ``count`` tokens, each with at most ``max_logits`` logits; a single slice where V is unknown."""
    limit = policy.max_logits if max_logits is None else max_logits
    size = max(1, count) if policy.vocab_size is None else max(1, limit // policy.vocab_size)
    for start in range(0, max(1, count), size):
        yield slice(start, min(start + size, count))
