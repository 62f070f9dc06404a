"""What a TRL trainer computes in a step and never hands out: its batch, its loss's coefficients, its clipping."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from fx_influence.distributed.collectives import propagate_failures
from fx_influence.interop.trl.ranks import mesh_of, of_all
from fx_influence.types import Batch, Gradients

METHODS = (
    "compute_loss",
    "_get_per_token_logps_and_entropies",
    "_generate_and_score_completions",
    "_calculate_rewards",
)
"""Methods of ``GRPOTrainer`` and ``RLOOTrainer`` (trl 1.16) that are wrapped on the instance."""

OLD = "old_per_token_logps"

REWARDS = "entropy_influence_rewards"
"""Under which a generation batch takes its rewards along, through the trainer's shuffling and splitting of it."""

SEEN = ("model", "input_ids", "attention_mask", "logits_to_keep")
"""Arguments of ``_get_per_token_logps_and_entropies`` that the policy's forward is made of here."""

HARMLESS = ("batch_size", "compute_entropy", "compute_aux_loss")
"""Arguments of it that change no log-probability."""

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Arguments of it that say which tokens stand for an image; 0 throughout is what a forward without them assumes."""


class CaptureError(RuntimeError):
    """A step whose loss is not a function of the log-probabilities and entropies of its own rollouts alone."""


class CapturedStep(NamedTuple):
    """The rollouts of one optimizer step, all its micro-batches, and what the trainer's own loss makes of them.

    Of several processes every one has the rollouts of all, rank 0's first, and L is the mean of their losses.

    ``batch``: U with ``coefficients`` c = -dL/dlog pi, ``entropy_coefficients`` b = -dL/dh (None without an entropy
    bonus), and a ``group`` for every prompt, (n, T). Rows stand as the trainer padded them, so that a model whose
    positions it leaves to count from the first column sees the same positions.
    ``advantages``, ``rewards``: (n,) on the CPU, a reward NaN where no function gave one; an advantage is the mean over
    the row's completion tokens where the trainer has one for each, ``token_advantages``, (n, T), else None.
    ``logprobs``, ``entropies``: (n, T), of the completion tokens, from the trainer's own forward at its temperature;
    entropies None where the trainer computes none. ``old_logprobs``: (n, T), of the policy that sampled, None where the
    trainer keeps only their sums. ``prompt_widths``: (n,), the columns of each row that hold its prompt and what pads
    it.
    ``gradient``: sum_i g_i as the optimizer received it, divided by ``clip``, the factor by which it was clipped.
    ``max_grad_norm``: the norm it was clipped to, None where nothing clips.
    """

    batch: Batch
    advantages: Tensor
    rewards: Tensor
    logprobs: Tensor
    entropies: Tensor | None
    old_logprobs: Tensor | None
    prompt_widths: Tensor
    gradient: Gradients
    clip: float
    max_grad_norm: float | None
    token_advantages: Tensor | None = None


class _Scoring(NamedTuple):
    """One call for the log-probabilities of rollouts and, where they are asked for, their entropies."""

    input_ids: Tensor
    attention_mask: Tensor
    values: tuple[Tensor, Tensor | None]
    gradients: dict[int, Tensor]


class _MicroBatch:
    """One call of ``compute_loss``, filled in while it and its backward pass run."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.inputs = inputs
        self.scorings: list[_Scoring] = []

    def watch(self, given: Mapping[str, Any], found: Sequence[Any], hook: Callable[..., None]) -> None:
        """Record one call; ``hook(gradients, index, gradient)`` is what happens when a gradient arrives.

        ``given``: the call's arguments by name.
        """
        _check_arguments(given)
        entropies = found[1] if len(found) > 1 else None
        values = (found[0].detach(), None if entropies is None else entropies.detach())
        scoring = _Scoring(given["input_ids"], given["attention_mask"], values, {})
        self.scorings.append(scoring)
        for index, value in enumerate((found[0], entropies)):
            if value is not None and value.requires_grad:
                value.register_hook(functools.partial(hook, scoring.gradients, index))


def _signature(trainer: Any) -> inspect.Signature:
    """The arguments of the method that scores, by the first class that names them; a subclass may hand them on."""
    found = [
        inspect.signature(getattr(kind, METHODS[1])) for kind in type(trainer).__mro__ if hasattr(kind, METHODS[1])
    ]
    first = next((x for x in found if "input_ids" in x.parameters), found[0])
    return first.replace(parameters=list(first.parameters.values())[1:])


def _check_arguments(given: Mapping[str, Any]) -> None:
    """Raise ``CaptureError`` for a forward of more than ids and masks, naming what else went in."""
    for name, value in given.items():
        if name in TOKEN_TYPES and isinstance(value, Tensor) and not value.any():
            continue
        if name not in (*SEEN, *HARMLESS) and value is not None:
            raise CaptureError(
                f"{name} went into the trainer's forward, which is more than ids and masks: influences are of a policy "
                "that reads these alone; train without it"
            )


class Capture:
    """Wraps methods of one trainer instance and records the steps that are asked for.

    The coefficients are the gradients that reach the log-probabilities and entropies the trainer's loss is made of, so
    they are exact whatever the loss, its clipping, masks, accumulation or version. ``mesh``: of the trainer's
    processes, None where there is one; all of them capture the same steps.

    What goes wrong in recording never reaches the trainer: it is raised by ``finish``. An exception of the trainer's
    own passes unchanged and ends the recording. Several may wrap one trainer and be detached in any order.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.mesh = mesh_of(trainer)
        self._step: list[_MicroBatch] | None = None
        self._open: _MicroBatch | None = None
        self._rewards: Tensor | None = None
        self._clipped: tuple[float, float] | None = None
        self._problem: str | None = None
        self._signature = _signature(trainer)
        wrappers = (self._compute_loss, self._log_probs, self._generate, self._calculate)
        self._wrappers = [_Wrapper(trainer, name, call) for name, call in zip(METHODS, wrappers, strict=True)]
        self._wrappers.append(_Wrapper(trainer.accelerator, "clip_grad_norm_", self._clip_grad_norm))

    def detach(self) -> None:
        """Put the trainer's own methods back."""
        self.stop()
        for wrapper in self._wrappers:
            wrapper.undo()

    @property
    def recording(self) -> bool:
        """Whether a step is being recorded."""
        return self._step is not None

    def start(self) -> None:
        """Record from here on, until ``finish`` or ``stop``."""
        self.stop()
        self._step = []

    def stop(self) -> None:
        """Record no longer, and let go of what was recorded."""
        self._step, self._open, self._clipped, self._problem = None, None, None, None

    def finish(self) -> CapturedStep:
        """The step recorded since ``start`` by all processes, once its gradient is accumulated and clipped.

        Raises ``CaptureError`` where the trainer's loss never asked for log-probabilities, or for those of other rows
        than its own, and where recording failed.
        """
        step, clipped, problem = self._step, self._clipped, self._problem
        self.stop()
        with propagate_failures(self.mesh):
            return self._captured(step, clipped, problem)

    def _captured(
        self, step: list[_MicroBatch] | None, clipped: tuple[float, float] | None, problem: str | None
    ) -> CapturedStep:
        if problem is not None:
            raise CaptureError(problem)
        if not step or not all(micro.scorings for micro in step):
            raise CaptureError(
                f"{type(self._trainer).__name__} computed its loss without a call of {METHODS[1]}, so its "
                "coefficients are unknown; turn off use_liger_kernel, or a compute_loss of your own"
            )
        everyone = of_all(self.mesh, _joined([_rows_of(micro) for micro in step]))
        norm, max_norm = clipped or (0.0, float("inf"))
        clip = min(1.0, max_norm / (norm + 1e-6))
        divided = clip * self._remaining_scale()
        gradient = {
            name: None if p.grad is None else p.grad.detach() if divided == 1.0 else p.grad.detach() / divided
            for name, p in self._trainer.model.named_parameters()
            if p.requires_grad
        }
        return _captured(
            _joined(everyone),
            self._trainer.accelerator.device,
            gradient=gradient,
            clip=clip,
            max_grad_norm=None if max_norm == float("inf") else max_norm,
        )

    def overflowed(self) -> bool:
        """Whether a loss scaler is about to skip the optimizer's step, because a scaled gradient is not finite."""
        if getattr(self._trainer.accelerator, "scaler", None) is None:
            return False
        gradients = [p.grad for p in self._trainer.model.parameters() if p.grad is not None]
        return any(of_all(self.mesh, not all(bool(g.isfinite().all()) for g in gradients)))

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """A part of a wrapper that is not the trainer's: what goes wrong in it is kept for ``finish``."""
        try:
            yield
        except Exception as error:
            self._problem = self._problem or f"{type(error).__name__}: {error}"

    def _compute_loss(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._step is None or not torch.is_grad_enabled():
            return original(*args, **kwargs)
        with self._recording():
            self._open = _MicroBatch(kwargs["inputs"] if "inputs" in kwargs else args[1])
        try:
            loss = original(*args, **kwargs)
        except BaseException:
            self.stop()
            raise
        micro, self._open = self._open, None
        if micro is not None and self._step is not None:
            self._step.append(micro)
        return loss

    def _log_probs(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        if self._open is not None and torch.is_grad_enabled():
            with self._recording():
                known = {name: x for name, x in kwargs.items() if name in self._signature.parameters}
                given = self._signature.bind(*args, **known).arguments
                self._open.watch({**given, **kwargs}, found, self._arrived)
        return found

    def _arrived(self, gradients: dict[int, Tensor], index: int, gradient: Tensor) -> None:
        with self._recording():
            scaled = gradient.detach() / self._scale()
            gradients[index] = scaled if index not in gradients else gradients[index] + scaled

    def _scale(self) -> float:
        """How many times too large what reaches this process's own loss is for the step's."""
        accelerator = self._trainer.accelerator
        scaler = getattr(accelerator, "scaler", None)
        # DistributedDataParallel averages over processes whatever the loss, which trl's normalisations allow for.
        return accelerator.num_processes * (1.0 if scaler is None else float(scaler.get_scale()))

    def _remaining_scale(self) -> float:
        """A loss scaler's factor while it is in the gradients: clipping takes it out, the optimizer's step at last."""
        scaler = getattr(self._trainer.accelerator, "scaler", None)
        if scaler is None:
            return 1.0
        bare = self._trainer.optimizer
        while isinstance(bare, AcceleratedOptimizer):
            bare = bare.optimizer
        state = scaler._per_optimizer_states.get(id(bare), {})
        unscaled = getattr(state.get("stage"), "name", "READY") != "READY"
        return 1.0 if unscaled else float(scaler.get_scale())

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._rewards = None
        output = original(*args, **kwargs)
        with self._recording():
            if self._rewards is not None:
                # The rewards are those of all processes, the output is this one's. The trainer shuffles and splits
                # every tensor of it alike, so that these stay with their rollouts.
                count, process = len(output["prompt_ids"]), self._trainer.accelerator.process_index
                output[REWARDS] = self._rewards[process * count : (process + 1) * count]
        return output

    def _calculate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        by_function = original(*args, **kwargs)
        with self._recording():
            weights = self._trainer.reward_weights.to(by_function)
            rewards = (by_function * weights).nansum(dim=1)
            self._rewards = rewards.masked_fill(by_function.isnan().all(dim=1), torch.nan)
        return by_function

    def _clip_grad_norm(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        norm = original(*args, **kwargs)
        if self._step is not None:
            with self._recording():
                max_norm = kwargs["max_norm"] if "max_norm" in kwargs else args[1]
                self._clipped = float(norm), float(max_norm)
        return norm


class _Wrapper:
    """A method of one instance with ``call(original, *args)`` in its place, until ``undo``."""

    def __init__(self, owner: Any, name: str, call: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        functools.update_wrapper(self, original)
        # After update_wrapper, which copies the attributes of another wrapper.
        self._owner, self._name, self._original = owner, name, original
        self._before = vars(owner).get(name)
        self._call: Callable[..., Any] | None = call
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._original(*args, **kwargs) if self._call is None else self._call(self._original, *args, **kwargs)

    def undo(self) -> None:
        """Hand calls on from now on; leave the instance with those that came after, and no others that are undone."""
        self._call = None
        attributes = vars(self._owner)
        while isinstance(top := attributes.get(self._name), _Wrapper) and top._call is None:
            if top._before is None:
                del attributes[self._name]
            else:
                attributes[self._name] = top._before


class _Rows(NamedTuple):
    """Rollouts of a micro-batch, of a process or of all: the fields of ``CapturedStep`` that are theirs, on the CPU."""

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    coefficients: Tensor
    entropy_coefficients: Tensor
    logprobs: Tensor
    entropies: Tensor | None
    old_logprobs: Tensor | None
    advantages: Tensor
    token_advantages: Tensor | None
    rewards: Tensor
    prompt_widths: Tensor


def _rows_of(micro: _MicroBatch) -> _Rows:
    inputs, prompts, completions = micro.inputs, micro.inputs["prompt_ids"], micro.inputs["completion_ids"]
    count, width = prompts.shape
    outside = prompts.new_zeros(prompts.shape, dtype=torch.float32)
    counted = torch.cat([outside, inputs["completion_mask"] * inputs.get("tool_mask", 1)], dim=1).bool()
    input_ids = torch.cat([prompts, completions], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).bool()
    for scoring in micro.scorings:
        same = scoring.values[0].shape == completions.shape and torch.equal(scoring.input_ids, input_ids)
        if not same or not torch.equal(scoring.attention_mask.bool(), attention_mask):
            raise CaptureError(
                "the loss asked for log-probabilities of other tokens than its batch's completions, so its "
                "coefficients are unknown; use the trainer's own compute_loss"
            )

    def on_counted(values: Tensor) -> Tensor:
        return torch.cat([outside, values.float()], dim=1).masked_fill(~counted, 0.0)

    def coefficients(index: int) -> Tensor:
        parts = [scoring.gradients[index] for scoring in micro.scorings if index in scoring.gradients]
        return on_counted(-sum(parts, torch.zeros_like(micro.scorings[0].values[0])))

    logprobs, old = on_counted(micro.scorings[0].values[0]), None
    if OLD in inputs:
        old = on_counted(inputs[OLD])
    elif "old_logps" not in inputs:
        # The trainer keeps none where the policy is still the one that sampled.
        old = logprobs
    entropies = next((x for _, x in (scoring.values for scoring in micro.scorings) if x is not None), None)
    advantages = inputs.get("advantages", torch.full((count,), torch.nan))
    token_advantages = None
    if advantages.dim() == 2 and advantages.shape[1] > 1:
        token_advantages = on_counted(advantages)
        advantages = token_advantages.sum(1) / counted.sum(1).clamp(min=1)
    rows = _Rows(
        input_ids=input_ids,
        attention_mask=attention_mask,
        completion_mask=counted,
        coefficients=coefficients(0),
        entropy_coefficients=coefficients(1),
        logprobs=logprobs,
        entropies=None if entropies is None else on_counted(entropies),
        old_logprobs=old,
        advantages=advantages.flatten(),
        token_advantages=token_advantages,
        rewards=inputs.get(REWARDS, torch.full((count,), torch.nan)).flatten(),
        prompt_widths=torch.full((count,), width),
    )
    return _Rows._make(None if x is None else x.cpu() for x in rows)


def _joined(parts: Sequence[_Rows]) -> _Rows:
    """All of them as one, padded on the right to the widest: that moves no token."""
    width = max(part.input_ids.shape[1] for part in parts)

    def joined(found: Sequence[Tensor | None]) -> Tensor | None:
        present = [x for x in found if x is not None]
        wide = [x if x.dim() == 1 else torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in present]
        return torch.cat(wide) if len(wide) == len(found) else None

    return _Rows._make(joined(found) for found in zip(*parts, strict=True))


def _captured(rows: _Rows, device: torch.device, **of_the_step: Any) -> CapturedStep:
    there = _Rows._make(None if x is None else x.to(device) for x in rows)
    batch = Batch(
        there.input_ids,
        there.attention_mask,
        there.completion_mask,
        there.coefficients,
        there.entropy_coefficients if rows.entropy_coefficients.any() else None,
        _prompt_numbers(rows).to(device),
    )
    values = (there.logprobs, there.entropies, there.old_logprobs)
    return CapturedStep(
        batch,
        rows.advantages,
        rows.rewards,
        *values,
        rows.prompt_widths,
        **of_the_step,
        token_advantages=there.token_advantages,
    )


def _prompt_numbers(rows: _Rows) -> Tensor:
    # By what the policy reads, and among the rows of all processes, whose groups may span two of them.
    each = zip(rows.input_ids, rows.attention_mask, rows.prompt_widths.tolist(), strict=True)
    prompts = [tuple(ids[:width][mask[:width]].tolist()) for ids, mask, width in each]
    number = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    return torch.tensor([number[prompt] for prompt in prompts])
