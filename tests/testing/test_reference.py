"""The reference against independent code: torch.optim, finite differences, enumeration, sums by hand."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from helpers.cases import (
    TinyPolicy,
    assert_close,
    make_apply,
    random_adamw_state,
    random_batch,
)
from helpers.reference_cases import estimates, generator, policy
from helpers.tolerances import TINY_POLICY, assert_within, central_difference
from torch import Tensor

from fx_influence.testing import reference as ref
from fx_influence.types import (
    Batch,
    Estimator,
    Gradients,
    Normalize,
    Params,
    Preconditioner,
)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_values_match_batched_log_softmax(padding: Any, temperature: float) -> None:
    apply, params = policy()
    batch = random_batch(generator(), 6, 7, 5, padding=padding, gaps=True, min_len=0)
    values = ref.token_values(apply, params, batch, temperature)
    log_pi = (apply(params, batch.input_ids, batch.attention_mask)[:, :-1] / temperature).log_softmax(-1)
    taken = log_pi.gather(-1, batch.input_ids[:, 1:, None])[..., 0] * batch.completion_mask[:, 1:]
    entropies = torch.special.entr(log_pi.exp()).sum(-1) * batch.completion_mask[:, 1:]
    assert_close(values.logprobs[:, 1:], taken)
    assert_close(values.entropies[:, 1:], entropies)
    assert not values.logprobs[:, 0].any()
    assert not values.entropies[:, 0].any()


def test_token_values_handle_minus_infinity_and_reject_column_0() -> None:
    apply, params = policy()

    def barred(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return apply(params, input_ids, attention_mask).index_fill(-1, torch.tensor([0]), -math.inf)

    batch = random_batch(generator(), 3, 6, 5)
    batch = batch._replace(input_ids=batch.input_ids.clamp(min=1))
    assert ref.token_values(barred, params, batch).entropies.max() <= math.log(4)
    grads = ref.sequence_gradients(barred, params, batch)
    assert all(g is not None and g.isfinite().all() for row in grads for g in row.values())
    bad = batch._replace(completion_mask=torch.ones_like(batch.completion_mask))
    with pytest.raises(ValueError, match="column 0"):
        ref.token_values(apply, params, bad)


@pytest.mark.parametrize("bonus", [False, True])
def test_sequence_gradients_match_jacobian_of_loss(bonus: bool) -> None:
    apply, params = policy(idle=True)
    batch = random_batch(generator(5), 4, 7, 5, gaps=True, padding="left", entropy_coefficients=bonus, min_len=0)
    rows = ref.sequence_gradients(apply, params, batch, 0.7)
    c, b = batch.coefficients, batch.entropy_coefficients
    assert c is not None

    def losses(values: Params) -> Tensor:
        log_pi = (apply(values, batch.input_ids, batch.attention_mask)[:, :-1] / 0.7).log_softmax(-1)
        reward = c[:, 1:] * log_pi.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        if b is not None:
            reward = reward + b[:, 1:] * torch.special.entr(log_pi.exp()).sum(-1)
        return -reward.sum(1)

    expected = torch.func.jacrev(losses)(params)
    for i, row in enumerate(rows):
        assert row.pop("idle") is None
        assert not expected["idle"].any()
        for name, g in row.items():
            assert g is not None
            assert i == 0 or g.any()
            assert_close(g, expected[name][i])


@pytest.mark.slow
@estimates
@pytest.mark.parametrize("preconditioner", get_args(Preconditioner))
def test_influence_matches_finite_difference(
    estimator: Estimator, normalize: Normalize, preconditioner: Preconditioner
) -> None:
    apply, params = policy()
    batch_u = random_batch(generator(6), 3, 6, 5, gaps=True, entropy_coefficients=True, padding="left", min_len=0)
    batch_e = random_batch(generator(7), 5, 7, 5, groups=2, coefficients=False)
    state = random_adamw_state(
        generator(8),
        params,
        absent=("head.bias",),
        maximize=preconditioner == "jacobian",
        amsgrad=preconditioner == "frozen",
    )
    out = ref.influence(apply, params, batch_u, batch_e, state, estimator, normalize, preconditioner, 0.8, 0.5)
    assert_close(out.matrix.sum(0), out.per_sequence)
    assert_close(out.per_token.sum(1), out.per_sequence)
    assert_close(out.baseline + out.per_sequence.sum(), out.total)
    if preconditioner == "jacobian":
        assert (out.baseline - out.momentum - out.weight_decay).abs() > 1e-3
    else:
        assert_close(out.momentum + out.weight_decay, out.baseline)
    assert not out.per_token[~batch_u.completion_mask].any()
    assert out.per_sequence[0] == 0
    rows = ref.sequence_gradients(apply, params, batch_u, 0.8)
    step = ref.adamw(rows, state, params, preconditioner, 0.5)
    assert step.clip < 1
    assert not step.direction["head.bias"].any()
    assert (out.momentum != 0) == (preconditioner in ("frozen", "jacobian"))

    def assert_slope(v: Gradients, expected: Tensor) -> None:
        direction = {name: x for name, x in v.items() if x is not None}

        def moved(eta: float) -> Tensor:
            return ref.snis_delta(apply, params, direction, eta, batch_e, estimator, normalize, 10.0, 0.8).delta_h

        derivative, bound = central_difference(moved, 1e-4, terms=TINY_POLICY, magnitude=math.log(5))
        assert bound < 1e-3 * out.total.abs()
        assert_within(expected, derivative, bound)

    for i, row in enumerate(rows):
        assert_slope(ref.scale(step.gain, row), out.per_sequence[i])
    for v, expected in (
        (step.direction, out.total),
        (step.momentum, out.momentum),
        (step.weight_decay, out.weight_decay),
    ):
        assert_slope(dict(v), expected)


def test_standard_error_matches_hand_computation() -> None:
    matrix = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0]], dtype=torch.float64)
    # Clusters {0, 2} and {1}; lengths 1, 2, 1: shares 1/4, 1/2, 1/4, so each cluster has half. Sums 4.5 and 1.
    # Column 0: 1.5 - 2.25 = -0.75 and 3 - 2.25 = 0.75; column 1: 2 - 0.5 = 1.5 and -1 - 0.5 = -1.5; C/(C-1) = 2.
    computed = ref.standard_error(matrix, [1, 2, 1], torch.tensor([7, 4, 7]), "token")
    assert_close(computed, torch.tensor([1.5, 3.0], dtype=torch.float64))
    # Rows, by sequence: column 0 about its mean 1.5 is -0.5, 1.5, -1, squares sum to 3.5, times 3/2.
    assert ref.standard_error(matrix, [1, 2, 1], None, "sequence")[0].item() == pytest.approx(math.sqrt(5.25))
    assert ref.standard_error(matrix, [1, 2, 1], torch.zeros(3), "token").isnan().all()


def test_fisher_kernel_is_product_of_jacobians() -> None:
    apply, params = policy()
    batch_a, batch_b = random_batch(generator(1), 3, 6, 5), random_batch(generator(2), 4, 7, 5, min_len=0)
    state = random_adamw_state(generator(3), params, absent=("head.bias",))

    def scores(batch: Batch, *values: Tensor) -> Tensor:
        logits = apply(dict(zip(params, values, strict=True)), batch.input_ids, batch.attention_mask)
        log_pi = (logits[:, :-1] / 0.8).log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        return (log_pi * batch.completion_mask[:, 1:]).sum(1)

    def jacobian(batch: Batch) -> dict[str, Tensor]:
        rows = torch.func.jacrev(lambda p: scores(batch, *p.values()))(params)
        return {name: j.flatten(1) for name, j in rows.items()}

    a, b = jacobian(batch_a), jacobian(batch_b)
    identity = torch.stack([a[k] @ b[k].T for k in params]).sum(0)
    assert_close(ref.fisher_kernel(apply, params, batch_a, batch_b, None, 0.8), identity)
    p = {}
    for name, s in state.exp_avg_sq.items():
        hyper = state.hyper[name]
        p[name] = 1 / ((s / (1 - hyper.beta2 ** state.step[name])).sqrt() + hyper.eps)
    expected = torch.stack([(a[k] * p[k].flatten()) @ b[k].T for k in p]).sum(0)
    computed = ref.fisher_kernel(apply, params, batch_a, batch_b, ref.adam_diagonals(state), 0.8)
    assert_close(computed, expected)
    assert not computed[:, 0].any()


@pytest.mark.parametrize("padding", ["right", "left"])
def test_tiny_policy_ignores_padding_and_accepts_empty_row(padding: Any) -> None:
    apply, params = make_apply(TinyPolicy(vocab=5, dim=4, layers=2, max_len=8, tied=True))
    assert "token.weight" in params
    assert "head.weight" not in params
    batch = random_batch(generator(2), 4, 6, 5, padding=padding)
    ids, attention, completion = (torch.nn.functional.pad(x, (1, 1)) for x in batch[:3] if x is not None)
    wider = Batch(ids, attention, completion)
    plain, padded = (ref.token_values(apply, params, b).logprobs for b in (batch, wider))
    assert_close(padded[:, 1:-1], plain)
    no_attention = torch.zeros_like(batch.attention_mask)
    assert apply(params, batch.input_ids, no_attention).isfinite().all()


@pytest.mark.parametrize("seed", range(5))
def test_random_batches_are_valid(seed: int) -> None:
    batch = random_batch(generator(seed), 7, 6, 5, groups=3, gaps=seed % 2 == 0, padding=("right", "left")[seed % 2])
    assert not batch.completion_mask[:, 0].any()
    assert not (batch.completion_mask & ~batch.attention_mask).any()
    assert ((batch.attention_mask & ~batch.completion_mask).sum(1) >= 1).all()
    lengths = batch.completion_mask.sum(1)
    assert lengths.min() == 1
    assert lengths.max() == 5 or seed % 2 == 0
    assert batch.group is not None
    assert batch.coefficients is not None
    assert len(set(torch.bincount(batch.group, minlength=3).tolist())) > 1
    assert torch.bincount(batch.group, minlength=3).min() > 0
    assert not batch.coefficients[~batch.completion_mask].any()
