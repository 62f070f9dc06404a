"""Measure every n-th step of an optimizer in any training loop, from hooks on its ``step``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fx_influence.attribution.result import Influence
from fx_influence.interop.live.guard import CaptureError, Failure, attempt, reason, warn
from fx_influence.interop.live.measurement import MeasurementSettings, PendingStep, StepMeasurement
from fx_influence.interop.live.metrics import PREFIX, LogSelection, MeasuredStep
from fx_influence.interop.live.policy_checks import rounding_bound
from fx_influence.interop.live.precision import in_forward_precision
from fx_influence.interop.live.processes import all_gather_values, count_and_rank
from fx_influence.interop.live.rows import concatenate
from fx_influence.interop.live.step import CapturedStep, accumulated_gradient, captured_step, on_host
from fx_influence.interop.loop.accumulated import AccumulatedGradient
from fx_influence.interop.loop.ledger import LoopLedger
from fx_influence.interop.loop.rollouts import AddedRollouts, added_rollouts
from fx_influence.interop.loop.window import LoopWindow
from fx_influence.interop.zero.partitions import is_zero_optimizer, planned_step, zero_optimizer
from fx_influence.interop.zero.step_hooks import hook_step
from fx_influence.policy.policy import Policy

Value = TypeVar("Value")


@dataclass
class LoopTraining:
    """A training loop, as the measurement of its steps reads it.

    Attributes:
        model: the policy that is trained, without wrappers.
        optimizer: the AdamW over its parameters, without wrappers, or DeepSpeed's optimizer that partitions it.
        temperature: of the policy.
        position_ids: whether the loop's forward has position ids that count from the first real token.
        autocast: dtype of the autocast around the loop's forward, None without one.
        loss_scale: factor by which the loss was multiplied last.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    temperature: float
    position_ids: bool
    autocast: torch.dtype | None
    loss_scale: float = 1.0
    forward_remedy: str = (
        "Pass log-probabilities of the very tokens in completion_mask, and the temperature, autocast and position_ids "
        "of the loop's forward to attach; anything else in that forward (images, noise, hooks) cannot be measured"
    )

    def in_forward_precision(self, policy: Policy) -> Policy:
        """Return the policy in the precision of the loop's forward."""
        return in_forward_precision(policy, self.autocast, self.loss_scale)

    def rounding_bound(self) -> float:
        """Return the bound on the mean difference of two forwards in the lowest precision in use."""
        return rounding_bound(self.model, () if self.autocast is None else (self.autocast,))


class StepCapture:
    """The measured steps of one optimizer, made by ``fx.attach``.

    Args:
        training: the loop's model, optimizer and forward.
        settings: how steps are measured.
        every: steps n, 2n, ... of the optimizer are measured.
        log: called with at most 16 figures of each measured step, by name.
        on_step: called with the number of each measured step and its influences.
        mesh: of the training run's processes, None for a single process.
        ledger: appends measured steps to a file, None for none.
        window: number and kind of the steps of windows, None for none; they need a ledger.

    Attributes:
        history: the metrics of every measured step, with ``step``, its number.
        step: number of steps that the optimizer has made.
    """

    def __init__(
        self,
        training: LoopTraining,
        settings: MeasurementSettings,
        every: int,
        log: Callable[[dict[str, float]], object] | None,
        on_step: Callable[[int, Influence], object] | None,
        mesh: DeviceMesh | None,
        ledger: LoopLedger | None = None,
        window: LoopWindow | None = None,
    ) -> None:
        self.history: list[dict[str, float]] = []
        self.step = steps_made(training.optimizer)
        self._training, self._every, self._log, self._on_step = training, every, log, on_step
        self._mesh, self._is_main, self._ledger = mesh, count_and_rank(mesh)[1] == 0, ledger
        self._measurement = StepMeasurement(training, settings, mesh, self._warn)
        self._windows = None
        if window is not None and ledger is not None:
            self._windows = window.recorder(every, self.step, self._measurement, ledger, self._warn)
        self._gradient = AccumulatedGradient(training.model, self._noting_problems)
        self._log_selection = LogSelection()
        self._added: list[AddedRollouts] | None = None
        self._problem: str | None = None
        self._pending: PendingStep | None = None
        self._measuring, self._unreached_warned = True, False
        self._zero = zero_optimizer(training.optimizer)
        self._remove_hooks = hook_step(training.optimizer, self._before_step, self._after_step)
        self._record_if_measured()

    def add(
        self,
        *,
        logprobs: Tensor,
        input_ids: Tensor,
        completion_mask: Tensor,
        attention_mask: Tensor | None = None,
        entropies: Tensor | None = None,
        behaviour_logprobs: Tensor | None = None,
        advantages: Tensor | None = None,
        group: Tensor | None = None,
        sources: Sequence[str | None] | None = None,
        rewards: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        loss_scale: float = 1.0,
    ) -> None:
        """Name the rollouts of a micro-batch, once before its backward pass; do nothing in steps that are not measured.

        The coefficients of the rollouts are the gradients that reach ``logprobs`` and ``entropies``, so the loss is
        made of these very tensors, with whatever clipping, masks and weights.

        A value for each token is (B, T_c) and belongs to the last T_c columns of ``input_ids``, (B, T): the
        completions' tokens, or all but the first. Rollouts that are packed without padding are (N,) or (1, N), with
        ``cu_seqlens`` or ``position_ids``, and have N values or the last N - 1.

        What is wrong with an argument is a warning at the optimizer's step, which is then not attributed.

        Args:
            logprobs: of tokens, in the loop's graph: log pi(y_t) of the token in the same column, at the temperature.
            input_ids: int64 (B, T), prompts and completions.
            completion_mask: of tokens, True on generated tokens that count, the sampled end of sequence included.
            attention_mask: (B, T), True on real tokens; None where all are.
            entropies: of tokens, in the loop's graph, where its loss has an entropy bonus.
            behaviour_logprobs: of tokens, under the policy that sampled them, where that is an older one.
            advantages: (B,) or of tokens; None takes the signs of the coefficients.
            group: int64 (B,), the prompt of each rollout; None tells prompts by their tokens.
            sources: B names of data sources, for the metrics ``source/NAME``.
            rewards: (B,), for the ledger.
            cu_seqlens: (B + 1,), cumulative lengths of packed rollouts.
            position_ids: of packed rollouts, 0 where one begins.
            loss_scale: factor by which the loss is multiplied before its backward pass (``scaler.get_scale()``).
        """
        if self._added is None or not torch.is_grad_enabled():
            return
        with self._noting_problems():
            self._forget_discarded(self._added)
            self._training.loss_scale = loss_scale
            added = added_rollouts(
                logprobs=logprobs,
                input_ids=input_ids,
                completion_mask=completion_mask,
                attention_mask=attention_mask,
                entropies=entropies,
                behaviour_logprobs=behaviour_logprobs,
                advantages=advantages,
                group=group,
                sources=sources,
                rewards=rewards,
                cu_seqlens=cu_seqlens,
                position_ids=position_ids,
                loss_scale=loss_scale,
            )
            added.watch((logprobs, entropies), self._noting_problems)
            self._added.append(added)

    def detach(self) -> None:
        """Leave the optimizer as it was before ``attach``."""
        for remove in self._remove_hooks:
            remove()
        self._remove_hooks, self._pending = [], None
        if self._windows is not None:
            self._windows.interrupt(self.step, "the capture is detached")
        self._stop()

    def _record_if_measured(self) -> None:
        self._stop()
        in_window = self._windows is not None and self._windows.covers(self.step + 1)
        if self._measuring and (in_window or (self.step + 1) % self._every == 0):
            self._added = []
            if self._zero is None:
                with self._noting_problems():
                    self._gradient.start()

    def _stop(self) -> None:
        self._added, self._problem = None, None
        self._gradient.stop()

    @contextmanager
    def _noting_problems(self) -> Iterator[None]:
        """Keep an exception of the recording for the step, so that the loop does not see it."""
        try:
            yield
        except Exception as error:
            self._problem = self._problem or reason(error)

    def _forget_discarded(self, added: list[AddedRollouts]) -> None:
        """Forget rollouts whose gradient the loop has zeroed, as after a step that a loss scaler skipped."""
        reached = [rollouts for rollouts in added if rollouts.reached]
        # DeepSpeed takes each gradient out of its parameter during the backward pass.
        if not reached or self._zero is not None or not self._gradient.has_arrived():
            return
        if self._gradient.is_reset() or (self._gradient.is_zero() and any(x.has_gradient() for x in reached)):
            added[:] = [rollouts for rollouts in added if not rollouts.reached]
            self._gradient.forget()

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Attribute the step that the optimizer is about to make."""
        self._pending = None
        if self._added is None or skips_step(optimizer):
            return
        # The first argument is the optimizer.
        has_closure = (args[1] if len(args) > 1 else kwargs.get("closure")) is not None
        self._pending = self._guarded(self.step + 1, lambda: self._before_update(has_closure))

    def _before_update(self, has_closure: bool) -> PendingStep | None:
        step, captured = self.step + 1, self._finish(has_closure)
        if self._windows is not None:
            self._windows.record(step, captured)
        return None if step % self._every else self._measurement.before_update(step, captured)

    def _after_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Measure the change of entropy over the step, and begin to record the next one where it is to be measured."""
        pending, self._pending = self._pending, None
        if not skips_step(optimizer) and not getattr(optimizer, "overflow", False):
            self.step += 1
        if pending is not None:
            metrics = self._guarded(self.step, lambda: self._metrics_after(pending))
            if metrics is not None:
                self.history.append({"step": self.step, **metrics})
        self._record_if_measured()

    def _metrics_after(self, pending: PendingStep) -> dict[str, float]:
        measured = on_host(self._measurement.after_update(pending))
        metrics = all_gather_values(self._mesh, measured.metrics())[0]
        if self._ledger is not None and self._is_main:
            window = None if self._windows is None else self._windows.account(pending)
            self._append(self._ledger, measured, window)
        if self._on_step is not None:
            self._on_step(measured.step, measured.influence)
        if self._log is not None and self._is_main:
            self._log({PREFIX + name: value for name, value in self._log_selection.of_step(metrics).items()})
        return metrics

    def _append(self, ledger: LoopLedger, measured: MeasuredStep, window: dict[str, Any] | None) -> None:
        """Append the step to the ledger; a fault is a warning, and the step stays in the history."""
        try:
            ledger.append(measured, self._training.model, window)
        except Exception as error:
            self._warn(f"step {measured.step} is measured and not in the ledger: {reason(error)}")

    def _finish(self, has_closure: bool) -> CapturedStep:
        """Return the recorded step, once its gradient is accumulated and clipped, and end the recording.

        Raises ``CaptureError`` if recording failed or the rollouts' gradients did not arrive.
        """
        added, problem = self._added or [], self._problem
        if problem is not None:
            raise CaptureError(problem)
        if has_closure:
            raise CaptureError(
                "the optimizer's step has a closure; expected none, since the gradient is made inside the step. Make "
                "the backward pass before the step"
            )
        unreached = sum(not rollouts.reached for rollouts in added)
        if unreached == len(added):
            raise CaptureError(
                f"{len(added)} micro-batches were added and no backward pass reached their logprobs; expected one for "
                "each. Call add for every micro-batch, and make the loss of the tensors given to it"
            )
        if unreached and not self._unreached_warned:
            self._unreached_warned = True
            self._warn(
                f"step {self.step + 1}: no backward pass reached the logprobs of {unreached} of {len(added)} "
                "micro-batches, whose coefficients are taken to be 0, as in other steps without a warning"
            )
        if len({rollouts.has_behaviour for rollouts in added}) == 2:
            raise CaptureError(
                "behaviour_logprobs is None in some micro-batches of the step; expected it in all or none. Pass it "
                "with every micro-batch"
            )
        captured = self._captured_step(added)
        self._stop()
        return captured

    def _captured_step(self, added: list[AddedRollouts]) -> CapturedStep:
        """Return the step of all processes from this process's rollouts."""
        # Data parallelism averages over processes whatever the loss.
        share = 1.0 / count_and_rank(self._mesh)[0]
        rows = concatenate(all_gather_values(self._mesh, concatenate([rollouts.rows(share) for rollouts in added])))
        if self._zero is not None:
            planned = planned_step(self._zero, self._training.model)
            return _with_behaviour(captured_step(rows, self._device, *planned, gradient_scale=1.0))
        # A fused optimizer may take the loss scale out itself.
        remaining_scale = float(getattr(self._training.optimizer, "grad_scale", None) or 1.0)
        clip, norm = self._gradient.clipped(self._training.loss_scale / remaining_scale)
        # The bound that clips by this very factor, as clip_grad_norm_ does.
        max_grad_norm = None if clip == 1.0 else norm / remaining_scale + 1e-6 * clip
        gradient = accumulated_gradient(self._training.model)
        scale = clip * remaining_scale
        return _with_behaviour(captured_step(rows, self._device, gradient, clip, max_grad_norm, gradient_scale=scale))

    def _guarded(self, step: int, work: Callable[[], Value]) -> Value | None:
        """Return the result of ``work``, or None with one warning if it fails."""
        result = attempt(work, self._device, self._mesh)
        self._stop()
        if not isinstance(result, Failure):
            return result
        self._measuring = self._measuring and not result.ends_measuring
        self._warn(result.sentence(step))
        return None

    @property
    def _device(self) -> torch.device:
        """Return the model's device, which offloading changes between steps."""
        return next(self._training.model.parameters()).device

    def _warn(self, text: str) -> None:
        if self._is_main:
            warn(text)


def _with_behaviour(captured: CapturedStep) -> CapturedStep:
    """Return a step whose rollouts have the log-probabilities of the policy that sampled them in the batch."""
    return captured._replace(batch=captured.batch._replace(behaviour_logprobs=captured.old_logprobs))


def steps_made(optimizer: Any) -> int:
    """Return the number of steps that an optimizer, or the one that DeepSpeed partitions, has made at any parameter."""
    states = (optimizer.optimizer if is_zero_optimizer(optimizer) else optimizer).state.values()
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def skips_step(optimizer: Any) -> bool:
    """Return whether a loss scaler has told a fused optimizer to leave this step out."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
