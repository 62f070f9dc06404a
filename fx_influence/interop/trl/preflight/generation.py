"""Check that a trainer's generation samples from exactly its policy: its settings, and their effect on logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from fx_influence.interop.live.guard import GenerationError
from fx_influence.interop.trl.prompts import BATCH, IMAGE_COLUMNS, check_images_measurable
from fx_influence.interop.trl.sampling import generating_model

ENVIRONMENTS = ("tools", "environment_factories", "rollout_func")
"""Attributes of ``GRPOTrainer`` through which completions have tokens that the policy did not sample."""

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
"""Settings of Hugging Face's generation -> values that leave its distribution unchanged; None always does."""

INERT = frozenset(
    (
        *("max_length", "max_new_tokens", "use_cache", "cache_implementation", "cache_config", "max_cache_len"),
        *("pad_token_id", "bos_token_id", "decoder_start_token_id", "renormalize_logits", "remove_invalid_values"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("compile_config", "disable_compile", "continuous_batching_config", "low_memory", "prefill_chunk_size"),
        *("return_legacy_cache", "length_penalty", "early_stopping", "transformers_version"),
        # Settings of assistants, which are off unless an assistant is passed.
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size"),
    )
)
"""Settings of Hugging Face's generation that change no probability, whatever their value."""

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
"""Fields of vLLM's ``SamplingParams`` -> values that leave the distribution unchanged; None always does."""

VLLM_INERT = frozenset(
    (
        *("max_tokens", "logprobs", "prompt_logprobs", "detokenize", "skip_special_tokens", "output_kind"),
        *("spaces_between_special_tokens", "flat_logprobs", "include_stop_str_in_output", "skip_reading_prefix_cache"),
    )
)
"""Fields of vLLM's ``SamplingParams`` that change no probability, whatever their value."""


def check_generation(trainer: Any, prompts: Sequence[Any] | None) -> None:
    """Raise ``GenerationError`` for a trainer whose completions are not sampled from its policy, naming the setting.

    What a ``rollout_func`` does cannot be read: the log-probabilities that it returns are compared with the policy's
    at each measured step.

    Args:
        trainer: a ``GRPOTrainer`` or ``RLOOTrainer``.
        prompts: of E; None where E is the update batch.
    """
    for field in ENVIRONMENTS:
        if getattr(trainer, field, None) and prompts is not None:
            raise GenerationError(
                f"E is {len(prompts)} held-out prompts and trainer.{field} is set; expected the step's own rollouts, "
                "since held-out completions are sampled without the trainer's tools and environments. Pass "
                f"eval_prompts={BATCH!r}"
            )
    if getattr(trainer, "rollout_func", None):
        return
    if getattr(trainer, "use_transformers_continuous_batching", False):
        raise GenerationError(
            "use_transformers_continuous_batching is True; expected False, since it casts the weights in place "
            "before it generates"
        )
    requested = trainer.args.generation_kwargs or {}
    if getattr(trainer, "use_vllm", False):
        fields = {name: getattr(trainer, name, None) for name in ("top_k", "top_p", "min_p", "repetition_penalty")}
        settings = {**fields, **_structured_output_settings(trainer), **requested}
        _check_settings(trainer, settings, VLLM_NEUTRAL, VLLM_INERT)
        return
    # The trainer's settings that are None are filled in from the model's own config, and then from library defaults.
    chosen = {name: value for name, value in trainer.generation_config.to_dict().items() if value is not None}
    settings = {**trainer.model.generation_config.to_dict(), "do_sample": True, **chosen}
    defaults = GenerationConfig().to_dict()
    # A setting that the library does not know has no effect, and one at its default none unless NEUTRAL lists it.
    idle = {name for name, x in settings.items() if name not in NEUTRAL and x == defaults.get(name, x)}
    _check_settings(trainer, settings, NEUTRAL, INERT | (idle - {"temperature", "eos_token_id"}))
    _check_effect(trainer)


def check_images(trainer: Any, prompts: Sequence[Any] | None, matrix: bool) -> None:
    """Raise ``ValueError`` where a data set with images is trained on and they cannot be carried into every pass.

    Images in the prompts themselves, or from tools, are noticed in the first measured step.

    Args:
        trainer: a ``GRPOTrainer`` or ``RLOOTrainer``.
        prompts: of E; None where E is the update batch.
        matrix: whether pairwise influences are wanted.
    """
    columns = getattr(trainer.train_dataset, "column_names", None) or ()
    if any(name in columns for name in IMAGE_COLUMNS):
        check_images_measurable(trainer, prompts, matrix)


def _structured_output_settings(trainer: Any) -> dict[str, Any]:
    """Return the trainer's settings of structured output, whose names differ between versions of trl."""
    settings = {name: value for name, value in vars(trainer.args).items() if name.startswith("vllm_")}
    return {name: value for name, value in settings.items() if "structured" in name or "guided" in name}


def _check_settings(
    trainer: Any, settings: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], inert: frozenset[str]
) -> None:
    """Raise ``GenerationError`` for a setting that changes the distribution of completions.

    Args:
        trainer: has the temperature and the end-of-sequence tokens that settings must agree with.
        settings: by name; None is never refused.
        neutral: name -> values that leave the distribution unchanged.
        inert: names that are not looked at.
    """
    eos_ids = set(trainer.eos_token_ids)
    for name, value in settings.items():
        if value is None or name.startswith("_") or name in inert:
            continue
        expected: tuple[Any, ...] = neutral.get(name, ())
        if name == "temperature":
            expected = (trainer.temperature,)
        if name == "eos_token_id":
            if (set(value) if isinstance(value, (list, tuple)) else {value}) <= eos_ids:
                continue
            expected = (sorted(eos_ids),)
        if value not in expected:
            raise GenerationError(
                f"{name} is {value!r} in the trainer's generation; expected "
                f"{expected[0] if expected else None!r}. Other "
                "completions are not sampled from the policy's full softmax, so they would estimate another entropy"
            )


class _ProcessedLogits(NamedTuple):
    """Log-probabilities (4, V) of some logits at the trainer's temperature, and after generation's processors."""

    processors: str
    before: Tensor
    after: Tensor


def _check_effect(trainer: Any) -> None:
    """Raise ``GenerationError`` where generation changes the softmax of logits by more than the temperature."""
    for processed in _process_logits(trainer):
        # A division and two softmaxes round by about 1e-6; the bound leaves two orders of magnitude.
        if not torch.allclose(processed.after, processed.before, rtol=0, atol=1e-4):
            raise GenerationError(
                f"the trainer's generation changes the policy's distribution by {processed.processors}; expected "
                "no change, since its completions would estimate another entropy. Generate from the full softmax "
                f"at temperature {trainer.temperature}"
            )


def _process_logits(trainer: Any) -> list[_ProcessedLogits]:
    """Apply the trainer's logits processors to random logits, as for a first token and as for a later one.

    Returns nothing where the model's class makes its processors in another way.
    """
    model, device = generating_model(trainer), trainer.accelerator.device
    results = []
    try:
        config = model._prepare_generation_config(trainer.generation_config)[0]
        model._prepare_special_tokens(config, True, device=device)
        vocabulary, width = model.get_output_embeddings().weight.shape[0], 12
        # Every row repeats itself, so that a repetition penalty has an effect.
        ids = (torch.arange(4 * width, device=device).reshape(4, width) % (width // 2) + 3) % vocabulary
        logits = 3 * torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(0)).to(device)
        for length in (width - 1, width):
            processors = model._get_logits_processor(
                generation_config=config, input_ids_seq_length=width - 1, device=device, model_kwargs={}
            )
            after = processors(ids[:, :length], logits.clone()).log_softmax(-1)
            names = ", ".join(type(processor).__name__ for processor in processors)
            results.append(_ProcessedLogits(names, (logits / trainer.temperature).log_softmax(-1), after))
    except (AttributeError, KeyError, TypeError, RuntimeError):
        # These methods of transformers are private; the completions themselves are checked later.
        return []
    return results
