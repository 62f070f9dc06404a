"""The public functions reproduce what the repaired first implementation recorded in float64 on the golden case.

In float32, finite differences of the recorded steps drown in rounding, so importance sampling is compared in float64
only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers.golden import Golden, flatten, load_golden
from helpers.present import present
from helpers.tolerances import assert_close_to_rounding, policy_terms
from torch import Tensor

import fx_influence as fx
from fx_influence.types import Estimator, Normalize, Params

EXACT, ROUNDING = torch.float64, torch.float32
ETAS = (1e-6, 1e-5, 1e-4)
normalizes = pytest.mark.parametrize("normalize", ["token", "sequence"])


class Run(NamedTuple):
    """The golden case in one dtype, with its gradients and step computed by the library."""

    golden: Golden
    apply: fx.Policy
    params: Params
    grads: Params
    step: fx.AdamWDecomposition
    dtype: torch.dtype

    def expect(self, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.golden.expected[name], dtype=np.float64))

    def vector(self, tree: Params) -> Tensor:
        return flatten(tree, self.golden)

    def row(self, i: int) -> Params:
        """Return v_i, the part of update row i in the step."""
        return {name: gain * self.grads[name][i] for name, gain in self.step.gain.items()}

    def direction(self, k: int) -> Params:
        """Return the k-th recorded direction: the step, its baseline, each v_i, or the baseline plus each v_i."""
        assert list(self.golden.expected["dir_names"][[0, 1, 2, 33, 34, 65]]) == [
            "full",
            "base",
            "v0",
            "v31",
            "base+v0",
            "base+v31",
        ]
        if k < 2:
            return (self.step.direction, self.step.baseline)[k]
        part = self.row((k - 2) % 32)
        return part if k < 34 else {name: self.step.baseline[name] + v for name, v in part.items()}


def load(dtype: torch.dtype) -> Run:
    golden = load_golden(dtype)
    apply, params = fx.make_functional(golden.model)
    grads = fx.per_sample_grads(fx.rollout_loss(apply), params, golden.batch_u)
    summed = {name: g.sum(0) for name, g in grads.items()}
    return Run(golden, apply, params, grads, fx.adamw_decompose(summed, golden.opt_state, params), dtype)


@pytest.fixture(scope="module", params=[EXACT, ROUNDING], ids=["float64", "float32"])
def run(request: pytest.FixtureRequest) -> Run:
    return load(request.param)


@pytest.fixture(scope="module")
def exact() -> Run:
    return load(EXACT)


def assert_golden(run: Run, name: str, actual: Tensor, expected: Tensor, scale: Any = None) -> None:
    """Assert equality up to the rounding of the model's passes; ``scale``: size of the addends, expected by default."""
    terms = policy_terms(run.params, run.golden.batch_e.input_ids.shape[1])
    assert_close_to_rounding(actual, expected, terms=terms, scale=scale, dtype=run.dtype, name=name)


def test_token_values_and_entropy_match_golden(run: Run) -> None:
    batch = run.golden.batch_e
    values = fx.token_values(run.params, batch, run.apply)
    mask = batch.completion_mask
    assert_golden(run, "E_tok_logp", values.logprobs[mask], run.expect("E_tok_logp"))
    assert_golden(run, "E_tok_entropy", values.entropies[mask], run.expect("E_tok_entropy"))
    assert_golden(run, "E_seq_logprob", values.logprobs.sum(-1), run.expect("E_seq_logprob"))
    assert_golden(run, "H per token", fx.entropy_estimate(values, batch), run.expect("H_base_per_token"))
    per_sequence = fx.entropy_estimate(values, batch, "sequence")
    assert_golden(run, "H per sequence", per_sequence, run.expect("H_base_per_sequence"))


def test_per_sample_grads_match_golden(run: Run) -> None:
    assert_golden(
        run, "agg_grad", run.vector({name: g.sum(0) for name, g in run.grads.items()}), run.expect("agg_grad")
    )
    norms = torch.cat([g.flatten(1) for g in run.grads.values()], dim=1).norm(dim=1)
    assert_golden(run, "seq_grad_norm", norms, run.expect("seq_grad_norm"))


def test_adamw_decompose_matches_golden(run: Run) -> None:
    assert_golden(run, "v_full", run.vector(run.step.direction), run.expect("v_full"))
    assert_golden(run, "v_base", run.vector(run.step.baseline), run.expect("v_base"))
    for i, expected in enumerate(run.expect("v_seq_first4")):
        assert_golden(run, f"v_{i}", run.vector(run.row(i)), expected)


def test_adamw_decompose_matches_golden_when_clipped(run: Run) -> None:
    summed = {name: g.sum(0) for name, g in run.grads.items()}
    norm, scale = run.expect("preclip_grad_norm"), run.expect("clip1_scale")
    # The recorded divisor has 1e-12 where torch has 1e-6.
    assert_golden(run, "recorded scale", scale, 1 / (norm + 1e-12))
    plain, same = (
        fx.adamw_decompose(summed, run.golden.opt_state, run.params, max_grad_norm=limit)
        for limit in (1.0, float(scale * (norm + 1e-6)))
    )
    # torch's own clip_grad_norm_ divides by norm + 1e-6: a factor 1 - 2.9e-7 here, and no more.
    assert_golden(run, "torch's scale", plain.clip, 1 / (norm + 1e-6))
    assert_golden(run, "clip1_scale", same.clip, scale)
    assert_golden(run, "clip1_v_full", run.vector(same.direction), run.expect("clip1_v_full"))
    assert_golden(run, "clip1_v_base", run.vector(same.baseline), run.expect("clip1_v_base"))
    parts = {name: same.baseline[name] + gain * summed[name] for name, gain in same.gain.items()}
    assert_golden(run, "clip1_v_full by parts", run.vector(parts), run.expect("clip1_v_full"))


@normalizes
def test_influence_matrix_matches_golden(run: Run, normalize: Normalize) -> None:
    rows = run.expect(f"first_order_centred_per_{normalize}")
    g = run.golden
    options: dict[str, Any] = {"apply": run.apply, "objective": fx.Entropy("sequence", normalize)}
    out = fx.influence(run.params, g.batch_u, g.batch_e, g.opt_state, matrix=True, **options)
    columns = rows.sum(1)
    assert_golden(run, f"matrix per {normalize}", present(out.matrix).T, rows[2:])
    assert_golden(run, f"matrix columns per {normalize}", present(out.matrix).double().sum(0), columns[2:])
    assert_golden(run, f"per_sequence per {normalize}", out.per_sequence, columns[2:])
    assert_golden(run, f"total per {normalize}", out.total, columns[0])
    assert_golden(run, f"baseline per {normalize}", out.baseline, columns[1])


@normalizes
def test_jvp_delta_matches_golden(run: Run, normalize: Normalize) -> None:
    rows = run.expect(f"first_order_centred_per_{normalize}")
    options: dict[str, Any] = {"apply": run.apply, "objective": fx.Entropy("sequence", normalize)}
    for k, name in enumerate(("full", "base")):
        out = fx.jvp_delta(run.params, run.direction(k), run.golden.batch_e, **options)
        assert_golden(run, f"jvp {name} per {normalize}", out.contributions, rows[k])
        assert_golden(run, f"jvp {name} per {normalize}, summed", out.first, rows[k].sum())


@pytest.mark.parametrize("directions", [range(0, 66, 13), pytest.param(range(66), marks=pytest.mark.slow)], ids=len)
def test_snis_delta_matches_golden(exact: Run, directions: range) -> None:
    for normalize in ("token", "sequence"):
        options: dict[str, Any] = {"apply": exact.apply, "objective": fx.Entropy("sequence", normalize)}
        for row, eta in enumerate(ETAS):
            batch = exact.golden.batch_e
            outs = [fx.snis_delta(exact.params, exact.direction(k), eta, batch, **options) for k in directions]
            chosen = list(directions)
            expected = exact.expect(f"delta_h_per_{normalize}")[row, chosen]
            # A difference of two numbers near 3: its last digits are rounding, the more so the smaller eta is.
            size = exact.expect(f"H_base_per_{normalize}")
            assert_golden(
                exact, f"delta_h per {normalize}, {eta}", torch.stack([o.delta_h for o in outs]), expected, size
            )
            assert expected.abs().min() > 0
            assert_golden(exact, f"ess, {eta}", torch.stack([o.ess for o in outs]), exact.expect("ess")[row, chosen])
            assert not any(o.clip_fraction for o in outs)
            assert not exact.expect("clip_fraction").any()


@normalizes
def test_snis_contributions_match_centred_golden(exact: Run, normalize: Normalize) -> None:
    """The recorded u_a = w_a h_a' / sum w f - h_a / sum f are uncentred; ours subtract H f_a from both h_a' and h_a.

    So contribution_a = u_a + h_a / sum f - (w_a H f_a + h_a - H f_a) / sum w f.
    """
    eta, directions = 1e-4, range(0, 34, 3)
    chosen = list(directions)
    u, w = exact.expect(f"contrib_per_{normalize}_eta1e-4")[chosen], exact.expect("lw_eta1e-4")[chosen].exp()
    h, lengths = exact.expect("h_base"), exact.expect("T_tokens")
    f = lengths if normalize == "token" else torch.ones_like(lengths)
    mean = h.sum() / f.sum()
    expected = u + h / f.sum() - (w * mean * f + h - mean * f) / (w * f).sum(1, keepdim=True)
    options: dict[str, Any] = {"apply": exact.apply, "objective": fx.Entropy("sequence", normalize)}
    batch = exact.golden.batch_e
    outs = [fx.snis_delta(exact.params, exact.direction(k), eta, batch, **options) for k in directions]
    contributions = torch.stack([o.contributions for o in outs])
    assert_golden(exact, f"contributions per {normalize}", contributions, expected, mean.abs() + h.abs().max())
    log_weights = torch.stack([o.log_weights for o in outs])
    size = exact.expect("E_seq_logprob")
    assert_golden(exact, "log-weights", log_weights, exact.expect("lw_eta1e-4")[chosen], size)
    assert_golden(
        exact, "sums", contributions.sum(1), torch.stack([o.delta_h for o in outs]), contributions.abs().sum(1)
    )
    if normalize == "token":
        ratio = u.norm(dim=1) / contributions.norm(dim=1)
        print(f"norm of the uncentred rows over the centred: {ratio.min():.3g} to {ratio.max():.3g}")
        assert ratio.min() > 50


def test_fisher_kernel_matches_golden(run: Run) -> None:
    """The recording preconditions both sides by 1/(sqrt(s) + eps), so P is that diagonal squared."""
    g = run.golden
    diagonals = {
        name: 1 / (s.sqrt() + g.opt_state.hyper[name].eps).square() for name, s in g.opt_state.exp_avg_sq.items()
    }
    kernel = fx.fisher_kernel(run.params, g.batch_e, g.batch_u, None, apply=run.apply, preconditioner=diagonals)
    assert_golden(run, "fisher_K", kernel, run.expect("fisher_K"))


@pytest.mark.parametrize("estimator", ["per_decision", "sequence"])
def test_influence_residual_is_rounding_on_golden(run: Run, estimator: Estimator) -> None:
    g = run.golden
    out = fx.influence(
        run.params, g.batch_u, g.batch_e, g.opt_state, apply=run.apply, objective=fx.Entropy(estimator), stderr=False
    )
    size = max(float(out.per_sequence.abs().sum()), abs(float(out.residual + out.per_sequence.sum())))
    assert_golden(run, f"residual {estimator}", out.residual, torch.zeros_like(out.residual), size)
