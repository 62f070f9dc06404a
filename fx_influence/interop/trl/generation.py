"""Whether a TRL trainer's completions are drawn from exactly its policy: by its settings, and by what these do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from fx_influence.types import Batch

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "do_sample": (True,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "top_k": (0, -1),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1.0,),
    "penalty_alpha": (0.0,),
    "diversity_penalty": (0.0,),
    "token_healing": (False,),
    "use_mtp": (False,),
    "is_assistant": (False,),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "sequence_bias": ({}, []),
    "forced_eos_token_id": (),
}
"""Settings of Hugging Face's generation with the values that leave its distribution alone; None always does."""

HARMLESS = frozenset(
    (
        *("max_length", "max_new_tokens", "use_cache", "cache_implementation", "cache_config", "max_cache_len"),
        *("pad_token_id", "bos_token_id", "decoder_start_token_id", "renormalize_logits", "remove_invalid_values"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("compile_config", "disable_compile", "continuous_batching_config", "low_memory", "prefill_chunk_size"),
        *("return_legacy_cache", "length_penalty", "early_stopping", "transformers_version"),
        # of assistants, which are off unless one is given
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size"),
    )
)
"""Settings that change no probability whatever their value."""

VLLM_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "top_k": (0, -1),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop": ([], ""),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "extra_args": ({},),
}
"""Fields of vLLM's ``SamplingParams`` with the values that leave the distribution alone; None always does."""

VLLM_HARMLESS = frozenset(
    (
        *("max_tokens", "logprobs", "prompt_logprobs", "detokenize", "skip_special_tokens", "output_kind"),
        *("spaces_between_special_tokens", "flat_logprobs", "include_stop_str_in_output", "skip_reading_prefix_cache"),
    )
)

ALTERNATIVES = (0.5, 0.7, 0.85, 1.2, 1.5, 2.0)
"""Factors of the temperature that completions are tried to be explained by."""

FALSE_ALARMS = 3e-7
"""How often completions that are drawn from the policy are taken for others: once in that share of trainings."""


class GenerationError(ValueError):
    """Completions that are not drawn from the policy."""


def check_generation(trainer: Any) -> None:
    """Raise ``GenerationError`` for a trainer whose completions are not drawn from its policy, naming the setting."""
    for field in ("tools", "environment_factories", "rollout_func"):
        if getattr(trainer, field, None):
            raise GenerationError(
                f"trainer.{field} is set: its completions are not sampled from the policy alone, so they estimate no "
                "entropy of it; measure a trainer without it"
            )
    if getattr(trainer, "use_transformers_continuous_batching", False):
        raise GenerationError(
            "use_transformers_continuous_batching is True, which casts the weights in place before it generates; "
            "set it to False"
        )
    asked = trainer.args.generation_kwargs or {}
    if getattr(trainer, "use_vllm", False):
        named = {name: getattr(trainer, name, None) for name in ("top_k", "top_p", "min_p", "repetition_penalty")}
        _check_settings(trainer, {**named, **_structured(trainer), **asked}, VLLM_NEUTRAL, VLLM_HARMLESS)
        return
    # What the trainer leaves open is filled in from the model's own, and only then from the library's defaults.
    requested = {name: value for name, value in trainer.generation_config.to_dict().items() if value is not None}
    settings = {**trainer.model.generation_config.to_dict(), "do_sample": True, **requested}
    defaults = GenerationConfig().to_dict()
    # A setting that the library does not know does nothing, and one at its default nothing unless it is known to.
    idle = {name for name, x in settings.items() if name not in NEUTRAL and x == defaults.get(name, x)}
    _check_settings(trainer, settings, NEUTRAL, HARMLESS | (idle - {"temperature", "eos_token_id"}))
    _check_effect(trainer)


def _structured(trainer: Any) -> dict[str, Any]:
    """The trainer's settings of structured output, whatever its version calls them."""
    named = {name: value for name, value in vars(trainer.args).items() if name.startswith("vllm_")}
    return {name: value for name, value in named.items() if "structured" in name or "guided" in name}


def _check_settings(
    trainer: Any, settings: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], harmless: frozenset[str]
) -> None:
    ends = set(trainer.eos_token_ids)
    for name, value in settings.items():
        if value is None or name.startswith("_") or name in harmless:
            continue
        expected: tuple[Any, ...] = neutral.get(name, ())
        if name == "temperature":
            expected = (trainer.temperature,)
        if name == "eos_token_id":
            if (set(value) if isinstance(value, (list, tuple)) else {value}) <= ends:
                continue
            expected = (sorted(ends),)
        if value not in expected:
            raise GenerationError(
                f"{name} is {value!r} in the trainer's generation: its completions are not sampled from the policy's "
                f"full softmax, so they would estimate another entropy; set {name} to "
                f"{expected[0] if expected else None!r}"
            )


def _check_effect(trainer: Any) -> None:
    """Raise where what generation does to logits changes their softmax by more than the temperature."""
    for name, before, after in _processed(trainer):
        # The rounding of a division and of two softmaxes, with two orders of magnitude of room.
        if not torch.allclose(after, before, rtol=0, atol=1e-4):
            raise GenerationError(
                f"the trainer's generation changes the policy's distribution by {name}: its completions would estimate "
                f"another entropy; generate from the full softmax at temperature {trainer.temperature}"
            )


def _processed(trainer: Any) -> list[tuple[str, Tensor, Tensor]]:
    """What generation applies to logits, the log-probs of some at the trainer's temperature, and what becomes of them.

    Once for a first token and once for a later one; nothing where the model's class makes its processors otherwise.
    """
    model, device = generating_model(trainer), trainer.accelerator.device
    found = []
    try:
        config = model._prepare_generation_config(trainer.generation_config)[0]
        model._prepare_special_tokens(config, True, device=device)
        size, width = model.get_output_embeddings().weight.shape[0], 12
        # Every row repeats itself, as a penalty would have to notice.
        ids = (torch.arange(4 * width, device=device).reshape(4, width) % (width // 2) + 3) % size
        logits = 3 * torch.randn(4, size, generator=torch.Generator().manual_seed(0)).to(device)
        for length in (width - 1, width):
            processors = model._get_logits_processor(
                generation_config=config, input_ids_seq_length=width - 1, device=device, model_kwargs={}
            )
            after = processors(ids[:, :length], logits.clone()).log_softmax(-1)
            names = ", ".join(type(processor).__name__ for processor in processors)
            found.append((names, (logits / trainer.temperature).log_softmax(-1), after))
    except (AttributeError, KeyError, TypeError, RuntimeError):
        # Methods of transformers that are not public; the completions themselves are compared later.
        return []
    return found


def generating_model(trainer: Any) -> Any:
    """The model whose ``generate`` a trainer calls, inside any adapters."""
    return trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model


def mean_distance(a: Tensor, b: Tensor) -> float:
    """Return the mean |a - b| over log-probs of the same tokens, in nats; 0 where there are none."""
    return float((a.double() - b.double()).abs().mean()) if a.numel() else 0.0


def check_drawn(behaviour: Tensor, scored: Tensor, bound: float) -> None:
    """Raise ``GenerationError`` where the log-probs that tokens were drawn with are not those of the policy.

    ``behaviour``, ``scored``: of the same tokens, any shape. ``bound``: on their mean distance by rounding, in nats.
    """
    gap = mean_distance(behaviour, scored)
    if not gap <= bound:
        raise GenerationError(
            f"the held-out completions were not drawn from the policy: the log-probabilities they were drawn with and "
            f"its own differ by {gap:.2g} nats a token on average, rounding by at most {bound:.2g}; let the trainer "
            "sample from the full softmax at its temperature"
        )


def check_explained(logprobs_at: Callable[[float], Tensor], batch: Batch) -> None:
    """Raise ``GenerationError`` where another temperature explains completions far better than the policy's own.

    A likelihood ratio has mean 1 under the policy, whatever the number of tokens, and so exceeds x once in x times.

    ``logprobs_at``: (n, T), the log-probs of the tokens at a multiple of the temperature. ``batch``: (n, T).
    """
    own, mask = logprobs_at(1.0).double(), batch.completion_mask
    ratios = torch.stack([(logprobs_at(factor).double() - own)[mask].sum() for factor in ALTERNATIVES])
    evidence = float(ratios.logsumexp(0)) - math.log(len(ALTERNATIVES))
    if not evidence <= -math.log(FALSE_ALARMS):
        better = ALTERNATIVES[int(ratios.argmax())]
        raise GenerationError(
            f"the held-out completions were not drawn from the policy: they are {math.exp(min(evidence, 700)):.1g} "
            f"times likelier at {better} times its temperature; let the trainer sample from the full softmax at its "
            "temperature"
        )
