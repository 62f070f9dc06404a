"""Measure the Fisher kernel on one E, its diagonal, and the step's change of every log-probability."""

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
from fx_influence.lab.experiment.step import Step, distinct_update_rows, rollouts_per_block
from fx_influence.lab.inputs.rollouts import ScoredRollouts, mean_reward
from fx_influence.lab.inputs.training_state import TrainingState
from fx_influence.lab.plan import FisherKernelPlan
from fx_influence.types import Batch, Params


class FisherEvaluation(NamedTuple):
    """Results of a Fisher run on one E, as they are stored.

    Attributes:
        kernel: K (n_e, n_u).
        matrix: <grad S_a, v_i> (n_e, n_u), nats per unit lr.
        arrays: of ``eval_00.npz``, each (n_e,).
    """

    kernel: np.ndarray
    matrix: np.ndarray
    arrays: Arrays


def kernel_diagonal(plan: FisherKernelPlan, state: TrainingState, step: Step) -> Params:
    """Return P by parameter name: 1, or 1/den of the step that U makes.

    Args:
        plan: has the preconditioner and the clipping.
        state: the training state.
        step: the step that U makes.
    """
    if plan.preconditioner == "identity":
        return {name: torch.ones_like(p, dtype=promote(p.dtype)) for name, p in state.params.items()}
    return adam_diagonal(state.params, step.gradient, state.opt_state, plan.max_grad_norm)


def self_kernel(plan: FisherKernelPlan, state: TrainingState, batch: Batch, diagonal: Params) -> np.ndarray:
    """Return K_aa = <grad S_a, P grad S_a>, (n,), a block of gradients at a time.

    Args:
        plan: has the settings of the passes.
        state: the training state.
        batch: U or E, (n, T).
        diagonal: P, see ``kernel_diagonal``.
    """
    distinct, index = distinct_rows(with_unit_coefficients(batch))

    def squared_norms(rows: Batch) -> Tensor:
        gradients = rollout_gradients(state.params, rows, state.apply, plan.temperature)
        # The kernel is over the parameters that the optimizer holds.
        squares = [(diagonal[name] * g * g).flatten(1) for name, g in gradients.items() if name in diagonal]
        return torch.stack([square.sum(1, dtype=torch.float64) for square in squares]).sum(0).cpu()

    blocks = row_chunks(distinct, rollouts_per_block(plan, state.params))
    values = torch.cat(state.job.map_tasks([partial(squared_norms, rows) for rows in blocks]))
    dtype = promote(next(iter(state.params.values())).dtype)
    return _numpy(values[index.cpu()].to(dtype))


def kernel(
    plan: FisherKernelPlan, state: TrainingState, batch_e: Batch, batch_u: Batch, diagonal: Params
) -> np.ndarray:
    """Return K_ai = <grad S_a, P grad S_i>, (n_e, n_u); equal rollouts are measured once.

    Args:
        plan: has the settings of the passes.
        state: the training state.
        batch_e: E.
        batch_u: U.
        diagonal: P, see ``kernel_diagonal``.
    """
    (distinct_e, index_e), (distinct_u, index_u) = (
        distinct_rows(with_unit_coefficients(batch)) for batch in (batch_e, batch_u)
    )

    def kernel_rows(rows: Batch) -> Tensor:
        return fisher_kernel(
            state.params,
            rows,
            distinct_u,
            None,
            apply=state.apply,
            preconditioner=diagonal,
            temperature=plan.temperature,
            chunk_size=plan.chunk_size,
            memory_budget=plan.budget(state.params),
        )

    return _numpy(_map_rows(state, distinct_e, kernel_rows)[index_e.cpu()][:, index_u.cpu()])


def logprob_change(plan: FisherKernelPlan, state: TrainingState, step: Step, batch_e: Batch) -> Arrays:
    """Return the changes of E's log-probabilities along the step and its terms, per unit lr.

    Args:
        plan: has the settings of the passes.
        state: the training state.
        step: the step that U makes.
        batch_e: E.

    Returns:
        By name ``matrix``, <grad S_a, v_i> (n_e, n_u); ``predicted_delta_logprob``, <grad S_a, v>,
        ``predicted_delta_logprob_baseline``, <grad S_a, v_baseline>, and their ``residual``, (n_e,).

    Raises:
        IdentityError: where the residuals of all rollouts exceed what rounding can make of the sum of all terms. For a
            single rollout that is all but certain, and so hardly moves, float32 leaves few digits.
    """
    (distinct, index), (distinct_u, index_u) = (
        distinct_rows(with_unit_coefficients(batch_e)),
        distinct_update_rows(step.batch),
    )
    params, apply, temperature, chunk = state.params, state.apply, plan.temperature, plan.chunk_size

    def loss_gram(rows: Batch) -> Tensor:
        gain = step.decomposition.gain
        return gradient_gram(params, rows, distinct_u, gain, apply, temperature, plan.budget(params), chunk)

    def sequence_jvp(rows: Batch, v: Params) -> Tensor:
        return token_jvp(params, v, rows, apply, temperature, chunk).logprobs.double().sum(-1)

    # The rollout losses of E are -S_a.
    matrix = -_map_rows(state, distinct, loss_gram)[index.cpu()][:, index_u.cpu()]
    along_step, along_baseline = (
        _map_rows(state, distinct, partial(sequence_jvp, v=v))[index.cpu()]
        for v in (step.decomposition.direction, step.decomposition.baseline)
    )
    residual = along_step - along_baseline - matrix.double().sum(1)
    check_identity(
        "log-probs of E: v_baseline and the matrix",
        residual.abs().sum(),
        torch.cat([along_baseline[:, None], matrix.double()], dim=1),
        along_step.sum(),
        identity_tolerance(params, apply),
        against="the JVP along the whole step",
    )
    names = "matrix", "predicted_delta_logprob", "predicted_delta_logprob_baseline", "residual"
    return dict(zip(names, map(_numpy, (matrix, along_step, along_baseline, residual)), strict=True))


def fisher_figures(e: ScoredRollouts, evaluation: FisherEvaluation) -> dict[str, Any]:
    """Return an evaluation's entry in ``summary.json``; changes of log-probability in nats per unit lr."""
    change, baseline = (evaluation.arrays[f"predicted_delta_logprob{end}"] for end in ("", "_baseline"))
    size = np.abs(baseline).sum() + np.abs(evaluation.matrix).sum(dtype=np.float64)
    return {
        "rollouts": len(e.rollouts),
        "mean_reward": mean_reward(e.rollouts),
        "off_policy": e.off_policy,
        "mean_predicted_delta_logprob": float(change.mean()),
        "mean_abs_predicted_delta_logprob": float(np.abs(change).mean()),
        "median_abs_predicted_delta_logprob": float(np.median(np.abs(change))),
        "largest_abs_predicted_delta_logprob": float(np.abs(change).max()),
        "mean_abs_baseline": float(np.abs(baseline).mean()),
        "mean_abs_contribution": float(np.abs(evaluation.matrix).mean()),
        "spearman_self_kernel_prediction": _spearman(evaluation.arrays["self_kernel"], np.abs(change)),
        "relative_residual": float(np.abs(evaluation.arrays["residual"]).sum() / size) if size else 0.0,
    }


def _map_rows(state: TrainingState, batch: Batch, function: Callable[[Batch], Tensor]) -> Tensor:
    """Return ``function`` of a batch, on the CPU; each process of the job computes a share of the rows."""
    blocks = row_chunks(batch, -(-len(batch.input_ids) // state.job.size))
    return torch.cat(state.job.map_tasks([partial(_on_cpu, function, rows) for rows in blocks]))


def _on_cpu(function: Callable[[Batch], Tensor], rows: Batch) -> Tensor:
    return function(rows).cpu()


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return the rank correlation, None where one of the two is constant."""
    return float(spearmanr(a, b).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else None


def _numpy(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.cpu().numpy()
    return array
