"""The share of the score term: what it leaves out, how it is estimated, and that a biased result says so."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers.cases import assert_close, dyadic_policy, make_apply, random_direction
from helpers.enumeration import Space, enumerate_completions, exact_log_probs, replicate, token_values
from helpers.present import present
from helpers.strategies import NORMALIZES
from helpers.world import EOS, Update, World
from torch import Tensor

import fx_influence as fx
from fx_influence.estimators.deviations import NOTHING_LEFT_OUT, Deviations
from fx_influence.estimators.score_term import optimal_share
from fx_influence.estimators.stderr import cluster_index, cluster_stderr
from fx_influence.types import Normalize

biased = pytest.mark.filterwarnings("ignore:objective.score is")


def direct_derivative(apply: Any, params: Any, space: Space, v: Any, normalize: Normalize) -> Tensor:
    """Return the derivative along v of the entropies of tokens, the probabilities of texts fixed."""
    eta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    p = exact_log_probs(apply, params, space).exp()
    h = token_values(apply, {name: x + eta * v[name] for name, x in params.items()}, space)[1].sum(-1)
    length = space.batch.completion_mask.sum(-1) if normalize == "token" else torch.ones(len(p))
    return torch.autograd.grad((p * h).sum() / (p * length).sum(), eta)[0]


@biased
@pytest.mark.parametrize("normalize", NORMALIZES)
def test_no_score_term_leaves_direct_derivative(normalize: Normalize) -> None:
    """E holds each completion in proportion to its probability, so there is no sampling error."""
    generator = torch.Generator().manual_seed(5)
    apply, params = make_apply(dyadic_policy(generator))
    space = enumerate_completions([torch.tensor([1]), torch.tensor([2, 1])], EOS, 3, 3)
    batch, v = replicate(apply, params, space, 256), random_direction(generator, params)
    without, half, full = (
        fx.jvp_delta(params, v, batch, apply=apply, objective=fx.Entropy(normalize=normalize, score=score)).first
        for score in (0.0, 0.5, 1.0)
    )
    expected = direct_derivative(apply, params, space, v, normalize)
    assert (full - expected).abs() > 1e-5
    assert_close(without, expected)
    assert_close(half, (without + full) / 2)


@biased
def test_influence_is_linear_in_share(world: World, update: Update) -> None:
    """Error bars are of the biased derivative: its deviations are as linear as its influences."""
    rows = world.draw_prompts(12, 3, torch.Generator().manual_seed(1))
    batch = world.batch(rows)._replace(group=torch.arange(36) // 3)
    without, part, full = (attribute(world, update, batch, score) for score in (0.0, 0.3, 1.0))
    size = full.per_sequence.abs().sum() + without.per_sequence.abs().sum()
    assert_close(part.per_sequence, 0.7 * without.per_sequence + 0.3 * full.per_sequence, size)
    deviations = [present(out.deviations).by_part for out in (without, part, full)]
    assert_close(deviations[1], 0.7 * deviations[0] + 0.3 * deviations[2], size)
    assert part.score_share.item() == 0.3
    assert "score_share=0.3 (biased)" in repr(part)
    assert "score_share" not in repr(full)


@biased
def test_error_bars_without_score_term_hold_no_length(world: World, update: Update) -> None:
    """The derivative of the expected length is part of the score term, and so of its error."""
    rows = world.draw_prompts(12, 3, torch.Generator().manual_seed(1))
    batch = world.batch(rows)._replace(group=torch.arange(36) // 3)
    lengths = batch.completion_mask.sum(-1).double()
    of_rows = (lengths / lengths.sum(), cluster_index(batch))
    out = attribute(world, update, batch, 0.0, matrix=True)
    pairwise = present(out.matrix)
    assert_close(out.stderr, cluster_stderr(pairwise, out.per_sequence, *of_rows), pairwise.abs().sum())
    options: dict[str, Any] = {"apply": world.apply, "temperature": world.space.temperature, "second_order": False}
    single = fx.jvp_delta(world.params, update.parts[0], batch, objective=fx.Entropy(score=0.0), **options)
    size = single.contributions.abs().sum()
    assert_close(single.stderr, cluster_stderr(single.contributions, single.first, *of_rows), size)


@biased
def test_auto_takes_share_of_smallest_estimated_error(world: World, update: Update) -> None:
    rows = world.draw_prompts(12, 3, torch.Generator().manual_seed(1))
    batch = world.batch(rows)._replace(group=torch.arange(36) // 3)
    without, full = (attribute(world, update, batch, score) for score in (0.0, 1.0))
    share = optimal_share(
        without.per_sequence, full.per_sequence, present(without.deviations), present(full.deviations)
    )
    out = attribute(world, update, batch, "auto")
    assert 0 < share < 1
    assert out.score_share.item() == pytest.approx(share, rel=1e-6)
    given = attribute(world, update, batch, out.score_share.item())
    assert torch.equal(out.per_sequence, given.per_sequence)
    assert out.per_token is not None


def test_optimal_share_minimises_squared_error() -> None:
    """Over many parts the share is that of the known distribution: E[s] = 2, Var = (1, 2), correlation 0.5."""
    generator = torch.Generator().manual_seed(7)
    sqrt2 = 2**0.5
    covariance = torch.tensor([[1.0, 0.5 * sqrt2], [0.5 * sqrt2, 2.0]], dtype=torch.float64)
    expected = (4 - 0.5 * sqrt2) / (4 + 2)
    parts, n = 400, 2000
    noise = torch.randn(parts, n, 2, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
    noise = noise / parts**0.5
    direct, score = noise[..., 0].sum(0), 2 + noise[..., 1].sum(0)
    centred = noise - noise.mean(0)
    none_left_out = torch.full((n,), NOTHING_LEFT_OUT)
    of_direct, of_full = Deviations(centred[..., 0], none_left_out), Deviations(centred.sum(-1), none_left_out)
    share = optimal_share(direct, direct + score, of_direct, of_full)
    # The mean of 2,000 squares of size 6 with standard deviation of about 6 has a standard error of 0.13 in 6.
    assert share == pytest.approx(expected, abs=4 * 0.13 / 6)
    assert optimal_share(direct, direct, of_direct, of_direct) == 1


@pytest.mark.parametrize("score", [0.0, 0.5])
def test_biased_derivative_warns(world: World, score: float) -> None:
    direction = {name: torch.ones_like(p) for name, p in world.params.items()}
    batch = world.batch(torch.arange(6))
    with pytest.warns(UserWarning, match=f"objective.score is {score:.3g}: the derivative has a bias"):
        fx.jvp_delta(world.params, direction, batch, apply=world.apply, objective=fx.Entropy(score=score))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fx.jvp_delta(world.params, direction, batch, apply=world.apply, objective=fx.Entropy())


def test_share_is_refused_where_it_cannot_be_taken(world: World, update: Update) -> None:
    batch, direction = world.batch(torch.arange(6)), {name: torch.ones_like(p) for name, p in world.params.items()}

    def differentiate(call: Any, score: Any, *args: Any) -> None:
        call(world.params, direction, *args, batch, apply=world.apply, objective=fx.Entropy(score=score))

    with pytest.raises(TypeError, match=r"objective\.score is of type str; expected a number"):
        differentiate(fx.jvp_delta, "auto")
    with pytest.raises(ValueError, match=r"objective\.score is 1\.5; expected a share from 0 to 1"):
        differentiate(fx.jvp_delta, 1.5)
    with pytest.raises(ValueError, match=r"objective\.score is 0\.5; expected 1, since a finite step"):
        differentiate(fx.snis_delta, 0.5, 1e-3)
    with pytest.raises(ValueError, match=r"objective\.score is 'auto' without error bars"):
        attribute(world, update, batch, "auto", stderr=False)


def attribute(world: World, update: Update, batch: fx.Batch, score: Any, **options: Any) -> fx.Influence:
    return fx.influence(
        world.params,
        update.batch,
        batch,
        update.state,
        apply=world.apply,
        temperature=world.space.temperature,
        objective=fx.Entropy(score=score),
        **options,
    )
