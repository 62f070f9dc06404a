"""Passes may do with rows and tokens what the structure of a model allows, not what it has learned so far."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import max_error
from helpers.present import present
from helpers.tiny_models import AttentionModel, full_batch, make_float64, warm_state
from torch import Tensor, nn
from torch.nn import functional as F

import fx_influence as fx
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.autodiff.token_values import all_token_values
from fx_influence.policy.split import split_policy


class Shifted(AttentionModel):
    """Each token takes from the one before by gates that start at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(8))

    def transform_stream(self, x: Tensor) -> Tensor:
        return x + self.gate * F.pad(x[:, :-1], (0, 0, 1, 0))


class Convolved(AttentionModel):
    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Conv1d(8, 8, 3, groups=8)
        nn.init.zeros_(self.short.weight)
        nn.init.zeros_(present(self.short.bias))

    def transform_stream(self, x: Tensor) -> Tensor:
        return x + self.short(F.pad(x.mT, (2, 0))).mT


class Summing(AttentionModel):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(8))

    def transform_stream(self, x: Tensor) -> Tensor:
        return x + self.gate * x.cumsum(1)


class Normalised(AttentionModel):
    """Sees later tokens too, once its gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(8))

    def transform_stream(self, x: Tensor) -> Tensor:
        return x + self.gate * (x - x.mean(1, keepdim=True))


class Stretched(AttentionModel):
    """Grows with the length of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(8))

    def transform_stream(self, x: Tensor) -> Tensor:
        return x + self.gate * x * x.shape[1] ** 0.5


MIXING = [Shifted, Convolved, Summing, Normalised, Stretched]


def test_plain_attention_is_prefix_shareable() -> None:
    policy = split_policy(fx.make_functional(make_float64(AttentionModel))[0])
    assert policy.left_alignable
    assert policy.prefix_shareable


@pytest.mark.parametrize("kind", MIXING)
def test_structure_is_found_before_gates_open(kind: type[nn.Module]) -> None:
    model = make_float64(kind)
    apply, params = fx.make_functional(model)
    assert not split_policy(apply).prefix_shareable
    # A token behind padding on the left takes from that, as in a trainer's batch: rows stay where they are.
    assert not split_policy(apply).left_alignable
    with torch.no_grad():
        for p in (model.short.weight,) if kind is Convolved else (model.gate,):
            p.add_(0.7)
    u, e, state = full_batch(1), full_batch(2, rows=8), warm_state(model)
    out = fx.influence(params, u, e, state, apply=apply)
    plain = fx.influence(params, u, e, state, apply=lambda *inputs: model_logits(model, *inputs))
    for name in ("per_sequence", "per_token", "stderr"):
        assert max_error(getattr(out, name), getattr(plain, name)) <= 1e-9, name


def model_logits(model: nn.Module, params: Any, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.func.functional_call(model, params, (ids, mask))


class OverRows(AttentionModel):
    """The first row gets what the batch has in common."""

    def transform_stream(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class Capacity(AttentionModel):
    """An expert takes as many tokens of the batch as fit, those that score highest."""

    def transform_stream(self, x: Tensor) -> Tensor:
        score = x[..., 0].flatten()
        chosen = torch.zeros_like(score).index_fill(0, score.topk(max(1, len(score) // 4)).indices, 1.0)
        return x + chosen.view(*x.shape[:2], 1) * x


@pytest.mark.parametrize("kind", [OverRows, Capacity])
def test_make_functional_rejects_dependent_rows(kind: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="gives a row other logits in a batch with other rows"):
        fx.make_functional(make_float64(kind))


def long_model(rope_type: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    rope: dict[str, Any] = {"rope_theta": 1e4, "rope_type": rope_type, "factor": 4.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 10}
    config = LlamaConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.5,
        max_position_embeddings=10 if rope_type == "dynamic" else 40,
        rope_parameters=rope,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).double().eval()


def rows_on_both_sides(seed: int) -> fx.Batch:
    """Return rows of 7 to 14 tokens; the meaning of a position changes at 10."""
    generator = torch.Generator().manual_seed(seed)
    lengths, columns = torch.tensor([14, 13, 9, 8, 9, 7])[:, None], torch.arange(14).expand(6, 14)
    real = columns < lengths
    completion = real & (columns >= 5)
    ids = torch.randint(3, 19, (6, 14), generator=generator) * real
    weights = torch.randn(6, 14, generator=generator, dtype=torch.float64) * completion
    return fx.Batch(ids, real, completion, coefficients=weights)


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_dynamic_rope_depends_on_batch_width(rope_type: str) -> None:
    model = long_model(rope_type)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    apply, params = fx.make_functional(model)
    u, e = rows_on_both_sides(1), rows_on_both_sides(2)
    state = warm_state(model)
    outs = [batch_gradient(params, u, apply, chunk_size=c) for c in (None, 1, 2)]
    values = all_token_values(params, u, apply, chunk_size=1)
    fx.jvp_delta(params, {name: torch.ones_like(p) for name, p in params.items()}, e, apply=apply)
    influences = [fx.influence(params, u, e, state, apply=apply, chunk_size=k).per_sequence for k in (None, 1)]
    assert max_error(influences[1], influences[0]) <= 1e-9
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    z = model(input_ids=u.input_ids, attention_mask=u.attention_mask.long()).logits[:, :-1].log_softmax(-1)
    logprobs = z.gather(-1, u.input_ids[:, 1:, None])[..., 0]
    # The model itself takes its norms and angles in float32: their rounding, with an order of magnitude of room.
    bound = 100 * torch.finfo(torch.float32).eps
    mask = u.completion_mask[:, 1:]
    assert (values.logprobs[:, 1:] - logprobs)[mask].abs().max() <= bound * logprobs.abs().max()
    assert u.coefficients is not None
    grads = torch.autograd.grad(-(u.coefficients[:, 1:] * logprobs).sum(), [*model.parameters()])
    largest = max(g.abs().max() for g in grads)
    for out in outs:
        for g, actual in zip(grads, out.values(), strict=True):
            assert actual is not None
            assert (g - actual).abs().max() <= bound * largest


@pytest.mark.filterwarnings("ignore")
def test_activated_lora_is_not_prefix_shareable() -> None:
    """The token from which they act is read from the ids of a row."""
    from helpers.hf_models import make_model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    model = get_peft_model(make_model("qwen2", attention="sdpa"), config)
    assert not split_policy(fx.make_functional(model)[0]).prefix_shareable


def test_one_token_prompts_are_shared() -> None:
    from helpers.hf_models import make_model

    model = make_model("llama", attention="sdpa").double()
    apply, params = fx.make_functional(model)
    ids = torch.tensor([[1, 3], [1, 4], [1, 5], [1, 3]])
    completion = torch.tensor([[False, True]]).expand(4, 2)
    u = fx.Batch(ids, torch.ones_like(completion), completion, coefficients=completion * torch.arange(4.0)[:, None])
    assert split_policy(apply).micro_batches(u, None)[0].layout is not None
    shared = all_token_values(params, u, apply)
    unshared = all_token_values(params, u, lambda *inputs: apply(*inputs))
    assert max_error(shared.logprobs, unshared.logprobs) <= 1e-11
