"""Record the steps of a live training run window by window, and attribute each window at its last step."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from fx_influence.interop.ledger.step import kinds_of_step
from fx_influence.interop.live.guard import CaptureError, Failure, attempt
from fx_influence.interop.live.measurement import PendingStep, StepMeasurement
from fx_influence.interop.live.metrics import regions_of
from fx_influence.interop.live.precision import step_rounding
from fx_influence.interop.live.step import CapturedStep, on_host
from fx_influence.interop.low_bit.moments import is_low_bit
from fx_influence.interop.optimizers import adamw_state, require_adamw
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.window.account import number_prompts, window_entry
from fx_influence.interop.window.files import WindowFiles, WindowStep
from fx_influence.policy.autocast import HALF_DTYPES
from fx_influence.trajectory.influence_over_steps import influence_over_steps
from fx_influence.trajectory.replay import params_after
from fx_influence.trajectory.window import RecordedStep, Window
from fx_influence.types import AdamWHyper, Apply, Batch, Params

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

MAX_REPLAY_ERROR = 0.1
"""Distance of the replay's last weights from the trained ones, over what these have gone, above which it is another
training run's."""


class WindowRecorder:
    """Record windows of K steps that end with a measured one and do not overlap, each on disk until it is attributed.

    A window's last step is the first measured one that has K unrecorded steps up to it. A step that cannot be recorded,
    or that a loss scaler skips, ends its window; a fault is one warning, and what follows is recorded anew. Nothing
    raises into the training run.

    Args:
        length: K.
        every: steps n, 2n, ... are measured.
        steps_made: number of steps that the optimizer has made.
        measurement: of the training run's measured steps.
        folder: returns the folder of the window's files, once the first is written.
        rollouts_of: returns U as records from a captured step on the CPU.
        follows_ratio: whether coefficients are a number times pi over the recorded probability, by token.
        warn: called with a sentence that the user should read.
        ends_known: whether the records' ``finished`` is known.
    """

    def __init__(
        self,
        length: int,
        every: int,
        steps_made: int,
        measurement: StepMeasurement,
        folder: Callable[[], Path],
        rollouts_of: Callable[[CapturedStep], Sequence[Rollout]],
        follows_ratio: Callable[[CapturedStep], bool],
        warn: Callable[[str], None],
        ends_known: Callable[[], bool] = lambda: True,
    ) -> None:
        self._length, self._every, self._measurement = length, every, measurement
        self._folder, self._rollouts_of = folder, rollouts_of
        self._follows_ratio, self._warn, self._ends_known = follows_ratio, warn, ends_known
        self._files: WindowFiles | None = None
        self._hyper: dict[str, AdamWHyper] = {}
        self._recorded: list[int] = []
        self._last = last_step(steps_made, length, every)

    @property
    def _first(self) -> int:
        return self._last - self._length + 1

    def covers(self, step: int) -> bool:
        """Return whether this step, from 1, is to be recorded; a window that misses one of its steps is given up."""
        if step > self._last:
            self.interrupt(step - 1, f"step {self._last} could not be measured")
        elif step > self._first and self._recorded != list(range(self._first, step)):
            self.interrupt(step - 1, f"step {step - 1} is not in it")
        return self._first <= step <= self._last

    def record(self, step: int, captured: CapturedStep) -> None:
        """Record a step that the optimizer is about to make."""
        if not self.covers(step):
            return
        result = self._attempt(lambda: self._append(step, captured))
        if isinstance(result, Failure):
            self._warn(f"step {step}: {self._name} is not attributed: {result.text}")
            self.interrupt(step, "a step could not be recorded")

    def account(self, pending: PendingStep) -> dict[str, Any] | None:
        """Return the account of the window that a measured step ends, after the update; None where none ends.

        Args:
            pending: the measured step, whose E the entropy is estimated on.
        """
        step = pending.measured.step
        if step != self._last or self._recorded != list(range(self._first, step + 1)):
            return None
        result = self._attempt(lambda: self._attribute(pending))
        if isinstance(result, Failure):
            self._warn(f"step {step}: {self._name} is not attributed: {result.text}")
        self.interrupt(step)
        return None if isinstance(result, Failure) else result

    def interrupt(self, steps_made: int, why: str | None = None) -> None:
        """Remove what is recorded of the window, and begin anew after this step; log why, if it is not attributed."""
        if self._files is not None:
            if why is not None and self._files.folder.exists():
                logger.warning(f"{self._name} is discarded: {why}")
            self._files.discard()
        self._recorded = []
        self._last = last_step(steps_made, self._length, self._every)

    @property
    def _name(self) -> str:
        return f"the window of steps {self._first} to {self._last}"

    def _append(self, step: int, captured: CapturedStep) -> None:
        measurement = self._measurement
        params, optimizer = measurement.trainable(), measurement.training.optimizer
        opt_state = adamw_state(optimizer, measurement.training.model, copy=False)
        if self._files is None or step == self._first:
            check_replayable(require_adamw(optimizer), [p.dtype for p in params.values()])
            self._files = WindowFiles(self._folder())
            if self._files.folder.exists():
                logger.warning(f"a window in {self._files.folder} is discarded: its training run was interrupted")
            self._files.begin(params, opt_state)
            self._hyper = opt_state.hyper
        if captured.images is not None:
            raise CaptureError(
                "rollouts show images; expected text alone in a window, whose files have no images. Leave window out"
            )
        captured = on_host(measurement.complete(captured))
        kinds = kinds_of_step(captured, self._rollouts_of(captured), regions_of(captured), self._ends_known())
        follows, batch = self._follows_ratio(captured), captured.batch
        recorded = RecordedStep(
            batch=batch,
            lr=opt_state.lr,
            max_grad_norm=captured.max_grad_norm,
            coefficient_slopes=batch.coefficients if follows else None,
            hyper=None if opt_state.hyper == self._hyper else opt_state.hyper,
        )
        self._hyper = opt_state.hyper
        self._files.append(WindowStep(step, recorded, kinds, captured.prompt_widths))
        self._recorded.append(step)

    def _attribute(self, pending: PendingStep) -> dict[str, Any]:
        start = time.perf_counter()
        assert self._files is not None
        measurement, settings = self._measurement, self._measurement.settings
        device = pending.batch_e.input_ids.device
        params, opt_state = self._files.state(device)
        steps, size = self._files.steps(device), self._files.size()
        batch_e = evaluation_batch(pending)
        # The last step's rollouts are of an older policy, so steps of one generation may share its prompts.
        shared = batch_e is None and steps[-1].step.batch.behaviour_logprobs is not None
        if shared:
            steps = number_prompts(steps)
        window = Window(params=params, opt_state=opt_state, steps=[x.step for x in steps])
        apply, temperature = measurement.forward_policy(), measurement.training.temperature
        error = replay_error(window, apply, measurement.trainable(), temperature, settings.chunk_size)
        result = influence_over_steps(
            window,
            batch_e,
            apply=apply,
            cross_fit=shared,
            objective=settings.objective,
            preconditioner="jacobian" if settings.preconditioner == "jacobian" else "frozen",
            stderr=True,
            per_token=True,
            temperature=temperature,
            chunk_size=settings.chunk_size,
            memory_budget=settings.memory_budget,
            states_dir=self._files.folder,
        )
        figures = {"replay_error": error, "bytes": float(size), "seconds": time.perf_counter() - start}
        return window_entry(on_host(result), [x._replace(kinds=_on_cpu(x)) for x in steps], figures)

    def _attempt(self, work: Callable[[], Value]) -> Value | Failure:
        return attempt(work, next(self._measurement.training.model.parameters()).device, None)


def last_step(steps_made: int, length: int, every: int) -> int:
    """Return the number of the step that ends the next window.

    Args:
        steps_made: number of steps that are made.
        length: of a window, in steps.
        every: steps n, 2n, ... are measured; a window ends with one of these.

    Example:
        >>> [last_step(0, 4, 10), last_step(10, 4, 10), last_step(0, 4, 3), last_step(6, 4, 3), last_step(4, 4, 1)]
        [10, 20, 6, 12, 8]
    """
    return -(-(steps_made + length) // every) * every


def evaluation_batch(pending: PendingStep) -> Batch | None:
    """Return E of the last step, weighted by the policy that sampled it; None where it is that step's rollouts."""
    if pending.shifts is not None:
        return None
    batch_e, values = pending.batch_e, pending.values
    return batch_e if batch_e.behaviour_logprobs is not None else batch_e._replace(behaviour_logprobs=values.logprobs)


def replay_error(window: Window, apply: Apply, params: Params, temperature: float, chunk_size: int | None) -> float:
    """Return how far the replay of a window ends from the trained weights, over the distance that these have gone.

    Args:
        window: as recorded.
        apply: the policy.
        params: the trained weights after the window, by name.
        temperature: divides the logits.
        chunk_size: rows per forward; None chooses by tokens.

    Raises:
        CaptureError: for more than ``MAX_REPLAY_ERROR``.
    """
    replayed = params_after(window, apply, temperature, chunk_size)
    before = {name: x.double() for name, x in window.params.items()}
    moved, gone = ({name: x[name].double() - p for name, p in before.items()} for x in (replayed, params))
    error = step_rounding(moved, gone, 1.0)
    if error > MAX_REPLAY_ERROR:
        raise CaptureError(
            f"the replay ends {error:.0%} of the window's distance from the trained weights; expected at most "
            f"{MAX_REPLAY_ERROR:.0%}. Something else moved them than the rollouts and AdamW (another loss in the same "
            "step, or weights changed by hand); train without it, or leave window out"
        )
    return error


def check_replayable(optimizer: torch.optim.Optimizer, dtypes: Sequence[torch.dtype]) -> None:
    """Raise ``ValueError`` for a training run whose steps a replay in full precision does not make again.

    Args:
        optimizer: without wrappers.
        dtypes: of the trained weights.
    """
    if is_low_bit(optimizer):
        raise ValueError(
            f"the optimizer is {type(optimizer).__name__}, which rounds its moments after every step; expected full "
            "moments in a window, since its replay does not round them. Train with torch.optim.AdamW, or leave window "
            "out"
        )
    half = next((dtype for dtype in dtypes if dtype in HALF_DTYPES), None)
    if half is not None:
        raise ValueError(
            f"trained weights are {half}; expected float32 in a window, since its replay does not round the weights "
            "after every step. Train float32 weights under autocast, or leave window out"
        )


def _on_cpu(record: WindowStep) -> dict[str, Any]:
    return {name: dataclasses.replace(x, index=x.index.cpu()) for name, x in record.kinds.items()}
