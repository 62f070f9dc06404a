"""Token values at displaced parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap

from fx_influence.autodiff.token_values import scatter_to_batch, scored_features
from fx_influence.batching.microbatch import TOKENS_PER_CHUNK, MicroBatch, micro_batches
from fx_influence.batching.rows import select_rows
from fx_influence.core.tree import shift
from fx_influence.policy.lm_head import head_token_values
from fx_influence.policy.split import split_policy
from fx_influence.types import Apply, Batch, Params, TokenValues


def perturbed_token_values(
    params: Params,
    block: Params,
    eta: float,
    batch: Batch,
    apply: Apply,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    vmapped: bool = True,
) -> TokenValues:
    """``all_token_values`` at theta + eta v for every v of a block of K directions, (K, B, T) each.

    The directions, a leading axis of every entry of ``block``, are vmapped as far as the batch leaves room for more
    than one in a pass; each has a pass of its own where they are not to be ``vmapped``.
    """
    policy, size = split_policy(apply), len(next(iter(block.values())))
    together = _together(batch, chunk_size) if vmapped else 1
    tokens = TOKENS_PER_CHUNK // together
    alone = together == 1
    pieces = (
        policy.micro_batches(batch, chunk_size)
        if alone
        else micro_batches(batch, chunk_size, policy.left_alignable, tokens)
    )

    def moved(here: Params, features: Callable[[Params, MicroBatch], Tensor]) -> TokenValues:
        found = []
        for part in pieces:
            scored = scored_features(features(here, part), part)
            found.append(
                (
                    part,
                    head_token_values(policy, here, scored, part.targets, temperature, policy.max_logits // together),
                )
            )
        return scatter_to_batch(found, batch)

    found = []
    with torch.no_grad():
        for start in range(0, size, together):
            some = {name: v[start : start + together] for name, v in block.items()}
            if alone:
                own = moved(shift(params, {name: v[0] for name, v in some.items()}, eta), policy.backbone)
                found.append(TokenValues(*(x.unsqueeze(0) for x in own)))
            else:
                found.append(vmap(lambda v: moved(shift(params, v, eta), policy.backbone_vmap))(some))
    return TokenValues(*(torch.cat(field) for field in zip(*found, strict=True)))


def _together(batch: Batch, chunk_size: int | None) -> int:
    rows_at_once = chunk_size or max(1, TOKENS_PER_CHUNK // batch.input_ids.shape[1])
    # Products with a matrix for each direction are slow ones: worth it only while one direction fills no pass.
    return max(1, rows_at_once // len(batch.input_ids))


def can_vmap_directions(
    params: Params, batch: Batch, apply: Apply, temperature: float = 1.0, chunk_size: int | None = None
) -> bool:
    """Return whether directions fit a pass together and ``vmap`` takes them through the policy, tried with two.

    False as well where torch would go one by one inside, for want of a batching rule, which it warns of.
    """
    if len(batch.input_ids) == 0 or _together(batch, chunk_size) == 1:
        return False
    some = select_rows(batch, slice(0, 1))
    two = {name: torch.zeros_like(p).expand(2, *p.shape) for name, p in params.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop")
        try:
            perturbed_token_values(params, two, 0.0, some, apply, temperature, chunk_size=2)
        # Whatever a model raises for want of values or shapes, of its own exceptions too.
        except Exception:
            return False
    return True
