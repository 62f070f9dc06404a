"""Rollouts of a captured micro-batch as tensors on the CPU, which are joined over micro-batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.interop.trl.capture.micro_batch import CaptureError, MicroBatch

OLD_LOGPROBS = "old_per_token_logps"
"""Trainer's input: log-probabilities of the completions under the policy that sampled them."""

REWARDS = "entropy_influence_rewards"
"""Key of the rewards in a generation batch, which the trainer shuffles and splits with its other tensors."""

SOURCES = "entropy_influence_sources"
"""Key of the list of the rollouts' sources in a generation batch, which is shuffled and split likewise."""


class RolloutRows(NamedTuple):
    """Rollouts of a micro-batch, of a process or of all: the fields of ``CapturedStep`` with one row per rollout.

    All are on the CPU. ``prompt_widths``: (n,), columns of each row that hold its prompt and the prompt's padding.
    ``sources``: n names, None where the data set has none.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    coefficients: Tensor
    entropy_coefficients: Tensor
    logprobs: Tensor
    entropies: Tensor | None
    old_logprobs: Tensor | None
    advantages: Tensor
    token_advantages: Tensor | None
    rewards: Tensor
    prompt_widths: Tensor
    sources: tuple[str | None, ...]

    def to(self, device: torch.device | str) -> RolloutRows:
        """Return the rows with their tensors on ``device``."""
        return RolloutRows._make(x.to(device) if isinstance(x, Tensor) else x for x in self)


def rollout_rows(micro_batch: MicroBatch) -> RolloutRows:
    """Return the rollouts of a micro-batch whose loss and backward pass have run.

    Raises ``CaptureError`` where the loss asked for log-probabilities of other tokens than its batch's completions.
    """
    inputs, prompt_ids = micro_batch.inputs, micro_batch.inputs["prompt_ids"]
    count, width = prompt_ids.shape
    prompt_zeros = prompt_ids.new_zeros(prompt_ids.shape, dtype=torch.float32)
    # Tool output is part of a completion but not sampled, so it is masked out where there is some.
    sampled = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    completion_mask = torch.cat([prompt_zeros, sampled], dim=1).bool()
    input_ids = torch.cat([prompt_ids, inputs["completion_ids"]], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).bool()
    _check_scored_tokens(micro_batch, input_ids, attention_mask)

    def on_completions(values: Tensor) -> Tensor:
        return torch.cat([prompt_zeros, values.float()], dim=1).masked_fill(~completion_mask, 0.0)

    def coefficients(index: int) -> Tensor:
        gradients = [scoring.gradients[index] for scoring in micro_batch.scorings if index in scoring.gradients]
        return on_completions(-sum(gradients, torch.zeros_like(micro_batch.scorings[0].values[0])))

    logprobs, old_logprobs = on_completions(micro_batch.scorings[0].values[0]), None
    if OLD_LOGPROBS in inputs:
        old_logprobs = on_completions(inputs[OLD_LOGPROBS])
    elif "old_logps" not in inputs:
        # The trainer keeps none where the policy is the one that sampled.
        old_logprobs = logprobs
    entropies = next((x for _, x in (scoring.values for scoring in micro_batch.scorings) if x is not None), None)
    advantages = inputs.get("advantages", torch.full((count,), torch.nan))
    token_advantages = None
    if advantages.dim() == 2 and advantages.shape[1] > 1:
        token_advantages = on_completions(advantages)
        advantages = token_advantages.sum(1) / completion_mask.sum(1).clamp(min=1)
    return RolloutRows(
        input_ids=input_ids,
        attention_mask=attention_mask,
        completion_mask=completion_mask,
        coefficients=coefficients(0),
        entropy_coefficients=coefficients(1),
        logprobs=logprobs,
        entropies=None if entropies is None else on_completions(entropies),
        old_logprobs=old_logprobs,
        advantages=advantages.flatten(),
        token_advantages=token_advantages,
        rewards=inputs.get(REWARDS, torch.full((count,), torch.nan)).flatten(),
        prompt_widths=torch.full((count,), width),
        sources=tuple(inputs.get(SOURCES, [None] * count)),
    ).to("cpu")


def _check_scored_tokens(micro_batch: MicroBatch, input_ids: Tensor, attention_mask: Tensor) -> None:
    completions = micro_batch.inputs["completion_ids"]
    for scoring in micro_batch.scorings:
        same = scoring.values[0].shape == completions.shape and torch.equal(scoring.input_ids, input_ids)
        if not same or not torch.equal(scoring.attention_mask.bool(), attention_mask):
            raise CaptureError(
                "the loss asked for log-probabilities of other tokens than its batch's completions; expected "
                "these, which give the coefficients. Use the trainer's own compute_loss"
            )


def concatenate(batches: Sequence[RolloutRows]) -> RolloutRows:
    """Return all rows as one, padded on the right to the widest, which moves no token.

    A field that is None in one of them is None in the result.
    """
    width = max(batch.input_ids.shape[1] for batch in batches)

    def joined(values: Sequence[Tensor | None]) -> Tensor | None:
        present = [x for x in values if x is not None]
        padded = [x if x.dim() == 1 else torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in present]
        return torch.cat(padded) if len(padded) == len(values) else None

    sources = tuple(name for batch in batches for name in batch.sources)
    tensors = [joined(values) for values in zip(*(batch[:-1] for batch in batches), strict=True)]
    return RolloutRows._make([*tensors, sources])
