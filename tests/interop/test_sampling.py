"""Sampling: rollouts follow the full softmax, and the caller's state is restored."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.sampling_models import (
    ANOTHER_EOS,
    EOS,
    ON_POLICY,
    OPTIONS,
    PROMPTS,
    TALK,
    gap,
    make_model,
    make_tokenizer,
)
from tokenizers import processors
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from fx_influence.interop.prompts import Prompt
from fx_influence.interop.sampling import sample

TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}<bos>{% endif %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_chat_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Put a bos before every text, as Llama's does, and its template writes one too."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<bos>", "<user>", "<assistant>"]})
    bos = tokenizer.convert_tokens_to_ids("<bos>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    tokenizer.chat_template = template
    return tokenizer


def test_sample_frequencies_match_full_softmax() -> None:
    # More tokens than the library's default top_k of 50, which a request that leaves it open is given.
    model, tokenizer, n = make_model(vocab_size=90), make_tokenizer(), 4000
    model.generation_config.update(top_k=2, top_p=0.5)
    prompt = Prompt("a", "1+2=")
    rollouts = sample(
        model, tokenizer, [prompt], completions_per_prompt=n, max_new_tokens=1, temperature=1.5, seed=0, batch_size=n
    )
    with torch.no_grad():
        logits = model.eval()(torch.tensor([tokenizer(prompt.text)["input_ids"]])).logits[0, -1]
    pi = (logits / 1.5).softmax(-1).double()
    seen = torch.bincount(torch.tensor([r.completion_ids[0] for r in rollouts]), minlength=90) / n
    assert pi.sort().values[:40].sum() > 0.05
    assert ((seen - pi).abs() <= 4.5 * (pi * (1 - pi) / n).sqrt()).all()


@pytest.mark.parametrize("kind", ["qwen2", "lora"])
@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 2},
        {"top_p": 0.3},
        {"min_p": 0.5},
        {"typical_p": 0.3},
        {"temperature": 0.1},
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 8},
        {"min_length": 20},
        {"max_length": 9},
        {"suppress_tokens": [EOS, 4]},
        {"begin_suppress_tokens": [EOS, 4]},
        {"bad_words_ids": [[3], [7]]},
        {"forced_eos_token_id": 7},
        {"sequence_bias": [[[3], 10.0]]},
        {"exponential_decay_length_penalty": (1, 5.0)},
        {"epsilon_cutoff": 0.2},
        {"eta_cutoff": 0.2},
        {"num_beams": 3},
        {"do_sample": False},
        {"num_return_sequences": 2},
        {"return_dict_in_generate": True},
        {"some_custom_entry": 5},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_sample_ignores_generation_config_of_checkpoint(kind: str, settings: dict[str, Any]) -> None:
    model, tokenizer = make_model(kind), make_tokenizer()
    neutral = sample(model, tokenizer, PROMPTS, **OPTIONS)
    inner = model.get_base_model() if kind == "lora" else model
    config = inner.generation_config
    for name, value in settings.items():
        setattr(config, name, value)
    before = config.to_dict()
    assert sample(model, tokenizer, PROMPTS, **OPTIONS) == neutral
    assert inner.generation_config is config
    assert model.generation_config is config
    assert config.to_dict() == before


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "lora"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_sample_logprobs_match_forward_pass(kind: str, temperature: float) -> None:
    model = make_model(kind).train()
    rollouts = sample(model, make_tokenizer(), PROMPTS, **{**OPTIONS, "temperature": temperature}, batch_size=5)
    assert len({len(r.prompt_ids) for r in rollouts}) == 3
    assert gap(model, rollouts, temperature) < ON_POLICY
    with pytest.raises(ValueError, match="was not sampled from this policy"):
        gap(model, rollouts, temperature + 0.5)


def test_sample_records_texts_and_ids() -> None:
    tokenizer = make_tokenizer()
    rollouts = sample(make_model(), tokenizer, PROMPTS, **OPTIONS)
    assert [r.id for r in rollouts] == [f"{p}/{k}" for p in "abc" for k in range(8)]
    assert [r.group for r in rollouts] == [0] * 8 + [1] * 8 + [2] * 8
    assert [r.prompt for r in rollouts] == [p.text for p in PROMPTS for _ in range(8)]
    for r in rollouts:
        assert r.prompt_ids == tuple(tokenizer(r.prompt)["input_ids"])
        body = r.completion_ids[:-1] if r.finished else r.completion_ids
        assert r.completion == "".join(t for t in tokenizer.convert_ids_to_tokens(list(body)) if t != "<pad>")
        assert EOS not in body
        assert (r.completion_ids[-1] == EOS) if r.finished else (len(r.completion_ids) == 8)
        assert r.reward is None
        assert r.advantage is None
    assert {r.finished for r in rollouts} == {True, False}


def test_sample_renders_conversation_by_chat_template() -> None:
    model, tokenizer = make_model(vocab_size=18), make_chat_tokenizer()
    prompts = [Prompt("talk", "", {}, TALK), Prompt("ask", "", {}, TALK[:1]), Prompt("text", "1+2")]
    rollouts = sample(model, tokenizer, prompts, **OPTIONS)
    talk, ask = "<bos><user>1+2<assistant>3<user>3+1<assistant>", "<bos><user>1+2<assistant>"
    assert [r.prompt for r in rollouts[::8]] == [talk, ask, "1+2"]
    for r, messages in ((rollouts[0], TALK), (rollouts[8], TALK[:1])):
        expected = tokenizer.apply_chat_template(list(messages), tokenize=True, add_generation_prompt=True)
        assert list(r.prompt_ids) == expected["input_ids"]
        assert tokenizer.decode(r.prompt_ids).count("<bos>") == 1
    assert rollouts[16].prompt_ids == tuple(tokenizer("1+2")["input_ids"]), "a plain text has the tokenizer's own bos"
    assert gap(model, rollouts) < ON_POLICY


def test_sample_records_source_of_prompt() -> None:
    columns: list[dict[str, Any]] = [{"source": "a"}, {"source": None, "data_source": "b/c"}, {"source": "x" * 101}]
    prompts = [Prompt(str(k), "1+", columns=column) for k, column in enumerate(columns)]
    rollouts = sample(make_model(), make_tokenizer(), prompts, **OPTIONS)
    per_prompt = len(rollouts) // 3
    assert [r.source for r in rollouts[::per_prompt]] == ["a", "b/c", None], "a long text is no name"


def test_sample_records_question_of_conversation() -> None:
    """The question shown is what was asked last, not the first words of the template; a plain text has none."""
    model, tokenizer = make_model(vocab_size=18), make_chat_tokenizer()
    talk = (
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2"},
    )
    for prompt, question in ((Prompt("0", "", {}, talk), "2+2"), (Prompt("0", "1+1="), None)):
        first = sample(model, tokenizer, [prompt], **OPTIONS)[0]
        assert (first.question, first.display_prompt) == (question, question or "1+1=")


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            None,
            TALK,
            "prompt 'talk' is a conversation and the tokenizer has no chat template; expected one. Save the tokenizer",
        ),
        (TEMPLATE, ({"role": "tool", "content": "1"},), r"'talk': .* template fails on roles \['tool'\] \(no tools\)"),
        (TEMPLATE, (*TALK, *TALK, *TALK), "'talk' has 32 tokens; expected at most 18, .* 26 positions"),
    ],
)
def test_sample_refuses_unusable_conversation_first(
    monkeypatch: pytest.MonkeyPatch, template: str | None, messages: tuple[dict[str, str], ...], message: str
) -> None:
    monkeypatch.setattr(Qwen2ForCausalLM, "generate", lambda *_, **__: pytest.fail("generate was called"))
    with pytest.raises(ValueError, match=message):
        sample(make_model(vocab_size=18), make_chat_tokenizer(template), [Prompt("talk", "", {}, messages)], **OPTIONS)


@pytest.mark.parametrize("pad", ["<eos>", None])
def test_sample_keeps_eos_that_is_also_padding(pad: str | None) -> None:
    tokenizer, model = make_tokenizer(), make_model()
    usual = sample(model, tokenizer, PROMPTS, **OPTIONS)
    tokenizer.pad_token = pad
    rollouts = sample(model, tokenizer, PROMPTS, **OPTIONS)
    assert rollouts == usual
    assert any(r.finished and len(r.completion_ids) < 8 for r in rollouts)
    assert all(r.completion_ids.count(EOS) == 1 and r.completion_ids[-1] == EOS for r in rollouts if r.finished)


def test_sample_stops_at_every_eos_id() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    model.generation_config.eos_token_id = [EOS, ANOTHER_EOS]
    rollouts = sample(model, tokenizer, PROMPTS, **{**OPTIONS, "completions_per_prompt": 16})
    last = {r.completion_ids[-1] for r in rollouts if r.finished}
    assert last == {EOS, ANOTHER_EOS}
    assert not any({EOS, ANOTHER_EOS} & set(r.completion_ids[:-1]) for r in rollouts)
    model.generation_config.eos_token_id = None
    assert sample(model, tokenizer, PROMPTS, **OPTIONS) == sample(make_model(), tokenizer, PROMPTS, **OPTIONS)


def test_sample_repeats_with_equal_seed_only() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    torch.manual_seed(1)
    first = sample(model, tokenizer, PROMPTS, **OPTIONS)
    torch.manual_seed(2)
    torch.rand(7)
    assert sample(model, tokenizer, PROMPTS, **OPTIONS) == first
    assert sample(model, tokenizer, PROMPTS, **{**OPTIONS, "seed": 4}) != first


@pytest.mark.parametrize("fails", [False, True])
def test_sample_restores_rng_modes_and_config(fails: bool) -> None:
    model, tokenizer = make_model("gpt2").train(), make_tokenizer()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    config, weights = model.generation_config, [p.clone() for p in model.parameters()]
    torch.manual_seed(11)
    state = torch.get_rng_state()

    def progress(done: int, total: int) -> None:
        assert not any(module.training for module in model.modules())
        if fails:
            raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            sample(model, tokenizer, PROMPTS, **OPTIONS, progress=progress)
    else:
        sample(model, tokenizer, PROMPTS, **OPTIONS, progress=progress)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is config
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_sample_reports_progress_per_chunk() -> None:
    calls: list[tuple[int, int]] = []
    report = lambda done, total: calls.append((done, total))  # noqa: E731
    sample(make_model(), make_tokenizer(), PROMPTS, **OPTIONS, batch_size=10, progress=report)
    assert calls == [(10, 24), (20, 24), (24, 24)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [PROMPTS[0], Prompt("a", "4=")]}, "id 'a' more than once"),
        (
            {"prompts": [*PROMPTS, Prompt("long", "1" * 19)]},
            "'long' has 19 tokens; expected at most 18, .* 26 positions",
        ),
        ({"prompts": [PROMPTS[0], Prompt("none", "")]}, "prompt 'none' .* has no tokens"),
        ({"model": make_model(vocab_size=14)}, "tokenizer has 15 tokens; expected at most 14, the rows"),
        ({"completions_per_prompt": 0}, "completions_per_prompt is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"eos": None}, "eos_token_id is None"),
    ],
)
def test_sample_refuses_invalid_request_first(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        pytest.fail("generate was called")

    monkeypatch.setattr(Qwen2ForCausalLM, "generate", unreachable)
    arguments = {"model": make_model(), "tokenizer": make_tokenizer(), "prompts": PROMPTS, **OPTIONS, **changes}
    if "eos" in arguments:
        arguments["tokenizer"].eos_token = arguments["model"].generation_config.eos_token_id = arguments.pop("eos")
    with pytest.raises(ValueError, match=message):
        sample(**arguments)


def test_sample_accepts_longest_fitting_prompt() -> None:
    rollouts = sample(make_model(), make_tokenizer(), [Prompt("long", "1" * 18)], **OPTIONS)
    assert len(rollouts) == 8
