"""The change of entropy along one direction: at a finite step by importance sampling, and its first two derivatives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp

from fx_influence.checks import check_batch, check_options
from fx_influence.entropy import Completions, check_estimator, completions, entropy_coefficients
from fx_influence.importance import SnisDelta, snis
from fx_influence.logprobs import TokenValues, all_token_values, concatenate, row_chunks, token_values
from fx_influence.tree import check_names, detached, promote, shift
from fx_influence.types import Apply, Batch, Estimator, Normalize, Params


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
    params = {name: p.to(promote(p.dtype)) for name, p in detached(params).items()}
    base, moved = (
        completions(all_token_values(at, batch_e, apply, temperature, chunk_size), batch_e.completion_mask)
        for at in (params, shift(params, direction, eta))
    )
    return snis(base, moved, estimator, normalize, clip)


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
    """First and second derivative of the SNIS entropy estimate along v at eta = 0, by forward mode.

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
    params = detached(params)
    largest = max((float(v.abs().max()) for v in direction.values() if v.numel()), default=0.0)
    scale = largest if largest > 0 else 1.0
    unit = {name: (v / scale).to(params[name].dtype) for name, v in direction.items()}
    parts = [_expand(params, unit, part, apply, temperature) for part in row_chunks(batch_e, chunk_size)]
    values, once, twice = (concatenate(list(order)) for order in zip(*parts, strict=True))

    mask = batch_e.completion_mask
    weight = entropy_coefficients(values, batch_e, estimator, normalize)
    contributions = (weight.logprobs * once.logprobs + weight.entropies * once.entropies).sum(-1) * scale
    orders = [completions(v, mask) for v in (values, once, twice)]

    def along(eta: Tensor) -> Tensor:
        # A parabola through the token values has the first two derivatives that the estimate needs.
        moved = [x + eta * dx + 0.5 * eta**2 * ddx for x, dx, ddx in zip(*(o[:2] for o in orders), strict=True)]
        return snis(orders[0], Completions(moved[0], moved[1], orders[0].ok), estimator, normalize, clip=None).delta_h

    zero, one = contributions.new_zeros(()), contributions.new_ones(())
    second = jvp(lambda eta: jvp(along, (eta,), (one,))[1], (zero,), (one,))[1]
    return JvpDelta(contributions.sum(), second * scale**2, contributions)


def _expand(
    params: Params, unit: Params, batch: Batch, apply: Apply, temperature: float
) -> tuple[TokenValues, TokenValues, TokenValues]:
    """Token values along theta + eta v at eta = 0 with their first and second derivatives."""
    first = next(iter(params.values()))
    zero = torch.zeros((), dtype=promote(first.dtype), device=first.device)
    one = torch.ones_like(zero)

    def along(eta: Tensor) -> TokenValues:
        return token_values(shift(params, unit, eta), batch, apply, temperature)

    with torch.no_grad():
        expansion = jvp(lambda eta: jvp(along, (eta,), (one,))[:2], (zero,), (one,))
    (values, once), (_, twice) = expansion[:2]
    return values, once, twice


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
