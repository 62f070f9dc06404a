"""Rollout records, checked when they are made."""

from __future__ import annotations

import dataclasses

import pytest
from helpers.made_rollouts import rollout


def test_rollout_refuses_logprobs_of_another_length() -> None:
    with pytest.raises(ValueError, match="behaviour_logprobs of rollout 'p/0' has 1 values; expected 2"):
        rollout(behaviour_logprobs=(-0.5,))


@pytest.mark.parametrize("name", ["completion_mask", "coefficients", "entropy_coefficients"])
def test_rollout_refuses_per_token_value_of_another_length(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} of rollout 'p/0' has 1 values; expected 2"):
        dataclasses.replace(rollout(), **{name: (True,)})  # type: ignore[arg-type]  # any of the fields
