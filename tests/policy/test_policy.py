"""Policies of plain modules: signatures of forward, positions, live weights, patched instances, refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.cases import TinyPolicy
from helpers.tolerances import assert_close_to_rounding, policy_terms
from torch import Tensor, nn

import fx_influence as fx

IDS = torch.tensor([[3, 1, 2, 0], [0, 0, 4, 1]])
MASK = torch.tensor([[True, True, True, False], [False, False, True, True]])


class Net(nn.Module):
    """Logits that depend on the ids, the mask, a trainable and a frozen matrix, and two buffers."""

    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5)
        self.mask_row = nn.Parameter(torch.randn(4, generator=generator))
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("shift", torch.tensor(0.5), persistent=False)
        self.table.weight.requires_grad_(False)

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.table(input_ids)
        x = x if attention_mask is None else x + attention_mask.unsqueeze(-1) * self.mask_row
        return self.head(self.dropout(x)) * self.scale + self.shift


class PositionalMask(Net):
    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        return self.logits(tokens, visible)


class IdsAlone(Net):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(tokens)


class MaskByName(Net):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        assert labels is None
        return self.logits(input_ids, attention_mask)


class ObjectWithLogits(Net):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = True) -> Any:
        assert not use_cache
        return SimpleNamespace(logits=self.logits(input_ids, attention_mask), loss=None)


@pytest.mark.parametrize("kind", [PositionalMask, IdsAlone, MaskByName, ObjectWithLogits])
def test_policy_accepts_forward_signatures(kind: type[Net]) -> None:
    model = kind()
    apply, params = fx.make_functional(model)
    assert model.training
    expected = model.eval().logits(IDS, None if kind is IdsAlone else MASK)
    torch.testing.assert_close(apply(params, IDS, MASK), expected.detach(), rtol=0, atol=0)
    assert apply(params, IDS, MASK).shape == (2, 4, 5)


class Positions(nn.Module):
    """Gives back the position ids that it was called with, or without them columns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
        columns = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        positions = columns if position_ids is None else position_ids
        return positions.unsqueeze(-1) * self.weight


def test_position_ids_count_attended_tokens() -> None:
    apply, params = fx.make_functional(Positions())
    assert apply(params, IDS, MASK)[..., 0].tolist() == [[0, 1, 2, 2], [0, 0, 0, 1]]
    omitting, params = fx.make_functional(Positions(), position_ids=False)
    assert omitting(params, IDS, MASK)[..., 0].tolist() == [[0, 1, 2, 3]] * 2


def test_params_alias_trainable_parameters() -> None:
    model = PositionalMask()
    _, params = fx.make_functional(model)
    assert list(params) == ["mask_row", "head.weight", "head.bias"]
    live = dict(model.named_parameters())
    for name, p in params.items():
        assert p.data_ptr() == live[name].data_ptr()
        assert not p.requires_grad
    with torch.no_grad():
        model.head.bias.add_(1)
    assert torch.equal(params["head.bias"], model.head.bias)


@pytest.mark.parametrize("name", ["table.weight", "scale", "shift"])
def test_policy_reads_frozen_tensors_live(name: str) -> None:
    model = PositionalMask()
    apply, params = fx.make_functional(model)
    before = apply(params, IDS, MASK)
    with torch.no_grad():
        dict([*model.named_parameters(), *model.named_buffers()])[name].mul_(3)
    after = apply(params, IDS, MASK)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, model.eval().logits(IDS, MASK).detach(), rtol=0, atol=0)


def test_policy_uses_parameters_of_the_call() -> None:
    model = PositionalMask()
    apply, params = fx.make_functional(model)
    moved = {name: p + 1 for name, p in params.items()}
    before = apply(params, IDS, MASK)
    other = apply(moved, IDS, MASK)
    model.load_state_dict({**model.state_dict(), **moved})
    torch.testing.assert_close(other, model.eval().logits(IDS, MASK).detach(), rtol=0, atol=0)
    assert not torch.equal(before, other)


def test_tied_parameter_moves_both_uses() -> None:
    model = TinyPolicy(vocab=5, tied=True)
    apply, params = fx.make_functional(model)
    assert "token.weight" in params
    assert "head.weight" not in params
    assert len({p.data_ptr() for p in params.values()}) == len(params)
    moved = {**params, "token.weight": 2 * params["token.weight"]}
    actual = apply(moved, IDS, MASK)
    with torch.no_grad():
        model.token.weight.mul_(2)
    positions = (MASK.long().cumsum(-1) - 1).clamp(min=0)
    expected = model(IDS, MASK, positions).detach()
    assert_close_to_rounding(actual, expected, terms=policy_terms(params, IDS.shape[1], 1))


def test_policy_ignores_forward_patched_on_instance() -> None:
    """Patch forward as accelerate does to run under autocast, and kernel patches to inner modules."""
    model = PositionalMask()
    expected = model.eval().logits(IDS, MASK).detach()

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("the replaced forward was called")

    for module in (model, model.head):
        vars(module)["forward"] = wrong
    apply, params = fx.make_functional(model)
    torch.testing.assert_close(apply(params, IDS, MASK), expected, rtol=0, atol=0)
    assert model.forward is wrong
    assert model.head.forward is wrong


def test_make_functional_rejects_model_without_trainable_params() -> None:
    model = PositionalMask().requires_grad_(False)
    with pytest.raises(ValueError, match=r"model has 4 parameters, none with requires_grad; expected at least one"):
        fx.make_functional(model)
    with pytest.raises(ValueError, match=r"model has 0 parameters"):
        fx.make_functional(nn.ReLU())


@pytest.mark.parametrize("name", ["head.weight", "table.weight"])
def test_make_functional_rejects_meta_parameter(name: str) -> None:
    model = PositionalMask()
    owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    p = getattr(owner, leaf)
    setattr(owner, leaf, nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad))
    with pytest.raises(ValueError, match=rf"model parameter '{name}' is on the meta device; expected loaded weights"):
        fx.make_functional(model)


def test_policy_copies_no_weight() -> None:
    model = PositionalMask()
    apply, params = fx.make_functional(model)
    template = apply.templates.full.module
    assert [name for name, _ in template.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(x.is_meta for x in [*template.parameters(), *template.buffers()])
    live = {x.data_ptr() for x in [*model.parameters(), *model.buffers()]}
    assert {x.data_ptr() for x in [*apply.forward.frozen.values(), *params.values()]} == live


@pytest.mark.parametrize("training", [True, False])
def test_policy_ignores_training_mode(training: bool) -> None:
    model = PositionalMask().train(training)
    apply, params = fx.make_functional(model)
    model.dropout.p = 1.0
    first = apply(params, IDS, MASK)
    assert torch.equal(first, apply(params, IDS, MASK))
    assert model.training is training
    assert model.dropout.training is training
    torch.testing.assert_close(first, model.eval().logits(IDS, MASK).detach(), rtol=0, atol=0)
