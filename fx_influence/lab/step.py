"""The step that U makes from the training state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.adamw import AdamWDecomposition, adamw_decompose
from fx_influence.grads import per_sample_grads, rollout_loss
from fx_influence.lab.batches import State
from fx_influence.lab.plan import EntropyInfluencePlan
from fx_influence.logprobs import batch_gradient, row_chunks
from fx_influence.types import Batch, Gradients

SEQUENCES_PER_BLOCK = 8
"""Rollouts of U whose gradients are held at once."""


class Step(NamedTuple):
    """U's batch with coefficients, its gradient and what AdamW makes of it, and |g_i| (n_u,)."""

    batch: Batch
    gradient: Gradients
    parts: AdamWDecomposition
    gradient_norms: Tensor


def measure_step(plan: EntropyInfluencePlan, state: State, batch: Batch) -> Step:
    """The step that ``batch`` makes from the training state."""
    gradient = batch_gradient(state.params, batch, state.apply, plan.temperature)
    parts = adamw_decompose(gradient, state.opt_state, state.params, plan.gain, plan.max_grad_norm)
    loss = rollout_loss(state.apply, plan.temperature)
    norms = [
        torch.stack([g.flatten(1).norm(dim=1) for g in per_sample_grads(loss, state.params, rows).values()]).norm(dim=0)
        for rows in row_chunks(batch, SEQUENCES_PER_BLOCK)
    ]
    return Step(batch, gradient, parts, torch.cat(norms))
