"""The influence of every rollout and token of one optimizer step on the policy's entropy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fx_influence.autodiff.engine import Engine
from fx_influence.autodiff.ghost import JvpFn, max_directions
from fx_influence.autodiff.gradients import LinearOutputCaches
from fx_influence.autodiff.gram import MEMORY_BUDGET
from fx_influence.batching.microbatch import select_rows
from fx_influence.batching.prefix_packing import warn_of_shared_prompts
from fx_influence.core.checks import (
    check_batch,
    check_function,
    check_is_batch,
    check_number,
    check_options,
    check_policy,
    check_state,
)
from fx_influence.core.display import influence_html, influence_line
from fx_influence.core.tree import add, detached, dot, dot_by_name, multiply
from fx_influence.distributed.engine import make_engine
from fx_influence.estimators.consistency import TOLERANCE, _within, check_identity, check_rounding
from fx_influence.estimators.entropy import check_estimator, denominator_weights, entropy_coefficients
from fx_influence.estimators.stderr import cluster_index, cluster_stderr, random_group_index
from fx_influence.objectives import Objective, objective_coefficients
from fx_influence.optim.adamw import adamw_decompose, check_adamw_inputs, fresh_part
from fx_influence.policy.autocast import HALF_DTYPES
from fx_influence.policy.policy import Policy, with_all_derivatives
from fx_influence.policy.precision import in_float32, lowest_precision
from fx_influence.types import (
    AdamWState,
    Apply,
    Batch,
    Estimator,
    Gradients,
    Normalize,
    Params,
    Preconditioner,
    TokenValues,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


_NOT_MEASURED = torch.full((), torch.nan, dtype=torch.float64)


class Influence(NamedTuple):
    """First-order influences of one step on the query, by default entropy: nats per unit lr, positive raises it.

    ``per_sequence``: delta_i (n_u,). ``per_token``: delta_it (n_u, T), 0 outside completions, adding up to delta_i, or
    None where it was not asked for.
    ``stderr``: (n_u,), over the draw of E; NaN with ``stderr=False`` or fewer than two clusters. It takes the H that E
    is centred by as known: per token, where a rollout changes completion lengths much, it can be a third off.
    ``baseline``: what the step would do without U's gradients, scalar; its parts ``momentum`` and ``weight_decay``.
    ``total``: baseline + sum_i delta_i + unattributed, the derivative along the whole step; ``total_stderr``: its
    standard error, as those of the rollouts, all three parts included.
    ``residual``: <grad H, gain * g> - sum_i delta_i, g from reverse mode.
    ``unattributed``: <grad H, gain * (grad - sum_i g_i)>, terms of a gradient handed in that no coefficient expresses.
    ``per_parameter``: the rollouts' part by parameter, adding up to sum_i delta_i (and ``unattributed``).
    ``conditioning``: scalar in [0, 1], sum_i |delta_i^J| / sum_i (|delta_i^J| + |delta_i - delta_i^J|), delta_i^J the
    part on coordinates whose denominator is made by this very gradient or by eps, see ``adamw.fresh_part``. Above about
    0.5, as in the first steps of an optimizer, the parts of rollouts are large and cancel: read the total and sums over
    many rollouts, or measure a later step. NaN where it was not measured.
    ``matrix``: M_ai (n_e, n_u), the part of E's rollout a in delta_i, or None. All float64 but the matrix.
    ``rounding``: (n_u,), |delta_i by the JVP - delta_i by products with U's factors or by the matrix|: two roundings of
    one number, so about what rounding makes of it, nats per unit lr. NaN where only one of the two was computed:
    without ``stderr`` and ``matrix`` in float32, without ``per_token``, or where a parameter has no factors.
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
    estimator: Estimator = "per_decision",
    normalize: Normalize = "token",
    gain: Preconditioner = "share",
    temperature: float = 1.0,
    max_grad_norm: float | None = None,
    grad: Gradients | None = None,
    query: Objective | None = None,
    matrix: bool = False,
    stderr: bool = True,
    per_token: bool = True,
    chunk_size: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
    tolerance: float | None = None,
    mesh: DeviceMesh | None = None,
) -> Influence:
    """How much each rollout and token of U changes the policy's entropy in one AdamW step, to first order in lr.

    With g_i the gradient of rollout i's loss and v = v_baseline + sum_i gamma * g_i the step's direction,

        delta_i = <grad H, gamma * g_i> = -sum_t (c_it <u, grad log pi(y_it)> + b_it <u, grad h_it>), u = gamma * grad H

    by the adjoint route: a reverse pass over E for grad H, one over U for gamma, and a JVP of U's log-probabilities in
    direction u; no per-sequence gradient is stored. ``grad H`` is that of ``entropy_coefficients`` (``estimator``,
    ``normalize``) or of ``query``, see ``queries``; E must be sampled from the policy at ``params``.

    ``params``, ``apply``: as ``make_functional`` gives them. ``batch_u``: with coefficients, see ``coefficients``;
    where no row has a completion token every influence is 0 and the baseline remains.
    ``opt_state``: before the step. ``gain``, ``max_grad_norm``: see ``adamw_decompose``.
    ``grad``: U's gradient where the trainer has it (before clipping), which saves the reverse pass over U.
    ``matrix``: also M_ai = <grad s_a, gamma * g_i> by per-sequence gradients in blocks.
    ``stderr``: error bars over E's clusters, which are ``batch_e.group`` or without it the rows, with a ``UserWarning``
    where these share prompts. They are exact with the matrix, else from min(8, C) unions of E's clusters: the reverse
    pass over U leaves the factors of its gradient, and each union costs a product with them. Those that
    ``memory_budget`` has no room for are made again; where it has none for several directions either, each union costs
    a JVP.
    ``per_token``: without it ``per_token`` is None and the influences come from those factors too, without the JVP.
    ``chunk_size``: rows per forward; None chooses by tokens. ``memory_budget``: bytes that the matrix, what is kept of
    U's reverse pass and of E's forward may take, each in its turn, beside the pass at hand; 0 keeps nothing.

    ``mesh``: a ``torch.distributed`` device mesh whose ranks all make this call, each with rows of its own in
    ``batch_u`` and ``batch_e`` (none at all is allowed) and everything else the same. Every rank then has the whole
    result, as of one process with all rows, rank 0's first; ``query`` is given all rows of E too.

    Parameters in bfloat16 or float16 are raised to float32, with the frozen weights of a ``Policy``: the result is that
    of the function that these weights define, to float32's rounding, and obeys float32's tolerance.

    The residual is always computed. Raises ``IdentityError`` where it exceeds ``tolerance`` (None: 1e-4 for float32
    models, 1e-9 for float64, 3e-2 where ``apply`` itself computes in half precision) times
    max(sum |delta_i|, |<u, g>|): a derivative was lost on the way. ``rounding`` beyond a tenth of sum |delta_i| is
    warned of, beyond all of it an ``IdentityError`` too. Raises ``ValueError`` for inputs that disagree. Pure: nothing
    given is changed and nothing is remembered.
    Source: influence functions through an optimizer step, Koh & Liang 2017, Pruthi et al. (TracIn) 2020.

    Example:
        >>> ids = torch.tensor([[1, 2, 3], [2, 3, 0]])
        >>> mask = torch.tensor([[False, True, True], [False, True, False]])
        >>> batch = Batch(ids, ids > 0, mask, coefficients=0.5 * mask)
        >>> apply = lambda p, ids, mask: p["table"][ids]
        >>> params = {"table": torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(4, 4)}
        >>> zero = {"table": torch.zeros(4, 4, dtype=torch.float64)}
        >>> from fx_influence.types import AdamWHyper
        >>> hyper = {"table": AdamWHyper(1.0, 0.9, 0.99, 1e-8, 0.0, False, False)}
        >>> state = AdamWState(zero, zero, {}, {"table": 0}, hyper, lr=1e-3)
        >>> out = influence(params, batch, batch, state, apply=apply)
        >>> bool(torch.isclose(out.total, out.per_sequence.sum())), abs(out.residual.item()) < 1e-12
        (True, True)
    """
    check_policy(params, apply)
    check_state(opt_state)
    check_is_batch("batch_u", batch_u)
    check_is_batch("batch_e", batch_e)
    check_options(temperature, chunk_size, memory_budget)
    if query is not None:
        check_function("query", query, "Pass fx.expected_reward(rewards), fx.kl_to_reference(...) or one of your own")
    if tolerance is not None:
        check_number("tolerance", tolerance, "pass a relative residual, or None for the dtype's", lambda x: x >= 0)
    params, passes = detached(params), make_engine(params, apply, temperature, chunk_size, mesh)
    batch_u, batch_e = passes.whole_batch("batch_u", batch_u), passes.whole_batch("batch_e", batch_e)
    passes.check_agreed(
        params=params,
        opt_state=opt_state,
        grad=grad,
        query=query,
        estimator=estimator,
        normalize=normalize,
        gain=gain,
        max_grad_norm=max_grad_norm,
        matrix=matrix,
        stderr=stderr,
        per_token=per_token,
        memory_budget=memory_budget,
        tolerance=tolerance,
    )
    _check(params, batch_u, batch_e, passes, estimator, normalize, matrix)
    check_adamw_inputs({} if grad is None else grad, opt_state, params, gain, max_grad_norm)
    if stderr:
        warn_of_shared_prompts("batch_e", batch_e)
    half = any(p.dtype in HALF_DTYPES for p in params.values())
    autocast = apply.autocast if isinstance(apply, Policy) else None
    params, exact = in_float32(params, apply, batch_u)
    apply = exact.with_autocast(*autocast) if autocast is not None and isinstance(exact, Policy) else exact
    passes = replace(passes, apply=apply)
    lowest = lowest_precision(params, apply, batch_u)
    twice = half or lowest in HALF_DTYPES
    coefficients_fn = _surrogate_of(batch_e, query, estimator, normalize)
    in_unions = stderr and not matrix
    # U's losses have the derivatives that a trainer takes of them, in its precision; the entropy over E its own.
    over_e = replace(passes, apply=with_all_derivatives(exact))
    batch_e, unions, ascents = _ascents(params, batch_e, coefficients_fn, in_unions, over_e, memory_budget)
    g_u, reach = _over_u(params, batch_u, grad, passes, in_unions, per_token, twice, memory_budget)
    step = adamw_decompose(g_u, opt_state, params, gain, max_grad_norm)

    slope, parts, along, tokens = _adjoint(reach, ascents, step.gain, step.direction if in_unions else {})
    per_sequence = parts.sum(0) if tokens is None else tokens.sum(-1)
    u = multiply(step.gain, slope)
    conditioning = _conditioning(reach, fresh_part(g_u, opt_state, u, step.clip), per_sequence)
    rounding = torch.full_like(per_sequence, torch.nan)
    if reach.contract is not None and tokens is not None:
        rounding = (per_sequence - parts.sum(0)).abs()
        if autocast is not None:
            # Products of factors hold the very gradient that the optimizer meets; the JVP is rounded another way.
            per_sequence = parts.sum(0)
            tokens = _adding_up_to(per_sequence, tokens)
    # What is kept of U may take as much as the matrix.
    del reach

    per_parameter = dot_by_name(g_u, u)
    whole = torch.stack(list(per_parameter.values())).sum()
    bound = TOLERANCE.get(lowest, 0.0) if tolerance is None else tolerance
    unattributed = torch.zeros_like(whole)
    if grad is not None and (
        autocast is not None or not _within(whole - per_sequence.sum(), per_sequence, whole, bound)
    ):
        # The trainer's gradient may hold terms that no coefficient expresses; the rollouts' own must still add up.
        unattributed = whole - per_sequence.sum()
        whole = dot(passes.gradient(params, batch_u), u)
    residual = whole - per_sequence.sum()
    route = "the product with U's factors" if tokens is None else "the JVP over U"
    check_identity(route, residual, per_sequence, whole, bound)
    apart = per_sequence.sum() - parts.sum()
    check_identity("the unions of E", apart, parts.sum(0), per_sequence.sum(), bound, against="E at once")

    kernel = None
    shares = _shares(batch_e, normalize, query)
    error, total_error = torch.full_like(per_sequence, torch.nan), torch.full_like(whole, torch.nan)
    if matrix:
        kernel = -over_e.kernel(params, batch_e, batch_u, step.gain, memory_budget, apply_b=apply)
        columns = kernel.double().sum(0)
        check_identity("the matrix", whole - columns.sum(), columns, whole, bound)
        if rounding.isnan().any():
            rounding = (per_sequence - columns).abs()
        if stderr:
            along = -_token_shares(params, step.direction, batch_e, over_e, None).sum(-1)
            error, total_error = _errors(kernel.double(), along, shares, cluster_index(batch_e))
    elif stderr:
        shares = shares.new_zeros(len(parts)).index_add(0, unions, shares)
        error, total_error = _errors(parts, along, shares, torch.arange(len(parts), device=unions.device))

    check_rounding(rounding, per_sequence, lowest, bound)
    momentum, weight_decay = dot(step.momentum, slope), dot(step.weight_decay, slope)
    # Added up in float64 the parts are exactly additive; the sum of two float32 directions is rounded.
    baseline = momentum + weight_decay if gain == "share" else dot(step.baseline, slope)
    return Influence(
        per_sequence=per_sequence,
        per_token=tokens,
        stderr=error,
        baseline=baseline,
        momentum=momentum,
        weight_decay=weight_decay,
        total=baseline + per_sequence.sum() + unattributed,
        residual=residual,
        unattributed=unattributed,
        per_parameter=per_parameter,
        matrix=kernel,
        total_stderr=total_error,
        conditioning=conditioning,
        rounding=rounding,
    )


def _surrogate_of(
    batch_e: Batch, query: Objective | None, estimator: Estimator, normalize: Normalize
) -> Callable[[TokenValues], Batch]:
    def coefficients_fn(values: TokenValues) -> Batch:
        if query is None:
            wanted = entropy_coefficients(values, batch_e, estimator, normalize)
        else:
            wanted = objective_coefficients(query, values, batch_e)
        return batch_e._replace(coefficients=wanted.logprobs, entropy_coefficients=wanted.entropies)

    return coefficients_fn


def _ascents(
    params: Params,
    batch_e: Batch,
    coefficients_fn: Callable[[TokenValues], Batch],
    in_unions: bool,
    passes: Engine,
    memory_budget: int,
) -> tuple[Batch, Tensor, Iterable[Gradients]]:
    """E with its surrogate, the union of each row, and minus the gradient of every union's part; one for all if not."""
    if not in_unions:
        weighted, whole = passes.reweighted_gradient(params, batch_e, coefficients_fn, memory_budget)
        return weighted, torch.zeros_like(batch_e.input_ids[:, 0]), [whole]
    weighted, unions = coefficients_fn(passes.values(params, batch_e)), random_group_index(batch_e)
    count = int(unions.max()) + 1
    return weighted, unions, (passes.gradient(params, select_rows(weighted, unions == k)) for k in range(count))


class _Reach(NamedTuple):
    """U, and what its reverse pass left for the derivatives of its rollouts along a direction.

    ``together``: how many directions ``contract`` is given at once.
    """

    params: Params
    batch: Batch
    passes: Engine
    contract: JvpFn | None
    caches: LinearOutputCaches | None
    per_token: bool
    together: int

    def token_shares(self, u: Params) -> Tensor:
        return _token_shares(self.params, u, self.batch, self.passes, self.caches)

    def shares(self, u: Params) -> Tensor:
        """<u, g_i> of every rollout, float64 (n,)."""
        return self.token_shares(u).sum(-1) if self.contract is None else self.contract([u])[0]


def _token_shares(params: Params, u: Params, batch: Batch, passes: Engine, caches: LinearOutputCaches | None) -> Tensor:
    """What each token's coefficients make of the derivatives along u, in a loss: minus them, float64 (n, T)."""
    shares = torch.zeros(batch.input_ids.shape, dtype=torch.float64, device=batch.input_ids.device)
    derivatives = passes.jvp(params, u, batch, caches)
    for d, weight in zip(derivatives, (batch.coefficients, batch.entropy_coefficients), strict=True):
        if weight is not None:
            # What stands outside of completions is never read.
            shares -= torch.where(batch.completion_mask, weight.double() * d.double(), 0.0)
    return shares


def _over_u(
    params: Params,
    batch_u: Batch,
    grad: Gradients | None,
    passes: Engine,
    in_unions: bool,
    per_token: bool,
    twice: bool,
    memory_budget: int,
) -> tuple[Gradients, _Reach]:
    """U's gradient, and its reverse pass with factors kept where several directions or no tokens are wanted.

    ``twice``: or where every influence is wanted by two routes.
    """
    own: Gradients | None = None
    reach = _Reach(params, batch_u, passes, None, None, per_token, max_directions(params, memory_budget))
    if in_unions or twice or not (per_token or grad is not None):
        found = passes.linearize(params, batch_u, memory_budget, reach.together if in_unions or twice else 1)
        if found is not None:
            own, reach = found[0], reach._replace(contract=found[1])
    if own is None and grad is None:
        own, caches = passes.gradient_with_cache(params, batch_u, memory_budget)
        reach = reach._replace(caches=caches)
    g_u = own if grad is None else grad
    assert g_u is not None
    return g_u, reach


def _adjoint(
    reach: _Reach, ascents: Iterable[Gradients], gain: Params, direction: Params
) -> tuple[Params, Tensor, Tensor, Tensor | None]:
    """grad H, each union of E's part of the influences (K, n_u) and of <grad H, direction> (K,), the token shares."""
    slope: Params = {}
    along: list[Tensor] = []

    def directions() -> Iterator[Params]:
        nonlocal slope
        for part in ascents:
            # The surrogate is ascended and a loss descended: hence the sign.
            own = {name: torch.zeros_like(x) if (g := part[name]) is None else -g for name, x in gain.items()}
            slope = add(slope, own) if slope else own
            along.append(dot(direction, own))
            yield multiply(gain, own)

    if reach.contract is None:
        shares = torch.stack([reach.token_shares(u) for u in directions()])
        return slope, shares.sum(-1), torch.stack(along), shares.sum(0) if reach.per_token else None
    parts = torch.cat([reach.contract(block) for block in _blocks(directions(), reach.together)])
    tokens = reach.token_shares(multiply(gain, slope)) if reach.per_token else None
    return slope, parts, torch.stack(along), tokens


def _conditioning(reach: _Reach, fresh: Params, per_sequence: Tensor) -> Tensor:
    """The share of sum |delta| that rollouts have along ``fresh``, u on some coordinates; costs one more direction."""
    if not dot(fresh, fresh):
        return torch.zeros((), dtype=torch.float64, device=per_sequence.device)
    made_now = reach.shares(fresh)
    size, rest = made_now.abs().sum(), (per_sequence - made_now).abs().sum()
    return torch.where(size > 0, size / (size + rest), 0.0)


def _adding_up_to(per_sequence: Tensor, tokens: Tensor) -> Tensor:
    """The tokens' values with what their sums lack of the rollouts' dealt out in proportion to their sizes."""
    size = tokens.abs()
    share = size / size.sum(-1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)
    return tokens + (per_sequence - tokens.sum(-1)).unsqueeze(-1) * share


def _blocks(directions: Iterator[Params], size: int) -> Iterator[list[Params]]:
    while block := list(itertools.islice(directions, size)):
        yield block


def _errors(parts: Tensor, along: Tensor, shares: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor]:
    """Of every influence, and of the total, whose parts are those of the derivative ``along`` the whole direction."""
    return (
        cluster_stderr(parts, parts.sum(0), shares, clusters),
        cluster_stderr(along, along.sum(), shares, clusters),
    )


def _shares(batch_e: Batch, normalize: Normalize, query: Objective | None) -> Tensor:
    f = denominator_weights(batch_e.completion_mask, normalize if query is None else "sequence")
    return f / f.sum()


def _check(
    params: Params,
    batch_u: Batch,
    batch_e: Batch,
    passes: Engine,
    estimator: Estimator,
    normalize: Normalize,
    matrix: bool,
) -> None:
    check_estimator(estimator, normalize)
    if matrix:
        passes.check_kernel("matrix=True")
    if batch_e.coefficients is not None and batch_u.coefficients is None and batch_u.entropy_coefficients is None:
        raise ValueError(
            "batch_u.coefficients is None and batch_e has some; expected them in batch_u. Swap the two batches"
        )
    check_batch("batch_u", batch_u, params, passes.apply, coefficients=True, may_be_empty=True)
    check_batch("batch_e", batch_e, params, passes.apply)
