"""Values that every module passes around: batches, optimizer state, the policy's signature, and ``IdentityError``.

Everything here is a plain value without behaviour, so the slow reference can share it without sharing a bug.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeVar

from torch import Tensor

from fx_influence.core.display import record_line

Params = dict[str, Tensor]
"""Trainable parameters (or a direction in their space) by name."""

Gradients = dict[str, Tensor | None]
"""A gradient by parameter name; ``None`` where backward never reached the parameter."""

Estimator = Literal["per_decision", "sequence"]
Normalize = Literal["token", "sequence"]
Baseline = Literal["batch", "prompt", "shrunk"]
Preconditioner = Literal["frozen", "jacobian", "rmsprop", "lifetime"]
Clip = Literal["frozen", "differentiated"]
LossType = Literal["grpo", "bnpo", "dapo", "dr_grpo", "prompt_max"]


class Apply(Protocol):
    """A policy as a pure function: ``apply(params, input_ids, attention_mask) -> logits (B, T, V)``."""

    def __call__(self, params: Params, input_ids: Tensor, attention_mask: Tensor, /) -> Tensor: ...


class Batch(NamedTuple):
    """Rollouts as tensors; one row is one prompt with one completion, padded on either side.

    ``input_ids``: int64 (B, T), prompt and completion.
    ``attention_mask``: bool (B, T), True on real tokens.
    ``completion_mask``: bool (B, T), True on generated tokens that count, the sampled end of sequence included.
    The token at position t is scored by the logits at t-1, so column 0 is never True.
    ``coefficients``: float (B, T), c_it = -dL/dlog pi(y_it), needed in an update batch.
    ``entropy_coefficients``: float (B, T), b_it = -dL/dh_it, for losses with an entropy bonus.
    ``group``: int64 (B,), the prompt that a row belongs to; error bars over E take rows of one group for one draw, and
    without it every row for a draw of its own.
    ``behaviour_logprobs``: float32 or float64 (B, T), log pi of each completion token under the policy that sampled it,
    at its temperature. An evaluation batch that has them is weighted by pi_theta / pi_behaviour, see ``influence``;
    None says that its rollouts are of the policy itself.

    Example:
        >>> import torch
        >>> ids = torch.tensor([[5, 6, 7, 0]])
        >>> mask = ids != 0
        >>> Batch(ids, mask, mask & (torch.arange(4) >= 2)).completion_mask.sum().item()
        1
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    coefficients: Tensor | None = None
    entropy_coefficients: Tensor | None = None
    group: Tensor | None = None
    behaviour_logprobs: Tensor | None = None

    def __repr__(self) -> str:
        return record_line(self)


class TokenValues(NamedTuple):
    """Log-probability and entropy of each completion token, (..., B, T), 0 outside the completion mask.

    ``logprobs``: log pi(y_t | y_<t). ``entropies``: h_t = -sum_y pi log pi over the full vocabulary. In nats.
    """

    logprobs: Tensor
    entropies: Tensor

    def __repr__(self) -> str:
        return record_line(self)


class TokenMoments(NamedTuple):
    """``TokenValues`` with two second moments of each completion token's softmax, (..., B, T), 0 outside the mask.

    ``logprobs``: log pi(y_t | y_<t), in nats. ``entropies``: h_t = -sum_j pi_j log pi_j, in nats.
    ``collision``: P2 = sum_j pi_j^2 = E[pi], the collision probability: the chance that two draws are the same token.
    ``collision_logprobs``: Q2 = sum_j pi_j^2 log pi_j = E[pi log pi], in nats; never positive.
    """

    logprobs: Tensor
    entropies: Tensor
    collision: Tensor
    collision_logprobs: Tensor

    def __repr__(self) -> str:
        return record_line(self)


TokenStatistics = TypeVar("TokenStatistics", TokenValues, TokenMoments)
"""Either record of completion tokens, for the functions that return the one they are asked for."""


@dataclass(frozen=True, kw_only=True)
class AdamWHyper:
    """The hyperparameters of one parameter's ``param_group``; ``lr_scale`` is rho = lr_group / lr_ref.

    Defaults are those of Adam, so without weight decay.

    Example:
        >>> AdamWHyper(beta2=0.99).beta2
        0.99
    """

    lr_scale: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False


class AdamWState(NamedTuple):
    """AdamW's state as values, by parameter name; parameters that the optimizer does not hold are absent.

    ``exp_avg`` (m), ``exp_avg_sq`` (s) and, for amsgrad parameters only, ``max_exp_avg_sq``: the parameter's shape.
    ``step``: updates made so far. ``hyper``: the parameter's own hyperparameters.
    ``lr``: lr_ref, the first nonzero learning rate in group order, or 0.0 where all are 0.
    ``master_weights``: theta in float32, as the optimizer moves it, where the parameters are its roundings to half
    precision; None where they are theta.
    """

    exp_avg: Params
    exp_avg_sq: Params
    max_exp_avg_sq: Params
    step: dict[str, int]
    hyper: dict[str, AdamWHyper]
    lr: float
    master_weights: Params | None = None

    def __repr__(self) -> str:
        return record_line(self, {"master_weights": None})


class IdentityError(ArithmeticError):
    """Two methods disagree on a total: a derivative was lost or the inputs disagree, so no result is given."""
