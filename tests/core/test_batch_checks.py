"""Batches that cannot be scored or differentiated are refused before any forward."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers.checked_calls import (
    EVERY,
    VOCAB,
    WIDTH,
    Call,
    N,
    assert_rejected,
    fisher,
    influence,
    jvp,
    snis,
    valid_arguments,
    with_entry,
    with_fields,
)
from helpers.present import present

import fx_influence as fx
from fx_influence.types import Batch


def drop_prompt(batch: Batch) -> Batch:
    """Mask a token before a completion token of row 1 as padding, as happens where pad and eos share an id."""
    position = int(batch.completion_mask[1].nonzero()[-1]) - 1
    return with_entry("attention_mask", (1, position), False)(batch)


BAD_BATCHES: dict[str, tuple[Callable[[Batch], Batch], str]] = {
    "ids of one row": (
        lambda b: b._replace(input_ids=b.input_ids[0]),
        r"{batch}\.input_ids is torch.int64 of shape \(7,\); expected int64 \(B, T\)",
    ),
    "int32 ids": (
        lambda b: b._replace(input_ids=b.input_ids.int()),
        r"{batch}\.input_ids is torch.int32 of shape \(4, 7\); expected int64 \(B, T\)",
    ),
    "attention mask of numbers": (
        lambda b: b._replace(attention_mask=b.attention_mask.long()),
        r"{batch}\.attention_mask is torch.int64 of shape \(4, 7\); expected bool of the shape of input_ids, \(4, 7\)",
    ),
    "completion mask of numbers": (
        lambda b: b._replace(completion_mask=b.completion_mask.float()),
        r"{batch}\.completion_mask is torch.float32 of shape \(4, 7\); expected bool",
    ),
    "attention mask of fewer columns": (
        lambda b: b._replace(attention_mask=b.attention_mask[:, :-1]),
        r"{batch}\.attention_mask is torch.bool of shape \(4, 6\); expected bool of the shape of input_ids, \(4, 7\)",
    ),
    "completion mask of more rows": (
        lambda b: b._replace(completion_mask=torch.cat([b.completion_mask] * 2)),
        r"{batch}\.completion_mask is torch.bool of shape \(8, 7\); expected bool of the shape",
    ),
    "group of fewer rows": (
        lambda b: b._replace(group=present(b.group)[:3]),
        r"{batch}\.group has shape \(3,\); expected \(4,\), one prompt a row",
    ),
    "no row": (
        lambda b: fx.Batch._make(None if field is None else field[:0] for field in b),
        r"{batch}\.input_ids is of shape \(0, 7\); expected at least one rollout",
    ),
    "first column completed": (
        with_entry("completion_mask", (2, 0), True),
        r"{batch}\.completion_mask\[2, 0\] is True; expected False.* Prepend the prompt",
    ),
    "hidden token before a completion token": (
        drop_prompt,
        r"{batch}\.attention_mask\[1, \d\] is False; expected True.* Make the mask from lengths",
    ),
    "id past the vocabulary": (
        with_entry("input_ids", (3, 2), VOCAB),
        r"{batch}\.input_ids has values from 0 to 5; expected .* 5, .*Tokenize with the model's own tokenizer",
    ),
    "negative id": (
        with_entry("input_ids", (3, 2), -100),
        r"{batch}\.input_ids has values from -100 to 4; expected at least 0.* Tokenize",
    ),
}


@pytest.mark.parametrize("call", EVERY)
@pytest.mark.parametrize("case", BAD_BATCHES)
def test_check_batch_rejects_unscorable_batch(call: Call, case: str) -> None:
    change, message = BAD_BATCHES[case]
    # fisher_kernel names its batches a and b.
    fields = {"batch_e": "batch_a", "batch_u": "batch_b"} if call is fisher else {"batch_e": "batch_e"}
    fields = {**fields, "batch_u": "batch_u"} if call is influence else fields
    for arguments, field in fields.items():
        assert_rejected(call, message.replace("{batch}", field), **{arguments: change})


@pytest.mark.parametrize("call", [influence, snis, jvp])
def test_check_batch_rejects_eval_batch_without_completion(call: Call) -> None:
    message = r"batch_e\.completion_mask has no True at all; expected at least one completion token, since the entropy"
    assert_rejected(call, message, batch_e=with_fields(completion_mask=torch.zeros(N, WIDTH, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            with_fields(coefficients=None, entropy_coefficients=None),
            r"batch_u\.coefficients is None; expected .*Fill it with fx\.coefficients\(\.\.\.\)",
        ),
        (
            with_entry("coefficients", (2, 3), math.nan),
            r"batch_u\.coefficients is not finite in row 2 \(1 such rows\); expected finite values. Drop",
        ),
        (
            with_entry("entropy_coefficients", (slice(1, 3), 3), math.inf),
            r"batch_u\.entropy_coefficients is not finite in row 1 \(2 such rows\); expected finite values",
        ),
        (
            with_fields(coefficients=torch.ones(N)),
            r"batch_u\.coefficients is torch.float32 of shape \(4,\); expected float \(4, 7\)",
        ),
        (
            with_fields(coefficients=torch.ones(N, WIDTH, dtype=torch.long)),
            r"batch_u\.coefficients is torch.int64 of shape \(4, 7\); expected float \(4, 7\)",
        ),
    ],
    ids=["none", "nan", "infinity", "shape", "dtype"],
)
def test_check_coefficients_rejects_unusable_values(change: Callable[[Batch], Batch], message: str) -> None:
    assert_rejected(influence, message, batch_u=change)


def test_check_batch_rejects_other_device() -> None:
    arguments = valid_arguments()
    other_device = arguments["batch_e"]._replace(input_ids=arguments["batch_e"].input_ids.to("meta"))
    assert_rejected(jvp, r"batch_e\.input_ids is on meta; expected cpu.* Move one of them", batch_e=other_device)


def test_check_batch_rejects_negative_ids_without_vocab_size() -> None:
    arguments = valid_arguments()
    arguments["apply"].vocab_size = None
    arguments["batch_e"] = with_entry("input_ids", (0, 0), -1)(arguments["batch_e"])
    with pytest.raises(ValueError, match=r"batch_e\.input_ids has values from -1 to 4"):
        jvp(arguments)


@pytest.mark.parametrize("call", EVERY)
def test_check_batch_rejects_call_under_autocast(call: Call) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_rejected(call, r"autocast.*outside of it")
