"""Easy tasks of reasoning-gym with numbers as answers, and its verifiers as a reward.

    python -m benchmarks.real.tasks    writes train_tasks.jsonl and eval_tasks.jsonl again

The tasks are stored, so that only their verifiers need reasoning-gym.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
    return [float(verifier(name)(text.strip(), {"answer": expected})) for text, name, expected in rows]


def by_length(completions: Sequence[TextOrMessages], **columns: Any) -> list[float]:
    """Return rewards that differ between the completions of a random model."""
    texts = [completion_text(completion) for completion in completions]
    return [0.3 * len(text) + text.count("e") for text in texts]


@cache
def verifier(name: str) -> Any:
    """Return the function that scores an answer to a task of a kind, given the task's entry."""
    prepare_verifiers()
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1, seed=0, **KINDS.get(name, {})).score_answer


def drawn_tasks(
    kinds: Mapping[str, dict[str, Any]], count: int, seed: int, name: str, questions: set[str]
) -> list[Prompt]:
    """Return conversations on at least ``count`` tasks, the kinds in turn, each once, the same at every call.

    Args:
        kinds: data sets of reasoning-gym and their settings.
        count: number of tasks.
        seed: of the data sets.
        name: that the names of prompts begin with.
        questions: those that are taken.
    """
    rows = unique_tasks(list(kinds.items()), -(-count // len(kinds)), seed, questions)
    pairs = ((kind, *task) for row in rows for kind, task in zip(kinds, row, strict=True))
    prompts = [Prompt(f"{name}-{k}", q, {"task": kind, "answer": a}) for k, (kind, q, a) in enumerate(pairs)]
    return as_conversations(prompts, chat=True, system=SYSTEM)


def unique_tasks(
    kinds: Sequence[tuple[str, dict[str, Any]]], count: int, seed: int, questions: set[str]
) -> list[list[tuple[str, str]]]:
    """Return questions and answers of data sets of reasoning-gym, the kinds in turn: one of each, then the next.

    Args:
        kinds: names of data sets and their settings.
        count: tasks of each kind.
        seed: of the data sets.
        questions: those that are taken; the new ones are added.
    """
    prepare_verifiers()
    import reasoning_gym

    by_kind = []
    for kind, settings in kinds:
        entries = reasoning_gym.create_dataset(kind, size=20 * count, seed=seed, **settings)
        answers = {entry["question"].strip(): entry["answer"] for entry in entries}
        chosen = [(text, answer) for text, answer in answers.items() if text not in questions][:count]
        questions |= {text for text, _ in chosen}
        by_kind.append(chosen)
    return [list(row) for row in zip(*by_kind, strict=True)]


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_tasks() -> None:
    """Write the tasks, the kinds in turn; a question is in one file only."""
    questions: set[str] = set()
    for seed, (split, path) in enumerate(FILES.items()):
        rows = [
            (kind, *task)
            for tasks_of in unique_tasks(list(KINDS.items()), PER_KIND, seed, questions)
            for kind, task in zip(KINDS, tasks_of, strict=True)
        ]
        write_records(
            path,
            [
                {"id": f"{split}-{i:02}", "task": kind, "prompt": text, "answer": answer}
                for i, (kind, text, answer) in enumerate(rows)
            ],
        )


if __name__ == "__main__":
    write_tasks()
