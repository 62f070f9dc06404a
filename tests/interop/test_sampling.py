"""Sampling: rollouts come from exactly pi, are recorded as drawn, and nothing of the caller's is left changed."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.tolerances import TINY_POLICY, rounding_bound
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from fx_influence.interop.prompts import Prompt
from fx_influence.interop.rewards import exact_match
from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.sampling import check_on_policy, sample, sample_rewarded, with_rewards
from fx_influence.types import Batch

EOS, ANOTHER_EOS, POSITIONS = 1, 5, 26
PROMPTS = [Prompt("a", "1+2="), Prompt("b", "3="), Prompt("c", "11+22+3=")]
OPTIONS: dict[str, Any] = {"completions_per_prompt": 8, "max_new_tokens": 8, "temperature": 1.0, "seed": 3}
# Log-probabilities scored one token at a time, with what is kept of the others, and all at once.
ON_POLICY = rounding_bound(torch.float32, TINY_POLICY, math.log(64))
TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}<bos>{% endif %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = (
    {"role": "user", "content": "1+2"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "3+1"},
)


def make_tokenizer(pad: str = "<pad>") -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+-="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token="<eos>")


def make_model(kind: str = "qwen2", **changes: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        common = {"vocab_size": 15, "eos_token_id": EOS, "pad_token_id": 0, "bos_token_id": None, **changes}
        if kind == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=POSITIONS, initializer_range=0.4, **common)
            )
        config = Qwen2Config(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=POSITIONS,
            initializer_range=0.4,
            tie_word_embeddings=True,
            **common,
        )
        model = Qwen2ForCausalLM(config)
        return add_lora(model) if kind == "lora" else model


def add_lora(model: Any) -> Any:
    with warnings.catch_warnings():
        # PEFT asks transformers for a property that is about to be renamed.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))


def make_chat_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Puts a bos before every text, as Llama's does, and its template writes one too."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<bos>", "<user>", "<assistant>"]})
    bos = tokenizer.convert_tokens_to_ids("<bos>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    tokenizer.chat_template = template
    return tokenizer


def scored(model: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """What one plain forward pass over the right-padded batch says of each token."""
    training = model.training
    with torch.no_grad():
        logits = model.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    model.train(training)
    logp = (logits[:, :-1] / temperature).log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    return torch.nn.functional.pad(logp, (1, 0))


def gap(model: Any, rollouts: Sequence[Rollout], temperature: float = 1.0, tolerance: float = ON_POLICY) -> float:
    batch = collate(rollouts, 0)
    return check_on_policy(rollouts, scored(model, batch, temperature), batch, tolerance)


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


def test_sample_records_question_of_conversation() -> None:
    """What people are shown is what was asked last, not the first words of the template; a plain text has none."""
    model, tokenizer = make_model(vocab_size=18), make_chat_tokenizer()
    talk = (
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2"},
    )
    for prompt, question in ((Prompt("0", "", {}, talk), "2+2"), (Prompt("0", "1+1="), None)):
        first = sample(model, tokenizer, [prompt], **OPTIONS)[0]
        assert (first.question, first.display_prompt) == (question, question or "1+1=")


def test_with_rewards_passes_conversation_as_messages() -> None:
    prompts = [Prompt("talk", "", {"answer": "4"}, TALK)]
    rollouts = [Rollout("talk/0", "talk", 0, "<bos>...", "4", (2,), (6, EOS), True, (-1.0, -1.0))]
    seen: dict[str, Any] = {}

    def reward(**arguments: Any) -> list[float]:
        seen.update(arguments)
        arguments["prompts"][0].append("mine to change")
        arguments["prompts"][0][0]["content"] = "as well"
        return [1.0]

    with_rewards(rollouts, prompts, reward)
    assert seen["prompts"] == [[{"role": "user", "content": "as well"}, *TALK[1:], "mine to change"]]
    assert seen["completions"] == [[{"role": "assistant", "content": "4"}]]
    assert seen["completion_ids"] == [[6, EOS]]
    assert seen["answer"] == ["4"]
    assert prompts[0].messages is not None
    assert prompts[0].messages[0]["content"] == "1+2"


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            None,
            TALK,
            "prompt 'talk' is a conversation, but the tokenizer has no chat template; save the tokenizer with",
        ),
        (TEMPLATE, ({"role": "tool", "content": "1"},), r"'talk': .* template fails on roles \['tool'\] \(no tools\)"),
        (TEMPLATE, (*TALK, *TALK, *TALK), "'talk' has 32 tokens; with max_new_tokens 8 .* 26 positions"),
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
            "'long' has 19 tokens; with max_new_tokens 8 .* 26 positions",
        ),
        ({"prompts": [PROMPTS[0], Prompt("none", "")]}, "prompt 'none' .* has no tokens"),
        ({"model": make_model(vocab_size=14)}, "tokenizer has 15 tokens but the model's embedding 14 rows"),
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


def test_check_on_policy_refuses_changed_model() -> None:
    model = make_model()
    rollouts = sample(model, make_tokenizer(), PROMPTS, **OPTIONS)
    with torch.no_grad():
        next(model.parameters()).mul_(1.05)
    worst = gap(model, rollouts, tolerance=math.inf)
    assert worst > 1e-3
    assert gap(model, rollouts, tolerance=worst) == worst
    with pytest.raises(ValueError, match=r"rollout '[abc]/\d' was not sampled .*tolerance 0.001.*sample again"):
        gap(model, rollouts, tolerance=1e-3)


def test_check_on_policy_names_worst_rollout() -> None:
    rollouts = [
        Rollout("a/0", "a", 0, "", "", (2,), (3, 4), False, (-1.0, -2.0)),
        Rollout("b/0", "b", 1, "", "", (2, 3), (4,), False, (-3.0,)),
    ]
    batch = collate(rollouts, 0)
    logp = torch.tensor([[9.0, -1.25, -2.0], [9.0, 9.0, -3.5]])
    assert check_on_policy(rollouts, logp, batch, 0.5) == 0.5
    with pytest.raises(ValueError, match=r"rollout 'b/0' was not .* differ by 0.5 .tolerance 0.4"):
        check_on_policy(rollouts, logp, batch, 0.4)
    with pytest.raises(ValueError, match="differ by inf"):
        check_on_policy(rollouts, logp.masked_fill(logp == -1.25, math.nan), batch, 0.5)
    with pytest.raises(ValueError, match=r"scored_logprobs has shape \(2, 2\) and batch \(2, 3\) for 2"):
        check_on_policy(rollouts, logp[:, 1:], batch, 0.5)
    with pytest.raises(ValueError, match="has 2 completion tokens for rollout 'b/0', which has 1"):
        check_on_policy(rollouts[::-1], logp, batch, 0.5)


def judged(rewards: Sequence[float | None], groups: Sequence[int], **options: Any) -> list[Rollout]:
    prompts = [Prompt(str(g), f"{g}=", {"answer": g, **({"rare": "x"} if g == 1 else {})}) for g in range(3)]
    rollouts = [Rollout(f"{g}/{i}", str(g), g, f"{g}=", "t", (2,), (3,), False, (-1.0,)) for i, g in enumerate(groups)]

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        rare = ["x" if g == 1 else None for g in groups]
        assert columns == {"answer": list(groups), "rare": rare, "completion_ids": [[3]] * len(groups)}
        assert prompts == [f"{g}=" for g in groups]
        assert completions == ["t"] * len(groups)
        return list(rewards)

    return with_rewards(rollouts, prompts, reward, **options)


def test_with_rewards_computes_group_relative_advantages() -> None:
    out = judged([1.0, 0.0, 1.0, 4.0, 2.0, 0.1, 0.1, 0.1], [0, 0, 0, 1, 1, 2, 2, 2], scale_advantages=False)
    assert [r.reward for r in out] == [1.0, 0.0, 1.0, 4.0, 2.0, 0.1, 0.1, 0.1]
    assert [r.advantage for r in out[:5]] == pytest.approx([1 / 3, -2 / 3, 1 / 3, 1.0, -1.0])
    assert [r.advantage for r in out[5:]] == [0.0, 0.0, 0.0]
    scaled = judged([4.0, 2.0], [1, 1])
    assert scaled[0].advantage == pytest.approx(1 / (math.sqrt(2) + 1e-4))


@pytest.mark.parametrize("scale", [True, False])
def test_with_rewards_leaves_out_none_rewards(scale: bool) -> None:
    out = judged([1.0, None, 0.0, 4.0, 2.0, None, None], [0, 0, 0, 1, 1, 2, 2], scale_advantages=scale)
    without = judged([1.0, 0.0, 4.0, 2.0], [0, 0, 1, 1], scale_advantages=scale)
    assert [r.reward for r in out] == [1.0, None, 0.0, 4.0, 2.0, None, None]
    assert [r.advantage for r in out if r.reward is not None] == [r.advantage for r in without]
    assert [r.advantage for r in out if r.reward is None] == [0.0, 0.0, 0.0]
    assert [r.advantage for r in judged([None, None], [0, 0], scale_advantages=scale)] == [0.0, 0.0]


def test_with_rewards_names_rollout_of_unknown_prompt() -> None:
    rollout = Rollout("x/0", "x", 0, "", "", (2,), (3,), False, (-1.0,))
    with pytest.raises(ValueError, match="prompt_id of rollout 'x/0' is 'x'"):
        with_rewards([rollout], PROMPTS, exact_match)


class Judge:
    """Counts its calls; groups of the prompts in ``flat`` are judged alike until call ``until``."""

    def __init__(self, flat: str, until: int) -> None:
        self.flat, self.until, self.calls = flat, until, list[list[str]]()

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        self.calls.append(prompts)
        return [
            0.0 if p in self.flat and len(self.calls) <= self.until else float(i % 2) for i, p in enumerate(prompts)
        ]


def test_sample_rewarded_resamples_up_to_the_bound() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    prompts = [Prompt(name, f"{name}=") for name in "123"]
    first = sample_rewarded(model, tokenizer, prompts, Judge("1=3=", 99), **OPTIONS)
    always = Judge("1=3=", 99)
    again = sample_rewarded(model, tokenizer, prompts, always, **OPTIONS, resample_zero_advantage=2)
    assert [sorted(set(call)) for call in always.calls] == [["1=", "2=", "3="], ["1=", "3="], ["1=", "3="]]
    assert [(r.id, r.group) for r in again] == [(r.id, r.group) for r in first]
    assert again[8:16] == first[8:16]
    assert again[:8] != first[:8]
    assert again[16:] != first[16:]
    assert all(r.advantage == 0.0 for r in (*again[:8], *again[16:]))
    assert gap(model, again) < ON_POLICY


def test_sample_rewarded_stops_when_all_groups_differ() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    once = Judge("3=", 1)
    prompts = [Prompt(name, f"{name}=") for name in "123"]
    out = sample_rewarded(model, tokenizer, prompts, once, **OPTIONS, resample_zero_advantage=5)
    assert len(once.calls) == 2
    assert all(r.advantage for r in out)
    assert [r.group for r in out[16:]] == [2] * 8
    assert out == sample_rewarded(model, tokenizer, prompts, Judge("3=", 1), **OPTIONS, resample_zero_advantage=5)
    redrawn = {dataclasses.replace(r, group=0, reward=None, advantage=None) for r in out[16:]}
    assert not redrawn & set(sample(model, tokenizer, prompts[2:], **{**OPTIONS, "seed": OPTIONS["seed"] + 1}))
    with pytest.raises(ValueError, match="resample_zero_advantage is -1"):
        sample_rewarded(model, tokenizer, prompts, once, **OPTIONS, resample_zero_advantage=-1)


def test_sample_rewarded_resamples_group_with_none() -> None:
    calls: list[int] = []

    def reward(completions: list[str], **_: Any) -> list[float | None]:
        calls.append(len(completions))
        return [1.0 if i % 2 else None for i in range(len(completions))]

    arguments = (make_model(), make_tokenizer(), [Prompt("1", "1=")], reward)
    sample_rewarded(*arguments, **OPTIONS, resample_zero_advantage=2)
    assert calls == [8, 8, 8]


def test_sample_rewarded_uses_new_seed_each_round() -> None:
    model, tokenizer, draws = make_model(), make_tokenizer(), list[list[Rollout]]()
    for rounds in ({}, {"resample_zero_advantage": 1}, {"resample_zero_advantage": 2}):
        judge = Judge("1=", 99)
        draws.append(sample_rewarded(model, tokenizer, [Prompt("1", "1=")], judge, **OPTIONS, **rounds))
        assert len(judge.calls) == len(draws)
    texts = [[r.completion for r in draw] for draw in draws]
    assert texts[0] != texts[1] != texts[2] != texts[0]


def test_check_on_policy_is_nan_without_behaviour_logprobs() -> None:
    rollouts = [Rollout("0/0", "0", 0, "", "", (1,), (2, 3), True), Rollout("1/0", "1", 1, "", "", (1,), (2, 3), True)]
    scored = torch.full((2, 3), -1.0)
    assert math.isnan(check_on_policy(rollouts, scored, collate(rollouts, 0), 1e-3))
    known = dataclasses.replace(rollouts[1], behaviour_logprobs=(-9.0, -1.0), completion_mask=(False, True))
    assert check_on_policy([rollouts[0], known], scored, collate([rollouts[0], known], 0), 1e-3) == 0.0
