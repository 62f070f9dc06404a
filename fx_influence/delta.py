"""The change of entropy along one direction: at a finite step by importance sampling, and its first two derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap

from fx_influence.checks import check_batch, check_options
from fx_influence.derivatives import token_jvp
from fx_influence.entropy import Completions, check_estimator, completions, entropy_coefficients
from fx_influence.errorbars import cluster_index
from fx_influence.head import LOGITS_AT_ONCE, scores
from fx_influence.importance import SnisDelta, snis
from fx_influence.logprobs import all_token_values, in_place, scored_features, surrogate, token_values
from fx_influence.parts import TOKENS_PER_CHUNK, distinct_rows, parts, row_chunks
from fx_influence.policy import Policy, halves, whole_policy
from fx_influence.tree import check_names, detached, largest_entry, promote, shift
from fx_influence.types import Apply, Batch, Estimator, Normalize, Params, TokenValues


class JvpDelta(NamedTuple):
    """Derivatives of the entropy estimate along v at eta = 0, float64.

    ``first``: dH/deta, nats per unit lr, scalar. ``second``: d2H/deta2, without the factor 1/2, scalar.
    ``contributions``: (n_e,), centred, adding up to ``first``.
    """

    first: Tensor
    second: Tensor
    contributions: Tensor


def snis_delta(
    params: Params,
    direction: Params,
    eta: float | Tensor,
    batch_e: Batch,
    *,
    apply: Apply,
    estimator: Estimator = "per_decision",
    normalize: Normalize = "token",
    clip: float | None = 10.0,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> SnisDelta:
    """Entropy at theta + eta v less that at theta, from rollouts of theta by importance sampling; raw, nats.

    ``direction``: v by name; names absent stay put. Estimators, weights, clipping and contributions: see
    ``importance.snis``. The two forwards run in at least float32 and the weights in float64. Divided by ``eta`` it
    tends to ``jvp_delta(...).first`` on the same E. At learning rates near 1e-6 one rollout's part is about a rounding
    unit of a float32 weight: take ``eta`` larger and divide back.
    Raises ``ValueError`` for a direction of other names or shapes, or a batch that cannot be scored.

    Example:
        >>> ids = torch.tensor([[1, 2, 3], [1, 3, 0]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True, True], [False, True, False]]))
        >>> table = torch.linspace(-1, 1, 16).reshape(4, 4)
        >>> out = snis_delta({"w": table}, {"w": -table}, 0.1, batch, apply=lambda p, ids, mask: p["w"][ids])
        >>> out.delta_h.item() > 0
        True
    """
    _check(params, direction, batch_e, apply, estimator, normalize, temperature, chunk_size)
    measure = snis_sweep(
        params,
        batch_e,
        apply=apply,
        estimator=estimator,
        normalize=normalize,
        clip=clip,
        temperature=temperature,
        chunk_size=chunk_size,
    )
    along = direction or {name: torch.zeros_like(p) for name, p in params.items()}
    moved = measure({name: eta * v.unsqueeze(0) for name, v in along.items()}, [1.0])
    return SnisDelta(*(field[0, 0] for field in moved))


def snis_sweep(
    params: Params,
    batch_e: Batch,
    *,
    apply: Apply,
    estimator: Estimator = "per_decision",
    normalize: Normalize = "token",
    clip: float | None = 10.0,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Callable[[Params, Sequence[float]], SnisDelta]:
    """``snis_delta`` for many directions and etas: ``measure(block, etas)``, with the pass at theta made once, here.

    ``block``: a direction tree with a leading axis of K directions, vmapped as far as E leaves room for more than one
    in a pass; K may differ from call to call. The fields of the result lead with (n_eta, K). Equal rows of E are scored
    once.
    ``chunk_size``: rows of E times directions per forward; None chooses by tokens. Errors as in ``snis_delta``.

    Example:
        >>> ids = torch.tensor([[1, 2, 3], [1, 3, 0]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True, True], [False, True, False]]))
        >>> table = torch.linspace(-1, 1, 16).reshape(4, 4)
        >>> measure = snis_sweep({"w": table}, batch, apply=lambda p, ids, mask: p["w"][ids])
        >>> (measure({"w": torch.stack([-table, table])}, [0.1]).delta_h > 0).tolist()
        [[True, False]]
    """
    _check(params, {}, batch_e, apply, estimator, normalize, temperature, chunk_size)
    params, apply = _widened(params, apply)
    mask, clusters = batch_e.completion_mask, cluster_index(batch_e)
    once, index = distinct_rows(batch_e)
    policy = halves(apply)
    rows_at_once = chunk_size or max(1, TOKENS_PER_CHUNK // mask.shape[1])
    # Products with a matrix for each direction are slow ones: worth it only while one direction fills no pass.
    together = max(1, rows_at_once // len(once.input_ids))
    pieces = parts(once, chunk_size, policy.aligned, TOKENS_PER_CHUNK // together)

    def moved(here: Params, features: Callable[[Params, Tensor, Tensor], Tensor]) -> TokenValues:
        found = []
        for part in pieces:
            scored = scored_features(features(here, part.input_ids, part.attention_mask), part)
            found.append((part, scores(policy, here, scored, part.targets, temperature, LOGITS_AT_ONCE // together)))
        return in_place(found, once)

    def at(block: Params, eta: float) -> Completions:
        found = []
        with torch.no_grad():
            for start in range(0, len(next(iter(block.values()))), together):
                some = {name: v[start : start + together] for name, v in block.items()}
                if together == 1:
                    own = moved(shift(params, {name: v[0] for name, v in some.items()}, eta), policy.features)
                    found.append(TokenValues(*(x.unsqueeze(0) for x in own)))
                else:
                    found.append(vmap(lambda v: moved(shift(params, v, eta), policy.traced))(some))
        values = TokenValues(*(torch.cat(field)[:, index] for field in zip(*found, strict=True)))
        return Completions(*vmap(lambda v: completions(v, mask))(values))

    # By the route that the directions go, so that a step of 0 gives 0 and what rounds alike cancels.
    still = {name: torch.zeros_like(p).unsqueeze(0) for name, p in params.items()}
    base = Completions(*(field[0] for field in at(still, 0.0)))

    def delta(values: Completions) -> SnisDelta:
        return snis(base, values, estimator, normalize, clip, clusters)

    def measure(block: Params, etas: Sequence[float]) -> SnisDelta:
        check_names("block", {name: v[0] for name, v in block.items()}, params, "pass directions of these parameters")
        return SnisDelta(
            *(torch.stack(field) for field in zip(*(vmap(delta)(at(block, eta)) for eta in etas), strict=True))
        )

    return measure


def jvp_delta(
    params: Params,
    direction: Params,
    batch_e: Batch,
    *,
    apply: Apply,
    estimator: Estimator = "per_decision",
    normalize: Normalize = "token",
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> JvpDelta:
    """First and second derivative of the SNIS entropy estimate along v at eta = 0.

    ``first`` = sum_a <grad s_a, v> with the surrogates of ``entropy_coefficients``; on the same E it is the limit of
    ``snis_delta / eta``, with no sampling noise between them. ``second`` gives the step at which the first order is
    10% off: eta_trust = 0.2 |first / second|. Arguments and errors as in ``snis_delta``.

    Example:
        >>> ids = torch.tensor([[1, 2, 3], [1, 3, 0]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True, True], [False, True, False]]))
        >>> table = torch.linspace(-1, 1, 16).reshape(4, 4)
        >>> out = jvp_delta({"w": table}, {"w": -table}, batch, apply=lambda p, ids, mask: p["w"][ids])
        >>> out.first.item() > 0, out.contributions.shape
        (True, torch.Size([2]))
    """
    _check(params, direction, batch_e, apply, estimator, normalize, temperature, chunk_size)
    params, apply = _widened(params, whole_policy(apply))
    once, index = distinct_rows(batch_e)
    values = _at(all_token_values(params, once, apply, temperature, chunk_size), index)
    slope = _at(token_jvp(params, direction, once, apply, temperature, chunk_size), index)
    weight = entropy_coefficients(values, batch_e, estimator, normalize)
    contributions = (weight.logprobs * slope.logprobs + weight.entropies * slope.entropies).sum(-1)

    base, toward = (completions(v, batch_e.completion_mask) for v in (values, slope))

    def estimate(eta: Tensor) -> Tensor:
        logprobs, entropies = (x + eta * dx for x, dx in zip(base[:2], toward[:2], strict=True))
        return snis(base, Completions(logprobs, entropies, base.ok), estimator, normalize, clip=None).delta_h

    # H'' over token values z(eta): how H bends along dz/deta, plus how z itself bends, weighted by dH/dz.
    bend = grad(grad(estimate))(contributions.new_zeros(()))
    c, b = (torch.zeros_like(w[: len(once.input_ids)]).index_add(0, index, w) for w in weight)
    weighted = once._replace(coefficients=c, entropy_coefficients=b)
    curvature = [_curvature(params, direction, part, apply, temperature) for part in row_chunks(weighted, chunk_size)]
    return JvpDelta(contributions.sum(), bend + torch.stack(curvature).sum(), contributions)


def _at(values: TokenValues, index: Tensor) -> TokenValues:
    return TokenValues(values.logprobs[..., index, :], values.entropies[..., index, :])


def _widened(params: Params, apply: Apply) -> tuple[Params, Apply]:
    """The same policy in at least float32: what a small step changes is lost in half precision."""
    params = {name: p.to(promote(p.dtype)) for name, p in detached(params).items()}
    return params, apply.widened() if isinstance(apply, Policy) else apply


def _curvature(params: Params, direction: Params, batch: Batch, apply: Apply, temperature: float) -> Tensor:
    """d2/deta2 at 0 of the token values of theta + eta v, summed with the batch's coefficients."""
    first = next(iter(params.values()))
    scale = largest_entry(direction)
    unit = {name: v / scale for name, v in direction.items()}

    def weighted_sum(eta: Tensor) -> Tensor:
        return -surrogate(token_values(shift(params, unit, eta), batch, apply, temperature), batch)

    # Reverse twice: forward mode over anything fails at SiLU, and is silently wrong at LayerNorm, whose jvp treats its
    # saved mean and deviation as constants.
    eta = torch.zeros((), dtype=promote(first.dtype), device=first.device)
    return grad(grad(weighted_sum))(eta).double() * scale**2


def _check(
    params: Params,
    direction: Params,
    batch_e: Batch,
    apply: Apply,
    estimator: Estimator,
    normalize: Normalize,
    temperature: float,
    chunk_size: int | None,
) -> None:
    check_estimator(estimator, normalize)
    check_options(temperature, chunk_size)
    check_names("direction", direction, params, "pass a direction made from these parameters")
    check_batch("batch_e", batch_e, params, apply)
