"""One micro-batch of a TRL step: its inputs, the calls that score its rollouts, and the gradients that reach them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fx_influence.interop.live.guard import CaptureError
from fx_influence.interop.trl.capture.images import IMAGE_COUNTS, IMAGE_INPUTS

SCORE = "_get_per_token_logps_and_entropies"
"""Method of ``GRPOTrainer`` and ``RLOOTrainer`` (trl 1.16) that scores rollouts: log-probabilities and entropies."""

FORWARD_ARGUMENTS = ("model", "input_ids", "attention_mask", "logits_to_keep")
"""Arguments of the scoring method that the library's forward of the policy takes."""

INERT_ARGUMENTS = ("batch_size", "compute_entropy", "compute_aux_loss")
"""Arguments of the scoring method that change no log-probability."""

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Arguments that say which tokens stand for an image; 0 throughout is what a forward without them assumes."""


class Scoring(NamedTuple):
    """One call for the log-probabilities of rollouts and, where they are asked for, their entropies.

    Attributes:
        input_ids: (n, T), prompts and completions.
        attention_mask: (n, T).
        values: log-probabilities and entropies of the completions' tokens, detached; entropies None where not computed.
        gradients: 0 or 1, the index in ``values``, -> dL/d of that value, filled in by the backward pass.
    """

    input_ids: Tensor
    attention_mask: Tensor
    values: tuple[Tensor, Tensor | None]
    gradients: dict[int, Tensor]


class MicroBatch:
    """One call of ``compute_loss``, filled in while it and its backward pass run.

    Args:
        inputs: the trainer's own inputs of the call.
    """

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.inputs = inputs
        self.scorings: list[Scoring] = []

    def watch(self, arguments: Mapping[str, Any], outputs: Sequence[Any], on_gradient: Callable[..., None]) -> None:
        """Record one call of the scoring method, and the gradients of what it returned once they arrive.

        Args:
            arguments: the call's arguments by name.
            outputs: log-probabilities and, where they are computed, entropies; anything further is ignored.
            on_gradient: called as ``on_gradient(gradients, index, gradient)`` when a gradient arrives.

        Raises:
            CaptureError: for a forward of more than ids and masks.
        """
        _check_arguments(arguments, self.inputs)
        entropies = outputs[1] if len(outputs) > 1 else None
        values = (outputs[0].detach(), None if entropies is None else entropies.detach())
        scoring = Scoring(arguments["input_ids"], arguments["attention_mask"], values, {})
        self.scorings.append(scoring)
        for index, value in enumerate((outputs[0], entropies)):
            if value is not None and value.requires_grad:
                value.register_hook(functools.partial(on_gradient, scoring.gradients, index))


def scoring_signature(trainer: Any) -> inspect.Signature:
    """Return the signature of the trainer's scoring method, without ``self``.

    It is taken from the first class that names the arguments, because a subclass may pass on ``*args, **kwargs``.
    """
    signatures = [inspect.signature(getattr(kind, SCORE)) for kind in type(trainer).__mro__ if hasattr(kind, SCORE)]
    first = next((x for x in signatures if "input_ids" in x.parameters), signatures[0])
    return first.replace(parameters=list(first.parameters.values())[1:])


def _check_arguments(arguments: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Raise ``CaptureError`` for a forward of more than ids, masks and the rollouts' images, naming the argument."""
    for name, value in arguments.items():
        if name in (*IMAGE_INPUTS, *IMAGE_COUNTS) and value is inputs.get(name):
            continue
        if name in TOKEN_TYPES and isinstance(value, Tensor) and not value.any():
            continue
        if name not in (*FORWARD_ARGUMENTS, *INERT_ARGUMENTS) and value is not None:
            raise CaptureError(
                f"{name} went into the trainer's forward; expected ids, masks and images of its batch alone, since "
                "influences are of a policy that reads these. Train without it"
            )
