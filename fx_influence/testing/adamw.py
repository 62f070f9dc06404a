"""AdamW's step and its linearisation, one parameter at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fx_influence.testing.gradients import add, inner
from fx_influence.types import AdamWState, Gradients, Params, Preconditioner


class Step(NamedTuple):
    """One AdamW step, by parameter name.

    ``direction``: v. ``momentum``, ``weight_decay``: terms of v. ``gain``: the diagonal gamma. ``den``: the denominator
    sqrt(s/B2) + eps. ``clip``: kappa.
    """

    direction: Params
    momentum: Params
    weight_decay: Params
    gain: Params
    den: Params
    clip: float


def adamw(
    grads_per_sequence: Sequence[Gradients],
    state: AdamWState,
    params: Params,
    preconditioner: Preconditioner = "frozen",
    max_grad_norm: float | None = None,
) -> Step:
    """Return AdamW's direction v = (theta' - theta) / eta and its terms, v = momentum + weight_decay + sum_i gamma g_i.

    That split holds for "frozen". For "jacobian", gamma is dv/dg with the clip frozen and v is the same. For
    "rmsprop", gamma = -rho/den, v = gamma g and the other terms are 0. For "lifetime", gamma = -rho kappa/den and
    v = gamma g + weight decay. A parameter that the optimizer does not hold, or that no sequence's gradient reaches,
    has 0 everywhere. ``maximize``: the optimizer sees -g, so gamma changes sign.

    Args:
        grads_per_sequence: g_i by parameter name.
        state: the optimizer's state before the step.
        params: theta by name.
        preconditioner: which diagonal gamma.
        max_grad_norm: bound on the norm of the gradient; None does not clip.
    """
    g = add(grads_per_sequence)
    norm = math.sqrt(inner(g, g))
    clip = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))
    step = Step({}, {}, {}, {}, {}, clip)
    for name, forward_weight in params.items():
        theta = forward_weight if state.master_weights is None else state.master_weights.get(name, forward_weight)
        grad_name = g.get(name)
        for tree in (step.direction, step.momentum, step.weight_decay, step.gain):
            tree[name] = torch.zeros_like(theta)
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
        derivative = (1 - beta1) / (bias1 * den)
        if preconditioner == "jacobian":
            root = (s / bias2).sqrt()
            second_derivative = (m / bias1) * (1 - beta2) * g_hat / (bias2 * root * den**2)
            derivative = derivative - torch.where(
                (root == 0) | (s_used > s), torch.zeros_like(second_derivative), second_derivative
            )
        step.gain[name] = -sign * rho * clip * derivative
    return step


def adam_diagonals(state: AdamWState, step: Step | None = None) -> Params:
    """Return the Fisher kernel's P by name: 1/den of the step, or without one 1/(sqrt(s / (1 - beta2^step)) + eps).

    rho is not a factor of it. Only parameters that the optimizer holds have one. Under amsgrad, max s replaces s.
    """
    if step is not None:
        return {name: 1 / step.den[name] for name in state.exp_avg}
    diagonals = {}
    for name, s in state.exp_avg_sq.items():
        hyper = state.hyper[name]
        used = state.max_exp_avg_sq[name] if hyper.amsgrad else s
        diagonals[name] = 1 / ((used / (1 - hyper.beta2 ** state.step[name])).sqrt() + hyper.eps)
    return diagonals
