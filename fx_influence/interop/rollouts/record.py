"""Rollouts as records: what was asked, what was sampled and how it was judged, in memory, as a batch and as a file."""

from __future__ import annotations

import dataclasses
import json
import os
import reprlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fx_influence.core.checks import check_count, wrong_type
from fx_influence.core.display import record_line
from fx_influence.interop.rollouts.jsonl import NotFinite, read_json_lines, refuse_not_finite
from fx_influence.types import Batch


@dataclass(frozen=True, repr=False)
class Rollout:
    """One prompt with one sampled completion.

    ``id``: unique among the rollouts it is stored with. ``prompt_id``, ``group``: the prompt, by name and by number.
    ``prompt``, ``completion``: texts, the completion without special tokens.
    ``prompt_ids``, ``completion_ids``: the tokens that the policy saw and sampled, a sampled end of sequence included.
    ``finished``: the completion ended by an end-of-sequence token rather than by the length limit.
    ``behaviour_logprobs``: log pi of each completion token under the policy that sampled it, at its temperature; None
    where nobody recorded them. ``reward``, ``advantage``: ``None`` until judged.
    ``completion_mask``: False at tokens that the policy did not sample, such as a tool's output; None: all count.
    ``coefficients``, ``entropy_coefficients``: c and b of each completion token, as a trainer's own loss gave them;
    None: they follow from the advantage. ``approximate``: tokens or advantage were recomputed, not recorded.
    ``question``: of a conversation what its last user message asks, which is what people are shown; None for a text.

    Raises ``ValueError`` if a value that is given for each token and ``completion_ids`` differ in length.

    Example:
        >>> Rollout("0/0", "0", 0, "1+1=", "2", (4, 9, 4, 10), (5, 1), True, (-0.5, -0.25)).finished
        True
    """

    id: str
    prompt_id: str
    group: int
    prompt: str
    completion: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    finished: bool
    behaviour_logprobs: tuple[float, ...] | None = None
    reward: float | None = None
    advantage: float | None = None
    completion_mask: tuple[bool, ...] | None = None
    coefficients: tuple[float, ...] | None = None
    entropy_coefficients: tuple[float, ...] | None = None
    approximate: bool = False
    question: str | None = None

    @property
    def asked(self) -> str:
        """Return what people are shown as the prompt: the question of a conversation, or else the text itself."""
        return self.question or self.prompt

    def __post_init__(self) -> None:
        for name in PER_TOKEN:
            values = getattr(self, name)
            if values is not None and len(values) != len(self.completion_ids):
                raise ValueError(
                    f"{name} of rollout {self.id!r} has {len(values)} values for {len(self.completion_ids)} completion "
                    "tokens; give one for each token"
                )

    def __repr__(self) -> str:
        return record_line(self, {f.name: f.default for f in dataclasses.fields(self)})


PER_TOKEN = ("behaviour_logprobs", "completion_mask", "coefficients", "entropy_coefficients")
"""Fields with a value for each completion token, or None."""


def collate(rollouts: Sequence[Rollout], pad_id: int, device: str | torch.device = "cpu") -> Batch:
    """Rollouts as one right-padded batch on ``device``, with coefficients where every rollout has its own.

    The masks come from the lengths, so a ``pad_id`` that is also the end of sequence does no harm. Returns a ``Batch``
    of ``input_ids``, ``attention_mask``, ``completion_mask`` (n, T) with T the longest rollout, ``group`` (n,), and
    ``coefficients``, ``entropy_coefficients`` (n, T), float64, or None.
    Raises ``ValueError`` for no rollouts, or for one without a prompt token: nothing would score its first token.

    Example:
        >>> batch = collate([Rollout("0/0", "0", 0, "a", "b", (7,), (8, 1), True, (-0.5, -0.25))], pad_id=1)
        >>> batch.input_ids.tolist(), batch.completion_mask.tolist()
        ([[7, 8, 1]], [[False, True, True]])
    """
    if isinstance(rollouts, Rollout):
        raise wrong_type("rollouts", rollouts, "a list of them", "Pass [rollout]")
    for k, rollout in enumerate(rollouts):
        if not isinstance(rollout, Rollout):
            remedy = "Make one by fx.Rollout(...), or read them from a file by fx.read_rollouts(path)"
            raise wrong_type(f"rollouts[{k}]", rollout, "a fx.Rollout", remedy)
    check_count("pad_id", pad_id, "pass any token's id, such as 0: what pads is masked", least=0)
    if not rollouts:
        raise ValueError("rollouts is empty; a batch needs at least one rollout")
    for rollout in rollouts:
        if not rollout.prompt_ids:
            raise ValueError(
                f"prompt_ids of rollout {rollout.id!r} is empty; give at least one token (such as bos), "
                "which scores the first sampled one"
            )
    prompt = torch.tensor([len(r.prompt_ids) for r in rollouts]).unsqueeze(1)
    total = prompt + torch.tensor([len(r.completion_ids) for r in rollouts]).unsqueeze(1)
    input_ids = torch.full((len(rollouts), int(total.max())), pad_id, dtype=torch.int64)
    for row, rollout in zip(input_ids, rollouts, strict=True):
        tokens = torch.tensor(rollout.prompt_ids + rollout.completion_ids)
        row[: len(tokens)] = tokens
    position = torch.arange(input_ids.shape[1])
    completion_mask = (position >= prompt) & (position < total)
    batch = Batch(
        input_ids=input_ids,
        attention_mask=position < total,
        completion_mask=completion_mask.clone(),
        group=torch.tensor([r.group for r in rollouts]),
    )
    for row, rollout in zip(batch.completion_mask, rollouts, strict=True):
        if rollout.completion_mask is not None:
            row[row.clone()] = torch.tensor(rollout.completion_mask)
    weights = {
        name: torch.zeros(completion_mask.shape, dtype=torch.float64).masked_scatter(
            completion_mask, torch.tensor([x for r in rollouts for x in getattr(r, name)], dtype=torch.float64)
        )
        for name in ("coefficients", "entropy_coefficients")
        if all(getattr(r, name) is not None for r in rollouts)
    }
    batch = batch._replace(**weights)
    return Batch._make(None if field is None else field.to(device) for field in batch)


def grouped(rollouts: Iterable[tuple[Rollout, Hashable]]) -> list[Rollout]:
    """Rollouts, each given with what tells its prompt from others, with the prompts numbered as they first appear."""
    numbers: dict[Hashable, int] = {}
    groups = [(rollout, numbers.setdefault(prompt, len(numbers))) for rollout, prompt in rollouts]
    return [dataclasses.replace(rollout, prompt_id=str(group), group=group) for rollout, group in groups]


def write_rollouts(path: str | os.PathLike[str], rollouts: Iterable[Rollout]) -> None:
    """Write one JSON object a line; every value, floats to the last bit, is what ``read_rollouts`` gives back.

    The file appears whole or not at all. Raises ``ValueError`` for a number that JSON cannot hold (NaN, infinity),
    naming the rollout.
    """
    target, text = Path(path), rollout_lines(rollouts)
    # Not the tempfile module: its files are private to their owner and would stay so.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def rollout_lines(rollouts: Iterable[Rollout]) -> str:
    """The text that ``write_rollouts`` writes."""
    return "".join(_to_line(rollout) for rollout in rollouts)


def read_rollouts(path: str | os.PathLike[str]) -> list[Rollout]:
    """Rollouts as ``write_rollouts`` wrote them, UTF-8, one JSON object a line; blank lines are skipped.

    Fields of other names are ignored. Those of a rollout, with their JSON types:

    - ``id``, ``prompt_id``, ``prompt``, ``completion``: string
    - ``group``: integer
    - ``prompt_ids``, ``completion_ids``: array of integers
    - ``finished``: boolean
    - ``behaviour_logprobs``, ``coefficients``, ``entropy_coefficients``: array of numbers, one for each id in
      ``completion_ids``, or null; may be left out
    - ``completion_mask``: array of booleans, one for each id in ``completion_ids``, or null; may be left out
    - ``reward``, ``advantage``: number or null; may be left out
    - ``approximate``: boolean; may be left out, which is false
    - ``question``: string or null; may be left out

    Raises ``FileNotFoundError`` for a missing file and ``ValueError`` naming every line that is not a rollout: no JSON,
    a field missing or of another type, a number that is not finite. One that does not count is read: at a token where
    ``completion_mask`` is false it is 0, and a reward beside an advantage is null.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"rollouts file {str(path)!r} does not exist; check the path")
    return read_json_lines([Path(path)], _from_record)


def _to_line(rollout: Rollout) -> str:
    try:
        return json.dumps(_record(rollout), allow_nan=False) + "\n"
    except ValueError as error:
        raise ValueError(f"rollout {rollout.id!r} holds a number that is not finite; repair it first") from error


def _record(rollout: Rollout) -> dict[str, Any]:
    """The fields that say something: what is absent has its default when it is read."""
    fields = dataclasses.fields(Rollout)
    return {f.name: value for f in fields if (value := getattr(rollout, f.name)) != f.default}


def _from_record(_: int, record: dict[str, Any]) -> Rollout:
    values: dict[str, Any] = {}
    record = _counted(record)
    for field in dataclasses.fields(Rollout):
        if field.name in record:
            values[field.name] = _checked(field.name, record[field.name])
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"no field {field.name!r} among {sorted(record)}; a rollout needs it")
    return Rollout(**values)


def _counted(record: dict[str, Any]) -> dict[str, Any]:
    """The record with 0 for what is not finite at tokens that were not sampled, and no such reward by an advantage."""
    mask, out = record.get("completion_mask"), dict(record)
    if isinstance(mask, list):
        for name in PER_TOKEN:
            if isinstance(values := record.get(name), list) and len(values) == len(mask):
                pairs = zip(values, mask, strict=True)
                out[name] = [0.0 if isinstance(x, NotFinite) and m is False else x for x, m in pairs]
    if isinstance(record.get("reward"), NotFinite) and type(record.get("advantage")) in (int, float):
        out["reward"] = None
    return out


def _checked(name: str, value: object) -> object:
    for item in value if isinstance(value, list) else [value]:
        refuse_not_finite(name, item)
    if name in ("prompt_ids", "completion_ids"):
        valid = isinstance(value, list) and all(type(item) is int for item in value)
    elif name in PER_TOKEN:
        kinds = (bool,) if name == "completion_mask" else (int, float)
        valid = value is None or (isinstance(value, list) and all(type(item) in kinds for item in value))
    elif name in ("reward", "advantage"):
        valid = value is None or type(value) in (int, float)
    elif name == "question":
        valid = value is None or type(value) is str
    else:
        valid = type(value) is {"group": int, "finished": bool, "approximate": bool}.get(name, str)
    if not valid:
        raise ValueError(f"field {name!r} is {reprlib.repr(value)}; that is not the type that write_rollouts gives it")
    return tuple(value) if isinstance(value, list) else value
