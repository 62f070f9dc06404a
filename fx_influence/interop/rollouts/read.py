"""Rollouts from the files that trainers write, in a format that is detected from the file itself."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

from fx_influence.core.checks import check_choice, check_count, wrong_type
from fx_influence.interop.rollouts.jsonl import json_object
from fx_influence.interop.rollouts.native_format import read_native_rollouts
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.rollouts.retokenize import Retokenizer
from fx_influence.interop.rollouts.text_formats import read_trl, read_verl
from fx_influence.interop.rollouts.token_formats import read_nemo_rl, read_prime_rl

RolloutFormat = Literal["fx_influence", "prime_rl", "nemo_rl", "verl", "trl"]

JSON_FIELDS: dict[RolloutFormat, tuple[str, ...]] = {
    "fx_influence": ("prompt_ids", "completion_ids"),
    "prime_rl": ("schema_version", "token_ids", "loss_mask", "advantages", "inference_logprobs"),
    "nemo_rl": ("token_ids", "token_loss_mask", "advantages", "generation_logprobs", "input_lengths"),
    "verl": ("input", "output", "score", "step"),
}
"""Fields of a record by which its format is detected."""


def read_rollouts(
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    format: RolloutFormat | None = None,
    scale: bool = True,
    max_completion_length: int | None = None,
    reward_weights: Mapping[str, float] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Rollout]:
    """Read rollouts from a file of this library or of a trainer, in the order of the file.

    The formats are

    - ``"fx_influence"``: ``.jsonl`` as ``write_rollouts`` writes it; ``native_format`` lists its fields
    - ``"prime_rl"``: ``token_exports/step_<n>/rank_<r>.jsonl``, with ids, masks, log-probs and advantages
    - ``"nemo_rl"``: ``train_data_step<n>.jsonl``, with ids, masks, log-probs, rewards and advantages
    - ``"verl"``: ``<step>.jsonl`` of ``trainer.rollout_data_dir``, with texts and scores
    - ``"trl"``: ``completions/completions_<step>.parquet``, with texts, rewards and advantages

    Rollouts of verl and TRL are ``approximate``: their tokens are those of the texts, which may differ from those
    sampled, and verl's advantages are ``losses.group_advantages`` of the scores. Texts have lost their end-of-sequence
    token: the tokenizer's is put back, and the rollout is ``finished``, unless a boolean field ``truncated`` of the
    record says that it was cut off, or without such a field the completion has ``max_completion_length`` tokens or
    more. Tokens that a tool or the template wrote are False in ``completion_mask``. Prompts are numbered as they first
    appear; equal prompts are one unless the file tells them apart. Nothing in a file is executed.

    Args:
        path: a file, or a directory with the ``rank_*.jsonl`` of a step of prime-rl.
        tokenizer: the policy's, from transformers. Texts need it; for ids it tells which one ends a sequence and
            decodes them: without it texts are "" and no rollout is ``finished``.
        format: one of the names above; None detects it from the suffix and the fields.
        scale: whether advantages that are computed are scaled, see ``losses.group_advantages``.
        max_completion_length: the trainer's limit in tokens; None if unknown.
        reward_weights: weights by name of TRL's columns that add up to the reward.
        chat_template_kwargs: further arguments that TRL passed to the chat template, such as ``tools``.

    Returns:
        At least one rollout.

    Raises:
        FileNotFoundError: for a missing file.
        ImportError: for parquet without pyarrow.
        ValueError: for an unknown format or layout, texts without a tokenizer, a file without rollouts, ids that occur
            twice, and, naming every line or row, for records that are malformed or hold a number that is not finite
            where it counts: not in fields that are not read, in padding, at tokens that were not sampled, or in rewards
            beside a recorded advantage.

    Example:
        >>> import json, pathlib, tempfile
        >>> record = {
        ...     "schema_version": 1, "step": 7, "rank": 0, "export_sequence_idx": 0, "token_ids": [4, 9, 5, 1],
        ...     "loss_mask": [False, False, True, True], "advantages": [0.5, 0.5, 0.5, 0.5],
        ...     "inference_logprobs": [0.0, 0.0, -0.5, -0.25],
        ... }
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder) / "rank_0.jsonl"
        ...     _ = file.write_text(json.dumps(record))
        ...     (rollout,) = read_rollouts(file)
        >>> rollout.id, rollout.prompt_ids, rollout.completion_ids, rollout.advantage
        ('7/0/0', (4, 9), (5, 1), 0.5)

    Source: the readers, in ``token_formats`` and ``text_formats``, name the code that writes each format.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise wrong_type("path", path, "a path", "Give the file first and the tokenizer second")
    if tokenizer is not None and not hasattr(tokenizer, "decode"):
        remedy = "Load it first: AutoTokenizer.from_pretrained(...)"
        raise wrong_type("tokenizer", tokenizer, "the policy's tokenizer, from transformers", remedy)
    if format is not None:
        check_choice("format", format, get_args(RolloutFormat))
    if max_completion_length is not None:
        check_count("max_completion_length", max_completion_length, "pass the trainer's limit in tokens")
    files = _files(Path(path))
    kind = format or _detect_format(files[0])
    if kind == "fx_influence":
        rollouts = read_native_rollouts(path)
    elif kind == "prime_rl":
        rollouts = read_prime_rl(files, tokenizer)
    elif kind == "nemo_rl":
        rollouts = read_nemo_rl(files, tokenizer)
    else:
        retokenizer = Retokenizer(tokenizer, max_completion_length, chat_template_kwargs or {})
        if kind == "verl":
            rollouts = read_verl(files, retokenizer, scale)
        else:
            rollouts = read_trl(files[0], retokenizer, reward_weights)
    _require_unique(str(path), rollouts)
    return rollouts


def _files(path: Path) -> list[Path]:
    """Return the file, or the files of all ranks in a directory."""
    if path.is_file():
        return [path]
    # Shorter names first: rank 10 comes after rank 9.
    ranks = sorted(path.glob("rank_*.jsonl"), key=lambda file: (len(file.name), file.name))
    if not ranks:
        raise FileNotFoundError(
            f"rollouts file {str(path)!r} does not exist; expected a file, or a directory of rank_*.jsonl. Check "
            "the path"
        )
    return ranks


def _detect_format(file: Path) -> RolloutFormat:
    """Detect the format from the suffix and the fields of the first record."""
    if file.suffix == ".parquet":
        return "trl"
    if file.suffix != ".jsonl":
        raise ValueError(
            f"rollouts file {str(file)!r} ends in {file.suffix!r}; expected .jsonl or .parquet. Give its format "
            "with format="
        )
    names_in_file = _first_fields(file)
    for kind, names in JSON_FIELDS.items():
        # A file without any object goes to the native reader, which names each bad line.
        if names_in_file is None or names_in_file.issuperset(names):
            return kind
    expected = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in JSON_FIELDS.items())
    raise ValueError(
        f"rollouts file {str(file)!r} is of no known layout: its first record has {sorted(names_in_file or ())}; "
        f"expected at least, of {expected}"
    )


def _first_fields(file: Path) -> set[str] | None:
    """Return the field names of the first line that is an object; None if there is none."""
    with open(file, "rb") as lines:
        for line in lines:
            with suppress(ValueError, RecursionError):
                return set(json_object(line))
    return None


def _require_unique(path: str, rollouts: Sequence[Rollout]) -> None:
    """Raise ``ValueError`` for no rollouts or for ids that occur twice."""
    if not rollouts:
        raise ValueError(f"rollouts file {path!r} holds no rollout; expected at least one")
    twice = [name for name, count in Counter(rollout.id for rollout in rollouts).items() if count > 1]
    if twice:
        raise ValueError(
            f"rollouts file {path!r} gives {len(twice)} ids to more than one rollout: {', '.join(twice[:10])}; "
            "expected unique ids"
        )
