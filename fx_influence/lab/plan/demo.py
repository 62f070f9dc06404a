"""The embedded training run: paths of its files, and the plan fields that describe it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from fx_influence.lab.plan.batch_request import SampledBatch
from fx_influence.types import LossType

DEMO = "demo"
"""Name of the embedded checkpoint; ``demo/train`` and ``demo/eval`` are its prompt files."""
DEMO_DIRECTORY = Path(__file__).parents[1] / "demo"


class _DemoDefault:
    """Default of a field that describes one training run: the demo's value with its checkpoint, none with another."""

    def __repr__(self) -> str:
        return "<the demo's>"


DEMO_DEFAULT: Any = _DemoDefault()
DEMO_FIELDS: dict[str, Any] = {
    "update": SampledBatch("demo/train", num_prompts=16, completions_per_prompt=4, seed=7418624510230548125),
    "evaluations": (SampledBatch("demo/eval", num_prompts=256, completions_per_prompt=2),),
    "reward": "fx_influence.interop.rewards:exact_match",
    "loss": "dr_grpo",
    "max_new_tokens": 20,
}
"""Values of the fields that describe the embedded training run; those of another run cannot be guessed.

U's seed is chosen so that E distinguishes the step's effect from noise, which is rare for a policy this small.
"""
LINES_TO_ADD = {
    "update": "update: {prompts: FILE.jsonl}",
    "evaluations": "evaluations: [{prompts: FILE.jsonl}]",
    "reward": "reward: MODULE:FUNCTION",
    "loss": f"loss: {' | '.join(get_args(LossType))}",
    "max_new_tokens": "max_new_tokens: N",
}
"""Lines to add to a plan of another training run that lacks these fields."""


def demo_path(name: str) -> str:
    """Return the path of ``demo``, ``demo/train`` or ``demo/eval``, and any other path unchanged."""
    known = {DEMO: "policy", f"{DEMO}/train": "train_prompts.jsonl", f"{DEMO}/eval": "eval_prompts.jsonl"}
    return str(DEMO_DIRECTORY / known[name]) if name in known else name
