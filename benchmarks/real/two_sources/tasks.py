"""Multiplications of reasoning-gym as two sources of prompts: of one digit, and of two, which are too hard.

    python -m benchmarks.real.two_sources.tasks    writes train.jsonl and eval.jsonl again

SmolLM2-135M-Instruct solves about a third of the first and hardly any of the second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.real.tasks import SYSTEM, unique_tasks, verifier, write_records
from fx_influence.interop.prompts import Prompt, as_conversations, read_prompts
from fx_influence.interop.rewards import TextOrMessages, completion_text

EASY, HARD = SOURCES = ("one digit", "two digits")
TASK = "products"
DIGITS = {EASY: 1, HARD: 2}
COUNTS = {"train": 48, "eval": 40}
"""Tasks of each source."""
FILES = {split: Path(__file__).with_name(f"{split}.jsonl") for split in COUNTS}
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def tasks(split: str) -> list[Prompt]:
    """Return the conversations of "train" or "eval", the sources in turn, with ``source``, ``task`` and ``answer``."""
    return as_conversations(read_prompts(FILES[split]), chat=True, system=SYSTEM)


def solved(completions: Sequence[TextOrMessages], answer: Sequence[str], **columns: Any) -> list[float]:
    """Return 1 for completions whose last number is the answer, by reasoning-gym's verifier, else 0."""
    numbers = [NUMBER.findall(completion_text(completion)) for completion in completions]
    score = verifier(TASK)
    return [
        float(bool(x) and score(x[-1], {"answer": expected}) >= 1) for x, expected in zip(numbers, answer, strict=True)
    ]


def of_sources(reward: Callable[..., list[float]], sources: Sequence[str]) -> Callable[..., list[float]]:
    """Return a reward that is 0 for prompts of other sources, so that their rollouts have no advantages."""

    def reward_of_sources(completions: Sequence[TextOrMessages], source: Sequence[str], **columns: Any) -> list[float]:
        rewards = reward(completions=completions, source=source, **columns)
        return [x if name in sources else 0.0 for x, name in zip(rewards, source, strict=True)]

    return reward_of_sources


def write_tasks() -> None:
    """Write the tasks, the sources in turn; a question is in one file only."""
    questions: set[str] = set()
    kinds = [(TASK, {"min_terms": 2, "max_terms": 2, "min_digits": n, "max_digits": n}) for n in DIGITS.values()]
    for seed, (split, count) in enumerate(COUNTS.items()):
        records = [
            {"id": f"{split}-{i:02}-{source.split()[0]}", "source": source, "task": TASK, "prompt": q, "answer": a}
            for i, row in enumerate(unique_tasks(kinds, count, seed, questions))
            for source, (q, a) in zip(SOURCES, row, strict=True)
        ]
        write_records(FILES[split], records)


if __name__ == "__main__":
    write_tasks()
