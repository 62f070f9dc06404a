"""Cases of the GPU benchmark: models, sizes and methods, and the limits that they run under."""

from __future__ import annotations

from typing import NamedTuple

TOKENS_AT_ONCE = {"bfloat16": 8192, "float32": 4096}
"""Tokens per pass: on 1.5B a graph takes 3 MB per token in bfloat16 and twice that in float32, beside 50 GB of moments
and gradients."""
MEMORY_BUDGET = 2**36
"""Bytes for U's layer inputs and output gradients, 2 MB per token on 1.5B, or for the matrix: 512 rows of LoRA
gradients take 38 GB there, and may take two thirds of it."""
MATMUL = {"cuda": 8192, "cpu": 256}
"""Side of the square matrices whose product gives the rate."""
RUNS, RUN_SECONDS = 3, 5.0
"""Runs of which the median is taken, fewer if they take that many seconds in total."""
SUBSET = 8
"""Rows of U and of E on which results are compared with float32."""
FLOOR_SECONDS, SAFETY, COMPILE_SECONDS = 15.0, 4.0, 120.0
"""A case is begun if the remaining time is at least FLOOR_SECONDS (model, warm-up, float32), plus SAFETY times its
operations at the matmul rate, plus COMPILE_SECONDS if it is compiled."""
DIRECTIONS, ETA = 4, 1e-6


class Shape(NamedTuple):
    """Sizes of a Qwen2."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int


SHAPES = {
    "tiny": Shape(64, 128, 2, 4, 96),
    "0.5B": Shape(896, 4864, 24, 14, 151936),
    "1.5B": Shape(1536, 8960, 28, 12, 151936),
}
RANK = 16


class Setting(NamedTuple):
    """A model, and which of its parameters are trained in which dtype."""

    model: str
    lora: bool
    dtype: str
    compiled: bool = False


class Case(NamedTuple):
    """A measurement: a ``method`` at a size, and the seconds that it should take on a card like the H200."""

    setting: Setting
    method: str
    n_u: int
    n_e: int
    width: int
    goal_seconds: float | None = None


def _cases(setting: Setting, n: int, width: int, *methods: str) -> tuple[Case, ...]:
    return tuple(Case(setting, method, n, n, width) for method in methods)


_BIG, _BIG_LORA = Setting("1.5B", False, "bfloat16"), Setting("1.5B", True, "bfloat16")
_SMALL, _SMALL_LORA = Setting("0.5B", False, "bfloat16"), Setting("0.5B", True, "bfloat16")
CASES = (
    Case(_BIG, "adjoint", 512, 512, 512, goal_seconds=26.0),
    Case(_BIG_LORA, "matrix", 512, 512, 512, goal_seconds=12.0),
    *_cases(_BIG_LORA, 512, 512, "step", "adjoint"),
    *_cases(_BIG, 512, 512, "step", "adjoint_grad"),
    *_cases(_BIG, 32, 512, "step", "adjoint", "per_sequence", "error_bars"),
    *_cases(_SMALL, 512, 512, "step", "adjoint", "adjoint_grad"),
    *_cases(_SMALL, 64, 512, "step", "adjoint", "per_sequence", "error_bars", "sweep"),
    *_cases(_SMALL, 16, 512, "step", "matrix"),
    *_cases(_SMALL_LORA, 512, 512, "step", "adjoint", "matrix"),
    *_cases(_SMALL_LORA, 128, 256, "step", "adjoint", "per_sequence", "matrix"),
    *_cases(_SMALL._replace(dtype="float32"), 64, 256, "step", "adjoint"),
    *_cases(_SMALL_LORA._replace(dtype="float32"), 64, 256, "step", "adjoint", "matrix"),
    *_cases(_BIG._replace(dtype="float32"), 16, 512, "step", "adjoint"),
    Case(_BIG._replace(compiled=True), "adjoint", 512, 512, 512, goal_seconds=26.0),
)
"""Cases by importance. torch.compile, the last, may take minutes before it saves any: allow 12."""
_ALL_ROUTES = "step", "adjoint", "adjoint_grad", "per_sequence", "error_bars", "matrix", "sweep"
QUICK = (
    *_cases(Setting("tiny", False, "bfloat16"), 10, 12, *_ALL_ROUTES),
    *_cases(Setting("tiny", True, "bfloat16"), 10, 12, *_ALL_ROUTES),
    *_cases(Setting("tiny", True, "float32"), 10, 12, "step", "adjoint", "matrix"),
)
