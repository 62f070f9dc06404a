"""Rollout files as trainers write them, each after the writing code that its reader cites."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from helpers.rollout_writers import EOS, PROMPT, SAMPLED, TOOL, ids


def write_lines(path: Path, *records: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def open_instruct_record(sample: int, **changes: Any) -> dict[str, Any]:
    """Return ``asdict(RolloutRecord)``: two samples a prompt."""
    record = {
        "step": 4,
        "sample_idx": sample,
        "prompt_idx": sample // 2,
        "prompt_tokens": list(PROMPT),
        "response_tokens": list(SAMPLED),
        "reward": 10.0 * sample,
        "advantage": sample - 0.5,
        "finish_reason": "stop" if sample else "length",
        "dataset": ["gsm8k"],
        "ground_truth": None,
        "request_info": {"tool_calleds": False, "num_calls": 0},
        "logprobs": [-0.5, -0.25],
    }
    return {**record, **changes}


def slime_sample(index: int, **changes: Any) -> dict[str, Any]:
    """Return ``Sample.to_dict()``: a prompt, an answer, a tool's output and a last answer."""
    sample = {
        "group_index": index // 2,
        "index": index,
        "prompt": "1+1=",
        "tokens": torch.tensor([*PROMPT, *SAMPLED, *TOOL, *SAMPLED]),
        "response": "2[9]2",
        "response_length": 7,
        "reward": float(index),
        "loss_mask": [1, 1, 0, 0, 0, 1, 1],
        "rollout_log_probs": [-0.5] * 7,
        "remove_sample": False,
        "status": "completed",
        "metadata": {"data_source": "dapo"},
        "train_metadata": None,
        "spec_info": {"spec_verify_ct": 0},
    }
    return {**sample, **changes}


def write_slime(path: Path, samples: list[dict[str, Any]], rollout_id: int = 3) -> Path:
    torch.save({"rollout_id": rollout_id, "samples": samples}, path)
    return path


def episode(name: str, **changes: Any) -> dict[str, Any]:
    """Return ``Episode.to_record()``: a question, an answer, a tool's output and two other last answers."""
    nodes = [
        {"message": {"role": "user"}, "token_ids": list(PROMPT), "mask": [False] * 4},
        {
            "parent": 0,
            "sampled": True,
            "message": {"role": "assistant"},
            # the generation prompt's scaffold, then what was sampled
            "token_ids": [7, *SAMPLED],
            "mask": [False, True, True],
            "logprobs": [-0.5, -0.25],
            "advantages": [0.5, 0.5],
        },
        {"parent": 1, "message": {"role": "tool"}, "token_ids": list(TOOL), "mask": [False] * 3},
        *(
            {
                "parent": 2,
                "sampled": True,
                "message": {"role": "assistant"},
                "token_ids": [*ids(answer), EOS],
                "mask": [True, True],
                "logprobs": [-1.0, -2.0],
                "advantages": [0.5, 0.5],
            }
            for answer in "34"
        ),
    ]
    trace = {
        "id": name,
        "task": {"type": "T", "data": {}, "key": "task-1"},
        "agent": {"name": "solver", "trainable": True},
        "nodes": nodes,
        "rewards": {"right": {"score": 1.0, "weight": 0.5}, "short": {"score": 2.0, "weight": 1.0}, "none": None},
    }
    judge = {"id": f"{name}-judge", "agent": {"name": "judge", "trainable": False}, "nodes": []}
    record = {"id": f"e-{name}", "env": {"id": "sums", "name": "sums-v1"}, "group": {"id": "g"}, "ok": True}
    return {**record, "traces": [trace, judge], **changes}


def areal_record(sample: int, **changes: Any) -> dict[str, Any]:
    """Return what ``_dump_trajectory`` writes of a sample."""
    record = {
        "task_id": 8,
        "sample_idx": sample,
        "seqlen": 9,
        "prompt_len": 7,
        "head_version": 1,
        "tail_version": 2,
        "reward": float(sample),
        "prompt": "<s><|im_start|>1+1=\n",
        "completion": "2<|im_end|>",
    }
    return {**record, **changes}


def skyrl_record(score: Any, **changes: Any) -> dict[str, Any]:
    """Return an entry of ``dump_per_dataset_eval_results``."""
    record = {
        "input_prompt": "<s>1+1=",
        "output_response": "2<|im_end|>",
        "score": score,
        "stop_reason": "stop",
        "env_class": "gsm8k",
        "env_extras": {"n": float("nan")},
        "data_source": "openai/gsm8k",
    }
    return {**record, **changes}


def swift_table(**changes: Any) -> dict[str, Any]:
    """Return the table of ms-swift's ``log``."""
    table = {
        "step": ["5", "5", "5"],
        "prompt": ["<s><|im_start|>1+1="] * 2 + ["<s>3="],
        "completion": ["2", "3", "3"],
        "Accuracy": [1.0, 0.0, None],
        "Length": [float("nan"), 0.5, 1.5],
        "advantages": [1.5, -1.5, 0.0],
        "num_turns": [1, 1, 1],
        "solution": ["2", "2", "3"],
    }
    return {**table, **changes}


def roll_table(**changes: Any) -> dict[str, Any]:
    """Return the data of ROLL's ``dump_rollout_to_specific_path``."""
    messages = json.dumps([{"role": "user", "content": "1+1="}])
    table = {
        "global_step": [2, 2, 2],
        "id": ["a", "a", "b"],
        "source": ["math", "math", "code"],
        "prompt": ["1+1="] * 3,
        "messages": [messages] * 3,
        "domain": ["d"] * 3,
        "responses": ["2", "3", "2"],
        "scores": [1.0, 0.0, 1.0],
        "sampling_params": ["{}"] * 3,
    }
    return {**table, **changes}


QUESTION = [{"role": "user", "content": "1+1="}]

ANSWERS = [
    {"role": "assistant", "content": "2"},
    {"role": "tool", "content": "[9]"},
    {"role": "assistant", "content": "3"},
]


def verifiers_record(example: int, reward: float, **changes: Any) -> dict[str, Any]:
    """Return what ``state_to_output`` gives."""
    record = {"example_id": example, "prompt": QUESTION, "completion": ANSWERS, "reward": reward}
    return {
        **record,
        "is_truncated": False,
        "info": {"source": "wiki"},
        "timing": {"total_ms": float("nan")},
        **changes,
    }


def write_rllm(directory: Path, number: int, reward: float | None, **changes: Any) -> Path:
    """Write the file of ``EpisodeLogger.log_episode``."""
    steps = [{"chat_completions": QUESTION + ANSWERS[:1]}, {"chat_completions": QUESTION + ANSWERS}]
    trajectory = {"name": "solver", "uid": f"u{number}", "reward": reward, "num_steps": 2, "steps": steps} | changes
    record = {"training_step": 1, "epoch": 0, "episode_id": f"t:{number}", "task": {"data_source": "aime"}}
    record |= {"task_hash": "0a1b", "termination_reason": "env_done", "trajectories": [trajectory]}
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"episode_hash0a1b_idt_{number}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path
