"""The precision of a training run: that of its forward, and the share of a step that rounding of weights swallows."""

from __future__ import annotations

import torch

from fx_influence.core.tree import dot
from fx_influence.distributed.sharded_policy import ShardedPolicy
from fx_influence.policy.autocast import HALF_DTYPES
from fx_influence.policy.policy import Policy
from fx_influence.types import Params

MAX_STEP_ROUNDING = 0.1
"""Share of a step lost to rounding above which a warning is issued: a tenth of the optimizer's step is then missing."""


def in_forward_precision(policy: Policy, autocast: torch.dtype | None, loss_scale: float) -> Policy:
    """Return the policy in the precision of a training run's forward.

    A sharded one follows the mixed precision of FSDP2, and stays in its shards' dtype under autocast alone.

    Args:
        policy: of the run's model.
        autocast: dtype of its autocast or mixed precision, None without one.
        loss_scale: factor by which the loss is multiplied.
    """
    if autocast is None or (isinstance(policy, ShardedPolicy) and policy.mixed_precision != autocast):
        return policy
    return policy.with_autocast(autocast, loss_scale)


def step_rounding(moved: Params, direction: Params, lr: float) -> float:
    """Return |moved - lr v| / |lr v| over all parameters, 0 for a step of length 0.

    Args:
        moved: theta' - theta by name, as the optimizer made it.
        direction: v by name, per unit lr.
        lr: the step's learning rate.

    Example:
        >>> import torch
        >>> v = {"w": torch.tensor([3.0, 4.0])}
        >>> step_rounding({"w": torch.tensor([0.0, 2.0])}, v, lr=0.5)
        0.6
    """
    squared_norm = float(dot(direction, direction)) * lr**2
    error = {name: moved[name].double() - lr * v.double() for name, v in direction.items()}
    return (float(dot(error, error)) / squared_norm) ** 0.5 if squared_norm else 0.0


def rounding_warning(step: int, params: Params, lost: float) -> str:
    """Return the warning for a step of which rounding swallows a tenth or more, with the remedy.

    Args:
        step: its number.
        params: the trained weights, whose dtypes decide the remedy.
        lost: share of the step lost, in [0, 1].
    """
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in params.values()})
    remedy = (
        "train float32 weights (model_init_kwargs={'dtype': 'float32'}, with bf16=True for speed)"
        if any(p.dtype in HALF_DTYPES for p in params.values())
        else "at this learning rate that is the size of the step: read the measured change with that error"
    )
    return (
        f"step {step}: {lost:.0%} of the step is lost to the rounding of the trained weights, which are "
        f"{' and '.join(dtypes)}, so the policy does not move as the optimizer means it to; {remedy}"
    )
