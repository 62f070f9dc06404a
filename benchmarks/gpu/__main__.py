"""Measure the methods for influences on a CUDA device, at the size of models that people train.

    python -m benchmarks.gpu [--minutes 8] [--out FILE]    writes results/gpu.json, unattended
    python -m benchmarks.gpu --quick                       tiny models on the CPU, written nowhere, as a check

Qwen2 of 0.5B and 1.5B from their shapes, with random weights, rollouts and AdamW moments: the measurements depend on
none of them, and real moments would take a step and its memory. Trained are all parameters, or LoRA of rank 16 on all
linear layers in the model's dtype. Each method is timed beside the training step, ``batch_gradient`` over U and over E,
and reports seconds, tokens per second, the peak of the tensors that it adds on the device, and the share of the
device's matmul rate, itself measured first, that its necessary operations amount to: see ``operations``.

Before it is timed, a method runs once on one chunk of rows. Its result in bfloat16 is compared with the same weights
in float32 on the first rows of U and E; a relative residual above the library's bound is reported and does not raise.
Cases are in order of importance. A case for which the remaining time does not suffice is skipped, one that fails, for
lack of memory for example, leaves its error, and the file is written after each. The exit status is 1 without a CUDA
device and where a case failed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.gpu.cases import CASES, QUICK
from benchmarks.gpu.run import run
from benchmarks.harness import parser, result_path

OUT = result_path("gpu")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return 1 without a CUDA device, or if a case failed."""
    command = parser(__doc__, "tiny models on the CPU, written nowhere")
    command.add_argument("--minutes", type=float, default=8.0, help="no case begins that might end later (default: 8)")
    command.add_argument("--out", type=Path, default=OUT, help="file of the figures (default: results/gpu.json)")
    arguments = command.parse_args(argv)
    if arguments.quick:
        outcomes = run(QUICK, "cpu", arguments.minutes, out=None)
    elif torch.cuda.is_available():
        outcomes = run(CASES, "cuda", arguments.minutes, arguments.out)
    else:
        print(
            f"benchmarks.gpu: torch {torch.__version__} finds no CUDA device, so nothing was measured; run it where "
            "torch.cuda.is_available(), or with --quick on the CPU to check that it works",
            file=sys.stderr,
        )
        return 1
    return int(any("error" in o or "error" in (o.get("correctness") or {}) for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
