"""Conditioning: the share of the influences that rests on denominators made by this very gradient."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from helpers.cases import TinyPolicy, make_apply, random_adamw_state, random_batch, random_direction
from helpers.present import present
from helpers.run_results import find_finding
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding
from torch import Tensor

import fx_influence as fx
from fx_influence.attribution.display import ILL_CONDITIONED
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.estimators.entropy import entropy_coefficients
from fx_influence.optim.step import AdamWStep
from fx_influence.types import AdamWHyper, AdamWState, Apply, Batch, Params

HYPER = AdamWHyper(beta2=0.99)


class Case:
    """A float64 policy with an update batch, an evaluation batch and optimizer states."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.apply, self.params = make_apply(TinyPolicy(6, 6, 1, 2, 8))
        self.batch_u = random_batch(generator, 4, 8, 6, entropy_coefficients=True)
        self.batch_e = random_batch(generator, 5, 8, 6, coefficients=False, groups=3)
        self.warm = random_adamw_state(generator, self.params)
        zero = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.fresh = AdamWState(zero, zero, {}, dict.fromkeys(zero, 0), dict.fromkeys(zero, HYPER), 1e-3)

    def influence(self, state: AdamWState, apply: Apply | None = None, **options: Any) -> fx.Influence:
        return fx.influence(self.params, self.batch_u, self.batch_e, state, apply=apply or self.apply, **options)

    def literal(self, state: AdamWState, rows: slice = slice(None), **options: Any) -> Tensor:
        """Return conditioning of rows by its formula, from their gradients and their influences by coordinate."""
        grads = fx.per_sample_grads(fx.rollout_loss(self.apply), self.params, self.batch_u)
        total_grads = {name: g.sum(0) for name, g in grads.items()}
        norm = math.sqrt(sum(g.square().sum() for g in total_grads.values()))
        clip = min(1.0, options.get("max_grad_norm", math.inf) / (norm + 1e-6))
        gain = fx.adamw_decompose(
            total_grads, state, self.params, options.get("preconditioner", "frozen"), options.get("max_grad_norm")
        ).gain
        entropy_grad = entropy_gradient(self.apply, self.params, self.batch_e)
        fresh_part, rest = (torch.zeros(len(self.batch_u.input_ids), dtype=torch.float64) for _ in range(2))
        for name, g in grads.items():
            hyper, tau = state.hyper[name], state.step[name] + 1
            s = hyper.beta2 * state.exp_avg_sq[name] + (1 - hyper.beta2) * (clip * total_grads[name]) ** 2
            top = torch.maximum(s, state.max_exp_avg_sq[name]) if hyper.amsgrad else s
            is_fresh = (1 - hyper.beta2) * (clip * total_grads[name]) ** 2 > top / 2
            is_fresh |= (top / (1 - hyper.beta2**tau)).sqrt() <= 10 * hyper.eps
            contributions = (gain[name] * entropy_grad[name] * g).flatten(1)
            fresh_part += (contributions * is_fresh.flatten()).sum(1)
            rest += (contributions * ~is_fresh.flatten()).sum(1)
        size, other = fresh_part[rows].abs().sum(), rest[rows].abs().sum()
        return size / (size + other)


def entropy_gradient(apply: Apply, params: Params, batch_e: Batch) -> Params:
    """Return grad H by name."""
    weights = entropy_coefficients(fx.token_values(params, batch_e, apply), batch_e)
    surrogate = batch_e._replace(coefficients=weights.logprobs, entropy_coefficients=weights.entropies)
    return {
        name: torch.zeros_like(params[name]) if g is None else -g
        for name, g in batch_gradient(params, surrogate, apply).items()
    }


def half_fresh(case: Case) -> AdamWState:
    """Return the warm state with every other parameter reset to before its first step."""
    state = case.warm
    zero = {name: torch.zeros_like(x) for k, (name, x) in enumerate(state.exp_avg.items()) if k % 2}
    return state._replace(
        exp_avg={**state.exp_avg, **zero},
        exp_avg_sq={**state.exp_avg_sq, **zero},
        step={**state.step, **dict.fromkeys(zero, 0)},
    )


def test_conditioning_is_one_when_the_optimizer_is_fresh() -> None:
    case = Case()
    assert_close_to_rounding(case.influence(case.fresh).conditioning, 1.0, terms=TINY_POLICY)


def test_conditioning_is_zero_when_nothing_moves() -> None:
    case = Case()
    case.batch_u = case.batch_u._replace(completion_mask=torch.zeros_like(case.batch_u.completion_mask))
    assert case.influence(case.fresh).conditioning == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"matrix": True},
        {"per_token": False},
        {"memory_budget": 0},
        {"preconditioner": "rmsprop"},
        {"max_grad_norm": 0.05},
    ],
    ids=str,
)
def test_conditioning_matches_formula(options: dict[str, Any]) -> None:
    case = Case()
    state = half_fresh(case)
    expected = case.literal(state, **{k: v for k, v in options.items() if k in ("preconditioner", "max_grad_norm")})
    assert 0.05 < expected < 0.9999
    # A rollout's contributions cancel among coordinates, by less than a factor of a thousand.
    assert_close_to_rounding(case.influence(state, **options).conditioning, expected, terms=TINY_POLICY, scale=1e3)


@pytest.mark.parametrize(("options", "rows"), [({}, slice(None)), ({"stderr": False}, slice(None, None, 2))], ids=str)
def test_conditioning_is_of_every_rollout_unless_it_takes_a_pass(options: dict[str, Any], rows: slice) -> None:
    """Without error bars the passes over 17 rollouts of which 16 have a loss are of every second of these."""
    case, generator = Case(), torch.Generator().manual_seed(3)
    case.batch_u = random_batch(generator, 17, 8, 6, entropy_coefficients=True)
    mask = case.batch_u.completion_mask.clone()
    mask[16] = False
    case.batch_u = case.batch_u._replace(completion_mask=mask)
    state = half_fresh(case)
    expected, others = case.literal(state, rows), case.literal(state, slice(1, None, 2))
    assert (expected - others).abs() > 1e-3
    assert_close_to_rounding(case.influence(state, **options).conditioning, expected, terms=TINY_POLICY, scale=1e3)


@pytest.mark.parametrize("changes", [{"amsgrad": True}, {"maximize": True}, {"eps": 1e-2}], ids=str)
def test_conditioning_follows_the_hyperparameters(changes: dict[str, Any]) -> None:
    """eps = 1e-2 alone makes denominators of a warm state ill-determined: they are within 10 eps of their floor."""
    case = Case()
    state = half_fresh(case)
    hyper = {name: dataclasses.replace(h, **changes) for name, h in state.hyper.items()}
    maximum = {name: 2 * s for name, s in state.exp_avg_sq.items()} if "amsgrad" in changes else {}
    state = state._replace(hyper=hyper, max_exp_avg_sq=maximum)
    out = case.influence(state).conditioning
    assert_close_to_rounding(out, case.literal(state), terms=TINY_POLICY, scale=1e3)


def test_conditioning_falls_when_the_optimizer_warms_up() -> None:
    """Conditioning in training is high at the first step and low once the second moment averages many steps."""
    case, generator = Case(), torch.Generator().manual_seed(2)
    model = TinyPolicy(6, 6, 1, 2, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
    shares = []
    for step in range(31):
        if step in (0, 30):
            shares.append(case.influence(fx.adamw_state(optimizer, model)).conditioning.item())
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
    assert shares[0] > 0.999
    assert shares[1] < ILL_CONDITIONED


def test_conditioning_is_one_when_gradients_cancel() -> None:
    """Two rollouts are each other's opposite: g is 0, den is eps, and each influence is huge, but their sum is 0."""
    case = Case()
    rows = torch.tensor([0, 0])
    signs = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    twice = Batch._make(None if x is None else x[rows] for x in case.batch_u)
    case.batch_u = twice._replace(coefficients=present(twice.coefficients) * signs, entropy_coefficients=None)
    out = case.influence(case.fresh, tolerance=1.0)
    assert out.per_sequence.abs().max() > 1e6 * out.per_sequence.sum().abs()
    assert out.conditioning > 0.999


def test_keep_fresh_drops_what_the_optimizer_does_not_hold() -> None:
    case = Case()
    u = random_direction(torch.Generator().manual_seed(0), case.params)
    by_name: dict[str, dict[str, Any]] = {
        name: getattr(case.fresh, name) for name in ("exp_avg", "exp_avg_sq", "step", "hyper")
    }
    trees: dict[str, Any] = {k: {n: x for n, x in v.items() if n != "head.bias"} for k, v in by_name.items()}
    state = case.fresh._replace(**trees)
    grads = {name: torch.ones_like(p) for name, p in case.params.items()} | {"head.weight": None}
    part = {name: x.clone() for name, x in u.items()}
    AdamWStep.of(grads, state, case.params, "frozen", None).keep_fresh_(part)
    assert not part["head.bias"].any()
    assert not part["head.weight"].any()
    assert torch.equal(part["norm.bias"], u["norm.bias"])


@pytest.mark.parametrize(("share", "warns"), [(0.9, True), (0.5, False), (math.nan, False)])
def test_influence_repr_warns_when_ill_conditioned(share: float, warns: bool) -> None:
    out = Case().influence(Case().warm)._replace(conditioning=torch.tensor(share))
    assert ("conditioning=0.90" in repr(out)) == warns
    assert ("read no single rollout" in out._repr_html_()) == warns


def test_health_gives_remedy_when_ill_conditioned() -> None:
    figures = {"conditioning": 0.93}
    finding = find_finding("Conditioning", figures)
    assert finding is not None
    assert finding.level == "attention"
    assert finding.text.startswith("93% of the sum of |influence| rests on denominators that AdamW has from this very")
    assert "Read the total and sums over many rollouts" in finding.text
    assert "measure a later step" in finding.text
    fine = find_finding("Conditioning", {"conditioning": 0.04})
    assert fine is not None
    assert fine.level == "good"
    assert find_finding("Conditioning") is None
