"""Baselines: the same quantities as one would write them without the library."""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.costs.problems import Problem
from fx_influence.batching.rows import row_chunks
from fx_influence.estimators.entropy import entropy_coefficients
from fx_influence.types import Batch, Params, TokenValues

ROWS_AT_ONCE = 16


def adjoint(p: Problem) -> Tensor:
    """Return delta_it of every token: reverse over E, reverse over U, AdamW's diagonal, a JVP of U along both."""
    with torch.no_grad():
        values = [token_values(p.model, p.params, chunk) for chunk in row_chunks(p.e, ROWS_AT_ONCE)]
    joined = TokenValues(*(torch.cat(x) for x in zip(*values, strict=True)))
    weights = entropy_coefficients(joined, p.e, "per_decision", "token")
    objective_grad = gradient(p, p.e._replace(coefficients=-weights.logprobs, entropy_coefficients=-weights.entropies))
    gain = gain_of(p, gradient(p, p.u))
    u = {name: gain[name] * x for name, x in objective_grad.items()}
    influences = []
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for chunk in row_chunks(p.u, ROWS_AT_ONCE):
            assert chunk.coefficients is not None
            d = jvp(lambda q, chunk=chunk: token_values(p.model, q, chunk)[0], (p.params,), (u,))[1]
            influences.append(-chunk.coefficients * d)
    return torch.cat(influences)


def matrix(p: Problem) -> Tensor:
    """Return M by ``vmap(grad)``, with the gradients of all rows in memory; only eager attention works under vmap."""

    def loss(params: Params, fields: tuple[Tensor, ...]) -> Tensor:
        row = Batch(*(field.unsqueeze(0) for field in fields))
        assert row.coefficients is not None
        return -(row.coefficients * token_values(p.apply, params, row)[0]).sum()

    rows = vmap(grad(loss), in_dims=(None, 0))
    left, right = (rows(p.params, tuple(f for f in batch[:4] if f is not None)) for batch in (p.e, p.u))
    products = [einsum(left[n], p.gain[n], right[n], "a ..., ..., b ... -> a b") for n in p.params]
    return torch.stack(products).sum(0)


def score(p: Problem, params: Params, rows: int = ROWS_AT_ONCE) -> tuple[Tensor, Tensor]:
    """Return float64 log-probabilities and entropies of every token of E, (n_e, T).

    Args:
        p: the problem, with E.
        params: parameters by name.
        rows: rows per pass.
    """
    with torch.no_grad():
        values = [token_values(p.model, params, chunk) for chunk in row_chunks(p.e, rows)]
    logprobs, entropies = (torch.cat(x).double() for x in zip(*values, strict=True))
    return logprobs, entropies


def finite(p: Problem, direction: Params, eta: float, base: tuple[Tensor, Tensor], rows: int = ROWS_AT_ONCE) -> Tensor:
    """Return Delta H at theta + eta v by importance sampling, the estimator ``sequence`` normalized by token.

    Args:
        p: the problem, with E.
        direction: v by name.
        eta: length of the step.
        base: ``score`` at theta.
        rows: rows per pass.
    """
    stepped = score(p, {n: x + eta * direction[n] for n, x in p.params.items()}, rows)
    lengths = p.e.completion_mask.sum(-1).double()
    w = (stepped[0].sum(-1) - base[0].sum(-1)).clamp(-10, 10).exp()
    return (w * stepped[1].sum(-1)).sum() / (w * lengths).sum() - base[1].sum() / lengths.sum()


def loop(p: Problem, indices: range, eta: float, base: tuple[Tensor, Tensor], rows: int) -> Tensor:
    """Loop over rollouts of U as one would write it first: a backward, its direction, and a perturbed pass over E.

    Args:
        p: the problem.
        indices: rollouts of U.
        eta: length of the steps.
        base: ``score`` at theta.
        rows: rows per pass over E.

    Returns:
        Delta H of each rollout.
    """
    gain, changes = gain_of(p, p.gradient), []
    for i in indices:
        row = Batch._make(None if field is None else field[i : i + 1] for field in p.u)
        g = gradient(p, row)
        changes.append(finite(p, {name: gain[name] * x for name, x in g.items()}, eta, base, rows))
    return torch.stack(changes)


def plain_forwards(p: Problem, times: int) -> None:
    """Make forward passes over E and nothing else, in the same chunks."""
    with torch.no_grad():
        for _ in range(times):
            for chunk in row_chunks(p.e, ROWS_AT_ONCE):
                logits_of(p.model, p.params, chunk)


def logits_of(model: Any, params: Params, batch: Batch) -> Tensor:
    """Return the logits (B, T, V) of a module, or of an ``apply``."""
    if not isinstance(model, torch.nn.Module):
        return torch.as_tensor(model(params, batch.input_ids, batch.attention_mask))
    position_ids = (batch.attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    inputs = {"attention_mask": batch.attention_mask, "position_ids": position_ids, "use_cache": False}
    return torch.as_tensor(functional_call(model, params, (batch.input_ids,), inputs).logits)


def token_values(model: Any, params: Params, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies, (B, T), 0 outside completions."""
    log_pi = logits_of(model, params, batch)[:, :-1].log_softmax(-1)
    logprobs = log_pi.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    entropies = -(log_pi.exp() * log_pi).sum(-1)
    mask = batch.completion_mask[:, 1:]
    logprobs, entropies = (torch.nn.functional.pad(x * mask, (1, 0)) for x in (logprobs, entropies))
    return logprobs, entropies


def gradient(p: Problem, batch: Batch) -> Params:
    """Return the gradient of -sum (c log pi + b h)."""
    leaves = {name: x.detach().requires_grad_() for name, x in p.params.items()}
    total: Params = {}
    for chunk in row_chunks(batch, ROWS_AT_ONCE):
        logprobs, entropies = token_values(p.model, leaves, chunk)
        assert chunk.coefficients is not None
        loss = -(chunk.coefficients * logprobs).sum()
        if chunk.entropy_coefficients is not None:
            loss = loss - (chunk.entropy_coefficients * entropies).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        total = {n: g + total[n] if n in total else g for n, g in zip(leaves, grads, strict=True)}
    return total


def gain_of(p: Problem, g: Params) -> Params:
    """Return AdamW's diagonal -(1 - beta1) / (B1 den)."""
    out = {}
    for name, x in g.items():
        h, tau = p.state.hyper[name], p.state.step[name] + 1
        s = h.beta2 * p.state.exp_avg_sq[name] + (1 - h.beta2) * x.square()
        den = (s / (1 - h.beta2**tau)).sqrt() + h.eps
        out[name] = -(1 - h.beta1) / ((1 - h.beta1**tau) * den)
    return out
