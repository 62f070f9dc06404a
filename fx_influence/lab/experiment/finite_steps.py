"""Delta H by importance sampling along every direction of a step, a block at a time, each kept once it is known."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fx_influence.autodiff.rollout_gradients import rollout_gradients
from fx_influence.batching.rows import row_chunks
from fx_influence.estimators.snis import SnisDelta
from fx_influence.lab.experiment.step import (
    Step,
    directions_per_block,
    moving_rows,
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
"""Direction trees by name, each with a leading axis of rollouts, or of 1 where the whole step has one."""

SCALARS = ("ess", "clip_fraction", "stderr")


class Steps(NamedTuple):
    """How far to go: ``etas`` along every direction, and ``own`` (n_u,), one more for each rollout, or None."""

    etas: list[float]
    own: Tensor | None


def sweep(
    plan: EntropyInfluencePlan,
    state: TrainingState,
    step: Step,
    batch_e: Batch,
    steps: Steps,
    kept: MutableMapping[int, Arrays],
    progress: Progress,
) -> Arrays:
    """Raw Delta H and its statistics by name, for the plan's directions and all ``steps``.

    For a direction ``d`` of the whole step: ``d`` (n_eta,), ``d_contributions`` and ``d_log_weights`` (n_eta, n_e),
    ``d_ess``, ``d_clip_fraction``, ``d_stderr`` and ``d_float64`` (n_eta,). For a direction of every rollout the same
    with an axis n_u behind n_eta, but of the log-weights only ``d_log_weight_mean`` and ``d_log_weight_max`` (of
    |log w|), and ``d_second`` (n_u,), d2H/deta2 at 0. At ``steps.own``: ``auto_eta``, ``auto_grad`` (n_u,) and its
    statistics. What the plan does not ask for is absent.

    ``kept`` holds the blocks that are done, by number, and is given each further one as soon as it is measured: with a
    mapping onto files an interrupted sweep goes on at the block where it stopped.
    """
    once, index = moving_rows(step.batch)
    # Equal rollouts have equal steps of their own: that of the first stands for all.
    first = np.unique(index.cpu().numpy(), return_index=True)[1]
    own = None if steps.own is None else steps.own.cpu()[torch.from_numpy(first)]
    size = rollouts_per_block(plan, state.params)
    # The pass at theta is made once, and only where a block is left to be measured.
    measure = cache(lambda: _measure(plan, state, batch_e, steps.etas))

    def of_rollouts(k: int, rows: Batch) -> Arrays:
        etas = None if own is None else own[k * size : (k + 1) * size]
        return measure()(_of_rollouts(plan, state, step, rows), etas)

    works: list[Callable[[], Arrays]] = []
    if any(name in plan.directions for name in STEP_DIRECTIONS):
        works.append(lambda: measure()(_of_the_step(plan, state, step), None))
    of_the_step = len(works)
    if any(name in plan.directions for name in ROLLOUT_DIRECTIONS):
        works += [partial(of_rollouts, k, rows) for k, rows in enumerate(row_chunks(once, size))]
    blocks = state.job.map_tasks(works, kept, lambda done: progress("finite steps", done, len(works)))
    return _assembled(blocks[:of_the_step], blocks[of_the_step:], index.cpu().numpy())


def _assembled(of_the_step: list[Arrays], rollouts: list[Arrays], index: np.ndarray) -> Arrays:
    whole = of_the_step[0] if of_the_step else {}
    # The one direction of the whole step stands where a block has its rollouts: before the axis of E, if there is one.
    arrays = {name: value[..., 0, :] if name.endswith(OVER_E) else value[..., 0] for name, value in whole.items()}
    for name in rollouts[0] if rollouts else ():
        axis = -2 if name.endswith(OVER_E) else -1
        arrays[name] = np.take(np.concatenate([block[name] for block in rollouts], axis), index, axis)
    return arrays


OVER_E = ("_contributions", "_log_weights")
"""Statistics with one number for each rollout of E, on their last axis."""


def _measure(
    plan: EntropyInfluencePlan, state: TrainingState, batch_e: Batch, etas: list[float]
) -> Callable[[Directions, Tensor | None], Arrays]:
    options = plan.estimation()
    finite = snis_sweep(state.params, batch_e, apply=state.apply, **options)
    at_once = directions_per_block(plan, state.params)
    exact = None
    if plan.compare_float64:
        wide = {name: p.double() for name, p in state.params.items()}
        exact = snis_sweep(wide, batch_e, apply=state.apply.with_min_precision(torch.float64), **options)

    def measure(directions: Directions, own: Tensor | None) -> Arrays:
        arrays: Arrays = {}
        zero = [
            name
            for name in directions
            if name in STEP_DIRECTIONS and not any(x.any() for x in directions[name].values())
        ]
        if zero:
            # A step of 0 gives the same at every eta and along every such direction: one forward tells it for all.
            at_zero = moving({zero[0]: directions[zero[0]]}, None, etas[:1])
            for name in zero:
                for key, value in at_zero.items():
                    arrays[name + key.removeprefix(zero[0])] = np.repeat(value, len(etas), 0)
        rest = [name for name in directions if name not in zero]
        # Directions of the whole step are measured as many at a time as fit the memory budget.
        size = at_once if all(name in STEP_DIRECTIONS for name in rest) else max(1, len(rest))
        for start in range(0, len(rest), size):
            arrays |= moving({name: directions[name] for name in rest[start : start + size]}, own, etas)
        return arrays

    def moving(directions: Directions, own: Tensor | None, etas: list[float]) -> Arrays:
        block = {key: torch.cat([v[key] for v in directions.values()]) for key in state.params}
        delta = _in_parts(finite, block, etas, at_once)
        in_float64 = None
        if exact is not None:
            in_float64 = _in_parts(exact, block, etas, at_once, torch.float64).delta_h
        arrays: dict[str, Tensor] = {}
        end = 0
        for name, direction in directions.items():
            start, end = end, end + len(next(iter(direction.values())))
            part = SnisDelta(*(field[:, start:end] for field in delta))
            arrays |= _statistics(name, part)
            if in_float64 is not None:
                arrays[f"{name}_float64"] = in_float64[:, start:end]
            if name in ROLLOUT_DIRECTIONS and plan.second_order_per_sequence:
                slopes = [jvp_delta(state.params, v, batch_e, apply=state.apply, **options) for v in _each(direction)]
                arrays[f"{name}_second"] = torch.stack([slope.second for slope in slopes])
        if own is not None and "grad" in directions:
            scaled = {key: v * own.to(v).reshape(-1, *[1] * (v.dim() - 1)) for key, v in directions["grad"].items()}
            at_own = _in_parts(finite, scaled, [1.0], at_once)
            arrays |= {f"auto_{name}": value[0] for name, value in _statistics("grad", at_own).items()}
            arrays["auto_eta"] = own
        return {name: value.cpu().numpy() for name, value in arrays.items()}

    return measure


def _in_parts(
    measure: Callable[[Params, list[float]], SnisDelta],
    block: Params,
    etas: list[float],
    at_once: int,
    dtype: torch.dtype | None = None,
) -> SnisDelta:
    count = len(next(iter(block.values())))
    parts = [
        measure({name: v[k : k + at_once].to(dtype) for name, v in block.items()}, etas)
        for k in range(0, count, at_once)
    ]
    return SnisDelta(*(torch.cat(field, dim=1) for field in zip(*parts, strict=True)))


def _statistics(name: str, delta: SnisDelta) -> dict[str, Tensor]:
    statistics = {f"{name}_{field}": getattr(delta, field) for field in ("contributions", *SCALARS)}
    if name in ROLLOUT_DIRECTIONS:
        statistics[f"{name}_log_weight_mean"] = delta.log_weights.mean(-1)
        statistics[f"{name}_log_weight_max"] = delta.log_weights.abs().amax(-1)
    else:
        statistics[f"{name}_log_weights"] = delta.log_weights
    return {name: delta.delta_h, **statistics}


def _each(block: Params) -> list[Params]:
    count = len(next(iter(block.values())))
    return [{name: v[k] for name, v in block.items()} for k in range(count)]


def _of_the_step(plan: EntropyInfluencePlan, state: TrainingState, step: Step) -> Directions:
    whole = step_directions(plan, state, step, plan.directions)
    return {d: {name: v[None] for name, v in whole[d].items()} for d in STEP_DIRECTIONS if d in whole}


def _of_rollouts(plan: EntropyInfluencePlan, state: TrainingState, step: Step, rows: Batch) -> Directions:
    gradients = rollout_gradients(state.params, rows, state.apply, plan.temperature)
    own = {name: step.parts.gain[name] * g for name, g in gradients.items()}
    directions = {"grad": own, "baseline_plus_grad": {name: step.parts.baseline[name] + v for name, v in own.items()}}
    return {d: directions[d] for d in ROLLOUT_DIRECTIONS if d in plan.directions}
