"""Advantages of rollouts whose file has rewards alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import torch

from fx_influence.interop.rollouts.record import Rollout
from fx_influence.losses import group_advantages


def with_group_advantages(
    rollouts: list[Rollout], scale: bool, sessions: Sequence[Hashable] | None = None
) -> list[Rollout]:
    """Return the rollouts with ``losses.group_advantages`` of their rewards.

    Args:
        rollouts: with rewards and groups.
        scale: see ``losses.group_advantages``.
        sessions: names of what each is a part of; the last of a session is compared in the group, and all share its
            advantage. None: each is its own.
    """
    names = range(len(rollouts)) if sessions is None else sessions
    last = dict(zip(names, rollouts, strict=True))
    rewards = torch.tensor([rollout.reward for rollout in last.values()], dtype=torch.float64)
    group = torch.tensor([rollout.group for rollout in last.values()], dtype=torch.int64)
    advantages = dict(zip(last, group_advantages(rewards, group, scale).tolist(), strict=True))
    return [
        dataclasses.replace(rollout, advantage=advantages[name]) for name, rollout in zip(names, rollouts, strict=True)
    ]
