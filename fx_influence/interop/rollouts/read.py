"""Rollouts from the files that trainers write, in a format that is detected from the file itself."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

from fx_influence.core.checks import check_choice, check_count, wrong_type
from fx_influence.interop.rollouts.files import SUFFIXES, lines, rollout_files, suffix
from fx_influence.interop.rollouts.formats.decoded import read_areal, read_skyrl
from fx_influence.interop.rollouts.formats.messages import read_rllm, read_verifiers
from fx_influence.interop.rollouts.formats.open_instruct import read_open_instruct
from fx_influence.interop.rollouts.formats.slime import read_slime
from fx_influence.interop.rollouts.formats.tables import read_roll, read_swift
from fx_influence.interop.rollouts.formats.text_formats import read_trl, read_verl
from fx_influence.interop.rollouts.formats.token_formats import read_nemo_rl, read_prime_rl
from fx_influence.interop.rollouts.formats.traces import read_traces
from fx_influence.interop.rollouts.given_prompts import GivenPrompts
from fx_influence.interop.rollouts.jsonl import json_object
from fx_influence.interop.rollouts.native_format import read_native_rollouts
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.rollouts.retokenize import Retokenizer

RolloutFormat = Literal[
    "fx_influence",
    "prime_rl",
    "prime_rl_traces",
    "nemo_rl",
    "open_instruct",
    "slime",
    "verl",
    "areal",
    "skyrl",
    "verifiers",
    "ms_swift",
    "roll",
    "rllm",
    "trl",
]

JSON_FIELDS: dict[RolloutFormat, tuple[str, ...]] = {
    "fx_influence": ("prompt_ids", "completion_ids"),
    "prime_rl": ("schema_version", "token_ids", "loss_mask", "advantages", "inference_logprobs"),
    "nemo_rl": ("token_ids", "token_loss_mask", "advantages", "generation_logprobs", "input_lengths"),
    "open_instruct": ("prompt_tokens", "response_tokens", "finish_reason", "prompt_idx"),
    "verl": ("input", "output", "score", "step"),
    "areal": ("task_id", "sample_idx", "prompt_len", "prompt", "completion"),
    "skyrl": ("input_prompt", "output_response", "score"),
    "verifiers": ("example_id", "prompt", "completion", "reward"),
    "ms_swift": ("step", "prompt", "completion", "advantages"),
    "roll": ("responses", "scores"),
    "rllm": ("episode_id", "task_hash", "trajectories"),
}
"""Fields of a record by which its format is detected."""

TRACE_FIELDS = ("traces", "nodes")
"""Fields of which a trace, or an episode of traces, has one."""

_SUFFIX_FORMATS: dict[str, RolloutFormat] = {".parquet": "trl", ".pt": "slime"}

Reader = Callable[..., list[Rollout]]

_WITH_TOKENS: dict[str, Reader] = {
    "fx_influence": lambda files, _: read_native_rollouts(*files),
    "prime_rl": read_prime_rl,
    "prime_rl_traces": read_traces,
    "nemo_rl": read_nemo_rl,
    "open_instruct": read_open_instruct,
}
_WITH_REWARDS: dict[str, Reader] = {
    "areal": read_areal,
    "skyrl": read_skyrl,
    "verifiers": read_verifiers,
    "roll": read_roll,
    "rllm": read_rllm,
}
_WITH_ADVANTAGES: dict[str, Reader] = {"trl": read_trl, "ms_swift": read_swift}
"""Readers by format: of token ids, of texts with rewards, of texts with advantages."""


def read_rollouts(
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    format: RolloutFormat | None = None,
    scale: bool = True,
    max_completion_length: int | None = None,
    reward_weights: Mapping[str, float] | None = None,
    prompts: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Rollout]:
    """Read rollouts from files of this library or of a trainer, in the order of the files.

    The formats are

    - ``"fx_influence"``: ``.jsonl`` as ``write_rollouts`` writes it; ``native_format`` lists its fields
    - with token ids: ``"prime_rl"`` (``token_exports/step_<n>/rank_<r>.jsonl``), ``"prime_rl_traces"``
      (``rollouts/step_<n>/.../traces.jsonl``, also of verifiers), ``"nemo_rl"`` (``train_data_step<n>.jsonl``),
      ``"open_instruct"`` (``<run>_rollouts_<shard>.jsonl``), ``"slime"`` (``<rollout_id>.pt``)
    - with texts: ``"verl"`` (``<step>.jsonl`` of ``trainer.rollout_data_dir``), ``"trl"``
      (``completions/completions_<step>.parquet``), ``"ms_swift"`` (``completions.jsonl``), ``"verifiers"``
      (``results.jsonl``), ``"areal"`` (``rollout/<version>/<task>.jsonl``), ``"skyrl"`` (``dumped_evals``), ``"roll"``
      (``rollout_dump_data.step_<n>.jsonl``), ``"rllm"`` (``episodes/.../episode_*.json``)

    Files of lines may be compressed, ``.gz`` or ``.zst`` (with the package zstandard). Rollouts of texts are
    ``approximate``: their tokens are those of the texts, which may differ from those sampled; a completion whose tokens
    do not give the text back is refused. Where only rewards were recorded, advantages are ``losses.group_advantages``
    of them. Texts without special tokens have lost their end of sequence: the tokenizer's is put back, and the rollout
    is ``finished``, unless the record says that it was cut off, or, where it says nothing, the completion has
    ``max_completion_length`` tokens or more. Tokens that a tool or the template wrote are False in ``completion_mask``.
    Prompts are numbered as they first appear; equal prompts are one unless the file tells them apart. Nothing in a file
    is executed.

    Args:
        path: a file, or a directory of files of one format, which are read in the order of the numbers in their names.
        tokenizer: the policy's, from transformers. Texts need it; for ids it tells which one ends a sequence and
            decodes them: without it texts are "" and no rollout is ``finished``.
        format: one of the names above; None detects it from the suffix and the fields.
        scale: whether advantages that are computed are scaled, see ``losses.group_advantages``.
        max_completion_length: the trainer's limit in tokens; None if unknown.
        reward_weights: weights by name of the columns (TRL, ms-swift) or keys (slime) that add up to the reward.
        prompts: of the training that verl recorded, as texts, lists of messages, or rows of its data set: the tokens of
            prompts are then exact, and turns of tools are masked.
        chat_template_kwargs: further arguments that the trainer passed to the chat template, such as ``tools``.

    Returns:
        At least one rollout.

    Raises:
        FileNotFoundError: for a missing file.
        ImportError: for parquet without pyarrow, and ``.zst`` without zstandard.
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

    Source: the readers, in ``formats/``, name the code that writes each format.
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
    if prompts is not None and isinstance(prompts, (str, Mapping)):
        raise wrong_type("prompts", prompts, "a list of prompts", "Pass [prompt], or the rows of the data set")
    files = rollout_files(Path(path))
    kinds = {format} if format is not None else {_detect_format(file) for file in files}
    if len(kinds) > 1:
        raise ValueError(
            f"rollouts directory {str(path)!r} has files of the formats {', '.join(sorted(kinds))}; expected one. Pass "
            "the files one by one, or give the format with format="
        )
    (kind,) = kinds
    if prompts is not None and kind != "verl":
        raise ValueError(f"prompts is given for {kind}; expected None, since only verl's files lack them. Leave it out")
    if kind in _WITH_TOKENS:
        rollouts = _WITH_TOKENS[kind](files, tokenizer)
    elif kind == "slime":
        rollouts = read_slime(files, tokenizer, scale, reward_weights)
    else:
        retokenizer = Retokenizer(tokenizer, max_completion_length, chat_template_kwargs or {})
        if kind == "verl":
            given = None if prompts is None else GivenPrompts(list(prompts), retokenizer)
            rollouts = read_verl(files, retokenizer, scale, given)
        elif kind in _WITH_REWARDS:
            rollouts = _WITH_REWARDS[kind](files, retokenizer, scale)
        else:
            rollouts = _WITH_ADVANTAGES[kind](files, retokenizer, reward_weights)
    _require_unique(str(path), rollouts)
    return rollouts


def _detect_format(file: Path) -> RolloutFormat:
    """Detect the format from the suffix and the fields of the first record."""
    if suffix(file) in _SUFFIX_FORMATS:
        return _SUFFIX_FORMATS[suffix(file)]
    if suffix(file) not in SUFFIXES:
        raise ValueError(
            f"rollouts file {str(file)!r} ends in {file.suffix!r}; expected .jsonl, .json, .parquet or .pt. Give its "
            "format with format="
        )
    names_in_file = _first_fields(file)
    if names_in_file is not None and any(name in names_in_file for name in TRACE_FIELDS):
        return "prime_rl_traces"
    for kind, names in JSON_FIELDS.items():
        # A file without any object goes to the native reader, which names each bad line.
        if names_in_file is None or names_in_file.issuperset(names):
            return kind
    expected = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in JSON_FIELDS.items())
    raise ValueError(
        f"rollouts file {str(file)!r} is of no known layout: its first record has {sorted(names_in_file or ())}; "
        f"expected at least, of {expected}; prime_rl_traces: traces or nodes"
    )


def _first_fields(file: Path) -> set[str] | None:
    """Return the field names of the first line that is an object; None if there is none."""
    if suffix(file) == ".json":
        with suppress(ValueError, RecursionError):
            return set(json_object(b"".join(lines(file))))
        return None
    for line in lines(file):
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
