"""Rollouts from the files of trainers, written as ``rollout_writers`` says: what is read, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rollout_writers import (
    BOS,
    EOS,
    PAD,
    ids,
    make_tokenizer,
    write_nemo_rl,
    write_prime_rl,
    write_trl,
    write_verl,
)

from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.native_format import write_rollouts
from fx_influence.interop.rollouts.read import read_rollouts
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.losses import group_advantages

TOKENIZER = make_tokenizer()
PROMPT = ids("1+1=")
SAMPLED = (*ids("2"), EOS)
TOOL = ids("[9]")


def prime_record(index: int = 0, **changes: Any) -> dict[str, Any]:
    """What the exporter writes of prompt, answer, a tool's output and a last answer."""
    tokens = [*PROMPT, *SAMPLED, *TOOL, *SAMPLED]
    mask = [False] * 4 + [True] * 2 + [False] * 3 + [True] * 2
    record = {
        "schema_version": 1,
        "step": 6,
        "export_step": 7,
        "rank": 1,
        "micro_step": 0,
        "micro_sequence_idx": 0,
        "export_sequence_idx": index,
        "run_id": None,
        "env_name": "sums",
        "token_ids": tokens,
        "position_ids": list(range(len(tokens))),
        "loss_mask": mask,
        "advantages": [0.5] * len(tokens),
        "inference_logprobs": [-0.25 if sampled else 0.0 for sampled in mask],
        "trainer_logprobs": [None] + [-0.5] * (len(tokens) - 1),
        "rl_weights": [None] * len(tokens),
        "ce_weights": [None] * len(tokens),
        "ref_kl_weights": [None] * len(tokens),
    }
    return {**record, **changes}


def nemo_batch(**changes: Any) -> dict[str, list[Any]]:
    """Two samples of one prompt, of 6 and 5 tokens, padded to 8."""
    batch = {
        "content": [["1+1=", "2"], ["1+1=", ""]],
        "rewards": [1.0, 0.0],
        "input_lengths": [6, 5],
        "token_ids": [[*PROMPT, *SAMPLED, PAD, PAD], [*PROMPT, EOS, PAD, PAD, PAD]],
        "token_loss_mask": [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0]],
        "sample_loss_mask": [1.0, 1.0],
        "advantages": [[0.7] * 8, [-0.7] * 8],
        "generation_logprobs": [[0.0] * 4 + [-0.5, -0.25, 0.0, 0.0], [0.0] * 4 + [-2.0, 0.0, 0.0, 0.0]],
        "prev_logprobs": [[0.0] * 8, [0.0] * 8],
    }
    return {**batch, **changes}


VERL = {"input": ["1+1=", "1+1=", "3="], "output": ["2", "3", "3"], "score": [1.0, 0.0, 0.25]}


def own() -> Rollout:
    return Rollout("p/0", "p", 0, "1+1=", "2", PROMPT, SAMPLED, True, (-0.5, -0.25))


# --- prime-rl


def test_prime_rl_is_read_token_by_token(tmp_path: Path) -> None:
    (rollout,) = read_rollouts(write_prime_rl(tmp_path / "rank_1.jsonl", [prime_record()]))
    assert rollout == Rollout(
        id="7/1/0",
        prompt_id="0",
        group=0,
        prompt="",
        completion="",
        prompt_ids=PROMPT,
        completion_ids=(*SAMPLED, *TOOL, *SAMPLED),
        finished=False,
        behaviour_logprobs=(-0.25, -0.25, 0.0, 0.0, 0.0, -0.25, -0.25),
        advantage=0.5,
        completion_mask=(True, True, False, False, False, True, True),
    )
    assert collate([rollout], PAD).completion_mask[0].tolist() == prime_record()["loss_mask"]


def test_prime_rl_tokenizer_gives_texts_and_end(tmp_path: Path) -> None:
    cut = prime_record(1)
    cut["token_ids"] = [*PROMPT, *SAMPLED, *TOOL, *ids("22")]
    whole, cut_off = read_rollouts(write_prime_rl(tmp_path / "r.jsonl", [prime_record(), cut]), TOKENIZER)
    assert (whole.prompt, whole.completion, whole.finished) == ("1+1=", "2[9]2", True)
    assert (cut_off.completion, cut_off.finished) == ("2[9]22", False)


def test_prime_rl_first_version_has_rewards(tmp_path: Path) -> None:
    record = prime_record(rewards=[1.5] * 11, training_mode="rl")
    for name in ("export_step", "run_id", "rl_weights", "ce_weights", "ref_kl_weights"):
        del record[name]
    (rollout,) = read_rollouts(write_prime_rl(tmp_path / "r.jsonl", [record]))
    assert (rollout.id, rollout.reward) == ("6/1/0", 1.5)


def test_prime_rl_weights_scale_the_advantage(tmp_path: Path) -> None:
    record = prime_record(rl_weights=[0.0] * 4 + [3.0] * 2 + [0.0] * 3 + [3.0] * 2, rewards=[None] * 11)
    (rollout,) = read_rollouts(write_prime_rl(tmp_path / "r.jsonl", [record]))
    assert (rollout.advantage, rollout.reward) == (1.5, None)


def test_prime_rl_groups_equal_prompts_of_all_ranks(tmp_path: Path) -> None:
    other = prime_record(rank=10, token_ids=[*ids("2+1="), *prime_record()["token_ids"][4:]])
    write_prime_rl(tmp_path / "rank_10.jsonl", [other, prime_record(1, rank=10)])
    write_prime_rl(tmp_path / "rank_9.jsonl", [prime_record(rank=9)])
    rollouts = read_rollouts(tmp_path)
    assert [(r.id, r.group, r.prompt_id) for r in rollouts] == [
        ("7/9/0", 0, "0"),
        ("7/10/0", 1, "1"),
        ("7/10/1", 0, "0"),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "'schema_version' is 2; only version 1"),
        ({"training_mode": "sft"}, "'training_mode' says that another loss"),
        ({"ce_weights": [0.0] * 10 + [0.1]}, "'ce_weights' says that another loss"),
        ({"ref_kl_weights": [0.1] * 11}, "'ref_kl_weights' says that another loss"),
        ({"advantages": [0.5] * 10 + [0.25]}, r"'advantages' differs .*\[0.25, 0.5\]"),
        ({"advantages": [None] * 11}, "the advantage of a sampled token is null"),
        ({"inference_logprobs": [None] * 11}, "the log-prob of a sampled token is null"),
        ({"inference_logprobs": [-0.5] * 10}, "10 values of logprobs for 11 token ids"),
        ({"rl_weights": [1.0]}, "1 rl_weights for 11 advantages"),
        ({"loss_mask": [1] * 11}, "field 'loss_mask' holds 1 at 0; it must hold booleans only"),
        ({"token_ids": [*PROMPT, *SAMPLED, *TOOL, 4.0, 5]}, "field 'token_ids' holds 4.0 at 9"),
        ({"token_ids": [True] * 11}, "field 'token_ids' holds True at 0; it must hold integers only"),
        ({"token_ids": [-1] * 11}, "token id -1 is negative"),
        ({"token_ids": "2"}, "field 'token_ids' is '2'; it must be a list of integers"),
        ({"rank": None}, "field 'rank' is None; it must be an integer"),
    ],
)
def test_prime_rl_refuses_inconsistent_record(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_prime_rl(tmp_path / "r.jsonl", [prime_record(), prime_record(1, **changes)])
    with pytest.raises(ValueError, match=f"r.jsonl, line 2: .*{message}"):
        read_rollouts(path)


# --- NeMo-RL


def test_nemo_rl_is_read_without_padding(tmp_path: Path) -> None:
    first, second = read_rollouts(write_nemo_rl(tmp_path / "train_data_step3.jsonl", nemo_batch()), TOKENIZER)
    assert first == Rollout(
        id="0",
        prompt_id="0",
        group=0,
        prompt="1+1=",
        completion="2",
        prompt_ids=PROMPT,
        completion_ids=SAMPLED,
        finished=True,
        behaviour_logprobs=(-0.5, -0.25),
        reward=1.0,
        advantage=0.7,
    )
    assert (second.id, second.group, second.completion_ids, second.advantage) == ("1", 0, (EOS,), -0.7)


def test_nemo_rl_masks_sample_left_out_of_loss(tmp_path: Path) -> None:
    path = write_nemo_rl(tmp_path / "r.jsonl", nemo_batch(sample_loss_mask=[1.0, 0.0]))
    assert [r.completion_mask for r in read_rollouts(path)] == [None, (False,)]


def test_nemo_rl_sample_without_sampled_token_is_prompt(tmp_path: Path) -> None:
    batch = nemo_batch(token_loss_mask=[[0] * 8, [0] * 8])
    rollout = read_rollouts(write_nemo_rl(tmp_path / "r.jsonl", batch), TOKENIZER)[0]
    assert (rollout.prompt_ids, rollout.completion_ids) == ((*PROMPT, *SAMPLED), ())
    assert (rollout.finished, rollout.advantage) == (False, 0.7)


def test_nemo_rl_uses_filtered_rewards(tmp_path: Path) -> None:
    batch = nemo_batch(filtered_rewards=[0.5, 0.25], rewards=[9.0, 9.0, 9.0, 9.0])
    assert [r.reward for r in read_rollouts(write_nemo_rl(tmp_path / "r.jsonl", batch))] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantages": [[0.7] * 8, [0.1] * 4 + [0.2] * 4], "token_loss_mask": [[1] * 8] * 2}, "'advantages' differs"),
        ({"input_lengths": [6, 9]}, "'input_lengths' is 9, but field 'token_loss_mask' has 8 values"),
        ({"token_loss_mask": [[0] * 8, [0, 0, 0, 0, 2, 0, 0, 0]]}, "'token_loss_mask' holds 2; it must be 0 or 1"),
        ({"sample_loss_mask": [1.0, 0.5]}, "'sample_loss_mask' holds 0.5; it must be 0 or 1"),
        ({"rewards": [1.0]}, "'rewards' holds 0 values; NeMo-RL writes a list of one"),
    ],
)
def test_nemo_rl_refuses_inconsistent_record(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_nemo_rl(tmp_path / "r.jsonl", nemo_batch(**changes))
    with pytest.raises(ValueError, match=f"r.jsonl, line 2: .*{message}"):
        read_rollouts(path)


# --- verl


def test_verl_groups_equal_inputs(tmp_path: Path) -> None:
    rollouts = read_rollouts(write_verl(tmp_path / "5.jsonl", VERL), TOKENIZER)
    assert rollouts[0] == Rollout(
        id="0",
        prompt_id="0",
        group=0,
        prompt="1+1=",
        completion="2",
        prompt_ids=(BOS, *PROMPT),
        completion_ids=SAMPLED,
        finished=True,
        reward=1.0,
        advantage=rollouts[0].advantage,
        approximate=True,
    )
    expected = group_advantages(torch.tensor(VERL["score"], dtype=torch.float64), torch.tensor([0, 0, 1]))
    assert [r.advantage for r in rollouts] == expected.tolist()
    assert [(r.id, r.group) for r in rollouts] == [("0", 0), ("1", 0), ("2", 1)]


def test_verl_advantages_are_unscaled_on_request(tmp_path: Path) -> None:
    path = write_verl(tmp_path / "5.jsonl", VERL)
    assert [r.advantage for r in read_rollouts(path, TOKENIZER, scale=False)] == [0.5, -0.5, 0.0]


def test_verl_equal_inputs_of_two_steps_are_two_groups(tmp_path: Path) -> None:
    one, two = (write_verl(tmp_path / f"{step}.jsonl", VERL, step).read_text() for step in (5, 6))
    (tmp_path / "both.jsonl").write_text(one + two)
    assert [r.group for r in read_rollouts(tmp_path / "both.jsonl", TOKENIZER)] == [0, 0, 1, 2, 2, 3]


def test_verl_uid_decides_groups_and_last_outputs(tmp_path: Path) -> None:
    uid = ["a_0_0", "a_0_1", "a_1_0", "b_0_0", "b_1_0"]
    batch = {"input": ["1+1="] * 5, "output": ["1", "2", "3", "4", "5"], "score": [9.0, 1.0, 0.0, 1.0, 0.0], "uid": uid}
    rollouts = read_rollouts(write_verl(tmp_path / "5.jsonl", batch), TOKENIZER, scale=False)
    assert [(r.id, r.group, r.advantage) for r in rollouts] == [
        ("a_0_0", 0, 0.5),
        ("a_0_1", 0, 0.5),
        ("a_1_0", 0, -0.5),
        ("b_0_0", 1, 0.5),
        ("b_1_0", 1, -0.5),
    ]


def test_verl_uid_without_session_decides_groups(tmp_path: Path) -> None:
    path = write_verl(tmp_path / "5.jsonl", {**VERL, "uid": ["x-1", "x-2", "x-1"]})
    assert [(r.id, r.group) for r in read_rollouts(path, TOKENIZER)] == [("0", 0), ("1", 1), ("2", 0)]


def test_verl_truncated_completion_has_no_eos(tmp_path: Path) -> None:
    path = write_verl(tmp_path / "5.jsonl", {**VERL, "output": ["12", "345", "6"], "truncated": [None, False, True]})
    rollouts = read_rollouts(path, TOKENIZER, max_completion_length=2)
    assert [(r.completion_ids, r.finished) for r in rollouts] == [
        (ids("12"), False),
        ((*ids("345"), EOS), True),
        (ids("6"), False),
    ]


def test_verl_keeps_text_with_unknown_tokens(tmp_path: Path) -> None:
    path = write_verl(tmp_path / "5.jsonl", {**VERL, "output": ["é2"] * 3})
    rollout = read_rollouts(path, TOKENIZER)[0]
    assert (rollout.completion, rollout.completion_ids) == ("é2", (PAD, *SAMPLED))


def test_verl_does_not_double_eos_in_text(tmp_path: Path) -> None:
    path = write_verl(tmp_path / "5.jsonl", {**VERL, "output": ["2<|im_end|>"] * 3})
    assert read_rollouts(path, TOKENIZER)[0].completion_ids == SAMPLED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": [1.0, "high", 0.0]}, "field 'score' is 'high'; it must be a number"),
        ({"score": [1.0, True, 0.0]}, "field 'score' is True"),
        ({"score": [1.0, 10**400, 0.0]}, "int too large"),
        ({"output": ["2", None, "3"]}, "field 'output' is None; it must be a string"),
        ({"truncated": [None, "yes", None]}, "field 'truncated' is 'yes'; it must be a boolean"),
    ],
)
def test_verl_refuses_field_of_another_type(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_verl(tmp_path / "5.jsonl", {**VERL, **changes})
    with pytest.raises(ValueError, match=f"5.jsonl, line 2: .*{message}"):
        read_rollouts(path, TOKENIZER)


def test_verl_needs_tokenizer_with_eos(tmp_path: Path) -> None:
    path = write_verl(tmp_path / "5.jsonl", VERL)
    with pytest.raises(ValueError, match="tokenizer is None, but this file holds texts"):
        read_rollouts(path)
    with pytest.raises(ValueError, match=r"tokenizer.eos_token is None"):
        read_rollouts(path, make_tokenizer(eos=None))


# --- TRL


def test_trl_keeps_recorded_advantage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_trl(
        tmp_path,
        monkeypatch,
        prompt=["1+1=", "3=", "1+1="],
        completion=["2", "3", ""],
        rewards={"exact": [1.0, float("nan"), 0.0]},
        extra={"source": ["a", "b", "c"]},
        advantages=[0.7, 0.0, -0.7],
    )
    rollouts = read_rollouts(path, TOKENIZER)
    assert rollouts[0] == Rollout(
        id="0",
        prompt_id="0",
        group=0,
        prompt="1+1=",
        completion="2",
        prompt_ids=(BOS, *PROMPT),
        completion_ids=SAMPLED,
        finished=True,
        reward=1.0,
        advantage=0.7,
        approximate=True,
    )
    assert [(r.group, r.completion_ids, r.reward) for r in rollouts[1:]] == [
        (1, (*ids("3"), EOS), None),
        (0, (EOS,), 0.0),
    ]


def chat(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def call(name: str, **arguments: int) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


def test_trl_renders_conversation_by_chat_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_trl(
        tmp_path,
        monkeypatch,
        prompt=[[chat("user", "1+1?")], [chat("system", "sum"), chat("user", "2?")]],
        completion=[[chat("assistant", " 2")], [chat("assistant", "2")]],
        rewards={"exact": [1.0, 0.0]},
        advantages=[0.7, -0.7],
    )
    first, second = read_rollouts(path, TOKENIZER)
    assert first.prompt == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert first.prompt_ids == ids(first.prompt)
    assert (first.completion, first.completion_ids) == (" 2", (*ids(" 2"), EOS))
    assert second.prompt.startswith("<|im_start|>system\nsum<|im_end|>\n<|im_start|>user")
    given = read_rollouts(path, TOKENIZER, chat_template_kwargs={"opening": "<think>"})
    assert given[0].prompt == first.prompt + "<think>"


def test_trl_masks_output_of_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [call("add", x=1), chat("tool", "2"), chat("assistant", "two")]
    # In the file's columns, every call has the arguments of all, null where it had none.
    other = [call("neg", y=2)]
    path = write_trl(
        tmp_path,
        monkeypatch,
        prompt=[[chat("user", "1+1?")]] * 4,
        completion=[turns, turns[:2], other, [chat("assistant", "2")]],
        rewards={"exact": [1.0, 0.0, 0.0, 0.0]},
        advantages=[0.5, 0.0, 0.0, -0.5],
    )
    whole, stopped, single, plain = read_rollouts(path, TOKENIZER)
    asked, answer = (*ids("[add{'x': 1}]"), EOS), (*ids("two"), EOS)
    between = ids("\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n")
    assert whole.completion_ids == (*asked, *between, *answer)
    assert whole.completion_mask == (True,) * len(asked) + (False,) * len(between) + (True,) * len(answer)
    assert (whole.finished, stopped.finished) == (True, False)
    assert whole.completion == "[add{'x': 1}]\ntool\n2\nassistant\ntwo"
    left = ids("\n<|im_start|>tool\n2<|im_end|>\n")
    assert stopped.completion_ids == (*asked, *left)
    assert stopped.completion_mask == (True,) * len(asked) + (False,) * len(left)
    assert (single.completion, single.finished) == ("[neg{'y': 2}]", True)
    assert (single.completion_mask, plain.completion_mask) == (None, None)


def test_trl_refuses_template_that_rewrites_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [chat("assistant", "1"), chat("tool", "2"), chat("assistant", "two")]
    columns = {"prompt": [[chat("user", "1+1?")]], "completion": [turns], "rewards": {}, "advantages": [0.5]}
    path = write_trl(tmp_path, monkeypatch, **columns)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(ValueError, match="row 0: the tokenizer's chat template rewrites earlier turns"):
        read_rollouts(path, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no tools') }}"
    with pytest.raises(ValueError, match="row 0: the tokenizer's chat template refuses the messages: no tools"):
        read_rollouts(path, tokenizer)


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        ([chat("user", "?")], [{"content": "2"}], "field 'completion' is .*a list of messages with a role"),
        ([{"role": "user", "content": [{"type": "image"}]}], [chat("assistant", "2")], "'prompt' holds something else"),
        ("1+1=", [call("add", x=1)], "messages but the prompt a text"),
    ],
)
def test_trl_refuses_messages_without_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: Any, completion: Any, message: str
) -> None:
    path = write_trl(tmp_path, monkeypatch, prompt=[prompt], completion=[completion], advantages=[0.0])
    with pytest.raises(ValueError, match=f"row 0: .*{message}"):
        read_rollouts(path, TOKENIZER)


def test_trl_rewards_add_up_by_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_trl(
        tmp_path,
        monkeypatch,
        prompt=["1+1="] * 2,
        completion=["2"] * 2,
        rewards={"exact": [1.0, float("nan")], "format": [0.5, 0.25]},
        extra={"length": [1, 1]},
        advantages=[0.5, -0.5],
    )
    assert [r.reward for r in read_rollouts(path, TOKENIZER)] == [None, None]
    assert [r.reward for r in read_rollouts(path, TOKENIZER, reward_weights={"exact": 2.0, "format": 4.0})] == [
        4.0,
        1.0,
    ]
    with pytest.raises(ValueError, match=r"reward_weights names \['exakt'\]; .*\['exact', 'format', 'length'\]"):
        read_rollouts(path, TOKENIZER, reward_weights={"exakt": 1.0})


def test_trl_refuses_rows_with_not_finite_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_trl(
        tmp_path,
        monkeypatch,
        prompt=["1+1="] * 3,
        completion=["2"] * 3,
        rewards={"exact": [1.0, float("inf"), 0.0]},
        advantages=[0.5, -0.5, float("nan")],
    )
    with pytest.raises(ValueError, match="column 'exact' holds inf") as caught:
        read_rollouts(path, TOKENIZER)
    assert [line.partition(": ")[0][-5:] for line in str(caught.value).splitlines()] == ["row 1", "row 2"]
    assert "field 'advantage' is None; it must be a number; pandas writes NaN as null" in str(caught.value)


def test_trl_refuses_other_parquet_or_no_parquet(tmp_path: Path) -> None:
    import pandas

    path = tmp_path / "other.parquet"
    pandas.DataFrame({"prompt": ["1"], "reward": [1.0]}).to_parquet(path)
    with pytest.raises(ValueError, match=r"columns \['prompt', 'reward'\]; .*missing: \['step', 'completion', 'adv"):
        read_rollouts(path, TOKENIZER)
    path.write_text("no parquet")
    with pytest.raises(ValueError, match=r"other\.parquet' is not parquet"):
        read_rollouts(path, TOKENIZER)


def test_trl_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "completions_00010.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"^reading parquet needs pyarrow: pip install 'fx-influence\[parquet\]'$"):
        read_rollouts(tmp_path / "completions_00010.parquet", TOKENIZER)


# --- Any format


def test_native_format_is_detected(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "r.jsonl", [own()])
    assert read_rollouts(tmp_path / "r.jsonl") == [own()]


def test_format_argument_overrides_suffix(tmp_path: Path) -> None:
    path = write_prime_rl(tmp_path / "export.log", [prime_record()])
    with pytest.raises(ValueError, match=r"export.log' is no .jsonl and no .parquet; give its format with format="):
        read_rollouts(path)
    assert len(read_rollouts(path, format="prime_rl")) == 1
    with pytest.raises(ValueError, match="no field 'input_lengths'"):
        read_rollouts(path, format="nemo_rl")
    with pytest.raises(ValueError, match=r"format is 'slime'; use one of fx_influence, prime_rl, nemo_rl, verl, trl"):
        read_rollouts(path, format="slime")  # type: ignore[arg-type]


def test_unknown_format_is_refused_with_fields(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"trace_id": "x", "nodes": []}\n')
    with pytest.raises(ValueError, match=r"first record has \['nodes', 'trace_id'\]; expected .* verl: input, output"):
        read_rollouts(tmp_path / "t.jsonl")


def test_read_rollouts_names_and_counts_malformed_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    good = json.dumps(prime_record())
    bad = [
        good[:-1],
        "[1]",
        json.dumps(prime_record(advantages=[float("nan")] * 11)),
        good.replace("-0.25", "1e999"),
        "[" * 100_000,
        b"\xff{}".decode("latin-1"),
    ]
    path.write_text("\n".join([good, "", *bad]), encoding="latin-1")
    with pytest.raises(ValueError, match="line 3: this is not JSON") as caught:
        read_rollouts(path)
    lines = str(caught.value).splitlines()
    assert [line.split(", line ")[1].partition(":")[0] for line in lines] == ["3", "4", "5", "6", "7", "8"]
    assert "holds the number NaN" in lines[2]
    assert "holds the number 1e999" in lines[3]
    assert "not UTF-8" in lines[5]

    path.write_text("\n".join([good] + ["{"] * 13))
    with pytest.raises(ValueError, match="line 2: this is not JSON") as caught:
        read_rollouts(path)
    lines = str(caught.value).splitlines()
    assert (len(lines), lines[-1]) == (11, "and 3 more, 13 in all")


def test_read_rollouts_names_lines_of_file_without_object(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("\nno json\n")
    with pytest.raises(ValueError, match=r"r.jsonl, line 2: this is not JSON"):
        read_rollouts(tmp_path / "r.jsonl")


@pytest.mark.parametrize("format", [None, "prime_rl", "nemo_rl", "verl"])
def test_read_rollouts_refuses_file_without_rollouts(tmp_path: Path, format: Any) -> None:
    (tmp_path / "r.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"r.jsonl' holds no rollout"):
        read_rollouts(tmp_path / "r.jsonl", TOKENIZER, format=format)


def test_read_rollouts_refuses_repeated_ids(tmp_path: Path) -> None:
    path = write_prime_rl(tmp_path / "r.jsonl", [prime_record(0), prime_record(1), prime_record(0)])
    with pytest.raises(ValueError, match="gives 1 ids to more than one rollout: 7/1/0; ids must be unique"):
        read_rollouts(path)
    write_rollouts(tmp_path / "own.jsonl", [own(), dataclasses.replace(own(), group=1)])
    with pytest.raises(ValueError, match="more than one rollout: p/0"):
        read_rollouts(tmp_path / "own.jsonl")


def test_read_rollouts_names_missing_file_or_ranks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'.*none.jsonl' does not exist"):
        read_rollouts(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="nor is it a directory of rank"):
        read_rollouts(tmp_path)
