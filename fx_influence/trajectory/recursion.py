"""The recursion from the last step of a window to the first, for one cotangent or one for each group of E."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.attribution.linearized_losses import token_derivatives
from fx_influence.autodiff.engine import Engine
from fx_influence.core.tree import add, dot
from fx_influence.estimators.consistency import check_identity
from fx_influence.optim.step import AdamWStep
from fx_influence.optim.transition import StateCotangent, transpose_
from fx_influence.trajectory.replay import Replay
from fx_influence.trajectory.window import RecordedStep
from fx_influence.types import AdamWState, Clip, Params


class RecursionOptions(NamedTuple):
    """The recorded steps and the options of the recursion.

    Attributes:
        steps: the K recorded steps.
        engine: engine of the policy as the trainer computes it.
        curvature: whether a step's gradient follows the parameters.
        clip: whether the clipping factors are held fixed.
        bound: of the identities' relative residuals.
        by_group_from: the first step at which E's groups are told apart; before it their sum is carried.
    """

    steps: Sequence[RecordedStep]
    engine: Engine
    curvature: bool
    clip: Clip
    bound: float
    by_group_from: int


class StepParts(NamedTuple):
    """Contributions of C groups of E to one step's part of the result, float64; C is 1 where their sum was carried.

    Of one group alone they are without the first axis.

    Attributes:
        tokens: (C, n_u, T), to the influences of tokens.
        weight_decay: (C,), to the derivative along the step's decay.
        eps: (C,), to that with respect to log eps.
        residual: (C,), <l_g, g> less the sum of ``tokens``.
    """

    tokens: Tensor
    weight_decay: Tensor
    eps: Tensor
    residual: Tensor


class WindowParts(NamedTuple):
    """Contributions of E's groups to the result: ``steps`` in order, and along the moments before the first, (C,)."""

    steps: list[StepParts]
    momentum: Tensor
    second_moment: Tensor


def backward_by_group(
    replayed: Replay, gradients: Sequence[Params], first_state: AdamWState, options: RecursionOptions
) -> WindowParts:
    """Return what each group of E contributes, from one cotangent a group; the steps' gradients are shared.

    Args:
        replayed: the window's steps.
        gradients: the objective's gradient at theta_K by group of E, which are used up.
        first_state: AdamW's state before the first step.
        options: of the recursion.
    """
    cotangents = [StateCotangent.of_parameters(gradient, replayed.opt_state) for gradient in gradients]
    by_step: list[StepParts] = []
    for k, step in replayed.backward():
        if k < options.by_group_from:
            cotangents = [_sum_of(cotangents)]
        parts = [_transpose_step_(k, step, cotangent, options) for cotangent in cotangents]
        by_step.append(StepParts(*map(torch.stack, zip(*parts, strict=True))))
    by_step.reverse()
    momentum = torch.stack([dot(x.m, first_state.exp_avg) for x in cotangents])
    second_moment = torch.stack([dot(x.s, first_state.exp_avg_sq) for x in cotangents])
    if first_state.max_exp_avg_sq:
        second_moment = second_moment + torch.stack([dot(x.maximum, first_state.max_exp_avg_sq) for x in cotangents])
    return WindowParts(by_step, momentum, second_moment)


def _transpose_step_(k: int, step: AdamWStep, cotangent: StateCotangent, options: RecursionOptions) -> StepParts:
    """Return one group's part of step k; raise ``IdentityError`` if the two modes differ.

    Args:
        k: number of the step, from 0.
        step: the step as it was replayed.
        cotangent: of the state after it, which becomes that of the state before it.
        options: of the recursion.
    """
    recorded = options.steps[k]
    out = transpose_(step, recorded.lr, cotangent, options.clip)
    tokens = token_derivatives(step.params, out.g, recorded.batch, options.engine, None)
    expected = dot(out.g, {name: g for name, g in step.grads.items() if g is not None}) if out.g else tokens.sum()
    residual, rows = expected - tokens.sum(), tokens.sum(-1)
    check_identity(f"the JVP over step {k}", residual, rows, expected, options.bound)
    # Before the first step only the moments' cotangents are read.
    if options.curvature and k > 0:
        product = options.engine.hessian_product(step.params, out.g, recorded.batch, recorded.coefficient_slopes)
        for name, x in product.items():
            if x is not None:
                cotangent.theta[name] = cotangent.theta[name] + x
    return StepParts(tokens, out.weight_decay, out.eps, residual)


def _sum_of(cotangents: list[StateCotangent]) -> StateCotangent:
    """Return the sum of cotangents of one state."""
    total = cotangents[0]
    for other in cotangents[1:]:
        total = StateCotangent(*(add(getattr(total, x.name), getattr(other, x.name)) for x in fields(StateCotangent)))
    return total
