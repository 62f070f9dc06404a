"""A recorded window of a training run: the state before its first step, and each step's batch and settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fx_influence.core.batch_checks import check_batch, check_is_batch
from fx_influence.core.checks import check_max_grad_norm, check_number, check_tensor, wrong_type
from fx_influence.core.computed import partition_of
from fx_influence.core.display import record_line
from fx_influence.core.dtensor import is_sharded
from fx_influence.core.parameter_checks import check_policy
from fx_influence.optim.adamw import check_adamw_inputs
from fx_influence.types import AdamWHyper, AdamWState, Apply, Batch, Params, Preconditioner


@dataclass(frozen=True, kw_only=True)
class RecordedStep:
    """One optimizer step of a window.

    Attributes:
        batch: update batch, n_u rows with coefficients as they were at this step's parameters.
        lr: reference learning rate, the first nonzero one in group order; 0 where all are 0.
        max_grad_norm: the trainer's gradient clipping, None for none.
        coefficient_slopes: (n_u, T), dc_it / dlog pi(y_it), by which c follows the policy. For an importance ratio over
            recorded log-probabilities, c = a pi / pi_old where the clipping lets the gradient pass and else 0: pass
            ``batch.coefficients`` itself. None for c that is the same whatever the policy, as where a trainer takes
            pi_old from the very forward that it differentiates.
        hyper: hyperparameters by parameter name where they differ from those of the step before; None keeps these.
    """

    batch: Batch
    lr: float
    max_grad_norm: float | None = None
    coefficient_slopes: Tensor | None = None
    hyper: Mapping[str, AdamWHyper] | None = None

    def __repr__(self) -> str:
        return record_line(self)


@dataclass(frozen=True, kw_only=True)
class Window:
    """Consecutive optimizer steps of a training run.

    Attributes:
        params: trainable parameters by name before the first step.
        opt_state: AdamW's state before the first step. Its ``lr`` is not read.
        steps: the K steps, in order.

    Example:
        >>> zero, mask = {"w": torch.zeros(1)}, torch.tensor([[False, True]])
        >>> batch = Batch(torch.tensor([[0, 1]]), torch.ones_like(mask), mask, coefficients=mask.float())
        >>> state = AdamWState(zero, zero, {}, {"w": 0}, {"w": AdamWHyper()}, lr=1e-3)
        >>> len(Window(params=zero, opt_state=state, steps=[RecordedStep(batch=batch, lr=1e-3)] * 3).steps)
        3
    """

    params: Params
    opt_state: AdamWState
    steps: Sequence[RecordedStep]

    def __repr__(self) -> str:
        return record_line(self)


def check_window(window: object, apply: Apply, preconditioner: Preconditioner) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless every step of a window can be replayed.

    Args:
        window: the argument.
        apply: policy of its parameters.
        preconditioner: see ``influence_over_steps``.
    """
    if not isinstance(window, Window):
        raise wrong_type("window", window, "a Window", "Make one of the state before the first step and the steps")
    check_policy(window.params, apply)
    if any(map(is_sharded, window.params.values())):
        raise ValueError("window.params are DTensors; expected plain tensors. Gather them first, as full_tensor() does")
    if not window.steps:
        raise ValueError("window.steps is empty; expected at least one step. Record some")
    if window.opt_state.master_weights is not None:
        raise ValueError(
            "window.opt_state has master_weights, of which window.params are roundings; expected None, since a replay "
            "would round after every step. Pass the master weights as params of a policy in float32"
        )
    if partition_of(window.opt_state.exp_avg) is not None:
        raise ValueError(
            "window.opt_state has live moments of which each process has a part; expected complete ones. Read them by "
            "fx.adamw_state(optimizer, model), without copy=False"
        )
    check_adamw_inputs({}, window.opt_state, window.params, preconditioner, None)
    for k, step in enumerate(window.steps):
        _check_step(f"window.steps[{k}]", step, window, apply)


def _check_step(field: str, step: object, window: Window, apply: Apply) -> None:
    if not isinstance(step, RecordedStep):
        raise wrong_type(field, step, "a RecordedStep", "Make one of the step's batch and learning rate")
    check_is_batch(f"{field}.batch", step.batch)
    check_batch(f"{field}.batch", step.batch, window.params, apply, coefficients=True, may_be_empty=True)
    remedy = "pass the learning rate that the step was made with"
    check_number(f"{field}.lr", step.lr, remedy, lambda x: 0 <= x < math.inf, "a finite number of at least 0")
    check_max_grad_norm(step.max_grad_norm)
    if step.coefficient_slopes is not None:
        _check_slopes(f"{field}.coefficient_slopes", step.coefficient_slopes, step.batch)
    before = window.opt_state.hyper
    if step.hyper is not None and (
        step.hyper.keys() != before.keys() or any(step.hyper[n].amsgrad != before[n].amsgrad for n in before)
    ):
        raise ValueError(
            f"{field}.hyper has other parameters, or another amsgrad, than window.opt_state.hyper; expected the same "
            "optimizer throughout. Divide the window where the optimizer changed"
        )


def _check_slopes(field: str, slopes: Tensor, batch: Batch) -> None:
    check_tensor(field, slopes)
    if slopes.shape != batch.input_ids.shape:
        raise ValueError(
            f"{field} has shape {tuple(slopes.shape)}; expected {tuple(batch.input_ids.shape)}, one for each token. "
            "Pass the batch's coefficients where these are importance ratios"
        )
    if not torch.isfinite(slopes[batch.completion_mask]).all():
        raise ValueError(f"{field} is not finite; expected finite values. Drop or repair those rollouts")
