"""E of another policy: estimate, first order, finite step and error bars agree.

The weighted entropy that they are held to is the reference's, from loops over rows and ranks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from helpers.cases import (
    add_padding,
    assert_close,
    dyadic_policy,
    make_apply,
    random_direction,
)
from helpers.enumeration import enumerate_completions, exact_gradient, replicate
from helpers.off_policy import TEMPERATURE, VOCAB, WIDTH, OffPolicy, make_case, options
from helpers.present import present
from helpers.strategies import ESTIMATORS
from helpers.tolerances import TINY_POLICY, assert_within, central_curvature, central_difference
from helpers.world import EOS, derivatives_along, estimates
from torch import Tensor

import fx_influence as fx
from fx_influence.autodiff.directional import token_jvp
from fx_influence.batching.rows import select_rows
from fx_influence.core.tree import shift
from fx_influence.estimators.entropy import behaviour_weights, length_coefficients
from fx_influence.estimators.stderr import MAX_RANDOM_GROUPS, cluster_index
from fx_influence.testing import reference
from fx_influence.testing.entropy import entropy
from fx_influence.testing.scores import score_row
from fx_influence.types import Estimator, Normalize


class Estimate(NamedTuple):
    """The weighted entropy, and the weighted mean completion length, by the reference's loops."""

    entropy: Tensor
    length: Tensor


def slow_entropy(case: OffPolicy, eta: float, estimator: Estimator, normalize: Normalize) -> Tensor:
    return slow_estimate(case, eta, estimator, normalize).entropy


def slow_estimate(case: OffPolicy, eta: float, estimator: Estimator, normalize: Normalize) -> Estimate:
    """Return the estimate at theta + eta v."""
    moved, batch = shift(case.params, case.direction, eta), case.batch
    entropies, ratios = [], []
    for a in range(len(batch.input_ids)):
        score = score_row(case.apply, moved, batch, a, TEMPERATURE)
        behaviour = present(batch.behaviour_logprobs)[a, batch.completion_mask[a]].tolist()
        entropies.append([float(h) for h in score.entropies])
        ratios.append([float(p) - q for p, q in zip(score.logprobs, behaviour, strict=True)])
    per_token, per_sequence = (entropy(entropies, ratios, estimator, n)[1] for n in ("token", "sequence"))
    both = (entropy(entropies, ratios, estimator, normalize)[0], per_token / per_sequence)
    return Estimate(*(torch.tensor(x, dtype=torch.float64) for x in both))


@estimates
def test_weighted_estimates_match_the_reference(estimator: Estimator, normalize: Normalize) -> None:
    case = make_case()
    chosen = options(case, estimator, normalize)
    values = fx.token_values(case.params, case.batch, case.apply, TEMPERATURE)
    before, after = (slow_entropy(case, eta, estimator, normalize) for eta in (0.0, 0.7))
    assert_close(fx.entropy_estimate(values, case.batch, normalize, estimator), before)
    unweighted = fx.entropy_estimate(values, case.batch._replace(behaviour_logprobs=None), normalize)
    assert (before - unweighted).abs() > 1e-3
    change = fx.snis_delta(case.params, case.direction, 0.7, case.batch, **chosen)
    assert_close(change.delta_h, after - before, after)
    assert_close(change.contributions.sum(), after - before, after)
    moved = fx.token_values(shift(case.params, case.direction, 0.7), case.batch, case.apply, TEMPERATURE)
    log_weights = torch.where(case.batch.completion_mask, moved.logprobs - present(case.batch.behaviour_logprobs), 0.0)
    assert_close(change.log_weights, log_weights.sum(-1))
    unmoved = fx.snis_delta(case.params, {}, 1.0, case.batch, **chosen)
    assert not unmoved.contributions.any()


@estimates
def test_jvp_matches_finite_differences_of_weighted_entropy(estimator: Estimator, normalize: Normalize) -> None:
    case = make_case()
    out = fx.jvp_delta(case.params, case.direction, case.batch, **options(case, estimator, normalize))

    def estimate(eta: float) -> Tensor:
        return slow_entropy(case, eta, estimator, normalize)

    size = math.log(VOCAB) * WIDTH
    first = central_difference(estimate, 1e-3, terms=TINY_POLICY, magnitude=size)
    second = central_curvature(estimate, 1e-2, terms=TINY_POLICY, magnitude=size)
    assert first.slope.abs() > 10 * first.bound
    assert second.slope.abs() > 10 * second.bound
    assert_within(out.first, first.slope, first.bound)
    assert_within(out.second, second.slope, second.bound)
    assert_close(out.contributions.sum(), out.first)

    def contributions(eta: float) -> Tensor:
        return fx.snis_delta(
            case.params, case.direction, eta, case.batch, **options(case, estimator, normalize)
        ).contributions

    by_row = central_difference(contributions, 1e-3, terms=TINY_POLICY, magnitude=size)
    assert_within(out.contributions, by_row.slope, by_row.bound)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_length_coefficients_match_finite_differences(estimator: Estimator) -> None:
    case = make_case()
    values = fx.token_values(case.params, case.batch, case.apply, TEMPERATURE)
    c = length_coefficients(case.batch.completion_mask, estimator, behaviour_weights(values, case.batch, estimator))
    slopes = token_jvp(case.params, case.direction, case.batch, case.apply, TEMPERATURE)
    expected = central_difference(
        lambda eta: slow_estimate(case, eta, estimator, "token").length.log(), 1e-3, terms=TINY_POLICY, magnitude=WIDTH
    )
    assert expected.slope.abs() > 10 * expected.bound
    assert_within((c * slopes.logprobs).sum(), expected.slope, expected.bound)


@estimates
def test_clipped_weights_have_no_derivative(estimator: Estimator, normalize: Normalize) -> None:
    """All log-weights are 11 from a row's first token on, so that no weight beyond it changes with the policy."""
    case = make_case()
    values, rows = fx.token_values(case.params, case.batch, case.apply, TEMPERATURE), torch.arange(12)
    behaviour = values.logprobs.clone()
    behaviour[rows, case.batch.completion_mask.int().argmax(-1)] -= 11.0
    case = case._replace(batch=case.batch._replace(behaviour_logprobs=behaviour))
    weights = present(behaviour_weights(values, case.batch, estimator))
    assert not weights.within.all()

    def estimate(eta: float) -> Tensor:
        return slow_entropy(case, eta, estimator, normalize)

    first = central_difference(estimate, 1e-3, terms=TINY_POLICY, magnitude=math.log(VOCAB) * WIDTH)
    out = fx.jvp_delta(case.params, case.direction, case.batch, **options(case, estimator, normalize))
    assert_within(out.first, first.slope, first.bound)


@estimates
def test_influences_match_derivatives_along_each_part(estimator: Estimator, normalize: Normalize) -> None:
    """The adjoint, the matrix and its error bars against ``jvp_delta`` along gamma g_i."""
    case = make_case()
    chosen = options(case, estimator, normalize)
    e = case.batch._replace(coefficients=None)
    g = reference.sequence_gradients(case.apply, case.params, case.batch, TEMPERATURE)
    gain = fx.adamw_decompose(reference.add(g), case.opt_state, case.params).gain
    groups = cluster_index(e) % MAX_RANDOM_GROUPS
    adjoint = fx.influence(case.params, case.batch, e, case.opt_state, **chosen)
    pairwise = fx.influence(case.params, case.batch, e, case.opt_state, matrix=True, **chosen)
    for i in (0, 5):
        v = {name: gain[name] * x for name, x in g[i].items() if x is not None}
        by_group = e._replace(group=groups)
        expected = fx.jvp_delta(case.params, v, by_group, second_order=False, **chosen)
        size = expected.contributions.abs().sum()
        for out in (adjoint, pairwise):
            assert_close(out.per_sequence[i], expected.first, size)
            assert_close(out.stderr[i], expected.stderr, size)
        assert_close(present(pairwise.matrix)[:, i], expected.contributions, size)
    assert_close(present(adjoint.per_token).sum(-1), adjoint.per_sequence, adjoint.per_sequence.abs().sum())
    step = fx.adamw_decompose(reference.add(g), case.opt_state, case.params).direction
    along_step = fx.jvp_delta(case.params, step, e, second_order=False, **chosen)
    assert_close(adjoint.total, along_step.first, along_step.contributions.abs().sum())
    assert_close(adjoint.total_stderr, along_step.stderr, along_step.contributions.abs().sum())
    values = fx.token_values(case.params, e, case.apply, TEMPERATURE)
    weights = present(behaviour_weights(values, e, estimator))
    assert_close(present(adjoint.ess), weights.ess())
    assert 3 < weights.ess() < 12


@estimates
def test_cross_fitted_influences_leave_weights_out(estimator: Estimator, normalize: Normalize) -> None:
    """Rows of six folds: each influence is (grad H - the fold's part) / (1 - its share), and adds up by token."""
    case = make_case()
    chosen = options(case, estimator, normalize)
    out = fx.influence(case.params, case.batch, None, case.opt_state, **chosen)
    e = case.batch._replace(coefficients=None)
    plug_in = fx.influence(case.params, case.batch, e, case.opt_state, **chosen)
    deviations = present(plug_in.deviations).by_part
    prompt_of = present(case.batch.group)
    expected = plug_in.per_sequence - _over_share(deviations, case, prompt_of, estimator, normalize)
    assert_close(out.per_sequence, expected, plug_in.per_sequence.abs().sum())
    assert_close(present(out.per_token).sum(-1), out.per_sequence, out.per_sequence.abs().sum())
    padded = add_padding(case.batch, 2, 1)
    assert_close(
        fx.influence(case.params, padded, None, case.opt_state, **chosen).per_sequence,
        out.per_sequence,
        out.per_sequence.abs().sum(),
    )


def _over_share(
    deviations: Tensor, case: OffPolicy, prompt_of: Tensor, estimator: Estimator, normalize: Normalize
) -> Tensor:
    """Return the deviation of each row's own fold over 1 - the fold's share, the share from loops over the weights."""
    values = fx.token_values(case.params, case.batch, case.apply, TEMPERATURE)
    w = present(behaviour_weights(values, case.batch, estimator)).shares
    lengths = case.batch.completion_mask.sum(-1).tolist()
    longest, shares = max(lengths), [0.0] * len(lengths)
    if estimator == "sequence":
        f = [float(w[a]) * (lengths[a] if normalize == "token" else 1) for a in range(len(lengths))]
        shares = [x / sum(f) for x in f]
    else:
        active = [sum(float(w[a, t]) for a in range(len(lengths)) if t < lengths[a]) for t in range(longest)]
        for a in range(len(lengths)):
            if normalize == "token":
                shares[a] = sum(float(w[a, t]) for t in range(lengths[a])) / sum(active)
            else:
                shares[a] = sum(float(w[a, t]) * active[t] for t in range(longest)) / sum(active)
    of_fold = [sum(s for s, g in zip(shares, prompt_of.tolist(), strict=True) if g == k) for k in range(6)]
    return torch.stack([deviations[k, i] / (1 - of_fold[k]) for i, k in enumerate(prompt_of.tolist())])


@estimates
def test_deviations_are_derivatives_by_multiplicity(estimator: Estimator, normalize: Normalize) -> None:
    """On a batch that is the sampler's exact distribution error bars are the infinitesimal jackknife's, exactly.

    The estimate is the derivative along v of a function of theta and of each row's multiplicity, written anew.
    """
    generator = torch.Generator().manual_seed(5)
    apply, sampler = make_apply(dyadic_policy(generator))
    space = enumerate_completions([torch.tensor([1]), torch.tensor([2, 1])], EOS, 3, 3)
    params = shift(sampler, random_direction(generator, sampler, 0.4), 1.0)
    batch = replicate(apply, sampler, space, 256)
    behaviour = fx.token_values(sampler, batch, apply).logprobs
    batch = batch._replace(behaviour_logprobs=behaviour, group=torch.arange(256))
    v = random_direction(generator, params)
    objective = fx.Entropy(estimator, normalize)
    out = fx.jvp_delta(params, v, batch, apply=apply, objective=objective, second_order=False)
    truth = derivatives_along(exact_gradient(apply, params, space, normalize), [v])
    assert_close(out.first, truth[0], out.contributions.abs().sum())

    count, mask = torch.ones(256, dtype=torch.float64, requires_grad=True), batch.completion_mask[:, 1:]
    eta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    logits = apply({name: p + eta * v[name] for name, p in params.items()}, batch.input_ids, batch.attention_mask)
    log_pi = logits[:, :-1].log_softmax(-1)
    taken = log_pi.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    h = -(log_pi.exp() * log_pi).sum(-1) * mask
    ratios = (taken - behaviour[:, 1:]) * mask
    rank = mask.long().cumsum(-1) - 1
    numerator, length = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    if estimator == "sequence":
        w = count * ratios.sum(-1).exp()
        numerator, length = (w * h.sum(-1)).sum() / w.sum(), (w * mask.sum(-1)).sum() / w.sum()
    else:
        for t in range(int(mask.sum(-1).max())):
            w = count * (ratios * (rank < t)).sum(-1).exp()
            at_rank = mask & (rank == t)
            numerator = numerator + (w * (h * at_rank).sum(-1)).sum() / w.sum()
            length = length + (w * at_rank.any(-1)).sum() / w.sum()
    estimate = numerator / length if normalize == "token" else numerator
    slope = torch.autograd.grad(estimate, eta, create_graph=True)[0]
    by_row = torch.autograd.grad(slope, count)[0]
    assert_close(slope.detach(), out.first, out.contributions.abs().sum())
    assert_close(out.stderr, (256 / 255 * by_row.square().sum()).sqrt(), out.contributions.abs().sum())


def test_equal_policies_reduce_to_the_unweighted_result() -> None:
    case = make_case(distance=0.0)
    e = case.batch._replace(coefficients=None)
    for estimator in ("per_decision", "sequence"):
        for batch_e in (e, None):
            chosen = options(case, estimator, "token")
            weighted = fx.influence(case.params, case.batch, batch_e, case.opt_state, **chosen)
            u = case.batch._replace(behaviour_logprobs=None)
            plain_e = None if batch_e is None else e._replace(behaviour_logprobs=None)
            plain = fx.influence(case.params, u, plain_e, case.opt_state, **chosen)
            size = present(plain.per_token).abs().sum()
            assert_close(weighted.per_sequence, plain.per_sequence, size)
            assert_close(weighted.stderr, plain.stderr, size)
            assert_close(weighted.total_stderr, plain.total_stderr, size)
            assert_close(present(weighted.ess), torch.tensor(12.0, dtype=torch.float64))
            assert plain.ess is None


@estimates
def test_prompt_baseline_takes_weighted_siblings(estimator: Estimator, normalize: Normalize) -> None:
    """Rows of three prompts; the coefficients by the formula, row by row."""
    case = make_case()
    e = case.batch._replace(coefficients=None, group=torch.arange(12) % 3)
    chosen = {**options(case, estimator, normalize), "objective": fx.Entropy(estimator, normalize, "prompt")}
    out = fx.jvp_delta(case.params, case.direction, e, second_order=False, **chosen)
    plain = fx.jvp_delta(case.params, case.direction, e, second_order=False, **options(case, estimator, normalize))
    values = fx.token_values(case.params, e, case.apply, TEMPERATURE)
    derivative = (
        fx.token_values(shift(case.params, case.direction, 1e-5), e, case.apply, TEMPERATURE).logprobs
        - fx.token_values(shift(case.params, case.direction, -1e-5), e, case.apply, TEMPERATURE).logprobs
    ) / 2e-5
    w = present(behaviour_weights(values, e, estimator)).shares
    mask, lengths = e.completion_mask, e.completion_mask.sum(-1).tolist()
    ranks = range(max(lengths))
    h_hat = slow_entropy(case, 0.0, estimator, normalize)

    def centred(a: int, t: int | None) -> Tensor:
        """Return h - H ok of a row at a rank, or of the row."""
        h = values.entropies[a, mask[a]]
        if t is None:
            return h.sum() - h_hat * (lengths[a] if normalize == "token" else 1.0)
        h_t, ok = (h[t], 1.0) if t < lengths[a] else (torch.zeros(()).double(), 0.0)
        return h_t - h_hat * (ok if normalize == "token" else 0.0)

    d = (
        sum(float(w[a, t]) for a in range(12) for t in range(lengths[a]))
        if w.ndim == 2
        else float(w @ mask.sum(-1).double())
    )
    d = d if normalize == "token" else 1.0
    difference = torch.zeros(12, dtype=torch.float64)
    for a in range(12):
        score = derivative[a, mask[a]]
        siblings = [b for b in range(12) if b != a and b % 3 == a % 3]
        for t in [None] if estimator == "sequence" else ranks:
            weight = w[:, t] if t is not None else w
            over_all = sum(weight[b] * centred(b, t) for b in range(12))
            over_siblings = sum(weight[b] * centred(b, t) for b in siblings) / sum(weight[b] for b in siblings)
            difference[a] += weight[a] * (over_all - over_siblings) * score[:t].sum() / d
    assert_within(out.contributions - plain.contributions, difference, 1e-6)
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_sweep_matches_single_steps_off_policy(normalize: Normalize) -> None:
    case = make_case()
    e = select_rows(case.batch, torch.tensor([0, 1, 2, 3, 4, 5, 0, 1]))
    chosen = options(case, "per_decision", normalize)
    measure = fx.snis_sweep(case.params, e, **chosen)
    block = {name: torch.stack([v, -v]) for name, v in case.direction.items()}
    swept = measure(block, [0.3])
    for k, sign in enumerate((1.0, -1.0)):
        v = {name: sign * x for name, x in case.direction.items()}
        single = fx.snis_delta(case.params, v, 0.3, e, **chosen)
        assert_close(swept.delta_h[0, k], single.delta_h)
        assert_close(swept.stderr[0, k], single.stderr)
        assert_close(swept.contributions[0, k], single.contributions)
