"""The influence of every rollout and token of one optimizer step on the policy's entropy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fx_influence.autodiff.engine import Engine
from fx_influence.autodiff.ghost import max_directions
from fx_influence.autodiff.gradients import LinearOutputCaches
from fx_influence.autodiff.gram import MEMORY_BUDGET
from fx_influence.batching.prompts import warn_of_shared_prompts
from fx_influence.batching.rows import select_rows
from fx_influence.core.batch_checks import check_batch, check_is_batch
from fx_influence.core.checks import check_number, check_options
from fx_influence.core.influence_display import influence_html, influence_line
from fx_influence.core.parameter_checks import check_policy, check_state
from fx_influence.core.tree import Direction, detached, dot, promote
from fx_influence.distributed.engine import make_engine
from fx_influence.estimators.consistency import agree_within, check_identity, check_rounding, tolerance_of
from fx_influence.estimators.stderr import cluster_index, cluster_stderr, random_group_index
from fx_influence.objectives import Entropy, Objective, check_objective, denominator_shares, surrogate_coefficients
from fx_influence.optim.adamw import check_adamw_inputs
from fx_influence.optim.step import AdamWStep, add_inner_products
from fx_influence.policy.policy import with_all_derivatives
from fx_influence.policy.precision import pass_precision
from fx_influence.types import AdamWState, Apply, Batch, Gradients, Params, Preconditioner, TokenValues

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_NOT_MEASURED = torch.full((), torch.nan, dtype=torch.float64)


class Influence(NamedTuple):
    """First-order influences of one step on an objective, by default entropy: nats per unit lr, positive raises it.

    All tensors are float64, except ``matrix``.

    Attributes:
        per_sequence: (n_u,), delta_i.
        per_token: (n_u, T), delta_it, 0 outside completions, adding up to delta_i; None where it was not asked for.
        stderr: (n_u,), over the draw of E; NaN with ``stderr=False`` or fewer than two clusters. It takes the H that E
            is centred by as known: per token, where a rollout changes completion lengths much, it can be a third off.
        baseline: scalar, what the step would do without U's gradients; its parts are ``momentum`` and ``weight_decay``.
        momentum: scalar, the part of ``baseline`` that the old first moment makes.
        weight_decay: scalar, the part of ``baseline`` that decay makes.
        total: scalar, baseline + sum_i delta_i + unattributed, the derivative along the whole step.
        residual: scalar, <grad H, gain * g> - sum_i delta_i, with g from reverse mode.
        unattributed: scalar, <grad H, gain * (grad - sum_i g_i)>, the terms of a gradient handed in that no coefficient
            expresses.
        per_parameter: scalar by parameter name, the rollouts' part, adding up to sum_i delta_i (and ``unattributed``).
        matrix: (n_e, n_u), M_ai, the part of E's rollout a in delta_i, or None.
        total_stderr: scalar, standard error of ``total``, all three parts included.
        conditioning: scalar in [0, 1], sum_i |delta_i^J| / sum_i (|delta_i^J| + |delta_i - delta_i^J|), with delta_i^J
            the part on coordinates whose denominator is made by this very gradient or by eps, see
            ``AdamWStep.keep_fresh_``.
            Above about 0.5, as in the first steps of an optimizer, the parts of rollouts are large and cancel: read the
            total and sums over many rollouts, or measure a later step. NaN where it was not measured.
        rounding: (n_u,), |delta_i by the JVP - delta_i by ghost products or by the matrix|: two roundings of one
            number, nats per unit lr. NaN where only one of the two was computed: without ``stderr`` and ``matrix`` in
            float32, without ``per_token``, or where a parameter has no layer inputs and output gradients.
    """

    per_sequence: Tensor
    per_token: Tensor | None
    stderr: Tensor
    baseline: Tensor
    momentum: Tensor
    weight_decay: Tensor
    total: Tensor
    residual: Tensor
    unattributed: Tensor
    per_parameter: dict[str, Tensor]
    matrix: Tensor | None
    total_stderr: Tensor
    conditioning: Tensor = _NOT_MEASURED
    rounding: Tensor = _NOT_MEASURED

    def __repr__(self) -> str:
        return influence_line(self)

    def _repr_html_(self) -> str:
        return influence_html(self)


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
    memory_budget: int = MEMORY_BUDGET,
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
            groups of E's clusters: the reverse pass over U leaves layer inputs and output gradients, and each group
            costs a product with them. Those that ``memory_budget`` has no room for are made again; where it has none
            for several directions either, each group costs a JVP.
        per_token: also return influences of tokens. Without them those of rollouts come from ghost products where these
            can be had, without the JVP.
        chunk_size: rows per forward; None chooses by tokens.
        memory_budget: bytes that the matrix, what is kept of U's reverse pass and of E's forward may take, each in its
            turn, beside the pass at hand; 0 keeps nothing.
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
        tolerance=tolerance,
    )
    if matrix:
        engine.check_gram("matrix=True")
    _check_batches(params, batch_u, batch_e, apply)
    check_adamw_inputs({} if grad is None else grad, opt_state, params, preconditioner, max_grad_norm)
    if stderr:
        warn_of_shared_prompts("batch_e", batch_e)
    precision = pass_precision(params, apply, batch_u)
    params = precision.params
    # U's losses have the derivatives that a trainer takes of them, in its precision; the objective over E its own.
    engine_u = replace(engine, apply=precision.update_apply)
    engine_e = replace(engine, apply=with_all_derivatives(precision.exact_apply))

    in_groups = stderr and not matrix
    evaluation = _evaluate_objective(params, batch_e, objective, in_groups, engine_e, memory_budget)
    update = _linearize_losses(
        params, batch_u, grad, engine_u, in_groups or precision.wants_two_methods, per_token, memory_budget
    )
    step = AdamWStep.of(update.gradient, opt_state, params, preconditioner, max_grad_norm)

    products, derivatives_by_group = [], []
    sum_of_groups: Params = {}
    for block in _blocks(evaluation.gradients, update.max_directions):
        directions = []
        for g in block:
            products.append(step.inner_products(g))
            # From here on the gradient's memory holds gain * g.
            step.precondition_(g)
            directions.append(Direction.of_(g))
        derivatives_by_group.append(update.jvp(directions))
        if in_groups:
            for direction in directions:
                direction.add_to_(sum_of_groups)
    u = Direction.of_(sum_of_groups) if in_groups else directions[0]
    del block, directions
    derivatives, on_step = torch.cat(derivatives_by_group), add_inner_products(products)
    by_group = derivatives.sum(-1)
    deltas = _sum_groups(update, derivatives, u, per_token, precision.under_autocast)
    per_sequence, rounding = deltas.per_sequence, deltas.rounding

    bound = tolerance_of(precision.lowest) if tolerance is None else tolerance
    by_reverse_mode = torch.stack(list(on_step.update.values())).sum()
    residual, unattributed = by_reverse_mode - per_sequence.sum(), torch.zeros_like(by_reverse_mode)
    if grad is not None and (
        precision.under_autocast or not agree_within(residual, per_sequence, by_reverse_mode, bound)
    ):
        # The trainer's gradient may hold terms that no coefficient expresses; the rollouts' parts must still add up.
        unattributed = residual
        by_reverse_mode = u.scale * dot(engine_u.gradient(params, batch_u), u.unit)
        residual = by_reverse_mode - per_sequence.sum()
    check_identity(deltas.method, residual, per_sequence, by_reverse_mode, bound)
    gap, total = per_sequence.sum() - by_group.sum(), per_sequence.sum()
    check_identity("the random groups of E", gap, by_group.sum(0), total, bound, against="all of E at once")
    conditioning = _conditioning(update, step, u, per_sequence)
    # What was kept of U's passes may take as much memory as the matrix.
    del update, u, sum_of_groups

    pairwise: Tensor | None = None
    stderrs = _Stderrs.unknown(per_sequence)
    if matrix:
        pairwise = -engine_e.gram(params, evaluation.batch, batch_u, step.gain(), memory_budget, precision.update_apply)
        columns = pairwise.double().sum(0)
        check_identity("the matrix", by_reverse_mode - columns.sum(), columns, by_reverse_mode, bound)
        if rounding.isnan().any():
            rounding = (per_sequence - columns).abs()
        if stderr:
            along_step = -_token_derivatives(params, step.direction(), evaluation.batch, engine_e, None).sum(-1)
            stderrs = _Stderrs.of(pairwise.double(), along_step, evaluation.shares, cluster_index(batch_e))
    elif stderr:
        shares = evaluation.shares.new_zeros(len(by_group)).index_add(0, evaluation.group, evaluation.shares)
        groups = torch.arange(len(by_group), device=shares.device)
        stderrs = _Stderrs.of(by_group, torch.stack([p.direction for p in products]), shares, groups)

    check_rounding(rounding, per_sequence, precision.lowest, bound)
    # Added up in float64 the parts are exactly additive; the sum of two float32 directions is rounded.
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
        per_parameter=on_step.update,
        matrix=pairwise,
        total_stderr=stderrs.total,
        conditioning=conditioning,
        rounding=rounding,
    )


class _Evaluation(NamedTuple):
    """The objective over E: its surrogates' coefficients, and its gradient by random groups of E's clusters.

    ``batch``: E with coefficients. ``shares``: (n_e,), each row's share of the objective's denominator, adding up to 1.
    ``group``: int64 (n_e,), the random group of each row. ``gradients``: one for each group, made as they are asked
    for; they add up to grad H.
    """

    batch: Batch
    shares: Tensor
    group: Tensor
    gradients: Iterable[Params]


def _evaluate_objective(
    params: Params,
    batch_e: Batch,
    objective: Entropy | Objective,
    in_groups: bool,
    engine: Engine,
    memory_budget: int,
) -> _Evaluation:
    def with_coefficients(values: TokenValues) -> Batch:
        weights = surrogate_coefficients(objective, values, batch_e)
        return batch_e._replace(coefficients=weights.logprobs, entropy_coefficients=weights.entropies)

    shares = denominator_shares(objective, batch_e.completion_mask)
    if not in_groups:
        weighted, gradient = engine.reweighted_gradient(params, batch_e, with_coefficients, memory_budget)
        return _Evaluation(weighted, shares, torch.zeros_like(batch_e.input_ids[:, 0]), [_ascent_(gradient, params)])
    weighted, group = with_coefficients(engine.values(params, batch_e)), random_group_index(batch_e)
    by_group = (engine.gradient(params, select_rows(weighted, group == k)) for k in range(int(group.max()) + 1))
    return _Evaluation(weighted, shares, group, (_ascent_(g, params) for g in by_group))


def _ascent_(gradient: Gradients, params: Params) -> Params:
    """Return the gradient of an objective from that of its loss, which is minus the objective; None counts as 0.

    The tensors given are reused.
    """
    return {
        name: torch.zeros_like(p, dtype=promote(p.dtype)) if (g := gradient[name]) is None else g.neg_()
        for name, p in params.items()
    }


class _LinearizedLosses(NamedTuple):
    """The losses of U's rollouts to first order: the gradient of their sum, and their derivatives along directions.

    ``gradient``: of the sum, or the trainer's own. ``jvp``: at most ``max_directions`` u_k -> <u_k, g_i>, (K, n_u, T)
    by token where ``resolves_tokens``, else (K, n_u, 1), from ghost products. ``token_jvp``: u -> (n_u, T). float64.
    """

    gradient: Gradients
    jvp: Callable[[Sequence[Direction]], Tensor]
    token_jvp: Callable[[Direction], Tensor]
    resolves_tokens: bool
    max_directions: int


def _linearize_losses(
    params: Params,
    batch_u: Batch,
    grad: Gradients | None,
    engine: Engine,
    several_directions: bool,
    per_token: bool,
    memory_budget: int,
) -> _LinearizedLosses:
    """Linearise by ghost products where several directions or no tokens are wanted, else or failing that by JVPs."""

    def token_jvp(u: Direction) -> Tensor:
        return u.scale * _token_derivatives(params, u.unit, batch_u, engine, None)

    if several_directions or not (per_token or grad is not None):
        at_once = max_directions(params, memory_budget) if several_directions else 1
        linearized = engine.linearize(params, batch_u, memory_budget, at_once)
        if linearized is not None:
            gradient, ghost_products = linearized

            def ghost_jvp(directions: Sequence[Direction]) -> Tensor:
                derivatives = ghost_products([u.unit for u in directions])
                return (derivatives * derivatives.new_tensor([u.scale for u in directions]).unsqueeze(1)).unsqueeze(-1)

            return _LinearizedLosses(
                gradient=gradient if grad is None else grad,
                jvp=ghost_jvp,
                token_jvp=token_jvp,
                resolves_tokens=False,
                max_directions=max_directions(params, memory_budget),
            )
    caches: LinearOutputCaches | None = None
    if grad is None:
        grad, caches = engine.gradient_with_cache(params, batch_u, memory_budget)

    def cached_token_jvp(u: Direction) -> Tensor:
        return u.scale * _token_derivatives(params, u.unit, batch_u, engine, caches)

    return _LinearizedLosses(
        gradient=grad,
        jvp=lambda directions: torch.stack([cached_token_jvp(u) for u in directions]),
        token_jvp=cached_token_jvp,
        resolves_tokens=True,
        max_directions=1,
    )


def _token_derivatives(
    params: Params, u: Params, batch: Batch, engine: Engine, caches: LinearOutputCaches | None
) -> Tensor:
    """Return each token's part of <u, g_i>, -(c_it dlogp_it + b_it dh_it), float64 (n, T)."""
    total = torch.zeros(batch.input_ids.shape, dtype=torch.float64, device=batch.input_ids.device)
    derivatives = engine.jvp(params, u, batch, caches)
    for d, weight in zip(derivatives, (batch.coefficients, batch.entropy_coefficients), strict=True):
        if weight is not None:
            # Values outside completion_values may be anything, NaN included.
            total -= torch.where(batch.completion_mask, weight.double() * d.double(), 0.0)
    return total


class _Deltas(NamedTuple):
    """Influences by rollout (n_u,) and by token (n_u, T), their rounding (n_u,), and the ``method`` for errors."""

    per_sequence: Tensor
    per_token: Tensor | None
    rounding: Tensor
    method: str


def _sum_groups(
    update: _LinearizedLosses, derivatives: Tensor, u: Direction, per_token: bool, under_autocast: bool
) -> _Deltas:
    """Add up the derivatives by group, (K, n_u, T) or (K, n_u, 1), and find those of tokens if they are wanted."""
    by_groups = derivatives.sum((0, 2))
    unknown = torch.full_like(by_groups, torch.nan)
    if update.resolves_tokens:
        tokens = derivatives.sum(0)
        return _Deltas(tokens.sum(-1), tokens if per_token else None, unknown, "the JVP over U")
    if not per_token:
        return _Deltas(by_groups, None, unknown, "ghost products over U")
    tokens = update.token_jvp(u)
    by_tokens = tokens.sum(-1)
    rounding = (by_tokens - by_groups).abs()
    if under_autocast:
        # Ghost products hold the very gradient that the optimizer meets; the JVP is rounded another way.
        return _Deltas(by_groups, _adding_up_to(by_groups, tokens), rounding, "ghost products over U")
    return _Deltas(by_tokens, tokens, rounding, "the JVP over U")


def _adding_up_to(per_sequence: Tensor, tokens: Tensor) -> Tensor:
    """Return the tokens' values with each row's gap to ``per_sequence`` distributed in proportion to their sizes."""
    size = tokens.abs()
    weight = size / size.sum(-1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)
    return tokens + (per_sequence - tokens.sum(-1)).unsqueeze(-1) * weight


def _conditioning(update: _LinearizedLosses, step: AdamWStep, u: Direction, per_sequence: Tensor) -> Tensor:
    """Return the share of sum |delta| along u on coordinates of fresh denominators; u is 0 elsewhere afterwards."""
    step.keep_fresh_(u.unit)
    if not any(bool(x.any()) for x in u.unit.values()):
        return torch.zeros((), dtype=torch.float64, device=per_sequence.device)
    on_fresh = update.jvp([u])[0].sum(-1)
    size, rest = on_fresh.abs().sum(), (per_sequence - on_fresh).abs().sum()
    return torch.where(size > 0, size / (size + rest), 0.0)


class _Stderrs(NamedTuple):
    per_sequence: Tensor
    total: Tensor

    @classmethod
    def unknown(cls, per_sequence: Tensor) -> _Stderrs:
        return cls(torch.full_like(per_sequence, torch.nan), torch.full_like(per_sequence.sum(), torch.nan))

    @classmethod
    def of(cls, parts: Tensor, along_step: Tensor, shares: Tensor, cluster: Tensor) -> _Stderrs:
        """Return those of influences with ``parts`` (n, n_u), and of the total with ``along_step`` (n,)."""
        return cls(
            cluster_stderr(parts, parts.sum(0), shares, cluster),
            cluster_stderr(along_step, along_step.sum(), shares, cluster),
        )


def _blocks(gradients: Iterable[Params], size: int) -> Iterator[list[Params]]:
    remaining = iter(gradients)
    while block := list(itertools.islice(remaining, size)):
        yield block


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
