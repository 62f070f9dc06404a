"""Change of entropy along a direction: importance sampling and derivatives, against the reference and each other."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from helpers.cases import add_padding, assert_close
from helpers.perturbations import assert_same, derivatives, direction_of, fixed_case, shared_options, snis
from helpers.present import present
from helpers.strategies import ESTIMATORS, NORMALIZES, VOCAB, WIDTH, Case, cases, seeds
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding, assert_within, central_curvature, policy_terms
from hypothesis import given, settings
from hypothesis import strategies as st

import fx_influence as fx
from fx_influence.batching.rows import select_rows
from fx_influence.testing import reference
from fx_influence.types import Batch, Estimator, Normalize

estimates = pytest.mark.parametrize(
    ("estimator", "normalize"), [pytest.param(e, n, id=f"{e}-{n}") for e in ESTIMATORS for n in NORMALIZES]
)
etas = st.sampled_from([1e-4, 0.3, 3.0])


@estimates
@given(case=cases(), seed=seeds, eta=etas, clip=st.sampled_from([None, 10.0, 0.2]))
@settings(max_examples=12)
def test_snis_delta_matches_reference(
    case: Case, seed: int, eta: float, clip: float | None, estimator: Estimator, normalize: Normalize
) -> None:
    case = case._replace(estimator=estimator, normalize=normalize)
    v = direction_of(case, seed)
    out = snis(case, v, eta, clip=clip)
    slow = reference.snis_delta(
        case.apply, case.params, v, eta, case.batch_e, estimator, normalize, clip, case.temperature
    )
    size = slow.contributions.abs().sum()
    assert_close(out.contributions, slow.contributions, size)
    assert_close(out.delta_h, slow.delta_h, size)
    assert_close(out.log_weights, slow.log_weights)
    assert_close(out.ess, slow.ess)
    assert_close(out.clip_fraction, slow.clip_fraction)


@estimates
@given(case=cases(), seed=seeds, eta=etas)
@settings(max_examples=12)
def test_snis_delta_contributions_add_up_to_raw_change(
    case: Case, seed: int, eta: float, estimator: Estimator, normalize: Normalize
) -> None:
    case = case._replace(estimator=estimator, normalize=normalize)
    v, mask = direction_of(case, seed), case.batch_e.completion_mask
    old, new = (
        fx.token_values(theta, case.batch_e, case.apply, case.temperature)
        for theta in (case.params, {name: p + eta * v[name] for name, p in case.params.items()})
    )
    after = [row[ok].tolist() for row, ok in zip(new.entropies, mask, strict=True)]
    ratios = [row[ok].tolist() for row, ok in zip(new.logprobs - old.logprobs, mask, strict=True)]
    moved = torch.tensor(reference.entropy(after, ratios, estimator, normalize)[0], dtype=torch.float64)
    entropy_before = fx.entropy_estimate(old, case.batch_e, normalize)
    out = snis(case, v, eta)
    size = out.contributions.abs().sum() + entropy_before
    assert_close(out.contributions.sum(), moved - entropy_before, size)
    assert_close(out.delta_h, moved - entropy_before, size)


@estimates
@given(case=cases(), seed=seeds)
@settings(max_examples=12)
def test_jvp_delta_contributions_match_surrogate_gradients(
    case: Case, seed: int, estimator: Estimator, normalize: Normalize
) -> None:
    case = case._replace(estimator=estimator, normalize=normalize)
    v = direction_of(case, seed)
    out = derivatives(case, v)
    gradients = reference.entropy_gradients(
        case.apply, case.params, case.batch_e, estimator, normalize, case.temperature
    )
    gradients_along = torch.tensor([reference.inner(g, v) for g in gradients], dtype=torch.float64)
    assert_close(out.contributions, gradients_along, gradients_along.abs().sum())
    assert_close(out.first, gradients_along.sum(), gradients_along.abs().sum())


@estimates
@given(case=cases(), seed=seeds)
@settings(max_examples=8)
def test_jvp_delta_second_matches_finite_difference(
    case: Case, seed: int, estimator: Estimator, normalize: Normalize
) -> None:
    """The reference is central differences of SNIS without clipping, on the same E."""
    case = case._replace(estimator=estimator, normalize=normalize)
    v = direction_of(case, seed)
    out = derivatives(case, v)
    second, bound = central_curvature(
        lambda eta: snis(case, v, eta, clip=None).delta_h, 1e-3, terms=TINY_POLICY, magnitude=math.log(VOCAB)
    )
    assert bound < 1e-2 * (out.contributions.abs().sum() + second.abs())
    assert_within(out.second, second, bound)


@estimates
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_snis_delta_over_eta_tends_to_jvp_delta(estimator: Estimator, normalize: Normalize, seed: int) -> None:
    case = fixed_case(seed)._replace(estimator=estimator, normalize=normalize)
    v = direction_of(case, seed + 5)
    out = derivatives(case, v)
    steps = [4e-3, 2e-3, 1e-3, 5e-4]
    errors = [snis(case, v, eta).delta_h / eta - out.first for eta in steps]
    assert errors[0].abs() > 1e-4 * out.first.abs(), "the error is too small to extrapolate"
    for wide, narrow in itertools.pairwise(errors):
        assert (wide / narrow).item() == pytest.approx(2.0, rel=0.05)
    # After one extrapolation the error of the derivative is of second order in eta.
    slope = 2 * errors[-1] / steps[-1] - errors[-2] / steps[-2]
    assert slope.item() == pytest.approx(out.second.item() / 2, rel=1e-4)
    per_row = [snis(case, v, eta).contributions / eta - out.contributions for eta in steps[-2:]]
    # The part that is not linear in eta is smaller by a factor of eta.
    assert_within(per_row[0], 2 * per_row[1], 0.02 * float(per_row[0].abs().sum()))


@pytest.mark.slow
@given(case=cases(), seed=seeds, a=st.sampled_from([-2.0, 0.5, 3.0]), b=st.sampled_from([-1.0, 0.0, 4.0]))
def test_jvp_delta_is_linear_and_quadratic_in_direction(case: Case, seed: int, a: float, b: float) -> None:
    v, w = direction_of(case, seed), direction_of(case, seed + 1)
    mixed = {name: a * v[name] + b * w[name] for name in v}
    one, other, both = (derivatives(case, x) for x in (v, w, mixed))
    size = abs(a) * one.contributions.abs().sum() + abs(b) * other.contributions.abs().sum()
    assert_close(both.contributions, a * one.contributions + b * other.contributions, size)
    assert_close(both.first, a * one.first + b * other.first, size)
    crossed, opposed = (
        derivatives(case, {name: a * v[name] + sign * b * w[name] for name in v}).second for sign in (1, -1)
    )
    parts = torch.stack([2 * a**2 * one.second, 2 * b**2 * other.second])
    assert_close(crossed + opposed, parts.sum(), parts.abs().sum() + size + crossed.abs())


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e12])
def test_jvp_delta_is_exact_when_direction_is_tiny_or_huge(factor: float) -> None:
    case = fixed_case()
    v = direction_of(case)
    plain, scaled = derivatives(case, v), derivatives(case, {name: factor * x for name, x in v.items()})
    assert_close(scaled.contributions / factor, plain.contributions)
    assert_close(scaled.second / factor**2, plain.second)


def test_snis_delta_does_not_move_absent_names() -> None:
    case = fixed_case()
    part = {name: x for name, x in direction_of(case).items() if "blocks" in name}
    filled = {name: part.get(name, torch.zeros_like(p)) for name, p in case.params.items()}
    assert_close(snis(case, part, 0.5).contributions, snis(case, filled, 0.5).contributions)
    assert_close(derivatives(case, part).contributions, derivatives(case, filled).contributions)
    assert_close(derivatives(case, part).second, derivatives(case, filled).second)
    unmoved = snis(case, {}, 0.5)
    assert unmoved.delta_h == 0
    assert unmoved.ess == len(case.batch_e.input_ids)
    assert derivatives(case, {}).first == 0


@estimates
@given(case=cases(), left=st.integers(0, 2), right=st.integers(0, 2), chunk=st.sampled_from([1, 2, 3]))
@settings(max_examples=6)
def test_perturbations_ignore_padding_and_chunk_size(
    case: Case, left: int, right: int, chunk: int, estimator: Estimator, normalize: Normalize
) -> None:
    case = case._replace(estimator=estimator, normalize=normalize)
    v, wide = direction_of(case), {"batch_e": add_padding(case.batch_e, left, right), "chunk_size": chunk}
    assert_same(snis(case, v, 2.0, clip=0.3, **wide), snis(case, v, 2.0, clip=0.3))
    plain, padded = derivatives(case, v), derivatives(case, v, **wide)
    assert_close(padded.contributions, plain.contributions, plain.contributions.abs().sum())
    assert_close(padded.second, plain.second, plain.contributions.abs().sum() + plain.second.abs())


@estimates
@pytest.mark.parametrize("clip", [0.05, 0.5])
def test_snis_delta_clip_bounds_weights(estimator: Estimator, normalize: Normalize, clip: float) -> None:
    case = fixed_case()._replace(estimator=estimator, normalize=normalize)
    v = direction_of(case)
    out, free = snis(case, v, 6.0, clip=clip), snis(case, v, 6.0, clip=None)
    n = len(case.batch_e.input_ids)
    assert 0 < out.clip_fraction < 1
    assert free.clip_fraction == 0
    torch.testing.assert_close(out.log_weights, free.log_weights, rtol=0, atol=0)
    assert out.log_weights.abs().max() > clip
    # Weights within e^-clip and e^clip of each other cannot have a smaller effective size than half at each end.
    assert n / torch.tensor(clip).cosh() ** 2 <= out.ess <= n
    assert free.ess < out.ess
    unreached = snis(case, v, 6.0, clip=1e3)
    for a, b in zip(unreached, free, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@estimates
def test_perturbations_count_row_without_tokens_as_zero(estimator: Estimator, normalize: Normalize) -> None:
    case = fixed_case()._replace(estimator=estimator, normalize=normalize)
    lengths = case.batch_e.completion_mask.sum(-1)
    assert lengths[0] == 0
    v = direction_of(case)
    moved = snis(case, v, 2.0).contributions
    assert_close(moved[0], torch.zeros_like(moved[0]), moved)
    assert snis(case, v, 2.0).log_weights[0] == 0
    assert derivatives(case, v).contributions[0] == 0
    others = Batch._make(None if field is None else field[1:] for field in case.batch_e)
    share = 1.0 if normalize == "token" else 1 - 1 / len(lengths)
    entropy, without = (
        fx.entropy_estimate(fx.token_values(case.params, batch, case.apply, case.temperature), batch, normalize)
        for batch in (case.batch_e, others)
    )
    assert_close(entropy, share * without)


@given(case=cases(), seed=seeds)
@settings(max_examples=8)
def test_perturbations_are_pure(case: Case, seed: int) -> None:
    v = direction_of(case, seed)
    inputs = (case.params, v, case.batch_e)
    before, state = copy.deepcopy(inputs), torch.get_rng_state()
    for call in (lambda: snis(case, v, 0.3), lambda: derivatives(case, v)):
        for a, b in zip(call(), call(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(x, case.params[name]) for name, x in before[0].items())
    assert all(torch.equal(x, v[name]) for name, x in before[1].items())
    assert all(
        x is None if y is None else torch.equal(present(x), y) for x, y in zip(before[2], case.batch_e, strict=True)
    )
    assert torch.equal(state, torch.get_rng_state())


def test_perturbations_ignore_requires_grad_and_no_grad() -> None:
    case = fixed_case()
    v = direction_of(case)
    requires_grad_params = {name: p.clone().requires_grad_() for name, p in case.params.items()}
    with torch.no_grad():
        inside = (*snis(case, v, 0.3), *derivatives(case, v))
    for a, b in zip(
        (*snis(case, v, 0.3, params=requires_grad_params), *derivatives(case, v, params=requires_grad_params)),
        inside,
        strict=True,
    ):
        assert not a.requires_grad
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_perturbations_compute_bfloat16_params_in_float32() -> None:
    """A step of 1e-4 of a weight is far below bfloat16's rounding unit, 4e-3, and must have an effect nevertheless."""
    case = fixed_case()
    low = {name: p.bfloat16() for name, p in case.params.items()}
    exact = {name: p.double() for name, p in low.items()}
    v = {name: 1e-2 * x for name, x in direction_of(case).items()}
    assert all(
        torch.equal((p.double() + 0.1 * v[name]).bfloat16(), p) for name, p in low.items() if name == "head.bias"
    )
    exact_result, result = snis(case, v, 0.1, params=exact), snis(case, v, 0.1, params=low)
    near: dict[str, Any] = {"terms": policy_terms(exact, WIDTH, 2), "dtype": torch.float32}
    # Two float32 entropies of unit size are subtracted.
    assert_close_to_rounding(result.delta_h, exact_result.delta_h, scale=math.log(VOCAB), **near)
    slope, low_slope = derivatives(case, v, params=exact), derivatives(case, v, params=low)
    size = slope.contributions.abs().sum()
    assert_close_to_rounding(low_slope.contributions, slope.contributions, scale=size, **near)
    assert_close_to_rounding(low_slope.second, slope.second, scale=size, **near)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_perturbations_return_float64(dtype: torch.dtype) -> None:
    case = fixed_case()
    low = {name: p.to(dtype) for name, p in case.params.items()}
    results = (*snis(case, direction_of(case), 0.1, params=low), *derivatives(case, direction_of(case), params=low))
    assert all(x.dtype == torch.float64 for x in results)


def test_snis_sweep_matches_snis_delta() -> None:
    case = fixed_case()
    directions = [direction_of(case, seed) for seed in range(5)]
    blocks = [
        {name: torch.stack([v[name] for v in vs]) for name in case.params} for vs in (directions[:2], directions[2:])
    ]
    steps = [0.2, 3.0]
    for chunk_size in (None, 3):
        measure = fx.snis_sweep(case.params, case.batch_e, clip=0.3, chunk_size=chunk_size, **shared_options(case))
        results = [measure(block, steps) for block in blocks]
        result = fx.SnisDelta(*(torch.cat(field, dim=1) for field in zip(*results, strict=True)))
        for (i, eta), (k, v) in itertools.product(enumerate(steps), enumerate(directions)):
            assert_same(fx.SnisDelta(*(field[i, k] for field in result)), snis(case, v, eta, clip=0.3))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("normalize", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["per_decision", "sequence"])
def test_snis_delta_stderr_is_jackknife_over_clusters(
    estimator: Estimator, normalize: Normalize, grouped: bool
) -> None:
    """The jackknife is recomputed by leaving each cluster out of E and measuring the change on the rest."""
    case = fixed_case()
    group = torch.tensor([4, 4, 9, 9, 9, 2, 7]) if grouped else None
    case = case._replace(batch_e=case.batch_e._replace(group=group), estimator=estimator, normalize=normalize)
    clusters = group if group is not None else torch.arange(7)
    v, eta = direction_of(case), 0.3
    without = torch.stack(
        [snis(case, v, eta, batch_e=select_rows(case.batch_e, clusters != c)).delta_h for c in clusters.unique()]
    )
    c = len(without)
    expected = ((c - 1) / c * (without - without.mean()).square().sum()).sqrt()
    assert expected > 1e-4
    assert_close(snis(case, v, eta).stderr, expected)
    one_cluster = case.batch_e._replace(group=torch.zeros(7, dtype=torch.int64))
    assert snis(case, v, eta, batch_e=one_cluster).stderr.isnan()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a foreign name": ({"direction": {"lm_head": torch.ones(2)}}, r"direction\['lm_head'\] is unknown; expected names"),
    "another shape": ({"direction": {"head.bias": torch.ones(2)}}, r"direction\['head.bias'\] has shape \(2,\)"),
    "an unknown estimator": (
        {"objective": fx.Entropy("naive")},  # type: ignore[arg-type]  # refused
        r"estimator is 'naive'; expected one of per_decision, sequence",
    ),
    "an unknown normalisation": (
        {"objective": fx.Entropy(normalize="batch")},  # type: ignore[arg-type]  # refused
        r"normalize is 'batch'; expected one of token, sequence",
    ),
    "a temperature of 0": ({"temperature": 0.0}, r"temperature is 0\.0; expected a positive number"),
    "chunks of nothing": ({"chunk_size": 0}, r"chunk_size is 0; expected at least 1"),
}


@pytest.mark.parametrize("case_name", REFUSED)
def test_perturbations_name_bad_arguments(case_name: str) -> None:
    case = fixed_case()
    changes, message = REFUSED[case_name]
    v = changes.get("direction", direction_of(case))
    rest = {k: x for k, x in changes.items() if k != "direction"}
    with pytest.raises(ValueError, match=message):
        snis(case, v, 0.1, **rest)
    with pytest.raises(ValueError, match=message):
        derivatives(case, v, **rest)


def test_perturbations_reject_batch_without_completion() -> None:
    case = fixed_case()
    no_completion = case.batch_e._replace(completion_mask=torch.zeros_like(case.batch_e.completion_mask))
    with pytest.raises(ValueError, match=r"batch_e\.completion_mask has no True at all"):
        snis(case, direction_of(case), 0.1, batch_e=no_completion)
    with pytest.raises(ValueError, match=r"batch_e\.completion_mask has no True at all"):
        derivatives(case, direction_of(case), batch_e=no_completion)
