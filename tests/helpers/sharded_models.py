"""Models that the tests shard by FSDP2, and how: which modules become units, along which axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from fx_influence.types import AdamWState, Params
from helpers.cases import TinyPolicy

VOCAB, LAYERS = 41, 3


def qwen(tied: bool) -> nn.Module:
    """Return a Qwen2 whose dimensions neither 2 nor 3 ranks divide evenly."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=20,
        intermediate_size=35,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config).train()


def lora(model: nn.Module) -> nn.Module:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def with_hooked_inputs(model: nn.Module) -> nn.Module:
    """Return a model that stores the handle of a hook on its embeddings, as gradient checkpointing makes it."""
    enable: Any = model.enable_input_require_grads
    enable()
    return model


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=12, n_layer=2, n_head=2, n_positions=64)
    return AutoModelForCausalLM.from_config(config).double()


def tiny() -> nn.Module:
    return TinyPolicy(vocab=VOCAB, dim=4, layers=3, max_len=32, tied=True, idle=True, dropout=0.1)


class PartlyReached(nn.Module):
    """Model in which some parameters, in a unit and outside, are reached by long batches only and some by none."""

    def __init__(self, inner: bool = False) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCAB, 4)
        self.often, self.rarely, self.never = (nn.Linear(4, 4 if inner else VOCAB) for _ in range(3))
        if not inner:
            self.block = PartlyReached(inner=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.block(ids) if hasattr(self, "block") else self.token(ids)
        return self.often(x) + (self.rarely(x) if ids.shape[1] > 5 else 0)


CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "qwen2 tied": (lambda: qwen(True), "layers"),
    "qwen2 untied, embeddings as units": (lambda: with_hooked_inputs(qwen(False)), "layers and embeddings"),
    "qwen2 lora": (lambda: lora(qwen(True)), "layers"),
    "qwen2 bfloat16, lora": (lambda: lora(qwen(True).bfloat16()), "layers"),
    "gpt2 float64": (gpt2, "layers"),
    "tiny float64": (tiny, "layers"),
    "tiny float64, nested units": (tiny, "linear maps too"),
    "tiny float64, root only": (tiny, "root"),
    "tiny float64, by columns": (tiny, "columns"),
    "qwen2 lora, ZeRO-3": (lambda: lora(qwen(True)), "ZeRO-3"),
    "tiny float64, ZeRO-3": (tiny, "ZeRO-3"),
}


def last_axis(p: nn.Parameter) -> Shard:
    return Shard(p.ndim - 1)


def shard_model(model: nn.Module, how: str, mesh: DeviceMesh) -> nn.Module:
    """Shard the model in place and return it; ``how``: which modules become units, see ``CASES``."""
    if how == "ZeRO-3":
        return partition_model(model, mesh)
    for module in reversed(list(model.modules())):
        kind = type(module).__name__
        layer = kind in ("Block", "GPT2Block", "Qwen2DecoderLayer")
        embedding = isinstance(module, nn.Embedding) or (kind == "Linear" and module.out_features == VOCAB)
        linear = kind == "Linear" and module.out_features != VOCAB
        if (layer and how != "root") or (embedding and "emb" in how) or (linear and how == "linear maps too"):
            fully_shard(module, mesh=mesh, shard_placement_fn=last_axis if how == "columns" else None)
    fully_shard(model, mesh=mesh)
    return model


def partition_model(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Partition the model in place as DeepSpeed's ZeRO-3 does (0.19.8), and return it.

    Each rank keeps its chunk of every flattened parameter, padded by whatever is in memory, and the parameter is empty.
    """
    for p in model.parameters():
        chunk = -(-p.numel() // mesh.size())
        padded = torch.full((chunk * mesh.size(),), torch.nan, dtype=p.dtype)
        padded[: p.numel()] = p.detach().flatten()
        partitioned: Any = p
        partitioned.ds_shape, partitioned.ds_process_group = p.shape, mesh.get_group()
        partitioned.ds_tensor = padded[chunk * mesh.get_local_rank() :][:chunk].clone()
        p.data = p.data.new_empty(0)
    return model


def distribute_like(x: Tensor, p: Any) -> DTensor:
    """Return ``x`` sharded as the DTensor ``p`` is."""
    return distribute_tensor(x.reshape(p.shape), p.device_mesh, p.placements, src_data_rank=None)


def distribute_state(state: AdamWState, shards: Params) -> AdamWState:
    """Return the state with its moments sharded as the parameters."""
    moments: dict[str, Any] = {
        field: {name: distribute_like(x, shards[name]) for name, x in getattr(state, field).items()}
        for field in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    }
    return state._replace(**moments)
