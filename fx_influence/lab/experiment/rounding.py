"""Estimate the change of entropy caused by float32 rounding alone, and choose steps that exceed it."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_influence.core.tree import promote
from fx_influence.lab.inputs.training_state import TrainingState
from fx_influence.lab.plan import EntropyInfluencePlan
from fx_influence.perturbation import snis_sweep
from fx_influence.types import Batch

DRAWS = 8
"""Number of random roundings that are measured."""
LARGEST_MULTIPLE = 1e4
"""Largest step that ``etas_above_rounding`` chooses, in learning rates."""


def rounding_floor(plan: EntropyInfluencePlan, state: TrainingState, batch_e: Batch) -> float:
    """Return the |Delta H| in nats caused by rounding the weights of theta + eta v, for any v.

    It is the root mean square of 8 random roundings. Rounding moves a weight by an amount uniform within half a unit
    in the last place. Less than one unit cannot be added to a weight, so each is moved by one unit up or down with
    probability 1/24 each, which has that variance.

    Args:
        plan: has the seed and says how the entropy is estimated.
        state: the training state.
        batch_e: E.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    params = {name: p.to(promote(p.dtype)) for name, p in state.params.items()}

    def random_rounding(p: Tensor) -> Tensor:
        u = torch.rand(p.shape, generator=generator).to(p.device)
        unit = torch.nextafter(p.abs(), torch.full_like(p, torch.inf)) - p.abs()
        return ((u < 1 / 24).to(p.dtype) - (u > 23 / 24).to(p.dtype)) * unit

    measure = snis_sweep(params, batch_e, apply=state.apply, **plan.estimation())
    changes = [
        measure({name: random_rounding(p)[None] for name, p in params.items()}, [1.0]).delta_h for _ in range(DRAWS)
    ]
    return torch.cat(changes).square().mean().sqrt().item()


def etas_above_rounding(per_sequence: Tensor, floor: float, factor: float, lr: float) -> Tensor:
    """Return for each rollout the eta at which |eta delta_i| is ``factor`` times ``floor``.

    Args:
        per_sequence: (n_u,), delta_i, nats per unit lr.
        floor: |Delta H| caused by rounding, nats.
        factor: how far above the floor.
        lr: learning rate.

    Returns:
        (n_u,), at most 1e4 lr; 0 where delta_i is 0.

    Example:
        >>> etas_above_rounding(torch.tensor([-0.5, 2.0, 0.0]), floor=2**-20, factor=8.0, lr=2**-10).tolist()
        [1.52587890625e-05, 3.814697265625e-06, 0.0]
    """
    size = per_sequence.double().abs()
    eta = (factor * floor / size).clamp(max=LARGEST_MULTIPLE * lr)
    return torch.where(size > 0, eta, torch.zeros_like(eta))
