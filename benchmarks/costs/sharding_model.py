"""Extrapolation of the measured sharding costs to large models on assumed GPUs."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple


class Assumptions(NamedTuple):
    """Assumed GPUs (rates per second, bytes) and batch."""

    matmul_flops: float = 600e12
    link_in_node: float = 300e9
    link_between_nodes: float = 40e9
    memory: float = 80e9
    in_node: int = 8
    rollouts: int = 512
    tokens: int = 1024
    tokens_at_once: int = 16_384


MODELS = {"1.5B": 1.5e9, "7B": 7e9, "70B": 70e9}
GPUS = (1, 8, 64)


def extrapolate(matmul_share: float, bytes_a_parameter: float, assumed: Assumptions) -> list[dict[str, Any]]:
    """Return seconds of an adjoint without error bars, with U and E of equal size.

    The model is replicated on every GPU or, if too large, sharded over all of them; None if it does not fit either way.

    Args:
        matmul_share: share of the matmul rate that is reached.
        bytes_a_parameter: bytes per parameter at the peak of a rank.
        assumed: GPUs and batch.
    """
    table = []
    for (name, parameters), gpus in itertools.product(MODELS.items(), GPUS):
        tokens = assumed.rollouts * assumed.tokens
        # Nine forward passes, with two operations per parameter and token each.
        work = 18 * parameters * tokens / gpus / (assumed.matmul_flops * matmul_share)
        link = assumed.link_in_node if gpus <= assumed.in_node else assumed.link_between_nodes
        replicated, sharded = bytes_a_parameter * parameters, bytes_a_parameter * parameters / gpus
        passes = -(-tokens // gpus // assumed.tokens_at_once)
        # Weights in bfloat16 for forward and backward over E and U and, with the direction's, for the JVP; twice the
        # gradient in float32.
        sharded_bytes = passes * (6 * 2 + 2 * 4) * parameters
        replicated_bytes = 2 * 2 * 4 * parameters
        how = "whole" if replicated < assumed.memory else "sharded" if sharded < assumed.memory else None
        sent = {"whole": replicated_bytes, "sharded": sharded_bytes, None: 0.0}[how] * (gpus - 1) / gpus
        table.append(
            {
                "model": name,
                "gpus": gpus,
                "how": how,
                "gigabytes_a_gpu": (sharded if how != "whole" else replicated) / 1e9,
                "seconds": None if how is None else work + sent / link,
                "seconds_sending": None if how is None else sent / link,
            }
        )
    return table
