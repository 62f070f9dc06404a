"""Kinds of tokens, and a step's influences on entropy and on reward added up by kind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.attribution.result import Influence
from fx_influence.labels import UNLABELLED, Labels, sources


class KindSums(NamedTuple):
    """A step's influences by kind, per unit lr, and the covariances of their errors; all float64.

    Attributes:
        kinds: K names.
        entropy: (K,), nats; positive raises the entropy.
        reward: (K,), in units of the reward.
        entropy_covariance: (K, K), of the errors of ``entropy`` over the draw of E.
        reward_covariance: (K, K), likewise.
        rest: scalar, nats, the change of the entropy that no weight multiplies.
        degrees_of_freedom: of the covariances; infinite where they are known.
        conditioning: see ``Influence.conditioning``; NaN where it was not measured.
    """

    kinds: tuple[str, ...]
    entropy: Tensor
    reward: Tensor
    entropy_covariance: Tensor
    reward_covariance: Tensor
    rest: Tensor
    degrees_of_freedom: float = math.inf
    conditioning: float = math.nan


def kinds(regions: Labels, of_rollouts: Sequence[str | None] = ()) -> Labels:
    """Return labels of tokens by region and, where rollouts have sources, by source: "A>0 likely, math".

    Args:
        regions: of tokens, from ``fx.labels.regions``.
        of_rollouts: the ``source`` of each rollout, in order; empty where the data set has none.

    Example:
        >>> regions = Labels(torch.tensor([[-1, 0], [-1, 1]]), ("A>0", "A<0"))
        >>> kinds(regions, ["code", None]).names
        ('A>0, code', 'A<0, code', 'A>0, unknown', 'A<0, unknown')
        >>> kinds(regions).names
        ('A>0', 'A<0')
    """
    if not of_rollouts:
        return regions
    by_source = sources(of_rollouts)
    first = by_source.index.to(regions.index.device).unsqueeze(1) * len(regions.names)
    index = torch.where(regions.index == UNLABELLED, UNLABELLED, first + regions.index)
    return Labels(index, tuple(f"{region}, {source}" for source in by_source.names for region in regions.names))


def kind_sums(entropy: Influence, reward: Influence, kinds: Labels, lifetime_factor: float = 1.0) -> KindSums:
    """Return a step's influences added up by kind, momentum left out.

    A weight that lasts acts on later steps through momentum too, so that the influences to control by are those of
    ``preconditioner="lifetime"``, or of ``"frozen"`` times (1 - beta1^tau) / (1 - beta1). The momentum before a step is
    what earlier steps' lifetime influences hold already.

    Args:
        entropy: of the step on the entropy, from ``fx.influence(..., labels=kinds)``.
        reward: of the same step, with ``objective=fx.expected_reward(...)``.
        kinds: of the tokens of U.
        lifetime_factor: what the influences are multiplied with.

    Raises:
        ValueError: for influences without errors of their sums by kind, and for another shape of labels.
    """
    covariances = [_covariance(field, out, kinds) for field, out in (("entropy", entropy), ("reward", reward))]
    sums = [lifetime_factor * out.sums(kinds).influence.double().cpu() for out in (entropy, reward)]
    unlabelled = float(entropy.total - entropy.baseline) * lifetime_factor - float(sums[0].sum())
    rest = torch.tensor(float(entropy.weight_decay) + unlabelled, dtype=torch.float64)
    degrees = min(out.degrees_of_freedom or math.inf for out in (entropy, reward))
    entropy_covariance, reward_covariance = (lifetime_factor**2 * x for x in covariances)
    return KindSums(
        kinds=kinds.names,
        entropy=sums[0],
        reward=sums[1],
        entropy_covariance=entropy_covariance,
        reward_covariance=reward_covariance,
        rest=rest,
        degrees_of_freedom=degrees,
        conditioning=float(entropy.conditioning),
    )


def token_weights(kinds: Labels, weight_of: Mapping[str, float]) -> Tensor:
    """Return the weight of each token by its kind, float64; 1 for kinds without a weight and for no kind.

    Args:
        kinds: of the tokens.
        weight_of: weights by name of a kind.

    Example:
        >>> token_weights(Labels(torch.tensor([[-1, 0, 1]]), ("A>0", "A<0")), {"A<0": 0.5}).tolist()
        [[1.0, 1.0, 0.5]]
    """
    values = [*(weight_of.get(name, 1.0) for name in kinds.names), 1.0]
    # Index -1 takes the last, which is of no kind.
    return torch.tensor(values, dtype=torch.float64, device=kinds.index.device)[kinds.index]


def _covariance(field: str, out: Influence, kinds: Labels) -> Tensor:
    """Return the covariance of the errors of an influence's sums by kind, 0 for kinds without a token."""
    covariance = None
    if out.deviations is not None:
        covariance = out.deviations.covariance_of_sums(kinds.index.to(out.per_sequence.device), len(kinds.names))
    if covariance is not None:
        present = torch.stack([(kinds.index == k).any() for k in range(len(kinds.names))]).to(covariance.device)
        covariance = torch.where(present.unsqueeze(0) & present.unsqueeze(1), covariance, 0.0)
    if covariance is None or not torch.isfinite(covariance).all():
        raise ValueError(
            f"{field} has no errors of its sums by kind; expected them, since weights follow what is sure. Pass "
            "labels=kinds to fx.influence, and prompts enough to leave out"
        )
    return covariance.cpu()
