"""Trainers whose generation does not sample from the policy are refused, with the setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trl_runs import HELD_OUT, PLAIN, measure_training
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks.trl.variants import trainer
from fx_influence.interop.trl import EntropyInfluence

# The warnings that trl, transformers and accelerate give about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"temperature": 1.6}, "temperature"),
        ({"top_k": 3}, "top_k"),
        ({"sequence_bias": [[[3], 2.0]]}, "sequence_bias"),
        ({"forced_eos_token_id": 1}, "forced_eos_token_id"),
        ({"min_new_tokens": 2}, "min_new_tokens"),
        ({"exponential_decay_length_penalty": (2, 1.5)}, "exponential_decay_length_penalty"),
        ({"stop_strings": ["7"]}, "stop_strings"),
        ({"eos_token_id": 5}, "eos_token_id"),
        ({"top_h": 0.4}, "top_h"),
        ({"watermarking_config": {"greenlist_ratio": 0.5}}, "watermarking_config"),
        ({"max_time": 1.0}, "max_time"),
    ],
)
def test_attach_rejects_biased_generation_kwargs(settings: dict[str, Any], name: str, tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1, generation_kwargs=settings)
    with pytest.raises(ValueError, match=f"{name} is .* in the trainer's generation"):
        EntropyInfluence(1, HELD_OUT).attach(training)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "top_k is 5 in the trainer's generation; expected 0"),
        ({"top_p": 0.9}, "top_p is 0.9"),
        ({"min_p": 0.1}, "min_p is 0.1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty is 1.1"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 2}}, "no_repeat_ngram_size is 2"),
        ({"generation_kwargs": {"suppress_tokens": [3]}}, r"suppress_tokens is \[3\]"),
        ({"use_transformers_continuous_batching": True}, "casts the weights in place"),
    ],
    ids=["top_k", "top_p", "min_p", "repetition_penalty", "ngrams", "suppress_tokens", "continuous_batching"],
)
def test_attach_rejects_biased_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1, **options)
    with pytest.raises(ValueError, match=message):
        EntropyInfluence(1, HELD_OUT).attach(training)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "top_p": 1.0, "typical_p": 1.0, "sequence_bias": None},
        {"max_new_tokens": 4, "use_cache": False, "renormalize_logits": True, "of_my_own": 3},
    ],
    ids=["neutral", "inert"],
)
def test_attach_accepts_unbiased_generation_kwargs(settings: dict[str, Any], tmp_path: Path) -> None:
    assert len(measure_training(tmp_path, 1, generation_kwargs=settings).history) == 1


def test_attach_rejects_the_models_generation_config(tmp_path: Path) -> None:
    """The trainer leaves min_p open, which the model's own generation config then fills in."""
    training = trainer(PLAIN, str(tmp_path), 1)
    training.model.generation_config.min_p = 0.2
    with pytest.raises(ValueError, match=r"min_p is .* in the trainer's generation"):
        EntropyInfluence(1, HELD_OUT).attach(training)


class Biased(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + 2.0 * (torch.arange(scores.shape[1]) == 3)


def test_attach_rejects_a_models_logits_processors(tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    training.model._get_logits_processor = lambda **_: LogitsProcessorList([Biased()])
    with pytest.raises(ValueError, match="changes the policy's distribution by Biased"):
        EntropyInfluence(1, HELD_OUT).attach(training)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"min_p": 0.1}, "min_p"),
        ({"temperature": 0.5}, "temperature"),
        ({"logit_bias": {3: 1.0}}, "logit_bias"),
        ({"bad_words": ["no"]}, "bad_words"),
        ({"allowed_token_ids": [1, 2]}, "allowed_token_ids"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"guided_decoding": {"regex": "a"}}, "guided_decoding"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"stop": ["\n"]}, "stop"),
        ({"seed": 0}, "seed"),
        ({}, "vllm_structured_outputs_regex"),
    ],
)
def test_attach_rejects_biased_vllm_settings(settings: dict[str, Any], name: str, tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    training.use_vllm, training.args.generation_kwargs = True, settings or None
    if not settings:
        training.args.vllm_structured_outputs_regex = "[0-9]+"
    with pytest.raises(ValueError, match=f"{name} is .* in the trainer's generation"):
        EntropyInfluence(1, HELD_OUT).attach(training)


def test_attach_accepts_unbiased_vllm_settings(tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    training.use_vllm = True
    training.args.generation_kwargs = {"top_k": -1, "presence_penalty": 0.0, "max_tokens": 4, "logit_bias": None}
    EntropyInfluence(1, HELD_OUT).attach(training)
