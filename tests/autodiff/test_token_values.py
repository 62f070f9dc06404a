"""Token values and their derivatives against the reference, and where careless arithmetic gives NaN or 0."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers.cases import TinyPolicy, assert_close, make_apply, random_adamw_state, random_batch
from helpers.present import present
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding, policy_terms
from torch import Tensor

import fx_influence as fx
from fx_influence.autodiff.directional import token_jvp
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.autodiff.gram import gradient_gram
from fx_influence.autodiff.token_values import all_token_values
from fx_influence.estimators.entropy import completion_values
from fx_influence.testing import reference
from fx_influence.types import Apply, Batch, Params

VOCAB, WIDTH = 5, 7


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def policy(**options: Any) -> tuple[Apply, Params]:
    return make_apply(TinyPolicy(VOCAB, 6, 1, 2, 2 * WIDTH, **options))


def batch_of(n: int = 5, **options: Any) -> Batch:
    return random_batch(generator(1), n, WIDTH, VOCAB, **options)


def direction_like(params: Params) -> Params:
    noise = generator(2)
    return {name: torch.randn(p.shape, generator=noise, dtype=torch.float64).to(p.dtype) for name, p in params.items()}


def finite(tree: Mapping[str, Tensor | None]) -> bool:
    return all(x is None or bool(x.isfinite().all()) for x in tree.values())


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_all_token_values_matches_the_reference(padding: Any, temperature: float, chunk_size: int | None) -> None:
    apply, params = policy()
    batch = batch_of(padding=padding, gaps=True, min_len=0)
    by_reference = reference.token_values(apply, params, batch, temperature)
    values = all_token_values(params, batch, apply, temperature, chunk_size)
    assert_close(values.logprobs, by_reference.logprobs)
    assert_close(values.entropies, by_reference.entropies)
    assert not values.logprobs[~batch.completion_mask].any()
    assert not values.entropies[~batch.completion_mask].any()


def test_token_values_divide_logits_by_temperature() -> None:
    apply, params = policy()
    batch = batch_of()
    logits = apply(params, batch.input_ids, batch.attention_mask)

    def cooled(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return logits / 0.25

    at_temperature = fx.token_values(params, batch, apply, 0.25)
    plain = fx.token_values(params, batch, cooled)
    assert_close(at_temperature.logprobs, plain.logprobs)
    assert_close(at_temperature.entropies, plain.entropies)
    hot = fx.token_values(params, batch, apply, 4.0)
    assert hot.entropies.sum() > 1.5 * at_temperature.entropies.sum()
    assert hot.logprobs.sum() > 1.5 * at_temperature.logprobs.sum()


def barred(apply: Apply) -> Apply:
    """Return the policy with token 0 forbidden, as by a grammar or a vocabulary padded to a round number."""

    def masked(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = apply(params, input_ids, attention_mask)
        return logits.masked_fill(torch.arange(VOCAB) == 0, -math.inf)

    return masked


def test_token_values_and_derivatives_are_finite_with_inf_logits() -> None:
    plain, params = policy()
    apply, batch = barred(plain), batch_of()
    batch = batch._replace(input_ids=batch.input_ids.clamp(min=1), entropy_coefficients=batch.coefficients)

    def four_tokens(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return plain(params, input_ids, attention_mask)[..., 1:]

    values = fx.token_values(params, batch, apply)
    assert values.entropies.max() <= math.log(VOCAB - 1)
    # The result is that of a vocabulary without the forbidden token.
    shifted = batch._replace(input_ids=batch.input_ids - 1)
    reduced = fx.token_values(params, shifted, lambda p, ids, mask: four_tokens(p, batch.input_ids, mask))
    assert_close(values.logprobs, reduced.logprobs)
    assert_close(values.entropies, reduced.entropies)
    g = batch_gradient(params, batch, apply)
    by_reference = reference.add(reference.sequence_gradients(apply, params, batch))
    for name in params:
        assert_close(present(g[name]), present(by_reference[name]))
    direction = direction_like(params)
    derivatives = token_jvp(params, direction, batch, apply)
    inner = -sum(float((present(batch.coefficients) * d).sum()) for d in derivatives)
    size = sum(float((present(by_reference[name]) * v).abs().sum()) for name, v in direction.items())
    assert_close_to_rounding(inner, reference.inner(by_reference, direction), terms=TINY_POLICY, scale=size)
    per_row = fx.per_sample_grads(fx.rollout_loss(apply), params, batch)
    assert finite(per_row)
    out = fx.jvp_delta(params, direction, batch, apply=apply)
    assert out.first.isfinite()
    assert out.second.isfinite()


def test_token_values_are_finite_for_unattended_rows() -> None:
    apply, params = policy()
    batch = batch_of(4)
    off = torch.tensor([True, False, False, True])[:, None]
    blank = batch._replace(
        attention_mask=batch.attention_mask & ~off,
        completion_mask=batch.completion_mask & ~off,
        coefficients=present(batch.coefficients) * ~off,
    )

    def attention_gives_nan(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Put NaN into the logits of unattended rows, as a softmax over zero but -inf does."""
        logits = apply(params, input_ids, attention_mask)
        return logits + torch.where(attention_mask.any(-1), 0.0, math.nan)[:, None, None]

    few = batch._replace(**{k: getattr(batch, k)[1:3] for k in batch._fields[:4]})
    for policy_ in (apply, attention_gives_nan):
        values = fx.token_values(params, blank, policy_)
        assert_close(values.logprobs[1:3], fx.token_values(params, few, apply).logprobs)
        assert not values.logprobs[[0, 3]].any()
        assert not values.entropies[[0, 3]].any()
        derivatives = token_jvp(params, direction_like(params), blank, policy_)
        assert derivatives.logprobs.isfinite().all()
        assert derivatives.entropies.isfinite().all()
        state = random_adamw_state(generator(3), params)
        out = fx.influence(params, blank, blank, state, apply=policy_, matrix=True)
        small = fx.influence(params, few, blank, state, apply=apply, matrix=True)
        assert_close(out.per_sequence[1:3], small.per_sequence)
        assert not out.per_sequence[[0, 3]].any()
        assert not present(out.matrix)[:, [0, 3]].any()


def test_empty_completion_contributes_0_and_counts_in_n() -> None:
    apply, params = policy()
    full = batch_of(4)
    empty = Batch(*(torch.cat([x, x[:1]]) for x in full[:4] if x is not None))
    empty.completion_mask[-1] = False
    assert empty.coefficients is not None
    empty.coefficients[-1] = 0
    values, fewer = (fx.token_values(params, batch, apply) for batch in (empty, full))
    per_token, per_sequence = (fx.entropy_estimate(values, empty, kind) for kind in ("token", "sequence"))
    assert_close(per_token, fx.entropy_estimate(fewer, full, "token"))
    assert_close(per_sequence, fx.entropy_estimate(fewer, full, "sequence") * 4 / 5)
    state, direction = random_adamw_state(generator(3), params), direction_like(params)
    for estimator in ("per_decision", "sequence"):
        options: dict[str, Any] = {"apply": apply, "objective": fx.Entropy(estimator, "sequence")}
        out = fx.influence(params, empty, empty, state, matrix=True, **options)
        assert out.per_sequence[-1] == 0
        assert not present(out.matrix)[:, -1].any()
        by_reference = reference.influence(apply, params, empty, empty, state, estimator, "sequence")
        assert_close(present(out.matrix), by_reference.matrix)
        moved = fx.snis_delta(params, direction, 0.3, empty, **options)
        expected = reference.snis_delta(apply, params, direction, 0.3, empty, estimator, "sequence")
        assert_close(moved.delta_h, expected.delta_h)
        assert_close(moved.ess, expected.ess)
        without = fx.snis_delta(params, direction, 0.3, full, **options)
        assert abs(moved.delta_h - without.delta_h) > 1e-3 * abs(without.delta_h)
    c = fx.coefficients("grpo", torch.ones(5), empty.completion_mask)
    expected_c = fx.coefficients("grpo", torch.ones(4), full.completion_mask) * 4 / 5
    assert_close_to_rounding(c[:4], expected_c, terms=4)
    assert not c[4].any()


def test_completion_mask_gap_shifts_later_ranks() -> None:
    apply, params = policy()
    batch = batch_of(3, min_len=WIDTH - 1)
    gap = batch.completion_mask.clone()
    gap[0, 3] = False
    full, cut = (
        fx.token_values(params, batch, apply),
        fx.token_values(params, batch._replace(completion_mask=gap), apply),
    )
    assert_close(cut.logprobs, full.logprobs * gap)
    assert_close(cut.entropies, full.entropies * gap)
    done = completion_values(cut, gap)
    scored = full.logprobs[0, [1, 2, 4, 5, 6]]
    assert done.logprobs.shape == (3, WIDTH - 1)
    assert_close(done.logprobs[0], torch.cat([scored, torch.zeros(1, dtype=torch.float64)]))
    assert done.ok.sum(-1).tolist() == [5, 6, 6]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_token_values_promote_half_precision_logits(dtype: torch.dtype) -> None:
    apply, params = policy()
    batch = batch_of()

    def rounded(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return apply(params, input_ids, attention_mask).to(dtype)

    def promoted(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return rounded(params, input_ids, attention_mask).float()

    values, expected = fx.token_values(params, batch, rounded, 0.7), fx.token_values(params, batch, promoted, 0.7)
    for actual, wanted in zip(values, expected, strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("factor", [1e-36, 1e-30, 1e-5, 1e30])
def test_token_jvp_is_exact_for_tiny_and_huge_directions(factor: float) -> None:
    apply, params = policy()
    params = {name: p.float() for name, p in params.items()}
    direction, batch = direction_like(params), batch_of()
    terms = policy_terms(params, batch.input_ids.shape[1], 2)
    plain = token_jvp(params, direction, batch, apply)
    scaled = token_jvp(params, {name: v * factor for name, v in direction.items()}, batch, apply)
    for actual, expected in zip(scaled, plain, strict=True):
        assert_close_to_rounding(actual.double() / factor, expected.double(), terms=terms, dtype=torch.float32)
    one, other = (
        fx.jvp_delta(params, {k: v * f for k, v in direction.items()}, batch, apply=apply) for f in (1, factor)
    )
    tolerance: dict[str, Any] = {"terms": terms, "scale": one.contributions.abs().sum(), "dtype": torch.float32}
    assert_close_to_rounding(other.first.item() / factor, one.first, **tolerance)
    tolerance["scale"] = tolerance["scale"] + one.second.abs()
    assert_close_to_rounding(other.second.item() / factor**2, one.second, **tolerance)


def test_token_jvp_takes_directions_beyond_float16() -> None:
    apply, params = policy()
    params, factor = {name: p.half() for name, p in params.items()}, 2.0**20
    direction, batch = {name: v.float() for name, v in direction_like(params).items()}, batch_of()
    plain = token_jvp(params, direction, batch, apply)
    scaled = token_jvp(params, {name: v * factor for name, v in direction.items()}, batch, apply)
    for actual, expected in zip(scaled, plain, strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual / factor, expected)
        assert expected.any()


def test_token_jvp_counts_absent_names_as_0() -> None:
    apply, params = policy()
    direction, batch = direction_like(params), batch_of()
    zero = token_jvp(params, {name: 0 * v for name, v in direction.items()}, batch, apply)
    assert not zero.logprobs.any()
    assert not zero.entropies.any()
    absent = {name: v for name, v in direction.items() if "token" in name}
    padded = {name: v if name in absent else 0 * v for name, v in direction.items()}
    for actual, expected in zip(
        token_jvp(params, absent, batch, apply), token_jvp(params, padded, batch, apply), strict=True
    ):
        assert torch.equal(actual, expected)
        assert actual.any()


def test_batch_gradient_is_none_for_unreached_parameters() -> None:
    apply, params = policy(idle=True)
    batch = batch_of()
    g = batch_gradient(params, batch, apply, chunk_size=2)
    assert [name for name, x in g.items() if x is None] == ["idle"]
    by_reference = reference.add(reference.sequence_gradients(apply, params, batch))
    for name, expected in by_reference.items():
        assert (g[name] is None) == (expected is None)
        if expected is not None:
            assert_close(present(g[name]), expected)
    # AdamW skips such a parameter, decay included, and the influence does as well.
    state = random_adamw_state(generator(3), params)
    step = fx.adamw_decompose(g, state, params)
    assert state.exp_avg["idle"].all()
    assert not step.direction["idle"].any()
    gram = gradient_gram(params, batch, batch, step.gain, apply)
    assert gram.isfinite().all()
