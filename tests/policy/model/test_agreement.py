"""A policy gives its model's own logits, or is refused with what differs; asked again, it tells what has changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_models import VOCAB, WIDTH, AttentionModel, full_batch, is_close, make_float64
from torch import Tensor, nn

import fx_influence as fx

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated")

IDS = full_batch(0).input_ids
MASK = torch.ones_like(IDS, dtype=torch.bool)


class Summed(nn.Module):
    """Logits of the running sum of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.segment, self.head = nn.Embedding(VOCAB, 8), nn.Embedding(2, 8), nn.Linear(8, VOCAB)

    def logits(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.token(ids).cumsum(1)))


class WithSegments(Summed):
    def forward(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        x = self.token(tokens).cumsum(1)
        return self.head(torch.tanh(x if segments is None else x + self.segment(segments.long())))


class WithTargets(Summed):
    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        z = self.logits(idx)
        loss = None if targets is None else nn.functional.cross_entropy(z.flatten(0, 1), targets.flatten())
        return z, loss


class InDict(Summed):
    def forward(self, idx: Tensor) -> dict[str, Tensor]:
        return {"logits": self.logits(idx)}


class HandedOn(AttentionModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return SimpleNamespace(logits=super().forward(*args, **kwargs))


@pytest.mark.parametrize("kind", [WithSegments, WithTargets, InDict, HandedOn])
def test_policy_passes_mask_only_to_mask_arguments(kind: type[nn.Module]) -> None:
    model = make_float64(kind)
    out = model(IDS)
    expected = out if isinstance(out, Tensor) else out[0] if isinstance(out, tuple) else None
    if expected is None:
        expected = out["logits"] if isinstance(out, dict) else out.logits
    apply, params = fx.make_functional(model)
    assert is_close(apply(params, IDS, MASK), expected)


def test_policy_passes_mask_to_wrapper_of_any_arguments() -> None:
    apply, params = fx.make_functional(make_float64(HandedOn))
    padded = MASK.clone()
    padded[:, 0] = False
    assert not torch.equal(apply(params, IDS, padded), apply(params, IDS, MASK))


class LastToken(Summed):
    def forward(self, idx: Tensor) -> Tensor:
        return self.logits(idx)[:, -1:]


class Longer(Summed):
    def forward(self, idx: Tensor) -> Tensor:
        return self.logits(torch.cat([idx[:, :1], idx], 1))


class NoLogits(Summed):
    def forward(self, idx: Tensor) -> Any:
        return SimpleNamespace(scores=self.logits(idx))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (LastToken, r"logits of shape \(1, 1, 11\) for ids of shape \(1, 8\); expected \(B, T, V\)"),
        (Longer, r"logits of shape \(1, 9, 11\) for ids of shape \(1, 8\); expected \(B, T, V\)"),
        (NoLogits, r"returns a SimpleNamespace without a tensor of logits"),
    ],
)
def test_make_functional_rejects_missing_logits(kind: type[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fx.make_functional(make_float64(kind))


class FromTwo(AttentionModel):
    """Positions of its own begin at 2, and given ones are taken as they are: behind a padding index of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Embedding(2 + 16, 8, padding_idx=1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        if position_ids is None:
            position_ids = 2 + torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return super().forward(input_ids, attention_mask, position_ids)


class Backwards(AttentionModel):
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).flip(0).expand_as(input_ids)
        return super().forward(input_ids, attention_mask, position_ids)


def test_fit_forward_finds_first_position() -> None:
    model = make_float64(FromTwo)
    apply, params = fx.make_functional(model)
    assert is_close(apply(params, IDS, MASK), model(IDS))
    left = MASK.clone()
    left[:, :3] = False
    assert is_close(apply(params, IDS, left)[:, 3:], apply(params, IDS[:, 3:], MASK[:, 3:]))


def test_make_functional_rejects_other_positions() -> None:
    model = make_float64(Backwards)
    with pytest.raises(ValueError, match=r"It makes other positions .*position_ids=False"):
        fx.make_functional(model)
    apply, params = fx.make_functional(model, position_ids=False)
    assert is_close(apply(params, IDS, MASK), model(IDS))


class Noisy(AttentionModel):
    def transform_stream(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class CountsIntegers(AttentionModel):
    """A mask of integers is one thing to it, a mask of bools another."""

    def transform_stream(self, x: Tensor) -> Tensor:
        return x

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = ~attention_mask | torch.ones_like(attention_mask)
        return super().forward(input_ids, attention_mask, position_ids)


@pytest.mark.parametrize(("kind", "message"), [(Noisy, "a row of tokens"), (CountsIntegers, "padded rows")])
def test_make_functional_rejects_differing_forward(kind: type[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=rf"apply differs from model's own logits on {message}.*, by"):
        fx.make_functional(make_float64(kind))


def test_policy_drops_logits_of_virtual_tokens() -> None:
    from peft import PromptTuningConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(LlamaForCausalLM(config), peft_config).eval()
    apply, params = fx.make_functional(model)
    expected = model(input_ids=IDS, attention_mask=MASK.long()).logits[:, 3:]
    actual = apply(params, IDS, MASK)
    assert actual.shape == (*IDS.shape, VOCAB)
    assert is_close(actual, expected)


def test_make_functional_leaves_model_unchanged() -> None:
    model = make_float64(AttentionModel).train()
    model.qkv.eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    apply, params = fx.make_functional(model)
    fx.check_policy(apply, params, model)
    assert torch.equal(torch.rand(3), expected)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


class OfOneWidth(AttentionModel):
    def forward(self, input_ids: Tensor, *args: Any, **options: Any) -> Tensor:
        if input_ids.shape[1] != WIDTH - 1:
            raise RuntimeError("expected rows of one width\nand no others")
        return super().forward(input_ids, *args, **options)


def test_make_functional_warns_when_nothing_was_compared() -> None:
    with pytest.warns(UserWarning, match=r"RuntimeError: expected rows of one width\).*not compared.*check_deriv") as w:
        fx.make_functional(make_float64(OfOneWidth))
    assert w[0].filename == __file__
