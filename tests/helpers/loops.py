"""A training loop of a tiny policy in float64, with GRPO's loss, accumulation and clipping, measured or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fx_influence as fx
from helpers.tiny_models import AttentionModel, make_float64

PROMPTS, COMPLETIONS, PROMPT, WIDTH = 5, 3, 4, 8
COUNT = PROMPTS * COMPLETIONS
CLIP, MAX_NORM = 0.2, 0.05


class Rollouts(NamedTuple):
    """Rollouts of one step, (n, T) and for completions (n, T_c), with one row in three a token shorter."""

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    advantages: Tensor
    behaviour: Tensor

    def part(self, index: slice) -> Rollouts:
        return Rollouts._make(x[index] for x in self)


def completion_values(model: nn.Module, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies of the completions' tokens, (n, T_c)."""
    logprobs = model(rollouts.input_ids, rollouts.attention_mask)[:, PROMPT - 1 : -1].log_softmax(-1)
    ids = rollouts.input_ids[:, PROMPT:, None]
    return logprobs.gather(-1, ids).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


def sample_rollouts(model: nn.Module, seed: int) -> Rollouts:
    """Sample completions of random prompts from the policy."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(11, (PROMPTS, PROMPT), generator=generator).repeat_interleave(COMPLETIONS, 0)
    with torch.no_grad():
        for _ in range(WIDTH - PROMPT):
            probabilities = model(ids, torch.ones_like(ids))[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], 1)
    completion = torch.ones(COUNT, WIDTH - PROMPT, dtype=torch.bool)
    completion[::3, -1] = False
    attended = torch.cat([torch.ones(COUNT, PROMPT, dtype=torch.bool), completion], 1)
    advantages = torch.randn(COUNT, generator=generator, dtype=torch.float64)
    rollouts = Rollouts(ids, attended, completion, advantages, torch.zeros(()))
    with torch.no_grad():
        behaviour = completion_values(model, rollouts)[0]
        # An older policy, whose probabilities differ so much that clipping cuts some gradients.
        noise = 0.3 * torch.randn(behaviour.shape, generator=generator, dtype=torch.float64)
    return rollouts._replace(behaviour=behaviour + noise)


def grpo_loss(logprobs: Tensor, rollouts: Rollouts) -> Tensor:
    """Return GRPO's loss of these rollouts as a part of that of all, with the clipped ratio of the behaviour."""
    ratio = (logprobs - rollouts.behaviour).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    advantages = rollouts.advantages[:, None]
    per_token = -torch.minimum(ratio * advantages, clipped * advantages) * rollouts.completion_mask
    return (per_token.sum(1) / rollouts.completion_mask.sum(1)).sum() / COUNT


def closed_form(rollouts: Rollouts, logprobs: Tensor) -> Tensor:
    """Return GRPO's coefficients, (n, T_c), 0 where clipping cuts the gradient."""
    ratio = (logprobs - rollouts.behaviour).exp()
    cut = torch.where(rollouts.advantages[:, None] > 0, ratio > 1 + CLIP, ratio < 1 - CLIP)
    mask = rollouts.completion_mask
    return rollouts.advantages[:, None] * ratio * ~cut * mask / mask.sum(1, keepdim=True) / COUNT


@dataclass
class Loop:
    """A training loop; ``change`` is called with the model between backward pass and step, ``loss`` makes the loss.

    Attributes:
        steps: number of optimizer steps.
        micro_batches: parts of each step's rollouts.
        options: of ``fx.attach``; None does not measure.
        add: arguments of ``capture.add`` from the rollouts and their values.
        loss: of log-probabilities, entropies and rollouts.
        change: what is done to the gradient before the step.
    """

    steps: int = 2
    micro_batches: int = 1
    options: dict[str, Any] | None = None
    add: Callable[[Rollouts, Tensor, Tensor], dict[str, Any]] = field(default=lambda r, logprobs, _: named(r, logprobs))
    loss: Callable[[Tensor, Tensor, Rollouts], Tensor] = field(default=lambda logprobs, _, r: grpo_loss(logprobs, r))
    change: Callable[[nn.Module], object] = field(
        default=lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    )
    before_step: Callable[[nn.Module, torch.optim.Optimizer, Rollouts], object] = field(default=lambda *_: None)

    def __post_init__(self) -> None:
        self.model = make_float64(AttentionModel)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.1)

    def run(self) -> fx.interop.StepCapture | None:
        """Train, and return the capture where steps are measured."""
        capture = None if self.options is None else fx.attach(self.optimizer, self.model, **self.options)
        for step in range(self.steps):
            rollouts = sample_rollouts(self.model, step)
            size = COUNT // self.micro_batches
            for start in range(0, COUNT, size):
                part = rollouts.part(slice(start, start + size))
                logprobs, entropies = completion_values(self.model, part)
                if capture is not None:
                    capture.add(**self.add(part, logprobs, entropies))
                self.loss(logprobs, entropies, part).backward()
            self.before_step(self.model, self.optimizer, rollouts)
            self.change(self.model)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return capture

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def named(rollouts: Rollouts, logprobs: Tensor) -> dict[str, Any]:
    """Return the arguments of ``capture.add`` for rollouts of the policy itself."""
    return {
        "logprobs": logprobs,
        "input_ids": rollouts.input_ids,
        "attention_mask": rollouts.attention_mask,
        "completion_mask": rollouts.completion_mask,
        "advantages": rollouts.advantages,
    }


def batch_of(rollouts: Rollouts, coefficients: Tensor) -> fx.Batch:
    """Return the update batch with coefficients of the completions' tokens, (n, T_c)."""

    def in_columns(values: Tensor) -> Tensor:
        return torch.cat([values.new_zeros(len(values), PROMPT), values], 1)

    return fx.Batch(
        rollouts.input_ids,
        rollouts.attention_mask,
        in_columns(rollouts.completion_mask),
        in_columns(coefficients),
        group=torch.arange(PROMPTS).repeat_interleave(COMPLETIONS)[: len(coefficients)],
    )
