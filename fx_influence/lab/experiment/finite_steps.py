"""Measure Delta H by importance sampling along every direction of a step, block by block, storing each block."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from einops import einsum
from torch import Tensor

from fx_influence.autodiff.rollout_gradients import rollout_gradients
from fx_influence.batching.rows import row_chunks
from fx_influence.estimators.snis import SnisDelta
from fx_influence.lab.experiment.step import (
    Step,
    directions_per_block,
    distinct_update_rows,
    rollouts_per_block,
    step_directions,
)
from fx_influence.lab.inputs.rollouts import Progress
from fx_influence.lab.inputs.training_state import TrainingState
from fx_influence.lab.plan import ROLLOUT_DIRECTIONS, STEP_DIRECTIONS, EntropyInfluencePlan
from fx_influence.perturbation import jvp_delta, snis_sweep
from fx_influence.types import Batch, Params

Arrays = dict[str, np.ndarray]
Directions = dict[str, Params]
"""Direction trees by name, each with a leading axis of rollouts, or of 1 for a direction of the whole step."""
MeasureDirections = Callable[[Directions, Tensor | None], Arrays]
"""Function of directions, and an eta per rollout or None, that returns Delta H along them and its statistics."""

SCALARS = ("ess", "clip_fraction", "stderr")
OVER_E = ("_contributions", "_log_weights")
"""Endings of the statistics with one number for each rollout of E, on their last axis."""


class StepSizes(NamedTuple):
    """Step sizes along the directions.

    Attributes:
        etas: along every direction.
        per_rollout: (n_u,), one more for each rollout along v_i, or None.
    """

    etas: list[float]
    per_rollout: Tensor | None


def sweep(
    plan: EntropyInfluencePlan,
    state: TrainingState,
    step: Step,
    batch_e: Batch,
    sizes: StepSizes,
    stored: MutableMapping[int, Arrays],
    progress: Progress,
) -> Arrays:
    """Return raw Delta H and its statistics by name, for the plan's directions and all step sizes.

    Args:
        plan: names the directions and says how the entropy is estimated.
        state: the training state.
        step: the step that U makes.
        batch_e: E.
        sizes: step sizes along each direction.
        stored: measured blocks, by number; each further one is added as soon as it is measured. With a
            mapping onto files, an interrupted sweep continues at the block where it stopped.
        progress: called as blocks are measured.

    Returns:
        For a direction ``d`` of the whole step ``d`` (n_eta,), ``d_contributions`` and ``d_log_weights`` (n_eta, n_e),
        ``d_ess``, ``d_clip_fraction``, ``d_stderr`` and ``d_float64`` (n_eta,). For a direction of every rollout the
        same with an axis n_u behind n_eta, but of the log-weights only ``d_log_weight_mean`` and ``d_log_weight_max``
        (of |log w|), and ``d_second`` (n_u,), d2H/deta2 at 0. At ``sizes.per_rollout``: ``auto_eta``, ``auto_grad``
        (n_u,) and its statistics. Anything that the plan does not ask for is absent.
    """
    distinct, index = distinct_update_rows(step.batch)
    # Equal rollouts have equal step sizes, so the first stands for its copies.
    first = np.unique(index.cpu().numpy(), return_index=True)[1]
    etas_of_distinct = None if sizes.per_rollout is None else sizes.per_rollout.cpu()[torch.from_numpy(first)]
    block_size = rollouts_per_block(plan, state.params)
    # The forward at theta is made once, and only where a block is left to be measured.
    measure = cache(lambda: _measure(plan, state, batch_e, sizes.etas))

    def measure_rollouts(k: int, rows: Batch) -> Arrays:
        etas = None if etas_of_distinct is None else etas_of_distinct[k * block_size : (k + 1) * block_size]
        return measure()(_rollout_directions(plan, state, step, rows), etas)

    tasks: list[Callable[[], Arrays]] = []
    if any(name in plan.directions for name in STEP_DIRECTIONS):
        tasks.append(lambda: measure()(_whole_step_directions(plan, state, step), None))
    step_tasks = len(tasks)
    if any(name in plan.directions for name in ROLLOUT_DIRECTIONS):
        tasks += [partial(measure_rollouts, k, rows) for k, rows in enumerate(row_chunks(distinct, block_size))]
    blocks = state.job.map_tasks(tasks, stored, lambda done: progress("finite steps", done, len(tasks)))
    return _join_blocks(blocks[:step_tasks], blocks[step_tasks:], index.cpu().numpy())


def _join_blocks(step_blocks: list[Arrays], rollout_blocks: list[Arrays], index: np.ndarray) -> Arrays:
    """Return the arrays of all blocks, with the rollouts that are copies of others put back by ``index``."""
    of_step = step_blocks[0] if step_blocks else {}
    # A direction of the whole step has an axis of 1 where a block has its rollouts: before the axis of E, if any.
    arrays = {name: value[..., 0, :] if name.endswith(OVER_E) else value[..., 0] for name, value in of_step.items()}
    for name in rollout_blocks[0] if rollout_blocks else ():
        axis = -2 if name.endswith(OVER_E) else -1
        arrays[name] = np.take(np.concatenate([block[name] for block in rollout_blocks], axis), index, axis)
    return arrays


def _measure(plan: EntropyInfluencePlan, state: TrainingState, batch_e: Batch, etas: list[float]) -> MeasureDirections:
    """Make the forward at theta; return the function that measures a block of directions against it."""
    options = plan.estimation()
    measure_snis = snis_sweep(state.params, batch_e, apply=state.apply, **options)
    max_directions = directions_per_block(plan, state.params)
    measure_float64 = None
    if plan.compare_float64:
        params64 = {name: p.double() for name, p in state.params.items()}
        measure_float64 = snis_sweep(params64, batch_e, apply=state.apply.with_min_precision(torch.float64), **options)

    def measure(directions: Directions, etas_per_rollout: Tensor | None) -> Arrays:
        arrays: Arrays = {}
        zero = [
            name
            for name in directions
            if name in STEP_DIRECTIONS and not any(x.any() for x in directions[name].values())
        ]
        if zero:
            # A step of 0 gives the same at every eta and along every such direction: one forward serves all.
            at_zero = measure_nonzero({zero[0]: directions[zero[0]]}, None, etas[:1])
            for name in zero:
                for key, value in at_zero.items():
                    arrays[name + key.removeprefix(zero[0])] = np.repeat(value, len(etas), 0)
        rest = [name for name in directions if name not in zero]
        # As many of the whole step's directions are measured at once as fit the memory budget.
        count = max_directions if all(name in STEP_DIRECTIONS for name in rest) else max(1, len(rest))
        for start in range(0, len(rest), count):
            chunk = {name: directions[name] for name in rest[start : start + count]}
            arrays |= measure_nonzero(chunk, etas_per_rollout, etas)
        return arrays

    def measure_nonzero(directions: Directions, etas_per_rollout: Tensor | None, etas: list[float]) -> Arrays:
        block = {key: torch.cat([v[key] for v in directions.values()]) for key in state.params}
        delta = measure_in_chunks(measure_snis, block, etas, max_directions)
        delta64 = None
        if measure_float64 is not None:
            delta64 = measure_in_chunks(measure_float64, block, etas, max_directions, torch.float64).delta_h
        arrays: dict[str, Tensor] = {}
        end = 0
        for name, direction in directions.items():
            start, end = end, end + len(next(iter(direction.values())))
            arrays |= _statistics(name, SnisDelta(*(field[:, start:end] for field in delta)))
            if delta64 is not None:
                arrays[f"{name}_float64"] = delta64[:, start:end]
            if name in ROLLOUT_DIRECTIONS and plan.second_order_per_sequence:
                derivatives = [
                    jvp_delta(state.params, v, batch_e, apply=state.apply, **options) for v in _each(direction)
                ]
                arrays[f"{name}_second"] = torch.stack([derivative.second for derivative in derivatives])
        if etas_per_rollout is not None and "grad" in directions:
            scaled = {
                key: einsum(v, etas_per_rollout.to(v), "rollout ..., rollout -> rollout ...")
                for key, v in directions["grad"].items()
            }
            delta = measure_in_chunks(measure_snis, scaled, [1.0], max_directions)
            arrays |= {f"auto_{name}": value[0] for name, value in _statistics("grad", delta).items()}
            arrays["auto_eta"] = etas_per_rollout
        return {name: value.cpu().numpy() for name, value in arrays.items()}

    return measure


def measure_in_chunks(
    measure: Callable[[Params, list[float]], SnisDelta],
    block: Params,
    etas: list[float],
    max_directions: int,
    dtype: torch.dtype | None = None,
) -> SnisDelta:
    """Return Delta H along a block of directions, at most ``max_directions`` of them in memory with their copies.

    Args:
        measure: what ``snis_sweep`` returned.
        block: direction trees with a leading axis of directions.
        etas: step sizes.
        max_directions: directions per call of ``measure``.
        dtype: to measure in; None: the directions' own.
    """
    count = len(next(iter(block.values())))
    chunks = [
        measure({name: v[k : k + max_directions].to(dtype) for name, v in block.items()}, etas)
        for k in range(0, count, max_directions)
    ]
    return SnisDelta(*(torch.cat(field, dim=1) for field in zip(*chunks, strict=True)))


def _statistics(name: str, delta: SnisDelta) -> dict[str, Tensor]:
    statistics = {f"{name}_{field}": getattr(delta, field) for field in ("contributions", *SCALARS)}
    if name in ROLLOUT_DIRECTIONS:
        statistics[f"{name}_log_weight_mean"] = delta.log_weights.mean(-1)
        statistics[f"{name}_log_weight_max"] = delta.log_weights.abs().amax(-1)
    else:
        statistics[f"{name}_log_weights"] = delta.log_weights
    return {name: delta.delta_h, **statistics}


def _each(block: Params) -> list[Params]:
    """Return the single directions of a block."""
    count = len(next(iter(block.values())))
    return [{name: v[k] for name, v in block.items()} for k in range(count)]


def _whole_step_directions(plan: EntropyInfluencePlan, state: TrainingState, step: Step) -> Directions:
    directions = step_directions(plan, state, step, plan.directions)
    return {d: {name: v[None] for name, v in directions[d].items()} for d in STEP_DIRECTIONS if d in directions}


def _rollout_directions(plan: EntropyInfluencePlan, state: TrainingState, step: Step, rows: Batch) -> Directions:
    """Return v_i and v_baseline + v_i of some rollouts of U, as far as the plan asks for them."""
    gradients = rollout_gradients(state.params, rows, state.apply, plan.temperature)
    gain, baseline = step.decomposition.gain, step.decomposition.baseline
    v = {name: gain[name] * g for name, g in gradients.items()}
    directions = {"grad": v, "baseline_plus_grad": {name: baseline[name] + x for name, x in v.items()}}
    return {d: directions[d] for d in ROLLOUT_DIRECTIONS if d in plan.directions}
