"""Rollouts collated into one right-padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fx_influence.core.checks import check_count, wrong_type
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.types import Batch


def collate(
    rollouts: Sequence[Rollout], pad_id: int, device: str | torch.device = "cpu", *, off_policy: bool = False
) -> Batch:
    """Collate rollouts into one right-padded batch, with coefficients if every rollout has its own.

    The masks follow from the lengths, so a ``pad_id`` that is also the end of sequence does no harm.

    Args:
        rollouts: n rollouts.
        pad_id: id of any token, such as 0; padding is masked.
        device: of the batch.
        off_policy: whether another policy sampled them than the one that they will be used with, so that the batch gets
            their ``behaviour_logprobs``. Not from files of the policy's own rollouts: what sampled and what scores
            round differently, and weights would be made of that.

    Returns:
        A ``Batch`` of ``input_ids``, ``attention_mask``, ``completion_mask`` (n, T) with T the length of the longest
        rollout, ``group`` (n,), and ``coefficients``, ``entropy_coefficients``, ``behaviour_logprobs`` (n, T), float64,
        or None.

    Raises:
        ValueError: for no rollouts, for one without a prompt token, without which nothing scores its first token, and
            with ``off_policy`` for one without ``behaviour_logprobs``.

    Example:
        >>> batch = collate([Rollout("0/0", "0", 0, "a", "b", (7,), (8, 1), True, (-0.5, -0.25))], pad_id=1)
        >>> batch.input_ids.tolist(), batch.completion_mask.tolist()
        ([[7, 8, 1]], [[False, True, True]])
    """
    if isinstance(rollouts, Rollout):
        raise wrong_type("rollouts", rollouts, "a list of them", "Pass [rollout]")
    for k, rollout in enumerate(rollouts):
        if not isinstance(rollout, Rollout):
            remedy = "Make one by fx.Rollout(...), or read them from a file by fx.read_rollouts(path)"
            raise wrong_type(f"rollouts[{k}]", rollout, "a fx.Rollout", remedy)
    check_count("pad_id", pad_id, "pass any token's id, such as 0: what pads is masked", least=0)
    if not rollouts:
        raise ValueError("rollouts is empty; expected at least one rollout")
    for rollout in rollouts:
        if not rollout.prompt_ids:
            raise ValueError(
                f"prompt_ids of rollout {rollout.id!r} is empty; expected at least one token (such as bos), which "
                "scores the first sampled one"
            )
        if off_policy and rollout.behaviour_logprobs is None:
            raise ValueError(
                f"behaviour_logprobs of rollout {rollout.id!r} is None with off_policy=True; expected log pi of its "
                "tokens under the policy that sampled it. Record it when sampling, or use rollouts of the policy itself"
            )
    per_token = ["coefficients", "entropy_coefficients", *(["behaviour_logprobs"] if off_policy else [])]
    prompt = torch.tensor([len(r.prompt_ids) for r in rollouts]).unsqueeze(1)
    total = prompt + torch.tensor([len(r.completion_ids) for r in rollouts]).unsqueeze(1)
    input_ids = torch.full((len(rollouts), int(total.max())), pad_id, dtype=torch.int64)
    for row, rollout in zip(input_ids, rollouts, strict=True):
        tokens = torch.tensor(rollout.prompt_ids + rollout.completion_ids)
        row[: len(tokens)] = tokens
    position = torch.arange(input_ids.shape[1])
    completion_mask = (position >= prompt) & (position < total)
    batch = Batch(
        input_ids=input_ids,
        attention_mask=position < total,
        completion_mask=completion_mask.clone(),
        group=torch.tensor([r.group for r in rollouts]),
    )
    for row, rollout in zip(batch.completion_mask, rollouts, strict=True):
        if rollout.completion_mask is not None:
            row[row.clone()] = torch.tensor(rollout.completion_mask)
    weights = {
        name: torch.zeros(completion_mask.shape, dtype=torch.float64).masked_scatter(
            completion_mask, torch.tensor([x for r in rollouts for x in getattr(r, name)], dtype=torch.float64)
        )
        for name in per_token
        if all(getattr(r, name) is not None for r in rollouts)
    }
    batch = batch._replace(**weights)
    return Batch._make(None if field is None else field.to(device) for field in batch)
