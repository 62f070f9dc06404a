"""Layer IO: supported uses give each row's gradient, unsupported ones are recognised and left to vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cases import TinyPolicy, assert_close, make_apply, random_batch
from helpers.strategies import VOCAB, Case, cases
from helpers.tolerances import TINY_POLICY, assert_within, rounding_bound
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fx_influence as fx
from fx_influence.autodiff.gram import gradient_gram
from fx_influence.autodiff.layer_io.collect import collect_layer_io
from fx_influence.autodiff.layer_io.row_gradients import LayerIOs, row_gradients
from fx_influence.autodiff.layer_io.support import supported_names
from fx_influence.batching.microbatch import micro_batches
from fx_influence.types import Batch, Params

WIDTH, HIDDEN = 7, 6
Model = Callable[[Params, Tensor, Tensor], Tensor]


def collect(params: Params, batch: Batch, apply: Model, names: frozenset[str], temperature: float = 1.0) -> LayerIOs:
    [micro_batch] = micro_batches(batch, len(batch.input_ids), left_alignable=False)
    return collect_layer_io(params, batch, micro_batch, apply, names, temperature)[0]


def assert_rows_equal(apply: Model, params: Params, batch: Batch, expected: set[str], terms: int = TINY_POLICY) -> None:
    """Check the supported names, row gradients against ``vmap(grad)``, and the Gram matrix, exact for all names."""
    names = supported_names(params, batch, apply)
    assert names == expected
    by_vmap = fx.per_sample_grads(fx.rollout_loss(apply), params, batch)
    layer_ios = collect(params, batch, apply, names)
    for name in names:
        grads = row_gradients(layer_ios, name, params[name], slice(0, len(params[name])), len(batch.input_ids))
        assert_close(grads, by_vmap[name], by_vmap[name].abs().max(), terms)
    stacked = torch.cat([g.flatten(1) for g in by_vmap.values()], dim=1)
    diagonal = {name: torch.full_like(p, 0.5) for name, p in params.items()}
    gram = gradient_gram(params, batch, batch, diagonal, apply)
    assert_close(gram, 0.5 * stacked @ stacked.T, stacked.square().sum(1).max(), terms)
    assert by_vmap[next(iter(by_vmap))].abs().max() > 1e-3


def batch_of(rows: int = 4, seed: int = 0) -> Batch:
    return random_batch(torch.Generator().manual_seed(seed), rows, WIDTH, VOCAB)


def weights(seed: int = 0, **shapes: tuple[int, ...]) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


@given(case=cases(), tied=st.booleans())
@settings(max_examples=10)
def test_supported_names_covers_the_tiny_policy(case: Case, tied: bool) -> None:
    apply, params = make_apply(TinyPolicy(VOCAB, HIDDEN, 1, 2, case.batch_u.input_ids.shape[1], tied=tied, seed=3))
    names = supported_names(params, case.batch_u, apply)
    # Its position table is added as one to every row and belongs to no tokens of a row.
    assert params.keys() - names <= {"position.weight"}
    layer_ios = collect(params, case.batch_u, apply, names, case.temperature)
    by_vmap = fx.per_sample_grads(fx.rollout_loss(apply, case.temperature), params, case.batch_u)
    for name in names:
        grads = row_gradients(layer_ios, name, params[name], slice(0, len(params[name])), len(case.batch_u.input_ids))
        assert_close(grads, by_vmap[name], by_vmap[name].abs().max())


BASE = weights(1, embed=(VOCAB, HIDDEN), head=(VOCAB, HIDDEN), w=(HIDDEN, HIDDEN), b=(HIDDEN,), s=(HIDDEN,))


def model(middle: Callable[[Params, Tensor], Tensor]) -> Model:
    def apply(params: Params, ids: Tensor, mask: Tensor) -> Tensor:
        return F.linear(middle(params, F.embedding(ids, params["embed"])).tanh(), params["head"])

    return apply


KNOWN: dict[str, tuple[Callable[[Params, Tensor], Tensor], set[str]]] = {
    "a linear map with bias": (lambda p, x: F.linear(x, p["w"], p["b"]) * p["s"], {"w", "b", "s"}),
    "the same weight twice": (lambda p, x: F.linear(F.linear(x, p["w"]).tanh(), p["w"]), {"w"}),
    "all tokens in one axis": (lambda p, x: F.linear(x.view(-1, HIDDEN), p["w"]).view(x.shape), {"w"}),
    "a transposed map": (lambda p, x: torch.addmm(p["b"], x.view(-1, HIDDEN), p["w"]).view(x.shape), {"w", "b"}),
    "a scale per head": (
        lambda p, x: (x.view(*x.shape[:2], 2, 3) * p["s"][:3]).flatten(2) + F.linear(x, p["w"]),
        {"w"},
    ),
    "a layer norm": (lambda p, x: F.layer_norm(x, (HIDDEN,), p["s"], p["b"]), {"s", "b"}),
    "a norm with its weight in front": (lambda p, x: p["s"] * F.normalize(x, dim=-1), {"s"}),
    "a weight computed with first": (lambda p, x: F.linear(x, 2 * p["w"]) + p["b"], {"b"}),
    "a weight that multiplies from the left": (lambda p, x: x @ p["w"] * p["s"], {"s"}),
    "tokens that are picked out": (lambda p, x: map_three_tokens(p["w"], x), set()),
    "positions first": (lambda p, x: F.linear(x.transpose(0, 1), p["w"]).transpose(0, 1), set()),
    "a shift that is changed in place": (lambda p, x: F.linear(x, p["w"]).mul_(p["s"]), set()),
    "one row mapped for all rows": (lambda p, x: x + F.linear(x[:1], p["w"]), set()),
}


def map_three_tokens(w: Tensor, x: Tensor) -> Tensor:
    """Return x with three tokens of every row, picked out of all tokens in one axis, replaced by a linear map."""
    index = (torch.arange(len(x))[:, None] * x.shape[1] + torch.tensor([1, 0, 3])).flatten()
    tokens = x.flatten(0, 1)
    return tokens.index_copy(0, index, F.linear(tokens[index], w)).view(x.shape)


@pytest.mark.parametrize("what", KNOWN)
def test_row_gradients_are_exact_by_kind_of_use(what: str) -> None:
    middle, expected = KNOWN[what]
    params = {k: v for k, v in BASE.items() if k in {"embed", "head"} or k in uses_of(middle)}
    if what == "one row mapped for all rows":
        # Per-row gradients of what enters it do not exist, as the other rows' losses depend on row 0.
        assert supported_names(params, batch_of(), model(middle)) == {"head"}
        return
    assert_rows_equal(model(middle), params, batch_of(), expected | {"embed", "head"})


def embedding(**options: Any) -> Model:
    return lambda p, ids, mask: F.linear(F.embedding(ids, p["embed"], **options), p["head"])


def uses_of(middle: Callable[[Params, Tensor], Tensor]) -> set[str]:
    return set(middle.__code__.co_consts) & set(BASE)


def test_row_gradients_is_0_for_the_padding_token() -> None:
    ids = torch.tensor([[2, 3, 2, 4], [3, 2, 2, 2]])
    mask = torch.tensor([[False, True, True, True]] * 2)
    batch = Batch(ids, torch.ones_like(mask), mask, coefficients=torch.rand(2, 4, dtype=torch.float64) * mask)
    params = {name: BASE[name] for name in ("embed", "head")}
    for padding in (2, 2 - VOCAB):
        assert_rows_equal(embedding(padding_idx=padding), params, batch, {"embed", "head"})
    layer_ios = collect(params, batch, embedding(padding_idx=2), frozenset({"embed"}))
    assert not row_gradients(layer_ios, "embed", params["embed"], slice(2, 3), 2).any()


def test_supported_names_excludes_scale_grad_by_freq() -> None:
    params = {name: BASE[name] for name in ("embed", "head")}
    assert supported_names(params, batch_of(), embedding(scale_grad_by_freq=True)) == {"head"}


@pytest.mark.parametrize("rows", [1, 2, 3, WIDTH])
def test_supported_names_tells_rows_from_positions(rows: int) -> None:
    params = {name: BASE[name] for name in ("embed", "head", "w")}
    turned = model(lambda p, x: F.linear(x.transpose(0, 1), p["w"]).transpose(0, 1))
    assert_rows_equal(turned, params, batch_of(rows), {"embed", "head"})


def test_collect_layer_io_refuses_unsupported_names() -> None:
    params = {name: BASE[name] for name in ("embed", "head", "w")}
    with pytest.raises(ValueError, match=r"names has 'w'; expected .* a layer-input rule. Exclude it"):
        collect(params, batch_of(), model(lambda p, x: x @ p["w"]), frozenset(params))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_gradients_are_exact_to_rounding_in_low_precision(dtype: torch.dtype) -> None:
    apply, params = make_apply(TinyPolicy(VOCAB, HIDDEN, 1, 2, WIDTH))
    batch, low = batch_of(), {name: p.to(dtype) for name, p in params.items()}
    names = supported_names(low, batch, apply)
    layer_ios = collect(low, batch, apply, names)
    exact = fx.per_sample_grads(fx.rollout_loss(apply), {n: p.double() for n, p in low.items()}, batch)
    grads = {name: row_gradients(layer_ios, name, low[name], slice(0, len(low[name])), 4) for name in names}
    assert {g.dtype for g in grads.values()} == {torch.float32}
    size = max(float(g.abs().max()) for g in exact.values())
    for name in names:
        assert_within(grads[name], exact[name], rounding_bound(dtype, TINY_POLICY, size), name)


def test_collect_layer_io_leaves_model_and_graph_alone() -> None:
    layer = nn.Linear(HIDDEN, VOCAB, dtype=torch.float64)
    live = {"embed": BASE["embed"].clone().requires_grad_(), "head": layer.weight}
    before = {name: p.detach().clone() for name, p in live.items()}
    layer_ios = collect(live, batch_of(), embedding(), frozenset(live))
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in live.items())
    tensors = [x for uses in layer_ios.values() for use in uses for x in (use.inputs, use.grads) if x is not None]
    assert len(tensors) == 4
    assert not any(x.requires_grad for x in tensors)


def test_row_gradients_are_0_without_coefficients() -> None:
    params = {name: BASE[name] for name in ("embed", "head")}
    batch = batch_of()._replace(coefficients=None, entropy_coefficients=None)
    apply = model(lambda p, x: x)
    layer_ios = collect(params, batch, apply, frozenset(params))
    assert not row_gradients(layer_ios, "head", params["head"], slice(0, VOCAB), 4).any()
