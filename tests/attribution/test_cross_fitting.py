"""Influences of rollouts over the other prompts of their own batch, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import TinyPolicy, add_padding, assert_close, make_apply, random_adamw_state, random_batch
from helpers.present import present
from helpers.strategies import VOCAB, WIDTH, Case, cases, influence_options, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fx_influence as fx
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.batching.rows import select_rows
from fx_influence.estimators.entropy import denominator_weights
from fx_influence.testing import reference
from fx_influence.testing.influence import cross_fitted
from fx_influence.types import Batch


def run(case: Case, batch_u: Batch, batch_e: Batch | None, **changes: Any) -> fx.Influence:
    return fx.influence(case.params, batch_u, batch_e, case.opt_state, **{**influence_options(case), **changes})


def batch_of_prompts(seed: int, rows: int, prompts: int) -> Batch:
    """Return rows with coefficients, the prompts' rows interleaved and no prompt without tokens."""
    batch = random_batch(torch.Generator().manual_seed(seed), rows, WIDTH, VOCAB, min_len=1)
    return batch._replace(group=5 + 3 * (torch.arange(rows) % prompts))


def slow_parts(case: Case, batch_u: Batch, batch_e: Batch) -> Tensor:
    options = (case.estimator, case.normalize, case.preconditioner, case.temperature, case.max_grad_norm)
    return reference.influence(case.apply, case.params, batch_u, batch_e, case.opt_state, *options).parts


@settings(max_examples=6)
@given(case=cases(), seed=seeds, prompts=st.sampled_from([4, 5, 10]))
def test_cross_fitted_influence_matches_the_reference(case: Case, seed: int, prompts: int) -> None:
    u = batch_of_prompts(seed, 11, prompts)
    parts, lengths = slow_parts(case, u, u), u.completion_mask.sum(-1).tolist()
    clusters = [(int(g) - 5) // 3 for g in present(u.group)]
    size = parts.abs().sum()
    for exact in (False, True):
        fold = clusters if exact else [cluster % 8 for cluster in clusters]
        expected = cross_fitted(parts, lengths, fold, fold, case.normalize)
        out = run(case, u, None, matrix=exact)
        assert_close(out.per_sequence, expected.per_sequence, size)
        assert_close(out.stderr, expected.stderr, size)
        assert_close(present(out.per_token).sum(-1), out.per_sequence, size)
        assert_close(out.total, out.baseline + out.per_sequence.sum(), size + out.baseline.abs())
        rows_only = run(case, u, None, matrix=exact, per_token=False, stderr=False)
        assert_close(rows_only.per_sequence, expected.per_sequence, size)
        assert rows_only.stderr.isnan().all()
    left_out = torch.tensor(clusters).unsqueeze(1) == torch.tensor(clusters)
    matrix = present(out.matrix)
    assert_close(matrix.sum(0), out.per_sequence, size)
    assert not matrix[left_out].any()


def test_degrees_of_freedom_count_the_parts_of_the_error_bars() -> None:
    case = make_case()
    u = batch_of_prompts(2, 20, 10)
    degrees = {
        (matrix, e is None): run(case, u, e, matrix=matrix).degrees_of_freedom
        for matrix in (False, True)
        for e in (None, u)
    }
    assert degrees == {(False, True): 6, (False, False): 7, (True, True): 8, (True, False): 9}
    assert run(case, u, None, stderr=False).degrees_of_freedom is None


@pytest.mark.slow
@given(case=cases(), seed=seeds)
def test_self_influence_is_that_of_the_own_prompt(case: Case, seed: int) -> None:
    u = batch_of_prompts(seed, 11, 5)
    parts, left_out = slow_parts(case, u, u), present(u.group).unsqueeze(1) == present(u.group)
    shares = denominator_weights(u.completion_mask, case.normalize)
    expected = torch.where(left_out, parts, 0.0).sum(0) / (left_out * (shares / shares.sum()).unsqueeze(1)).sum(0)
    assert_close(present(run(case, u, None).self_influence), expected, 5 * parts.abs().sum())
    assert run(case, u, u).self_influence is None


def test_self_influence_of_a_fold_takes_other_prompts_out() -> None:
    """A fold holds other prompts where there are more than folds; they move as everything outside it does."""
    case = make_case()
    u = batch_of_prompts(3, 24, 12)
    shares = denominator_weights(u.completion_mask, "token")
    shares = shares / shares.sum()
    parts, cluster = slow_parts(case, u, u), torch.arange(24) % 12
    out = run(case, u, None)
    for i in range(24):
        fold, prompt = cluster % 8 == cluster[i] % 8, cluster == cluster[i]
        others = parts[~fold, i].sum() / shares[~fold].sum()
        expected = (parts[fold, i].sum() - shares[fold & ~prompt].sum() * others) / shares[prompt].sum()
        assert_close(present(out.self_influence)[i], expected, parts[:, i].abs().sum() / shares[prompt].sum())


@pytest.mark.slow
@given(case=cases(), seed=seeds)
def test_rows_of_a_generation_batch_leave_their_prompts_out(case: Case, seed: int) -> None:
    """U is part of E, in another order and with other padding; E may also have rows of other prompts."""
    e = batch_of_prompts(seed, 12, 6)
    index = torch.tensor([7, 1, 2, 8])
    u = add_padding(select_rows(e, index), 2, 1)
    out = run(case, u, e._replace(coefficients=None), cross_fit=True)
    fold = (torch.arange(12) % 6).tolist()
    expected = cross_fitted(
        slow_parts(case, select_rows(e, index), e),
        e.completion_mask.sum(-1).tolist(),
        fold,
        [fold[i] for i in index.tolist()],
        case.normalize,
    )
    size = slow_parts(case, select_rows(e, index), e).abs().sum()
    assert_close(out.per_sequence, expected.per_sequence, size)
    assert_close(out.stderr, expected.stderr, size)


def make_case() -> Case:
    generator = torch.Generator().manual_seed(0)
    model = TinyPolicy(VOCAB, 6, 1, 2, WIDTH, seed=2)
    apply, params = make_apply(model)
    u = batch_of_prompts(1, 12, 6)
    state = random_adamw_state(generator, params)
    return Case(model, apply, params, u, u, state, "per_decision", "token", "frozen", 1.0, None)


def test_rows_of_other_prompts_leave_nothing_out() -> None:
    """Only rows whose group is in E leave a part of it out; without ``cross_fit`` none does."""
    case = make_case()
    e = batch_of_prompts(9, 12, 6)._replace(coefficients=None)
    renamed = e._replace(group=present(e.group) + 100)
    plain, same_groups = run(case, case.batch_u, renamed), run(case, case.batch_u, e)
    assert torch.equal(plain.per_sequence, same_groups.per_sequence)
    elsewhere = run(case, case.batch_u, renamed, cross_fit=True)
    assert torch.equal(plain.per_sequence, elsewhere.per_sequence)
    assert elsewhere.self_influence is None
    half = e._replace(group=torch.where(present(e.group) > 10, present(e.group) + 100, present(e.group)))
    mixed = run(case, case.batch_u, half, cross_fit=True)
    kept_whole = present(case.batch_u.group) > 10
    assert_close(mixed.per_sequence[kept_whole], plain.per_sequence[kept_whole])
    assert torch.equal(present(mixed.self_influence).isnan(), kept_whole)


@pytest.mark.parametrize("field", ["batch_u", "batch_e"])
def test_cross_fitting_refuses_batches_without_group(field: str) -> None:
    case = make_case()
    batches = {"batch_u": case.batch_u, "batch_e": case.batch_u}
    batches[field] = batches[field]._replace(group=None)
    with pytest.raises(ValueError, match=rf"{field}.group is None with cross_fit=True"):
        run(case, **batches, cross_fit=True)


def test_rows_without_group_are_folded_by_their_prompts() -> None:
    case = make_case()
    ids = present(case.batch_u.input_ids).clone()
    mask = torch.zeros_like(case.batch_u.completion_mask)
    mask[:, 3:] = True
    ids[:, :3] = torch.tensor([[1, 2, k % 6] for k in range(12)])
    u = Batch(ids, torch.ones_like(mask), mask, coefficients=torch.linspace(-1, 1, 84, dtype=torch.float64).view(12, 7))
    grouped = u._replace(group=torch.arange(12) % 6)
    assert_close(run(case, u, None).per_sequence, run(case, grouped, None).per_sequence)


@pytest.mark.parametrize("prompts", [1, 3])
def test_cross_fitting_refuses_few_prompts(prompts: int) -> None:
    case = make_case()
    with pytest.raises(ValueError, match=rf"{prompts} prompts.*at least 4.*pass fresh rollouts as batch_e"):
        run(case, batch_of_prompts(1, 12, prompts), None)


def test_cross_fitting_takes_the_trainers_gradient() -> None:
    case = make_case()
    plain = run(case, case.batch_u, None)
    step_gradient = batch_gradient(case.params, case.batch_u, case.apply)
    given_gradient = run(case, case.batch_u, None, grad=step_gradient)
    assert_close(given_gradient.per_sequence, plain.per_sequence, plain.per_sequence.abs().sum())
    assert_close(present(given_gradient.per_token), present(plain.per_token), plain.per_sequence.abs().sum())
