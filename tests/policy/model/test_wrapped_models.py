"""Models inside wrappers, heads inside adapters, and what else stands between a model and its logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.hf_models import WIDTH, make_batches, make_model
from helpers.tiny_models import AttentionModel, full_batch, is_close, make_float64, warm_state
from helpers.tolerances import assert_close_to_rounding, policy_terms
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import fx_influence as fx
from fx_influence.batching.rows import select_rows
from fx_influence.policy.split import split_policy
from fx_influence.testing import reference

pytestmark = pytest.mark.filterwarnings("ignore")
U, E = full_batch(1), full_batch(2, rows=8)
HF = full_batch(1, vocab=19)


class CompiledInside(AttentionModel):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.compile(self.qkv, backend="eager")  # type: ignore[assignment]


class CheckpointedInside(AttentionModel):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = checkpoint_wrapper(self.qkv)  # type: ignore[assignment]


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "compiled in place": compiled_in_place,
    "data parallel": nn.DataParallel,
    "both": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_make_functional_unwraps_model(kind: str) -> None:
    model = make_float64(AttentionModel)
    apply, params = fx.make_functional(model)
    expected = fx.influence(params, U, E, warm_state(model), apply=apply)
    wrapped = WRAPPERS[kind](make_float64(AttentionModel))
    apply, wrapped_params = fx.make_functional(wrapped)
    assert wrapped_params.keys() == params.keys()
    state = warm_state(wrapped)
    assert state.exp_avg.keys() == params.keys()
    fx.check_policy(apply, wrapped_params, wrapped)
    actual = fx.influence(params, U, E, state, apply=apply)
    assert torch.equal(actual.per_sequence, expected.per_sequence)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(CompiledInside, "qkv._orig_mod.weight"), (CheckpointedInside, "qkv._checkpoint_wrapped_module.weight")],
)
def test_inner_wrapped_modules_keep_derivatives(kind: type[nn.Module], name: str) -> None:
    model = make_float64(kind)
    apply, params = fx.make_functional(model)
    assert name in params
    actual = fx.influence(params, U, E, warm_state(model), apply=apply)
    plain = make_float64(AttentionModel)
    apply, params = fx.make_functional(plain)
    expected = fx.influence(params, U, E, warm_state(plain), apply=apply)
    assert torch.equal(actual.per_sequence, expected.per_sequence)


class CastToFloat(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(torch.float32)


def lora(**options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(make_model("llama", tied=False, attention="sdpa"), LoraConfig(r=2, **options))


def cast_head() -> Any:
    model = make_model("llama", tied=False, attention="sdpa")
    model.lm_head = CastToFloat(model.lm_head)
    return model


HEADS: dict[str, Callable[[], Any]] = {
    "saved": lambda: lora(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "saved with embeddings": lambda: lora(
        task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]
    ),
    "adapted": lambda: lora(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], init_lora_weights=False),
    "cast": cast_head,
}


@pytest.mark.parametrize("kind", HEADS)
def test_policy_supports_wrapped_heads(kind: str) -> None:
    model = HEADS[kind]().eval()
    apply, params = fx.make_functional(model)
    state = warm_state(model)
    expected = model(input_ids=HF.input_ids, attention_mask=HF.attention_mask.long()).logits
    actual = apply(params, HF.input_ids, HF.attention_mask)
    assert is_close(actual, expected)
    assert split_policy(apply).vocab_size == 19, "the head is cut off"
    out = fx.influence(params, HF, HF, state, apply=apply, matrix=True)
    assert out.per_sequence.isfinite().all()


class ReadsItsHead(AttentionModel):
    """Multiplies by the head's weight itself, which no module put in its place can stand for."""

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, module: nn.Module) -> None:
        self.head = module  # type: ignore[assignment]

    def get_input_embeddings(self) -> nn.Module:
        return self.token

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = super().forward(*args, **kwargs)
        return x + self.head.weight.mean()


class ReadsItsDtype(ReadsItsHead):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return AttentionModel.forward(self, *args, **kwargs).to(self.head.weight.dtype)


@pytest.mark.parametrize(("kind", "cut"), [(ReadsItsHead, False), (ReadsItsDtype, True)])
def test_cut_model_when_forward_reads_its_head(kind: type[nn.Module], cut: bool) -> None:
    class Named(kind):  # type: ignore[valid-type, misc]
        def forward(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
        ) -> Tensor:
            return super().forward(input_ids, attention_mask, position_ids)

    model = make_float64(Named)
    apply, params = fx.make_functional(model)
    assert (split_policy(apply).vocab_size is not None) == cut
    assert is_close(apply(params, U.input_ids, U.attention_mask), model(U.input_ids))
    state = warm_state(model)
    plain = fx.influence(params, U, E, state, apply=lambda *inputs: apply(*inputs))
    out = fx.influence(params, U, E, state, apply=apply)
    assert (out.per_sequence - plain.per_sequence).abs().max() <= 1e-9 * plain.per_sequence.abs().sum()


def experts(kind: str, **more: Any) -> Any:
    """Return a Qwen3-MoE of one layer whose experts have the implementation ``kind``."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
        **{"pad_token_id": 0, **more},
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation(kind)
    return model


@pytest.mark.parametrize("kind", ["grouped_mm", "eager"])
def test_passes_choose_experts_with_derivatives(kind: str) -> None:
    model = experts(kind)
    apply, params = fx.make_functional(model)
    state, ones = warm_state(model), {name: torch.ones_like(p) for name, p in params.items()}
    out = fx.influence(params, HF, HF, state, apply=apply, matrix=True)
    assert out.matrix is not None
    fx.jvp_delta(params, ones, HF, apply=apply)
    fx.snis_delta(params, ones, 1e-4, HF, apply=apply)
    fx.fisher_kernel(params, HF, HF, None, apply=apply, preconditioner="identity")
    assert model.config._experts_implementation == kind


def test_influence_with_experts_matches_reference_in_float64() -> None:
    # The table of tokens has no gradient at its padding, whereas E's derivatives are those of the function.
    model = experts("eager", pad_token_id=None).double()
    apply, params = fx.make_functional(model)
    state = warm_state(model)
    u, e = (select_rows(batch, torch.tensor([0, 1, 3])) for batch in make_batches())
    out = fx.influence(params, u, e, state, apply=apply, matrix=True)
    slow = reference.influence(apply, params, u, e, state)
    size = slow.matrix.abs().sum()
    for name in ("matrix", "per_sequence", "per_token", "baseline"):
        terms = policy_terms(params, WIDTH)
        assert_close_to_rounding(getattr(out, name), getattr(slow, name), terms=terms, scale=size, dtype=torch.float64)
