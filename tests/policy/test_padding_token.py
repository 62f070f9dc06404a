"""A text may hold the padding token. Reverse mode, and so a trainer, leaves its embedding out; the entropy does not."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.cases import assert_close
from helpers.present import present
from helpers.tolerances import (
    assert_close_to_rounding,
    assert_within,
    central_curvature,
    central_difference,
    policy_terms,
)
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

import fx_influence as fx
from fx_influence.autodiff.directional import token_jvp
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.core.tree import dot
from fx_influence.policy.modes.forward_ad import frozen_padding_embedding

PAD = 3


def make_model(tied: bool = True, layers: int = 2) -> Qwen2ForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=7,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.4,
            tie_word_embeddings=tied,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = Qwen2ForCausalLM(config).double()
        model.get_input_embeddings().weight.data[PAD].normal_(std=0.4)
        return model


def make_batch(rows: int, seed: int) -> fx.Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 7, (rows, 6), generator=generator)
    ids[:, [1, 3]] = PAD
    real = torch.ones_like(ids, dtype=torch.bool)
    completion = torch.arange(6).expand(rows, -1) >= 2
    weights = torch.randn(rows, 6, generator=generator, dtype=torch.float64) * completion
    return fx.Batch(ids, real, completion, coefficients=weights, entropy_coefficients=0.3 * weights.flip(0))


def make_state(model: Qwen2ForCausalLM) -> fx.AdamWState:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1
        optimizer.step()
    return fx.adamw_state(optimizer, model)


def loss_of(model: Qwen2ForCausalLM, batch: fx.Batch) -> Tensor:
    logits = model(batch.input_ids).logits[:, :-1].log_softmax(-1)
    logprobs = logits.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    entropies = -(logits.exp() * logits).sum(-1)
    assert batch.coefficients is not None
    assert batch.entropy_coefficients is not None
    return -(batch.coefficients[:, 1:] * logprobs + batch.entropy_coefficients[:, 1:] * entropies).sum()


@pytest.mark.parametrize("tied", [True, False])
def test_batch_gradient_skips_padding_embedding(tied: bool) -> None:
    model, batch = make_model(tied), make_batch(4, 1)
    apply, params = fx.make_functional(model)
    loss_of(model, batch).backward()
    grads = batch_gradient(params, batch, apply)
    terms, size = policy_terms(params, 6, 2), torch.stack([p.grad.abs().max() for p in model.parameters()])
    for name, p in model.named_parameters():
        # the model itself takes its norms in float32
        assert_close_to_rounding(grads[name], p.grad, terms=terms, scale=size, dtype=torch.float32, name=name)
    assert tied or not present(grads["model.embed_tokens.weight"])[PAD].any()


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(
    ("tied", "compiled"), [(True, False), (False, False), pytest.param(True, True, marks=pytest.mark.slow)]
)
def test_token_jvp_matches_gradient_with_padding_token(tied: bool, compiled: bool) -> None:
    # Compiling takes a time in proportion to the layers.
    apply, params = fx.make_functional(make_model(tied, layers=1 if compiled else 2), compiled=compiled)
    batch = make_batch(4, 1)
    direction = {name: torch.randn(p.shape, dtype=p.dtype) for name, p in params.items()}
    derivatives = token_jvp(params, direction, batch, apply)
    by_token = present(batch.coefficients) * derivatives.logprobs
    by_token = by_token + present(batch.entropy_coefficients) * derivatives.entropies
    g = batch_gradient(params, batch, apply)
    size = sum(float((present(g[name]) * v).abs().sum()) for name, v in direction.items())
    assert_close(-by_token.sum(), dot(g, direction), size, policy_terms(params, 6))


@pytest.mark.parametrize("matrix", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("with_grad", [True, False])
def test_influence_methods_agree_with_padding_token(matrix: bool, per_token: bool, with_grad: bool) -> None:
    model = make_model()
    state = make_state(model)
    apply, params = fx.make_functional(model)
    u, e = make_batch(4, 1), make_batch(6, 2)._replace(coefficients=None, entropy_coefficients=None)
    grad = batch_gradient(params, u, apply) if with_grad else None
    out = fx.influence(params, u, e, state, apply=apply, matrix=matrix, per_token=per_token, grad=grad)
    g = batch_gradient(params, u, apply)
    step = fx.adamw_decompose(g, state, params)
    derivative = fx.jvp_delta(params, step.direction, e, apply=apply)
    assert_close(out.total, derivative.first, derivative.contributions.abs().sum(), policy_terms(params, 6))
    assert out.unattributed == 0
    if out.matrix is not None:
        assert_close(out.matrix.sum(0), out.per_sequence, out.matrix.abs().sum(), policy_terms(params, 6))


def test_jvp_delta_follows_padding_embedding() -> None:
    apply, params = fx.make_functional(make_model(tied=False))
    e = make_batch(6, 2)._replace(coefficients=None, entropy_coefficients=None)
    direction = {name: torch.zeros_like(p) for name, p in params.items()}
    direction["model.embed_tokens.weight"][PAD] = 1.0
    first = fx.jvp_delta(params, direction, e, apply=apply)
    assert min(first.first.abs(), first.second.abs()) > 1e-3

    def moved(eta: float) -> Tensor:
        return fx.snis_delta(params, direction, eta, e, apply=apply).delta_h

    terms = policy_terms(params, 6)
    slope, bound = central_difference(moved, 1e-4, terms=terms, magnitude=math.log(7))
    assert bound < 0.01 * first.first.abs()
    assert_within(first.first, slope, bound)
    curvature, bound = central_curvature(moved, 1e-3, terms=terms, magnitude=math.log(7))
    assert bound < 0.01 * first.second.abs()
    assert_within(first.second, curvature, bound)


def test_frozen_padding_embedding_accepts_negative_index() -> None:
    ids, weight = torch.tensor([[0, 2]]), torch.eye(3)
    moved = torch.func.jvp(lambda w: frozen_padding_embedding(ids, w, -1), (weight,), (weight,))[1]
    assert moved.tolist() == [[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]
