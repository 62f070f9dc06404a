"""Training runs of a mixture of experts, with and without the router's auxiliary loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import random_batch
from helpers.tolerances import TINY_POLICY, rounding_bound
from helpers.trl_runs import measure_training
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import fx_influence as fx
from benchmarks.trl.bench_trl_steps import Errors
from benchmarks.trl.variants import CHARACTERS, Variant, trainer

# The warnings that trl, transformers and accelerate give about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]


def policy_of_experts() -> Qwen3MoeForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            vocab_size=len(CHARACTERS) + 2,
            hidden_size=16,
            intermediate_size=24,
            moe_intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=64,
            initializer_range=0.4,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
        return Qwen3MoeForCausalLM(config)


@pytest.mark.parametrize(
    ("layers", "measured"), [(["q_proj", "v_proj"], True), (["q_proj", "down_proj"], False), (["gate"], False)]
)
def test_rounding_is_measured_where_lora_is_on_layers(layers: list[str], measured: bool) -> None:
    """On weights of experts and the router peft adds LoRA to the weight itself, so no layer has it as input."""
    model = get_peft_model(policy_of_experts(), LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    apply, params = fx.make_functional(model)
    batch = random_batch(torch.Generator().manual_seed(0), 8, 6, len(CHARACTERS))
    batch = batch._replace(group=torch.arange(8) // 2)
    out = fx.influence(params, batch, None, fx.adamw_state(optimizer, model), apply=apply)
    if not measured:
        assert bool(out.rounding.isnan().all())
        return
    assert float(out.rounding.sum()) <= rounding_bound(torch.float32, TINY_POLICY, float(out.per_sequence.abs().sum()))


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("router_loss", [0.0, 1.0], ids=["alone", "router loss"])
def test_steps_of_experts_are_measured(lora: bool, router_loss: float, tmp_path: Path) -> None:
    """The router's auxiliary loss is no coefficient's: it is unattributed, and without it nothing is."""
    variant = Variant("dapo", lora, 1, False, {"router_aux_loss_coef": router_loss})
    # A denominator that does not respond to the gradient, so that leaving a prompt out changes no other's share.
    step = {"learning_rate": 1.0 if lora else 1e-2, "adam_epsilon": 1e2, "max_grad_norm": 0.0}
    options: dict[str, Any] = {"per_device_train_batch_size": 15, **step}
    settings = {"eval_prompts": "batch"}
    measured = measure_training(tmp_path / "a", 3, variant, settings=settings, model=policy_of_experts(), **options)
    assert not measured.warnings
    assert len(measured.history) == 3
    assert ("aux_loss" in measured.trainer.state.log_history[0]) == (router_loss > 0)
    last = measured.history[-1]
    assert (last["unattributed"] != 0) == (router_loss > 0)
    assert last["measured"] == pytest.approx(last["total"], rel=0.1)
    # LoRA's down_proj is experts' weights.
    assert "rounding" not in last
    training = trainer(variant, str(tmp_path / "b"), 2, policy_of_experts(), per_device_train_batch_size=15)
    errors = Errors(training)
    training.train()
    assert (max(errors.gradient) <= rounding_bound(torch.float32, TINY_POLICY)) == (router_loss == 0)
    assert max(errors.step) <= rounding_bound(torch.float32, 1, 1e3)
