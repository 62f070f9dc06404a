"""A rollout with any of its fields changed."""

from __future__ import annotations

from typing import Any

from fx_influence.interop.rollouts.record import Rollout

PAD = EOS = 1


def rollout(name: str = "p/0", **changes: Any) -> Rollout:
    fields: dict[str, Any] = {
        "id": name,
        "prompt_id": "p",
        "group": 0,
        "prompt": "1+1=",
        "completion": "2",
        "prompt_ids": (4, 9, 4),
        "completion_ids": (5, EOS),
        "finished": True,
        "behaviour_logprobs": (-0.5, -0.25),
    }
    return Rollout(**{**fields, **changes})
