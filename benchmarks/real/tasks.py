"""Easy tasks of reasoning-gym with numbers as answers, and its verifiers as a reward.

    python -m benchmarks.real.tasks    writes train_tasks.jsonl and eval_tasks.jsonl again

The tasks are stored, so that only their verifiers need reasoning-gym.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.real.language_model import prepare_verifiers
from fx_influence.interop.prompts import Message, Prompt, as_conversations, read_prompts
from fx_influence.interop.rewards import TextOrMessages, completion_text

FILES = {split: Path(__file__).with_name(f"{split}_tasks.jsonl") for split in ("train", "eval")}
KINDS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "leg_counting": {"min_animals": 1, "max_animals": 2, "min_instances": 1, "max_instances": 5},
    "letter_counting": {"min_words": 1, "max_words": 2},
}
"""Data sets of reasoning-gym and their settings, chosen so that a small model sometimes answers correctly."""
PER_KIND = 16
SYSTEM = "Answer with the number."


def tasks(split: str) -> list[Prompt]:
    """Return the conversations of "train" or "eval", with the columns ``task`` and ``answer``."""
    return as_conversations(read_prompts(FILES[split]), chat=True, system=SYSTEM)


def messages(prompt: Prompt) -> list[Message]:
    """Return a conversation as TRL takes it."""
    assert prompt.messages is not None
    return list(prompt.messages)


def verified(
    completions: Sequence[TextOrMessages], task: Sequence[str], answer: Sequence[str], **columns: Any
) -> list[float]:
    """Return the scores of reasoning-gym's verifiers: 1 for the answer alone, less for more text around it, or 0."""
    rows = zip(map(completion_text, completions), task, answer, strict=True)
    return [float(_verifier(name)(text.strip(), {"answer": expected})) for text, name, expected in rows]


def by_length(completions: Sequence[TextOrMessages], **columns: Any) -> list[float]:
    """Return rewards that differ between the completions of a random model."""
    texts = [completion_text(completion) for completion in completions]
    return [0.3 * len(text) + text.count("e") for text in texts]


@cache
def _verifier(name: str) -> Any:
    prepare_verifiers()
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1, seed=0, **KINDS[name]).score_answer


def write_tasks() -> None:
    """Write the tasks, the kinds in turn; a question is in one file only."""
    prepare_verifiers()
    import reasoning_gym

    questions: set[str] = set()
    for seed, (split, path) in enumerate(FILES.items()):
        by_kind = []
        for kind, settings in KINDS.items():
            entries = reasoning_gym.create_dataset(kind, size=20 * PER_KIND, seed=seed, **settings)
            unique = {
                entry["question"].strip(): entry for entry in entries if entry["question"].strip() not in questions
            }
            questions |= set(list(unique)[:PER_KIND])
            by_kind.append([(kind, text, entry["answer"]) for text, entry in list(unique.items())[:PER_KIND]])
        rows = [row for rows in zip(*by_kind, strict=True) for row in rows]
        records = [
            {"id": f"{split}-{i:02}", "task": kind, "prompt": text, "answer": answer}
            for i, (kind, text, answer) in enumerate(rows)
        ]
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    write_tasks()
