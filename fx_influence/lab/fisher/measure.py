"""What a Fisher run measures on one E: the kernel, its diagonal, and the step's change of every log-probability."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from fx_influence.autodiff.directional import token_jvp
from fx_influence.autodiff.gram import gradient_gram
from fx_influence.autodiff.rollout_gradients import rollout_gradients
from fx_influence.batching.rows import distinct_rows, row_chunks
from fx_influence.core.tree import promote
from fx_influence.estimators.consistency import check_identity, identity_tolerance
from fx_influence.fisher import adam_diagonal, fisher_kernel, with_unit_coefficients
from fx_influence.lab.experiment.finite_steps import Arrays
from fx_influence.lab.experiment.step import Step, moving_rows, rollouts_per_block
from fx_influence.lab.inputs.rollouts import ScoredRollouts
from fx_influence.lab.inputs.training_state import TrainingState
from fx_influence.lab.inputs.update import mean_reward
from fx_influence.lab.plan import FisherKernelPlan
from fx_influence.types import Batch, Params


class Measured(NamedTuple):
    """Of one E: K and <grad S_a, v_i>, both (n_e, n_u), and the arrays of ``eval_00.npz``, (n_e,)."""

    kernel: np.ndarray
    matrix: np.ndarray
    arrays: Arrays


def kernel_diagonal(plan: FisherKernelPlan, state: TrainingState, step: Step) -> Params:
    """P by name: 1, or 1/den of the step that U makes."""
    if plan.preconditioner == "identity":
        return {name: torch.ones_like(p, dtype=promote(p.dtype)) for name, p in state.params.items()}
    return adam_diagonal(state.params, step.gradient, state.opt_state, plan.max_grad_norm)


def self_kernel(plan: FisherKernelPlan, state: TrainingState, batch: Batch, diagonal: Params) -> np.ndarray:
    """K_aa = <grad S_a, P grad S_a>, (n,); a block of gradients at a time."""
    once, index = distinct_rows(with_unit_coefficients(batch))

    def squared(part: Batch) -> Tensor:
        gradients = rollout_gradients(state.params, part, state.apply, plan.temperature)
        # Parameters that the optimizer does not hold are no part of the kernel.
        squares = [(diagonal[name] * g * g).flatten(1) for name, g in gradients.items() if name in diagonal]
        return torch.stack([square.sum(1, dtype=torch.float64) for square in squares]).sum(0).cpu()

    parts = row_chunks(once, rollouts_per_block(plan, state.params))
    own = torch.cat(state.job.map_tasks([partial(squared, part) for part in parts]))
    dtype = promote(next(iter(state.params.values())).dtype)
    return _numpy(own[index.cpu()].to(dtype))


def kernel(
    plan: FisherKernelPlan, state: TrainingState, batch_e: Batch, batch_u: Batch, diagonal: Params
) -> np.ndarray:
    """K_ai = <grad S_a, P grad S_i>, (n_e, n_u); equal rollouts are measured once."""
    (once_e, index_e), (once_u, index_u) = (
        distinct_rows(with_unit_coefficients(batch)) for batch in (batch_e, batch_u)
    )

    def of_rows(part: Batch) -> Tensor:
        return fisher_kernel(
            state.params,
            part,
            once_u,
            None,
            apply=state.apply,
            preconditioner=diagonal,
            temperature=plan.temperature,
            chunk_size=plan.chunk_size,
            memory_budget=plan.memory_budget,
        )

    return _numpy(_shared(state, once_e, of_rows)[index_e.cpu()][:, index_u.cpu()])


def _shared(state: TrainingState, batch: Batch, of_rows: Callable[[Batch], Tensor]) -> Tensor:
    """What ``of_rows`` gives of a batch, on the CPU, each process of the job taking its share of the rows."""
    parts = row_chunks(batch, -(-len(batch.input_ids) // state.job.size))
    return torch.cat(state.job.map_tasks([partial(_on_cpu, of_rows, part) for part in parts]))


def _on_cpu(of_rows: Callable[[Batch], Tensor], part: Batch) -> Tensor:
    return of_rows(part).cpu()


def logprob_change(plan: FisherKernelPlan, state: TrainingState, step: Step, batch_e: Batch) -> Arrays:
    """By name ``matrix``, <grad S_a, v_i> (n_e, n_u), and <grad S_a, v>, <grad S_a, v_baseline>, the residual, (n_e,).

    Raises ``IdentityError`` where the residuals together exceed what rounding can make of the parts together: of a
    single rollout that is all but certain, and so hardly moves, float32 leaves few digits.
    """
    (once, index), (moving, copies) = distinct_rows(with_unit_coefficients(batch_e)), moving_rows(step.batch)
    params, apply, temperature, chunk = state.params, state.apply, plan.temperature, plan.chunk_size

    def losses(part: Batch) -> Tensor:
        return gradient_gram(params, part, moving, step.parts.gain, apply, temperature, plan.memory_budget, chunk)

    def slopes(part: Batch, v: Params) -> Tensor:
        return token_jvp(params, v, part, apply, temperature, chunk).logprobs.double().sum(-1)

    # The rollout losses of E are -S_a.
    matrix = -_shared(state, once, losses)[index.cpu()][:, copies.cpu()]
    whole, baseline = (
        _shared(state, once, partial(slopes, v=v))[index.cpu()] for v in (step.parts.direction, step.parts.baseline)
    )
    residual = whole - baseline - matrix.double().sum(1)
    check_identity(
        "log-probs of E: v_baseline and the matrix",
        residual.abs().sum(),
        torch.cat([baseline[:, None], matrix.double()], dim=1),
        whole.sum(),
        identity_tolerance(params, apply),
        against="the JVP along the whole step",
    )
    names = "matrix", "predicted_delta_logprob", "predicted_delta_logprob_baseline", "residual"
    return dict(zip(names, map(_numpy, (matrix, whole, baseline, residual)), strict=True))


def figures(e: ScoredRollouts, found: Measured) -> dict[str, Any]:
    """An evaluation's entry in ``summary.json``; changes of log-probability in nats per unit lr."""
    whole, baseline = (found.arrays[f"predicted_delta_logprob{end}"] for end in ("", "_baseline"))
    size = np.abs(baseline).sum() + np.abs(found.matrix).sum(dtype=np.float64)
    return {
        "rollouts": len(e.rollouts),
        "mean_reward": mean_reward(e.rollouts),
        "off_policy": e.off_policy,
        "mean_predicted_delta_logprob": float(whole.mean()),
        "mean_abs_predicted_delta_logprob": float(np.abs(whole).mean()),
        "median_abs_predicted_delta_logprob": float(np.median(np.abs(whole))),
        "largest_abs_predicted_delta_logprob": float(np.abs(whole).max()),
        "mean_abs_baseline": float(np.abs(baseline).mean()),
        "mean_abs_contribution": float(np.abs(found.matrix).mean()),
        "spearman_self_kernel_prediction": _spearman(found.arrays["self_kernel"], np.abs(whole)),
        "relative_residual": float(np.abs(found.arrays["residual"]).sum() / size) if size else 0.0,
    }


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    return float(spearmanr(a, b).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else None


def _numpy(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.cpu().numpy()
    return array
