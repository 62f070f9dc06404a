"""Entropy influence inside a live TRL run: attached to a trainer, logged with its metrics, stored step by step.

The mathematics runs on a template of the model fed the live tensors, never on the trainer's own module, and E is drawn
on a random state of its own, so that a training goes exactly as it would without. Of several processes each has the
whole model; they share the work, and the first alone warns and writes.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
import time
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import TrainerCallback

from fx_influence._influence import influence
from fx_influence.autodiff.gram import MEMORY_BUDGET
from fx_influence.batching.rows import select_rows
from fx_influence.core.influence_display import CONDITIONING_REMEDY, ILL_CONDITIONED
from fx_influence.core.tree import promote
from fx_influence.distributed.collectives import RankError, propagate_failures
from fx_influence.distributed.consistency import check_consistent
from fx_influence.distributed.engine import make_engine
from fx_influence.estimators.entropy import entropy_estimate
from fx_influence.functional import make_functional
from fx_influence.interop.optimizers import adamw_state, require_adamw
from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.trl.capture import Capture, CapturedStep, CaptureError
from fx_influence.interop.trl.checks import calling_trainer, check_kind, check_scored, check_steps, rounding_bound
from fx_influence.interop.trl.generation import GenerationError, check_drawn, check_explained, check_generation
from fx_influence.interop.trl.metrics import MeasuredStep
from fx_influence.interop.trl.precision import STEP_LOST, in_trainers_precision, rounding_warning, step_rounding
from fx_influence.interop.trl.prompts import read_prompts_of
from fx_influence.interop.trl.ranks import mesh_of, of_all, own_rows
from fx_influence.interop.trl.sampling import held_out_rollouts, random_state
from fx_influence.interop.trl.store import StepStore, note_training, noted_training, training_directory
from fx_influence.objectives import Entropy
from fx_influence.optim.adamw import adamw_decompose
from fx_influence.perturbation import snis_delta
from fx_influence.policy.policy import Policy
from fx_influence.policy.precision import in_float32
from fx_influence.types import (
    Batch,
    Gradients,
    IdentityError,
    Params,
    Preconditioner,
    TokenValues,
)

logger = logging.getLogger(__name__)
Value = TypeVar("Value")

PREFIX = "entropy_influence/"

CHECKED_ROWS = 4
"""About how many rollouts of a step are scored again, to see that the trainer's forward is the policy's."""


class _Begun(NamedTuple):
    """A step measured up to the optimizer's own step; ``batch_e``: this process's rows of E, ``direction``: v."""

    measured: MeasuredStep
    params: Params
    batch_e: Batch
    direction: Params


class EntropyInfluence(TrainerCallback):
    """Measures every ``every``-th optimizer step of a ``GRPOTrainer`` or ``RLOOTrainer``: why its entropy changes.

    Before the step: U with the coefficients of the trainer's own loss, its gradient and clipping, AdamW's state, and
    fresh completions E of ``eval_prompts``; ``fx.influence`` of one on the other. After it: the measured change of
    entropy on the same E. Both are logged through the trainer as ``entropy_influence/...``, kept in ``history``, and
    stored as a run directory for each measured step, which ``fx.load_run`` and ``fx-influence report`` read.
    U's passes run in the trainer's own precision, so that what stays ``unattributed`` is rounding; E's are the
    function's. Where rounding swallows more than a tenth of a step, as it does with weights trained in bfloat16, a
    warning says so, once.

    In several processes (DistributedDataParallel) U and E are the rollouts of all: every process attaches one of these,
    with the same settings, draws its share of E and has the whole ``history``; the first stores.

    ``every``: steps n, 2n, ... are measured, as ``logging_steps`` counts. ``eval_prompts``: texts or conversations in
    the trainer's own format, or a data set with a column ``prompt``; None takes the trainer's ``eval_dataset``. Many
    prompts with few completions each give smaller errors than the reverse. ``max_prompts``: how many are taken of the
    trainer's ``eval_dataset``, evenly, and of a stream, whose first they are.
    ``completions_per_prompt``: of each. ``objective``, ``preconditioner``, ``matrix``, ``chunk_size``,
    ``memory_budget``: as for ``fx.influence``. ``out``: directory of the runs, by default ``entropy_influence`` in the
    trainer's ``output_dir``; where another training's are in it, the next of ``..._2``, ``..._3`` that is free, and a
    training that is resumed goes on in its own. ``name``: stands between ``entropy_influence/`` and the figures' names
    in the log; the second of a trainer's is "2" by default, and its directory ``entropy_influence-2``.
    ``save_state``: also store the model, its optimizer and v_baseline before each measured step, so that the step's
    plan.yaml repeats it from nothing. ``seed``: of E, with the step's number.

    Whatever goes wrong in measuring, parts that do not add up included, is one warning with the step and the reason:
    the training goes on as it would without, and the step is missing from ``history``. ``KeyboardInterrupt`` passes. A
    step that a loss scaler skips is missing too. Completions that are not drawn from the policy end the measuring, not
    the training.
    Raises ``ValueError`` for numbers out of range and a ``name`` that is none.

    Example:
        >>> EntropyInfluence(every=5, eval_prompts=["1+1=", "2+3="]).every
        5
    """

    def __init__(
        self,
        every: int = 10,
        eval_prompts: Any = None,
        *,
        completions_per_prompt: int = 4,
        objective: Entropy = Entropy(),
        preconditioner: Preconditioner = "frozen",
        matrix: bool = False,
        chunk_size: int | None = None,
        memory_budget: int = MEMORY_BUDGET,
        out: str | Path | None = None,
        save_state: bool = False,
        seed: int = 0,
        name: str | None = None,
        max_prompts: int = 64,
    ) -> None:
        counts = {"every": every, "completions_per_prompt": completions_per_prompt, "max_prompts": max_prompts}
        for field, value in counts.items():
            if value < 1:
                raise ValueError(f"{field} is {value}; give at least 1")
        if name is not None and not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"name is {name!r}; give letters, digits, dots, hyphens and underscores")
        self.every = every
        self.history: list[dict[str, float]] = []
        self.name, self._asked_name = name or "", name
        self._eval_prompts, self._each, self._max_prompts = eval_prompts, completions_per_prompt, max_prompts
        self._reading: dict[str, Any] = {"objective": objective, "chunk_size": chunk_size}
        self._attributing: dict[str, Any] = {
            "preconditioner": preconditioner,
            "matrix": matrix,
            "memory_budget": memory_budget,
        }
        self._out, self._save_state, self._seed = out, save_state, seed
        self._trainer: Any = None
        self._policy: Policy | None = None
        self._begun: _Begun | None = None
        self._directory: Path | None = None
        self._rounding_told = self._conditioning_told = False

    def attach(self, trainer: Any) -> EntropyInfluence:
        """Measure this trainer's steps from now on; returns itself.

        Several may be attached to one trainer, each under a name of its own, and detached in any order. One that stands
        in ``GRPOTrainer(callbacks=[...])`` attaches itself where a training begins; what is refused here is a warning
        there.

        Raises ``TypeError`` for a trainer of another kind or with another optimizer than AdamW, and ``ValueError`` for
        one whose steps cannot be attributed (active dropout, noise or images in its forward, a model that
        ``make_functional`` refuses or that DeepSpeed or FSDP shards) or whose completions are not drawn from its
        policy, naming the remedy; for prompts that are none; where it is attached already or its name is taken; and
        where processes attach with different settings.
        """
        if trainer is self._trainer:
            raise ValueError(f"this EntropyInfluence is attached to this {type(trainer).__name__} already; detach it")
        check_kind(trainer)
        mesh = mesh_of(trainer)
        with propagate_failures(mesh), random_state(trainer):
            check_steps(trainer)
            check_generation(trainer)
            make_functional(trainer.model, position_ids=False)
            prompts, note = read_prompts_of(trainer, self._eval_prompts, self._max_prompts)
            self._check_processes_agree(mesh, prompts)
            name = self._free_name(trainer)
        if self._trainer is not None:
            self.detach()
        self._prompts, self.name = prompts, name
        self._trainer, self._capture = trainer, Capture(trainer)
        self._begin_training(None)
        if not any(callback is self for callback in trainer.callback_handler.callbacks):
            trainer.add_callback(self)
        if note is not None:
            self._tell(note)
        return self

    def _check_processes_agree(self, mesh: DeviceMesh | None, prompts: list[Any]) -> None:
        if mesh is not None:
            own = {"every": self.every, "eval_prompts": prompts, "completions_per_prompt": self._each}
            check_consistent(mesh, {**own, "seed": self._seed, **self._reading, **self._attributing})

    def _free_name(self, trainer: Any) -> str:
        callbacks = trainer.callback_handler.callbacks
        taken = {x.name for x in callbacks if isinstance(x, EntropyInfluence) and x._trainer is trainer}
        if self._asked_name is None:
            return next(name for name in itertools.chain([""], map(str, itertools.count(2))) if name not in taken)
        if self._asked_name in taken:
            raise ValueError(
                f"name is {self._asked_name!r}, as of another EntropyInfluence of this trainer; give another, or "
                "detach that one"
            )
        return self._asked_name

    def detach(self) -> None:
        """Leave the trainer as it was before ``attach``; nothing where there is none."""
        if self._trainer is None:
            return
        self._capture.detach()
        if any(callback is self for callback in self._trainer.callback_handler.callbacks):
            self._trainer.remove_callback(self)
        self._trainer, self._begun = None, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the trainer that calls where that has not been done, and see what it makes only now."""
        try:
            self._meet(args, state)
        except Exception as error:
            self._measuring = False
            if state.is_world_process_zero:
                warn(f"nothing of this training is measured: {_reason(error)}")

    def _meet(self, args: Any, state: Any) -> None:
        trainer = calling_trainer(self) or self._trainer
        if trainer is None:
            raise ValueError("no trainer is found that this is a callback of; use attach(trainer)")
        if trainer is not self._trainer:
            self.detach()
            self.attach(trainer)
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        resumed = noted_training(checkpoint, self.name, state.log_history) if state.global_step else None
        self._begin_training(resumed)
        require_adamw(trainer.optimizer)

    def _begin_training(self, resumed: str | None) -> None:
        self._policy, self._begun, self._directory = None, None, None
        self._training = resumed or uuid.uuid4().hex
        self._measuring, self._explained, self._overflow_told, self._rounding_told = True, False, False, False
        self._conditioning_told = False
        self._capture.stop()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note in the checkpoint which training it is of, so that a resumption continues its steps."""
        if self._trainer is None or not self._first:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        # Where it cannot, a resumption stores its steps in a directory of their own.
        with suppress(OSError, ValueError):
            if checkpoint.is_dir():
                note_training(checkpoint, self.name, self._training)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the micro-batches of a step that is to be measured."""
        if self._trainer is None:
            return
        # What an interrupted step has left.
        self._begun = None
        self._capture.stop()
        if self._measuring and (state.global_step + 1) % self.every == 0:
            self._capture.start()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attribute the step that the optimizer is about to make."""
        if self._trainer is None or not self._capture.recording:
            return
        step = state.global_step + 1
        self._begun = self._safely(step, lambda: self._begin(step))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure what the step did to the entropy; store and log."""
        if self._trainer is None or self._begun is None:
            return
        begun, self._begun = self._begun, None
        step = begun.measured.step
        figures = self._safely(step, lambda: self._end(begun))
        if figures is None:
            return
        prefix = f"{PREFIX}{self.name}/" if self.name else PREFIX
        for name, value in figures.items():
            self._trainer._metrics["train"][prefix + name].append(value)
        self.history.append({"step": step, **figures})

    def _safely(self, step: int, work: Callable[[], Value | None]) -> Value | None:
        """What ``work`` gives, or None with one warning where it fails on any process; no trace in the training."""
        try:
            with propagate_failures(self._capture.mesh), random_state(self._trainer):
                return work()
        except Exception as error:
            reason, memory = _reason(error), isinstance(error, torch.OutOfMemoryError)
            self._measuring = self._measuring and not isinstance(error, GenerationError)
        # Only now, when nothing refers to the tensors of the frames that failed.
        self._capture.stop()
        if memory:
            torch.cuda.empty_cache()
        if self._first and self._directory is not None:
            StepStore(self._directory, step).discard()
        if self._measuring:
            self._tell(f"step {step} is not attributed: {reason}")
        else:
            self._tell(f"step {step} and those after it are not attributed: {reason}")
        return None

    def _tell(self, text: str) -> None:
        if self._first:
            warn(text)

    def _overflowed(self, step: int) -> bool:
        """Whether a loss scaler skips this step, which then has no influences; told once a training."""
        if not self._capture.overflowed():
            return False
        self._capture.stop()
        if not self._overflow_told:
            self._tell(f"step {step} is not attributed: the loss scaler skips it, as it will others, untold")
        self._overflow_told = True
        return True

    def _end(self, begun: _Begun) -> dict[str, float]:
        measured = self._finished(begun)
        figures = of_all(self._capture.mesh, measured.metrics())[0]
        if self._first:
            self._store(measured.step).write(measured, self._plan(measured), self._trainer, self._training)
        return figures

    def _begin(self, step: int) -> _Begun | None:
        start = time.perf_counter()
        if self._overflowed(step):
            return None
        trainer, captured, mesh = self._trainer, self._capture.finish(), self._capture.mesh
        if self._policy is None:
            self._policy = make_functional(trainer.model, position_ids=False)[0]
        params = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
        _check_finite(captured.gradient)
        opt_state = adamw_state(trainer.optimizer, trainer.model)
        captured = self._checked(captured, params)
        rollouts = held_out_rollouts(trainer, self._prompts, self._each, self._seed + step, mesh)
        # What pads is masked, so any token does.
        batch_e = collate(rollouts, pad_id=0, device=captured.batch.input_ids.device)
        own_e = own_rows(batch_e, mesh)
        out = influence(
            params,
            own_rows(captured.batch, mesh),
            own_e,
            opt_state,
            apply=in_trainers_precision(self._policy, trainer.accelerator),
            grad=captured.gradient,
            max_grad_norm=captured.max_grad_norm,
            temperature=trainer.temperature,
            mesh=mesh,
            **self._attributing,
            **self._reading,
        )
        self._tell_conditioning(step, float(out.conditioning))
        raised, policy = in_float32(params, self._policy, batch_e)
        passes = make_engine(raised, policy, trainer.temperature, self._reading["chunk_size"], mesh)
        values = passes.values(raised, batch_e)
        rollouts = self._drawn_from_policy(rollouts, values, batch_e, params)
        entropy = entropy_estimate(values, batch_e, self._reading["objective"].normalize).item()
        if self._save_state and self._first:
            preconditioner = self._attributing["preconditioner"]
            parts = adamw_decompose(captured.gradient, opt_state, params, preconditioner, captured.max_grad_norm)
            self._store(step).write_state(trainer, parts.baseline)
        seconds = time.perf_counter() - start
        measured = MeasuredStep(step, opt_state.lr, captured, rollouts, out, entropy, None, seconds)
        v = adamw_decompose(captured.gradient, opt_state, params, "frozen", captured.max_grad_norm).direction
        return _Begun(measured, {name: p.clone() for name, p in params.items()}, own_e, v)

    def _tell_conditioning(self, step: int, share: float) -> None:
        """Log once a training where single rollouts are not to be read; a training's first steps are as a rule so."""
        if share > ILL_CONDITIONED and self._first and not self._conditioning_told:
            logger.warning(
                f"step {step}: {share:.0%} of the sum of |influence| rests on denominators that AdamW has from this "
                f"very gradient, so parts of rollouts are large and cancel. {CONDITIONING_REMEDY}"
            )
            self._conditioning_told = True

    def _checked(self, captured: CapturedStep, params: Params) -> CapturedStep:
        """The step with entropies where the trainer computes none; raises where its forward is not the policy's."""
        trainer, batch = self._trainer, captured.batch
        assert self._policy is not None
        passes = make_engine(params, self._policy, trainer.temperature, self._reading["chunk_size"], None)
        # Some rows tell; all where their entropies are wanted.
        count = len(batch.input_ids)
        some = slice(None) if captured.entropies is None else slice(0, count, max(1, count // CHECKED_ROWS))
        part = select_rows(batch, some)
        if not part.completion_mask.any():
            none = torch.zeros_like(captured.logprobs)
            return captured if captured.entropies is not None else captured._replace(entropies=none)
        values = passes.values(params, part)
        mask = part.completion_mask
        check_scored(captured.logprobs[some][mask], values.logprobs[mask], rounding_bound(trainer))
        if captured.entropies is not None:
            return captured
        return captured._replace(entropies=values.entropies.masked_fill(~mask, 0.0).to(captured.logprobs.dtype))

    def _drawn_from_policy(
        self, rollouts: list[Rollout], values: TokenValues, batch_e: Batch, params: Params
    ) -> list[Rollout]:
        """E as it is stored; raises ``GenerationError`` where its tokens were not drawn from the policy."""
        drawn = [r.behaviour_logprobs for r in rollouts]
        known = [x for x in drawn if x is not None]
        if len(known) == len(drawn):
            behaviour = torch.tensor([x for row in known for x in row], dtype=torch.float64)
            scored = values.logprobs[batch_e.completion_mask].double().cpu()
            told = behaviour.isfinite()
            check_drawn(behaviour[told], scored[told], rounding_bound(self._trainer))
        elif not self._explained:
            temperature, chunk_size = self._trainer.temperature, self._reading["chunk_size"]
            assert self._policy is not None
            policy = self._policy

            def logprobs_at(factor: float) -> torch.Tensor:
                passes = make_engine(params, policy, factor * temperature, chunk_size, None)
                return passes.values(params, batch_e).logprobs

            check_explained(logprobs_at, batch_e)
            self._explained = True
        # In the trainer's precision, which is not the one that a replay scores in.
        return [dataclasses.replace(r, behaviour_logprobs=None) for r in rollouts]

    def _finished(self, begun: _Begun) -> MeasuredStep:
        if self._trainer.accelerator.optimizer_step_was_skipped:
            return begun.measured
        start = time.perf_counter()
        live = dict(self._trainer.model.named_parameters())
        moved = {name: live[name].detach().to(promote(p.dtype)) - p for name, p in begun.params.items()}
        policy = self._policy
        assert policy is not None
        measured_change = snis_delta(
            begun.params,
            moved,
            1.0,
            begun.batch_e,
            apply=policy,
            temperature=self._trainer.temperature,
            mesh=self._capture.mesh,
            **self._reading,
        )
        seconds = begun.measured.seconds + time.perf_counter() - start
        lost = step_rounding(moved, begun.direction, begun.measured.lr)
        if lost > STEP_LOST and not self._rounding_told:
            self._rounding_told = True
            self._tell(rounding_warning(begun.measured.step, begun.params, lost))
        return begun.measured._replace(measured_change=measured_change, seconds=seconds, step_rounding=lost)

    @property
    def _first(self) -> bool:
        """Whether this process is the one that warns and writes."""
        return bool(self._trainer.accelerator.is_main_process)

    def _store(self, step: int) -> StepStore:
        if self._directory is None:
            name = f"entropy_influence-{self.name}" if self.name else "entropy_influence"
            base = Path(self._trainer.args.output_dir) / name if self._out is None else Path(self._out)
            self._directory = training_directory(base, self._training)
            if self._directory != base:
                self._tell(f"{base} holds steps of another training; those of this one go to {self._directory}")
        return StepStore(self._directory, step)

    def _plan(self, measured: MeasuredStep) -> dict[str, Any]:
        """The fields of the step's plan.yaml that depend on the settings."""
        attributing = {name: value for name, value in self._attributing.items() if name != "matrix"}
        return {
            "max_grad_norm": measured.captured.max_grad_norm,
            "temperature": self._trainer.temperature,
            "max_new_tokens": self._trainer.max_completion_length,
            **self._reading,
            **attributing,
        }


def warn(text: str) -> None:
    """Warn, without ending anything: where warnings are errors, log."""
    try:
        warnings.warn(text, stacklevel=3)
    except Exception:
        logger.warning(text)


def _reason(error: Exception) -> str:
    told = isinstance(error, (ValueError, TypeError, CaptureError, RankError, IdentityError)) and str(error)
    return str(error) if told else f"{type(error).__name__}: {error}"


def _check_finite(gradient: Gradients) -> None:
    for name, g in gradient.items():
        if g is not None and not g.isfinite().all():
            raise ValueError(f"the gradient of {name} is not finite, so that the step has no direction")
