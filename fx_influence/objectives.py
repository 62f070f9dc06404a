"""What is asked of the policy over E: its entropy by default, or any functional given as per-sequence surrogates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fx_influence.core.checks import check_tensor
from fx_influence.estimators.entropy import TokenCoefficients
from fx_influence.types import Batch, TokenValues

Objective = Callable[[Tensor, Tensor, Batch], Tensor]
"""(token_logprobs (n_e, T), token_entropies (n_e, T), batch_e) -> s_a (n_e,), with sum_a grad s_a = grad query."""


def expected_reward(rewards: Tensor) -> Objective:
    """The query E[R] for ``influence(query=...)``: s_a = (R_a - mean R) S_a / n, S_a the sequence log-probability.

    ``rewards``: (n_e,), of the rollouts of E in order. Results are in reward units per unit lr; positive raises it.
    Raises ``ValueError`` for rewards that are not finite. Source: REINFORCE with a baseline, Williams 1992.

    Example:
        >>> logprobs = torch.tensor([[-1.0], [-2.0]])
        >>> mask = torch.ones(2, 1, dtype=torch.bool)
        >>> expected_reward(torch.tensor([1.0, 0.0]))(logprobs, logprobs, Batch(mask.long(), mask, mask)).tolist()
        [-0.25, 0.5]
    """
    check_tensor("rewards", rewards)
    _check_finite("rewards", rewards)

    def query(token_logprobs: Tensor, token_entropies: Tensor, batch_e: Batch) -> Tensor:
        _check_rows("rewards", rewards, token_logprobs.shape[:1])
        r = rewards.to(token_logprobs)
        return (r - r.mean()) * token_logprobs.sum(-1) / len(r)

    return query


def kl_to_reference(reference_logprobs: Tensor) -> Objective:
    """The query KL(pi || pi_ref) per completion, E[sum_t log pi(y_t) - log pi_ref(y_t)], in nats per completion.

    ``reference_logprobs``: (n_e, T), log pi_ref of E's tokens, aligned with ``input_ids`` (``token_values`` of the
    reference gives them). The entropy part is exact over the vocabulary, the reference part sampled: with
    k_t = -h_t - log pi_ref(y_t), grad KL = -E[sum_t grad h_t + grad S_<t h_t + grad S_<=t log pi_ref(y_t)], each
    weight centred by its mean over E at the same rank-to-go. Raises ``ValueError`` for shapes that disagree.

    Example:
        >>> mask = torch.tensor([[False, True], [False, True]])
        >>> logprobs = torch.tensor([[0.0, -1.0], [0.0, -2.0]])
        >>> query = kl_to_reference(logprobs)
        >>> query(logprobs, -logprobs, Batch(mask.long(), mask, mask)).shape
        torch.Size([2])
    """
    check_tensor("reference_logprobs", reference_logprobs)

    def query(token_logprobs: Tensor, token_entropies: Tensor, batch_e: Batch) -> Tensor:
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

    return query


def objective_coefficients(query: Objective, values: TokenValues, batch_e: Batch) -> TokenCoefficients:
    """ds_a/dlog pi and ds_a/dh of a query at every token of E, each (n_e, T), float64.

    Raises ``ValueError`` unless the query returns (n_e,) finite numbers that depend on the two inputs, each s_a on its
    own row only: the rows are E's independent draws, and error bars and the matrix need them apart.
    """
    inputs = [v.detach().double().requires_grad_() for v in values]
    with torch.enable_grad():
        s = query(inputs[0], inputs[1], batch_e)
        n = len(batch_e.input_ids)
        if not isinstance(s, Tensor) or s.shape != (n,) or not torch.isfinite(s).all():
            shape = tuple(s.shape) if isinstance(s, Tensor) else type(s).__name__
            raise ValueError(
                f"query returned {shape}, not all finite or of that shape; return finite surrogates ({n},)"
            )
        if not s.requires_grad:
            raise ValueError("query's result depends on neither input; make it from token_logprobs or token_entropies")
        weight = torch.linspace(1.0, 2.0, n, dtype=s.dtype, device=s.device)
        whole = _gradient(s.sum(), inputs, retain=True)
        weighted = _gradient((weight * s).sum(), inputs, retain=False)
    if not all(torch.isfinite(g).all() for g in whole):
        raise ValueError("query's derivative is not finite; keep roots and logarithms away from 0, as in empty rows")
    for plain, scaled in zip(whole, weighted, strict=True):
        if not torch.allclose(scaled, plain * weight.unsqueeze(-1).to(plain), rtol=1e-6, atol=1e-12):
            raise ValueError("query's s_a depends on other rows than a; .detach() what it takes over the whole batch")
    return TokenCoefficients(*(torch.where(batch_e.completion_mask, g, 0.0) for g in whole))


def _gradient(scalar: Tensor, inputs: list[Tensor], retain: bool) -> list[Tensor]:
    found = torch.autograd.grad(scalar, inputs, retain_graph=retain, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _check_finite(field: str, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise ValueError(f"{field} has values that are not finite; drop those rollouts from E")


def _check_rows(field: str, values: Tensor, shape: torch.Size) -> None:
    if values.shape != shape:
        raise ValueError(f"{field} has shape {tuple(values.shape)}; pass {tuple(shape)}, the rows of batch_e in order")
