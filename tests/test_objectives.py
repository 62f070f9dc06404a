"""Objectives other than the default entropy, against enumeration where E is the full distribution of the policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import pytest
import torch
from helpers.cases import assert_close, dyadic_policy, make_apply, random_adamw_state
from helpers.enumeration import (
    Score,
    Space,
    enumerate_completions,
    exact_entropy,
    exact_expected,
    exact_gradient,
    replicate,
    take,
)
from helpers.present import present
from helpers.strategies import NORMALIZES, Case, cases, influence_options
from helpers.tolerances import TINY_POLICY, assert_within, central_difference
from hypothesis import given, settings
from torch import Tensor

import fx_influence as fx
from fx_influence.objectives import Objective, objective_coefficients
from fx_influence.testing import reference
from fx_influence.types import AdamWState, Apply, Batch, Gradients, Normalize, Params

TEMPERATURE = 0.5


def sequence_entropy(normalize: Normalize) -> Objective:
    """Return entropy as a user would write it: s_a = (h_a + S_a (h_a - H f_a)) / sum f."""

    def objective(logprobs: Tensor, entropies: Tensor, batch_e: Batch) -> Tensor:
        f = batch_e.completion_mask.sum(-1).double() if normalize == "token" else torch.ones(len(logprobs)).double()
        h = entropies.sum(-1)
        x = (h - h.sum() / f.sum() * f).detach()
        return (h + logprobs.sum(-1) * x) / f.sum()

    return objective


def per_decision_entropy(normalize: Normalize) -> Objective:
    """Return s_a = (1/Z) sum_t (h_at + S_a,<t x_at), computed token by token."""

    def objective(logprobs: Tensor, entropies: Tensor, batch_e: Batch) -> Tensor:
        lp, h = ([row[ok] for row, ok in zip(v, batch_e.completion_mask, strict=True)] for v in (logprobs, entropies))
        n, longest = len(h), max(len(row) for row in h)
        z = sum(len(row) for row in h) if normalize == "token" else n
        mean = float(entropies.detach().sum()) / z
        s = [row.sum() for row in h]
        for t in range(longest):
            h_t = [float(row[t].detach()) if t < len(row) else 0.0 for row in h]
            ok_t = [float(t < len(row)) for row in h]
            for a in range(n):
                x = h_t[a] - sum(h_t) / n
                x -= mean * (ok_t[a] - sum(ok_t) / n) if normalize == "token" else 0.0
                s[a] = s[a] + lp[a][:t].sum() * x
        return torch.stack(s) / z

    return objective


@pytest.mark.slow
@pytest.mark.parametrize("normalize", NORMALIZES)
@pytest.mark.parametrize(
    ("estimator", "make_objective"), [("sequence", sequence_entropy), ("per_decision", per_decision_entropy)]
)
@given(case=cases())
@settings(max_examples=8)
def test_entropy_objective_matches_user_written_one(
    case: Case, estimator: Any, make_objective: Callable[[Normalize], Objective], normalize: Normalize
) -> None:
    options = {**influence_options(case), "matrix": True}
    inputs = (case.params, case.batch_u, case.batch_e, case.opt_state)
    objectives = (make_objective(normalize), fx.Entropy(estimator, normalize))
    custom, default = (fx.influence(*inputs, **{**options, "objective": objective}) for objective in objectives)
    size = present(default.matrix).abs().sum()
    assert_close(present(custom.matrix), present(default.matrix), size)
    assert_close(present(custom.per_token), present(default.per_token), size)
    for name in ("baseline", "momentum", "weight_decay", "total"):
        assert_close(
            getattr(custom, name), getattr(default, name), size + abs(default.momentum) + abs(default.weight_decay)
        )
    if normalize == "sequence":
        assert_close(custom.stderr, default.stderr, size)


class Exact(NamedTuple):
    """A policy that can be enumerated, a step of it, and an E that is its full distribution."""

    apply: Apply
    params: Params
    space: Space
    batch_u: Batch
    batch_e: Batch
    opt_state: AdamWState

    def influence(self, **changes: Any) -> fx.Influence:
        inputs = (self.params, self.batch_u, self.batch_e, self.opt_state)
        return fx.influence(*inputs, apply=self.apply, temperature=TEMPERATURE, **changes)

    def parts(self) -> list[Params]:
        """Return gamma g_i, every rollout's part of the step."""
        rows = reference.sequence_gradients(self.apply, self.params, self.batch_u, TEMPERATURE)
        gain = fx.adamw_decompose(reference.add(rows), self.opt_state, self.params).gain
        return [{name: gain[name] * g for name, g in row.items() if g is not None} for row in rows]

    def derivatives(self, gradient: Mapping[str, Tensor | None]) -> Tensor:
        return torch.tensor([reference.inner(gradient, part) for part in self.parts()], dtype=torch.float64)

    def gradient(self, score: Score) -> Gradients:
        """Return the exact gradient of E[score], through the probabilities and through the score."""
        leaves = reference.tracked(self.params)
        return reference.gradient(exact_expected(self.apply, leaves, self.space, score), leaves)


@pytest.fixture
def exact() -> Exact:
    generator = torch.Generator().manual_seed(5)
    apply, params = make_apply(dyadic_policy(generator))
    params = {"table": params["table"] * TEMPERATURE}
    prompts = [torch.tensor([1]), torch.tensor([2, 1])]
    space = enumerate_completions(prompts, eos_id=0, vocab_size=3, max_new_tokens=3, temperature=TEMPERATURE)
    batch_e = replicate(apply, params, space, 256)
    assert len(batch_e.completion_mask.sum(-1).unique()) == 3
    rows = torch.randperm(len(space.batch.input_ids), generator=generator)[:5]
    coefficients = torch.randn(5, space.batch.input_ids.shape[1], generator=generator, dtype=torch.float64)
    batch_u = take(space, rows)._replace(coefficients=coefficients)
    return Exact(apply, params, space, batch_u, batch_e, random_adamw_state(generator, params, step=6))


def ones_in(batch: Batch) -> Tensor:
    """Return a reward: the number of 1 tokens of a completion, plus two if it ends early."""
    mask = batch.completion_mask
    return ((batch.input_ids == 1) & mask).sum(-1).double() + 2.0 * (mask.sum(-1) == 1)


def test_expected_reward_is_exact_on_full_distribution(exact: Exact) -> None:
    out = exact.influence(objective=fx.expected_reward(ones_in(exact.batch_e)), matrix=True)
    exact_value = exact.derivatives(exact.gradient(lambda logprobs, entropies, batch: ones_in(batch)))
    assert exact_value.abs().min() > 1e-4
    assert_close(out.per_sequence, exact_value)
    assert_close(present(out.matrix).sum(0), exact_value, present(out.matrix).abs().sum())


def every_nth(step: int, exact: Exact) -> Exact:
    """Return every ``step``-th row of E, which is no longer the full distribution."""
    return exact._replace(batch_e=Batch._make(None if field is None else field[::step] for field in exact.batch_e))


def test_expected_reward_ignores_constant_and_scales(exact: Exact) -> None:
    subset = every_nth(3, exact)
    rewards = ones_in(subset.batch_e)
    plain, moved, scaled = (
        subset.influence(objective=fx.expected_reward(r)).per_token for r in (rewards, rewards + 100.0, -3.0 * rewards)
    )
    # Until it is centred away, 100 is added to rewards of unit size.
    assert_close(present(moved), present(plain), 100 * present(plain).abs().max())
    assert_close(present(scaled), -3.0 * present(plain))
    assert present(plain).abs().max() > 1e-3


def test_kl_to_reference_is_exact_on_full_distribution(exact: Exact) -> None:
    shifted = {"table": exact.params["table"] + 1.0 * torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(4, 3, 3)}
    reference_logprobs, reference_of_space = (
        fx.token_values(shifted, batch, exact.apply, TEMPERATURE).logprobs
        for batch in (exact.batch_e, exact.space.batch)
    )
    out = exact.influence(objective=fx.kl_to_reference(reference_logprobs), matrix=True)
    kl = exact_expected(exact.apply, exact.params, exact.space, lambda lp, h, batch: (lp - reference_of_space).sum(-1))
    assert kl > 0.005
    exact_value = exact.derivatives(exact.gradient(lambda lp, h, batch: (lp - reference_of_space).sum(-1)))
    assert exact_value.abs().min() > 1e-4
    assert_close(out.per_sequence, exact_value)
    assert_close(present(out.matrix).sum(0), exact_value, present(out.matrix).abs().sum())


def test_kl_to_reference_is_minimal_at_policy_itself(exact: Exact) -> None:
    logprobs = fx.token_values(exact.params, exact.batch_e, exact.apply, TEMPERATURE).logprobs
    out = exact.influence(objective=fx.kl_to_reference(logprobs), stderr=False)
    for value in (out.per_sequence, out.baseline):
        assert_close(value, torch.zeros_like(value))
    # A subset of rows has nonzero influence; only the sum over all of them is 0.
    assert every_nth(3, exact).influence(objective=fx.kl_to_reference(logprobs[::3])).per_sequence.abs().min() > 1e-4


def test_kl_to_reference_ignores_constant_at_equal_lengths(exact: Exact) -> None:
    """The weights are centred by rank, over a sample too."""
    longest = exact.batch_e.completion_mask.sum(-1) == 3
    batch = Batch._make(None if field is None else field[longest][::3] for field in exact.batch_e)
    subset = exact._replace(batch_e=batch)
    reference_logprobs = fx.token_values(
        {"table": exact.params["table"].flip(0)}, batch, exact.apply, TEMPERATURE
    ).logprobs
    plain, moved = (
        subset.influence(objective=fx.kl_to_reference(x)).per_token
        for x in (reference_logprobs, reference_logprobs - 50.0)
    )
    # Until it is centred away, 50 is added to log-probabilities of unit size.
    assert_close(present(moved), present(plain), 50 * present(plain).abs().max())


def test_kl_to_reference_reads_completions_only(exact: Exact) -> None:
    reference_logprobs = fx.token_values(
        {"table": exact.params["table"].flip(0)}, exact.batch_e, exact.apply, TEMPERATURE
    ).logprobs
    noisy = torch.where(exact.batch_e.completion_mask, reference_logprobs, torch.nan)
    plain, spoiled = (exact.influence(objective=fx.kl_to_reference(x)) for x in (reference_logprobs, noisy))
    torch.testing.assert_close(spoiled.per_token, plain.per_token, rtol=0, atol=0)


@given(case=cases())
@settings(max_examples=10)
def test_kl_to_reference_ignores_gaps_in_completions(case: Case) -> None:
    """The same token values without the columns that have no completion token have the same weights."""
    values = fx.token_values(case.params, case.batch_e, case.apply, case.temperature)
    mask = case.batch_e.completion_mask
    reference_logprobs = torch.where(mask, values.logprobs * 1.5 - 0.2, 0.0)
    order = (~mask).long().argsort(dim=-1, stable=True)
    packed = case.batch_e._replace(completion_mask=mask.gather(-1, order))
    moved = fx.TokenValues(*(v.gather(-1, order) for v in values))
    wide = objective_coefficients(fx.kl_to_reference(reference_logprobs), values, case.batch_e)
    tight = objective_coefficients(fx.kl_to_reference(reference_logprobs.gather(-1, order)), moved, packed)
    for a, b in zip(wide, tight, strict=True):
        assert_close(a.gather(-1, order), b)


def test_user_objective_is_exact_on_full_distribution(exact: Exact) -> None:
    """The objectives are mean completion length, by the score function, and first-token entropy, which needs none."""

    def length(logprobs: Tensor, entropies: Tensor, batch_e: Batch) -> Tensor:
        t = batch_e.completion_mask.sum(-1).double()
        return (t - t.mean()) * logprobs.sum(-1) / len(t)

    def first_entropy(logprobs: Tensor, entropies: Tensor, batch_e: Batch) -> Tensor:
        mask = batch_e.completion_mask
        return (entropies * (mask & (mask.cumsum(-1) == 1))).sum(-1) / len(mask)

    longer = exact.derivatives(exact.gradient(lambda lp, h, batch: batch.completion_mask.sum(-1).double()))
    assert_close(exact.influence(objective=length).per_sequence, longer)
    firsts = exact.derivatives(exact.gradient(lambda lp, h, batch: first_entropy(lp, h, batch) * len(h)))
    assert_close(exact.influence(objective=first_entropy).per_sequence, firsts)
    assert longer.abs().min() > 1e-3
    assert firsts.abs().max() > 1e-3


def test_entropy_per_reward_matches_small_step(exact: Exact) -> None:
    entropy = exact.influence(objective=fx.Entropy(normalize="token"))
    reward = exact.influence(objective=fx.expected_reward(ones_in(exact.batch_e)))
    price = entropy.per_sequence / reward.per_sequence
    assert price.min() < 0 < price.max()

    def assert_paid(direction: Params, expected: float) -> None:
        def params_at(eta: float) -> Params:
            return {k: p + eta * direction[k] for k, p in exact.params.items()}

        def rewarded(eta: float) -> Tensor:
            return exact_expected(exact.apply, params_at(eta), exact.space, lambda lp, h, batch: ones_in(batch))

        paid, off = central_difference(
            lambda eta: exact_entropy(exact.apply, params_at(eta), exact.space, "token"), 1e-5, terms=TINY_POLICY
        )
        gained, gained_off = central_difference(rewarded, 1e-5, terms=TINY_POLICY)
        bound = (off + abs(expected) * gained_off) / float(gained.abs())
        assert bound < 1e-2 * abs(expected)
        assert_within(paid / gained, expected, bound)

    for part, expected in zip(exact.parts(), price.tolist(), strict=True):
        assert_paid(part, expected)
    step = fx.adamw_decompose(
        reference.add(reference.sequence_gradients(exact.apply, exact.params, exact.batch_u, TEMPERATURE)),
        exact.opt_state,
        exact.params,
    )
    assert_paid(step.direction, float(entropy.total / reward.total))


def test_entropy_objective_is_exact_on_full_distribution(exact: Exact) -> None:
    for normalize in NORMALIZES:
        exact_value = exact.derivatives(exact_gradient(exact.apply, exact.params, exact.space, normalize))
        assert_close(exact.influence(objective=fx.Entropy(normalize=normalize)).per_sequence, exact_value)


def test_objective_stderr_matches_reference(exact: Exact) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(len(exact.batch_e.input_ids), (40,), generator=generator)
    subset = Batch._make(None if field is None else field[rows] for field in exact.batch_e)
    subset = subset._replace(group=torch.arange(40) // 3)
    objective = fx.expected_reward(ones_in(subset))
    out = exact._replace(batch_e=subset).influence(objective=objective, matrix=True)
    slow = reference.standard_error(
        present(out.matrix), subset.completion_mask.sum(-1).tolist(), subset.group, "sequence"
    )
    assert_close(out.stderr, slow)
    assert_close(
        present(exact._replace(batch_e=subset).influence(objective=objective).per_token), present(out.per_token)
    )


def doubled(logprobs: Tensor, entropies: Tensor, batch_e: Batch) -> Tensor:
    return logprobs.sum(-1) * logprobs.mean()


BAD_OBJECTIVES: dict[str, tuple[Objective, str]] = {
    "a scalar": (lambda lp, h, batch: lp.sum(), r"objective returned \(\); expected finite values of shape \(256,\)"),
    "one value a token": (lambda lp, h, batch: lp, r"objective returned \(256, \d\)"),
    "one row too few": (lambda lp, h, batch: lp.sum(-1)[1:], r"objective returned \(255,\)"),
    "no tensor": (lambda lp, h, batch: cast("Tensor", 0.5), r"objective returned float"),
    "NaN": (lambda lp, h, batch: lp.sum(-1) * torch.nan, r"objective returned \(256,\); expected finite values"),
    "an infinite value": (lambda lp, h, batch: lp.sum(-1) + torch.inf, r"expected finite values"),
    "detached": (lambda lp, h, batch: (lp * h).sum(-1).detach(), r"objective's result depends on neither input"),
    "constant": (lambda lp, h, batch: torch.ones(len(lp)), r"objective's result depends on neither input"),
    "a product over the batch": (doubled, r"objective's s_a depends on other rows than a; expected row a alone"),
    "a live mean": (lambda lp, h, batch: h.sum(-1) - h.mean(), r"objective's s_a depends on other rows than a"),
    "rows in another order": (lambda lp, h, batch: lp.sum(-1).flip(0), r"objective's s_a depends on other rows than a"),
    "a root at 0": (lambda lp, h, batch: (lp - lp).sum(-1).sqrt(), r"objective's derivative is not finite"),
}


@pytest.mark.parametrize("what", BAD_OBJECTIVES)
def test_influence_rejects_unattributable_objective(exact: Exact, what: str) -> None:
    objective, message = BAD_OBJECTIVES[what]
    with pytest.raises(ValueError, match=message):
        exact.influence(objective=objective)


def test_objectives_name_bad_rewards_and_references(exact: Exact) -> None:
    n, t = exact.batch_e.input_ids.shape
    for bad in (torch.zeros(n - 1), torch.zeros(n, 1)):
        with pytest.raises(ValueError, match=rf"rewards has shape .*; expected \({n},\), the rows of batch_e in order"):
            exact.influence(objective=fx.expected_reward(bad))
    with pytest.raises(ValueError, match="rewards has values that are not finite"):
        fx.expected_reward(torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match=rf"reference_logprobs has shape .*; expected \({n}, {t}\)"):
        exact.influence(objective=fx.kl_to_reference(torch.zeros(n, t - 1)))
    with pytest.raises(ValueError, match=r"objective returned .* expected finite values"):
        exact.influence(objective=fx.kl_to_reference(torch.full((n, t), -torch.inf)))
