"""Attach entropy influence to a live TRL training run: measured steps are logged with its metrics and stored.

The mathematics runs on a template of the model with the live tensors, never on the trainer's own module, and E is
sampled on a separate random state, so training proceeds exactly as without the callback. With several processes, each
holds the full model or its shard of it and does a share of the work; only the first warns and writes.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed.device_mesh import DeviceMesh
from transformers import TrainerCallback

from fx_influence.distributed.collectives import propagate_failures
from fx_influence.distributed.consistency import check_consistent
from fx_influence.functional import make_functional
from fx_influence.interop.live.guard import Failure, attempt, preserve_random_state, reason, warn
from fx_influence.interop.live.measurement import MeasurementSettings, PendingStep
from fx_influence.interop.live.metrics import PREFIX, LogSelection
from fx_influence.interop.live.policy_checks import check_measured_objective
from fx_influence.interop.live.processes import all_gather_values
from fx_influence.interop.live.step import on_host
from fx_influence.interop.trackers import MAX_FALL, TrackerReports
from fx_influence.interop.trl.attachment import calling_trainer, free_name
from fx_influence.interop.trl.capture.recorder import Capture
from fx_influence.interop.trl.measurement import HeldOutSampling, TrlStepMeasurement
from fx_influence.interop.trl.preflight.generation import check_generation, check_images
from fx_influence.interop.trl.preflight.processes import check_prepared, check_processes, check_sharded_settings
from fx_influence.interop.trl.preflight.trainer import check_kind, check_steps
from fx_influence.interop.trl.processes import mesh_of
from fx_influence.interop.trl.prompts import BATCH, evaluation_prompts
from fx_influence.interop.trl.store import training
from fx_influence.interop.trl.store.contents import settings_of_plan
from fx_influence.interop.trl.store.steps import TrainingSteps
from fx_influence.interop.trl.window import check_window, window_recorder
from fx_influence.objectives import Entropy
from fx_influence.types import Params, Preconditioner

Value = TypeVar("Value")


class EntropyInfluence(TrainerCallback):
    """Measure every ``every``-th optimizer step of a ``GRPOTrainer`` or ``RLOOTrainer``: why its entropy changes.

    Before the step it takes the update batch U with the coefficients of the trainer's own loss, its gradient and
    clipping, and AdamW's state, and calls ``fx.influence``. The evaluation batch E is U itself, cross-fitted, or fresh
    completions of ``eval_prompts``. After the step it measures the change of entropy on the same E. Up to 16 figures
    are logged through the trainer as ``entropy_influence/...``; all go to ``history`` and into a run directory of the
    step, which ``fx.load_run`` and ``fx-influence report`` read. U's passes run in the trainer's own precision, so that
    only rounding stays ``unattributed``; E's passes are in float32 or wider. One warning is issued if rounding swallows
    more than a tenth of a step, as it does with weights trained in bfloat16.

    With several processes (DistributedDataParallel, DeepSpeed's ZeRO-1 and 2; FSDP2 and ZeRO-3 with the batch as E), U
    and E are the rollouts of all: every process attaches a callback with the same settings, samples its share of E and
    has the full ``history``; the first process stores.

    A failure while measuring, such as influences that do not add up, becomes one warning with the step and the reason:
    training continues as without the callback, and the step is missing from ``history``. ``KeyboardInterrupt`` passes.
    A step that a loss scaler skips is missing too. Completions that are not sampled from the policy end the measuring,
    not the training run.

    Args:
        every: steps n, 2n, ... are measured, as ``logging_steps`` counts.
        eval_prompts: ``"batch"`` generates nothing: the rollouts of the step are E, and each one's influence is taken
            over the other prompts, of which a step needs four. Where a generation serves several optimizer steps, its
            rollouts are weighted by the policy over the one that sampled them, whose log-probabilities the trainer
            keeps; with ``num_iterations`` above 1 the policy was trained on these very rollouts before, which weights
            do not correct. It is the only choice with tools, environments or a ``rollout_func``. Else held-out texts or
            conversations in the trainer's own format, or a data set with a column ``prompt``; None takes the trainer's
            ``eval_dataset``. Many prompts with few completions each give smaller errors than the reverse.
        completions_per_prompt: number of completions of each prompt.
        objective: how the entropy is estimated, as for ``fx.influence``.
        preconditioner: as for ``fx.influence``.
        matrix: as for ``fx.influence``; also store pairwise influences.
        chunk_size: rows per forward, as for ``fx.influence``.
        memory_budget: bytes, as for ``fx.influence``.
        out: directory of the stored steps, by default ``entropy_influence`` in the trainer's ``output_dir``. If it
            holds steps of another training run, the first free one of ``..._2``, ``..._3`` is used; a resumed training
            run continues in its own directory.
        save_state: also store the model, its optimizer and v_baseline before each measured step, so that the step can
            be repeated from its plan.yaml.
        seed: of E; the step's number is added to it.
        name: stands between ``entropy_influence/`` and the metrics' names in the log; a trainer's second callback is
            named "2" by default, and its directory ``entropy_influence-2``.
        max_prompts: number of prompts taken from the trainer's ``eval_dataset``, evenly, or from the start of a stream.
        max_fall: share of the entropy that a step may take before the tracker in the trainer's ``report_to``, trackio
            or W&B, gets an alert; see ``interop.trackers``.
        region_stderr: also give the sums over the four regions of tokens standard errors, at the cost of two reverse
            passes over U; they have none with ``matrix``.
        window: K, to attribute the entropy after K steps to each of them, by ``fx.influence_over_steps``. The ledger of
            the measured step that ends them has both accounts. See ``interop/window`` for what is recorded and exact.

    Attributes:
        history: the metrics of every measured step, with ``step``, its number.

    Raises:
        ValueError: for numbers out of range and a ``name`` that cannot be one.

    Example:
        >>> EntropyInfluence(every=5, eval_prompts=["1+1=", "2+3="]).every
        5
    """

    _measurement_type = TrlStepMeasurement

    def __init__(
        self,
        every: int = 10,
        eval_prompts: Any = BATCH,
        *,
        completions_per_prompt: int = 4,
        objective: Entropy = Entropy(),
        preconditioner: Preconditioner = "frozen",
        matrix: bool = False,
        chunk_size: int | None = None,
        memory_budget: int | None = None,
        out: str | Path | None = None,
        save_state: bool = False,
        seed: int = 0,
        name: str | None = None,
        max_prompts: int = 64,
        max_fall: float = MAX_FALL,
        region_stderr: bool = True,
        window: int | None = None,
    ) -> None:
        counts = {"every": every, "completions_per_prompt": completions_per_prompt, "max_prompts": max_prompts}
        for field, value in counts.items():
            if value < 1:
                raise ValueError(f"{field} is {value}; expected at least 1. Pass a positive number")
        if name is not None and not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"name is {name!r}; expected letters, digits, dots, hyphens and underscores. Rename it")
        check_measured_objective(objective)
        self.every = every
        self.history: list[dict[str, float]] = []
        self.name, self._requested_name = name or "", name
        self._eval_prompts, self._max_prompts = eval_prompts, max_prompts
        self._completions_per_prompt, self._seed = completions_per_prompt, seed
        self._settings = MeasurementSettings(
            objective, preconditioner, matrix, chunk_size, memory_budget, region_stderr
        )
        self._out, self._save_state, self._max_fall, self._window = out, save_state, max_fall, window
        self._trainer: Any = None
        self._pending: PendingStep | None = None

    def attach(self, trainer: Any) -> EntropyInfluence:
        """Measure this trainer's steps from now on, and return this callback.

        Several may be attached to one trainer, each under its own name, and detached in any order. One that is in
        ``GRPOTrainer(callbacks=[...])`` attaches itself when training begins; errors of this method are warnings there.

        Raises:
            TypeError: for a trainer of another kind or with another optimizer than AdamW.
            ValueError: for a trainer whose steps cannot be attributed (active dropout or noise in its forward,
                a model that ``make_functional`` refuses, or that FSDP1 shards) or whose completions are
                not sampled from its policy, naming the remedy; for ``eval_prompts`` that are not prompts, or held out
                with a model that FSDP2 or ZeRO-3 shards; if it is attached already or its name is taken; and if
                processes attach with different settings.
        """
        if trainer is self._trainer:
            raise ValueError(f"callback is attached to this {type(trainer).__name__} already; expected once. Detach it")
        check_kind(trainer)
        check_processes(trainer)
        mesh = mesh_of(trainer)
        settings, sampling = self._settings, (self._eval_prompts, self._max_prompts)
        with propagate_failures(mesh), preserve_random_state(trainer.accelerator.device):
            check_steps(trainer)
            pairwise = settings.matrix and settings.objective.estimator == "per_decision"
            prompts, note = evaluation_prompts(trainer, *sampling, self._save_state, pairwise)
            check_generation(trainer, prompts)
            check_images(trainer, prompts, settings.matrix)
            make_functional(trainer.model, position_ids=False)
            check_sharded_settings(trainer, prompts, settings.matrix, self._save_state)
            check_window(trainer, self._window, settings.preconditioner)
            self._check_processes_agree(mesh, prompts)
            attached = (x for x in trainer.callback_handler.callbacks if isinstance(x, EntropyInfluence))
            name = free_name(self._requested_name, {x.name for x in attached if x._trainer is trainer})
        if self._trainer is not None:
            self.detach()
        self._prompts, self.name = prompts, name
        self._trainer, self._capture = trainer, Capture(trainer)
        self._begin_training(None)
        if not any(callback is self for callback in trainer.callback_handler.callbacks):
            trainer.add_callback(self)
        if note is not None:
            self._warn(note)
        return self

    def _check_processes_agree(self, mesh: DeviceMesh | None, prompts: list[Any] | None) -> None:
        if mesh is not None:
            sampling = {"completions_per_prompt": self._completions_per_prompt, "seed": self._seed}
            settings = {**sampling, **self._settings._asdict()}
            check_consistent(mesh, {"every": self.every, "eval_prompts": prompts, **settings})

    def detach(self) -> None:
        """Leave the trainer as it was before ``attach``; do nothing if this callback is not attached."""
        if self._trainer is None:
            return
        self._capture.detach()
        self._discard_window("the callback is detached")
        if any(callback is self for callback in self._trainer.callback_handler.callbacks):
            self._trainer.remove_callback(self)
        self._trainer, self._pending = None, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the calling trainer if not yet attached, and check the optimizer, which it creates only now."""
        try:
            self._attach_to_caller(args, state)
        except Exception as error:
            self._measuring = False
            if state.is_world_process_zero:
                warn(f"no step of this training run is measured: {reason(error)}")

    def _attach_to_caller(self, args: Any, state: Any) -> None:
        trainer = calling_trainer(self) or self._trainer
        if trainer is None:
            raise ValueError("the trainer of this callback is unknown; expected one. Call attach(trainer)")
        if trainer is not self._trainer:
            self.detach()
            self.attach(trainer)
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        resumed = training.read_training_id(checkpoint, self.name, state.log_history) if state.global_step else None
        self._begin_training(resumed)
        check_prepared(trainer, self._capture.mesh)
        self._capture.follow_optimizer(lambda: self.on_pre_optimizer_step(args, state, None))

    def _begin_training(self, resumed_id: str | None) -> None:
        sampling = HeldOutSampling(self._prompts, self._completions_per_prompt, self._seed)
        settings = self._settings, self._capture.mesh, self._warn
        self._measurement = self._measurement_type(self._trainer, sampling, *settings)
        self._training_id = resumed_id or uuid.uuid4().hex
        self._steps = TrainingSteps(self._trainer, self._out, self.name, self._training_id, self._warn)
        options = self._window, self.every, self._measurement, self._steps.window_folder, self._warn
        self._windows = window_recorder(self._trainer, *options)
        self._environment = training.environment_of(self._trainer, self._training_id)
        self._measuring, self._overflow_warned, self._pending = True, False, None
        self._log_selection, self._reports = LogSelection(), TrackerReports(self._max_fall, self._warn)
        self._capture.stop()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Store the training run's id in the checkpoint, so that a resumption continues in the same directory."""
        if self._trainer is None or not self._is_main:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        # If this fails, a resumption stores its steps in another directory, which is no reason to end the training run.
        with suppress(OSError, ValueError):
            if checkpoint.is_dir():
                training.write_training_id(checkpoint, self.name, self._training_id)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the files of a window that has not ended."""
        if self._trainer is not None:
            self._discard_window("the training run has ended")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the micro-batches of a step that is to be measured."""
        if self._trainer is None:
            return
        # An interrupted step leaves its recording.
        self._pending = None
        self._capture.stop()
        step = state.global_step + 1
        in_window = self._windows is not None and self._windows.covers(step)
        if self._measuring and (in_window or step % self.every == 0):
            self._capture.start()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attribute the step that the optimizer is about to make."""
        if self._trainer is None or not self._capture.recording:
            return
        step = state.global_step + 1
        self._pending = self._guarded(step, lambda: self._before_update(step))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the change of entropy over the step; store and log it."""
        if self._trainer is None or self._pending is None:
            return
        pending, self._pending = self._pending, None
        step = pending.measured.step
        metrics = self._guarded(step, lambda: self._after_update(pending))
        if metrics is None:
            return
        prefix = f"{PREFIX}{self.name}/" if self.name else PREFIX
        for name, value in self._log_selection.of_step(metrics).items():
            self._trainer._metrics["train"][prefix + name].append(value)
        self.history.append({"step": step, **metrics})

    def _before_update(self, step: int) -> PendingStep | None:
        if self._skipped_by_scaler(step):
            return None

        def store_state(baseline: Params) -> None:
            self._steps.store(step).write_state(self._trainer, baseline)

        captured = self._capture.finish()
        if self._windows is not None:
            self._windows.record(step, captured)
        if step % self.every:
            return None
        storing = self._save_state and self._is_main
        return self._measurement.before_update(step, captured, store_state if storing else None)

    def _after_update(self, pending: PendingStep) -> dict[str, float]:
        measured = on_host(self._measurement.after_update(pending))
        metrics = all_gather_values(self._capture.mesh, measured.metrics())[0]
        if self._is_main:
            plan = settings_of_plan(measured, self._trainer, self._settings)
            window = None if self._windows is None else self._windows.account(pending)
            entry = self._steps.store(measured.step).write(measured, plan, self._trainer, self._environment, window)
            self._reports.write(entry, self._trainer.args.report_to)
        return metrics

    def _discard_window(self, why: str) -> None:
        if self._windows is not None:
            self._windows.interrupt(self._trainer.state.global_step, why)

    def _guarded(self, step: int, work: Callable[[], Value | None]) -> Value | None:
        """Return the result of ``work``, or None with one warning if it fails on any process."""
        result = attempt(work, self._trainer.accelerator.device, self._capture.mesh)
        if not isinstance(result, Failure):
            return result
        self._measuring = self._measuring and not result.ends_measuring
        self._capture.stop()
        self._steps.discard(step)
        self._warn(result.sentence(step))
        return None

    def _skipped_by_scaler(self, step: int) -> bool:
        """Return whether a loss scaler skips this step, which then has no influences; warn once per training run."""
        if not self._capture.overflowed():
            return False
        self._capture.stop()
        if not self._overflow_warned:
            self._warn(f"step {step} is not attributed: the loss scaler skips it, as it may others without a warning")
        self._overflow_warned = True
        return True

    @property
    def _is_main(self) -> bool:
        """Return whether this process is the one that warns and writes."""
        return bool(self._trainer.accelerator.is_main_process)

    def _warn(self, text: str) -> None:
        if self._is_main:
            warn(text)
