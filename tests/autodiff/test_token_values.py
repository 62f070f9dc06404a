"""Token values and their derivatives: against the literal loop, and where careless arithmetic gives NaN or nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.cases import TinyPolicy, assert_close, make_apply, random_adamw_state, random_batch
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


def finite(tree: dict[str, Tensor | None]) -> bool:
    return all(x is None or bool(x.isfinite().all()) for x in tree.values())


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_token_values_are_the_literal_loops(padding: Any, temperature: float, chunk_size: int | None) -> None:
    apply, params = policy()
    batch = batch_of(padding=padding, gaps=True, min_len=0)
    slow = reference.token_values(apply, params, batch, temperature)
    fast = all_token_values(params, batch, apply, temperature, chunk_size)
    assert_close(fast.logprobs, slow.logprobs)
    assert_close(fast.entropies, slow.entropies)
    assert not fast.logprobs[~batch.completion_mask].any()
    assert not fast.entropies[~batch.completion_mask].any()


def test_the_temperature_divides_the_logits_before_both() -> None:
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
    """The policy with token 0 forbidden, as a grammar or a vocabulary padded to a round number has it."""

    def masked(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = apply(params, input_ids, attention_mask)
        return logits.masked_fill(torch.arange(VOCAB) == 0, -math.inf)

    return masked


def test_logits_of_minus_infinity_give_no_nan_in_values_or_derivatives() -> None:
    plain, params = policy()
    apply, batch = barred(plain), batch_of()
    batch = batch._replace(input_ids=batch.input_ids.clamp(min=1), entropy_coefficients=batch.coefficients)

    def four_tokens(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return plain(params, input_ids, attention_mask)[..., 1:]

    values = fx.token_values(params, batch, apply)
    assert values.entropies.max() <= math.log(VOCAB - 1)
    # The forbidden token is as if it were not there.
    shifted = batch._replace(input_ids=batch.input_ids - 1)
    reduced = fx.token_values(params, shifted, lambda p, ids, mask: four_tokens(p, batch.input_ids, mask))
    assert_close(values.logprobs, reduced.logprobs)
    assert_close(values.entropies, reduced.entropies)
    g = batch_gradient(params, batch, apply)
    slow = reference.add(reference.sequence_gradients(apply, params, batch))
    for name in params:
        assert_close(g[name], slow[name])
    direction = direction_like(params)
    slopes = token_jvp(params, direction, batch, apply)
    along = -sum(float((batch.coefficients * d).sum()) for d in slopes)
    size = sum(float((slow[name] * v).abs().sum()) for name, v in direction.items())
    assert_close_to_rounding(along, reference.inner(slow, direction), terms=TINY_POLICY, scale=size)
    per_row = fx.per_sample_grads(fx.rollout_loss(apply), params, batch)
    assert finite(per_row)
    out = fx.jvp_delta(params, direction, batch, apply=apply)
    assert out.first.isfinite()
    assert out.second.isfinite()


def test_rows_without_any_attended_token_give_no_nan() -> None:
    apply, params = policy()
    batch = batch_of(4)
    off = torch.tensor([True, False, False, True])[:, None]
    blank = batch._replace(
        attention_mask=batch.attention_mask & ~off,
        completion_mask=batch.completion_mask & ~off,
        coefficients=batch.coefficients * ~off,
    )

    def attention_gives_nan(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What a softmax over -inf alone leaves in such a row's logits."""
        logits = apply(params, input_ids, attention_mask)
        return logits + torch.where(attention_mask.any(-1), 0.0, math.nan)[:, None, None]

    few = batch._replace(**{k: getattr(batch, k)[1:3] for k in batch._fields[:4]})
    for policy_ in (apply, attention_gives_nan):
        values = fx.token_values(params, blank, policy_)
        assert_close(values.logprobs[1:3], fx.token_values(params, few, apply).logprobs)
        assert not values.logprobs[[0, 3]].any()
        assert not values.entropies[[0, 3]].any()
        slopes = token_jvp(params, direction_like(params), blank, policy_)
        assert slopes.logprobs.isfinite().all()
        assert slopes.entropies.isfinite().all()
        state = random_adamw_state(generator(3), params)
        out = fx.influence(params, blank, blank, state, apply=policy_, matrix=True)
        small = fx.influence(params, few, blank, state, apply=apply, matrix=True)
        assert_close(out.per_sequence[1:3], small.per_sequence)
        assert not out.per_sequence[[0, 3]].any()
        assert not out.matrix[:, [0, 3]].any()


def test_a_row_without_a_completion_token_contributes_0_and_counts_in_n() -> None:
    apply, params = policy()
    full = batch_of(4)
    empty = Batch(*(torch.cat([x, x[:1]]) for x in full[:4]))
    empty.completion_mask[-1] = False
    empty.coefficients[-1] = 0
    values, fewer = (fx.token_values(params, batch, apply) for batch in (empty, full))
    per_token, per_sequence = (fx.entropy_estimate(values, empty, kind) for kind in ("token", "sequence"))
    assert_close(per_token, fx.entropy_estimate(fewer, full, "token"))
    assert_close(per_sequence, fx.entropy_estimate(fewer, full, "sequence") * 4 / 5)
    state, direction = random_adamw_state(generator(3), params), direction_like(params)
    for estimator in ("per_decision", "sequence"):
        options = {"apply": apply, "objective": fx.Entropy(estimator, "sequence")}
        out = fx.influence(params, empty, empty, state, matrix=True, **options)
        assert out.per_sequence[-1] == 0
        assert not out.matrix[:, -1].any()
        slow = reference.influence(apply, params, empty, empty, state, estimator, "sequence")
        assert_close(out.matrix, slow.matrix)
        moved = fx.snis_delta(params, direction, 0.3, empty, **options)
        expected = reference.snis_delta(apply, params, direction, 0.3, empty, estimator, "sequence")
        assert_close(moved.delta_h, expected.delta_h)
        assert_close(moved.ess, expected.ess)
        without = fx.snis_delta(params, direction, 0.3, full, **options)
        assert abs(moved.delta_h - without.delta_h) > 1e-3 * abs(without.delta_h)
    c = fx.coefficients("grpo", torch.ones(5), empty.completion_mask)
    expected = fx.coefficients("grpo", torch.ones(4), full.completion_mask) * 4 / 5
    assert_close_to_rounding(c[:4], expected, terms=4)
    assert not c[4].any()


def test_a_gap_in_the_completion_mask_takes_a_token_out_and_moves_the_ranks_of_the_later_ones() -> None:
    apply, params = policy()
    batch = batch_of(3, min_len=WIDTH - 1)
    gap = batch.completion_mask.clone()
    gap[0, 3] = False
    whole, cut = (
        fx.token_values(params, batch, apply),
        fx.token_values(params, batch._replace(completion_mask=gap), apply),
    )
    assert_close(cut.logprobs, whole.logprobs * gap)
    assert_close(cut.entropies, whole.entropies * gap)
    done = completion_values(cut, gap)
    kept = whole.logprobs[0, [1, 2, 4, 5, 6]]
    assert done.logprobs.shape == (3, WIDTH - 1)
    assert_close(done.logprobs[0], torch.cat([kept, torch.zeros(1, dtype=torch.float64)]))
    assert done.ok.sum(-1).tolist() == [5, 6, 6]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_promoted_before_the_softmax(dtype: torch.dtype) -> None:
    apply, params = policy()
    batch = batch_of()

    def rounded(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return apply(params, input_ids, attention_mask).to(dtype)

    def promoted(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return rounded(params, input_ids, attention_mask).float()

    values, expected = fx.token_values(params, batch, rounded, 0.7), fx.token_values(params, batch, promoted, 0.7)
    for found, wanted in zip(values, expected, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("factor", [1e-36, 1e-30, 1e-5, 1e30])
def test_a_tiny_or_huge_direction_neither_vanishes_nor_overflows(factor: float) -> None:
    apply, params = policy()
    params = {name: p.float() for name, p in params.items()}
    direction, batch = direction_like(params), batch_of()
    terms = policy_terms(params, batch.input_ids.shape[1], 2)
    plain = token_jvp(params, direction, batch, apply)
    scaled = token_jvp(params, {name: v * factor for name, v in direction.items()}, batch, apply)
    for found, wanted in zip(scaled, plain, strict=True):
        assert_close_to_rounding(found.double() / factor, wanted.double(), terms=terms, dtype=torch.float32)
    one, other = (
        fx.jvp_delta(params, {k: v * f for k, v in direction.items()}, batch, apply=apply) for f in (1, factor)
    )
    near = {"terms": terms, "scale": one.contributions.abs().sum(), "dtype": torch.float32}
    assert_close_to_rounding(other.first.item() / factor, one.first, **near)
    near["scale"] = near["scale"] + one.second.abs()
    assert_close_to_rounding(other.second.item() / factor**2, one.second, **near)


def test_a_direction_beyond_half_precisions_range_is_taken_by_parameters_in_half_precision() -> None:
    apply, params = policy()
    params, factor = {name: p.half() for name, p in params.items()}, 2.0**20
    direction, batch = {name: v.float() for name, v in direction_like(params).items()}, batch_of()
    plain = token_jvp(params, direction, batch, apply)
    scaled = token_jvp(params, {name: v * factor for name, v in direction.items()}, batch, apply)
    for found, wanted in zip(scaled, plain, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found / factor, wanted)
        assert wanted.any()


def test_a_direction_of_zeros_or_of_some_names_only_is_taken_as_it_is() -> None:
    apply, params = policy()
    direction, batch = direction_like(params), batch_of()
    nothing = token_jvp(params, {name: 0 * v for name, v in direction.items()}, batch, apply)
    assert not nothing.logprobs.any()
    assert not nothing.entropies.any()
    absent = {name: v for name, v in direction.items() if "token" in name}
    padded = {name: v if name in absent else 0 * v for name, v in direction.items()}
    for found, wanted in zip(
        token_jvp(params, absent, batch, apply), token_jvp(params, padded, batch, apply), strict=True
    ):
        assert torch.equal(found, wanted)
        assert found.any()


def test_the_batch_gradient_is_none_where_backward_never_arrives() -> None:
    apply, params = policy(idle=True)
    batch = batch_of()
    g = batch_gradient(params, batch, apply, chunk_size=2)
    assert [name for name, x in g.items() if x is None] == ["idle"]
    slow = reference.add(reference.sequence_gradients(apply, params, batch))
    for name, expected in slow.items():
        assert (g[name] is None) == (expected is None)
        if expected is not None:
            assert_close(g[name], expected)
    # AdamW skips such a parameter, decay included, and the influence does as well.
    state = random_adamw_state(generator(3), params)
    step = fx.adamw_decompose(g, state, params)
    assert state.exp_avg["idle"].all()
    assert not step.direction["idle"].any()
    kernel = gradient_gram(params, batch, batch, step.gain, apply)
    assert kernel.isfinite().all()
