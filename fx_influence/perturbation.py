"""The change of entropy along one direction: at a finite step by importance sampling, and its derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap

from fx_influence.autodiff.engine import Engine
from fx_influence.batching.prompts import warn_of_shared_prompts
from fx_influence.batching.rows import distinct_rows
from fx_influence.core.batch_checks import check_batch, check_is_batch
from fx_influence.core.checks import check_number, check_options, wrong_type
from fx_influence.core.display import record_line
from fx_influence.core.parameter_checks import check_names, check_policy, first_not_finite
from fx_influence.core.tree import detached
from fx_influence.distributed.engine import make_engine
from fx_influence.estimators.entropy import (
    CompletionValues,
    behaviour_log_ratios,
    behaviour_weights,
    completion_values,
    entropy_coefficients,
    excess_entropies,
    length_coefficients,
)
from fx_influence.estimators.importance import MAX_LOG_WEIGHT, check_ess, importance_weights
from fx_influence.estimators.off_policy import spread_by_rank
from fx_influence.estimators.snis import SnisDelta, snis
from fx_influence.estimators.stderr import cluster_index, cluster_stderr
from fx_influence.objectives import (
    Entropy,
    check_entropy,
    check_evaluation,
    denominator_shares,
    score_share,
    surrogate_coefficients,
)
from fx_influence.policy.policy import with_all_derivatives
from fx_influence.policy.precision import in_float32
from fx_influence.types import Apply, Batch, Params, TokenValues

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class JvpDelta(NamedTuple):
    """Derivatives of the entropy estimate along v at eta = 0, float64.

    Attributes:
        first: scalar, dH/deta, nats per unit lr.
        second: scalar, d2H/deta2, without the factor 1/2; NaN with ``second_order=False`` and for a ``ShardedPolicy``,
            which has no nested derivatives.
        contributions: (n_e,), centred, adding up to ``first``.
        stderr: scalar, standard error of ``first`` over the draw of E's clusters; NaN with fewer than two.
    """

    first: Tensor
    second: Tensor
    contributions: Tensor
    stderr: Tensor

    def __repr__(self) -> str:
        return record_line(self)


def snis_delta(
    params: Params,
    direction: Params,
    eta: float | Tensor,
    batch_e: Batch,
    *,
    apply: Apply,
    objective: Entropy = Entropy(),
    clip: float | None = MAX_LOG_WEIGHT,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    mesh: DeviceMesh | None = None,
) -> SnisDelta:
    """Return the change of entropy from theta to theta + eta v, by importance sampling on rollouts from theta.

    It is raw, in nats. Divided by ``eta`` it tends to ``jvp_delta(...).first`` on the same E. At learning rates near
    1e-6 one rollout's share of a step is about a rounding unit of a float32 weight: take a larger ``eta`` and divide.

    Args:
        params: theta by name.
        direction: v by name; names absent do not move.
        eta: the step.
        batch_e: evaluation batch, n_e rows sampled from the policy at ``params``, or with ``behaviour_logprobs``.
        apply: the policy, from ``make_functional``.
        objective: how the entropy is estimated.
        clip: bound on cumulative log-weights, see ``estimators.snis``; None clips nothing. Derivatives clip weights of
            another policy's rollouts at the default, so the two agree where no other weight is clipped.
        temperature: divides the logits.
        chunk_size: rows per forward; None chooses by tokens.
        mesh: ranks with rows of their own, as in ``influence``.

    Returns:
        ``SnisDelta``. The two forwards run in at least float32 and the weights in float64. The clusters of ``stderr``
        are ``batch_e.group``, or without it the rows, with a ``UserWarning`` where these share prompts.

    Raises:
        TypeError: for an objective other than ``Entropy``, and arguments of another kind.
        ValueError: for a direction of other names or shapes, a batch that cannot be scored, and an effective sample
            size below a quarter of its rows at theta.

    Example:
        >>> ids = torch.tensor([[1, 2, 3], [2, 3, 0]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True, True], [False, True, False]]))
        >>> table = torch.linspace(-1, 1, 16).reshape(4, 4)
        >>> out = snis_delta({"w": table}, {"w": -table}, 0.1, batch, apply=lambda p, ids, mask: p["w"][ids])
        >>> out.delta_h.item() > 0
        True
    """
    check_policy(params, apply)
    if not (isinstance(eta, Tensor) and eta.dim() == 0):
        check_number("eta", eta, "call snis_sweep for several", math.isfinite, "a finite number")
    # Ranks compare directions first, because a rank that refused its direction alone would leave the others waiting.
    engine = make_engine(params, apply, temperature, chunk_size, mesh)
    engine.check_consistent(direction=direction)
    _check_direction("direction", direction, params)
    measure = _measure(params, batch_e, engine, objective, clip, vmapped=False)
    v = direction or {name: torch.zeros_like(p) for name, p in params.items()}
    change = measure({name: eta * x.unsqueeze(0) for name, x in v.items()}, [1.0])
    return SnisDelta(*(field[0, 0] for field in change))


def snis_sweep(
    params: Params,
    batch_e: Batch,
    *,
    apply: Apply,
    objective: Entropy = Entropy(),
    clip: float | None = MAX_LOG_WEIGHT,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    mesh: DeviceMesh | None = None,
) -> Callable[[Params, Sequence[float]], SnisDelta]:
    """Return ``measure(block, etas)``, which is ``snis_delta`` for many directions and steps with one pass at theta.

    ``measure`` takes a direction tree with a leading axis of K directions, and a list of etas; the fields of its result
    have the leading axes (n_eta, K). Directions share passes by vmap where E is small enough for several to fit and
    vmap takes the policy, as a probe of two directions on one row decides; else each direction has separate passes. K
    may differ between calls. Equal rows of E are scored once.

    Args:
        params: theta by name.
        batch_e: evaluation batch, n_e rows sampled from the policy at ``params``, or with ``behaviour_logprobs``.
        apply: the policy, from ``make_functional``.
        objective: how the entropy is estimated.
        clip: bound on cumulative log-weights, see ``estimators.snis``; None clips nothing.
        temperature: divides the logits.
        chunk_size: rows of E times directions per forward; None chooses by tokens.
        mesh: ranks with rows of their own, as in ``influence``; every call of ``measure`` is then made by all ranks
            too, with the same directions.

    Raises:
        TypeError, ValueError: as ``snis_delta``; errors about directions are raised when ``measure`` is called.

    Example:
        >>> ids = torch.tensor([[1, 2, 3], [2, 3, 0]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True, True], [False, True, False]]))
        >>> table = torch.linspace(-1, 1, 16).reshape(4, 4)
        >>> measure = snis_sweep({"w": table}, batch, apply=lambda p, ids, mask: p["w"][ids])
        >>> (measure({"w": torch.stack([-table, table])}, [0.1]).delta_h > 0).tolist()
        [[True, False]]
    """
    check_policy(params, apply)
    engine = make_engine(params, apply, temperature, chunk_size, mesh)
    return _measure(params, batch_e, engine, objective, clip, vmapped=None)


def _measure(
    params: Params,
    batch_e: Batch,
    engine: Engine,
    objective: Entropy,
    clip: float | None,
    vmapped: bool | None,
) -> Callable[[Params, Sequence[float]], SnisDelta]:
    """Return ``snis_sweep``'s function; ``vmapped``: whether directions share passes by vmap, None to probe."""
    batch_e = _checked(params, batch_e, engine, objective, clip)
    warn_of_shared_prompts("batch_e", batch_e, calls=3)
    params, apply = in_float32(detached(params), engine.apply, batch_e, finite=True)
    engine = replace(engine, apply=apply)
    mask, clusters = batch_e.completion_mask, cluster_index(batch_e)
    distinct, index = distinct_rows(batch_e)
    use_vmap = engine.can_vmap_directions(params, distinct) if vmapped is None else vmapped

    def values_at(block: Params, eta: float) -> CompletionValues:
        values = _select(engine.perturbed_values(params, block, eta, distinct, use_vmap), index)
        return CompletionValues(*vmap(lambda v: completion_values(v, mask))(values))

    # Theta is scored by the same operations as the directions, so that a step of 0 gives 0 and equal roundings cancel.
    no_direction = {name: torch.zeros_like(p).unsqueeze(0) for name, p in params.items()}
    base = CompletionValues(*(field[0] for field in values_at(no_direction, 0.0)))
    behaviour = behaviour_log_ratios(base, batch_e)
    if behaviour is not None:
        check_ess(importance_weights(behaviour, objective.estimator, clip))

    def delta(values: CompletionValues) -> SnisDelta:
        return snis(base, values, objective.estimator, objective.normalize, clip, clusters, behaviour)

    def measure(block: Params, etas: Sequence[float]) -> SnisDelta:
        if not isinstance(etas, Sequence):
            raise wrong_type("etas", etas, "a list of numbers", "Pass [eta] for one")
        for eta in etas:
            check_number("etas", eta, "leave it out", math.isfinite, "finite numbers")
        engine.check_consistent(block=block, etas=list(etas))
        _check_direction("block", {name: v[0] for name, v in block.items()}, params)
        return SnisDelta(
            *(torch.stack(field) for field in zip(*(vmap(delta)(values_at(block, eta)) for eta in etas), strict=True))
        )

    return measure


def jvp_delta(
    params: Params,
    direction: Params,
    batch_e: Batch,
    *,
    apply: Apply,
    objective: Entropy = Entropy(),
    temperature: float = 1.0,
    chunk_size: int | None = None,
    second_order: bool = True,
    mesh: DeviceMesh | None = None,
) -> JvpDelta:
    """Return the first and second derivative of the SNIS entropy estimate along v at eta = 0.

    ``first`` = sum_a <grad s_a, v> with the surrogates of ``entropy_coefficients``; on the same E it is the limit of
    ``snis_delta / eta``, with no sampling noise between them. ``second`` gives the step at which the first order is
    10% off: eta_trust = 0.2 |first / second|; it uses the baseline "batch" and all of the score term, whatever the
    objective's are.

    Args:
        params: theta by name.
        direction: v by name; names absent do not move.
        batch_e: evaluation batch, n_e rows sampled from the policy at ``params``, or with ``behaviour_logprobs``.
        apply: the policy, from ``make_functional``.
        objective: how the entropy is estimated.
        temperature: divides the logits.
        chunk_size: rows per forward; None chooses by tokens.
        second_order: also compute ``second``, at about five times the cost of the rest.
        mesh: ranks with rows of their own, as in ``influence``.

    Raises:
        TypeError, ValueError: as ``snis_delta``.

    Example:
        >>> ids = torch.tensor([[1, 2, 3], [2, 3, 0]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True, True], [False, True, False]]))
        >>> table = torch.linspace(-1, 1, 16).reshape(4, 4)
        >>> out = jvp_delta({"w": table}, {"w": -table}, batch, apply=lambda p, ids, mask: p["w"][ids])
        >>> out.first.item() > 0, out.contributions.shape
        (True, torch.Size([2]))
    """
    check_policy(params, apply)
    engine = make_engine(params, with_all_derivatives(apply), temperature, chunk_size, mesh)
    batch_e = _checked(params, batch_e, engine, objective, None, finite_step=False)
    engine.check_consistent(direction=direction)
    _check_direction("direction", direction, params)
    params, apply = in_float32(detached(params), engine.apply, batch_e)
    engine = replace(engine, apply=apply)
    distinct, index = distinct_rows(batch_e)
    values = _select(engine.values(params, distinct), index)
    tangents = _select(engine.jvp(params, direction, distinct), index)
    importance = behaviour_weights(values, batch_e, objective.estimator)
    check_ess(importance)
    weight = surrogate_coefficients(objective, values, batch_e)
    contributions = (weight.logprobs * tangents.logprobs + weight.entropies * tangents.entropies).sum(-1)
    mask, deviating, score = batch_e.completion_mask, contributions, score_share(objective)
    if objective.normalize == "token":
        lengths = length_coefficients(mask, objective.estimator, importance, score)
        excess = excess_entropies(values, mask, objective.estimator, importance)
        deviating = contributions - excess * (lengths * tangents.logprobs).sum()
    if importance is not None and objective.estimator == "per_decision":
        options = (objective.normalize, objective.baseline, score)
        deviating = deviating + spread_by_rank(values, tangents, batch_e, *options)
    shares = denominator_shares(objective, mask, importance)
    stderr = cluster_stderr(deviating, deviating.sum(), shares, cluster_index(batch_e))
    if not second_order:
        return JvpDelta(contributions.sum(), torch.full_like(contributions.sum(), torch.nan), contributions, stderr)

    base, tangent = (completion_values(v, mask) for v in (values, tangents))
    behaviour = behaviour_log_ratios(base, batch_e)
    # Weights at theta are 1 on-policy, far from the bound.
    clip = None if behaviour is None else MAX_LOG_WEIGHT

    def estimate(eta: Tensor) -> Tensor:
        logprobs, entropies = (x + eta * dx for x, dx in zip(base[:2], tangent[:2], strict=True))
        moved = CompletionValues(logprobs, entropies, base.ok)
        return snis(base, moved, objective.estimator, objective.normalize, clip, behaviour=behaviour).delta_h

    # By the chain rule over token values z: H'' = (d2H/dz2)(dz/deta)^2 + dH/dz d2z/deta2.
    through_values = grad(grad(estimate))(contributions.new_zeros(()))
    # The weights are those of the estimate, which supports the baseline "batch" only.
    weight = entropy_coefficients(values, batch_e, objective.estimator, objective.normalize)
    c, b = (torch.zeros_like(w[: len(distinct.input_ids)]).index_add(0, index, w) for w in weight)
    weighted = distinct._replace(coefficients=c, entropy_coefficients=b)
    second = through_values + engine.curvature(params, direction, weighted)
    return JvpDelta(contributions.sum(), second, contributions, stderr)


def _check_direction(field: str, direction: Params, params: Params) -> None:
    check_names(field, direction, params, "pass a direction made from these parameters")
    name = first_not_finite(direction)
    if name is not None:
        raise ValueError(f"{field}[{name!r}] holds NaN or infinity; expected a finite direction. Compute it again")


def _select(values: TokenValues, index: Tensor) -> TokenValues:
    return TokenValues(values.logprobs[..., index, :], values.entropies[..., index, :])


def _checked(
    params: Params, batch_e: Batch, engine: Engine, objective: Entropy, clip: float | None, finite_step: bool = True
) -> Batch:
    """Check the arguments; return the rows of E of all ranks."""
    check_entropy(objective, finite_step)
    check_options(engine.temperature, engine.chunk_size)
    if clip is not None:
        check_number(
            "clip", clip, "pass None to clip nothing", lambda x: x >= 0, "a cumulative log-weight of at least 0"
        )
    check_is_batch("batch_e", batch_e)
    batch_e = engine.full_batch("batch_e", batch_e)
    engine.check_consistent(params=params, objective=objective, clip=clip)
    check_batch("batch_e", batch_e, params, engine.apply)
    check_evaluation(objective, batch_e)
    return batch_e
