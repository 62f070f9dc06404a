"""The influence of every rollout and token of several optimizer steps on the policy's entropy after the last."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from fx_influence.attribution.cross_fitting import EvaluationRows, evaluation_rows, split_into_groups
from fx_influence.attribution.objective_gradients import evaluate_objective
from fx_influence.autodiff.ghost import default_budget
from fx_influence.batching.prompts import warn_of_shared_prompts
from fx_influence.core.batch_checks import check_batch, check_is_batch
from fx_influence.core.checks import check_choice, check_number, check_options
from fx_influence.core.tree import detached
from fx_influence.distributed.engine import make_engine
from fx_influence.estimators.consistency import check_identity, tolerance_of
from fx_influence.estimators.deviations import NOTHING_LEFT_OUT
from fx_influence.objectives import Entropy, Objective, check_evaluation, check_objective
from fx_influence.policy.policy import with_all_derivatives
from fx_influence.policy.precision import pass_precision
from fx_influence.trajectory.error_bars import add_up_groups
from fx_influence.trajectory.recursion import RecursionOptions, WindowParts, backward_by_group
from fx_influence.trajectory.replay import bytes_of_steps, replay
from fx_influence.trajectory.result import InfluenceOverSteps
from fx_influence.trajectory.step_files import check_states_dir, step_directory
from fx_influence.trajectory.window import Window, check_window
from fx_influence.types import Apply, Batch, Clip

Denominators = Literal["jacobian", "frozen"]


def influence_over_steps(
    window: Window,
    batch_e: Batch | None,
    *,
    apply: Apply,
    cross_fit: bool = False,
    objective: Entropy | Objective = Entropy(),
    preconditioner: Denominators = "jacobian",
    curvature: bool = True,
    clip: Clip = "frozen",
    stderr: bool = False,
    per_token: bool = False,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    states_dir: str | os.PathLike[str] | None = None,
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

    Without an E the rollouts of the last step are it, by weights pi_theta_K / pi_behaviour as in ``influence``, and the
    influence of each of that step's rollouts is taken over the other prompts. Rollouts of earlier steps leave nothing
    out: they are other draws.

    Args:
        window: the state before the first step, and the steps.
        batch_e: evaluation batch, n_e rows, sampled from the policy after the window, or with ``behaviour_logprobs``.
            None takes the rollouts of the last step, of four prompts at least, whose ``behaviour_logprobs`` are those
            of its batch, or without them the replayed policy's before that step, which then must have sampled them.
        apply: the policy, from ``make_functional``.
        cross_fit: leave the prompt of each row of every step out of E, where its rollouts have the same ``group``: for
            an E that holds rollouts of several steps, and for steps that share the last one's rollouts where these are
            E. ``group`` must then number the prompts alike in all batches. With ``batch_e=None`` the last step's rows
            leave theirs out anyway.
        objective: as for ``influence``, taken at theta_K.
        preconditioner: ``"jacobian"`` differentiates AdamW's denominators too, ``"frozen"`` holds them fixed.
        curvature: whether a step's gradient follows the parameters; False drops the Hessian, and with it all but
            momentum, second moment and weight decay of what one step does to the next.
        clip: ``"frozen"`` holds each step's clipping factor, ``"differentiated"`` takes its derivative as well: what
            leaving a rollout out does where the trainer clips.
        stderr: also return standard errors over E's clusters, from min(8, C) random groups of them as in ``influence``.
            Each group goes backward through the window: a Hessian-vector product and a JVP a step, and three vectors of
            the parameters' size. That is up to eight times the work after the replay, so it is to be asked for; in
            ``influence``, where all groups cost one more forward, it is the default.
        per_token: also return influences of tokens, and with ``stderr`` the standard errors of sums of them.
        temperature: divides the logits before log-probabilities and entropies.
        chunk_size: rows per forward; None chooses by tokens.
        memory_budget: bytes for the states of the window, in addition to the cotangents. All are stored in memory where
            they fit. None takes 16 bytes a trainable parameter, at least 768 MiB and at most 4 GiB.
        states_dir: an existing directory: states that do not fit are stored there, 16 bytes a trainable parameter and
            step, in files that are deleted at the end. None stores about 2 sqrt(K) of them in memory, and computes
            the steps a second time.
        tolerance: as for ``influence``.

    Returns:
        ``InfluenceOverSteps``. Pure: nothing given is changed.

    Raises:
        IdentityError: if in a step <l_g, g> by reverse mode and sum_i delta_i by forward mode disagree, or if the sum
            above is not 0, by more than ``tolerance``.
        TypeError: for an argument of another kind, with the remedy.
        ValueError: for inputs that disagree, for fewer than four prompts where rollouts of the window are E, for an
            effective sample size below a quarter of E's rows, and for a ``states_dir`` without the space.

    Example:
        >>> from fx_influence.types import AdamWHyper, AdamWState
        >>> ids = torch.tensor([[1, 2, 3], [2, 3, 0]])
        >>> mask = torch.tensor([[False, True, True], [False, True, False]])
        >>> batch = Batch(ids, ids > 0, mask, coefficients=0.5 * mask)
        >>> table = {"table": torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(4, 4)}
        >>> moments = {"table": torch.ones(4, 4, dtype=torch.float64)}
        >>> state = AdamWState(moments, moments, {}, {"table": 9}, {"table": AdamWHyper()}, lr=1e-3)
        >>> from fx_influence.trajectory.window import RecordedStep
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
    check_objective(objective)
    rows = _evaluation_rows(window, batch_e, objective, cross_fit)
    if batch_e is not None:
        check_batch("batch_e", batch_e, window.params, apply)
        if stderr:
            warn_of_shared_prompts("batch_e", batch_e)
    check_evaluation(objective, rows.batch)
    groups = split_into_groups(rows, stderr, matrix=False)
    precision = pass_precision(detached(window.params), apply, window.steps[0].batch)
    engine = make_engine(precision.params, apply, temperature, chunk_size, None)
    engine_u = replace(engine, apply=precision.update_apply)
    engine_e = replace(engine, apply=with_all_derivatives(precision.exact_apply))
    budget = default_budget(precision.params) if memory_budget is None else memory_budget
    size = bytes_of_steps(precision.params, len(window.steps))
    check_states_dir(states_dir, size if size > budget else 0)
    bound = tolerance_of(precision.lowest) if tolerance is None else tolerance
    by_group_from = 0 if stderr else _first_that_leaves_out(window, groups.left_out)
    options = RecursionOptions(window.steps, engine_u, curvature, clip, bound, by_group_from)
    with_deviations = stderr or groups.leave_out
    with step_directory(states_dir) as files:
        replayed = replay(precision.params, window.opt_state, window.steps, engine_u, preconditioner, budget, files)
        e = rows.batch
        if batch_e is None and e.behaviour_logprobs is None:
            e = e._replace(behaviour_logprobs=engine_e.values(replayed.params_before_last, e).logprobs)
        evaluation = evaluate_objective(replayed.params, e, objective, groups, with_deviations, engine_e, budget, None)
        gradients = list(evaluation.deviating_gradients(evaluation.next_length_gradient()))
        parts = backward_by_group(replayed, gradients, window.opt_state, options)
    if preconditioner == "jacobian" and clip == "frozen":
        _check_scaling(parts, bound)
    return add_up_groups(parts, evaluation.group_shares, groups.left_out, per_token, stderr, evaluation.ess)


def _evaluation_rows(
    window: Window, batch_e: Batch | None, objective: Entropy | Objective, cross_fit: bool
) -> EvaluationRows:
    """Return E, the rollouts of the last step where it is None, and the cluster that each row of the window leaves out.

    Raises:
        ValueError: where the last step's rollouts cannot be E.
    """
    *earlier, last = (step.batch for step in window.steps)
    if batch_e is not None:
        check_is_batch("batch_e", batch_e)
    elif not isinstance(objective, Entropy):
        raise ValueError(
            "batch_e is None with another objective than fx.Entropy; expected rollouts of the policy after the window, "
            "since only the entropy is weighted over rollouts of another policy. Pass some"
        )
    elif not cross_fit and any(_same_rollouts(batch, last) for batch in earlier):
        raise ValueError(
            "batch_e is None and steps of the window share the last one's rollouts; expected other rollouts, or "
            "cross_fit=True with a group that numbers the prompts alike in all steps, which leaves them out of one "
            "another's influence. Pass cross_fit=True, or fresh rollouts as batch_e"
        )
    of_last = evaluation_rows(last, batch_e, cross_fit)
    of_earlier = [evaluation_rows(batch, of_last.batch, cross_fit) for batch in earlier]
    parts = (*of_earlier, of_last)
    own_cluster, leave_out = torch.cat([x.own_cluster for x in parts]), any(x.leave_out for x in parts)
    return EvaluationRows(of_last.batch, own_cluster, leave_out)


def _same_rollouts(a: Batch, b: Batch) -> bool:
    return torch.equal(a.input_ids, b.input_ids) and torch.equal(a.completion_mask, b.completion_mask)


def _first_that_leaves_out(window: Window, left_out: Tensor) -> int:
    """Return the number of the first step with a row that leaves a group of E out; that of steps where none does."""
    of_steps = left_out.split([len(step.batch.input_ids) for step in window.steps])
    return next((k for k, x in enumerate(of_steps) if (x != NOTHING_LEFT_OUT).any()), len(of_steps))


def _check_scaling(parts: WindowParts, bound: float) -> None:
    """Raise ``IdentityError`` unless scaling all gradients and moments changes as little as it must, over all of E."""
    rows = [step.tokens.sum((0, 2)) for step in parts.steps]
    eps = [step.eps.sum().reshape(1) for step in parts.steps]
    terms = torch.cat([*rows, *eps, torch.stack([parts.momentum.sum(), 2 * parts.second_moment.sum()])])
    zero = torch.zeros_like(parts.momentum.sum())
    check_identity("the scaling of gradients and moments", -terms.sum(), terms, zero, bound, "AdamW's step")
