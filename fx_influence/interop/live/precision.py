"""The precision of a training run: that of its forward, and the shares of steps and moments that rounding swallows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from fx_influence.core.computed import local_shards
from fx_influence.core.dtensor import reduce_over_shards
from fx_influence.core.tree import dot_by_name, every_nth, promote
from fx_influence.distributed.sharded_policy import ShardedPolicy
from fx_influence.interop.low_bit.moments import is_low_bit
from fx_influence.interop.optimizers import adamw_state, require_adamw
from fx_influence.optim.step import AdamWStep
from fx_influence.policy.autocast import HALF_DTYPES
from fx_influence.policy.policy import Policy
from fx_influence.types import Params

MAX_STEP_ROUNDING = 0.1
"""Share of a step lost to rounding above which a warning is issued: a tenth of the optimizer's step is then missing."""

SAMPLED_ENTRIES = 2**22
"""Approximate number of parameter entries from which the shares are estimated."""


def sampling_stride(params: Params) -> int:
    """Return the stride at which ``SAMPLED_ENTRIES`` of all entries are taken."""
    # An odd stride meets every column of a matrix whose rows have a power of two of entries.
    return sum(p.numel() for p in params.values()) // SAMPLED_ENTRIES | 1


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


def step_rounding(moved: Params, direction: Params, lr: float, params: Params | None = None) -> float:
    """Return |moved - lr v| / |lr v| over all parameters, 0 for a step of length 0.

    Args:
        moved: theta' - theta by name, as the optimizer made it.
        direction: v by name, per unit lr.
        lr: the step's learning rate.
        params: by name, of whose local shards these are entries: the share is that over all shards; None for complete
            parameters.

    Example:
        >>> import torch
        >>> v = {"w": torch.tensor([3.0, 4.0])}
        >>> step_rounding({"w": torch.tensor([0.0, 2.0])}, v, lr=0.5)
        0.6
    """
    return _relative_error(moved, {name: lr * v.double() for name, v in direction.items()}, params)


def moment_rounding(step: AdamWStep, stored: Params, params: Params | None = None) -> float:
    """Return |stored - m'| / |m'| over the parameters that a step moved: what quantising its first moments changed.

    The step itself is made from m' in float32; the momentum of the steps after it comes from ``stored``.

    Args:
        step: the optimizer's step, with m before it.
        stored: m' by name, as the optimizer keeps it.
        params: as for ``step_rounding``.
    """
    exact = {}
    for name in filter(step.moves, stored):
        hyper, inputs = step.opt_state.hyper[name], step.inputs(name)
        exact[name] = inputs.first_moment(inputs.second_moment(hyper)[0], hyper)
    return _relative_error(stored, exact, params)


class StepRoundings(NamedTuple):
    """Shares of a step that rounding changed, of its length.

    Attributes:
        step_rounding: of the weights that the optimizer moves, see ``step_rounding``.
        forward_rounding: the same of the forward's weights, where they are roundings of those; else NaN.
        moment_rounding: of the first moments, see ``moment_rounding``; NaN for an optimizer with full moments.
    """

    step_rounding: float
    forward_rounding: float
    moment_rounding: float

    def warning(self, step: int, params: Params, at_random: bool) -> str | None:
        """Return the warning for a step of which rounding changed more than a tenth, with the remedy; else None.

        Args:
            step: its number.
            params: the trained weights, whose dtypes decide the remedy.
            at_random: whether the optimizer rounds at random.
        """
        if max(self.step_rounding, self.forward_rounding) <= MAX_STEP_ROUNDING:
            return None
        if not math.isnan(self.forward_rounding):
            return (
                f"step {step}: the forward's weights are roundings of the float32 ones that the optimizer moves, and "
                f"moved otherwise than these by {self.forward_rounding:.0%} of the step's length; what rounding "
                "keeps back comes with later steps. Its effect on the entropy is measured_rounding in history, a part "
                "of measured"
            )
        return rounding_warning(step, params, self.step_rounding, at_random)


def roundings_of_step(
    sampled: AdamWStep, lr: float, params: Params, optimizer: torch.optim.Optimizer, model: nn.Module
) -> StepRoundings:
    """Return the shares of a step that rounding changed; every process of a training run makes the call.

    Args:
        sampled: the step on every ``sampling_stride(params)``-th entry, made before the step.
        lr: the step's learning rate.
        params: the forward's weights after the step, by name, or this process's shards of them.
        optimizer: after the step.
        model: whose parameters it holds.
    """
    stride, direction = sampling_stride(params), sampled.direction()
    moved = _changes(sampled.params, every_nth(params, stride))
    lost, forward_lost, of_moments = step_rounding(moved, direction, lr, params), math.nan, math.nan
    before = sampled.opt_state.master_weights
    if before is not None:
        after = adamw_state(optimizer, model, copy=False).master_weights
        assert after is not None
        masters = moved | _changes(before, every_nth(local_shards(after), stride))
        lost, forward_lost = step_rounding(masters, direction, lr, params), lost
    if is_low_bit(require_adamw(optimizer)):
        stored = adamw_state(optimizer, model, copy=False).exp_avg
        of_moments = moment_rounding(sampled, every_nth(stored, stride), params)
    return StepRoundings(lost, forward_lost, of_moments)


def _changes(before: Params, after: Params) -> Params:
    """Return after - before by name, in float32 at least."""
    return {name: after[name].to(promote(p.dtype)) - p for name, p in before.items()}


def _relative_error(actual: Params, expected: Params, params: Params | None) -> float:
    """Return |actual - expected| / |expected| over the names of ``expected``, 0 where that is 0.

    Sums of squares are over all shards of ``params``, see ``step_rounding``.
    """
    if not expected:
        return 0.0
    error = {name: actual[name].double() - x.double() for name, x in expected.items()}
    sharded_as = expected if params is None else {name: params[name] for name in expected}
    squares = [x for tree in (error, expected) for x in dot_by_name(tree, tree).values()]
    summed = torch.stack(reduce_over_shards(squares, [*sharded_as.values()] * 2)).view(2, -1).sum(1)
    squared_error, squared_norm = summed.tolist()
    return math.sqrt(squared_error / squared_norm) if squared_norm else 0.0


def rounding_warning(step: int, params: Params, lost: float, at_random: bool = False) -> str:
    """Return the warning for a step of which rounding swallows a tenth or more, with the remedy.

    Args:
        step: its number.
        params: the trained weights, whose dtypes decide the remedy.
        lost: share of the step lost, in [0, 1].
        at_random: whether the optimizer rounds at random, so that the policy moves as it means it to on average.
    """
    if at_random:
        return (
            f"step {step}: rounding of the trained weights at random changed the step by {lost:.0%} of its length, "
            "which averages out over steps; read the measured change of each with that error"
        )
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
