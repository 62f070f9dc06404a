"""Held-out prompts from the forms users have them in."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, Features, IterableDataset, Value

from fx_influence.interop.trl.prompts import held_out_prompts

WITHOUT_EVAL_DATASET = SimpleNamespace(eval_dataset=None)


def endless() -> Iterator[dict[str, str]]:
    while True:
        yield {"prompt": "1+1="}


def test_prompts_of_an_eval_dataset_are_bounded() -> None:
    """``max_prompts`` bounds the trainer's data set, not what the user chose."""
    many = Dataset.from_list([{"prompt": f"{k}="} for k in range(1000)])
    trainer = SimpleNamespace(eval_dataset=many)
    bounded = held_out_prompts(trainer, None, 64)
    assert len(set(bounded.prompts)) == 64
    assert bounded.prompts[0] == "0="
    assert int(bounded.prompts[-1][:-1]) >= 980
    assert bounded.note is not None
    assert "64 of the 1000 prompts" in bounded.note
    assert len(held_out_prompts(trainer, many, 64).prompts) == 1000
    assert len(held_out_prompts(trainer, many["prompt"], 64).prompts) == 1000


@pytest.mark.parametrize("features", [None, Features({"prompt": Value("string")})], ids=["untyped", "typed"])
def test_prompts_of_a_stream_stop_at_the_bound(features: Features | None) -> None:
    stream = IterableDataset.from_generator(endless, features=features)
    assert len(held_out_prompts(WITHOUT_EVAL_DATASET, stream, 5).prompts) == 5
    first = held_out_prompts(WITHOUT_EVAL_DATASET, endless(), 5)
    assert first.prompts == ["1+1="] * 5
    assert first.note is not None
    assert "first 5" in first.note
    short = held_out_prompts(WITHOUT_EVAL_DATASET, iter(["1=", "2="]), 5)
    assert (short.prompts, short.note) == (["1=", "2="], None)


@pytest.mark.parametrize(
    ("eval_prompts", "expected"),
    [
        ("12+3=", ["12+3="]),
        ([{"role": "user", "content": "1+1"}], [[{"role": "user", "content": "1+1"}]]),
        ([{"prompt": "1="}, {"prompt": "2="}], ["1=", "2="]),
        (("1=", "2="), ["1=", "2="]),
    ],
    ids=["text", "conversation", "records", "tuple"],
)
def test_prompts_accept_other_forms(eval_prompts: Any, expected: list[Any]) -> None:
    assert held_out_prompts(WITHOUT_EVAL_DATASET, eval_prompts, 64).prompts == expected


@pytest.mark.parametrize(
    ("eval_prompts", "message"),
    [
        (None, "eval_prompts is None and the trainer has no eval_dataset"),
        ([], "eval_prompts is empty"),
        (["1+1=", 7], r"eval_prompts\[1\] is 7; expected a text or a conversation"),
        (["1+1=", ""], r"eval_prompts\[1\] is ''"),
        (Dataset.from_list([{"question": "1+1="}]), r"has the columns \['question'\]; expected prompt"),
        ({"a": ["1="]}, r"holds \['a'\]; expected one data set"),
        (7, "eval_prompts is 7; expected texts"),
        ([[{"role": "user", "content": [{"type": "image"}]}]], r"eval_prompts\[0\] shows an image"),
        (Dataset.from_list([{"prompt": "1=", "image": "x"}]), "eval_prompts has the column 'image'"),
    ],
    ids=["none", "empty", "number", "empty text", "other column", "mapping", "no iterable", "image", "image column"],
)
def test_prompts_reject_anything_else(eval_prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        held_out_prompts(WITHOUT_EVAL_DATASET, eval_prompts, 64)
