"""Windows of recorded steps, for ``influence_over_steps`` and made again by ``torch.optim.AdamW`` without a rollout."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fx_influence as fx
from benchmarks.evidence.arithmetic import reinforce
from benchmarks.evidence.bench_counterfactual import MAX_NORM, Step
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.autodiff.token_values import all_token_values
from fx_influence.objectives import surrogate_coefficients
from fx_influence.types import AdamWState, Batch, Params

WINDOW_OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"clip": "differentiated"},
    "window, same E": {"clip": "differentiated"},
    "window, no curvature, same E": {"clip": "differentiated", "curvature": False},
    "window, frozen": {"preconditioner": "frozen"},
}
"""Options of ``influence_over_steps`` by the names of their predictors; those of "same E" have the E that measures."""


def recorded_window(batches: Sequence[Batch], lr: float, params: Params, state: AdamWState) -> fx.Window:
    """Return the window of steps on the batches, whose coefficients are the same whatever the policy."""
    steps = [fx.RecordedStep(batch=batch, lr=lr, max_grad_norm=MAX_NORM) for batch in batches]
    return fx.Window(params=params, opt_state=state, steps=steps)


def replayed(
    model: torch.nn.Module, optimizer: torch.optim.AdamW, batches: Sequence[Batch], lengths: Sequence[int]
) -> list[Params]:
    """Return the trainable parameters by name after each number of steps on the batches; nothing given is changed."""
    model, optimizer = copy.deepcopy((model, optimizer))
    after = []
    for k, batch in enumerate(batches[: lengths[-1]], 1):
        reinforce(model, optimizer, batch)
        if k in lengths:
            after.append(trainable(model))
    return after


def trainable(model: torch.nn.Module) -> Params:
    """Return a copy of a model's trainable parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def without_row(batch: Batch, row: int) -> Batch:
    """Return the batch with one rollout's coefficients at 0, which leaves its loss out."""
    assert batch.coefficients is not None
    return batch._replace(coefficients=batch.coefficients.index_fill(0, torch.tensor([row]), 0.0))


def share_at_end(step: Step, end: Params, e: Batch, objective: fx.Entropy | fx.Objective) -> Tensor:
    """Return <grad H(theta_K), gamma g_i> of one step's rollouts, (n,): their share if later steps change nothing.

    Args:
        step: the first step of a window.
        end: theta_K by name.
        e: evaluation batch of the policy there.
        objective: of which the gradient is taken.
    """
    weights = surrogate_coefficients(objective, all_token_values(end, e, step.apply), e)
    weighted = e._replace(coefficients=weights.logprobs, entropy_coefficients=weights.entropies)
    gradients = {name: x.sum(0) for name, x in step.gradients.items()}
    gain = fx.adamw_decompose(gradients, step.state, step.params, max_grad_norm=MAX_NORM).gain
    # ``batch_gradient`` differentiates minus the weighted sum.
    descent = [(name, g) for name, g in batch_gradient(end, weighted, step.apply).items() if g is not None]
    return -torch.stack([step.gradients[name].flatten(1) @ (gain[name] * g).flatten() for name, g in descent]).sum(0)
