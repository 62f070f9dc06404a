"""Per-sample gradients in one batched pass per chunk, and the Gram matrix of rows' gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cases import TinyPolicy, assert_close, make_apply, random_batch
from helpers.present import present
from helpers.strategies import VOCAB, WIDTH, Case, cases
from helpers.tolerances import assert_close_to_rounding, policy_terms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fx_influence as fx
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.autodiff.gram import gradient_gram
from fx_influence.testing import reference
from fx_influence.types import Apply, Batch, Params

chunks = st.sampled_from([None, 1, 2, 3, 100])


class Counting:
    """Count calls of ``apply`` as Python sees them: a vmapped call of many rows is one."""

    def __init__(self, apply: Apply) -> None:
        self.apply, self.calls = apply, 0

    def __call__(self, params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.calls += 1
        return self.apply(params, input_ids, attention_mask)


def looped(loss_fn: Callable[[Params, Batch], Tensor], params: Params, batch: Batch) -> Params:
    """Return the gradient of every row by one ``autograd.grad`` per row."""
    rows = []
    for i in range(len(batch.input_ids)):
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        row = Batch._make(None if field is None else field[i] for field in batch)
        grads = torch.autograd.grad(
            loss_fn(leaves, row), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        rows.append(dict(zip(leaves, grads, strict=True)))
    return {name: torch.stack([row[name] for row in rows]) for name in params}


@given(case=cases(), chunk=chunks)
def test_per_sample_grads_matches_the_reference(case: Case, chunk: int | None) -> None:
    grads = fx.per_sample_grads(fx.rollout_loss(case.apply, case.temperature), case.params, case.batch_u, chunk)
    looped_grads = reference.sequence_gradients(case.apply, case.params, case.batch_u, case.temperature)
    assert grads.keys() == case.params.keys()
    for name, g in grads.items():
        assert g.shape == (len(looped_grads), *case.params[name].shape)
        assert_close(
            g,
            torch.stack([present(row[name]) for row in looped_grads]),
            torch.stack([present(row[name]) for row in looped_grads]).abs().max(),
        )


@given(case=cases(), chunk=chunks)
def test_per_sample_grads_add_up_to_batch_gradient(case: Case, chunk: int | None) -> None:
    rows = fx.per_sample_grads(fx.rollout_loss(case.apply, case.temperature), case.params, case.batch_u, chunk)
    full = batch_gradient(case.params, case.batch_u, case.apply, case.temperature, chunk)
    for name, g in full.items():
        assert g is not None
        assert_close(rows[name].sum(0), g, rows[name].abs().sum(0).max())


def curved(apply: Apply) -> Callable[[Params, Batch], Tensor]:
    """Return a user's loss that is not linear in log-probabilities and has a penalty independent of tokens."""

    def loss(params: Params, row: Batch) -> Tensor:
        logits = apply(params, row.input_ids[None], row.attention_mask[None])[0, :-1]
        taken = logits.log_softmax(-1).gather(-1, row.input_ids[1:, None])[:, 0]
        margin = torch.where(row.completion_mask[1:], taken, 0.0).sum()
        label = 0.0 if row.group is None else (row.group % 2) * 2.0 - 1.0
        return torch.nn.functional.softplus(label * margin) + 0.1 * params["head.bias"].square().sum()

    return loss


@pytest.mark.parametrize("chunk", [None, 1, 4, 5, 9])
def test_per_sample_grads_takes_any_loss_of_one_row(chunk: int | None) -> None:
    apply, params = make_apply(TinyPolicy(VOCAB, 6, 2, 2, WIDTH))
    batch = random_batch(torch.Generator().manual_seed(0), 5, WIDTH, VOCAB, groups=4, coefficients=False)
    grads, looped_grads = fx.per_sample_grads(curved(apply), params, batch, chunk), looped(curved(apply), params, batch)
    for name, g in grads.items():
        assert_close(g, looped_grads[name], looped_grads[name].abs().max())
    assert (grads["head.bias"][0] - grads["head.bias"][1]).abs().max() > 1e-3


@pytest.mark.parametrize("fields", [(), ("coefficients",), ("entropy_coefficients", "group")])
def test_per_sample_grads_passes_the_fields_of_the_batch(fields: tuple[str, ...]) -> None:
    apply, params = make_apply(TinyPolicy(VOCAB, 6, 1, 2, WIDTH))
    full = random_batch(torch.Generator().manual_seed(1), 3, WIDTH, VOCAB, groups=2, entropy_coefficients=True)
    optional = ("coefficients", "entropy_coefficients", "group")
    left_out: dict[str, Any] = {name: None for name in optional if name not in fields}
    batch = full._replace(**left_out)
    seen: list[Batch] = []

    def loss(params: Params, row: Batch) -> Tensor:
        seen.append(row)
        return curved(apply)(params, row)

    grads = fx.per_sample_grads(loss, params, batch)
    assert [name for name in optional if getattr(seen[0], name) is not None] == list(fields)
    assert seen[0].input_ids.shape == seen[0].completion_mask.shape == (WIDTH,)
    for name, g in looped(loss, params, batch).items():
        assert_close(grads[name], g, g.abs().max())


@pytest.mark.parametrize(("chunk", "passes"), [(None, 1), (7, 1), (3, 3), (2, 4), (1, 7)])
def test_per_sample_grads_takes_one_pass_per_chunk(chunk: int | None, passes: int) -> None:
    apply, params = make_apply(TinyPolicy(VOCAB, 6, 1, 2, WIDTH))
    batch = random_batch(torch.Generator().manual_seed(2), 7, WIDTH, VOCAB)
    counting = Counting(apply)
    fx.per_sample_grads(fx.rollout_loss(counting), params, batch, chunk)
    assert counting.calls == passes


def test_per_sample_grads_warns_of_missing_batching_rules() -> None:
    """torch falls back to a loop with a warning, which is an error in these tests, so no other test ran a loop."""

    def loss(params: Params, row: Batch) -> Tensor:
        return torch.pdist(params["w"][:, None] + row.input_ids.sum()).sum()

    ids = torch.ones(3, 2, dtype=torch.long)
    batch = Batch(ids, ids > 0, ids > 0)
    with pytest.warns(UserWarning, match="batching rule"):
        fx.per_sample_grads(loss, {"w": torch.ones(2)}, batch)


def test_per_sample_grads_refuses_dropout() -> None:
    model = TinyPolicy(VOCAB, 6, 1, 2, WIDTH, dropout=0.5)
    batch = random_batch(torch.Generator().manual_seed(3), 3, WIDTH, VOCAB)
    apply, params = make_apply(model.train())
    with pytest.raises(RuntimeError, match="random"):
        fx.per_sample_grads(fx.rollout_loss(apply), params, batch)
    off, params = fx.make_functional(model)
    assert model.training
    rows = fx.per_sample_grads(fx.rollout_loss(off), params, batch)
    for name, g in batch_gradient(params, batch, make_apply(model.eval())[0]).items():
        assert_close(rows[name].sum(0), present(g), present(g).abs().max())


def test_gradient_gram_has_cross_terms_of_tied_weights() -> None:
    tied = TinyPolicy(VOCAB, 6, 1, 2, WIDTH, tied=True, seed=4)
    untied = TinyPolicy(VOCAB, 6, 1, 2, WIDTH, seed=5)
    values = tied.state_dict()
    untied.load_state_dict({**values, "head.weight": values["token.weight"]})
    (apply, params), (split_apply, split_params) = make_apply(tied), make_apply(untied)
    assert set(split_params) - set(params) == {"head.weight"}
    generator = torch.Generator().manual_seed(4)
    batch_a, batch_b = (random_batch(generator, n, WIDTH, VOCAB) for n in (3, 4))
    one, two = (
        [fx.per_sample_grads(fx.rollout_loss(f), p, batch) for batch in (batch_a, batch_b)]
        for f, p in ((apply, params), (split_apply, split_params))
    )
    for full, parts in zip(one, two, strict=True):
        assert_close(full["token.weight"], parts["token.weight"] + parts["head.weight"])
        assert parts["token.weight"].abs().max() > 0.1
        assert parts["head.weight"].abs().max() > 0.1
    diagonal = {"token.weight": torch.rand(params["token.weight"].shape, generator=generator, dtype=torch.float64)}
    gram = gradient_gram(params, batch_a, batch_b, diagonal, apply)
    embed_a, head_a, embed_b, head_b = (
        part[name].flatten(1) * diagonal["token.weight"].flatten().sqrt()
        for part in two
        for name in ("token.weight", "head.weight")
    )
    crossed = embed_a @ head_b.T + head_a @ embed_b.T
    assert_close(gram, embed_a @ embed_b.T + head_a @ head_b.T + crossed)
    assert crossed.abs().max() > 0.1 * gram.abs().max()


@pytest.mark.slow
@given(case=cases(), chunk=chunks, budget=st.sampled_from([1, 20_000, 2**30]))
@settings(max_examples=4)
def test_gradient_gram_matches_the_reference(case: Case, chunk: int | None, budget: int) -> None:
    generator = torch.Generator().manual_seed(0)
    trained = list(case.params)[1:]
    diagonal = {
        name: torch.randn(case.params[name].shape, generator=generator, dtype=torch.float64) for name in trained
    }
    other = case.batch_e._replace(coefficients=case.batch_e.completion_mask.double())
    gram = gradient_gram(case.params, other, case.batch_u, diagonal, case.apply, case.temperature, budget, chunk)
    left, right = (
        reference.sequence_gradients(case.apply, case.params, batch, case.temperature)
        for batch in (other, case.batch_u)
    )
    looped_grads = [
        [reference.inner(a, reference.scale(diagonal, {k: b[k] for k in trained})) for b in right] for a in left
    ]
    expected = torch.tensor(looped_grads, dtype=torch.float64)
    assert_close(gram, expected, expected.abs().max())


@pytest.mark.parametrize(
    ("rows_held", "passes"), [(1, 4 * (1 + 6)), (2, 2 * (2 + 6)), (3, 3 + 6 + 1 + 6), (500, 1 + 1)]
)
def test_gradient_gram_rows_follow_the_memory_budget(rows_held: int, passes: int) -> None:
    """Two thirds of the budget for a block of batch b, the rest for the stream of batch a; two probes of the model."""
    apply, params = make_apply(TinyPolicy(VOCAB, 6, 1, 2, WIDTH))
    generator = torch.Generator().manual_seed(5)
    batch_a, batch_b = random_batch(generator, 6, WIDTH, VOCAB), random_batch(generator, 4, WIDTH, VOCAB)
    budget = 3 * rows_held * sum(8 * p.numel() for p in params.values()) // 2
    counting = Counting(apply)
    diagonal = {name: torch.ones_like(p) for name, p in params.items()}
    gram = gradient_gram(params, batch_a, batch_b, diagonal, counting, memory_budget=budget)
    assert counting.calls == 2 + passes
    assert_close(gram, gradient_gram(params, batch_a, batch_b, diagonal, apply))


@pytest.mark.parametrize(("rows_held", "passes"), [(1, 4 * (1 + 6)), (2, 2 * (2 + 6)), (8, 1 + 2), (50, 1 + 1)])
def test_gradient_gram_bounds_both_sides_without_layer_io(rows_held: int, passes: int) -> None:
    """Without layer IO full gradients are held: two thirds of the budget for a block of b, half of the rest for a."""
    generator = torch.Generator().manual_seed(5)
    params = {"w": torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64)}
    counting = Counting(lambda p, ids, mask: p["w"][ids])
    batch_a, batch_b = random_batch(generator, 6, WIDTH, VOCAB), random_batch(generator, 4, WIDTH, VOCAB)
    budget = 3 * rows_held * 8 * VOCAB**2 // 2
    gram = gradient_gram(params, batch_a, batch_b, params, counting, memory_budget=budget)
    # Two probes for layer IO, and one with two rows that tells whether vmap takes the other parameters.
    assert counting.calls == 3 + passes
    loss = fx.rollout_loss(lambda p, ids, mask: p["w"][ids])
    left, right = (fx.per_sample_grads(loss, params, batch)["w"].flatten(1) for batch in (batch_a, batch_b))
    assert_close(gram, left @ (params["w"].flatten() * right).T)


def test_gradient_gram_is_0_without_parameters() -> None:
    apply, params = make_apply(TinyPolicy(VOCAB, 6, 1, 2, WIDTH))
    batch = random_batch(torch.Generator().manual_seed(6), 3, WIDTH, VOCAB)
    assert torch.equal(gradient_gram(params, batch, batch, {}, apply), torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_per_sample_grads_are_at_least_float32(dtype: torch.dtype) -> None:
    apply, params = make_apply(TinyPolicy(VOCAB, 6, 1, 2, WIDTH))
    batch = random_batch(torch.Generator().manual_seed(7), 3, WIDTH, VOCAB)
    low = {name: p.to(dtype).requires_grad_() for name, p in params.items()}
    grads = fx.per_sample_grads(fx.rollout_loss(apply), low, batch)
    dtype = torch.promote_types(dtype, torch.float32)
    assert all(g.dtype == dtype and not g.requires_grad for g in grads.values())
    exact = fx.per_sample_grads(fx.rollout_loss(apply), {k: p.detach().double() for k, p in low.items()}, batch)
    size = torch.stack([g.abs().max() for g in exact.values()]).max()
    for name, g in grads.items():
        assert_close_to_rounding(g, exact[name], terms=policy_terms(low, WIDTH, 2), scale=size, name=name)
