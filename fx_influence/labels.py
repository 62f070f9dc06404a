"""Labels of rollouts and of tokens, whose influences ``Influence.sums`` adds up with error bars.

Each function returns a partition: every rollout, or every completion token, has one label.

Parts of the coefficients, such as a KL term or an entropy bonus, are no labels, as a token has all of them. Influences
are linear in coefficients while the step's direction is that of the whole gradient, so those of a part are of a batch
that has this part alone, with the whole gradient: ``influence(params, batch._replace(coefficients=part), batch_e,
state, grad=gradient)``, and a bonus as ``entropy_coefficients`` alone. They have error bars and ``sums`` as any others.
The remaining parts are in ``unattributed``; parts that add up to the coefficients add up to the influences.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fx_influence.core.batch_checks import check_is_batch
from fx_influence.core.checks import check_tensor, wrong_type
from fx_influence.core.display import record_line
from fx_influence.types import Batch, TokenValues

UNLABELLED = -1
"""Index of what is in no sum, such as prompts and padding."""

UNKNOWN_SOURCE = "unknown"
"""Name of the label of rollouts whose source nobody recorded."""

REGIONS = ("A>0 likely", "A>0 unlikely", "A<0 likely", "A<0 unlikely", "A=0")
REWARD_BANDS = ("reward below 0", "reward 0", "reward between 0 and 1", "reward 1", "reward above 1")
THIRDS = ("first third", "middle third", "last third")
DEFAULT_BANDS = (0.5, 0.8)
"""Quantiles between bands of entropy: tokens in the top fifth are the forking ones of Wang et al., arXiv 2506.01939."""


@dataclass(frozen=True, repr=False)
class Labels:
    """A label for each rollout or token.

    Attributes:
        index: int64 (n,) or (n, T), the label's place in ``names``; -1 is in no sum.
        names: of the labels.
    """

    index: Tensor
    names: tuple[str, ...]

    def __repr__(self) -> str:
        return record_line(self)


def as_labels(labels: Tensor | Labels) -> Labels:
    """Return labels with names: those given, or of an integer or boolean tensor its distinct values.

    Args:
        labels: ``Labels``, or a tensor (n,) or (n, T) whose negative values are in no sum.

    Raises:
        TypeError: for anything else.

    Example:
        >>> as_labels(torch.tensor([7, 2, 7])).names
        ('2', '7')
    """
    if isinstance(labels, Labels):
        return labels
    remedy = "Pass fx.labels.regions(...), fx.labels.by(sources), or a tensor of integers"
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        raise wrong_type("labels", labels, "integers or booleans, (n_u,) or (n_u, T), or fx.labels.Labels", remedy)
    values, index = torch.unique(labels.long(), return_inverse=True)
    absent = int((values < 0).sum())
    names = tuple(str(bool(x)) if labels.dtype == torch.bool else str(x) for x in values[absent:].tolist())
    return Labels((index - absent).clamp(min=UNLABELLED), names)


def by(values: Sequence[Hashable]) -> Labels:
    """Return labels of rollouts by any value of theirs: data source, environment, prompt, model version.

    Args:
        values: one for each rollout, in order.

    Example:
        >>> by(["math", "code", "math"])
        Labels(index=int64 (3,), names=['code', 'math'])
    """
    texts = [str(value) for value in values]
    names = tuple(sorted(set(texts)))
    return Labels(torch.tensor([names.index(text) for text in texts], dtype=torch.int64), names)


def sources(values: Sequence[str | None]) -> Labels:
    """Return labels of rollouts by their data source or environment, those without one as "unknown".

    Args:
        values: the ``source`` of each rollout, in order.

    Example:
        >>> sources(["math", None, "code"])
        Labels(index=int64 (3,), names=['code', 'math', 'unknown'])
    """
    return by([UNKNOWN_SOURCE if value is None else value for value in values])


def regions(batch: Batch, values: TokenValues, advantages: Tensor | None = None) -> Labels:
    """Return labels of tokens by the sign of the advantage and by whether the token is likely.

    A token is likely if log pi(y) > -h, so that raising its probability lowers the entropy of a softmax: the field's
    four regions. Tokens with an advantage of 0 are a fifth.

    Args:
        batch: update batch, (n, T).
        values: (n, T), token values of the batch, from ``token_values``.
        advantages: (n,) or (n, T). None takes the sign of ``batch.coefficients``, which is another one where a KL
            term outweighs the advantage, and 0 where the loss clips.

    Raises:
        ValueError: for a batch without coefficients where there are no advantages, and for advantages of another shape.

    Source: Cui et al. 2025, arXiv 2505.22617.

    Example:
        >>> mask = torch.tensor([[False, True, True]])
        >>> batch = Batch(mask.long(), mask | True, mask, coefficients=torch.tensor([[0.0, 1.0, -1.0]]))
        >>> values = TokenValues(torch.tensor([[0.0, -0.1, -3.0]]), torch.tensor([[0.0, 1.0, 1.0]]))
        >>> [REGIONS[k] for k in regions(batch, values).index[0, 1:].tolist()]
        ['A>0 likely', 'A<0 unlikely']
    """
    check_is_batch("batch", batch)
    signs = _signs(batch, advantages)
    unlikely = (values.logprobs <= -values.entropies).long()
    index = torch.where(signs > 0, unlikely, torch.where(signs < 0, 2 + unlikely, 4))
    return Labels(_of_completions(index, batch), REGIONS)


def thirds(batch: Batch) -> Labels:
    """Return labels of tokens by their place in the completion: its first, middle or last third.

    Args:
        batch: (n, T).

    Example:
        >>> mask = torch.ones(1, 3, dtype=torch.bool)
        >>> thirds(Batch(mask.long(), mask, mask)).index.tolist()
        [[0, 1, 2]]
    """
    check_is_batch("batch", batch)
    mask = batch.completion_mask
    rank, length = mask.long().cumsum(-1) - 1, mask.sum(-1, keepdim=True).clamp(min=1)
    return Labels(_of_completions((3 * rank // length).clamp(0, 2), batch), THIRDS)


def entropy_bands(batch: Batch, values: TokenValues, quantiles: Sequence[float] = DEFAULT_BANDS) -> Labels:
    """Return labels of tokens by entropy: up to the first quantile over all completion tokens, to the second, beyond.

    Args:
        batch: (n, T).
        values: (n, T), token values of the batch.
        quantiles: ascending, in (0, 1).

    Example:
        >>> mask = torch.ones(1, 5, dtype=torch.bool)
        >>> values = TokenValues(torch.zeros(1, 5), torch.arange(5.0)[None])
        >>> entropy_bands(Batch(mask.long(), mask, mask), values).index.tolist()
        [[0, 0, 0, 1, 2]]
    """
    check_is_batch("batch", batch)
    h = values.entropies.double()
    completion = h[batch.completion_mask]
    probabilities = torch.tensor(list(quantiles), dtype=torch.float64, device=h.device)
    bounds = _quantiles(completion, probabilities) if completion.numel() else probabilities
    edges = [0.0, *quantiles, 1.0]
    names = tuple(f"h {low:.0%} to {high:.0%}" for low, high in pairwise(edges))
    return Labels(_of_completions(torch.bucketize(h, bounds), batch), names)


def completion_end(finished: Tensor) -> Labels:
    """Return labels of rollouts by whether they ended by a token or were truncated at the length limit.

    Args:
        finished: bool (n,).

    Example:
        >>> completion_end(torch.tensor([True, False])).index.tolist()
        [1, 0]
    """
    check_tensor("finished", finished)
    return Labels(finished.long(), ("truncated", "finished"))


def rewards(values: Tensor) -> Labels:
    """Return labels of rollouts by reward: its values where there are four at most, else quarters of the rollouts.

    Args:
        values: (n,), finite.

    Example:
        >>> rewards(torch.tensor([1.0, 0.0, 1.0]))
        Labels(index=int64 (3,), names=['reward 0', 'reward 1'])
    """
    check_tensor("values", values)
    distinct, index = torch.unique(values.double(), return_inverse=True)
    if len(distinct) <= 4:
        return Labels(index, tuple(f"reward {x:g}" for x in distinct.tolist()))
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device=values.device)
    quarter = torch.bucketize(values.double(), _quantiles(values.double(), quartiles))
    return Labels(quarter, tuple(f"reward, {name} quarter" for name in ("lowest", "second", "third", "highest")))


def reward_bands(values: Tensor) -> Labels:
    """Return labels of rollouts by bands of the reward that do not depend on the batch, so that sums over steps add up.

    Args:
        values: (n,), finite.

    Example:
        >>> reward_bands(torch.tensor([0.0, 0.3, 1.0])).index.tolist()
        [1, 2, 3]
    """
    check_tensor("values", values)
    # Twice the number of bounds 0 and 1 that the reward is above, plus 1 where it is at a bound.
    bounds = torch.tensor([0.0, 1.0], dtype=torch.float64, device=values.device)
    wide = values.double().unsqueeze(-1)
    return Labels((2 * (wide > bounds) + (wide == bounds)).sum(-1), REWARD_BANDS)


def difficulty(values: Tensor, group: Tensor) -> Labels:
    """Return labels of rollouts by the pass rate of their prompt: the share of its rollouts with the highest reward.

    Args:
        values: (n,), rewards.
        group: int64 (n,), the prompt of each rollout.

    Example:
        >>> difficulty(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1])).index.tolist()
        [2, 2, 0, 0]
    """
    check_tensor("values", values)
    check_tensor("group", group)
    prompt = torch.unique(group, return_inverse=True)[1]
    passed = (values == values.max()).double()
    count = torch.bincount(prompt)
    rate = (torch.bincount(prompt, passed) / count)[prompt]
    names = ("none passes", "under half pass", "half or more pass", "all pass")
    index = torch.where(rate == 0, 0, torch.where(rate < 0.5, 1, torch.where(rate < 1, 2, 3)))
    return Labels(index, names)


def clipped(is_clipped: Tensor, batch: Batch) -> Labels:
    """Return labels of tokens by whether the loss clipped them, so that their coefficient is 0.

    Args:
        is_clipped: bool (n, T).
        batch: (n, T).

    Example:
        >>> mask = torch.tensor([[False, True]])
        >>> clipped(mask, Batch(mask.long(), mask, mask)).index.tolist()
        [[-1, 1]]
    """
    check_tensor("is_clipped", is_clipped)
    return Labels(_of_completions(is_clipped.long(), batch), ("not clipped", "clipped"))


def _quantiles(values: Tensor, probabilities: Tensor) -> Tensor:
    """Return quantiles of values (m,) as ``torch.quantile`` interpolates them, which refuses more than 2^24 values."""
    ordered = values.sort().values
    rank = probabilities * (len(ordered) - 1)
    below = rank.floor().long()
    return torch.lerp(ordered[below], ordered[rank.ceil().long()], rank - below)


def _signs(batch: Batch, advantages: Tensor | None) -> Tensor:
    """Return what has the sign of each token's advantage, (n, T) or (n, 1)."""
    shape = tuple(batch.input_ids.shape)
    if advantages is not None:
        check_tensor("advantages", advantages)
        if tuple(advantages.shape) not in (shape, shape[:1]):
            raise ValueError(
                f"advantages has shape {tuple(advantages.shape)}; expected {shape[:1]} or {shape}, a row a completion"
            )
        return advantages.to(batch.input_ids.device).reshape(shape[0], -1)
    if batch.coefficients is None:
        raise ValueError(
            "batch.coefficients is None; expected (n, T), whose signs are those of the advantages. Fill it by "
            "fx.coefficients, or pass advantages="
        )
    return batch.coefficients


def _of_completions(index: Tensor, batch: Batch) -> Tensor:
    return torch.where(batch.completion_mask, index, UNLABELLED)
