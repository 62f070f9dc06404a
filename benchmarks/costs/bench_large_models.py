"""Compute seconds and memory of an attribution of large models, from the bytes and rates that were measured.

python -m benchmarks large_models            writes results/large_models.json and the table in README.md; a second
python -m benchmarks large_models --quick    the same, written nowhere

Bytes for each parameter are those of results/bytes.json, the rate of matrix products that of results/sharding.json; the
assumptions about GPUs are stated with the table. Run it after either.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any, NamedTuple

from benchmarks.harness import COSTS, parser, result_path, store

NAME = "bench_large_models"
SOURCES = ("bench_bytes", "bench_sharding")
"""Benchmarks whose stored figures the table is computed from."""
TRAINING_BYTES = 16
"""Bytes of a training run in float32 for each parameter: weight, gradient and two moments."""
CALL, WITH_ERROR_BARS, IN_TRL = "grad", "error_bars", "trl_clipped"
"""Calls of ``bench_bytes`` whose bytes the table has: the trainer's gradient handed in, with error bars, inside TRL."""


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


def extrapolate(matmul_share: float, bytes_a_parameter: dict[str, float], assumed: Assumptions) -> list[dict[str, Any]]:
    """Return seconds of an adjoint without error bars, with U and E of equal size, and bytes beside its training run.

    The model is replicated on every GPU or, if the call with error bars would not fit, sharded over all of them; None
    if it does not fit either way.

    Args:
        matmul_share: share of the matmul rate that is reached.
        bytes_a_parameter: bytes beside a training run for each parameter, by call.
        assumed: GPUs and batch.
    """
    table = []
    for (name, parameters), gpus in itertools.product(MODELS.items(), GPUS):
        tokens = assumed.rollouts * assumed.tokens
        # Nine forward passes, with two operations per parameter and token each.
        work = 18 * parameters * tokens / gpus / (assumed.matmul_flops * matmul_share)
        link = assumed.link_in_node if gpus <= assumed.in_node else assumed.link_between_nodes
        largest = (TRAINING_BYTES + max(bytes_a_parameter.values())) * parameters
        passes = -(-tokens // gpus // assumed.tokens_at_once)
        # Weights in bfloat16 for forward and backward over E and U and, with the direction's, for the JVP; twice the
        # gradient in float32.
        sharded_bytes = passes * (6 * 2 + 2 * 4) * parameters
        replicated_bytes = 2 * 2 * 4 * parameters
        how = "replicated" if largest < assumed.memory else "sharded" if largest / gpus < assumed.memory else None
        sent = {"replicated": replicated_bytes, "sharded": sharded_bytes, None: 0.0}[how] * (gpus - 1) / gpus
        shards = 1 if how == "replicated" else gpus
        table.append(
            {
                "model": name,
                "gpus": gpus,
                "how": how,
                "gigabytes_training": TRAINING_BYTES * parameters / shards / 1e9,
                "gigabytes": {
                    call: (TRAINING_BYTES + size) * parameters / shards / 1e9
                    for call, size in bytes_a_parameter.items()
                },
                "seconds": None if how is None else work + sent / link,
                "seconds_sending": None if how is None else sent / link,
            }
        )
    return table


def report() -> dict[str, Any]:
    """Return the table with the measured figures and the assumptions that it is computed from."""
    of_bytes, of_ranks = (json.loads(result_path(name).read_text(encoding="utf-8")) for name in SOURCES)
    calls, share = of_bytes["calls"], of_ranks["share_of_matmul_rate"]
    measured = {call: calls[call]["bytes_per_parameter"] for call in (CALL, WITH_ERROR_BARS, IN_TRL)}
    assumed = Assumptions()
    return {
        "share_of_matmul_rate": share,
        "bytes_per_parameter": measured,
        "assumed": assumed._asdict(),
        "table": extrapolate(share, measured, assumed),
    }


def markdown(figures: dict[str, Any]) -> str:
    """Return the table of the page."""
    assumed, measured = figures["assumed"], figures["bytes_per_parameter"]
    lines = [
        f"Seconds (of which communication) of an adjoint over U and E of {assumed['rollouts']} x {assumed['tokens']} "
        f"tokens each, from the {figures['share_of_matmul_rate']:.0%} of the matmul rate that it reaches here, on GPUs "
        f"assumed to multiply at {assumed['matmul_flops'] / 1e12:.0f} TFLOP/s, with {assumed['memory'] / 1e9:.0f} GB "
        f"each, links of {assumed['link_in_node'] / 1e9:.0f} GB/s among {assumed['in_node']} and "
        f"{assumed['link_between_nodes'] / 1e9:.0f} GB/s beyond, {assumed['tokens_at_once']} tokens per pass, without "
        "overlap. GB on each GPU, where a shard takes the bytes of its parameters: of the training run alone "
        f"({TRAINING_BYTES} bytes for each parameter), and with a call beside it, with error bars, and inside TRL "
        f"({measured[CALL]:.1f}, {measured[WITH_ERROR_BARS]:.1f} and {measured[IN_TRL]:.1f} bytes more); what is free "
        "of a GPU is for activations and for the caches that `memory_budget` allows.",
        "",
        "| full, float32 | GPUs | seconds | GB of training | GB with a call | GB with error bars | GB inside TRL |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in figures["table"]:
        how = "does not fit" if entry["how"] is None else f"{entry['seconds']:.1f} ({entry['seconds_sending']:.1f})"
        how += f", {entry['how']}" if entry["how"] and entry["gpus"] > 1 else ""
        size = " | ".join(f"{entry['gigabytes'][call]:.0f}" for call in (CALL, WITH_ERROR_BARS, IN_TRL))
        lines.append(f"| {entry['model']} | {entry['gpus']} | {how} | {entry['gigabytes_training']:.0f} | {size} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__).parse_args(argv)
    figures = report()
    print(markdown(figures))
    if not arguments.quick:
        store(NAME, figures, {COSTS: {NAME: markdown(figures)}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
