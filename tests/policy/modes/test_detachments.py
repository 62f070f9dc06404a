"""Models that detach: the update batch has the trainer's gradient, the entropy the derivatives of the function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny_models import AttentionModel, full_batch, make_float64, warm_state
from torch import Tensor

import fx_influence as fx
from fx_influence.autodiff.gradients import batch_gradient


class Detaching(AttentionModel):
    """Divides by a norm of its weights that no gradient reaches, as PEFT's DoRA does."""

    def __init__(self, by: str = "detach") -> None:
        super().__init__()
        self.by = by

    def transform_stream(self, x: Tensor) -> Tensor:
        if self.by == "no_grad":
            with torch.no_grad():
                size = self.qkv.weight.norm()
        else:
            size = torch.detach(self.qkv.weight.norm())
        return 3 * x / size


@pytest.mark.parametrize("by", ["detach", "no_grad"])
def test_jvp_delta_ignores_detachments(by: str) -> None:
    apply, params = fx.make_functional(make_float64(Detaching, by=by))
    e = full_batch(2, rows=8)
    direction = {name: torch.zeros_like(p) for name, p in params.items()}
    direction["qkv.weight"] = params["qkv.weight"].clone()
    first = fx.jvp_delta(params, direction, e, apply=apply).first
    eta = 1e-4
    ahead, behind = (fx.snis_delta(params, direction, x, e, apply=apply).delta_h for x in (eta, -eta))
    assert first.abs() > 1e-3
    # Central differences are off by eta^2 times a third derivative of order 1.
    assert ((ahead - behind) / (2 * eta) - first).abs() <= 100 * eta**2


@pytest.mark.parametrize("options", [{}, {"matrix": True}, {"per_token": False, "stderr": False}])
def test_influence_detaches_update_batch_only(options: dict[str, Any]) -> None:
    model = make_float64(Detaching)
    apply, params = fx.make_functional(model)
    u, e, state = full_batch(1), full_batch(2, rows=8), warm_state(model)
    logprobs = model(u.input_ids)[:, :-1].log_softmax(-1).gather(-1, u.input_ids[:, 1:, None])[..., 0]
    assert u.coefficients is not None
    grads = torch.autograd.grad(-(u.coefficients[:, 1:] * logprobs).sum(), [*model.parameters()])
    update_grads = batch_gradient(params, u, apply)
    for g, (name, x) in zip(grads, update_grads.items(), strict=True):
        assert x is not None, name
        torch.testing.assert_close(x, g, rtol=0, atol=1e-12)
    out = fx.influence(params, u, e, state, apply=apply, **options)
    step = fx.adamw_decompose(update_grads, state, params)
    derivative = fx.jvp_delta(params, step.direction, e, apply=apply).first
    assert (out.total - derivative).abs() <= 1e-9 * out.per_sequence.abs().sum()


def test_jvp_delta_differentiates_dora_norms() -> None:
    from helpers.hf_models import make_model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(make_model("qwen2", attention="sdpa"), config).double()
    apply, params = fx.make_functional(model)
    e = full_batch(2, rows=8, vocab=19)
    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in params.items()}
    first = fx.jvp_delta(params, direction, e, apply=apply).first
    eta = 1e-6
    ahead, behind = (fx.snis_delta(params, direction, x, e, apply=apply).delta_h for x in (eta, -eta))
    assert ((ahead - behind) / (2 * eta) - first).abs() <= 1e-6 * first.abs()
