"""make_functional refuses models whose training would not follow their loss; check_policy reports later changes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.tiny_models import AttentionModel, make_float64
from torch import Tensor, nn

import fx_influence as fx


def halve(g: Tensor) -> Tensor:
    return g / 2


def drop_gradient(p: Tensor) -> None:
    p.grad = None


def keep_backward(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
    return None


HOOKS: dict[str, Callable[[Any], Any]] = {
    "register_hook": lambda m: m.qkv.weight.register_hook(halve),
    "register_post_accumulate_grad_hook": lambda m: m.qkv.weight.register_post_accumulate_grad_hook(drop_gradient),
    "backward pass": lambda m: m.qkv.register_full_backward_hook(keep_backward),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_make_functional_rejects_gradient_hooks(kind: str) -> None:
    model = make_float64(AttentionModel)
    handle = HOOKS[kind](model)
    with pytest.raises(ValueError, match=rf"'qkv(.weight)?' has a hook on its .*{kind}.*expected none"):
        fx.make_functional(model)
    handle.remove()
    fx.make_functional(model)


def test_make_functional_accepts_harmless_hooks() -> None:
    """Hooks of frozen parameters change no gradient, nor do those of wandb, which only look at it."""

    def look(g: Tensor) -> None:
        return None

    look.__module__ = "wandb.integration.torch"
    model = make_float64(AttentionModel)
    model.qkv.weight.register_hook(functools.partial(look))
    model.head.weight.register_hook(halve)
    model.head.weight.requires_grad_(False)
    fx.make_functional(model)


def test_check_policy_reports_changes() -> None:
    model = make_float64(AttentionModel)
    model.head.bias.requires_grad_(False)
    apply, params = fx.make_functional(model)
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
    with pytest.raises(ValueError, match="apply is a function; expected a Policy"):
        fx.check_policy(lambda params, ids, mask: ids, params, model)  # type: ignore[arg-type]


def test_policy_repr_shows_vocabulary_dtype_and_traits() -> None:
    apply, _ = fx.make_functional(make_float64(AttentionModel))
    assert repr(apply) == "Policy(vocab_size=None, dtype=float64, left_alignable, prefix_shareable)"
    low = apply.with_autocast(torch.bfloat16)
    assert "dtype=bfloat16, autocast=Autocast(dtype=torch.bfloat16" in repr(low)
