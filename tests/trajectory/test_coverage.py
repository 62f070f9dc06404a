"""Error bars of the last step's rollouts as E, over many draws of them from a policy that can be enumerated."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import random_adamw_state, random_batch
from helpers.cross_fitting import EACH, PROMPTS
from helpers.enumeration import exact_log_probs
from helpers.world import PROMPTS as TEXTS
from helpers.world import VOCAB, World, make_world
from torch import Tensor

import fx_influence as fx
from fx_influence.autodiff.engine import Engine
from fx_influence.objectives import Objective
from fx_influence.trajectory.replay import replay
from fx_influence.types import Batch, Params

DRAWS, RATE = 60, 3e-3


def exact_objective(world: World) -> Objective:
    """Return surrogates over all completions whose gradient is that of the exact entropy per token."""

    def objective(logprobs: Tensor, entropies: Tensor, every: Batch) -> Tensor:
        p = logprobs.detach().sum(-1).exp() / world.space.prompts
        h, length = entropies.sum(-1), every.completion_mask.sum(-1).double()
        mean = (p * h.detach()).sum() / (p * length).sum()
        return p * (h + logprobs.sum(-1) * (h.detach() - mean * length)) / (p * length).sum()

    return objective


def drawn_step(world: World, params: Params, generator: torch.Generator) -> Batch:
    """Return an update sampled at ``params`` whose advantages are rewards minus the prompt's mean."""
    sampled = world._replace(probabilities=exact_log_probs(world.apply, params, world.space).exp())
    batch = world.batch(sampled.draw_prompts(PROMPTS, EACH, generator))
    mask = batch.completion_mask
    reward = (((batch.input_ids == 2) & mask).sum(-1).double() - 0.3 * mask.sum(-1)).view(PROMPTS, EACH)
    advantages = (reward - reward.mean(-1, keepdim=True)).flatten()
    group = torch.arange(PROMPTS).repeat_interleave(EACH)
    return batch._replace(coefficients=advantages.unsqueeze(1) * mask, group=group)


@pytest.mark.slow
def test_last_steps_rollouts_cover_the_exact_influence() -> None:
    """Rows of both steps; Student's t has six degrees of freedom where one of eight folds is left out, else seven."""
    world, generator = make_world(4, TEXTS, VOCAB, 4, 1.0), torch.Generator().manual_seed(5)
    state = random_adamw_state(generator, world.params)
    first = fx.RecordedStep(batch=random_batch(generator, 4, 7, VOCAB), lr=RATE)
    params = replay(world.params, state, [first], Engine(world.apply), "jacobian", 2**30, None).params
    objective = exact_objective(world)
    covered, errors = [], []
    for _ in range(DRAWS):
        batch = drawn_step(world, params, generator)
        steps = [first, fx.RecordedStep(batch=batch, lr=RATE)]
        window = fx.Window(params=world.params, opt_state=state, steps=steps)
        out = fx.influence_over_steps(window, None, apply=world.apply, stderr=True)
        every = world.space.batch
        truth = fx.influence_over_steps(window, every, apply=world.apply, objective=objective)
        gaps = [a - b for a, b in zip(out.per_sequence, truth.per_sequence, strict=True)]
        moves = truth.per_sequence[1].abs() > 1e-12
        covered.append(
            torch.stack(
                [
                    (gaps[0].abs() <= 2.365 * out.stderr[0]).double().mean(),
                    (gaps[1].abs() <= 2.447 * out.stderr[1])[moves].double().mean(),
                ]
            )
        )
        errors.append(gaps[1].sum() / truth.per_sequence[1].abs().sum())
    share = torch.stack(covered).mean(0)
    assert share.min() > 0.9, share
    assert share.max() < 0.99, share
    bias = torch.stack(errors)
    assert bias.mean().abs() < 4 * bias.std() / DRAWS**0.5
