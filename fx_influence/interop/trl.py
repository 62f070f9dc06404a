"""Entropy influence inside a live TRL run: attached to a trainer, logged with its metrics, stored step by step.

The mathematics runs on a template of the model fed the live tensors, never on the trainer's own module, and E is drawn
on a random state of its own, so that a training goes exactly as it would without. Of several processes each has the
whole model; they share the work, and the first alone warns and writes.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import TrainerCallback

from fx_influence.adamw import adamw_decompose
from fx_influence.delta import snis_delta
from fx_influence.entropy import entropy_estimate
from fx_influence.influence import influence
from fx_influence.interop.optim import adamw_state, require_adamw
from fx_influence.interop.rollouts import collate
from fx_influence.interop.trl_capture import METHODS, Capture
from fx_influence.interop.trl_ranks import check_processes, mesh_of, of_all, own_rows
from fx_influence.interop.trl_sampling import check_generation, held_out_rollouts
from fx_influence.interop.trl_step import MeasuredStep
from fx_influence.interop.trl_store import StepStore
from fx_influence.kernel import MEMORY_BUDGET
from fx_influence.policy import Policy, functionalize
from fx_influence.ranks import check_agreed
from fx_influence.sharding import passes_over
from fx_influence.tree import promote
from fx_influence.types import Batch, Estimator, Gain, IdentityError, Normalize, Params

PREFIX = "entropy_influence/"


class _Begun(NamedTuple):
    """A step measured up to the optimizer's own step; ``batch_e``: this process's rows of E."""

    measured: MeasuredStep
    params: Params
    batch_e: Batch


class EntropyInfluence(TrainerCallback):
    """Measures every ``every``-th optimizer step of a ``GRPOTrainer`` or ``RLOOTrainer``: why its entropy changes.

    Before the step: U with the coefficients of the trainer's own loss, its gradient and clipping, AdamW's state, and
    fresh completions E of ``eval_prompts``; ``fx.influence`` of one on the other. After it: the realised change of
    entropy on the same E. Both are logged through the trainer as ``entropy_influence/...``, kept in ``history``, and
    stored as a run directory for each measured step, which ``fx.load_run`` and ``fx-influence report`` read.

    In several processes (DistributedDataParallel) U and E are the rollouts of all: every process attaches one of these,
    with the same settings, draws its share of E and has the whole ``history``; the first stores.

    ``every``: steps n, 2n, ... are measured, as ``logging_steps`` counts. ``eval_prompts``: texts or conversations in
    the trainer's own format, or a data set with a column ``prompt``; None takes the trainer's ``eval_dataset``. Many
    prompts with few completions each give smaller errors than the reverse.
    ``completions_per_prompt``: of each. ``estimator``, ``normalize``, ``gain``, ``matrix``, ``chunk_size``,
    ``memory_budget``: as for ``fx.influence``. ``out``: directory of the runs, by default ``entropy_influence`` in the
    trainer's ``output_dir``. ``save_state``: also store the model, its optimizer and v_baseline before each measured
    step, so that the step's plan.yaml repeats it from nothing. ``seed``: of E, with the step's number.

    A result whose parts do not add up is not logged: the training goes on with a warning.
    Raises ``ValueError`` for numbers out of range.

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
        estimator: Estimator = "per_decision",
        normalize: Normalize = "token",
        gain: Gain = "share",
        matrix: bool = False,
        chunk_size: int | None = None,
        memory_budget: int = MEMORY_BUDGET,
        out: str | Path | None = None,
        save_state: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value in {"every": every, "completions_per_prompt": completions_per_prompt}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; give at least 1")
        self.every = every
        self.history: list[dict[str, float]] = []
        self._eval_prompts, self._each = eval_prompts, completions_per_prompt
        self._reading: dict[str, Any] = {"estimator": estimator, "normalize": normalize, "chunk_size": chunk_size}
        self._attributing: dict[str, Any] = {"gain": gain, "matrix": matrix, "memory_budget": memory_budget}
        self._out, self._save_state, self._seed = out, save_state, seed
        self._trainer: Any = None
        self._policy: Policy | None = None
        self._begun: _Begun | None = None

    def attach(self, trainer: Any) -> EntropyInfluence:
        """Measure this trainer's steps from now on; returns itself.

        Raises ``TypeError`` for a trainer of another kind, and ``ValueError`` for one whose steps cannot be attributed
        (active dropout, a model that DeepSpeed or FSDP shards) or whose completions are not drawn from its policy,
        naming the remedy, and where processes attach with different settings.
        """
        _check_trainer(trainer)
        check_generation(trainer)
        self._prompts = _prompts(trainer, self._eval_prompts)
        self._check_processes_agree(mesh_of(trainer))
        self._trainer, self._policy = trainer, None
        self._capture = Capture(trainer)
        trainer.add_callback(self)
        return self

    def _check_processes_agree(self, mesh: DeviceMesh | None) -> None:
        if mesh is not None:
            own = {"every": self.every, "eval_prompts": self._prompts, "completions_per_prompt": self._each}
            check_agreed(mesh, {**own, "seed": self._seed, **self._reading, **self._attributing})

    def detach(self) -> None:
        """Leave the trainer as it was before ``attach``."""
        self._capture.detach()
        self._trainer.remove_callback(self)
        self._trainer = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what the trainer makes only now: another optimizer than AdamW."""
        require_adamw(self._trainer.optimizer)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the micro-batches of a step that is to be measured."""
        if (state.global_step + 1) % self.every == 0:
            self._capture.start()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attribute the step that the optimizer is about to make."""
        if not self._capture.recording:
            return
        try:
            self._begun = self._begin(state.global_step + 1)
        except IdentityError as error:
            # The results are the same on all processes, so that all go on from here.
            if self._first:
                warnings.warn(f"step {state.global_step + 1} is not attributed: {error}", stacklevel=2)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure what the step did to the entropy; log and store."""
        if self._begun is None:
            return
        begun, self._begun = self._begun, None
        measured = self._finished(begun)
        figures = of_all(self._capture.mesh, measured.figures())[0]
        for name, value in figures.items():
            self._trainer._metrics["train"][PREFIX + name].append(value)
        self.history.append({"step": measured.step, **figures})
        if self._first:
            self._store(measured.step).write(measured, self._plan(measured), self._trainer)

    def _begin(self, step: int) -> _Begun:
        start = time.perf_counter()
        trainer, captured, mesh = self._trainer, self._capture.finish(), self._capture.mesh
        if self._policy is None:
            self._policy = functionalize(trainer.model, position_ids=False)[0]
        params = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
        opt_state = adamw_state(trainer.optimizer, trainer.model)
        rollouts = held_out_rollouts(trainer, self._prompts, self._each, self._seed + step, mesh)
        # What pads is masked, so any token does.
        batch_e = collate(rollouts, pad_id=0, device=captured.batch.input_ids.device)
        own_e = own_rows(batch_e, mesh)
        out = influence(
            params,
            own_rows(captured.batch, mesh),
            own_e,
            opt_state,
            apply=self._policy,
            grad=captured.gradient,
            max_grad_norm=captured.max_grad_norm,
            temperature=trainer.temperature,
            mesh=mesh,
            **self._attributing,
            **self._reading,
        )
        passes = passes_over(params, self._policy, trainer.temperature, self._reading["chunk_size"], mesh)
        values = passes.values(params, batch_e)
        entropy = entropy_estimate(values, batch_e, self._reading["normalize"]).item()
        if self._save_state and self._first:
            gain = self._attributing["gain"]
            parts = adamw_decompose(captured.gradient, opt_state, params, gain, captured.max_grad_norm)
            self._store(step).write_state(trainer, parts.baseline)
        seconds = time.perf_counter() - start
        measured = MeasuredStep(step, opt_state.lr, captured, rollouts, out, entropy, None, seconds)
        return _Begun(measured, {name: p.clone() for name, p in params.items()}, own_e)

    def _finished(self, begun: _Begun) -> MeasuredStep:
        if self._trainer.accelerator.optimizer_step_was_skipped:
            return begun.measured
        start = time.perf_counter()
        live = dict(self._trainer.model.named_parameters())
        moved = {name: live[name].detach().to(promote(p.dtype)) - p for name, p in begun.params.items()}
        policy = self._policy
        assert policy is not None
        realised = snis_delta(
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
        return begun.measured._replace(realised=realised, seconds=seconds)

    @property
    def _first(self) -> bool:
        """Whether this process is the one that warns and writes."""
        return bool(self._trainer.accelerator.is_main_process)

    def _store(self, step: int) -> StepStore:
        out = Path(self._trainer.args.output_dir) / "entropy_influence" if self._out is None else Path(self._out)
        return StepStore(out, step)

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


def _check_trainer(trainer: Any) -> None:
    kind = type(trainer).__name__
    if not all(hasattr(trainer, name) for name in (*METHODS, "_generate", "_metrics", "accelerator")):
        raise TypeError(f"trainer is {kind}; attach to trl's GRPOTrainer or RLOOTrainer (trl 1.16 or later)")
    if METHODS[0] in vars(trainer):
        raise ValueError(f"the compute_loss of this {kind} is already replaced; detach what is attached to it first")
    check_processes(trainer)
    model = trainer.model
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("the model is quantised, which has no exact derivatives; attach to one in bfloat16 or float32")
    if getattr(trainer.args, "cast_lm_head_to_fp32", False) and model.dtype != torch.float32:
        raise ValueError(f"cast_lm_head_to_fp32 is True over a model in {model.dtype}; load it in float32 instead")
    for name, p in _active_dropout(model):
        raise ValueError(
            f"{name or 'the model'} has dropout {p}, which makes every gradient another one; set disable_dropout=True "
            "in the trainer's config, and the dropouts of the model's config and of LoRA to 0"
        )


def _active_dropout(model: nn.Module) -> Iterator[tuple[str, float]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            yield name, module.p
        # Attention of Llama's kind keeps the probability as a number and drops by a function.
        for field, value in vars(module).items():
            if "dropout" in field and isinstance(value, float) and value > 0:
                yield f"{name}.{field}", value


def _prompts(trainer: Any, asked: Any) -> list[Any]:
    found = trainer.eval_dataset if asked is None else asked
    if found is None:
        raise ValueError("eval_prompts is None and the trainer has no eval_dataset; give the held-out prompts of E")
    if isinstance(found, Mapping):
        raise ValueError(f"eval_dataset holds {sorted(found)}; pass one of them as eval_prompts")
    columns = getattr(found, "column_names", None)
    if columns is not None and "prompt" not in columns:
        raise ValueError(f"eval_prompts has the columns {columns}, not prompt; rename the one that is")
    prompts = list(found if columns is None else found["prompt"])
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, (str, list)) or not prompt:
            raise ValueError(f"eval_prompts[{i}] is {prompt!r}; give a text or a conversation as a list of messages")
    if not prompts:
        raise ValueError("eval_prompts is empty; give the held-out prompts of E")
    return prompts
