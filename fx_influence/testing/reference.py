"""The slow, literal definition of everything: loops, one sequence at a time, one derivative per quantity.

Only tests and benchmarks import this. It shares no code with the fast modules, only the values in ``types``, so that an
oracle cannot share a bug. Every model call sees a batch of one row; every derivative is ``torch.autograd.grad`` of one
scalar; every sum over tokens or sequences is a Python loop; every dot product is float64. Use it with float64 models.

Conventions: nats; a direction v is *per unit learning rate*, theta' = theta + eta v; a token's index k is its rank
among the completion positions of its row (masks may have gaps); a frozen quantity is a float computed at theta. A batch
without one completion token has no entropy per token: ``ZeroDivisionError``.
"""

from fx_influence.testing.adamw import Step, adam_diagonals, adamw
from fx_influence.testing.entropy import (
    Centre,
    Snis,
    centre,
    centred_sequence,
    centred_token,
    entropy,
    entropy_gradients,
    shrunk_baselines,
    snis_delta,
    surrogates,
    weights_at,
)
from fx_influence.testing.fisher import fisher_kernel
from fx_influence.testing.gradients import add, gradient, inner, scale, sequence_gradients, tracked
from fx_influence.testing.influence import Influence, influence, standard_error
from fx_influence.testing.scores import RowScore, TokenValues, score_row, token_losses, token_values

__all__ = [
    "Centre",
    "Influence",
    "RowScore",
    "Snis",
    "Step",
    "TokenValues",
    "adam_diagonals",
    "adamw",
    "add",
    "centre",
    "centred_sequence",
    "centred_token",
    "entropy",
    "entropy_gradients",
    "fisher_kernel",
    "gradient",
    "influence",
    "inner",
    "scale",
    "score_row",
    "sequence_gradients",
    "shrunk_baselines",
    "snis_delta",
    "standard_error",
    "surrogates",
    "token_losses",
    "token_values",
    "tracked",
    "weights_at",
]
