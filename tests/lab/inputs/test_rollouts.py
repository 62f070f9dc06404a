"""Make the batches of a plan: prompts by file, by id or inline, one sequence written out, a file of rollouts."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
import yaml
from helpers.present import present
from helpers.run_files import GSM8K
from helpers.tolerances import assert_close_to_rounding, policy_terms, rounding_bound
from pyarrow import parquet
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import fx_influence as fx
from fx_influence.interop.rewards import math_verify
from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.native_format import read_native_rollouts, write_rollouts
from fx_influence.lab.cli import main
from fx_influence.lab.inputs import rollouts as batches
from fx_influence.lab.inputs.rollouts import load_rollouts, load_state
from fx_influence.lab.inputs.update import update_batch
from fx_influence.lab.plan import (
    BatchRequest,
    CustomSequence,
    EntropyInfluencePlan,
    RolloutFile,
    SampledBatch,
)
from fx_influence.lab.store import RunDirectory

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTS = ({"prompt": "1+2=", "id": "a", "answer": "3"}, {"prompt": "3+4=", "id": "b", "answer": "7"}, "5+6=")
FEW = SampledBatch(PROMPTS, completions_per_prompt=2)


def rollouts_of(tmp_path: Path, request: BatchRequest, update: bool = False, **fields: Any) -> list[Any]:
    plan = EntropyInfluencePlan(**{"update": request if update else FEW, "evaluations": (request,)} | fields)
    state, directory = load_state(plan), RunDirectory.start(tmp_path / "run", plan, {})
    return load_rollouts(plan, state, directory, 0 if update else 1, "r.jsonl", lambda *done: None).rollouts


@pytest.fixture
def chat_checkpoint(tmp_path: Path) -> Path:
    """Make an untrained policy of digits and spaces; its tokenizer puts a bos before every text, like Llama's."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<system>", "<user>", "<assistant>"]
    vocabulary = {token: i for i, token in enumerate([*special, *"0123456789 "])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    special_tokens = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=special[4:], **special_tokens)
    fast.chat_template = CHAT_TEMPLATE
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen2Config(**sizes, num_key_value_heads=1, vocab_size=len(fast), eos_token_id=1, pad_token_id=0)
        model = Qwen2ForCausalLM(config)
    path = tmp_path / "checkpoint"
    for component in (model, fast):
        component.save_pretrained(path)
    torch.save(torch.optim.AdamW(model.parameters(), lr=1e-3).state_dict(), path / "optimizer.pt")
    return path


def test_run_asks_gsm8k_of_a_chat_model(tmp_path: Path, chat_checkpoint: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(GSM8K), tmp_path / "gsm8k.parquet")
    request = {"prompts": "gsm8k.parquet", "chat": True, "system": "Be brief.", "completions_per_prompt": 32}
    values = {
        "checkpoint": chat_checkpoint.name,
        "reward": "fx_influence.interop.rewards:math_verify",
        "loss": "dr_grpo",
        "max_new_tokens": 4,
        "update": request,
        "evaluations": [{**request, "prompt_ids": ["0", "2"], "completions_per_prompt": 4}],
        "directions": ["full", "baseline"],
        "eta_multiples": [1.0],
        "scaled_eta_multiples": [],
        "auto_scale": None,
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values))
    assert main(["run", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")]) == 0
    rollouts = fx.load_run(tmp_path / "out").update_rollouts
    assert [r.prompt for r in rollouts[::32]] == [
        f"<bos><system>Be brief.<eos><user>{record['question']}<eos><assistant>" for record in GSM8K
    ]
    assert all(r.prompt_ids[:2] == (2, 4) and r.prompt_ids.count(2) == 1 and r.prompt_ids[-1] == 6 for r in rollouts)
    assert [r.reward for r in rollouts] == [
        value
        for k, gold in enumerate((9, 3, 80000))
        for value in math_verify([r.completion for r in rollouts[32 * k : 32 * k + 32]], answer=[gold] * 32)
    ]
    assert 0 < sum(present(r.reward) for r in rollouts) < 64
    assert any(r.advantage for r in rollouts)


def test_inline_prompts_are_sampled_like_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps(p) + "\n" for p in ({**PROMPTS[0]}, {**PROMPTS[1]}, {"prompt": PROMPTS[2]}))
    )
    inline = rollouts_of(tmp_path / "1", FEW)
    filed = rollouts_of(tmp_path / "2", dataclasses.replace(FEW, prompts=str(tmp_path / "p.jsonl")))
    assert inline == filed
    assert [(r.prompt_id, r.prompt, r.group) for r in inline[::2]] == [
        ("a", "1+2=", 0),
        ("b", "3+4=", 1),
        ("2", "5+6=", 2),
    ]
    assert inline[0].reward == float(inline[0].completion.split("=")[-1] == "3")


def test_prompt_ids_give_order_of_prompts(tmp_path: Path) -> None:
    rollouts = rollouts_of(tmp_path, dataclasses.replace(FEW, prompt_ids=("2", "a")))
    assert [r.prompt_id for r in rollouts] == ["2", "2", "a", "a"]
    assert [r.group for r in rollouts] == [0, 0, 1, 1]


def test_batch_seed_overrides_plan_seed(tmp_path: Path) -> None:
    many = SampledBatch("demo/eval", num_prompts=8, completions_per_prompt=2)
    by_batch_seed = [rollouts_of(tmp_path / str(k), dataclasses.replace(many, seed=3), seed=k) for k in (0, 1)]
    plans = [rollouts_of(tmp_path / f"p{k}", many, seed=k) for k in (0, 1)]
    assert by_batch_seed[0] == by_batch_seed[1]
    assert plans[0] != plans[1]
    assert by_batch_seed[0] not in plans


def test_load_rollouts_joins_tasks_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "ROLLOUTS_PER_TASK", 5)
    rollouts = rollouts_of(tmp_path, SampledBatch("demo/eval", completions_per_prompt=2, num_prompts=7))
    assert [r.group for r in rollouts] == [k // 2 for k in range(14)]
    assert len({r.id for r in rollouts}) == 14
    assert len({r.prompt_id for r in rollouts}) == 7
    assert [path.name for path in (tmp_path / "run").glob("r_*")] == []


@pytest.mark.parametrize("end", [True, False])
def test_custom_sequence_is_scored_as_written(tmp_path: Path, end: bool) -> None:
    request = CustomSequence("12+7=", "19", advantage=-2.0, end=end)
    plan = EntropyInfluencePlan(update=request, evaluations=(request,))
    state, directory = load_state(plan), RunDirectory.start(tmp_path / "run", plan, {})
    u = load_rollouts(plan, state, directory, 0, "u.jsonl", lambda *done: None)
    (rollout,) = u.rollouts
    assert state.tokenizer.decode(rollout.completion_ids, skip_special_tokens=True) == "19"
    assert (rollout.completion_ids[-1] == state.tokenizer.eos_token_id) == end
    values = fx.token_values(state.params, collate([rollout], 0), state.apply)
    expected = values.logprobs[collate([rollout], 0).completion_mask]
    terms = policy_terms(state.params, len(expected) + len(rollout.prompt_ids), 1)
    assert_close_to_rounding(torch.tensor(rollout.behaviour_logprobs), expected, terms=terms)
    batch = update_batch(plan, u)
    assert batch.coefficients is not None
    # dr_grpo: A / (N max_completion_length) on each of its tokens.
    assert batch.coefficients[u.batch.completion_mask].tolist() == pytest.approx([-0.1] * len(rollout.completion_ids))


def test_rollout_file_fills_in_missing_advantages(tmp_path: Path) -> None:
    first = rollouts_of(
        tmp_path / "1", SampledBatch("demo/train", num_prompts=6, completions_per_prompt=4), update=True
    )
    path = tmp_path / "r.jsonl"
    write_rollouts(path, first)
    assert rollouts_of(tmp_path / "2", RolloutFile(str(path)), update=True) == first
    write_rollouts(path, [dataclasses.replace(r, advantage=None) for r in first])
    judged = rollouts_of(tmp_path / "3", RolloutFile(str(path)), update=True)
    assert any(r.advantage for r in first)
    assert [r.advantage for r in judged] == pytest.approx(
        [r.advantage for r in first], abs=rounding_bound(torch.float32, 4)
    )
    assert all(r.advantage is None for r in rollouts_of(tmp_path / "4", RolloutFile(str(path))))
    write_rollouts(path, [dataclasses.replace(r, advantage=None if r.group else 7.0, reward=r.reward) for r in first])
    mixed = rollouts_of(tmp_path / "5", RolloutFile(str(path)), update=True)
    assert {r.advantage for r in mixed if r.group == 0} == {7.0}, "an advantage that is given stays"
    assert [r.advantage for r in mixed[4:]] == [r.advantage for r in judged[4:]]


@pytest.mark.slow
def test_run_attributes_custom_sequences(tmp_path: Path) -> None:
    """Two steps: one taught answer moved along its own tokens; U and E need no sampling and no rewards."""
    values = {
        "update": {"prompt": "12+7=", "completion": "19"},
        "evaluations": [{"prompt": "12+7=", "completion": "18"}, {"prompts": ["12+7="], "completions_per_prompt": 4}],
        "eta_multiples": [0.01],
        "scaled_eta_multiples": [],
        "reward": "lengths:length",
    }
    (tmp_path / "lengths.py").write_text(
        "def length(prompts, completions): return [float(len(c)) for c in completions]"
    )
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        assert main(["run", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")]) == 0
    results = fx.load_run(tmp_path / "out")
    assert results.summary["mean_reward"] is None
    assert results.evaluations[1].summary["mean_reward"] > 0
    assert results.sequences[0]["reward"] is None
    assert results.summary["total_stderr"] is None, "a single path has no error bar"
    for evaluation in results.evaluations:
        arrays = evaluation.arrays
        assert abs(arrays["per_sequence"][0]) > 0.01
        assert arrays["grad"][0, 0] / arrays["eta"][0] == pytest.approx(arrays["per_sequence"][0], rel=0.05)
    assert main(["report", str(tmp_path / "out")]) == 0


def test_off_policy_rollouts_serve_as_update_with_ratios(tmp_path: Path) -> None:
    sampled = rollouts_of(
        tmp_path / "1", SampledBatch("demo/train", num_prompts=6, completions_per_prompt=4), update=True
    )
    older = [
        dataclasses.replace(r, behaviour_logprobs=tuple(x - 0.1 * i for i, x in enumerate(r.behaviour_logprobs)))
        for r in sampled
    ]
    write_rollouts(tmp_path / "r.jsonl", older)
    request = RolloutFile(str(tmp_path / "r.jsonl"))
    with pytest.raises(ValueError, match="was not sampled from this policy"):
        rollouts_of(tmp_path / "2", request)
    plan = EntropyInfluencePlan(update=request, evaluations=(request,), clip_range=(0.2, 0.35))
    state, directory = load_state(plan), RunDirectory.start(tmp_path / "run", plan, {})
    u = load_rollouts(plan, state, directory, 0, "u.jsonl", lambda *done: None)
    batch_coefficients = update_batch(plan, u).coefficients
    same = update_batch(plan, u._replace(off_policy=0.0)).coefficients
    assert batch_coefficients is not None
    assert same is not None
    for i, r in enumerate(older):
        ours, plain = batch_coefficients[i][u.batch.completion_mask[i]], same[i][u.batch.completion_mask[i]]
        ratio = torch.tensor([math.exp(0.1 * t) for t in range(len(ours))])
        cut = ratio > 1.35 if (r.advantage or 0) > 0 else torch.zeros(len(ours), dtype=torch.bool)
        # The ratio is that of log-probabilities whose float32 rounding is the model's.
        terms = policy_terms(state.params, u.batch.input_ids.shape[1], 1)
        assert_close_to_rounding(ours, (plain * ratio).masked_fill(cut, 0.0), terms=terms)
    assert (batch_coefficients == 0).any()


def test_trainer_file_serves_as_batch(tmp_path: Path) -> None:
    """verl's texts, tokenised by the checkpoint's tokenizer, with advantages from their scores."""
    sampled = rollouts_of(
        tmp_path / "1", SampledBatch("demo/train", num_prompts=6, completions_per_prompt=4), update=True
    )
    records = [{"input": r.prompt, "output": r.completion, "score": r.reward, "step": 3} for r in sampled]
    (tmp_path / "3.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    read = rollouts_of(tmp_path / "2", RolloutFile(str(tmp_path / "3.jsonl")), update=True)
    assert all(r.approximate for r in read)
    finished = [(a, b) for a, b in zip(read, sampled, strict=True) if b.finished]
    assert [(a.prompt_ids, a.completion_ids) for a, _ in finished] == [
        (b.prompt_ids, b.completion_ids) for _, b in finished
    ]
    assert [r.advantage for r in read] == pytest.approx(
        [r.advantage for r in sampled], abs=rounding_bound(torch.float32, 4)
    )


def test_update_batch_keeps_recorded_coefficients(tmp_path: Path) -> None:
    sampled = rollouts_of(
        tmp_path / "1", SampledBatch("demo/train", num_prompts=2, completions_per_prompt=2), update=True
    )
    write_rollouts(
        tmp_path / "r.jsonl", [dataclasses.replace(r, coefficients=(0.5,) * len(r.completion_ids)) for r in sampled]
    )
    plan = EntropyInfluencePlan(update=RolloutFile(str(tmp_path / "r.jsonl")))
    state, directory = load_state(plan), RunDirectory.start(tmp_path / "run", plan, {})
    batch = update_batch(plan, load_rollouts(plan, state, directory, 0, "u.jsonl", lambda *done: None))
    assert batch.coefficients is not None
    assert torch.equal(batch.coefficients, 0.5 * batch.completion_mask)


def test_load_rollouts_stores_copy_of_rollout_file(tmp_path: Path) -> None:
    first = rollouts_of(
        tmp_path / "1", SampledBatch("demo/train", num_prompts=2, completions_per_prompt=2), update=True
    )
    write_rollouts(tmp_path / "r.jsonl", first)
    again = rollouts_of(tmp_path / "2", RolloutFile(str(tmp_path / "r.jsonl")))
    assert read_native_rollouts(tmp_path / "2" / "run" / "r.jsonl") == again


def test_reward_gets_all_columns_in_every_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first prompt has no answer, and is alone in its task."""
    monkeypatch.setattr(batches, "ROLLOUTS_PER_TASK", 2)
    rollouts = rollouts_of(
        tmp_path, SampledBatch(("1+2=", {"prompt": "3+4=", "answer": "7"}), completions_per_prompt=2)
    )
    assert [r.reward for r in rollouts[:2]] == [0.0, 0.0]


def test_load_state_raises_half_precision_to_float32(tmp_path: Path) -> None:
    plan = EntropyInfluencePlan(dtype="bfloat16", update=FEW, evaluations=(FEW,))
    state, full = load_state(plan), load_state(dataclasses.replace(plan, dtype="auto"))
    for name, p in state.params.items():
        assert p.dtype == torch.float32
        assert torch.equal(p, full.params[name].bfloat16().float())
        assert torch.equal(state.opt_state.exp_avg[name], full.opt_state.exp_avg[name].bfloat16().float())
    directory = RunDirectory.start(tmp_path / "run", plan, {})
    assert load_rollouts(plan, state, directory, 1, "r.jsonl", lambda *done: None).off_policy < rounding_bound(
        torch.float32, policy_terms(state.params, 32, 1), 10
    )
