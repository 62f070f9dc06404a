"""Record the optimizer steps of a live TRL trainer by wrapping its methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from fx_influence.core.dtensor import to_local
from fx_influence.distributed.collectives import propagate_failures
from fx_influence.interop.live.guard import CaptureError
from fx_influence.interop.live.processes import all_gather_values
from fx_influence.interop.live.rows import concatenate
from fx_influence.interop.live.step import CapturedStep, accumulated_gradient, captured_step
from fx_influence.interop.rollouts.record import source_of
from fx_influence.interop.runtime.method_wrapper import MethodWrapper
from fx_influence.interop.trl.capture.micro_batch import SCORE, MicroBatch, scoring_signature
from fx_influence.interop.trl.capture.rollout_rows import GROUPS, REWARDS, SOURCES, rollout_rows
from fx_influence.interop.trl.processes import mesh_of
from fx_influence.interop.zero.partitions import planned_step, zero_optimizer

METHODS = ("compute_loss", SCORE, "_generate_and_score_completions", "_calculate_rewards")
"""Methods of ``GRPOTrainer`` and ``RLOOTrainer`` (trl 1.16) that are wrapped on the instance."""


class Capture:
    """Wrap methods of one trainer and record the steps that are asked for.

    The coefficients are the gradients that reach the log-probabilities and entropies the trainer's loss is made of, so
    they are exact whatever the loss, its clipping, masks, accumulation or version.

    Errors of the recording never reach the trainer: ``finish`` raises them. An exception of the trainer's own methods
    passes unchanged and ends the recording. Several instances may wrap one trainer and be detached in any order.

    Args:
        trainer: a ``GRPOTrainer`` or ``RLOOTrainer``.

    Attributes:
        mesh: of the trainer's processes, all of which capture the same steps; None for a single process.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.mesh = mesh_of(trainer)
        self._micro_batches: list[MicroBatch] | None = None
        self._current: MicroBatch | None = None
        self._rewards: Tensor | None = None
        self._clipped: tuple[float, float] | None = None
        self._problem: str | None = None
        self._generations = 0
        self._signature = scoring_signature(trainer)
        wrappers = (self._compute_loss, self._score, self._generate, self._calculate_rewards)
        self._wrappers = [MethodWrapper(trainer, name, call) for name, call in zip(METHODS, wrappers, strict=True)]
        self._wrappers.append(MethodWrapper(trainer.accelerator, "clip_grad_norm_", self._clip_grad_norm))
        self._optimizer_wrapper: MethodWrapper | None = None

    def follow_optimizer(self, before_step: Callable[[], object]) -> None:
        """Call ``before_step`` before each step that DeepSpeed makes at the end of a backward pass.

        The trainer's event before the optimizer's step then comes after it. Other optimizers are left as they are.
        """
        self._leave_optimizer()
        partitioned = zero_optimizer(self._trainer.optimizer)
        if partitioned is None:
            return

        def step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            before_step()
            return original(*args, **kwargs)

        self._optimizer_wrapper = MethodWrapper(partitioned, "step", step)

    def _leave_optimizer(self) -> None:
        if self._optimizer_wrapper is not None:
            self._optimizer_wrapper.undo()
            self._optimizer_wrapper = None

    def detach(self) -> None:
        """Put the trainer's own methods back."""
        self.stop()
        self._leave_optimizer()
        for wrapper in self._wrappers:
            wrapper.undo()

    @property
    def recording(self) -> bool:
        """Return whether a step is being recorded."""
        return self._micro_batches is not None

    def start(self) -> None:
        """Record from now on, until ``finish`` or ``stop``."""
        self.stop()
        self._micro_batches = []

    def stop(self) -> None:
        """End the recording and free what was recorded."""
        self._micro_batches, self._current, self._clipped, self._problem = None, None, None, None

    def finish(self) -> CapturedStep:
        """Return the step recorded since ``start`` by all processes, once its gradient is accumulated and clipped.

        Raises ``CaptureError`` if the trainer's loss never asked for log-probabilities or asked for those of other rows
        than its own, or if recording failed.
        """
        micro_batches, clipped, problem = self._micro_batches, self._clipped, self._problem
        self.stop()
        with propagate_failures(self.mesh):
            if problem is not None:
                raise CaptureError(problem)
            return self._step_of(micro_batches, clipped)

    def _step_of(self, micro_batches: list[MicroBatch] | None, clipped: tuple[float, float] | None) -> CapturedStep:
        if not micro_batches or not all(micro_batch.scorings for micro_batch in micro_batches):
            raise CaptureError(
                f"{type(self._trainer).__name__} computed its loss without a call of {SCORE}; expected one, which "
                "gives the coefficients. Turn off use_liger_kernel, or a compute_loss of your own"
            )
        rows, model = concatenate([rollout_rows(x) for x in micro_batches]), self._trainer.model
        if self.mesh is not None:
            rows = concatenate(all_gather_values(self.mesh, rows.with_portable_images()))
        device, partitioned = self._trainer.accelerator.device, zero_optimizer(self._trainer.optimizer)
        if partitioned is not None:
            return captured_step(rows, device, *planned_step(partitioned, model), gradient_scale=1.0)
        norm, max_norm = clipped or (0.0, float("inf"))
        # The factor of torch.nn.utils.clip_grad_norm_.
        clip = min(1.0, max_norm / (norm + 1e-6))
        bound = None if max_norm == float("inf") else max_norm
        scale = clip * self._remaining_scale()
        return captured_step(rows, device, accumulated_gradient(model), clip, bound, gradient_scale=scale)

    def overflowed(self) -> bool:
        """Return whether a loss scaler will skip the optimizer's step, because a scaled gradient is not finite."""
        if getattr(self._trainer.accelerator, "scaler", None) is None:
            return False
        gradients = [p.grad for p in self._trainer.model.parameters() if p.grad is not None]
        return any(all_gather_values(self.mesh, not all(bool(to_local(g).isfinite().all()) for g in gradients)))

    def gradient_scale(self) -> float:
        """Return the factor by which gradients of this process's loss are too large: processes times loss scale."""
        accelerator = self._trainer.accelerator
        scaler = getattr(accelerator, "scaler", None)
        # DistributedDataParallel averages over processes whatever the loss, which trl's normalisations allow for.
        return accelerator.num_processes * (1.0 if scaler is None else float(scaler.get_scale()))

    def _remaining_scale(self) -> float:
        """Return the loss scale that is in the gradients: clipping takes it out, or else the optimizer's step."""
        scaler = getattr(self._trainer.accelerator, "scaler", None)
        if scaler is None:
            return 1.0
        optimizer = self._trainer.optimizer
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        state = scaler._per_optimizer_states.get(id(optimizer), {})
        unscaled = getattr(state.get("stage"), "name", "READY") != "READY"
        return 1.0 if unscaled else float(scaler.get_scale())

    @contextmanager
    def _noting_problems(self) -> Iterator[None]:
        """Keep an exception of the recording for ``finish``, so that the trainer does not see it."""
        try:
            yield
        except Exception as error:
            self._problem = self._problem or f"{type(error).__name__}: {error}"

    def _compute_loss(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._micro_batches is None or not torch.is_grad_enabled():
            return original(*args, **kwargs)
        with self._noting_problems():
            self._current = MicroBatch(kwargs["inputs"] if "inputs" in kwargs else args[1])
        try:
            loss = original(*args, **kwargs)
        except BaseException:
            self.stop()
            raise
        micro_batch, self._current = self._current, None
        if micro_batch is not None and self._micro_batches is not None:
            self._micro_batches.append(micro_batch)
        return loss

    def _score(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outputs = original(*args, **kwargs)
        if self._current is not None and torch.is_grad_enabled():
            with self._noting_problems():
                known = {name: x for name, x in kwargs.items() if name in self._signature.parameters}
                arguments = self._signature.bind(*args, **known).arguments
                self._current.watch({**arguments, **kwargs}, outputs, self._add_gradient)
        return outputs

    def _add_gradient(self, gradients: dict[int, Tensor], index: int, gradient: Tensor) -> None:
        with self._noting_problems():
            unscaled = gradient.detach() / self.gradient_scale()
            gradients[index] = unscaled if index not in gradients else gradients[index] + unscaled

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._rewards = None
        output = original(*args, **kwargs)
        with self._noting_problems():
            if self._rewards is not None:
                # The rewards are those of all processes, the output is this one's. The trainer shuffles and splits
                # every tensor of it in the same way, so that these stay with their rollouts.
                count, process = len(output["prompt_ids"]), self._trainer.accelerator.process_index
                output[REWARDS] = self._rewards[process * count : (process + 1) * count]
        with self._noting_problems():
            # Tokens do not tell prompts apart where an environment's reset or a rollout_func gives each rollout another
            # beginning, or where images do.
            if any(getattr(self._trainer, name, None) for name in ("environment_factories", "rollout_func", "_is_vlm")):
                output[GROUPS] = self._prompt_numbers(output["prompt_ids"])
        with self._noting_problems():
            # One row of the data set for each rollout, with all its columns.
            rows = kwargs["inputs"] if "inputs" in kwargs else args[0]
            sources = [source_of(row) for row in rows]
            if any(sources) and len(sources) == len(output["prompt_ids"]):
                output[SOURCES] = sources
        return output

    def _prompt_numbers(self, prompt_ids: Tensor) -> Tensor:
        """Return a number for the prompt of each of this process's rollouts (n,), no earlier generation's.

        The trainer samples the completions of a prompt one after another over the processes' rows.
        """
        count, accelerator = len(prompt_ids), self._trainer.accelerator
        first = (self._generations * accelerator.num_processes + accelerator.process_index) * count
        self._generations += 1
        return torch.arange(first, first + count, device=prompt_ids.device) // self._trainer.num_generations

    def _calculate_rewards(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        by_function = original(*args, **kwargs)
        with self._noting_problems():
            weights = self._trainer.reward_weights.to(by_function)
            rewards = (by_function * weights).nansum(dim=1)
            self._rewards = rewards.masked_fill(by_function.isnan().all(dim=1), torch.nan)
        return by_function

    def _clip_grad_norm(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        norm = original(*args, **kwargs)
        if self._micro_batches is not None:
            with self._noting_problems():
                max_norm = kwargs["max_norm"] if "max_norm" in kwargs else args[1]
                self._clipped = float(norm), float(max_norm)
        return norm
