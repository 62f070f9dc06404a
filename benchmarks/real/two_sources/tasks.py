"""Multiplications of reasoning-gym as two sources of prompts: of one digit, and of two, which are too hard.

    python -m benchmarks.real.two_sources.tasks    writes train.jsonl and eval.jsonl again

reasoning-gym scores an answer by the share of the completion that it is. SmolLM2-135M-Instruct gives about half of the
first, mostly in many words, and hardly any of the second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.real.tasks import SYSTEM, unique_tasks, write_records
from fx_influence.interop.prompts import Prompt, as_conversations, read_prompts
from fx_influence.interop.rewards import TextOrMessages

EASY, HARD = SOURCES = ("one digit", "two digits")
TASK = "products"
DIGITS = {EASY: 1, HARD: 2}
COUNTS = {"train": 48, "eval": 40}
"""Tasks of each source."""
FILES = {split: Path(__file__).with_name(f"{split}.jsonl") for split in COUNTS}


def tasks(split: str) -> list[Prompt]:
    """Return the conversations of "train" or "eval", the sources in turn, with ``source``, ``task`` and ``answer``."""
    return as_conversations(read_prompts(FILES[split]), chat=True, system=SYSTEM)


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
