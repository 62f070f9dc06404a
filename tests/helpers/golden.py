"""The golden case: a LoRA policy, its AdamW state, two batches, and the numbers recorded from the first implementation.

The numbers were recorded in float64 throughout, from float32 inputs upcast exactly. transformers runs norms, rotary
embeddings and softmax in float32 whatever the dtype, so the float64 model here has them replaced; the float32 one is
transformers' own. In the recording pad == eos == 0 and a sampled EOS was not scored, so ``completion_mask`` ends before
it. Its loss is l_i = -sum_t A_i log pi / (G * longest of the prompt + 1e-8), summed over sequences. Vectors in
``expected`` are flat in the order of ``Golden.params``.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from fx_influence.interop.checkpoints.optimizer_state import restore_optimizer
from fx_influence.interop.optimizers import adamw_state
from fx_influence.types import AdamWState, Batch, Params

DATA = Path(__file__).parents[1] / "data" / "golden"


class Golden(NamedTuple):
    """The recorded case; ``params`` are detached clones in optimizer order, ``group`` is the prompt, in E one per row.

    ``expected``: the recorded arrays by name, float64.
    """

    model: PeftModel
    params: Params
    opt_state: AdamWState
    batch_u: Batch
    batch_e: Batch
    expected: dict[str, np.ndarray]


def load_golden(dtype: torch.dtype = torch.float64) -> Golden:
    """Return the case in ``dtype`` (float64 or float32), on the CPU, with eager attention and in eval mode."""
    config = json.loads((DATA / "config.json").read_text())
    model = _model(config).to(dtype).eval()
    if dtype == torch.float64:
        _compute_in_float64(model)
    param_names = json.loads((DATA / "optimizer_param_names.json").read_text())
    optimizer = restore_optimizer(torch.load(DATA / "optimizer.pt", weights_only=True), model, param_names)
    by_name = dict(model.named_parameters())
    params = {name: by_name[name].detach().clone() for group in param_names for name in group}
    inputs = dict(np.load(DATA / "inputs.npz"))
    expected = {**np.load(DATA / "expected_step.npz"), **np.load(DATA / "expected_sequences.npz")}
    batch_u = _batch(inputs, "U")._replace(coefficients=_coefficients(inputs, dtype))
    return Golden(model, params, adamw_state(optimizer, model), batch_u, _batch(inputs, "E"), expected)


def flatten(values: Params, golden: Golden) -> Tensor:
    """Return a dict of parameters as one vector in the recorded order."""
    return torch.cat([values[name].flatten() for name in golden.params])


def unflatten(vector: np.ndarray, golden: Golden) -> Params:
    """Return a recorded vector as a dict of parameters, in their dtype."""
    vectors = torch.from_numpy(vector).split([value.numel() for value in golden.params.values()])
    pairs = zip(golden.params.items(), vectors, strict=True)
    return {name: flat.view_as(value).to(value.dtype) for (name, value), flat in pairs}


class _RMSNorm(qwen2.Qwen2RMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


class _RotaryEmbedding(qwen2.Qwen2RotaryEmbedding):
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids[..., None] * self.inv_freq.to(x.dtype)).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


class _Attention(qwen2.Qwen2Attention):
    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (project(hidden_states).view(shape).transpose(1, 2) for project in projections)
        query, key = qwen2.apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = (qwen2.repeat_kv(heads, self.num_key_value_groups) for heads in (key, value))
        weights = (query @ key.mT * self.scaling + attention_mask).softmax(-1)
        mixed = (weights @ value).transpose(1, 2).reshape(hidden_states.shape)
        return self.o_proj(mixed), weights


def _compute_in_float64(model: PeftModel) -> None:
    # Replaced by class, since make_functional drops a forward set on the instance from its template.
    exact = {
        qwen2.Qwen2RMSNorm: _RMSNorm,
        qwen2.Qwen2RotaryEmbedding: _RotaryEmbedding,
        qwen2.Qwen2Attention: _Attention,
    }
    for module in model.modules():
        module.__class__ = exact.get(type(module), type(module))


def _model(config: dict[str, Any]) -> PeftModel:
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    base = Qwen2ForCausalLM(
        Qwen2Config(**config["model"], rope_parameters=rope, attn_implementation=config["attn_implementation"])
    )
    loaded = base.load_state_dict(load_file(DATA / "base_model.safetensors"), strict=False)
    assert loaded.missing_keys == ["lm_head.weight"]  # The head is tied to the embedding.
    assert not loaded.unexpected_keys
    with warnings.catch_warnings():
        # peft reads a property that transformers deprecates.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        model = get_peft_model(base, LoraConfig(**config["lora"]))
    lora = load_file(DATA / "lora.safetensors")
    assert set(lora) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not model.load_state_dict(lora, strict=False).unexpected_keys
    return model


def _batch(inputs: dict[str, np.ndarray], side: str) -> Batch:
    ids, mask, generated = (
        torch.from_numpy(inputs[f"{side}_{key}"]).flatten(0, 1) for key in ("ids", "mask", "gen_lens")
    )
    n, k, length = inputs[f"{side}_ids"].shape
    start = torch.from_numpy(inputs[f"{side}_prompt_lens"]).repeat_interleave(k).unsqueeze(-1)
    position = torch.arange(length)
    completion_mask = (position >= start) & (position < start + generated.unsqueeze(-1))
    group = torch.arange(n).repeat_interleave(k)
    return Batch(ids.long(), mask, completion_mask, group=group)


def _coefficients(inputs: dict[str, np.ndarray], dtype: torch.dtype) -> Tensor:
    advantages = torch.from_numpy(inputs["U_adv"]).to(dtype)
    longest = torch.from_numpy(inputs["U_max_lengths"]).to(dtype).unsqueeze(-1)
    per_sequence = advantages / (advantages.shape[1] * longest + 1e-8)
    return per_sequence.flatten().unsqueeze(-1) * _batch(inputs, "U").completion_mask
