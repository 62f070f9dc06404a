"""What is measured of one step: the parts of U, their first order on an E, and the check at finite steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fx_influence.adamw import AdamWDecomposition, adamw_decompose
from fx_influence.delta import JvpDelta, jvp_delta, snis_sweep
from fx_influence.entropy import entropy_estimate, sequence_shares
from fx_influence.errorbars import cluster_index, cluster_stderr
from fx_influence.grads import per_sample_grads, rollout_loss
from fx_influence.importance import SnisDelta
from fx_influence.influence import Influence, influence
from fx_influence.lab.batches import Progress, Sampled, State
from fx_influence.lab.plan import EntropyInfluencePlan
from fx_influence.logprobs import batch_gradient, distinct_rows, row_chunks
from fx_influence.types import Batch, Gradients, Params

SEQUENCES_PER_BLOCK = 8
WHOLE = ("full", "baseline", "momentum", "weight_decay", "rmsprop")
"""Directions of the whole step that are measured at finite steps; ``rmsprop`` has neither momentum nor decay."""
SEQUENCES = ("grad", "baseline_plus_grad")
"""Directions measured for every rollout of U: v_i, and v_baseline + v_i."""
STATISTICS = ("contributions", "ess", "log_weights", "clip_fraction")


class Step(NamedTuple):
    """U's step: its batch with coefficients, its gradient and what AdamW makes of it, and |g_i| (n_u,)."""

    batch: Batch
    gradient: Gradients
    parts: AdamWDecomposition
    gradient_norms: Tensor


class Evaluation(NamedTuple):
    """One E: first order, the arrays of ``eval_00.npz``, and its entry in ``summary.json``."""

    first_order: Influence
    arrays: dict[str, np.ndarray]
    summary: dict[str, Any]


def measure_step(plan: EntropyInfluencePlan, state: State, batch: Batch) -> Step:
    """The step that ``batch`` makes from the training state."""
    gradient = batch_gradient(state.params, batch, state.apply, plan.temperature)
    parts = adamw_decompose(gradient, state.opt_state, state.params, plan.gain, plan.max_grad_norm)
    loss = rollout_loss(state.apply, plan.temperature)
    norms = [
        torch.stack([g.flatten(1).norm(dim=1) for g in per_sample_grads(loss, state.params, rows).values()]).norm(dim=0)
        for rows in row_chunks(batch, SEQUENCES_PER_BLOCK)
    ]
    return Step(batch, gradient, parts, torch.cat(norms))


def evaluate(
    plan: EntropyInfluencePlan, state: State, step: Step, e: Sampled, etas: list[float], progress: Progress
) -> Evaluation:
    """Influences of U on the entropy over ``e``: to first order, and by importance sampling at each of ``etas``."""
    progress("influence", 0, 1)
    out = influence(
        state.params,
        step.batch,
        e.batch,
        state.opt_state,
        apply=state.apply,
        estimator=plan.estimator,
        normalize=plan.normalize,
        gain=plan.gain,
        temperature=plan.temperature,
        max_grad_norm=plan.max_grad_norm,
        grad=step.gradient,
        matrix=True,
    )
    progress("influence", 1, 1)
    options: dict[str, Any] = {
        "estimator": plan.estimator,
        "normalize": plan.normalize,
        "temperature": plan.temperature,
    }
    slopes = {
        name: jvp_delta(state.params, direction, e.batch, apply=state.apply, **options)
        for name, direction in (("full", step.parts.direction), ("baseline", step.parts.baseline))
    }
    whole, sequences = _sweep(plan, state, step, e.batch, etas, progress, options)
    arrays = {
        "per_sequence": out.per_sequence,
        "per_token": out.per_token,
        "stderr": out.stderr,
        "eta": torch.tensor(etas, dtype=torch.float64),
        "ess": whole.ess[:, 0],
    }
    for k, name in enumerate(WHOLE):
        arrays[name] = whole.delta_h[:, k]
        arrays |= {f"{name}_{field}": getattr(whole, field)[:, k] for field in STATISTICS}
    for k, name in enumerate(SEQUENCES):
        arrays[name] = sequences.delta_h[:, k :: len(SEQUENCES)]
        arrays |= {f"{name}_{f}": getattr(sequences, f)[:, k :: len(SEQUENCES)] for f in ("ess", "clip_fraction")}
    summary = {
        **_first_order(plan, out, slopes, e.batch),
        "entropy": entropy_estimate(e.values, e.batch, plan.normalize).item(),
        "rollouts": len(e.rollouts),
        "mean_reward": float(np.mean([r.reward or 0.0 for r in e.rollouts])),
        "off_policy": e.off_policy,
        "finite_steps": [_finite(arrays, slopes, i, eta) for i, eta in enumerate(etas)],
    }
    return Evaluation(out, {name: value.cpu().numpy() for name, value in arrays.items()}, summary)


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


def _finite(arrays: dict[str, Tensor], slopes: dict[str, JvpDelta], i: int, eta: float) -> dict[str, float]:
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


def _sweep(
    plan: EntropyInfluencePlan,
    state: State,
    step: Step,
    batch_e: Batch,
    etas: list[float],
    progress: Progress,
    options: dict[str, Any],
) -> tuple[SnisDelta, SnisDelta]:
    """SNIS of ``WHOLE``, and of [v_0, baseline + v_0, v_1, baseline + v_1, ...]; fields lead with (n_eta, K)."""
    found = []
    once, index = distinct_rows(step.batch)
    count = len(once.input_ids)
    sweep = snis_sweep(state.params, _directions(plan, state, step, once), etas, batch_e, apply=state.apply, **options)
    for block in sweep:
        found.append(block)
        progress("finite steps", min(count, (len(found) - 1) * SEQUENCES_PER_BLOCK), count)
    pairs = torch.stack([2 * index, 2 * index + 1], dim=1).flatten()
    return found[0], SnisDelta(*(torch.cat(field, dim=1)[:, pairs] for field in zip(*found[1:], strict=True)))


def _directions(plan: EntropyInfluencePlan, state: State, step: Step, batch: Batch) -> Iterator[Params]:
    parts, baseline, gain = step.parts, step.parts.baseline, step.parts.gain
    rmsprop = adamw_decompose(step.gradient, state.opt_state, state.params, "rmsprop", plan.max_grad_norm).direction
    whole = (parts.direction, baseline, parts.momentum, parts.weight_decay, rmsprop)
    yield {name: torch.stack([direction[name] for direction in whole]) for name in baseline}
    loss = rollout_loss(state.apply, plan.temperature)
    for rows in row_chunks(batch, SEQUENCES_PER_BLOCK):
        own = {name: gain[name] * g for name, g in per_sample_grads(loss, state.params, rows).items()}
        yield {name: torch.stack([v, baseline[name] + v], dim=1).flatten(0, 1) for name, v in own.items()}
