"""The linearity identity over random models, batches, states, hyperparameters and groups, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import TinyPolicy, add_padding, assert_close, make_apply, random_adamw_state, random_batch
from helpers.present import present
from helpers.strategies import PRECONDITIONERS, VOCAB, WIDTH, Case, cases, influence_options
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding, policy_terms
from hypothesis import given, settings
from hypothesis import strategies as st

import fx_influence as fx
from fx_influence.autodiff.directional import token_jvp
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.estimators.entropy import excess_entropies, length_coefficients
from fx_influence.estimators.stderr import MAX_RANDOM_GROUPS, cluster_index, cluster_stderr
from fx_influence.testing import reference
from fx_influence.types import Batch


def run(case: Case, **changes: Any) -> fx.Influence:
    arguments: dict[str, Any] = {
        "params": case.params,
        "batch_u": case.batch_u,
        "batch_e": case.batch_e,
        "opt_state": case.opt_state,
    }
    return fx.influence(**{**arguments, **influence_options(case), **changes})


@given(case=cases())
def test_influence_matches_the_reference(case: Case) -> None:
    out = run(case, matrix=True)
    adjoint = run(case)
    slow = reference.influence(
        case.apply,
        case.params,
        case.batch_u,
        case.batch_e,
        case.opt_state,
        case.estimator,
        case.normalize,
        case.preconditioner,
        case.temperature,
        case.max_grad_norm,
    )
    size = slow.matrix.abs().sum()
    assert_close(present(out.matrix), slow.matrix, size)
    assert_close(adjoint.per_sequence, slow.per_sequence, size)
    assert_close(present(adjoint.per_token), slow.per_token, size)
    for name in ("baseline", "momentum", "weight_decay", "total"):
        scale = max(float(size), abs(float(slow.momentum)), abs(float(slow.weight_decay)), abs(float(slow.total)))
        assert_close(getattr(adjoint, name), getattr(slow, name), scale)
    if not slow.stderr.isnan().any():
        assert_close(out.stderr, slow.stderr, size)
        assert_close(adjoint.stderr, slow.stderr, size)
    else:
        assert out.stderr.isnan().all()
        assert adjoint.stderr.isnan().all()


@given(case=cases())
def test_influence_terms_add_up(case: Case) -> None:
    out = run(case, matrix=True)
    size = float(out.per_sequence.abs().sum() + out.baseline.abs())
    assert_close(present(out.per_token).sum(-1), out.per_sequence, size)
    assert_close(present(out.matrix).sum(0), out.per_sequence, size)
    assert_close(out.baseline + out.per_sequence.sum(), out.total, size)
    assert_close(torch.stack(list(out.per_parameter.values())).sum(0), out.per_sequence.sum(), size)
    assert_close(out.residual, torch.zeros_like(out.residual), present(out.matrix).abs().sum())
    if case.preconditioner != "jacobian":
        assert_close(out.momentum + out.weight_decay, out.baseline, abs(out.momentum) + abs(out.weight_decay))
    assert not present(out.per_token)[~case.batch_u.completion_mask].any()


@given(case=cases())
def test_total_is_the_derivative_along_the_step(case: Case) -> None:
    if case.preconditioner in ("rmsprop", "lifetime"):
        case = case._replace(preconditioner="frozen")
    out = run(case)
    gradient = reference.add(
        reference.sequence_gradients(case.apply, reference.tracked(case.params), case.batch_u, case.temperature)
    )
    step = fx.adamw_decompose(gradient, case.opt_state, case.params, max_grad_norm=case.max_grad_norm)
    change = fx.jvp_delta(
        case.params,
        step.direction,
        case.batch_e,
        apply=case.apply,
        objective=fx.Entropy(case.estimator, case.normalize),
        temperature=case.temperature,
    )
    assert_close(out.total, change.first, change.contributions.abs().sum() + out.per_sequence.abs().sum())


def permuted(batch: Batch, order: torch.Tensor) -> Batch:
    return Batch._make(None if field is None else field[order] for field in batch)


@pytest.mark.slow
@given(case=cases(), seed=st.integers(0, 100))
def test_influence_is_equivariant_to_row_order(case: Case, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    order_u = torch.randperm(len(case.batch_u.input_ids), generator=generator)
    order_e = torch.randperm(len(case.batch_e.input_ids), generator=generator)
    plain = run(case, matrix=True)
    moved = run(case, matrix=True, batch_u=permuted(case.batch_u, order_u), batch_e=permuted(case.batch_e, order_e))
    size = present(plain.matrix).abs().sum()
    assert_close(present(moved.per_token), present(plain.per_token)[order_u], size)
    assert_close(present(moved.matrix), present(plain.matrix)[order_e][:, order_u], size)
    assert_close(moved.stderr, plain.stderr[order_u], size)


@pytest.mark.slow
@given(case=cases(), left=st.integers(0, 2), right=st.integers(0, 2), chunk=st.sampled_from([1, 2, 3]))
@settings(max_examples=3)
def test_influence_ignores_padding_and_chunk_size(case: Case, left: int, right: int, chunk: int) -> None:
    plain = run(case, matrix=True)
    wide = run(
        case,
        matrix=True,
        chunk_size=chunk,
        memory_budget=1,
        batch_u=add_padding(case.batch_u, left, right),
        batch_e=add_padding(case.batch_e, right, left),
    )
    size = present(plain.matrix).abs().sum()
    assert_close(present(wide.per_token)[:, left : left + WIDTH], present(plain.per_token), size)
    assert_close(present(wide.matrix), present(plain.matrix), size)


@given(case=cases())
@settings(max_examples=10)
def test_influence_is_pure(case: Case) -> None:
    before = [{k: v.clone() for k, v in case.params.items()}, {k: v.clone() for k, v in case.opt_state.exp_avg.items()}]
    ids = case.batch_u.input_ids.clone()
    state = torch.get_rng_state()
    first, second = run(case, matrix=True), run(case, matrix=True)
    for a, b in zip(first, second, strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(v, case.params[k]) for k, v in before[0].items())
    assert all(torch.equal(v, case.opt_state.exp_avg[k]) for k, v in before[1].items())
    assert torch.equal(ids, case.batch_u.input_ids)
    assert torch.equal(state, torch.get_rng_state())


@given(case=cases())
@settings(max_examples=10)
def test_influence_is_equal_with_the_gradient_given(case: Case) -> None:
    total_grad = reference.add(
        reference.sequence_gradients(case.apply, reference.tracked(case.params), case.batch_u, case.temperature)
    )
    plain, given_grad = run(case), run(case, grad=total_grad)
    assert_close(present(given_grad.per_token), present(plain.per_token), plain.per_sequence.abs().sum())
    assert given_grad.unattributed == 0


@pytest.fixture
def case() -> Case:
    generator = torch.Generator().manual_seed(3)
    model = TinyPolicy(VOCAB, 6, 1, 2, WIDTH, seed=1)
    apply, params = make_apply(model)
    batch_u = random_batch(generator, 4, WIDTH, VOCAB)
    batch_e = random_batch(generator, 20, WIDTH, VOCAB, groups=12, coefficients=False)
    state = random_adamw_state(generator, params)
    return Case(model, apply, params, batch_u, batch_e, state, "per_decision", "token", "frozen", 1.0, None)


def test_unattributed_holds_terms_without_coefficients(case: Case) -> None:
    gradient = reference.add(reference.sequence_gradients(case.apply, reference.tracked(case.params), case.batch_u))
    total_grad = {name: present(g) + 0.1 * torch.ones_like(present(g)) for name, g in gradient.items()}
    out = run(case, grad=total_grad)
    step = fx.adamw_decompose(total_grad, case.opt_state, case.params)
    entropy_grad = reference.add(reference.entropy_gradients(case.apply, reference.tracked(case.params), case.batch_e))
    extra = sum(float((present(g) * step.gain[k] * 0.1).sum()) for k, g in entropy_grad.items())
    size = sum(float((present(g) * step.gain[k]).abs().sum()) for k, g in entropy_grad.items())
    assert_close_to_rounding(out.unattributed, extra, terms=TINY_POLICY, scale=size)
    assert_close(out.residual, torch.zeros_like(out.residual), out.per_sequence)
    change = sum(float((present(g) * step.direction[k]).sum()) for k, g in entropy_grad.items())
    size += sum(float((present(g) * step.direction[k]).abs().sum()) for k, g in entropy_grad.items())
    assert_close_to_rounding(out.total, change, terms=TINY_POLICY, scale=size)
    assert_close(out.total, out.baseline + out.per_sequence.sum() + out.unattributed, size)


class LosesTangent(torch.autograd.Function):
    """The identity, right in reverse mode and silent in forward mode, as a fused kernel without a jvp may be."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        pass

    @staticmethod
    def backward(ctx: object, g: torch.Tensor) -> torch.Tensor:
        return g

    @staticmethod
    def jvp(ctx: object, tangent: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(tangent)


@pytest.mark.parametrize("lost", ["blocks.0.qkv.weight", "blocks.0.down.weight", "token.weight"])
def test_influence_refuses_a_lost_tangent(case: Case, lost: str) -> None:
    def lossy(params: fx.Params, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return case.apply({**params, lost: LosesTangent.apply(params[lost])}, ids, mask)

    intact = run(case)
    assert_close(intact.residual, torch.zeros_like(intact.residual), intact.per_sequence)
    with pytest.raises(fx.IdentityError, match=r"residual is .* of .*; expected at most 1e-09"):
        run(case, apply=lossy)
    with pytest.raises(fx.IdentityError):
        run(case, apply=lossy, grad=fx.adamw_decompose({}, case.opt_state, case.params).gain)


def test_stderr_of_random_groups_is_near_that_of_clusters(case: Case) -> None:
    exact, unions = run(case, matrix=True).stderr, run(case).stderr
    assert torch.all(unions > 0)
    ratio = unions / exact
    assert ratio.min() > 0.4
    assert ratio.max() < 2.5
    assert run(case, stderr=False).stderr.isnan().all()


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("matrix", [True, False])
@pytest.mark.parametrize("more", [0.0, 0.1])
def test_total_stderr_matches_derivative_along_step(
    case: Case, preconditioner: fx.types.Preconditioner, matrix: bool, more: float
) -> None:
    """A trainer's gradient exceeds the sum of the rollouts' by ``more``."""
    g = batch_gradient(case.params, case.batch_u, case.apply, case.temperature, None)
    g = {name: None if x is None else x + more for name, x in g.items()}
    out = run(case, preconditioner=preconditioner, matrix=matrix, objective=fx.Entropy(case.estimator), grad=g)
    assert bool(out.unattributed) == bool(more)
    step = fx.adamw_decompose(g, case.opt_state, case.params, preconditioner, case.max_grad_norm)
    how: dict[str, Any] = {
        "apply": case.apply,
        "temperature": case.temperature,
        "objective": fx.Entropy(case.estimator),
    }
    change = fx.jvp_delta(case.params, step.direction, case.batch_e, **how).contributions
    assert_close(out.total, change.sum(), change.abs().sum())
    slopes = token_jvp(case.params, step.direction, case.batch_e, case.apply, case.temperature)
    values = fx.token_values(case.params, case.batch_e, case.apply, case.temperature)
    slope = (length_coefficients(case.batch_e.completion_mask, case.estimator) * slopes.logprobs).sum()
    change -= excess_entropies(values, case.batch_e.completion_mask) * slope
    lengths = case.batch_e.completion_mask.sum(-1).double()
    index = cluster_index(case.batch_e) if matrix else cluster_index(case.batch_e) % MAX_RANDOM_GROUPS
    assert_close(
        out.total_stderr, cluster_stderr(change, change.sum(), lengths / lengths.sum(), index), change.abs().sum()
    )
    assert run(case, stderr=False, matrix=matrix, grad=g).total_stderr.isnan()


def test_stderr_is_nan_for_one_cluster(case: Case) -> None:
    one = case.batch_e._replace(group=torch.zeros(20, dtype=torch.long))
    assert run(case, batch_e=one).stderr.isnan().all()
    assert run(case, batch_e=one).total_stderr.isnan()
    assert run(case, batch_e=one, matrix=True).stderr.isnan().all()


def test_influence_runs_with_and_without_grad_mode(case: Case) -> None:
    plain = run(case)
    with torch.no_grad():
        assert_close(present(run(case).per_token), present(plain.per_token), plain.per_sequence)
    live = {name: p.clone().requires_grad_() for name, p in case.params.items()}
    out = run(case, params=live)
    assert_close(present(out.per_token), present(plain.per_token), plain.per_sequence)
    assert not any(x.requires_grad for x in out if isinstance(x, torch.Tensor))


def test_influence_follows_changed_parameters(case: Case) -> None:
    first = run(case)
    with torch.no_grad():
        for p in case.params.values():
            p.mul_(1.1)
    assert (run(case).per_sequence - first.per_sequence).abs().max() > 1e-3 * first.per_sequence.abs().max()


def test_influence_dtypes_follow_params(case: Case) -> None:
    assert run(case).per_sequence.dtype == torch.float64
    single = {name: p.float() for name, p in case.params.items()}
    state = case.opt_state._replace(
        exp_avg={k: v.float() for k, v in case.opt_state.exp_avg.items()},
        exp_avg_sq={k: v.float() for k, v in case.opt_state.exp_avg_sq.items()},
    )
    out = run(case, params=single, opt_state=state)
    reference_out = run(case)
    near: dict[str, Any] = {"terms": policy_terms(single, WIDTH), "dtype": torch.float32}
    size = present(reference_out.per_token).abs().sum()
    assert_close_to_rounding(out.per_sequence, reference_out.per_sequence, scale=size, **near)
    assert_close_to_rounding(out.residual, 0.0, scale=size, **near)
