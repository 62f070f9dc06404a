"""Tokens sampled from the policy's full softmax by Hugging Face's ``generate``, with the log-probs of the draws.

``generate`` fills every option that a request leaves open from the checkpoint's own generation config (top-k,
penalties, suppressed tokens) and then from library defaults (top-k again), so a request alone cannot switch those off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


def full_softmax_config(end_ids: list[int], pad_id: int, max_new_tokens: int) -> GenerationConfig:
    """Return a generation config that sets every option which changes the distribution.

    The temperature is an argument of ``generate_tokens``: were it set here, ``generate`` would apply it after the
    recorder, whose log-probs would then not be those of the distribution that tokens are sampled from.

    Args:
        end_ids: ids of the end-of-sequence tokens.
        pad_id: id of the padding token.
        max_new_tokens: largest number of tokens per completion.
    """
    return GenerationConfig(
        do_sample=True,
        num_beams=1,
        num_return_sequences=1,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        typical_p=1.0,
        epsilon_cutoff=0.0,
        eta_cutoff=0.0,
        repetition_penalty=1.0,
        encoder_repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        encoder_no_repeat_ngram_size=0,
        min_length=0,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        disable_compile=True,
        return_dict_in_generate=False,
        eos_token_id=end_ids,
        pad_token_id=pad_id,
    )


def eos_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the end-of-sequence ids of the model's generation config, or the tokenizer's if it has none."""
    config = getattr(model, "generation_config", None)
    eos = config.eos_token_id if config is not None and config.eos_token_id is not None else tokenizer.eos_token_id
    if eos is None:
        raise ValueError(
            "eos_token_id is None in both the model's generation config and the tokenizer; expected at least one, "
            "or completions never end. Set it in the generation config"
        )
    return [eos] if isinstance(eos, int) else [int(token) for token in eos]


@contextmanager
def sampling_mode(model: nn.Module, config: GenerationConfig, seed: int) -> Iterator[None]:
    """Put the model in eval mode, under ``config`` alone and on its own random state; restore all of it afterwards.

    Args:
        model: a Hugging Face causal LM.
        config: replaces every generation config in the model.
        seed: of the random state.
    """
    with eval_mode(model), _replaced_config(model, config), seeded_rng(seed, next(model.parameters()).device):
        yield


def generate_tokens(
    model: Any, prompt_ids: Sequence[Sequence[int]], config: GenerationConfig, temperature: float
) -> list[tuple[list[int], list[float]]]:
    """Sample a completion of each prompt; call it within ``sampling_mode``.

    Args:
        model: a Hugging Face causal LM.
        prompt_ids: n sequences of token ids.
        config: the config that ``sampling_mode`` set.
        temperature: divides the logits.

    Returns:
        n pairs of sampled tokens and their log-probs, all as long as the longest completion of this call. After a row's
        first end of sequence follows padding, whose log-probs have no meaning.
    """
    width = max(map(len, prompt_ids))
    device = next(model.parameters()).device
    input_ids = torch.tensor([[config.pad_token_id] * (width - len(ids)) + list(ids) for ids in prompt_ids])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids])
    recorder = LogprobRecorder(temperature)
    output = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        generation_config=config,
        logits_processor=LogitsProcessorList([recorder]),
    )
    tokens = output[:, width:]
    return list(zip(tokens.tolist(), recorder.logprobs(tokens).tolist(), strict=True))


@contextmanager
def _replaced_config(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Replace every generation config in the model while inside: ``generate`` merges the model's own into a request."""
    originals = {
        module: vars(module)["generation_config"] for module in model.modules() if "generation_config" in vars(module)
    }
    try:
        for module in originals:
            vars(module)["generation_config"] = config
        yield
    finally:
        for module, original in originals.items():
            vars(module)["generation_config"] = original


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of the model in eval mode, and restore the mode of each afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def seeded_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global random state, from which ``generate`` draws, and restore it afterwards."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


class LogprobRecorder(LogitsProcessor):
    """Logits processor that applies the temperature and records the log-prob of each sampled token."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._pending: Tensor | None = None
        self._recorded: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._record(input_ids[:, -1:])
        scores = scores / self._temperature
        self._pending = scores.log_softmax(-1)
        return scores

    def logprobs(self, sampled: Tensor) -> Tensor:
        """Return the log-probs of ``sampled``, (B, new tokens).

        The last token is known only after ``generate`` has returned.
        """
        if len(self._recorded) < sampled.shape[1]:
            self._record(sampled[:, -1:])
        return torch.cat(self._recorded, -1)[:, : sampled.shape[1]]

    def _record(self, token: Tensor) -> None:
        if self._pending is not None:
            self._recorded.append(self._pending.gather(-1, token))
