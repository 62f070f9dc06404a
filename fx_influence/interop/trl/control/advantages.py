"""Multiply the advantages in a TRL trainer's loss by the weights of their tokens' kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fx_influence.control import kinds, token_weights
from fx_influence.interop.runtime.method_wrapper import MethodWrapper
from fx_influence.interop.trl.capture.micro_batch import SCORE
from fx_influence.interop.trl.capture.rollout_rows import SOURCES
from fx_influence.labels import regions
from fx_influence.types import Batch, TokenValues


class AdvantageWeights:
    """Multiply each token's advantage by the weight of its kind, in every loss that a trainer takes a gradient of.

    The loss reads the advantages after it has scored the rollouts, which tells likely tokens from unlikely ones: they
    are replaced between the two, for the time of the loss, so that everything else sees the trainer's own. As the
    losses are homogeneous in the advantages, the coefficients are multiplied by the same weights.

    Args:
        trainer: a ``GRPOTrainer``.
        current: called for the weights by kind that are in force; 1 for kinds not among them.
    """

    def __init__(self, trainer: Any, current: Callable[[], Mapping[str, float]]) -> None:
        self._current = current
        self._inputs: dict[str, Any] | None = None
        calls = {"compute_loss": self._compute_loss, SCORE: self._score}
        self._wrappers = [MethodWrapper(trainer, name, call) for name, call in calls.items()]

    def detach(self) -> None:
        """Put the trainer's own methods back."""
        for wrapper in self._wrappers:
            wrapper.undo()

    def _compute_loss(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or all(w == 1 for w in self._current().values()):
            return original(*args, **kwargs)
        inputs = kwargs["inputs"] if "inputs" in kwargs else args[1]
        advantages = inputs["advantages"]
        self._inputs = inputs
        try:
            return original(*args, **kwargs)
        finally:
            self._inputs = None
            inputs["advantages"] = advantages

    def _score(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outputs = original(*args, **kwargs)
        if self._inputs is not None and torch.is_grad_enabled():
            inputs, self._inputs = self._inputs, None
            inputs["advantages"] = weighted_advantages(inputs, outputs[0], outputs[1], self._current())
        return outputs


def weighted_advantages(
    inputs: Mapping[str, Any], logprobs: Tensor, entropies: Tensor, weight_of: Mapping[str, float]
) -> Tensor:
    """Return the advantages (n, T) of completion tokens times the weights of their kinds.

    Args:
        inputs: of the trainer's loss.
        logprobs: (n, T), of the completion tokens.
        entropies: (n, T).
        weight_of: weights by name of a kind.
    """
    mask = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
    completions = Batch(inputs["completion_ids"], mask, mask)
    values = TokenValues(logprobs.detach().float(), entropies.detach().float())
    advantages = inputs["advantages"].reshape(len(mask), -1)
    labels = kinds(regions(completions, values, advantages.expand(mask.shape)), inputs.get(SOURCES, ()))
    return advantages * token_weights(labels, weight_of).to(advantages)
