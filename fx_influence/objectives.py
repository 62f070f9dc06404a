"""Objectives over E whose change is attributed: entropy, or a functional given as per-sequence surrogates."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from fx_influence.core.checks import check_choice, check_function, check_number, check_tensor, wrong_type
from fx_influence.estimators.deviations import Deviations
from fx_influence.estimators.entropy import (
    TokenCoefficients,
    check_estimator,
    denominator_weights,
    entropy_coefficients,
)
from fx_influence.estimators.importance import ImportanceWeights
from fx_influence.estimators.off_policy import weighted_denominator_shares
from fx_influence.estimators.score_term import optimal_share
from fx_influence.types import Baseline, Batch, Estimator, Normalize, TokenValues

Objective = Callable[[Tensor, Tensor, Batch], Tensor]
"""(token_logprobs (n_e, T), token_entropies (n_e, T), batch_e) -> s_a (n_e,), with sum_a grad s_a = grad objective."""

ESTIMATED = "auto"
"""Value of ``Entropy.score`` that has ``influence`` estimate the share."""

_REMEDY = "Pass fx.Entropy(), fx.expected_reward(rewards), fx.kl_to_reference(...) or a function of your own"


class Entropy(NamedTuple):
    """The policy's entropy over E, in nats, as it is estimated: the default objective.

    Attributes:
        estimator: "per_decision" weights the token at rank t by its prefix alone; "sequence" weights a whole rollout.
        normalize: "token" for H = E[sum_t h_t] / E[T]; "sequence" for E[sum_t h_t].
        baseline: subtracted from the entropies in the score term, to reduce the noise of the derivative: "batch", the
            mean over E at each rank; "prompt", the mean over the other completions of the row's prompt
            (``batch_e.group``), or over E where the prompt has no other; "shrunk", a mean of the prompt's other
            completions and of those of other prompts, weighted by how much prompts differ in E. None biases the
            derivative; which has less noise depends on how much prompts differ and on how many completions each has.
            Finite steps support "batch" only.
        score: share of the score term, how a step changes which texts are sampled, beside the change of the entropies
            of tokens. The derivative is that of the entropy at 1; a smaller share has less noise and a bias, which no
            error bar holds, of 1 - score times the score term. "auto" estimates the share of the smallest squared
            error, see ``estimators.score_term``; ``influence`` alone takes it, and attributes two more times for it.
            Finite steps support 1 only.

    Source: per-decision importance sampling, Precup et al. 2000; the leave-one-out baseline, Kool et al. 2019; see
    ``estimators.entropy`` and ``estimators.score_term`` for the formulas.

    Example:
        >>> Entropy(normalize="sequence")
        Entropy(estimator='per_decision', normalize='sequence', baseline='batch', score=1.0)
    """

    estimator: Estimator = "per_decision"
    normalize: Normalize = "token"
    baseline: Baseline = "batch"
    score: float | Literal["auto"] = 1.0


def check_objective(objective: object, may_estimate_share: bool = False) -> None:
    """Raise ``TypeError`` or ``ValueError`` for what is neither a valid ``Entropy`` nor a function of token values.

    Args:
        objective: the argument.
        may_estimate_share: whether ``Entropy.score`` may be "auto".
    """
    if not isinstance(objective, Entropy):
        return check_function("objective", objective, _REMEDY)
    check_estimator(objective.estimator, objective.normalize)
    check_choice("baseline", objective.baseline, get_args(Baseline))
    if objective.score != ESTIMATED or not may_estimate_share:
        remedy = f"Pass 1 for an unbiased derivative, or {ESTIMATED!r} to fx.influence, which estimates the share"
        check_number("objective.score", objective.score, remedy, lambda x: 0 <= x <= 1, "a share from 0 to 1")


def score_share(objective: Entropy | Objective) -> float:
    """Return the share of the score term in the objective's derivative; 1 for another objective than the entropy."""
    return float(objective.score) if isinstance(objective, Entropy) else 1.0


class InfluencesOfE(Protocol):
    """Influences (n,), and their deviations by part of E where these are known."""

    @property
    def per_sequence(self) -> Tensor: ...

    @property
    def deviations(self) -> Deviations | None: ...


def with_known_share(
    objective: Entropy | Objective, attribute: Callable[[Entropy], InfluencesOfE]
) -> Entropy | Objective:
    """Return the objective; an entropy whose ``score`` is "auto" with the share of the smallest squared error.

    Args:
        objective: what is attributed.
        attribute: function of an entropy with a number as ``score``, called twice where it is "auto".

    Raises:
        ValueError: where the influences come without deviations.
    """
    if not isinstance(objective, Entropy) or objective.score != ESTIMATED:
        return objective
    direct, full = (attribute(objective._replace(score=share)) for share in (0.0, 1.0))
    if direct.deviations is None or full.deviations is None:
        raise ValueError(
            f"objective.score is {objective.score!r} without error bars; expected stderr=True and rollouts of two "
            "prompts at least, whose differences say how noisy the score term is. Pass a number as score"
        )
    share = optimal_share(direct.per_sequence, full.per_sequence, direct.deviations, full.deviations)
    _warn_of_bias(share)
    return objective._replace(score=share)


def _warn_of_bias(score: float) -> None:
    if score != 1:
        warnings.warn(
            f"objective.score is {score:.3g}: the derivative has a bias, {1 - score:.3g} times its score term, which "
            "no error bar holds. Pass score=1 for an unbiased one",
            stacklevel=3,
        )


def check_entropy(objective: object, finite_step: bool = True) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``objective`` is an ``Entropy`` that calls along a direction take.

    Args:
        objective: the argument.
        finite_step: whether a finite step is measured, which supports the baseline "batch" and all of the score only.
    """
    if not isinstance(objective, Entropy):
        remedy = "Attribute other objectives by fx.influence; along a direction only the entropy is measured"
        raise wrong_type("objective", objective, "fx.Entropy(estimator, normalize)", remedy)
    check_objective(objective)
    if finite_step and objective.baseline != "batch":
        raise ValueError(
            f"objective.baseline is {objective.baseline!r}; expected 'batch', since it is for derivatives and a finite "
            "step has none. Leave it out, or use fx.influence or fx.jvp_delta"
        )
    if finite_step and objective.score != 1:
        raise ValueError(
            f"objective.score is {objective.score!r}; expected 1, since a finite step has no score term to leave out. "
            "Leave it out, or use fx.influence or fx.jvp_delta"
        )


def check_evaluation(objective: Entropy | Objective, batch_e: Batch) -> None:
    """Raise ``ValueError`` where E does not have what the objective needs of it, or has what it cannot use.

    Warns of a share of the score term that biases the derivative. The prompt's baseline needs to know which rows share
    a prompt; only the entropy is weighted over rollouts of another policy.
    """
    if not isinstance(objective, Entropy) and batch_e.behaviour_logprobs is not None:
        raise ValueError(
            "batch_e.behaviour_logprobs is given with another objective than fx.Entropy; expected None, since only the "
            "entropy is weighted over rollouts of another policy. Pass rollouts of the policy itself, without it"
        )
    if isinstance(objective, Entropy) and objective.baseline == "prompt" and batch_e.group is None:
        raise ValueError(
            "batch_e.group is None with baseline='prompt'; expected int64 (n_e,), equal for completions of one prompt. "
            "Pass the prompts' indices, or baseline='batch'"
        )
    if isinstance(objective, Entropy) and objective.score != ESTIMATED:
        _warn_of_bias(score_share(objective))


def surrogate_coefficients(objective: Entropy | Objective, values: TokenValues, batch_e: Batch) -> TokenCoefficients:
    """Return ds_a/dlog pi and ds_a/dh of the objective's surrogates at every token of E, each (n_e, T), float64.

    Args:
        objective: ``Entropy`` or a function of token values.
        values: (n_e, T), token values of E at theta.
        batch_e: evaluation batch, n_e rows.
    """
    if isinstance(objective, Entropy):
        options = (objective.estimator, objective.normalize, objective.baseline, score_share(objective))
        return entropy_coefficients(values, batch_e, *options)
    return objective_coefficients(objective, values, batch_e)


def denominator_shares(
    objective: Entropy | Objective, completion_mask: Tensor, weights: ImportanceWeights | None = None
) -> Tensor:
    """Return each row's share of the objective's denominator, float64 (n_e,), adding up to 1.

    Args:
        objective: whose denominator.
        completion_mask: (n_e, T).
        weights: of the rows where another policy sampled them.
    """
    if weights is not None:
        assert isinstance(objective, Entropy)
        return weighted_denominator_shares(weights, completion_mask, objective.estimator, objective.normalize)
    normalize = objective.normalize if isinstance(objective, Entropy) else "sequence"
    f = denominator_weights(completion_mask, normalize)
    return f / f.sum()


def expected_reward(rewards: Tensor) -> Objective:
    """Return the objective E[R]: s_a = (R_a - mean R) S_a / n, with S_a the sequence log-probability.

    Args:
        rewards: (n_e,), of the rollouts of E in order.

    Returns:
        An objective whose influences are in reward units per unit lr; positive raises the reward.

    Raises:
        TypeError, ValueError: for rewards that are not a tensor or not finite.

    Source: REINFORCE with a baseline, Williams 1992.

    Example:
        >>> logprobs = torch.tensor([[-1.0], [-2.0]])
        >>> mask = torch.ones(2, 1, dtype=torch.bool)
        >>> expected_reward(torch.tensor([1.0, 0.0]))(logprobs, logprobs, Batch(mask.long(), mask, mask)).tolist()
        [-0.25, 0.5]
    """
    check_tensor("rewards", rewards)
    _check_finite("rewards", rewards)

    def objective(token_logprobs: Tensor, token_entropies: Tensor, batch_e: Batch) -> Tensor:
        _check_rows("rewards", rewards, token_logprobs.shape[:1])
        r = rewards.to(token_logprobs)
        return (r - r.mean()) * token_logprobs.sum(-1) / len(r)

    return objective


def kl_to_reference(reference_logprobs: Tensor) -> Objective:
    """Return the objective KL(pi || pi_ref), E[sum_t log pi(y_t) - log pi_ref(y_t)], in nats per completion.

    The entropy term is exact over the vocabulary, the reference term sampled: with
    k_t = -h_t - log pi_ref(y_t), grad KL = -E[sum_t grad h_t + grad S_<t h_t + grad S_<=t log pi_ref(y_t)], each
    weight centred by its mean over E at the same rank-to-go.

    Args:
        reference_logprobs: (n_e, T), log pi_ref of E's tokens, aligned with ``input_ids``; ``token_values`` of the
            reference gives them.

    Returns:
        An objective whose influences are in nats per completion and unit lr; positive moves away from the reference.

    Raises:
        TypeError, ValueError: for values that are not a tensor or whose shape is not that of E.

    Example:
        >>> mask = torch.tensor([[False, True], [False, True]])
        >>> logprobs = torch.tensor([[0.0, -1.0], [0.0, -2.0]])
        >>> objective = kl_to_reference(logprobs)
        >>> objective(logprobs, -logprobs, Batch(mask.long(), mask, mask)).shape
        torch.Size([2])
    """
    check_tensor("reference_logprobs", reference_logprobs)

    def objective(token_logprobs: Tensor, token_entropies: Tensor, batch_e: Batch) -> Tensor:
        _check_rows("reference_logprobs", reference_logprobs, token_logprobs.shape)
        mask = batch_e.completion_mask
        h, ref = token_entropies.detach(), torch.where(mask, reference_logprobs.to(token_logprobs), 0.0)
        later_h = h.flip(-1).cumsum(-1).flip(-1) - h
        from_here = ref.flip(-1).cumsum(-1).flip(-1)
        cost = -(later_h + from_here)
        # A baseline may depend on what comes before the token, so on its rank, and not on the token itself.
        rank = (mask.long().cumsum(-1) - 1).clamp(min=0)
        sums = cost.new_zeros(mask.shape[-1]).index_add(0, rank[mask], cost[mask])
        counts = cost.new_zeros(mask.shape[-1]).index_add(0, rank[mask], torch.ones_like(cost[mask]))
        baseline = (sums / counts.clamp(min=1))[rank]
        return ((cost - baseline) * token_logprobs * mask - token_entropies * mask).sum(-1) / len(mask)

    return objective


def objective_coefficients(objective: Objective, values: TokenValues, batch_e: Batch) -> TokenCoefficients:
    """Return ds_a/dlog pi and ds_a/dh of a function's surrogates at every token of E, each (n_e, T), float64.

    Args:
        objective: function of token values.
        values: (n_e, T), token values of E at theta.
        batch_e: evaluation batch, n_e rows.

    Raises:
        ValueError: unless the objective returns (n_e,) finite numbers that depend on the two inputs, each s_a on its
            own row only, since error bars and the matrix take the rows as independent draws.
    """
    inputs = [v.detach().double().requires_grad_() for v in values]
    with torch.enable_grad():
        s = objective(inputs[0], inputs[1], batch_e)
        n = len(batch_e.input_ids)
        if not isinstance(s, Tensor) or s.shape != (n,) or not torch.isfinite(s).all():
            shape = tuple(s.shape) if isinstance(s, Tensor) else type(s).__name__
            raise ValueError(
                f"objective returned {shape}; expected finite values of shape ({n},). Return one surrogate for each "
                "row of E"
            )
        if not s.requires_grad:
            raise ValueError(
                "objective's result depends on neither input; expected a function of token_logprobs or "
                "token_entropies. Make it from them"
            )
        weight = torch.linspace(1.0, 2.0, n, dtype=s.dtype, device=s.device)
        gradients = _gradient(s.sum(), inputs, retain=True)
        weighted = _gradient((weight * s).sum(), inputs, retain=False)
    if not all(torch.isfinite(g).all() for g in gradients):
        raise ValueError(
            "objective's derivative is not finite; expected finite values. Keep roots and logarithms away "
            "from 0, as in empty rows"
        )
    for plain, scaled in zip(gradients, weighted, strict=True):
        # Two derivatives of one float64 sum: what rounding makes is far below any dependence on other rows.
        if not torch.allclose(scaled, plain * weight.unsqueeze(-1).to(plain), rtol=1e-6, atol=1e-12):
            raise ValueError(
                "objective's s_a depends on other rows than a; expected row a alone. Detach what it takes over the "
                "whole batch"
            )
    return TokenCoefficients(*(torch.where(batch_e.completion_mask, g, 0.0) for g in gradients))


def _gradient(scalar: Tensor, inputs: list[Tensor], retain: bool) -> list[Tensor]:
    gradients = torch.autograd.grad(scalar, inputs, retain_graph=retain, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]


def _check_finite(field: str, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise ValueError(f"{field} has values that are not finite; expected finite ones. Drop those rollouts from E")


def _check_rows(field: str, values: Tensor, shape: torch.Size) -> None:
    if values.shape != shape:
        raise ValueError(
            f"{field} has shape {tuple(values.shape)}; expected {tuple(shape)}, the rows of batch_e in order"
        )
