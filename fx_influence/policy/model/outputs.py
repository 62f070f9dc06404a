"""Read the logits from what a model's forward returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class ForwardError(ValueError):
    """A forward that cannot become a policy, with the cause and the remedy."""


def logits_of(out: Any) -> Tensor:
    """Return the logits in what a forward returns: a tensor, an object or dict with ``logits``, or a tuple's first."""
    if isinstance(out, Tensor):
        return out
    by_name = out.get("logits") if isinstance(out, dict) else getattr(out, "logits", None)
    found = out[0] if by_name is None and isinstance(out, (tuple, list)) and out else by_name
    if not isinstance(found, Tensor):
        raise ForwardError(
            f"model(input_ids) gives a {type(out).__name__} without a tensor of logits; expected logits (B, T, V)"
        )
    return found
