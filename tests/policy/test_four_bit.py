"""QLoRA: frozen 4-bit layers of real bitsandbytes give what their dequantised weights give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.four_bit import codes_of, make_qlora
from helpers.hf_models import WIDTH, make_batches, warm_state
from helpers.tolerances import assert_close_to_rounding, policy_terms
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import fx_influence as fx
from fx_influence.policy.four_bit import four_bit_dtypes, four_bit_names
from fx_influence.types import Params

bnb: Any = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated")

OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {"compute_dtype": torch.float32},
    "unset": {"compute_dtype": None, "quant_type": "fp4", "compress_statistics": False},
    "bfloat16": {"compute_dtype": torch.bfloat16},
}


def assert_near(actual: Tensor, expected: Tensor, params: Params, scale: Any = None, *, name: str = "") -> None:
    # The frozen layers add up too, over three times 64 entries each.
    terms = 4 * policy_terms(params, WIDTH) + 4000
    assert_close_to_rounding(actual, expected, terms=terms, scale=scale, dtype=torch.float32, name=name)


@pytest.mark.parametrize("kind", OPTIONS)
def test_apply_is_the_models_forward(kind: str) -> None:
    model = make_qlora(**OPTIONS[kind])
    apply, params = fx.make_functional(model)
    batch = make_batches()[0]
    expected = model(batch.input_ids, batch.attention_mask.long()).logits
    actual = apply(params, batch.input_ids, batch.attention_mask)
    mask = batch.attention_mask
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    terms = 4 * policy_terms(params, WIDTH, passes=1) if dtype == torch.float32 else 30
    assert_close_to_rounding(actual[mask], expected[mask], terms=terms, dtype=dtype)
    fx.check_policy(apply, params, model)
    assert apply.compute_dtype == dtype
    assert not apply.structure.detaches_gradients


@pytest.mark.parametrize(
    ("kind", "matrix"),
    [pytest.param("float32", False, marks=pytest.mark.slow), ("unset", True), ("bfloat16", False)],
)
def test_influence_is_that_of_dequantised_weights(kind: str, matrix: bool) -> None:
    """Passes in float32 have the weights and biases that the layers round to the dtype they compute in."""
    results = []
    for dequantised in (False, True):
        model = make_qlora(dequantised, **OPTIONS[kind])
        state = warm_state(model)
        apply, params = fx.make_functional(model)
        batch_u, batch_e = make_batches()
        results.append(fx.influence(params, batch_u, batch_e, state, apply=apply, matrix=matrix))
    actual, expected = results
    scale = expected.per_sequence.abs().sum()
    for name in ("per_sequence", "per_token", "baseline", "momentum", "total", *(["matrix"] if matrix else [])):
        assert_near(getattr(actual, name), getattr(expected, name), params, scale, name=name)
    assert actual.residual.abs() < 1e-4 * scale


@pytest.mark.slow
def test_other_functions_are_those_of_dequantised_weights() -> None:
    results = []
    for dequantised in (False, True):
        model = make_qlora(dequantised, compute_dtype=torch.bfloat16)
        apply, params = fx.make_functional(model)
        batch_u, batch_e = make_batches()
        direction = {name: p.clone() for name, p in params.items()}
        finite = fx.snis_delta(params, direction, 1e-2, batch_e, apply=apply)
        first = fx.jvp_delta(params, direction, batch_e, apply=apply)
        kernel = fx.fisher_kernel(params, batch_u, batch_e, None, apply=apply, preconditioner="identity")
        results.append((finite.contributions, first.contributions, kernel))
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected, params, expected.abs().sum())


def test_derivatives_pass_their_own_check() -> None:
    model = make_qlora(compute_dtype=torch.bfloat16)
    apply, params = fx.make_functional(model)
    fx.check_derivatives(params, make_batches()[1], apply=apply)


@pytest.mark.slow
def test_quantised_head_is_a_linear_map() -> None:
    results = []
    for dequantised in (False, True):
        model = make_qlora(dequantised, head=True, compute_dtype=torch.bfloat16)
        state = warm_state(model)
        apply, params = fx.make_functional(model)
        results.append(fx.influence(params, *make_batches(), state, apply=apply).per_sequence)
    assert_near(results[0], results[1], params, results[1].abs().sum())


@pytest.mark.slow
def test_dora_reads_the_dequantised_weight() -> None:
    """PEFT's DoRA takes the norm of the base weight; under 4 bits it reads ``layer.weight``."""
    results = []
    for dequantised in (False, True):
        model = make_qlora(dequantised, dora=True, compute_dtype=torch.float32)
        apply, params = fx.make_functional(model)
        batch = make_batches()[0]
        results.append(apply(params, batch.input_ids, batch.attention_mask)[batch.attention_mask])
        assert apply.structure.detaches_gradients
    assert_near(results[0], results[1], params)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_autocast_is_that_of_the_model(kind: str) -> None:
    """bitsandbytes calls a linear layer inside, which autocast reaches, with weights of the layer's dtype."""
    model = make_qlora(**OPTIONS[kind])
    apply, params = fx.make_functional(model)
    batch = make_batches()[0]
    mask = batch.attention_mask
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            expected = model(batch.input_ids, mask.long()).logits.float()
        half = apply.with_autocast(torch.bfloat16)(params, batch.input_ids, mask).float()
        raised = apply.with_min_precision()(params, batch.input_ids, mask).float()
    distance = (raised - expected)[mask].norm()
    assert (half - expected)[mask].norm() < 0.1 * distance
    assert distance > 0


def test_graph_saves_no_dequantised_weight() -> None:
    model = make_qlora(compute_dtype=torch.float32)
    apply, params = fx.make_functional(model)
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    batch, shapes = make_batches()[0], set[torch.Size]()

    def note(x: Tensor) -> Tensor:
        shapes.add(x.shape)
        return x

    with saved_tensors_hooks(note, lambda x: x):
        loss = apply(leaves, batch.input_ids, batch.attention_mask)[batch.attention_mask].square().mean()
    assert shapes
    assert not shapes & {torch.Size([64, 64]), torch.Size([32, 64])}
    grads = torch.autograd.grad(loss, list(leaves.values()))
    twin = make_qlora(True, compute_dtype=torch.float32)
    logits = twin(batch.input_ids, batch.attention_mask.long()).logits
    expected = torch.autograd.grad(
        logits[batch.attention_mask].square().mean(), [p for p in twin.parameters() if p.requires_grad]
    )
    for g, e in zip(grads, expected, strict=True):
        assert_near(g, e, params)


def test_model_stays_as_it_is() -> None:
    model = make_qlora(compute_dtype=torch.bfloat16)
    before, dtypes = codes_of(model), {name: p.dtype for name, p in model.named_parameters()}
    state = warm_state(model)
    apply, params = fx.make_functional(model)
    fx.influence(params, *make_batches(), state, apply=apply)
    after = codes_of(model)
    assert all(torch.equal(after[name], x) for name, x in before.items())
    assert {name: p.dtype for name, p in model.named_parameters()} == dtypes
    assert not any(p.grad is not None for p in model.parameters())


def test_live_codes_are_read() -> None:
    """The policy has no copy of the codes: one that the model is given later counts."""
    model = make_qlora(compute_dtype=torch.float32)
    apply, params = fx.make_functional(model)
    batch = make_batches()[0]
    before = apply(params, batch.input_ids, batch.attention_mask)
    layer = next(x for x in model.modules() if isinstance(x, bnb.nn.Linear4bit))
    layer.weight.data = layer.weight.data.flip(0)
    assert not torch.equal(apply(params, batch.input_ids, batch.attention_mask), before)
    fx.check_policy(apply, params, model)


def with_eight_bit(model: Any) -> None:
    model.base_model.model.model.layers[0].mlp.gate_proj = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)


def with_quantised_embedding(model: Any) -> None:
    model.base_model.model.model.embed_tokens = bnb.nn.Embedding4bit(64, 64)


def with_trained_codes(model: Any) -> None:
    layer = bnb.nn.Linear4bit(64, 64, quant_storage=torch.bfloat16).to("cpu")
    layer.weight.requires_grad_()
    model.base_model.model.model.layers[0].mlp.gate_proj = layer


def with_codes_to_come(model: Any) -> None:
    model.base_model.model.model.layers[0].mlp.gate_proj = bnb.nn.Linear4bit(64, 64)


def with_packed_codes(model: Any) -> None:
    model.base_model.model.model.layers[0].mlp.gate_proj.weight.quant_state.packing_format_for_cpu = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_eight_bit, r"gate_proj' is Linear8bitLt.*no derivatives.*load_in_4bit"),
        (with_quantised_embedding, r"embed_tokens' is Embedding4bit"),
        (with_trained_codes, r"gate_proj' has 4-bit weights that are trained; expected frozen.*prepare_model_for_kbit"),
        (with_codes_to_come, r"gate_proj' has 4-bit weights that are not quantised yet.*model\.to\(device\)"),
        (with_packed_codes, r"gate_proj' has 4-bit weights that are packed for inference.*support_avx512bf16_for_cpu"),
    ],
)
def test_layers_without_derivatives_are_refused(change: Any, message: str) -> None:
    model = make_qlora(compute_dtype=torch.float32)
    change(model)
    with pytest.raises(ValueError, match=message):
        fx.make_functional(model)


def test_compiled_passes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"compiled is True for a model with 4-bit weights; expected False"):
        fx.make_functional(make_qlora(compute_dtype=torch.float32), compiled=True)


def test_weights_packed_later_are_refused() -> None:
    model = make_qlora(compute_dtype=torch.float32)
    apply, params = fx.make_functional(model)
    with_packed_codes(model)
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="packed for inference"):
        apply(params, ids, torch.ones_like(ids, dtype=torch.bool))


def test_plain_models_have_no_four_bit_layers() -> None:
    assert four_bit_names(nn.Linear(2, 2)) == set()
    assert four_bit_dtypes(nn.Linear(2, 2)) == set()
