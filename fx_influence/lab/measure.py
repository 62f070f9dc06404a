"""What is measured on one E: the first order of the step and of its rollouts, beside finite steps."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

import numpy as np

from fx_influence.delta import JvpDelta, jvp_delta
from fx_influence.entropy import entropy_estimate, sequence_shares
from fx_influence.errorbars import cluster_index, cluster_stderr
from fx_influence.influence import Influence, influence
from fx_influence.lab.batches import Progress, Sampled, State
from fx_influence.lab.plan import EntropyInfluencePlan
from fx_influence.lab.step import Step
from fx_influence.lab.sweep import Arrays, sweep
from fx_influence.types import Batch


class Evaluation(NamedTuple):
    """One E: first order, the arrays of ``eval_00.npz``, and its entry in ``summary.json``."""

    first_order: Influence
    arrays: Arrays
    summary: dict[str, Any]


def evaluate(
    plan: EntropyInfluencePlan,
    state: State,
    step: Step,
    e: Sampled,
    etas: list[float],
    kept: MutableMapping[int, Arrays],
    progress: Progress,
) -> Evaluation:
    """Influences of U on the entropy over ``e``: to first order, and by importance sampling at each of ``etas``.

    ``kept``: the blocks of the sweep that are done, see ``sweep``.
    """
    progress("influence", 0, 1)
    out = influence(
        state.params,
        step.batch,
        e.batch,
        state.opt_state,
        apply=state.apply,
        gain=plan.gain,
        max_grad_norm=plan.max_grad_norm,
        grad=step.gradient,
        matrix=True,
        **plan.estimation(),
    )
    progress("influence", 1, 1)
    slopes = {
        name: jvp_delta(state.params, direction, e.batch, apply=state.apply, **plan.estimation())
        for name, direction in (("full", step.parts.direction), ("baseline", step.parts.baseline))
    }
    deltas = sweep(plan, state, step, e.batch, etas, kept, progress)
    arrays = {
        "per_sequence": out.per_sequence.cpu().numpy(),
        "per_token": out.per_token.cpu().numpy(),
        "stderr": out.stderr.cpu().numpy(),
        "eta": np.array(etas),
        "ess": deltas["full_ess"],
        **deltas,
    }
    summary = {
        **_first_order(plan, out, slopes, e.batch),
        "entropy": entropy_estimate(e.values, e.batch, plan.normalize).item(),
        "rollouts": len(e.rollouts),
        "mean_reward": float(np.mean([r.reward or 0.0 for r in e.rollouts])),
        "off_policy": e.off_policy,
        "finite_steps": [_finite(arrays, slopes, i, eta) for i, eta in enumerate(etas)],
    }
    return Evaluation(out, arrays, summary)


def _first_order(
    plan: EntropyInfluencePlan, out: Influence, slopes: dict[str, JvpDelta], batch: Batch
) -> dict[str, Any]:
    assert out.matrix is not None
    shares = sequence_shares(batch.completion_mask, plan.normalize)
    parts = {name: slope.contributions for name, slope in slopes.items()} | {"rollouts": out.matrix.double().sum(1)}
    errors = {
        name: cluster_stderr(part, part.sum(), shares / shares.sum(), cluster_index(batch)).item()
        for name, part in parts.items()
    }
    size = max(out.per_sequence.abs().sum().item(), (out.per_sequence.sum() + out.residual).abs().item())
    return {
        "total": out.total.item(),
        "total_stderr": errors["full"],
        "baseline": out.baseline.item(),
        "baseline_stderr": errors["baseline"],
        "momentum": out.momentum.item(),
        "weight_decay": out.weight_decay.item(),
        "sum_per_sequence": out.per_sequence.sum().item(),
        "sum_per_sequence_stderr": errors["rollouts"],
        "residual": out.residual.item(),
        "relative_residual": abs(out.residual.item()) / size if size else 0.0,
        "total_by_jvp": slopes["full"].first.item(),
        "second_order": slopes["full"].second.item(),
        "eta_trust": 0.2 * abs((slopes["full"].first / slopes["full"].second).item()),
        "rollouts_beyond_two_stderr": int((out.per_sequence.abs() > 2 * out.stderr).sum()),
        "per_parameter": {name: value.item() for name, value in out.per_parameter.items()},
    }


def _finite(arrays: Arrays, slopes: dict[str, JvpDelta], i: int, eta: float) -> dict[str, float]:
    """One eta: SNIS of the whole step and of the baseline beside eta times the JVP, in raw nats."""
    return {
        "eta": eta,
        "full": arrays["full"][i].item(),
        "full_jvp": eta * slopes["full"].first.item(),
        "full_jvp_second_order": eta * slopes["full"].first.item() + 0.5 * eta**2 * slopes["full"].second.item(),
        "baseline": arrays["baseline"][i].item(),
        "baseline_jvp": eta * slopes["baseline"].first.item(),
        "ess": arrays["ess"][i].item(),
    }
