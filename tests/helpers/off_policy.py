"""Rollouts of another policy than the one that is attributed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

import fx_influence as fx
from fx_influence.core.tree import shift
from fx_influence.types import AdamWState, Apply, Batch, Estimator, Normalize, Params
from helpers.cases import TinyPolicy, make_apply, random_adamw_state, random_batch, random_direction

VOCAB, WIDTH, TEMPERATURE = 6, 7, 1.3


class OffPolicy(NamedTuple):
    """Rollouts of another policy, with coefficients, at theta."""

    apply: Apply
    params: Params
    batch: Batch
    direction: Params
    opt_state: AdamWState


def make_case(distance: float = 1.0, rows: int = 12) -> OffPolicy:
    generator = torch.Generator().manual_seed(0)
    apply, params = make_apply(TinyPolicy(VOCAB, 6, 1, 2, WIDTH, seed=2))
    batch = random_batch(generator, rows, WIDTH, VOCAB, min_len=1, gaps=True)._replace(group=torch.arange(rows) % 6)
    sampler = shift(params, random_direction(generator, params), distance)
    behaviour = fx.token_values(sampler, batch, apply, TEMPERATURE).logprobs
    state = random_adamw_state(generator, params)
    direction = random_direction(generator, params)
    # Outside completions the values may be anything.
    behaviour = torch.where(batch.completion_mask, behaviour, torch.nan)
    return OffPolicy(apply, params, batch._replace(behaviour_logprobs=behaviour), direction, state)


def options(case: OffPolicy, estimator: Estimator, normalize: Normalize) -> dict[str, Any]:
    return {"apply": case.apply, "objective": fx.Entropy(estimator, normalize), "temperature": TEMPERATURE}
