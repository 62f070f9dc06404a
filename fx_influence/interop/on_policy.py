"""Comparison of recorded and scored log-probs, which tells whether rollouts were sampled from a policy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fx_influence.interop.rollouts.record import Rollout
from fx_influence.types import Batch


def check_on_policy(rollouts: Sequence[Rollout], scored_logprobs: Tensor, batch: Batch, tolerance: float) -> float:
    """Return the largest |behaviour - scored| log-prob over all completion tokens; refuse one above ``tolerance``.

    Args:
        rollouts: n rollouts; those without behaviour log-probs are passed over.
        scored_logprobs: (n, T), at position t the log-prob of token t under the policy in question, at the temperature
            that the rollouts were sampled with. Entries outside the completion mask are not read.
        batch: (n, T), ``collate(rollouts)``.
        tolerance: the largest difference that is allowed, in nats.

    Returns:
        The largest difference in nats; NaN if no rollout has behaviour log-probs, so that nothing can be compared.

    Raises:
        ValueError: naming the worst rollout, or if shapes disagree.
    """
    mask = batch.completion_mask
    if tuple(scored_logprobs.shape) != tuple(mask.shape) or len(rollouts) != mask.shape[0]:
        raise ValueError(
            f"scored_logprobs has shape {tuple(scored_logprobs.shape)}; expected that of batch, "
            f"{tuple(mask.shape)}, a row for each of {len(rollouts)} rollouts. Pass the scores of collate(rollouts)"
        )
    if all(rollout.behaviour_logprobs is None for rollout in rollouts):
        return math.nan
    worst, worst_index = 0.0, 0
    for i, rollout in enumerate(rollouts):
        if rollout.behaviour_logprobs is None:
            continue
        scored = scored_logprobs[i][mask[i]].detach().to("cpu", torch.float64)
        behaviour = torch.tensor(rollout.behaviour_logprobs, dtype=torch.float64)
        if rollout.completion_mask is not None:
            behaviour = behaviour[torch.tensor(rollout.completion_mask)]
        if len(scored) != len(behaviour):
            raise ValueError(
                f"batch has {len(scored)} completion tokens for rollout {rollout.id!r}; expected {len(behaviour)}, "
                "as the rollout has. Pass collate(rollouts), in the same order"
            )
        gap = (scored - behaviour).abs().nan_to_num(nan=math.inf)
        if len(gap) and gap.max().item() > worst:
            worst, worst_index = gap.max().item(), i
    if worst > tolerance:
        raise ValueError(
            f"rollout {rollouts[worst_index].id!r} was not sampled from this policy: its behaviour and scored "
            f"log-probs differ by {worst:.3g}; expected at most {tolerance:.3g}. Sample again from this model, "
            "with the temperature that scores it and no top-k, top-p or penalties"
        )
    return worst
