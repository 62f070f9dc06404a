"""Rollout files as the trainers write them, for a tokenizer of single characters with a chat template.

Each ``write_*`` repeats the writing code of that trainer, which the reader's docstring cites.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 3
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }}{{ call.function.arguments }}]{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{{ opening or '' }}{% endif %}"
)


def make_tokenizer(eos: str | None = "<|im_end|>") -> PreTrainedTokenizerFast:
    tokens = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>", *map(chr, range(32, 127)), "\n"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=eos,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    result.chat_template = TEMPLATE
    return result


def ids(text: str) -> tuple[int, ...]:
    """Return the token ids of a text without special tokens."""
    return tuple(make_tokenizer()(text, add_special_tokens=False)["input_ids"])


def write_prime_rl(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n")
    return path


def write_nemo_rl(path: Path, batch: dict[str, list[Any]]) -> Path:
    size = len(next(iter(batch.values())))
    with path.open("w") as file:
        for i in range(size):
            sample = {key: value[i : i + 1] for key, value in batch.items()}
            file.write(json.dumps({**sample, "idx": i}, default=str) + "\n")
    return path


def write_verl(path: Path, batch: dict[str, list[Any]], step: int = 5) -> Path:
    n = len(batch["input"])
    base = {"input": batch["input"], "output": batch["output"], "gts": [None] * n, "score": batch["score"]}
    columns = {**base, "step": [step] * n, **{k: v for k, v in batch.items() if k not in base}}
    with path.open("w") as file:
        for i in range(n):
            file.write(json.dumps({k: v[i] for k, v in columns.items()}, ensure_ascii=False) + "\n")
    return path


def write_trl(directory: Path, monkeypatch: pytest.MonkeyPatch, step: int = 10, **logs: Any) -> Path:
    """Call ``GRPOTrainer.log`` of a trainer that has only the attributes which it reads."""
    from trl.trainer import grpo_trainer

    (directory / "completions").mkdir()
    monkeypatch.setattr(transformers.Trainer, "log", lambda *_: None)
    monkeypatch.setattr(grpo_trainer, "is_rich_available", lambda: False)
    trainer = grpo_trainer.GRPOTrainer.__new__(grpo_trainer.GRPOTrainer)
    vars(trainer).update(
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(is_main_process=True),
        log_completions=True,
        state=SimpleNamespace(global_step=step),
        args=SimpleNamespace(report_to=[], output_dir=str(directory)),
        _logs={"images": [], "rewards": {}, "extra": {}, **logs},
    )
    trainer.log({})
    return directory / "completions" / f"completions_{step:05d}.parquet"


TOKENIZER = make_tokenizer()

PROMPT = ids("1+1=")

SAMPLED = (*ids("2"), EOS)

TOOL = ids("[9]")


def prime_record(index: int = 0, **changes: Any) -> dict[str, Any]:
    """Return what the exporter writes for a prompt, an answer, a tool's output and a last answer."""
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
