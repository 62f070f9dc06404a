"""Rollouts of a micro-batch of TRL, from the trainer's inputs and what the loss asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_influence.interop.live.guard import CaptureError
from fx_influence.interop.live.rows import RolloutRows
from fx_influence.interop.trl.capture.images import images_of_rows
from fx_influence.interop.trl.capture.micro_batch import MicroBatch

OLD_LOGPROBS = "old_per_token_logps"
"""Trainer's input: log-probabilities of the completions under the policy that sampled them."""

SAMPLED_LOGPROBS = "sampling_per_token_logps"
"""Trainer's input: log-probabilities that vLLM or a ``rollout_func`` told with the completions."""

REWARDS = "entropy_influence_rewards"
"""Key of the rewards in a generation batch, which the trainer shuffles and splits with its other tensors."""

SOURCES = "entropy_influence_sources"
"""Key of the list of the rollouts' sources in a generation batch, which is shuffled and split likewise."""

GROUPS = "entropy_influence_groups"
"""Key of the numbers of the rollouts' prompts in a generation batch, where siblings may begin with other tokens."""


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
    sampled_logprobs = inputs.get(SAMPLED_LOGPROBS)
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
        sampled_logprobs=None if sampled_logprobs is None else on_completions(sampled_logprobs),
        advantages=advantages.flatten(),
        token_advantages=token_advantages,
        rewards=inputs.get(REWARDS, torch.full((count,), torch.nan)).flatten(),
        prompt_widths=torch.full((count,), width),
        group=inputs.get(GROUPS),
        sources=tuple(inputs.get(SOURCES, [None] * count)),
        images=images_of_rows(inputs) or (),
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
