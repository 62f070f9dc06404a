"""What float32 does to a finite step: the change of entropy that rounding alone makes, and steps that clear it."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_influence.core.tree import promote
from fx_influence.lab.inputs.training_state import TrainingState
from fx_influence.lab.plan import EntropyInfluencePlan
from fx_influence.perturbation import snis_sweep
from fx_influence.types import Batch

DRAWS = 8
LARGEST_MULTIPLE = 1e4
"""A step that ``clearing_etas`` picks is at most this many times the learning rate."""


def rounding_floor(plan: EntropyInfluencePlan, state: TrainingState, batch_e: Batch) -> float:
    """|Delta H| in nats that rounding the weights of theta + eta v makes, whatever v: root mean square of 8 draws.

    Rounding moves a weight by an amount uniform within half a unit in the last place. Less than a whole unit cannot be
    added to a weight, so each is moved by one unit up or down with probability 1/24 each, which has that variance.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    params = {name: p.to(promote(p.dtype)) for name, p in state.params.items()}

    def draw(p: Tensor) -> Tensor:
        u = torch.rand(p.shape, generator=generator).to(p.device)
        unit = torch.nextafter(p.abs(), torch.full_like(p, torch.inf)) - p.abs()
        return ((u < 1 / 24).to(p.dtype) - (u > 23 / 24).to(p.dtype)) * unit

    measure = snis_sweep(params, batch_e, apply=state.apply, **plan.estimation())
    moved = [measure({name: draw(p)[None] for name, p in params.items()}, [1.0]).delta_h for _ in range(DRAWS)]
    return torch.cat(moved).square().mean().sqrt().item()


def clearing_etas(per_sequence: Tensor, floor: float, factor: float, lr: float) -> Tensor:
    """For each rollout the eta at which |eta delta_i| is ``factor`` times ``floor``, at most 1e4 lr; 0 for delta_i = 0.

    Example:
        >>> clearing_etas(torch.tensor([-0.5, 2.0, 0.0]), floor=2**-20, factor=8.0, lr=2**-10).tolist()
        [1.52587890625e-05, 3.814697265625e-06, 0.0]
    """
    size = per_sequence.double().abs()
    eta = (factor * floor / size).clamp(max=LARGEST_MULTIPLE * lr)
    return torch.where(size > 0, eta, torch.zeros_like(eta))
