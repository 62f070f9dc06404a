"""A forward that writes: to weights it is refused before it does, and buffers and attributes are as they were."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import VOCAB, AttentionModel, full_batch, is_close, make_float64
from torch import Tensor, nn

import fx_influence as fx

BATCH = full_batch(0)


class Rescaling(AttentionModel):
    """Halves a weight in place on its first forward in eval mode."""

    def __init__(self, by: str = "div_") -> None:
        super().__init__()
        self.rescaled, self.by = False, by

    def transform_stream(self, x: Tensor) -> Tensor:
        if not self.training and not self.rescaled:
            with torch.no_grad():
                weight = self.qkv.weight
                if self.by == "div_":
                    weight.div_(2)
                elif self.by == "data":
                    weight.data[3:5] = 0
                elif self.by == "set out":
                    torch.mul(weight, 0.5, out=weight)
                else:
                    torch._foreach_mul_([weight], 0.5)
            self.rescaled = True
        return x


@pytest.mark.parametrize("by", ["div_", "data", "set out", "foreach"])
def test_make_functional_rejects_writes_to_weights(by: str) -> None:
    model = make_float64(Rescaling, by=by).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"writes to its parameter 'qkv.weight' in a forward .*; expected a forward"):
        fx.make_functional(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.training
    assert not model.rescaled


class Scratch(AttentionModel):
    """Leaves things behind: in a buffer that it writes, in one that it binds anew, in an attribute."""

    calls: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.register_buffer("last", torch.zeros(1))
        self.longest: Tensor | None = None

    def transform_stream(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.last = x.detach().sum()
        if self.longest is None:
            self.longest = x[0, 0]
        return x * self.calls + self.longest


def test_policy_calls_are_independent() -> None:
    model = make_float64(Scratch)
    apply, params = fx.make_functional(model)
    inputs = params, BATCH.input_ids, BATCH.attention_mask
    first = apply(*inputs)
    assert torch.equal(apply(*inputs), first)
    assert model.calls == 0
    assert model.longest is None
    fx.per_sample_grads(fx.rollout_loss(apply), params, BATCH)
    assert torch.equal(apply(*inputs), first)
    assert model.last.tolist() == [0.0]


class Listed(nn.Module):
    """Reads its weight from a list, a dict and an attribute beside its registered name, and a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.rows, self.by_name, self.inside = [self.head.weight], {"bias": self.head.bias}, {"all": [self.token]}
        self.constant = torch.full((8,), 0.3, dtype=torch.float64)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.inside["all"][0](ids).cumsum(1)) + self.constant
        return x @ self.rows[0].T + self.by_name["bias"]


class TiedTwice(nn.Module):
    """A weight tied to another module's, whose module goes by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.mid = nn.Embedding(VOCAB, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCAB, bias=False)
        self.head.weight = self.token.weight
        self.wte = self.token

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(self.wte(ids).cumsum(1))))


@pytest.mark.parametrize("kind", [Listed, TiedTwice])
def test_policy_places_unregistered_tensors(kind: type[nn.Module]) -> None:
    model = make_float64(kind)
    if isinstance(model, Listed):
        model.rows, model.by_name = [model.head.weight], {"bias": model.head.bias}
    apply, params = fx.make_functional(model)
    for _ in range(3):
        assert is_close(apply(params, BATCH.input_ids, BATCH.attention_mask), model(BATCH.input_ids))
    moved = {name: 1.1 * p for name, p in params.items()}
    actual = apply(moved, BATCH.input_ids, BATCH.attention_mask)
    model.load_state_dict({**model.state_dict(), **moved}, strict=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(moved[name])
    assert is_close(actual, model(BATCH.input_ids))


def test_make_functional_rejects_parameter_in_tuple() -> None:
    model = make_float64(Listed)
    model.rows = (model.head.weight,)
    with pytest.raises(ValueError, match=r"'head.weight' is in a tuple.*ParameterList"):
        fx.make_functional(model)
