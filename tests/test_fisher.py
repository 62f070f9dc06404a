"""The Fisher kernel against its slow definition, under every preconditioner."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.cases import (
    TinyPolicy,
    add_padding,
    assert_close,
    make_apply,
    random_adamw_state,
    random_batch,
    random_direction,
)
from helpers.present import present
from helpers.strategies import VOCAB, WIDTH, Case, cases
from helpers.tolerances import (
    TINY_POLICY,
    assert_close_to_rounding,
    assert_within,
    central_difference,
    policy_terms,
    rounding_bound,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fx_influence as fx
from fx_influence.core.tree import shift
from fx_influence.testing import reference
from fx_influence.types import AdamWState, Batch, Params

KINDS = ("identity", "dictionary", "adam, a step of batch_b", "adam, the state alone")
kinds = pytest.mark.parametrize("kind", KINDS)


def warm(state: AdamWState) -> AdamWState:
    """Return the state with at least one update, since before it there is no second moment to divide by."""
    return state._replace(step={name: max(step, 1) for name, step in state.step.items()})


def batch_b(case: Case, kind: str) -> Batch:
    return case.batch_u if kind == KINDS[2] else case.batch_u._replace(coefficients=None, entropy_coefficients=None)


def dictionary(case: Case) -> Params:
    """Return diagonals of either sign, none for the first parameter."""
    diagonal = random_direction(torch.Generator().manual_seed(1), case.params, 1.0)
    return dict(list(diagonal.items())[1:])


def kernel(case: Case, kind: str, **changes: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "params": case.params,
        "batch_a": case.batch_e,
        "batch_b": batch_b(case, kind),
        "opt_state": warm(case.opt_state),
        "apply": case.apply,
        "preconditioner": dictionary(case) if kind == "dictionary" else kind.split(",")[0],
        "temperature": case.temperature,
        "max_grad_norm": case.max_grad_norm,
    }
    return fx.fisher_kernel(**{**arguments, **changes})


def diagonals(case: Case, kind: str) -> Params | None:
    """Return P by its definition."""
    state = warm(case.opt_state)
    if kind == "identity":
        return None
    if kind == "dictionary":
        return dictionary(case)
    if kind == KINDS[2]:
        rows = reference.sequence_gradients(case.apply, case.params, case.batch_u, case.temperature)
        step = reference.adamw(rows, state, case.params, max_grad_norm=case.max_grad_norm)
        return reference.adam_diagonals(state, step)
    return reference.adam_diagonals(state)


@kinds
@given(case=cases())
@settings(max_examples=12)
def test_fisher_kernel_matches_reference(case: Case, kind: str) -> None:
    slow = reference.fisher_kernel(
        case.apply, case.params, case.batch_e, case.batch_u, diagonals(case, kind), case.temperature
    )
    assert_close(kernel(case, kind), slow)


@kinds
@given(case=cases())
@settings(max_examples=6)
def test_fisher_kernel_is_symmetric_positive_semidefinite(case: Case, kind: str) -> None:
    batch = batch_b(case, kind)
    plain = kernel(case, kind, batch_a=batch)
    assert_close(plain, plain.T)
    if kind != "dictionary":
        values = torch.linalg.eigvalsh((plain + plain.T) / 2)
        assert values[0] >= -rounding_bound(torch.float64, TINY_POLICY, values[-1])
        assert values[-1] > 0
    swapped = kernel(case, kind, batch_a=batch, batch_b=case.batch_e._replace(coefficients=None))
    if kind in ("identity", "dictionary", KINDS[3]):
        assert_close(swapped, kernel(case, kind, batch_a=case.batch_e, batch_b=batch).T)


def test_fisher_kernel_accepts_negative_diagonals(case: Case) -> None:
    negative = {name: -torch.ones_like(p) for name, p in case.params.items()}
    assert_close(kernel(case, "identity", preconditioner=negative), -kernel(case, "identity"))


@pytest.mark.slow
@kinds
@given(case=cases(), left=st.integers(0, 2), right=st.integers(0, 2), chunk=st.sampled_from([1, 2, 3]))
@settings(max_examples=2)
def test_fisher_kernel_ignores_padding_chunks_and_budget(
    case: Case, kind: str, left: int, right: int, chunk: int
) -> None:
    wide = {"batch_a": add_padding(case.batch_e, left, right), "batch_b": add_padding(batch_b(case, kind), right, left)}
    plain = kernel(case, kind)
    for budget in (1, 50_000):
        assert_close(kernel(case, kind, chunk_size=chunk, memory_budget=budget, **wide), plain)


def test_fisher_kernel_matches_finite_difference(case: Case) -> None:
    """K_ai is the slope of S_a along P grad S_i."""
    state = warm(case.opt_state)
    result = kernel(case, KINDS[3])
    scored = batch_b(case, KINDS[3])._replace(coefficients=case.batch_u.completion_mask.double())
    rows = reference.sequence_gradients(case.apply, case.params, scored, case.temperature)
    diagonal = reference.adam_diagonals(state)
    for i, row in enumerate(rows):
        # The rollout loss falls as S_i rises.
        raised = {name: -p * present(row[name]) for name, p in diagonal.items()}

        def scores(h: float, raised: Params = raised) -> Tensor:
            theta = shift(case.params, raised, h)
            return fx.token_values(theta, case.batch_e, case.apply, case.temperature).logprobs.sum(-1)

        slope, bound = central_difference(scores, 1e-5, terms=TINY_POLICY)
        assert bound < 1e-2 * slope.abs().max()
        assert_within(result[:, i], slope, bound)


def test_fisher_kernel_takes_denominator_from_batch_b(case: Case) -> None:
    larger = case.batch_u._replace(coefficients=10 * present(case.batch_u.coefficients))
    plain = kernel(case, KINDS[2])
    assert_close(
        kernel(
            case, KINDS[2], batch_a=case.batch_e._replace(coefficients=present(larger.coefficients)[:1].expand(4, -1))
        ),
        plain,
    )
    assert kernel(case, KINDS[2], batch_b=larger).abs().max() < 0.8 * plain.abs().max()
    clipped = kernel(case, KINDS[2], batch_b=larger, max_grad_norm=1e-3)
    assert clipped.abs().max() > plain.abs().max()


def test_fisher_kernel_ignores_lr_and_maximize(case: Case) -> None:
    hyper = {
        name: dataclasses.replace(h, lr_scale=7.0, maximize=True, weight_decay=0.5)
        for name, h in case.opt_state.hyper.items()
    }
    for kind in KINDS[2:]:
        assert_close(kernel(case, kind, opt_state=case.opt_state._replace(hyper=hyper)), kernel(case, kind))


def test_fisher_kernel_skips_params_outside_optimizer(case: Case) -> None:
    last = list(case.params)[-1]
    parts = [{k: v for k, v in part.items() if k != last} for part in case.opt_state[:5]]
    less = AdamWState._make([*parts, case.opt_state.lr, None])
    for kind in KINDS[2:]:
        full, without = kernel(case, kind), kernel(case, kind, opt_state=less)
        last_diagonal = {last: present(diagonals(case, kind))[last]}
        rest = reference.fisher_kernel(
            case.apply, case.params, case.batch_e, case.batch_u, last_diagonal, case.temperature
        )
        assert rest.abs().max() > 1e-3 * full.abs().max()
        assert_close(without + rest, full)


def test_fisher_kernel_is_pure(case: Case) -> None:
    requires_grad_params = {name: p.clone().requires_grad_() for name, p in case.params.items()}
    before = {name: p.clone() for name, p in case.params.items()}
    first = kernel(case, KINDS[2])
    torch.testing.assert_close(kernel(case, KINDS[2], params=requires_grad_params), first, rtol=0, atol=0)
    assert not kernel(case, KINDS[2], params=requires_grad_params).requires_grad
    assert all(torch.equal(p, before[name]) for name, p in case.params.items())


@pytest.mark.parametrize(("dtype", "result_dtype"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_fisher_kernel_is_at_least_float32(case: Case, dtype: torch.dtype, result_dtype: torch.dtype) -> None:
    assert kernel(case, "identity").dtype == torch.float64
    low = {name: p.to(dtype) for name, p in case.params.items()}
    result, exact = (kernel(case, "identity", params=p) for p in (low, {k: p.double() for k, p in low.items()}))
    assert result.dtype == result_dtype
    assert_close_to_rounding(result, exact, terms=policy_terms(low, WIDTH), dtype=dtype)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no state": ({"opt_state": None}, r"opt_state is None; expected an AdamWState"),
    "unknown preconditioner": (
        {"preconditioner": "kfac"},
        r"preconditioner is 'kfac'; expected 'adam', 'identity' or a dic",
    ),
    "foreign diagonal": ({"preconditioner": {"w": torch.ones(1)}}, r"preconditioner\['w'\] is unknown; expected names"),
    "diagonal of another shape": (
        {"preconditioner": {"head.bias": torch.ones(1)}},
        r"preconditioner\['head.bias'\] has shape \(1,\)",
    ),
    "temperature": ({"temperature": -1.0}, r"temperature is -1\.0"),
    "chunk size": ({"chunk_size": 0}, r"chunk_size is 0"),
    "clip": ({"max_grad_norm": -1.0}, r"max_grad_norm is -1\.0"),
}


@pytest.mark.parametrize("case_name", REFUSED)
def test_fisher_kernel_names_bad_arguments(case: Case, case_name: str) -> None:
    changes, message = REFUSED[case_name]
    with pytest.raises(ValueError, match=message):
        kernel(case, KINDS[2], **changes)


@pytest.mark.parametrize("field", ["batch_a", "batch_b"])
def test_fisher_kernel_is_zero_when_batch_has_no_completion(case: Case, field: str) -> None:
    empty = case.batch_e._replace(completion_mask=torch.zeros_like(case.batch_e.completion_mask))
    assert not kernel(case, "identity", **{field: empty}).any()


def test_fisher_kernel_rejects_state_of_other_model(case: Case) -> None:
    foreign = random_adamw_state(torch.Generator(), make_apply(TinyPolicy(VOCAB + 1, 6, 1, 2, WIDTH))[1])
    for kind in KINDS[2:]:
        with pytest.raises(ValueError, match=r"opt_state\.exp_avg\['.*'\] has shape .* another model's"):
            kernel(case, kind, opt_state=foreign)


def test_fisher_kernel_needs_gradient_when_state_is_fresh(case: Case) -> None:
    cold = case.opt_state._replace(
        step=dict.fromkeys(case.opt_state.step, 0),
        exp_avg={k: torch.zeros_like(v) for k, v in case.opt_state.exp_avg.items()},
        exp_avg_sq={k: torch.zeros_like(v) for k, v in case.opt_state.exp_avg_sq.items()},
    )
    with pytest.raises(ValueError, match=r"opt_state\.step\['token.weight'\] is 0; expected at least one update"):
        kernel(case, KINDS[3], opt_state=cold)
    assert kernel(case, KINDS[2], opt_state=cold).isfinite().all()


@pytest.fixture
def case() -> Case:
    generator = torch.Generator().manual_seed(3)
    model = TinyPolicy(VOCAB, 6, 1, 2, WIDTH, seed=1)
    apply, params = make_apply(model)
    batch_u = random_batch(generator, 3, WIDTH, VOCAB, gaps=True)
    batch_e = random_batch(generator, 4, WIDTH, VOCAB, padding="left", coefficients=False)
    state = random_adamw_state(generator, params)
    return Case(model, apply, params, batch_u, batch_e, state, "per_decision", "token", "frozen", 0.8, None)
