"""Directions in bfloat16 or on another device, and passes in bfloat16, against the plain call."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from helpers.cases import random_adamw_state, random_batch
from helpers.hf_models import make_model
from helpers.present import present
from helpers.tolerances import ROOM, assert_close_to_rounding, policy_terms
from torch import Tensor

import fx_influence as fx
from fx_influence.attribution.cross_fitting import evaluation_rows, split_into_groups
from fx_influence.attribution.objective_gradients import evaluate_objective
from fx_influence.autodiff.engine import Engine
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.batching.rows import select_rows

WIDTH = 8
EPS = torch.finfo(torch.bfloat16).eps


class Inputs:
    """A small model's step in ``dtype``: ``call(**options)`` attributes it."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(3)
        self.apply, self.params = fx.make_functional(make_model("qwen2").to(dtype))
        vocab = self.apply.vocab_size
        assert vocab is not None
        self.u = random_batch(generator, 10, WIDTH, vocab, coefficients=True)
        self.e = random_batch(generator, 16, WIDTH, vocab, groups=16)
        self.state = random_adamw_state(generator, self.params)

    def call(self, **options: Any) -> fx.Influence:
        return fx.influence(self.params, self.u, self.e, self.state, apply=self.apply, **options)

    def row_gradients(self) -> list[fx.types.Gradients]:
        """Return the gradient of each rollout's loss."""
        rows = range(len(self.u.input_ids))
        return [batch_gradient(self.params, select_rows(self.u, slice(k, k + 1)), self.apply) for k in rows]

    def group_gradients(self) -> list[fx.Params]:
        """Return grad H by random group of E."""
        groups = split_into_groups(evaluation_rows(self.u, self.e, cross_fit=False), stderr=True, matrix=False)
        engine = Engine(self.apply)
        evaluation = evaluate_objective(self.params, self.e, fx.Entropy(), groups, True, engine, 0, None)
        return list(evaluation.deviating_gradients(evaluation.next_length_gradient()))


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs()


def absolute_terms(inputs: Inputs, gradient: fx.Params) -> Tensor:
    """Return sum_j |gamma_j grad_j g_ij| by rollout, (n_u,): what relative roundings of gamma * grad multiply."""
    total = batch_gradient(inputs.params, inputs.u, inputs.apply)
    gain = fx.adamw_decompose(total, inputs.state, inputs.params).gain
    by_row = [
        torch.stack([(gain[n] * gradient[n] * g).abs().sum() for n, g in row.items() if g is not None]).sum()
        for row in inputs.row_gradients()
    ]
    return torch.stack(by_row)


def test_stderr_in_bfloat16_is_within_its_rounding(inputs: Inputs) -> None:
    """The budget takes eight directions in bfloat16; each entry of one is rounded by eps / 2 at most."""
    count = sum(p.numel() for p in inputs.params.values())
    exact, narrow = inputs.call(memory_budget=64 * count), inputs.call(memory_budget=16 * count)
    error = torch.stack([absolute_terms(inputs, g) for g in inputs.group_gradients()]).mul(EPS / 2)
    bound = (8 / 7 * error.square().sum(0)).sqrt() * 1.01
    difference = (narrow.stderr - exact.stderr).abs()
    assert (difference <= bound).all()
    assert difference.max() > 0
    # The influences themselves are along the sum in full precision.
    for field in ("per_sequence", "per_token", "total"):
        expected = getattr(exact, field)
        assert_close_to_rounding(getattr(narrow, field), expected, terms=policy_terms(inputs.params, WIDTH))
    assert narrow.rounding.isnan().all()
    assert not exact.rounding.isnan().any()


@pytest.mark.parametrize("cross_fitted", [False, True])
@pytest.mark.parametrize("bytes_per_parameter", [0, 6])
def test_errors_are_exact_without_sums_in_memory(inputs: Inputs, bytes_per_parameter: int, cross_fitted: bool) -> None:
    """The gradient of log E[T] goes through U's map, and grad H comes from one more pass over E.

    Six bytes a parameter hold three directions in bfloat16 and no sum of the groups' in float64: what is by token is
    along exact directions all the same.
    """
    u = inputs.u._replace(group=torch.arange(10) // 2)
    labels = torch.where(u.completion_mask, torch.arange(WIDTH) % 2, -1)
    call = partial(fx.influence, inputs.params, u, None if cross_fitted else inputs.e, inputs.state, apply=inputs.apply)
    count = sum(p.numel() for p in inputs.params.values())
    expected = call(memory_budget=64 * count, labels=labels)
    out = call(memory_budget=bytes_per_parameter * count, labels=labels)
    tolerances: dict[str, Any] = {
        "terms": policy_terms(inputs.params, WIDTH),
        "scale": present(expected.per_token).abs().sum(),
    }
    for field in ("per_sequence", "per_token", "total", "total_stderr")[: None if bytes_per_parameter == 0 else 3]:
        assert_close_to_rounding(getattr(out, field), getattr(expected, field), **tolerances)
    if bytes_per_parameter == 0:
        assert_close_to_rounding(out.stderr, expected.stderr, **tolerances)
        assert_close_to_rounding(out.sums(labels).stderr, expected.sums(labels).stderr, **tolerances)


@pytest.mark.slow
@pytest.mark.parametrize("memory_budget", [0, None])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("stderr", [True, False])
def test_direction_dtype_rounds_within_bfloat16(
    inputs: Inputs, stderr: bool, per_token: bool, memory_budget: int | None
) -> None:
    """grad H is rounded once for each micro-batch that adds to it, then by gain, scale and cast."""
    options: dict[str, Any] = {
        "stderr": stderr,
        "per_token": per_token,
        "chunk_size": 4,
        "memory_budget": memory_budget,
    }
    exact, narrow = inputs.call(**options), inputs.call(direction_dtype=torch.bfloat16, **options)
    sizes = torch.stack([absolute_terms(inputs, g) for g in inputs.group_gradients()]).sum(0)
    difference = (narrow.per_sequence - exact.per_sequence).abs()
    assert (difference <= ROOM * EPS * sizes).all()
    assert difference.max() > 0
    assert_close_to_rounding(
        narrow.per_sequence.sum() + narrow.residual,
        torch.stack(list(narrow.per_parameter.values())).sum(),
        terms=policy_terms(inputs.params, WIDTH),
        scale=sizes.sum(),
    )
    assert narrow.residual.abs() < 1e-9 * sizes.sum()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("stderr", [True, False])
def test_offload_changes_nothing(inputs: Inputs, stderr: bool, grad: bool) -> None:
    """Both devices are one on a CPU, so this shows the arithmetic and no move between devices."""
    gradient = batch_gradient(inputs.params, inputs.u, inputs.apply) if grad else None
    plain, offloaded = (inputs.call(stderr=stderr, grad=gradient, offload=x) for x in (None, "cpu"))
    for field in ("per_sequence", "per_token", "stderr", "total", "conditioning"):
        torch.testing.assert_close(getattr(offloaded, field), getattr(plain, field), rtol=0, atol=0, equal_nan=True)


def test_compute_dtype_stays_within_bfloat16() -> None:
    inputs = Inputs(torch.float32)
    with warnings.catch_warnings():
        # bfloat16 may rival small influences, which the library then says.
        warnings.simplefilter("ignore")
        exact, half = inputs.call(), inputs.call(compute_dtype=torch.bfloat16)
    sizes = torch.stack([absolute_terms(inputs, g) for g in inputs.group_gradients()]).sum(0)
    terms = policy_terms({name: p.bfloat16() for name, p in inputs.params.items()}, WIDTH)
    difference = (half.per_sequence - exact.per_sequence).abs()
    assert (difference <= ROOM * EPS * terms**0.5 * sizes).all()
    assert difference.max() > 0
    assert half.total.dtype == torch.float64
    assert half.rounding.max() > 0


@pytest.mark.parametrize("field", ["compute_dtype", "direction_dtype"])
@pytest.mark.parametrize("value", [torch.float16, torch.float64, "bfloat16"])
def test_influence_refuses_other_dtypes(inputs: Inputs, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field} is .*float.*; expected torch.bfloat16 or None"):
        inputs.call(**{field: value})


def test_compute_dtype_refuses_a_plain_apply(inputs: Inputs) -> None:
    def plain(params: fx.Params, ids: Tensor, mask: Tensor) -> Tensor:
        return inputs.apply(params, ids, mask)

    with pytest.raises(ValueError, match=r"compute_dtype is torch.bfloat16 for a plain apply.*make_functional"):
        fx.influence(inputs.params, inputs.u, inputs.e, inputs.state, apply=plain, compute_dtype=torch.bfloat16)
