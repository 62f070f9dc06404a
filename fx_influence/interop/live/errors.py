"""Errors for steps of a live training run that cannot be attributed."""

from __future__ import annotations


class CaptureError(RuntimeError):
    """Raised for a step whose loss depends on more than the log-probabilities and entropies of its own rollouts."""


class GenerationError(ValueError):
    """Raised for completions that are not sampled from the policy."""
