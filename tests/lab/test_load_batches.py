"""What a plan may ask for as U and as E: prompts by file, by id or written out, one sequence, a file of rollouts."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
import yaml
from helpers.tolerances import assert_close_to_rounding, policy_terms, rounding_bound
from pyarrow import parquet
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import fx_influence as fx
from fx_influence.interop.rewards import math_verify
from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.native_format import read_native_rollouts, write_rollouts
from fx_influence.lab.cli import main
from fx_influence.lab.experiment import entropy as run_module
from fx_influence.lab.inputs import rollouts as batches
from fx_influence.lab.inputs.rollouts import load_rollouts
from fx_influence.lab.inputs.training_state import load_state
from fx_influence.lab.inputs.update import update_batch
from fx_influence.lab.plan import (
    BatchRequest,
    CustomSequence,
    EntropyInfluencePlan,
    PlanError,
    RolloutFile,
    SampledBatch,
    resolved,
)
from fx_influence.lab.store import RunDirectory

GSM8K = [
    {
        "question": "Janet’s ducks lay 16 eggs. She eats 7. How many are left?",
        "answer": "Janet has 16 - 7 = <<16-7=9>>9 eggs left.\\n#### 9",
    },
    {"question": "A robe takes 2 bolts and half of it. How many?", "answer": "2 + 1 = <<2+1=3>>3.\\n#### 3"},
    {"question": "He buys a house for $80,000. For how much?", "answer": "It is $80,000.\\n#### 80,000"},
]
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
    """An untrained policy that writes digits and spaces; its tokenizer puts a bos before every text, like Llama's."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<system>", "<user>", "<assistant>"]
    vocabulary = {token: i for i, token in enumerate([*special, *"0123456789 "])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    named = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=special[4:], **named)
    fast.chat_template = CHAT_TEMPLATE
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen2Config(**sizes, num_key_value_heads=1, vocab_size=len(fast), eos_token_id=1, pad_token_id=0)
        model = Qwen2ForCausalLM(config)
    path = tmp_path / "checkpoint"
    for part in (model, fast):
        part.save_pretrained(path)
    torch.save(torch.optim.AdamW(model.parameters(), lr=1e-3).state_dict(), path / "optimizer.pt")
    return path


def test_a_plan_asks_gsm8k_of_a_chat_model_and_judges_it_by_mathematics(tmp_path: Path, chat_checkpoint: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(GSM8K), tmp_path / "gsm8k.parquet")
    asked = {"prompts": "gsm8k.parquet", "chat": True, "system": "Be brief.", "completions_per_prompt": 32}
    values = {
        "checkpoint": chat_checkpoint.name,
        "reward": "fx_influence.interop.rewards:math_verify",
        "loss": "dr_grpo",
        "max_new_tokens": 4,
        "update": asked,
        "evaluations": [{**asked, "prompt_ids": ["0", "2"], "completions_per_prompt": 4}],
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
    assert 0 < sum(r.reward for r in rollouts) < 64
    assert any(r.advantage for r in rollouts)


def test_prompts_written_out_are_sampled_like_those_of_a_file(tmp_path: Path) -> None:
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


def test_prompts_by_id_are_taken_in_the_order_asked(tmp_path: Path) -> None:
    found = rollouts_of(tmp_path, dataclasses.replace(FEW, prompt_ids=("2", "a")))
    assert [r.prompt_id for r in found] == ["2", "2", "a", "a"]
    assert [r.group for r in found] == [0, 0, 1, 1]


def test_a_seed_of_its_own_makes_a_batch_independent_of_the_plans(tmp_path: Path) -> None:
    many = SampledBatch("demo/eval", num_prompts=8, completions_per_prompt=2)
    own = [rollouts_of(tmp_path / str(k), dataclasses.replace(many, seed=3), seed=k) for k in (0, 1)]
    plans = [rollouts_of(tmp_path / f"p{k}", many, seed=k) for k in (0, 1)]
    assert own[0] == own[1]
    assert plans[0] != plans[1]
    assert own[0] not in plans


def test_pieces_are_the_whole_whatever_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "ROLLOUTS_PER_PIECE", 5)
    found = rollouts_of(tmp_path, SampledBatch("demo/eval", completions_per_prompt=2, num_prompts=7))
    assert [r.group for r in found] == [k // 2 for k in range(14)]
    assert len({r.id for r in found}) == 14
    assert len({r.prompt_id for r in found}) == 7
    assert [path.name for path in (tmp_path / "run").glob("r_*")] == []


@pytest.mark.parametrize("end", [True, False])
def test_one_sequence_written_out_is_scored_as_it_stands(tmp_path: Path, end: bool) -> None:
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


def test_a_file_of_rollouts_is_taken_as_it_is_and_judged_where_it_is_not(tmp_path: Path) -> None:
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


def test_a_whole_run_on_given_sequences_attributes_them(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"prompts": ["1+1="], "prompt_ids": ["7"]}, r"prompt_ids has '7', which is not among the 1 ids of 'prompts'"),
        ({"prompts": ["1+1="], "prompt_ids": ["0", "0"]}, r"prompt_ids is \['0', '0'\], with an id twice"),
        ({"prompts": ["1+1="], "num_prompts": 2}, r"num_prompts is 2 but 'prompts' holds 1; ask for fewer"),
        ({"prompts": ["1+1=", {"prompt": "2+2=", "id": "0"}]}, r"prompt 1: id '0' is already the id of prompt 0"),
        ({"prompts": [{"text": "1"}]}, r'prompt 0 has no "prompt", "messages" or "question"'),
        ({"prompt": "1+1=", "completion": "", "end": False}, r"completion is '', which has no tokens"),
        ({"prompt": "", "completion": "2"}, r"has no tokens; give a text that has some"),
        ({"prompt": "1+1=", "completion": "2" * 70}, r"passes the model's 64 positions"),
        ({"rollouts": "absent.jsonl"}, r"rollouts file .*absent\.jsonl' does not exist"),
        ({"rollouts": "empty.jsonl"}, r"empty\.jsonl' holds no rollout"),
        ({"rollouts": "twice.jsonl"}, r"twice\.jsonl' gives 1 ids to more than one rollout: x; ids must be unique"),
        ({"rollouts": "unjudged.jsonl"}, r"rollout 'x' of .*unjudged\.jsonl' has no reward, which group 0 lacks"),
        ({"rollouts": "foreign.jsonl"}, r"rollout 'x' of .*foreign\.jsonl' has token 999, the model 15"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_before_the_long_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    update: dict[str, Any],
    message: str,
) -> None:
    record = {"id": "x", "prompt_id": "0", "group": 0, "prompt": "1+1=", "completion": "2", "prompt_ids": [4, 5]}
    record |= {"completion_ids": [6, 1], "finished": True, "behaviour_logprobs": [-9.0, -9.0]}
    lines = {"empty": [], "twice": [record] * 2, "unjudged": [record]}
    lines["foreign"] = [record | {"advantage": 1.0, "prompt_ids": [4, 999]}]
    for name, records in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    values = {"update": update, "evaluations": [{"prompts": "demo/eval", "num_prompts": 2}]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(run_module, "first_order", lambda *args: pytest.fail("the long work began"))
    assert main(["run", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_rollouts_of_an_older_policy_are_no_evaluation_but_an_update_with_ratios(tmp_path: Path) -> None:
    own = rollouts_of(tmp_path / "1", SampledBatch("demo/train", num_prompts=6, completions_per_prompt=4), update=True)
    older = [
        dataclasses.replace(r, behaviour_logprobs=tuple(x - 0.1 * i for i, x in enumerate(r.behaviour_logprobs)))
        for r in own
    ]
    write_rollouts(tmp_path / "r.jsonl", older)
    request = RolloutFile(str(tmp_path / "r.jsonl"))
    with pytest.raises(ValueError, match="was not sampled from this policy"):
        rollouts_of(tmp_path / "2", request)
    plan = EntropyInfluencePlan(update=request, evaluations=(request,), clip_range=(0.2, 0.35))
    state, directory = load_state(plan), RunDirectory.start(tmp_path / "run", plan, {})
    u = load_rollouts(plan, state, directory, 0, "u.jsonl", lambda *done: None)
    found = update_batch(plan, u).coefficients
    same = update_batch(plan, u._replace(off_policy=0.0)).coefficients
    assert found is not None
    assert same is not None
    for i, r in enumerate(older):
        ours, plain = found[i][u.batch.completion_mask[i]], same[i][u.batch.completion_mask[i]]
        ratio = torch.tensor([math.exp(0.1 * t) for t in range(len(ours))])
        cut = ratio > 1.35 if (r.advantage or 0) > 0 else torch.zeros(len(ours), dtype=torch.bool)
        # The ratio is that of log-probabilities whose float32 rounding is the model's.
        terms = policy_terms(state.params, u.batch.input_ids.shape[1], 1)
        assert_close_to_rounding(ours, (plain * ratio).masked_fill(cut, 0.0), terms=terms)
    assert (found == 0).any()


def test_a_trainers_own_file_serves_as_a_batch(tmp_path: Path) -> None:
    """verl's texts, tokenised by the checkpoint's tokenizer, with advantages from their scores."""
    own = rollouts_of(tmp_path / "1", SampledBatch("demo/train", num_prompts=6, completions_per_prompt=4), update=True)
    records = [{"input": r.prompt, "output": r.completion, "score": r.reward, "step": 3} for r in own]
    (tmp_path / "3.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    read = rollouts_of(tmp_path / "2", RolloutFile(str(tmp_path / "3.jsonl")), update=True)
    assert all(r.approximate for r in read)
    finished = [(a, b) for a, b in zip(read, own, strict=True) if b.finished]
    assert [(a.prompt_ids, a.completion_ids) for a, _ in finished] == [
        (b.prompt_ids, b.completion_ids) for _, b in finished
    ]
    assert [r.advantage for r in read] == pytest.approx(
        [r.advantage for r in own], abs=rounding_bound(torch.float32, 4)
    )


def test_rollouts_with_coefficients_of_their_own_keep_them(tmp_path: Path) -> None:
    own = rollouts_of(tmp_path / "1", SampledBatch("demo/train", num_prompts=2, completions_per_prompt=2), update=True)
    write_rollouts(
        tmp_path / "r.jsonl", [dataclasses.replace(r, coefficients=(0.5,) * len(r.completion_ids)) for r in own]
    )
    plan = EntropyInfluencePlan(update=RolloutFile(str(tmp_path / "r.jsonl")))
    state, directory = load_state(plan), RunDirectory.start(tmp_path / "run", plan, {})
    batch = update_batch(plan, load_rollouts(plan, state, directory, 0, "u.jsonl", lambda *done: None))
    assert batch.coefficients is not None
    assert torch.equal(batch.coefficients, 0.5 * batch.completion_mask)


def test_a_run_of_given_rollouts_holds_a_copy_of_them(tmp_path: Path) -> None:
    first = rollouts_of(
        tmp_path / "1", SampledBatch("demo/train", num_prompts=2, completions_per_prompt=2), update=True
    )
    write_rollouts(tmp_path / "r.jsonl", first)
    again = rollouts_of(tmp_path / "2", RolloutFile(str(tmp_path / "r.jsonl")))
    assert read_native_rollouts(tmp_path / "2" / "run" / "r.jsonl") == again


def test_a_reward_gets_the_columns_of_all_prompts_however_sampling_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first prompt has no answer, and is alone in its piece."""
    monkeypatch.setattr(batches, "ROLLOUTS_PER_PIECE", 2)
    found = rollouts_of(tmp_path, SampledBatch(("1+2=", {"prompt": "3+4=", "answer": "7"}), completions_per_prompt=2))
    assert [r.reward for r in found[:2]] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("request_", "reward", "absent", "message"),
    [
        ({"prompts": [{"prompt": "1+1=", "gold": "2"}]}, "exact_match", "", r"columns \['gold'\]: missing .* 'answer'"),
        ({"prompts": [{"prompt": "1+1=", "gold": "2"}]}, "math_verify", "", r'needs a column "answer" or "solution"'),
        ({"prompts": "g.parquet"}, "math_verify", "math_verify", r"pip install 'fx-influence\[math\]'"),
        ({"prompts": "g.parquet"}, "math_verify", "pyarrow", r"pip install 'fx-influence\[parquet\]'"),
        ({"prompts": "g.parquet", "system": "s"}, "math_verify", "", r"'0' is a plain text; set chat: true"),
        ({"prompts": "g.parquet", "chat": True}, "math_verify", "", r"'0' is a conversation, but the tokenizer has no"),
        (
            {"prompts": [{"messages": [{"role": "user", "content": "?"}]}, "?"]},
            "exact_match",
            "",
            r"set chat: true, or",
        ),
    ],
)
def test_what_a_reward_a_file_or_a_conversation_needs_is_missed_before_sampling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: dict[str, Any], reward: str, absent: str, message: str
) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(GSM8K), tmp_path / "g.parquet")
    values = {"update": CustomSequence("1+1=", "2"), "evaluations": [request_]}
    plan = EntropyInfluencePlan(**values, reward=f"fx_influence.interop.rewards:{reward}")
    if absent:
        monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises((ValueError, ImportError), match=message):
        load_state(resolved(plan, tmp_path))


@pytest.mark.parametrize("device", ["cuda:99", "nowhere"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    with pytest.raises(PlanError, match=rf"device is '{device}', which cannot be used here"):
        load_state(EntropyInfluencePlan(device=device))


def test_half_precision_weights_are_computed_with_in_float32(tmp_path: Path) -> None:
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
