"""Rollouts read from the files that trainers write, the format found out from the file itself."""

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
"""The fields of a record that tell its format."""


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
    """Rollouts from a file of this library or of a trainer, in the order of the file. By ``format``:

    - ``"fx_influence"``: ``.jsonl`` as ``rollouts.write_rollouts`` writes it; ``rollouts.read_rollouts`` has its fields
    - ``"prime_rl"``: ``token_exports/step_<n>/rank_<r>.jsonl``, with ids, masks, log-probs and advantages
    - ``"nemo_rl"``: ``train_data_step<n>.jsonl``, with ids, masks, log-probs, rewards and advantages
    - ``"verl"``: ``<step>.jsonl`` of ``trainer.rollout_data_dir``, with texts and scores
    - ``"trl"``: ``completions/completions_<step>.parquet``, with texts, rewards and advantages

    Rollouts of verl and TRL are ``approximate``: their tokens are those of the texts, not surely those sampled, and
    verl's advantages are ``losses.group_advantages`` of the scores. Texts have lost their end-of-sequence token: the
    tokenizer's is put back, and the rollout ``finished``, unless a boolean field ``truncated`` of the record says that
    it was cut off, or without such a field the completion is ``max_completion_length`` tokens or longer. Tokens that a
    tool or the template wrote are False in ``completion_mask``. Prompts are numbered as they first appear, equal
    prompts being one unless the file tells them apart.

    ``path``: a file, or a directory with the ``rank_*.jsonl`` of a step of prime-rl. ``tokenizer``: the policy's, from
    transformers; needed for texts, and for ids that which ends a sequence and gives the texts; without it they are ""
    and no rollout is ``finished``. ``format``: None finds it out from the suffix and the fields. ``scale``: of
    ``losses.group_advantages``. ``reward_weights``: the columns of TRL that add up to the reward, by name.
    ``chat_template_kwargs``: what else TRL gave to the chat template, such as ``tools``.

    Raises ``FileNotFoundError`` for a missing file; ``ImportError`` for parquet without pyarrow; ``ValueError`` for an
    unknown format or layout, texts without a tokenizer, a file without rollouts, ids that occur twice, and, naming
    every line or row, for records that are malformed or hold a number that is not finite where it counts: not in fields
    that are not read, in padding, at tokens that were not sampled, or in rewards beside a recorded advantage. Nothing
    in a file is executed.
    Source: the readers, in ``rollout_tokens`` and ``rollout_text``, name the code that writes each format.

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
    """
    if not isinstance(path, (str, os.PathLike)):
        raise wrong_type("path", path, "a path", "Give the file first and the tokenizer second")
    if tokenizer is not None and not hasattr(tokenizer, "decode"):
        remedy = "Load it first: AutoTokenizer.from_pretrained(...)"
        raise wrong_type("tokenizer", tokenizer, "the policy's tokenizer, from transformers", remedy)
    if format is not None:
        check_choice("format", format, get_args(RolloutFormat))
    if max_completion_length is not None:
        check_count("max_completion_length", max_completion_length, "pass the trainer's limit in tokens, at least 1")
    files = _files(Path(path))
    kind = format or _detected(files[0])
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
    if path.is_file():
        return [path]
    # Shorter names first: rank 10 comes after rank 9.
    ranks = sorted(path.glob("rank_*.jsonl"), key=lambda file: (len(file.name), file.name))
    if not ranks:
        raise FileNotFoundError(
            f"rollouts file {str(path)!r} does not exist, nor is it a directory of rank_*.jsonl; check the path"
        )
    return ranks


def _detected(file: Path) -> RolloutFormat:
    if file.suffix == ".parquet":
        return "trl"
    if file.suffix != ".jsonl":
        raise ValueError(f"rollouts file {str(file)!r} is no .jsonl and no .parquet; say what it is with format=")
    found = _first_fields(file)
    for kind, names in JSON_FIELDS.items():
        # Without any object it is as good as ours, whose reader names each bad line.
        if found is None or found.issuperset(names):
            return kind
    expected = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in JSON_FIELDS.items())
    raise ValueError(
        f"rollouts file {str(file)!r} is of no known layout: its first record has {sorted(found or ())}; "
        f"expected at least, of {expected}"
    )


def _first_fields(file: Path) -> set[str] | None:
    with open(file, "rb") as lines:
        for line in lines:
            with suppress(ValueError, RecursionError):
                return set(json_object(line))
    return None


def _require_unique(path: str, rollouts: Sequence[Rollout]) -> None:
    if not rollouts:
        raise ValueError(f"rollouts file {path!r} holds no rollout; give one that does")
    twice = [name for name, count in Counter(rollout.id for rollout in rollouts).items() if count > 1]
    if twice:
        raise ValueError(
            f"rollouts file {path!r} gives {len(twice)} ids to more than one rollout: {', '.join(twice[:10])}; "
            "ids must be unique"
        )
