"""The influence of every rollout and token of one optimizer step on the policy's entropy."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fx_influence.attribution.group_derivatives import GroupDerivatives, differentiate_by_group
from fx_influence.attribution.linearized_losses import LinearizedLosses, linearize_update, token_derivatives
from fx_influence.attribution.objective_gradients import evaluate_objective
from fx_influence.attribution.result import Influence
from fx_influence.autodiff.ghost import default_budget
from fx_influence.batching.prompts import warn_of_shared_prompts
from fx_influence.core.batch_checks import check_batch, check_is_batch
from fx_influence.core.checks import check_dtypes, check_number, check_options
from fx_influence.core.parameter_checks import check_policy, check_state
from fx_influence.core.tree import Direction, detached, dot
from fx_influence.distributed.engine import make_engine
from fx_influence.estimators.consistency import agree_within, check_identity, check_rounding, tolerance_of
from fx_influence.estimators.stderr import cluster_index, cluster_stderr
from fx_influence.objectives import Entropy, Objective, check_objective
from fx_influence.optim.adamw import check_adamw_inputs
from fx_influence.optim.step import AdamWStep
from fx_influence.policy.policy import with_all_derivatives
from fx_influence.policy.precision import PassPrecision, pass_precision
from fx_influence.types import AdamWState, Apply, Batch, Gradients, Params, Preconditioner

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def influence(
    params: Params,
    batch_u: Batch,
    batch_e: Batch,
    opt_state: AdamWState,
    *,
    apply: Apply,
    objective: Entropy | Objective = Entropy(),
    preconditioner: Preconditioner = "frozen",
    temperature: float = 1.0,
    max_grad_norm: float | None = None,
    grad: Gradients | None = None,
    matrix: bool = False,
    stderr: bool = True,
    per_token: bool = True,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    compute_dtype: torch.dtype | None = None,
    direction_dtype: torch.dtype | None = None,
    offload: torch.device | str | None = None,
    tolerance: float | None = None,
    mesh: DeviceMesh | None = None,
) -> Influence:
    """Return how much each rollout and token of U changes the policy's entropy in one AdamW step, to first order in lr.

    With g_i the gradient of rollout i's loss and v = v_baseline + sum_i gamma * g_i the step's direction,

        delta_i = <grad H, gamma * g_i> = -sum_t (c_it <u, grad log pi(y_it)> + b_it <u, grad h_it>), u = gamma * grad H

    by the adjoint method: a reverse pass over E for grad H, one over U for gamma, and a JVP of U's log-probabilities in
    direction u; no per-sequence gradient is stored. E must be sampled from the policy at ``params``.

    Args:
        params: trainable parameters by name, from ``make_functional``. In bfloat16 or float16 they are raised to
            float32, with the frozen weights of a ``Policy``: the result is that of the function that these weights
            define, to float32's rounding, and obeys float32's tolerance.
        batch_u: update batch, n_u rows, with coefficients (see ``coefficients``). Where no row has a completion token
            every influence is 0 and the baseline remains.
        batch_e: evaluation batch, n_e rows.
        opt_state: AdamW's state before the step.
        apply: the policy, from ``make_functional``.
        objective: ``Entropy(estimator, normalize)``, or surrogates of another functional of the policy, such as
            ``expected_reward(rewards)``; see ``objectives``.
        preconditioner: what a rollout's gradient is multiplied with; see ``adamw_decompose``.
        temperature: divides the logits before log-probabilities and entropies.
        max_grad_norm: the trainer's gradient clipping; see ``adamw_decompose``.
        grad: U's gradient by name, before clipping, where the trainer has it; saves the reverse pass over U.
        matrix: also return M_ai = <grad s_a, gamma * g_i>, from per-sequence gradients in blocks.
        stderr: also return standard errors over E's clusters, which are ``batch_e.group`` or without it the rows, with
            a ``UserWarning`` where these share prompts. They are exact with ``matrix``, else from min(8, C) random
            groups of E's clusters: the reverse pass over U leaves layer inputs and output gradients, from which all
            groups together cost about one more forward. Those that do not fit ``memory_budget`` are recomputed. The
            groups' directions are rounded to bfloat16 where they do not fit it, which moves the error bars by less
            than their noise; where not even two fit, each group costs a JVP.
        per_token: also return influences of tokens. Without them those of rollouts come from ghost products, where all
            parameters have layer inputs and output gradients, without the JVP.
        chunk_size: rows per forward; None chooses by tokens.
        memory_budget: bytes for the cache of E's forward, then for the directions of the error bars and, beside them,
            for the cache of U's reverse pass, then for the gradients of the matrix, in addition to the pass that runs;
            0 caches nothing. None takes 768 MiB, or 16 bytes a trainable parameter where that is more.
        compute_dtype: bfloat16 for the matrix products of all passes, as under ``torch.autocast``; the
            parameters, gradients, directions, softmaxes and sums stay as they are. None computes in the parameters'
            precision, and U's losses in that of the policy's own autocast.
        direction_dtype: of grad H and of u, both as large as the parameters; bfloat16 halves them and rounds each
            entry to 3 digits. None takes at least float32.
        offload: device to hold u on, ``"cpu"`` for host memory, from where the JVP brings it a parameter at a time.
            None leaves it where the parameters are.
        tolerance: relative residual above which the result is refused; None takes 1e-4 for float32 models, 1e-9 for
            float64, 3e-2 where ``apply`` itself computes in half precision.
        mesh: a ``torch.distributed`` device mesh whose ranks all make this call, each with rows of its own in
            ``batch_u`` and ``batch_e`` (none at all is allowed) and everything else the same. Every rank then has the
            result of one process with all rows, rank 0's first; ``objective`` is given all rows of E too.

    Returns:
        ``Influence``. Pure: nothing given is changed and nothing is remembered.

    Raises:
        IdentityError: if the residual exceeds ``tolerance`` times max(sum |delta_i|, |<u, g>|), so that a derivative
            was lost on the way, or if ``rounding`` exceeds sum |delta_i|. Beyond a tenth of it there is a warning.
        TypeError: for an argument of another kind, with the remedy.
        ValueError: for inputs that disagree.

    Example:
        >>> ids = torch.tensor([[1, 2, 3], [2, 3, 0]])
        >>> mask = torch.tensor([[False, True, True], [False, True, False]])
        >>> batch = Batch(ids, ids > 0, mask, coefficients=0.5 * mask)
        >>> apply = lambda p, ids, mask: p["table"][ids]
        >>> params = {"table": torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(4, 4)}
        >>> zero = {"table": torch.zeros(4, 4, dtype=torch.float64)}
        >>> from fx_influence.types import AdamWHyper
        >>> state = AdamWState(zero, zero, {}, {"table": 0}, {"table": AdamWHyper()}, lr=1e-3)
        >>> out = influence(params, batch, batch, state, apply=apply)
        >>> bool(torch.isclose(out.total, out.per_sequence.sum())), abs(out.residual.item()) < 1e-12
        (True, True)

    Source: influence functions through an optimizer step, Koh & Liang 2017, Pruthi et al. (TracIn) 2020.
    """
    _check_types(params, apply, batch_u, batch_e, opt_state, objective)
    check_options(temperature, chunk_size, memory_budget)
    check_dtypes(compute_dtype, direction_dtype)
    if tolerance is not None:
        check_number("tolerance", tolerance, "pass a relative residual, or None for the dtype's", lambda x: x >= 0)
    params, engine = detached(params), make_engine(params, apply, temperature, chunk_size, mesh)
    batch_u, batch_e = engine.full_batch("batch_u", batch_u), engine.full_batch("batch_e", batch_e)
    engine.check_consistent(
        params=params,
        opt_state=opt_state,
        grad=grad,
        objective=objective,
        preconditioner=preconditioner,
        max_grad_norm=max_grad_norm,
        matrix=matrix,
        stderr=stderr,
        per_token=per_token,
        memory_budget=memory_budget,
        compute_dtype=compute_dtype,
        direction_dtype=direction_dtype,
        offload=offload,
        tolerance=tolerance,
    )
    memory_budget = default_budget(params) if memory_budget is None else memory_budget
    if matrix:
        engine.check_gram("matrix=True")
    _check_batches(params, batch_u, batch_e, apply)
    check_adamw_inputs({} if grad is None else grad, opt_state, params, preconditioner, max_grad_norm)
    if stderr:
        warn_of_shared_prompts("batch_e", batch_e)
    precision = pass_precision(params, apply, batch_u, compute_dtype)
    params = precision.params
    # U's losses are differentiated as the trainer does, in its precision; the objective over E with all derivatives.
    engine_u = replace(engine, apply=precision.update_apply)
    engine_e = replace(engine, apply=with_all_derivatives(precision.exact_apply))

    in_groups = stderr and not matrix
    evaluation = evaluate_objective(params, batch_e, objective, in_groups, engine_e, memory_budget, direction_dtype)
    num_directions = evaluation.num_groups if in_groups or precision.wants_two_methods else 0
    update = linearize_update(params, batch_u, grad, engine_u, num_directions, per_token, memory_budget)
    step = AdamWStep.of(update.gradient, opt_state, params, preconditioner, max_grad_norm)

    groups = differentiate_by_group(evaluation, update, step, direction_dtype, offload)
    u, on_step, update_products = groups.u, groups.on_step, groups.update_products
    deltas = _sum_groups(update, groups, per_token, precision)
    per_sequence, rounding = deltas.per_sequence, deltas.rounding

    bound = tolerance_of(precision.lowest) if tolerance is None else tolerance
    by_reverse_mode = torch.stack(list(update_products.values())).sum()
    residual, unattributed = by_reverse_mode - per_sequence.sum(), torch.zeros_like(by_reverse_mode)
    if grad is not None and (
        precision.under_autocast or not agree_within(residual, per_sequence, by_reverse_mode, bound)
    ):
        # The trainer's gradient may hold terms that no coefficient expresses; the influences must still add up.
        unattributed = residual
        by_reverse_mode = (u.scale * dot(engine_u.gradient(params, batch_u), u.unit)).to(per_sequence.device)
        residual = by_reverse_mode - per_sequence.sum()
    check_identity(deltas.method, residual, per_sequence, by_reverse_mode, bound)
    by_group = groups.derivatives.sum(-1)
    gap, total = per_sequence.sum() - by_group.sum(), per_sequence.sum()
    group_bound = max(bound, tolerance_of(torch.bfloat16)) if groups.narrowed else bound
    check_identity("the random groups of E", gap, by_group.sum(0), total, group_bound, against="all of E at once")
    conditioning = _conditioning(update, step, u, per_sequence)
    along_step = groups.along_step
    # The caches of U's passes may take as much memory as the matrix.
    del update, u, groups

    pairwise: Tensor | None = None
    stderrs = _Stderrs.unknown(per_sequence)
    if matrix:
        pairwise = -engine_e.gram(params, evaluation.batch, batch_u, step.gain(), memory_budget, precision.update_apply)
        columns = pairwise.double().sum(0)
        check_identity("the matrix", by_reverse_mode - columns.sum(), columns, by_reverse_mode, bound)
        if rounding.isnan().any():
            rounding = (per_sequence - columns).abs()
        if stderr:
            along_step = -token_derivatives(params, step.direction(), evaluation.batch, engine_e, None).sum(-1)
            stderrs = _Stderrs.of(pairwise.double(), along_step, evaluation.shares, cluster_index(batch_e))
    elif in_groups:
        shares = evaluation.shares.new_zeros(len(by_group)).index_add(0, evaluation.group, evaluation.shares)
        index = torch.arange(len(by_group), device=shares.device)
        stderrs = _Stderrs.of(by_group, along_step, shares, index)

    check_rounding(rounding, per_sequence, precision.lowest, bound)
    # Added up in float64 the terms are exactly additive; the sum of two float32 directions is rounded.
    baseline = on_step.momentum + on_step.weight_decay if preconditioner == "frozen" else on_step.baseline
    return Influence(
        per_sequence=per_sequence,
        per_token=deltas.per_token,
        stderr=stderrs.per_sequence,
        baseline=baseline,
        momentum=on_step.momentum,
        weight_decay=on_step.weight_decay,
        total=baseline + per_sequence.sum() + unattributed,
        residual=residual,
        unattributed=unattributed,
        per_parameter=update_products,
        matrix=pairwise,
        total_stderr=stderrs.total,
        conditioning=conditioning,
        rounding=rounding,
    )


class _Deltas(NamedTuple):
    """Influences by rollout (n_u,) and by token (n_u, T), their rounding (n_u,), and the ``method`` for errors."""

    per_sequence: Tensor
    per_token: Tensor | None
    rounding: Tensor
    method: str


def _sum_groups(
    update: LinearizedLosses, groups: GroupDerivatives, per_token: bool, precision: PassPrecision
) -> _Deltas:
    """Add up the derivatives by group, and compute those of tokens if they are wanted."""
    # With tokens still to come along u, derivatives along rounded directions are left to the error bars.
    awaits_tokens = per_token and not (update.resolves_tokens or precision.wants_two_methods)
    derivatives = update.jvp([groups.u]) if groups.narrowed and not awaits_tokens else groups.derivatives
    by_groups = derivatives.sum((0, 2))
    unknown = torch.full_like(by_groups, torch.nan)
    if update.resolves_tokens:
        tokens = derivatives.sum(0)
        return _Deltas(tokens.sum(-1), tokens if per_token else None, unknown, "the JVP over U")
    if not per_token:
        return _Deltas(by_groups, None, unknown, "ghost products over U")
    tokens = update.token_jvp(groups.u)
    by_tokens = tokens.sum(-1)
    rounding = unknown if groups.narrowed and awaits_tokens else (by_tokens - by_groups).abs()
    if precision.under_autocast:
        # Ghost products hold the very gradient that the optimizer meets; the JVP is rounded another way.
        return _Deltas(by_groups, _adding_up_to(by_groups, tokens), rounding, "ghost products over U")
    return _Deltas(by_tokens, tokens, rounding, "the JVP over U")


def _adding_up_to(per_sequence: Tensor, tokens: Tensor) -> Tensor:
    """Return the tokens' values with each row's gap to ``per_sequence`` distributed in proportion to their sizes."""
    size = tokens.abs()
    weight = size / size.sum(-1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)
    return tokens + (per_sequence - tokens.sum(-1)).unsqueeze(-1) * weight


def _conditioning(update: LinearizedLosses, step: AdamWStep, u: Direction, per_sequence: Tensor) -> Tensor:
    """Return the share of sum |delta| along u on coordinates of fresh denominators; u's memory is reused."""
    step.keep_fresh_(u.unit)
    if not dot(u.unit, u.unit):
        return torch.zeros((), dtype=torch.float64, device=per_sequence.device)
    fresh = Direction.of_(u.unit)
    on_fresh = u.scale * update.jvp([fresh])[0].sum(-1)
    size, rest = on_fresh.abs().sum(), (per_sequence - on_fresh).abs().sum()
    return torch.where(size > 0, size / (size + rest), 0.0)


class _Stderrs(NamedTuple):
    """Standard errors of the influences, (n_u,), and of the total, a scalar."""

    per_sequence: Tensor
    total: Tensor

    @classmethod
    def unknown(cls, per_sequence: Tensor) -> _Stderrs:
        return cls(torch.full_like(per_sequence, torch.nan), torch.full_like(per_sequence.sum(), torch.nan))

    @classmethod
    def of(cls, pairwise: Tensor, along_step: Tensor, shares: Tensor, cluster: Tensor) -> _Stderrs:
        """Return the standard errors of the influences and of the total.

        Args:
            pairwise: (n, n_u), contributions of E's rows or random groups to each influence.
            along_step: (n,), their contributions to the total.
            shares: (n,), their shares of the objective's denominator.
            cluster: int64 (n,), the cluster of each.
        """
        return cls(
            cluster_stderr(pairwise, pairwise.sum(0), shares, cluster),
            cluster_stderr(along_step, along_step.sum(), shares, cluster),
        )


def _check_types(
    params: Params, apply: Apply, batch_u: Batch, batch_e: Batch, opt_state: AdamWState, objective: object
) -> None:
    check_policy(params, apply)
    check_state(opt_state)
    check_is_batch("batch_u", batch_u)
    check_is_batch("batch_e", batch_e)
    check_objective(objective)


def _check_batches(params: Params, batch_u: Batch, batch_e: Batch, apply: Apply) -> None:
    if batch_e.coefficients is not None and batch_u.coefficients is None and batch_u.entropy_coefficients is None:
        raise ValueError(
            "batch_u.coefficients is None and batch_e has some; expected them in batch_u. Swap the two batches"
        )
    check_batch("batch_u", batch_u, params, apply, coefficients=True, may_be_empty=True)
    check_batch("batch_e", batch_e, params, apply)
