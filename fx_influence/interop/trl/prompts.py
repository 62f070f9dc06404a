"""The held-out prompts of a live training, from whatever they are given as."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

IMAGES = ("image", "images")
"""Columns of a data set that trl shows to the policy beside the prompt."""


class Prompts(NamedTuple):
    """Texts or conversations, and a sentence on which they are where that is not all that was given, else None."""

    prompts: list[Any]
    note: str | None


def read_prompts_of(trainer: Any, asked: Any, most: int) -> Prompts:
    """The prompts of E: ``asked``, or those of the trainer's ``eval_dataset`` where it is None.

    ``asked``: texts, conversations, or records with a ``prompt``, in any iterable; a data set with a column ``prompt``;
    or one text or one conversation. ``most``: how many are taken of a trainer's data set, evenly, and of a stream,
    whose first they are; it is never read any further.

    Raises ``ValueError`` for anything else, no prompts, and prompts with images.
    """
    given = trainer.eval_dataset if asked is None else asked
    if given is None:
        raise ValueError("eval_prompts is None and the trainer has no eval_dataset; give the held-out prompts of E")
    if isinstance(given, Mapping):
        raise ValueError(f"eval_dataset holds {sorted(given)}; pass one of them as eval_prompts")
    if isinstance(given, str) or _is_conversation(given):
        given = [given]
    if not isinstance(given, Iterable) and not hasattr(given, "__getitem__"):
        raise ValueError(f"eval_prompts is {given!r}; give texts, conversations or a data set with a column prompt")
    _check_columns(given)
    bound = most if asked is None or not _has_length(given) else None
    items, note = _some(given, bound)
    prompts = [item["prompt"] if isinstance(item, Mapping) and "prompt" in item else item for item in items]
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, (str, list)) or not prompt:
            raise ValueError(f"eval_prompts[{i}] is {prompt!r}; give a text or a conversation as a list of messages")
        if any(_shows_image(message) for message in prompt):
            raise ValueError(f"eval_prompts[{i}] shows an image, which influences do not see; give prompts of text")
    if not prompts:
        raise ValueError("eval_prompts is empty; give the held-out prompts of E")
    return Prompts(prompts, note)


def _is_conversation(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(isinstance(x, Mapping) and "role" in x for x in given)


def _has_length(given: Any) -> bool:
    try:
        len(given)
    except (TypeError, NotImplementedError):
        return False
    return True


def _check_columns(given: Any) -> None:
    columns = getattr(given, "column_names", None)
    if columns is None:
        return
    if "prompt" not in columns:
        raise ValueError(f"eval_prompts has the columns {columns}, not prompt; rename the one that is")
    for name in IMAGES:
        if name in columns:
            raise ValueError(
                f"eval_prompts has the column {name!r}, which influences do not see; give prompts of text, and train "
                "on text, to measure"
            )


def _some(given: Any, bound: int | None) -> tuple[list[Any], str | None]:
    if not _has_length(given):
        # One more tells whether there are more, without reading on.
        items = list(islice(_items(given), bound + 1 if bound is not None else None))
        more = bound is not None and len(items) > bound
        return items[:bound], f"E has the first {bound} prompts of a stream; max_prompts takes more" if more else None
    count = len(given)
    if bound is None or count <= bound:
        # A column alone, where there are columns: the others may be costly to read.
        return list(given["prompt"] if hasattr(given, "column_names") else _items(given)), None
    indices = [k * count // bound for k in range(bound)]
    items = [given[k] for k in indices]
    return items, f"E has {bound} of the {count} prompts of eval_dataset, chosen evenly; max_prompts takes more"


def _items(given: Any) -> Iterator[Any]:
    return iter(given) if isinstance(given, Iterable) else (given[k] for k in range(len(given)))


def _shows_image(message: Any) -> bool:
    content = message.get("content") if isinstance(message, Mapping) else None
    return isinstance(content, list) and any(
        isinstance(part, Mapping) and part.get("type") == "image" for part in content
    )
