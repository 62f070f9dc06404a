"""A policy gives its model's own logits, or is refused with what differs; asked again, it tells what has changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, WIDTH, Attentive, full_batch, make, nearly
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


class HandedOn(Attentive):
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return SimpleNamespace(logits=super().forward(*args, **kwargs))


@pytest.mark.parametrize("kind", [WithSegments, WithTargets, InDict, HandedOn])
def test_only_what_is_a_mask_is_given_the_mask(kind: type[nn.Module]) -> None:
    model = make(kind)
    out = model(IDS)
    own = out if isinstance(out, Tensor) else out[0] if isinstance(out, tuple) else None
    if own is None:
        own = out["logits"] if isinstance(out, dict) else out.logits
    apply, params = fx.functionalize(model)
    assert nearly(apply(params, IDS, MASK), own)


def test_a_wrapper_that_hands_everything_on_is_given_the_mask() -> None:
    apply, params = fx.functionalize(make(HandedOn))
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
        (NoLogits, r"gives a SimpleNamespace without a tensor of logits"),
    ],
)
def test_a_forward_without_logits_of_every_token_is_refused(kind: type[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fx.functionalize(make(kind))


class FromTwo(Attentive):
    """Positions of its own begin at 2, and given ones are taken as they are: behind a padding index of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Embedding(2 + 16, 8, padding_idx=1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        if position_ids is None:
            position_ids = 2 + torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return super().forward(input_ids, attention_mask, position_ids)


class Backwards(Attentive):
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).flip(0).expand_as(input_ids)
        return super().forward(input_ids, attention_mask, position_ids)


def test_positions_begin_where_the_models_own_do() -> None:
    model = make(FromTwo)
    apply, params = fx.functionalize(model)
    assert nearly(apply(params, IDS, MASK), model(IDS))
    left = MASK.clone()
    left[:, :3] = False
    assert nearly(apply(params, IDS, left)[:, 3:], apply(params, IDS[:, 3:], MASK[:, 3:]))


def test_positions_of_another_kind_are_refused_with_the_remedy() -> None:
    model = make(Backwards)
    with pytest.raises(ValueError, match=r"It makes other positions .*position_ids=False"):
        fx.functionalize(model)
    apply, params = fx.functionalize(model, position_ids=False)
    assert nearly(apply(params, IDS, MASK), model(IDS))


class Noisy(Attentive):
    def mixed(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class CountsIntegers(Attentive):
    """A mask of integers is one thing to it, a mask of bools another."""

    def mixed(self, x: Tensor) -> Tensor:
        return x

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = ~attention_mask | torch.ones_like(attention_mask)
        return super().forward(input_ids, attention_mask, position_ids)


@pytest.mark.parametrize(("kind", "message"), [(Noisy, "a row of tokens"), (CountsIntegers, "padded rows")])
def test_a_forward_that_differs_is_refused(kind: type[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=rf"apply differs from model's own logits on {message}.*, by"):
        fx.functionalize(make(kind))


def test_prompt_tuning_scores_the_given_tokens_alone() -> None:
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
    apply, params = fx.functionalize(model)
    own = model(input_ids=IDS, attention_mask=MASK.long()).logits[:, 3:]
    found = apply(params, IDS, MASK)
    assert found.shape == (*IDS.shape, VOCAB)
    assert nearly(found, own)


def test_looking_changes_nothing() -> None:
    model = make(Attentive).train()
    model.qkv.eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    apply, params = fx.functionalize(model)
    fx.check_policy(apply, params, model)
    assert torch.equal(torch.rand(3), expected)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_check_policy_tells_what_has_changed_since() -> None:
    model = make(Attentive)
    model.head.bias.requires_grad_(False)
    apply, params = fx.functionalize(model)
    with torch.no_grad():
        model.head.bias += 1
        model.qkv.weight += 1
    fx.check_policy(apply, params, model)
    model.head.bias = nn.Parameter(model.head.bias.detach() + 1, requires_grad=False)
    with pytest.raises(ValueError, match=r"differs from model's own logits on a row of tokens, by"):
        fx.check_policy(apply, params, model)
    model.head.bias.requires_grad_()
    with pytest.raises(ValueError, match=r"'head.bias' in one of the two alone"):
        fx.check_policy(apply, params, model)
    with pytest.raises(ValueError, match="apply is a function; expected the Policy"):
        fx.check_policy(lambda params, ids, mask: ids, params, model)  # type: ignore[arg-type]


class OfOneWidth(Attentive):
    def forward(self, input_ids: Tensor, **options: Any) -> Tensor:
        if input_ids.shape[1] != WIDTH - 1:
            raise RuntimeError("expected rows of one width\nand no others")
        return super().forward(input_ids, **options)


def test_functionalize_warns_where_it_compared_nothing() -> None:
    with pytest.warns(UserWarning, match=r"RuntimeError: expected rows of one width\).*not compared.*check_deriv") as w:
        fx.functionalize(make(OfOneWidth))
    assert w[0].filename == __file__
