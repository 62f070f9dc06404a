"""QLoRA on a small model: frozen 4-bit layers of bitsandbytes under a LoRA adapter, and the same in full precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

from helpers.hf_models import VOCAB, WIDTH


def make_base(dtype: torch.dtype) -> Qwen2ForCausalLM:
    """Return a model whose layers divide into blocks of 64, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=2 * WIDTH,
            initializer_range=0.15,
            bos_token_id=1,
            eos_token_id=2,
            attn_implementation="eager",
        )
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.2 * torch.randn_like(p) if p.ndim == 1 else 0.0
    return model.to(dtype)


def quantise(model: nn.Module, dequantised: bool, head: bool = False, **options: Any) -> None:
    """Replace linear layers, but for the output embeddings, by 4-bit ones or by what these dequantise to.

    Args:
        model: changed in place.
        dequantised: whether the layers stay full, in float32, with the dequantised weights.
        head: whether the output embeddings are replaced too.
        **options: of ``Linear4bit``; ``compute_dtype`` also rounds the dequantised weights, and the biases.
    """
    import bitsandbytes as bnb

    dtype = options.get("compute_dtype") or torch.float32
    for path, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or (path == "lm_head" and not head):
            continue
        has_bias = layer.bias is not None
        quantised = bnb.nn.Linear4bit(layer.in_features, layer.out_features, has_bias, **options)
        quantised.support_avx512bf16_for_cpu = False
        quantised.load_state_dict(layer.state_dict())
        quantised.weight.data = layer.weight.data
        quantised.to("cpu")
        for p in quantised.parameters():
            p.requires_grad_(False)
        parent, _, name = path.rpartition(".")
        if dequantised:
            state: Any = getattr(quantised.weight, "quant_state", None)
            state.dtype = dtype
            full = nn.Linear(layer.in_features, layer.out_features, has_bias)
            full.weight.data = bnb.functional.dequantize_4bit(quantised.weight.data, state).float()
            if has_bias:
                full.bias.data = layer.bias.data.to(dtype).float()
            full.requires_grad_(False)
            setattr(model.get_submodule(parent), name, full)
        else:
            setattr(model.get_submodule(parent), name, quantised)


def make_qlora(dequantised: bool = False, dora: bool = False, head: bool = False, **options: Any) -> Any:
    """Return a model with an adapter over 4-bit layers, or over the layers that these dequantise to.

    Args:
        dequantised: see ``quantise``.
        dora: whether the adapter is DoRA.
        head: whether the output embeddings are quantised too.
        **options: of ``Linear4bit``.
    """
    model: Any = make_base(torch.float32)
    quantise(model, dequantised, head, **{"quant_type": "nf4", **options})
    model.is_loaded_in_4bit = not dequantised
    with torch.random.fork_rng():
        torch.manual_seed(2)
        targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False, use_dora=dora)
        adapted = get_peft_model(model, config)
        for name, p in adapted.named_parameters():
            if "lora" in name:
                p.data = 0.1 * torch.randn(p.shape)
    return adapted.train()


def codes_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all 4-bit codes and scales, by name."""
    copies: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if type(p).__name__ == "Params4bit":
            copies |= {name: p.data.clone(), f"{name}.absmax": p.quant_state.absmax.clone()}  # type: ignore[attr-defined]
    return copies


def save_four_bit_policy(path: Path, compute_dtype: torch.dtype) -> Any:
    """Return a policy for TRL's runs that transformers has quantised on loading, without an adapter.

    Args:
        path: where the full weights are saved.
        compute_dtype: of the 4-bit layers.
    """
    from benchmarks.trl.variants import policy

    full = policy(hidden_size=64, intermediate_size=64, spread=0.2)
    full.save_pretrained(path)
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    return Qwen2ForCausalLM.from_pretrained(path, quantization_config=quantised, dtype=torch.float32)


def without_packing(trainer: Any) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference when a trainer generates on a CPU with AVX512-BF16."""
    for layer in trainer.model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
