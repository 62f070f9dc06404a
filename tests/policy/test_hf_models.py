"""Hugging Face causal LMs: full or LoRA, tied or not, padded on either side, whatever the trainer has left on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.hf_models import (
    VOCAB,
    WIDTH,
    adapters,
    families,
    left_padded,
    make_batches,
    make_model,
    right_padded,
    setup,
    warm_state,
)
from helpers.present import present
from helpers.tolerances import (
    assert_close_to_rounding,
    assert_within,
    central_curvature,
    central_difference,
    policy_terms,
    rounding_bound,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fx_influence as fx
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.autodiff.layer_io.collect import collect_layer_io
from fx_influence.autodiff.layer_io.row_gradients import row_gradients
from fx_influence.autodiff.layer_io.support import supported_names
from fx_influence.batching.microbatch import micro_batches
from fx_influence.batching.rows import select_rows
from fx_influence.testing import reference
from fx_influence.types import Batch, Params

# transformers renamed it in 5.23; peft reads the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated")


def assert_near(actual: Tensor, expected: Tensor, params: Params, scale: Any = None, *, name: str = "") -> None:
    """Assert equality up to the rounding of a model's passes in the dtype of its parameters."""
    dtype = next(iter(params.values())).dtype
    terms = policy_terms(params, WIDTH)
    assert_close_to_rounding(actual, expected, terms=terms, scale=scale, dtype=dtype, name=name)


def relative_residual(out: fx.Influence) -> float:
    total = (out.residual + out.per_sequence.sum()).abs()
    return float(out.residual.abs() / torch.maximum(out.per_sequence.abs().sum(), total))


def same(a: fx.Influence, b: fx.Influence) -> bool:
    """Return whether both are equal bit for bit."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, Tensor) and isinstance(y, Tensor)]
    return len(pairs) > 5 and all(torch.equal(x, y) for x, y in pairs)


@families
@adapters
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_influence_is_invariant_to_padding_side(family: str, lora: bool, tied: bool) -> None:
    model = make_model(family, lora=lora, tied=tied)
    apply, state = setup(model)
    assert all("lora_" in name for name in state.params) == lora
    assert ("lm_head.weight" in state.params) == (not lora and not tied)
    right = fx.influence(*state, apply=apply, matrix=True)
    moved = state._replace(batch_u=left_padded(state.batch_u), batch_e=left_padded(state.batch_e))
    assert moved.batch_u.attention_mask[:, -1].all()
    left = fx.influence(*moved, apply=apply, matrix=True)
    for out in (right, left):
        print(f"residual {relative_residual(out):.2g}")
        size = present(out.matrix).abs().sum(0)
        assert_near(out.residual, torch.zeros_like(out.residual), state.params, size.sum())
        assert_near(present(out.matrix).sum(0), out.per_sequence, state.params, size)
        assert torch.all(out.stderr > 0)
    for name in ("per_sequence", "matrix", "baseline", "stderr"):
        assert_near(
            getattr(left, name), getattr(right, name), state.params, present(right.matrix).abs().sum(), name=name
        )
    assert_near(
        right_padded(present(left.per_token), state.batch_u),
        present(right.per_token),
        state.params,
        present(right.matrix).abs().sum(),
    )


@families
@adapters
def test_influence_matches_reference_in_float64(family: str, lora: bool) -> None:
    apply, state = setup(make_model(family, lora=lora).double())
    u, e = (select_rows(batch, torch.tensor([0, 1, 3])) for batch in (state.batch_u, state.batch_e))
    out = fx.influence(state.params, u, e, state.opt_state, apply=apply, temperature=0.7, matrix=True)
    slow = reference.influence(apply, state.params, u, e, state.opt_state, temperature=0.7)
    assert present(out.matrix).dtype == torch.float64
    for name in ("matrix", "per_sequence", "per_token", "baseline", "stderr"):
        assert_near(getattr(out, name), getattr(slow, name), state.params, slow.matrix.abs().sum(), name=name)
    assert_near(out.residual, torch.zeros_like(out.residual), state.params, slow.matrix.abs().sum())


@families
def test_float64_steps_are_not_rounded_inside_model(family: str) -> None:
    """Norms and softmax of these models cast to float32: at eta 1e-7 that alone is more than the step changes."""
    apply, state = setup(make_model(family).double())
    generator = torch.Generator().manual_seed(0)
    v = {name: torch.randn(p.shape, dtype=p.dtype, generator=generator) for name, p in state.params.items()}
    first = fx.jvp_delta(state.params, v, state.batch_e, apply=apply).first
    slope, bound = central_difference(
        lambda eta: fx.snis_delta(state.params, v, eta, state.batch_e, apply=apply).delta_h,
        1e-6,
        terms=policy_terms(state.params, WIDTH),
        magnitude=math.log(VOCAB),
    )
    assert bound < 1e-3 * first.abs() < rounding_bound(torch.float32) / 1e-6
    assert_within(first, slope, bound)


@families
@adapters
@pytest.mark.parametrize("tied", [True, False])
def test_layer_io_covers_every_parameter(family: str, lora: bool, tied: bool) -> None:
    apply, state = setup(make_model(family, lora=lora, tied=tied).double())
    batch = left_padded(state.batch_u)
    names = supported_names(state.params, batch, apply)
    assert names == state.params.keys()
    [part] = micro_batches(batch, len(batch.input_ids), left_alignable=True)
    factors, _ = collect_layer_io(state.params, batch, part, apply, names, 0.7)
    back = part.row_index.argsort()
    slow = fx.per_sample_grads(fx.rollout_loss(apply, 0.7), state.params, batch)
    for name, p in state.params.items():
        actual = row_gradients(factors, name, p, slice(0, len(p)), len(back))[back]
        assert_near(actual, slow[name], state.params, name=name)
        half = slice(0, 1 + len(p) // 2)
        actual = row_gradients(factors, name, p, half, len(back))[back]
        assert_near(actual, slow[name][:, half], state.params, name=name)


@pytest.mark.slow
@adapters
def test_influence_runs_under_flop_counter(lora: bool) -> None:
    apply, state = setup(make_model("qwen2", lora=lora))
    with FlopCounterMode(display=False) as counter:
        fx.influence(*state, apply=apply, matrix=True)
    assert counter.get_total_flops() > 0


@families
@adapters
def test_float64_left_padding_gives_no_nan(family: str, lora: bool) -> None:
    """Eager attention adds float64's lowest number as a mask and then takes a float32 softmax: NaN in blind rows."""
    apply, state = setup(make_model(family, lora=lora, attention="sdpa").double())
    moved = state._replace(batch_u=left_padded(state.batch_u), batch_e=left_padded(state.batch_e))
    right, left = (fx.influence(*inputs, apply=apply, matrix=True) for inputs in (state, moved))
    for name in ("matrix", "per_sequence"):
        assert_near(
            getattr(left, name), getattr(right, name), state.params, present(right.matrix).abs().sum(), name=name
        )


@families
def test_position_ids_follow_mask_unless_omitted(family: str) -> None:
    model = make_model(family).eval()
    right, left = make_batches()[1], left_padded(make_batches()[1])
    (apply, params), (omitting, _) = fx.make_functional(model), fx.make_functional(model, position_ids=False)
    with torch.no_grad():
        trainers = model(input_ids=left.input_ids, attention_mask=left.attention_mask.long()).logits
    real = left.attention_mask
    terms = policy_terms(params, WIDTH, 1)
    assert_close_to_rounding(omitting(params, left.input_ids, real)[real], trainers[real], terms=terms)
    derived = apply(params, left.input_ids, real)[real]
    expected = apply(params, right.input_ids, right.attention_mask)[right.attention_mask]
    assert_close_to_rounding(derived, expected, terms=terms)
    gap = (trainers[real] - derived).abs().max()
    # Absolute positions see where a row starts; rotary ones are relative.
    assert gap > 0.1 if family == "gpt2" else gap < rounding_bound(torch.float32, terms, derived)


def snapshot(model: Any) -> dict[str, Any]:
    return {
        "values": {name: x.clone() for name, x in [*model.named_parameters(), *model.named_buffers()]},
        "flags": {name: (p.requires_grad, p.grad, id(p)) for name, p in model.named_parameters()},
        "modes": {name: m.training for name, m in model.named_modules()},
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
        "hooks": {name: list(m._forward_hooks) for name, m in model.named_modules()},
        "checkpointing": model.is_gradient_checkpointing,
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
    }


@families
@adapters
def test_influence_leaves_model_unchanged(family: str, lora: bool) -> None:
    model = make_model(family, lora=lora, dropout=0.1, attention="sdpa")
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    next(m for name, m in model.named_modules() if name.endswith("mlp")).eval()
    opt_state, before = warm_state(model), snapshot(model)
    apply, params = fx.make_functional(model)
    fx.influence(params, *make_batches(), opt_state, apply=apply, matrix=True)
    after = snapshot(model)
    old, new = before.pop("values"), after.pop("values")
    assert all(torch.equal(old[name], new[name]) for name in old | new)
    assert before == after
    assert before["attention"] == "sdpa"
    assert set(before["modes"].values()) == {True, False}


@pytest.mark.slow
@families
@adapters
def test_policy_disables_dropout(family: str, lora: bool) -> None:
    model = make_model(family, lora=lora, dropout=0.5, attention="sdpa")
    plain_apply, state = setup(make_model(family, lora=lora, attention="sdpa"))
    apply, dropping = setup(model)
    with torch.no_grad():
        ids = state.batch_e.input_ids
        assert (model(ids).logits - model(ids).logits).abs().max() > 0.1, "the model itself draws"
    assert same(fx.influence(*dropping, apply=apply), fx.influence(*state, apply=plain_apply))
    assert model.training


@pytest.mark.slow
@families
@adapters
def test_policy_ignores_gradient_checkpointing(family: str, lora: bool) -> None:
    plain_apply, state = setup(make_model(family, lora=lora))
    model = make_model(family, lora=lora)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    apply, checkpointed = setup(model)
    assert model.is_gradient_checkpointing
    assert same(
        fx.influence(*checkpointed, apply=apply, matrix=True), fx.influence(*state, apply=plain_apply, matrix=True)
    )


def trainer_gradient(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return what backward on the model itself leaves in ``p.grad``, the loss written out."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits[:, :-1]
    log_pi = logits.log_softmax(-1)
    taken = log_pi.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    entropies = -(log_pi.exp() * log_pi).sum(-1)
    loss = -(present(batch.coefficients)[:, 1:] * taken + present(batch.entropy_coefficients)[:, 1:] * entropies).sum()
    model.zero_grad()
    loss.backward()
    return {name: present(p.grad).clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
@families
@adapters
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_batch_gradient_matches_trainer(family: str, lora: bool, attention: str) -> None:
    model = make_model(family, lora=lora, attention=attention)
    apply, state = setup(model)
    trainer_grads, ours = trainer_gradient(model, state.batch_u), batch_gradient(state.params, state.batch_u, apply)
    assert list(trainer_grads) == list(ours)
    largest = max(float(g.abs().max()) for g in trainer_grads.values())
    for name, g in trainer_grads.items():
        assert_near(present(ours[name]), g, state.params, largest, name=name)
    plain, with_grad = fx.influence(*state, apply=apply), fx.influence(*state, apply=apply, grad=trainer_grads)
    assert_near(
        present(with_grad.per_token), present(plain.per_token), state.params, present(plain.per_token).abs().sum()
    )
    assert with_grad.unattributed == 0


@families
def test_fused_attention_matches_eager(family: str) -> None:
    (fused, state), (eager, _) = (setup(make_model(family, attention=kind)) for kind in ("sdpa", "eager"))
    one, other = (fx.influence(*state, apply=apply, matrix=True) for apply in (fused, eager))
    for field in ("per_sequence", "per_token", "matrix", "stderr"):
        assert_near(
            getattr(one, field), getattr(other, field), state.params, present(other.matrix).abs().sum(), name=field
        )


@families
@adapters
def test_jvp_delta_matches_finite_differences(family: str, lora: bool) -> None:
    apply, state = setup(make_model(family, lora=lora).double())
    g = batch_gradient(state.params, state.batch_u, apply)
    norm = sum(float(present(x).square().sum()) for x in g.values()) ** 0.5
    direction = {name: -present(x) / norm for name, x in g.items()}
    out = fx.jvp_delta(state.params, direction, state.batch_e, apply=apply)
    assert abs(out.second) > 0.05
    steps: dict[str, Any] = {"terms": policy_terms(state.params, WIDTH), "magnitude": math.log(VOCAB)}
    moved = lambda eta: fx.snis_delta(state.params, direction, eta, state.batch_e, apply=apply).delta_h  # noqa: E731
    slope, bound = central_difference(moved, 1e-3, **steps)
    assert bound < 0.01 * out.first.abs()
    assert_within(out.first, slope, bound)
    curvature, bound = central_curvature(moved, 1e-3, **steps)
    assert bound < 0.1 * out.second.abs()
    assert_within(out.second, curvature, bound)


@pytest.mark.parametrize("adapter_dtype", [None, torch.bfloat16, torch.float32])
def test_bfloat16_models_take_float32_steps(adapter_dtype: torch.dtype | None) -> None:
    model = make_model("qwen2", lora=adapter_dtype is not None).to(torch.bfloat16)
    model.get_input_embeddings().weight.requires_grad_(False)
    for p in model.parameters():
        p.data = p.data.to(adapter_dtype or p.dtype) if p.requires_grad else p.data
    apply, params = fx.make_functional(model)
    assert {p.dtype for p in params.values()} == {adapter_dtype or torch.bfloat16}
    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(p.shape, generator=generator) for name, p in params.items()}
    batch = make_batches()[1]
    slope = fx.jvp_delta(params, direction, batch, apply=apply)
    eta = 0.05 * abs((slope.first / slope.second).item())
    ahead, behind = (fx.snis_delta(params, direction, x, batch, apply=apply).delta_h for x in (eta, -eta))
    assert ((ahead - behind) / (2 * eta) - slope.first).abs() < 0.02 * slope.first.abs()
