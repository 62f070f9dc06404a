"""Rollout files of trainers that record token ids, so that nothing is guessed: prime-rl and NeMo-RL."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fx_influence.interop.rollouts.jsonl import field, fields, read_json_lines
from fx_influence.interop.rollouts.record import Rollout, number_prompts, require_token_ids, source_of

NUMBER = (int, float)
NULLABLE = (int, float, type(None))
FLAG = (bool, int, float)


@dataclass(frozen=True)
class TokenRecord:
    """A sequence as a trainer recorded it: one value per token of prompt and completion.

    ``advantages`` and ``rewards`` may be None.
    """

    tokens: list[int]
    sampled: list[bool]
    logprobs: list[float | None]
    advantages: list[float | None] | None
    rewards: list[float | None] | None


def read_prime_rl(files: Sequence[Path], tokenizer: Any = None) -> list[Rollout]:
    """Read rollouts of prime-rl's exports, ``token_exports/step_<n>/rank_<r>.jsonl`` (``enable_token_export = true``).

    A record is one trained sequence, its lists aligned with ``token_ids``: ``loss_mask``, ``advantages``,
    ``inference_logprobs`` and, in some versions, ``rewards`` and the weights of the loss's components, ``rl_weights``,
    ``ce_weights`` and ``ref_kl_weights``. The prompt ends at the first token that ``loss_mask`` counts. A token that
    the trainer's trust region left out (``is_masked``) counts as any other: the advantage is recorded, not the loss.
    ``env_name`` is the rollout's ``source``.

    Raises:
        ValueError: by line, for another schema version, a sequence that another loss than the policy gradient trained
            too, and advantages that differ between tokens.

    Source: PrimeIntellect-ai/prime-rl, src/prime_rl/trainer/rl/token_export.py, ``SCHEMA_VERSION`` 1: commit d2f82fa,
    the first, to those with the weights that skills/configs/SKILL.md lists at 04821ca. Since pull request 3444 prime-rl
    writes traces instead, another format, which this does not read.
    """

    def parse(_: int, record: dict[str, Any]) -> tuple[Rollout, tuple[int, ...]]:
        if record.get("schema_version") != 1:
            raise ValueError(
                f"field 'schema_version' is {record.get('schema_version')!r}; expected 1, the only known version"
            )
        _require_policy_gradient(record)
        step = "export_step" if "export_step" in record else "step"
        sampled = fields(record, "loss_mask", (bool,), "booleans")
        name = "/".join(str(field(record, n, (int,), "an integer")) for n in (step, "rank", "export_sequence_idx"))
        recorded = TokenRecord(
            tokens=fields(record, "token_ids", (int,), "integers"),
            sampled=sampled,
            logprobs=fields(record, "inference_logprobs", NULLABLE, "numbers", sampled),
            advantages=_weighted_advantages(record, sampled),
            # Rewards are not used, because the advantage is recorded.
            rewards=fields(record, "rewards", NULLABLE, "numbers", ()) if "rewards" in record else None,
        )
        rollout, prompt = recorded_rollout(name, recorded, tokenizer)
        return dataclasses.replace(rollout, source=source_of({"environment": record.get("env_name")})), prompt

    return number_prompts(read_json_lines(files, parse))


def read_nemo_rl(files: Sequence[Path], tokenizer: Any = None) -> list[Rollout]:
    """Read rollouts of NeMo-RL's ``train_data_step<n>.jsonl`` in its log directory.

    A record is one sample, each field in a list of one: ``token_ids``, ``token_loss_mask``, ``advantages`` and
    ``generation_logprobs`` over the padded sequence, ``input_lengths`` the length without padding, ``rewards`` (with
    dynamic sampling ``filtered_rewards``, which alone follow the order of the other fields) and ``sample_loss_mask``;
    only ``idx`` is in no list. The prompt ends at the first token that ``token_loss_mask`` counts. In a sample that
    ``sample_loss_mask`` leaves out of the loss no token counts.

    Raises:
        ValueError: by line, for a record without token ids (older versions log none, nor do runs with
            ``should_log_nemo_gym_responses``) and for advantages that differ between tokens.

    Source: NVIDIA-NeMo/RL, nemo_rl/algorithms/grpo.py at commit 002cdc2 (``log_data``) and nemo_rl/utils/logger.py at
    0275e75 (``log_batched_dict_as_jsonl``).
    """

    def parse(_: int, record: dict[str, Any]) -> tuple[Rollout, tuple[int, ...]]:
        length = cast(int, _only(record, "input_lengths", (int,), "integers"))
        mask = _padded(record, "token_loss_mask", FLAG, "0 or 1", length)
        sampled = [_flag("token_loss_mask", value) for value in mask]
        # Rewards are not used, because the advantage is recorded.
        reward = _only(record, "filtered_rewards" if "filtered_rewards" in record else "rewards", NUMBER, "numbers", ())
        recorded = TokenRecord(
            tokens=_padded(record, "token_ids", (int,), "integers", length),
            sampled=sampled,
            logprobs=_padded(record, "generation_logprobs", NUMBER, "numbers", length, sampled),
            advantages=_padded(record, "advantages", NUMBER, "numbers", length, sampled),
            rewards=[reward] * length,
        )
        counts = _flag("sample_loss_mask", _only(record, "sample_loss_mask", FLAG, "0 or 1"))
        return recorded_rollout(str(field(record, "idx", (int,), "an integer")), recorded, tokenizer, counts)

    return number_prompts(read_json_lines(files, parse))


def recorded_rollout(
    name: str, recorded: TokenRecord, tokenizer: Any, counts: bool = True
) -> tuple[Rollout, tuple[int, ...]]:
    """Return a rollout and its prompt.

    Args:
        name: id of the rollout.
        recorded: its tokens and their values.
        tokenizer: the policy's; None leaves texts empty.
        counts: whether the trainer used it in its loss.
    """
    tokens = recorded.tokens
    sampled_indices = _sampled_indices(recorded)
    start = sampled_indices[0] if sampled_indices else len(tokens)
    mask = tuple(sampled and counts for sampled in recorded.sampled[start:])
    prompt_ids, completion_ids = tuple(tokens[:start]), tuple(tokens[start:])
    rollout = Rollout(
        id=name,
        prompt_id="",
        group=0,
        prompt=decode(tokenizer, prompt_ids, skip_special_tokens=False),
        completion=decode(tokenizer, completion_ids, skip_special_tokens=True),
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        finished=tokenizer is not None
        and bool(sampled_indices)
        and tokens[sampled_indices[-1]] == tokenizer.eos_token_id,
        behaviour_logprobs=tuple(float(value or 0.0) for value in recorded.logprobs[start:]),
        reward=None if recorded.rewards is None else _shared("rewards", recorded.rewards, sampled_indices),
        advantage=None if recorded.advantages is None else _shared("advantages", recorded.advantages, sampled_indices),
        completion_mask=None if all(mask) else mask,
    )
    return rollout, prompt_ids


def _sampled_indices(recorded: TokenRecord) -> list[int]:
    """Return the indices of the tokens that the policy sampled, after checking that the lists fit together."""
    for name in ("sampled", "logprobs", "advantages", "rewards"):
        values = getattr(recorded, name)
        if values is not None and len(values) != len(recorded.tokens):
            raise ValueError(f"{name} has {len(values)} values; expected {len(recorded.tokens)}, one for each token id")
    require_token_ids("the sequence", recorded.tokens)
    sampled_indices = [i for i, sampled in enumerate(recorded.sampled) if sampled]
    for name, values in (("log-prob", recorded.logprobs), ("advantage", recorded.advantages)):
        if values is not None and any(values[i] is None for i in sampled_indices):
            raise ValueError(
                f"the {name} of a sampled token is null, as one that was not finite; expected a number. Drop this "
                "record"
            )
    return sampled_indices


def token_ids(record: dict[str, Any], name: str) -> tuple[int, ...]:
    """Return the token ids of a field; raise ``ValueError`` for anything else."""
    ids = fields(record, name, (int,), "integers")
    require_token_ids(f"field {name!r}", ids)
    return tuple(ids)


def optional_numbers(record: dict[str, Any], name: str) -> tuple[float, ...] | None:
    """Return the numbers of a field, None where it is absent or null; raise ``ValueError`` for anything else."""
    return None if record.get(name) is None else tuple(map(float, fields(record, name, NUMBER, "numbers")))


def decode(tokenizer: Any, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    """Return the text of token ids.

    Args:
        tokenizer: the policy's; None gives an empty text.
        ids: token ids.
        skip_special_tokens: whether special tokens are left out of the text.
    """
    if tokenizer is None:
        return ""
    text = tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    return cast(str, text)


def _shared(name: str, values: list[float | None], sampled_indices: list[int]) -> float | None:
    """Return the one value that all sampled tokens have; raise ``ValueError`` if they differ."""
    distinct = {values[t] for t in sampled_indices} if sampled_indices else set(values)
    if len(distinct) > 1:
        raise ValueError(
            f"field {name!r} differs between the sampled tokens ({reprlib.repr(sorted(distinct, key=str))}); "
            "expected one, as a rollout has. Write these rollouts in fx_influence's own format, with the "
            "coefficients of each token"
        )
    value = next(iter(distinct), None)
    return None if value is None else float(value)


def _require_policy_gradient(record: dict[str, Any]) -> None:
    """Raise ``ValueError`` if the sequence was also trained by another loss than the policy gradient."""
    mode = record.get("training_mode", "rl")
    others = [n for n in ("ce_weights", "ref_kl_weights") if any(fields({n: [], **record}, n, NULLABLE, "numbers"))]
    if mode != "rl" or others:
        raise ValueError(
            f"field {others[0] if others else 'training_mode'!r} says that another loss trained this sequence too; "
            "expected the policy gradient alone, which an advantage expresses. Drop this record"
        )


def _weighted_advantages(record: dict[str, Any], sampled: Sequence[bool]) -> list[float | None]:
    """Return the advantages times the weights of the policy gradient."""
    advantages = fields(record, "advantages", NULLABLE, "numbers", sampled)
    # The exporter writes null for a missing stream, which stands for the weight 1.
    weights = fields({"rl_weights": [None] * len(advantages), **record}, "rl_weights", NULLABLE, "numbers", sampled)
    if len(weights) != len(advantages):
        raise ValueError(f"rl_weights has {len(weights)} values; expected {len(advantages)}, one for each advantage")
    return [a if w is None or a is None else a * w for a, w in zip(advantages, weights, strict=True)]


def _only(
    record: dict[str, Any], name: str, kinds: tuple[type, ...], what: str, counts: Sequence[bool] | None = None
) -> Any:
    """Return the value of a field that NeMo-RL wrote as a batch of one; ``counts``: see ``fields``."""
    values = fields(record, name, kinds, what, counts)
    if len(values) != 1:
        raise ValueError(f"field {name!r} holds {len(values)} values; expected a list of one, as NeMo-RL writes it")
    return values[0]


def _padded(
    record: dict[str, Any],
    name: str,
    kinds: tuple[type, ...],
    what: str,
    length: int,
    counts: Sequence[bool] | None = None,
) -> list[Any]:
    """Return the values of a sequence without its padding, whatever that contains; ``counts``: see ``fields``."""
    values = _only(record, name, (list,), f"a list of {what}")
    if not 0 <= length <= len(values):
        raise ValueError(
            f"field {name!r} has {len(values)} values; expected at least {length}, as field 'input_lengths' says"
        )
    return fields({name: values[:length]}, name, kinds, what, counts)


def _flag(name: str, value: float) -> bool:
    """Return a 0 or 1 as a bool."""
    if value not in (0, 1):
        raise ValueError(f"field {name!r} holds {value}; expected 0 or 1")
    return value == 1
