"""Hessian-vector products of the batch's loss against finite differences of its gradient from all logits."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import TinyPolicy, make_apply, random_batch, random_direction
from helpers.hf_models import VOCAB, WIDTH, make_model
from helpers.tolerances import assert_within, central_difference, policy_terms
from torch import Tensor, nn

import fx_influence as fx
from fx_influence.autodiff.directional import curvature, hessian_product
from fx_influence.core.tree import dot
from fx_influence.types import Apply, Batch, Params


def loss(apply: Apply, params: Params, batch: Batch, old: Tensor | None, temperature: float) -> Tensor:
    """Return -sum a r + b h from all logits; r = pi / pi_old with log pi_old = ``old``, or log pi where it is None."""
    logits = apply(params, batch.input_ids, batch.attention_mask)[:, :-1] / temperature
    log_pi = logits.log_softmax(-1)[batch.completion_mask[:, 1:]]
    chosen = log_pi.gather(-1, batch.input_ids[batch.completion_mask].unsqueeze(-1)).squeeze(-1)
    assert batch.coefficients is not None
    term = batch.coefficients[batch.completion_mask] * (chosen if old is None else (chosen - old).exp())
    if batch.entropy_coefficients is not None:
        term = term - batch.entropy_coefficients[batch.completion_mask] * (log_pi.exp() * log_pi).sum(-1)
    return -term.sum()


def gradient(apply: Apply, params: Params, batch: Batch, old: Tensor | None, temperature: float) -> Tensor:
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    value = loss(apply, leaves, batch, old, temperature)
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(params.values(), grads, strict=True)]
    )


def assert_product_matches(
    apply: Apply, params: Params, batch: Batch, ratio: bool, temperature: float = 1.3, chunk_size: int | None = 2
) -> None:
    """Compare with differences of gradients; under ``ratio`` pi_old is not pi, so c = a pi / pi_old is not a."""
    generator = torch.Generator().manual_seed(5)
    v, old, recorded = random_direction(generator, params), None, batch
    if ratio:
        logprobs = fx.token_values(params, batch, apply, temperature).logprobs
        shift = 0.3 * torch.randn(logprobs.shape, generator=generator, dtype=torch.float64)
        old = (logprobs + shift)[batch.completion_mask]
        assert batch.coefficients is not None
        recorded = batch._replace(coefficients=batch.coefficients * torch.exp(-shift))

    def gradient_at(eta: float) -> Tensor:
        return gradient(apply, {name: p + eta * v[name] for name, p in params.items()}, batch, old, temperature)

    product = hessian_product(
        params, v, recorded, apply, temperature, chunk_size, slopes=recorded.coefficients if ratio else None
    )
    flat = torch.cat([(torch.zeros_like(p) if (x := product[n]) is None else x).flatten() for n, p in params.items()])
    slope = central_difference(gradient_at, 1e-4, terms=policy_terms(params, batch.input_ids.shape[1]))
    assert_within(flat, slope.slope, slope.bound)
    assert slope.bound < 1e-4 * float(slope.slope.abs().max())


@pytest.mark.parametrize("ratio", [False, True], ids=["fixed", "ratio"])
@pytest.mark.parametrize("bonus", [False, True], ids=["", "bonus"])
def test_product_matches_differences_of_a_plain_module(ratio: bool, bonus: bool) -> None:
    model = TinyPolicy(7, 6, 1, 2, 9, tied=bonus, idle=True)
    apply, params = make_apply(model)
    batch = random_batch(torch.Generator().manual_seed(1), 3, 9, 7, gaps=True, entropy_coefficients=bonus)
    assert_product_matches(apply, params, batch, ratio)


@pytest.mark.parametrize(("family", "lora"), [("gpt2", False), ("llama", False), ("llama", True), ("gpt2", True)])
@pytest.mark.parametrize("ratio", [False, True], ids=["fixed", "ratio"])
def test_product_matches_differences_of_language_models(family: str, lora: bool, ratio: bool) -> None:
    """Models with LayerNorm, with RMSNorm and rotary positions, and with adapters; prompts are shared by rows."""
    model: nn.Module = make_model(family, lora=lora, attention="sdpa").double()
    apply, params = fx.make_functional(model)
    batch = random_batch(torch.Generator().manual_seed(2), 4, WIDTH, VOCAB, padding="left", entropy_coefficients=ratio)
    batch = batch._replace(input_ids=batch.input_ids.clamp(min=3))
    assert_product_matches(apply, params, batch, ratio)


def test_product_chunks_the_head() -> None:
    model: nn.Module = make_model("gpt2").double()
    apply, params = fx.make_functional(model)
    assert isinstance(apply, fx.Policy)
    batch = random_batch(torch.Generator().manual_seed(2), 4, WIDTH, VOCAB, entropy_coefficients=True)
    assert_product_matches(apply.replace(max_logits=3 * VOCAB), params, batch, ratio=True, chunk_size=None)


def test_product_along_its_direction_is_the_curvature() -> None:
    apply, params = make_apply(TinyPolicy(7, 6, 1, 2, 9))
    batch = random_batch(torch.Generator().manual_seed(1), 3, 9, 7, entropy_coefficients=True)
    v = random_direction(torch.Generator().manual_seed(4), params, 1e-3)
    product = hessian_product(params, v, batch, apply)
    expected = curvature(params, v, batch, apply)
    scale = sum(float((x * v[n]).abs().sum()) for n, x in product.items() if x is not None)
    bound = 10 * torch.finfo(torch.float64).eps * policy_terms(params, 9) ** 0.5 * scale
    assert_within(-dot(product, v), expected, bound)


def test_product_ignores_slopes_outside_completions() -> None:
    apply, params = make_apply(TinyPolicy(7, 6, 1, 2, 9))
    batch = random_batch(torch.Generator().manual_seed(1), 3, 9, 7)
    assert batch.coefficients is not None
    v = random_direction(torch.Generator().manual_seed(4), params)
    stained = torch.where(batch.completion_mask, batch.coefficients, torch.nan)
    clean = hessian_product(params, v, batch, apply, slopes=batch.coefficients)
    for name, x in hessian_product(params, v, batch, apply, slopes=stained).items():
        assert x is not None
        assert torch.equal(x, clean[name])  # type: ignore[arg-type]
