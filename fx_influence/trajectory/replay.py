"""Replay a recorded window: the states on the way, recomputed from the first, in a memory budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from fx_influence.autodiff.engine import Engine
from fx_influence.core.tree import detached, promote
from fx_influence.distributed.engine import make_engine
from fx_influence.optim.step import AdamWStep
from fx_influence.optim.transition import advance
from fx_influence.policy.precision import pass_precision
from fx_influence.trajectory.step_files import StepFile
from fx_influence.trajectory.window import RecordedStep, Window
from fx_influence.types import AdamWState, Apply, Params

Keep = Callable[[AdamWStep], AdamWStep]
"""Function of a step before its map is applied, which may store it: the step to go on with."""

VECTORS = 4
"""Vectors of the parameters' size that a stored step refers to: theta, m, s, and g."""


@dataclass(frozen=True)
class Replay:
    """The steps of a window, computed one after the other and given back from the last.

    Attributes:
        params: theta_K by name, after the last step.
        opt_state: AdamW's state after the last step.
        segment: number of steps that are stored at once.
    """

    params: Params
    opt_state: AdamWState
    segment: int
    _steps: Sequence[RecordedStep]
    _engine: Engine
    _preconditioner: Literal["frozen", "jacobian"]
    _checkpoints: Sequence[tuple[Params, AdamWState]]
    _last: list[AdamWStep | StepFile]

    @property
    def params_before_last(self) -> Params:
        """Return theta_{K-1} by name, before the last step."""
        return _in_memory(self._last[-1]).params

    def backward(self) -> Iterator[tuple[int, AdamWStep]]:
        """Yield (k, step k) from the last step to the first, replaying each segment from its checkpoint."""
        for index in reversed(range(len(self._checkpoints))):
            start = index * self.segment
            stored = self._last
            if index < len(self._checkpoints) - 1:
                stored, recorded = [], self._steps[start : start + self.segment]
                point, keep = self._checkpoints[index], partial(_store, stored, None)
                _forward(point, recorded, self._engine, self._preconditioner, keep)
            for offset in reversed(range(len(stored))):
                yield start + offset, _in_memory(stored[offset])


def replay(
    params: Params,
    opt_state: AdamWState,
    steps: Sequence[RecordedStep],
    engine: Engine,
    preconditioner: Literal["frozen", "jacobian"],
    memory_budget: int,
    directory: Path | None,
) -> Replay:
    """Return the window replayed: every step is stored, in files where all do not fit the budget.

    Without a directory for files, segments of sqrt(K) steps are stored one after the other, and the first state of
    each: all but the last segment are computed a second time.

    Args:
        params: theta_0 by name.
        opt_state: AdamW's state before the first step.
        steps: the K recorded steps.
        engine: engine of the policy as the trainer computes it.
        preconditioner: of the steps' derivatives.
        memory_budget: bytes for stored states.
        directory: of files; None uses none.
    """
    is_small = bytes_of_steps(params, len(steps)) <= memory_budget
    files = None if is_small else directory
    segment = len(steps) if is_small or files else math.ceil(math.sqrt(len(steps)))
    point, checkpoints = (params, opt_state), []
    last: list[AdamWStep | StepFile] = []
    keep = partial(_store, last, files)
    for start in range(0, len(steps), segment):
        checkpoints.append(point)
        is_last = start + segment >= len(steps)
        point = _forward(point, steps[start : start + segment], engine, preconditioner, keep if is_last else _unchanged)
    return Replay(*point, segment, steps, engine, preconditioner, checkpoints, last)


def bytes_of_steps(params: Params, count: int) -> int:
    """Return the bytes of a number of stored steps."""
    return VECTORS * count * sum(p.numel() * promote(p.dtype).itemsize for p in params.values())


def params_after(window: Window, apply: Apply, temperature: float = 1.0, chunk_size: int | None = None) -> Params:
    """Return the parameters after a window by name, replayed in the precision of ``influence_over_steps``.

    Args:
        window: the state before the first step, and the steps.
        apply: the policy, from ``make_functional``.
        temperature: divides the logits.
        chunk_size: rows per forward; None chooses by tokens.
    """
    precision = pass_precision(detached(window.params), apply, window.steps[0].batch)
    engine = make_engine(precision.params, apply, temperature, chunk_size, None)
    engine_u = replace(engine, apply=precision.update_apply)
    point = precision.params, window.opt_state
    return _forward(point, window.steps, engine_u, "frozen", _unchanged)[0]


def _in_memory(step: AdamWStep | StepFile) -> AdamWStep:
    return step.read() if isinstance(step, StepFile) else step


def _unchanged(step: AdamWStep) -> AdamWStep:
    return step


def _store(stored: list[AdamWStep | StepFile], directory: Path | None, step: AdamWStep) -> AdamWStep:
    """Append a step to ``stored`` and return it, as it is read from a file where there is a directory for files."""
    if directory is None:
        stored.append(step)
        return step
    stored.append(file := StepFile.write(step, directory / f"{len(stored)}.pt"))
    return file.read()


def _forward(
    point: tuple[Params, AdamWState],
    steps: Sequence[RecordedStep],
    engine: Engine,
    preconditioner: Literal["frozen", "jacobian"],
    keep: Keep,
) -> tuple[Params, AdamWState]:
    """Return the parameters and the optimizer's state after the steps; ``keep`` stores each and gives it back.

    Raises:
        ValueError: for a gradient that is not finite.
    """
    params, state = point
    for recorded in steps:
        if recorded.hyper is not None:
            state = state._replace(hyper=dict(recorded.hyper))
        grads = engine.gradient(params, recorded.batch)
        step = keep(AdamWStep.of(grads, state, params, preconditioner, recorded.max_grad_norm))
        # What is in a file now need not be in memory beside the state after the step.
        del grads, params, state
        params, state = advance(step, recorded.lr)
    return params, state
