"""Exact answers on a vocabulary and horizon small enough to list every completion.

A ``Space`` lists, for each prompt, all completions: those that end with EOS (EOS is their last token) and those cut off
at ``max_new_tokens``. Every number is one batched call of ``apply`` over that list and differentiable in ``params``; no
importance weight or sampled estimate appears. Prompts count equally.

    space = enumerate_completions([prompt], eos_id=0, vocab_size=3, max_new_tokens=3)
    exact_entropy(apply, params, space, "token")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.types import Apply, Batch, Normalize, Params
from helpers.tolerances import rounding_bound

Score = Callable[[Tensor, Tensor, Batch], Tensor]
"""Function of token log-probs (N, T), token entropies (N, T), both 0 off the mask, and batch, to scores (N,)."""


class Space(NamedTuple):
    """The completions of all prompts: ``batch`` (N rows, ``group`` = prompt index, padded right with EOS ids)."""

    batch: Batch
    prompts: int
    temperature: float


def enumerate_completions(
    prompts: Tensor | Sequence[Tensor],
    eos_id: int,
    vocab_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> Space:
    """List all completions of one prompt (1-D ids) or several.

    Args:
        prompts: token ids of each prompt.
        eos_id: token that ends a completion.
        vocab_size: number of tokens.
        max_new_tokens: length at which a completion is cut off.
        temperature: divisor of the logits.
    """
    prompts = [prompts] if isinstance(prompts, Tensor) else list(prompts)
    completions: list[list[int]] = []
    unfinished: list[list[int]] = [[]]
    for _ in range(max_new_tokens):
        extended = [[*prefix, token] for prefix in unfinished for token in range(vocab_size)]
        completions += [c for c in extended if c[-1] == eos_id]
        unfinished = [c for c in extended if c[-1] != eos_id]
    completions += unfinished
    width = max(len(p) for p in prompts) + max_new_tokens
    rows = [(i, p.tolist(), c) for i, p in enumerate(prompts) for c in completions]
    ids = torch.tensor([p + c + [eos_id] * (width - len(p) - len(c)) for _, p, c in rows])
    start, end = (torch.tensor(x)[:, None] for x in ([len(p) for _, p, _ in rows], [len(p + c) for _, p, c in rows]))
    column = torch.arange(width)
    group = torch.tensor([i for i, _, _ in rows])
    batch = Batch(ids, column < end, (column >= start) & (column < end), group=group)
    return Space(batch, len(prompts), temperature)


def token_values(apply: Apply, params: Params, space: Space) -> tuple[Tensor, Tensor]:
    """Return token log-probs and entropies of every completion, (N, T), 0 off the completion."""
    batch = space.batch
    logits = apply(params, batch.input_ids, batch.attention_mask)[:, :-1] / space.temperature
    log_pi = logits.log_softmax(-1)
    chosen = log_pi.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    mask = batch.completion_mask[:, 1:]
    values = (chosen * mask, torch.special.entr(log_pi.exp()).sum(-1) * mask)
    return tuple(torch.nn.functional.pad(x, (1, 0)) for x in values)  # type: ignore[return-value]


def exact_log_probs(apply: Apply, params: Params, space: Space) -> Tensor:
    """Return log p of each row, (N,): p of its completion given its prompt, times 1/prompts. All p sum to 1."""
    log_prompts = torch.tensor(float(space.prompts), dtype=torch.float64).log()
    return token_values(apply, params, space)[0].sum(1) - log_prompts


def exact_expected(apply: Apply, params: Params, space: Space, score: Score) -> Tensor:
    """Return E[score] over prompts and completions, (): the sum of probability times score, differentiable in both."""
    logprobs, entropies = token_values(apply, params, space)
    p = exact_log_probs(apply, params, space).exp()
    return (p * score(logprobs, entropies, space.batch)).sum()


def exact_entropy(apply: Apply, params: Params, space: Space, normalize: Normalize = "token") -> Tensor:
    """Return E[sum_t h_t] / E[T] for "token", E[sum_t h_t] for "sequence"; nats, ()."""
    entropy = exact_expected(apply, params, space, lambda logprobs, entropies, batch: entropies.sum(1))
    if normalize == "sequence":
        return entropy
    return entropy / exact_expected(
        apply, params, space, lambda logprobs, entropies, batch: batch.completion_mask.sum(1)
    )


def exact_gradient(apply: Apply, params: Params, space: Space, normalize: Normalize = "token") -> Params:
    """Return the gradient of ``exact_entropy`` by name; zeros where it does not depend on a parameter."""
    leaves = {name: p.detach().clone().requires_grad_(True) for name, p in params.items()}
    value = exact_entropy(apply, leaves, space, normalize)
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def take(space: Space, rows: Tensor) -> Batch:
    """Return rows of the space as a batch."""
    b = space.batch
    group = None if b.group is None else b.group[rows]
    return Batch(b.input_ids[rows], b.attention_mask[rows], b.completion_mask[rows], group=group)


def sample(apply: Apply, params: Params, space: Space, n: int, generator: torch.Generator) -> Batch:
    """Draw n independent pairs: the prompt uniformly, the completion from the policy at ``params``."""
    p = exact_log_probs(apply, params, space).detach().exp()
    return take(space, torch.multinomial(p, n, replacement=True, generator=generator))


def replicate(apply: Apply, params: Params, space: Space, n: int) -> Batch:
    """Return a batch of n rows that is the policy's distribution: every row of the space exactly n p times.

    Estimates on it are exact, with no sampling error. Every n p must be an integer: see ``dyadic_policy``.

    Raises:
        ValueError: for an n p that is not an integer.
    """
    copies = n * exact_log_probs(apply, params, space).detach().exp()
    counts = copies.round().long()
    if (copies - counts).abs().max() > rounding_bound(torch.float64, 100, n):
        raise ValueError(f"n is {n}; expected integers n p. Use dyadic_policy and a multiple of its units")
    return take(space, torch.arange(len(copies)).repeat_interleave(counts))
