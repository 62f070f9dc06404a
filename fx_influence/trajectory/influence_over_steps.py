"""The influence of every rollout and token of several optimizer steps on the policy's entropy after the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fx_influence.attribution.cross_fitting import evaluation_rows, split_into_groups
from fx_influence.attribution.linearized_losses import token_derivatives
from fx_influence.attribution.objective_gradients import evaluate_objective
from fx_influence.autodiff.engine import Engine
from fx_influence.autodiff.ghost import default_budget
from fx_influence.core.batch_checks import check_batch, check_is_batch
from fx_influence.core.checks import check_choice, check_number, check_options
from fx_influence.core.tree import add, detached, dot
from fx_influence.distributed.engine import make_engine
from fx_influence.estimators.consistency import check_identity, tolerance_of
from fx_influence.objectives import Entropy, Objective, check_evaluation, check_objective
from fx_influence.optim.step import AdamWStep
from fx_influence.optim.transition import Clip, StateCotangent, transpose
from fx_influence.policy.policy import with_all_derivatives
from fx_influence.policy.precision import pass_precision
from fx_influence.trajectory.replay import Replay, replay
from fx_influence.trajectory.result import InfluenceOverSteps
from fx_influence.trajectory.window import RecordedStep, Window, check_window
from fx_influence.types import AdamWState, Apply, Batch, Params

Denominators = Literal["jacobian", "frozen"]


def influence_over_steps(
    window: Window,
    batch_e: Batch,
    *,
    apply: Apply,
    objective: Entropy | Objective = Entropy(),
    preconditioner: Denominators = "jacobian",
    curvature: bool = True,
    clip: Clip = "frozen",
    per_token: bool = False,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    tolerance: float | None = None,
) -> InfluenceOverSteps:
    """Return how much each rollout and token of K recorded steps changes the entropy after the last, to first order.

    With w_i = 1 the weight of rollout i's loss in its step and theta_K the parameters after the window,

        delta_i = dH(theta_K) / dw_i = <l_g, g_i>,

    batches and coefficients given: what other rollouts the changed policy would have drawn is not in it. The cotangents
    (l_theta, l_m, l_s) of AdamW's state begin with (grad H, 0, 0) after the last step and go backward through each, by
    the transposed derivative of AdamW's map (``optim.transition``), which gives l_g and the cotangents before the step;
    to l_theta the gradient's dependence on theta adds the Hessian of the step's loss L times l_g,

        l_theta <- (dtheta'/dtheta)^T l_theta' + (Hess L) l_g.

    A step costs a Hessian-vector product and a JVP in addition to its gradient. The states are recomputed from the
    first.

    Unit: nats. With K = 1 the influences are lr times those of ``influence`` with the same ``preconditioner``, but for
    where the objective is differentiated: after the step, not before.

    AdamW's step is the same when all gradients and first moments are scaled by one factor, second moments by its
    square, and eps by the factor. So with the exact derivative and the clipping factor frozen, always

        sum of all delta_i + momentum + 2 second_moment + eps = 0:

    the exact derivative says what one rollout's weight does beside the others; its sum does not say how the change of
    entropy is made up. ``preconditioner="frozen"`` says that: with K = 1 all its terms add up to the step's first-order
    change. It gives the derivative with every denominator held fixed.

    Args:
        window: the state before the first step, and the steps.
        batch_e: evaluation batch, n_e rows, sampled from the policy after the window.
        apply: the policy, from ``make_functional``.
        objective: as for ``influence``, taken at theta_K.
        preconditioner: ``"jacobian"`` differentiates AdamW's denominators too, ``"frozen"`` holds them fixed.
        curvature: whether a step's gradient follows the parameters; False drops the Hessian, and with it all but
            momentum, second moment and weight decay of what one step does to the next.
        clip: ``"frozen"`` holds each step's clipping factor, ``"differentiated"`` takes its derivative as well.
        per_token: also return influences of tokens.
        temperature: divides the logits before log-probabilities and entropies.
        chunk_size: rows per forward; None chooses by tokens.
        memory_budget: bytes for the states of the window. All are stored where they fit, about 2 sqrt(K) else. None
            takes 768 MiB, or 16 bytes a trainable parameter where that is more.
        tolerance: as for ``influence``.

    Returns:
        ``InfluenceOverSteps``. Pure: nothing given is changed.

    Raises:
        IdentityError: if in a step <l_g, g> by reverse mode and sum_i delta_i by forward mode disagree, or if the sum
            above is not 0, by more than ``tolerance``.
        TypeError: for an argument of another kind, with the remedy.
        ValueError: for inputs that disagree.

    Example:
        >>> from fx_influence.types import AdamWHyper
        >>> ids = torch.tensor([[1, 2, 3], [2, 3, 0]])
        >>> mask = torch.tensor([[False, True, True], [False, True, False]])
        >>> batch = Batch(ids, ids > 0, mask, coefficients=0.5 * mask)
        >>> table = {"table": torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(4, 4)}
        >>> moments = {"table": torch.ones(4, 4, dtype=torch.float64)}
        >>> state = AdamWState(moments, moments, {}, {"table": 9}, {"table": AdamWHyper()}, lr=1e-3)
        >>> window = Window(params=table, opt_state=state, steps=[RecordedStep(batch=batch, lr=1e-3)] * 2)
        >>> out = influence_over_steps(window, batch, apply=lambda p, ids, mask: p["table"][ids])
        >>> [x.shape for x in out.per_sequence], bool(out.residual.abs().max() < 1e-12)
        ([torch.Size([2]), torch.Size([2])], True)

    Source: reverse-mode differentiation of a training run, Maclaurin et al. 2015; Ilyas & Engstrom (MAGIC) 2025.
    """
    check_choice("preconditioner", preconditioner, get_args(Denominators))
    check_choice("clip", clip, get_args(Clip))
    check_options(temperature, chunk_size, memory_budget)
    if tolerance is not None:
        check_number("tolerance", tolerance, "pass a relative residual, or None for the dtype's", lambda x: x >= 0)
    check_window(window, apply, preconditioner)
    check_is_batch("batch_e", batch_e)
    check_objective(objective)
    check_batch("batch_e", batch_e, window.params, apply)
    check_evaluation(objective, batch_e)
    first = window.steps[0].batch
    precision = pass_precision(detached(window.params), apply, first)
    engine = make_engine(precision.params, apply, temperature, chunk_size, None)
    engine_u = replace(engine, apply=precision.update_apply)
    budget = default_budget(precision.params) if memory_budget is None else memory_budget
    replayed = replay(precision.params, window.opt_state, window.steps, engine_u, preconditioner, budget)
    groups = split_into_groups(evaluation_rows(first, batch_e, cross_fit=False), stderr=False, matrix=False)
    engine_e = replace(engine, apply=with_all_derivatives(precision.exact_apply))
    evaluation = evaluate_objective(replayed.params, batch_e, objective, groups, False, engine_e, budget, None)
    bound = tolerance_of(precision.lowest) if tolerance is None else tolerance
    options = _Options(window.steps, engine_u, curvature, clip, bound)
    return _backward(replayed, next(iter(evaluation.gradients)), window.opt_state, preconditioner, per_token, options)


class _Options(NamedTuple):
    """The recorded steps and the options of the recursion; ``bound`` of the identities' relative residuals."""

    steps: Sequence[RecordedStep]
    engine: Engine
    curvature: bool
    clip: Clip
    bound: float


class _StepInfluences(NamedTuple):
    """One step's part of the result: influences of tokens (n_u, T), its decay, eps and residual, and the cotangent."""

    tokens: Tensor
    weight_decay: Tensor
    eps: Tensor
    residual: Tensor
    before: StateCotangent


def _backward(
    replayed: Replay,
    objective_gradient: Params,
    first_state: AdamWState,
    preconditioner: Denominators,
    per_token: bool,
    options: _Options,
) -> InfluenceOverSteps:
    """Return the result of the recursion from the last step to the first.

    Args:
        replayed: the window's steps.
        objective_gradient: grad H at theta_K.
        first_state: AdamW's state before the first step.
        preconditioner: whether denominators are differentiated.
        per_token: whether influences of tokens are kept.
        options: of the recursion.
    """
    cotangent = StateCotangent.of_parameters(objective_gradient, replayed.opt_state)
    by_step: list[_StepInfluences] = []
    for k, step in replayed.backward():
        out = _transpose_step(k, step, cotangent, options)
        cotangent = out.before
        by_step.append(out)
    by_step.reverse()
    per_sequence = tuple(x.tokens.sum(-1) for x in by_step)
    rollouts = torch.stack([x.sum() for x in per_sequence]).sum()
    momentum = dot(cotangent.m, first_state.exp_avg)
    second_moment = dot(cotangent.s, first_state.exp_avg_sq)
    if cotangent.maximum:
        second_moment = second_moment + dot(cotangent.maximum, first_state.max_exp_avg_sq)
    weight_decay, eps, residual = (
        torch.stack([getattr(x, field) for x in by_step]) for field in ("weight_decay", "eps", "residual")
    )
    if preconditioner == "jacobian" and options.clip == "frozen":
        terms = torch.cat([*per_sequence, eps, torch.stack([momentum, 2 * second_moment])])
        zero = torch.zeros_like(rollouts)
        check_identity("the scaling of gradients and moments", -terms.sum(), terms, zero, options.bound, "AdamW's step")
    return InfluenceOverSteps(
        per_sequence=per_sequence,
        per_token=tuple(x.tokens for x in by_step) if per_token else None,
        momentum=momentum,
        second_moment=second_moment,
        weight_decay=weight_decay,
        eps=eps.sum(),
        total=rollouts + momentum + second_moment + weight_decay.sum(),
        residual=residual,
    )


def _transpose_step(k: int, step: AdamWStep, after: StateCotangent, options: _Options) -> _StepInfluences:
    """Return step k's influences and the cotangent of the state before it; raise ``IdentityError`` if they disagree."""
    recorded = options.steps[k]
    out = transpose(step, recorded.lr, after, options.clip)
    tokens = token_derivatives(step.params, out.g, recorded.batch, options.engine, None)
    expected = dot(out.g, {name: g for name, g in step.grads.items() if g is not None}) if out.g else tokens.sum()
    residual, rows = expected - tokens.sum(), tokens.sum(-1)
    check_identity(f"the JVP over step {k}", residual, rows, expected, options.bound)
    before = out.before
    if options.curvature:
        product = options.engine.hessian_product(step.params, out.g, recorded.batch, recorded.coefficient_slopes)
        before = replace(before, theta=add(before.theta, product))
    return _StepInfluences(tokens, out.weight_decay, out.eps, residual, before)
