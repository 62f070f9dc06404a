"""What a TRL trainer computes in a step and never hands out: its batch, its loss's coefficients, its clipping."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fx_influence.interop.trl_ranks import mesh_of, of_all
from fx_influence.types import Batch, Gradients

METHODS = (
    "compute_loss",
    "_get_per_token_logps_and_entropies",
    "_generate_and_score_completions",
    "_calculate_rewards",
)
"""Methods of ``GRPOTrainer`` and ``RLOOTrainer`` (trl 1.16) that are wrapped on the instance."""

OLD = "old_per_token_logps"


class CapturedStep(NamedTuple):
    """The rollouts of one optimizer step, all its micro-batches, and what the trainer's own loss makes of them.

    Of several processes every one has the rollouts of all, rank 0's first, and L is the mean of their losses.

    ``batch``: U with ``coefficients`` c = -dL/dlog pi, ``entropy_coefficients`` b = -dL/dh (None without an entropy
    bonus), and a ``group`` for every prompt, (n, T). Rows stand as the trainer padded them, so that a model whose
    positions it leaves to count from the first column sees the same positions.
    ``advantages``, ``rewards``: (n,) on the CPU, a reward NaN where no function gave one. ``logprobs``, ``entropies``:
    (n, T), of the completion tokens, from the trainer's own forward at its temperature. ``old_logprobs``: (n, T), of
    the policy that sampled, None where the trainer keeps only their sums. ``prompt_widths``: (n,), the columns of each
    row that hold its prompt and what pads it.
    ``gradient``: sum_i g_i as the optimizer received it, divided by ``clip``, the factor by which it was clipped.
    ``max_grad_norm``: the norm it was clipped to, None where nothing clips.
    """

    batch: Batch
    advantages: Tensor
    rewards: Tensor
    logprobs: Tensor
    entropies: Tensor
    old_logprobs: Tensor | None
    prompt_widths: Tensor
    gradient: Gradients
    clip: float
    max_grad_norm: float | None


class _MicroBatch:
    """One call of ``compute_loss``, filled in while it and its backward pass run."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.inputs = inputs
        self.values: list[Tensor] = []
        self.gradients: dict[int, Tensor] = {}

    def watch(self, index: int, value: Tensor, scale: Callable[[], float]) -> None:
        self.values.append(value.detach())

        def keep(gradient: Tensor) -> None:
            self.gradients[index] = gradient.detach() / scale()

        if value.requires_grad:
            value.register_hook(keep)


class Capture:
    """Wraps methods of one trainer instance and records the steps that are asked for.

    The coefficients are the gradients that reach the log-probabilities and entropies the trainer's loss is made of, so
    they are exact whatever the loss, its clipping, masks, accumulation or version. ``mesh``: of the trainer's
    processes, None where there is one; all of them capture the same steps.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.mesh = mesh_of(trainer)
        self._step: list[_MicroBatch] | None = None
        self._open: _MicroBatch | None = None
        self._rewards: Tensor | None = None
        self._clipped: tuple[float, float] | None = None
        wrappers = (self._compute_loss, self._log_probs, self._generate, self._calculate)
        for name, wrapper in zip(METHODS, wrappers, strict=True):
            _wrap(trainer, name, wrapper)
        _wrap(trainer.accelerator, "clip_grad_norm_", self._clip_grad_norm)

    def detach(self) -> None:
        """Put the trainer's own methods back."""
        for name in METHODS:
            del vars(self._trainer)[name]
        del vars(self._trainer.accelerator)["clip_grad_norm_"]

    @property
    def recording(self) -> bool:
        """Whether a step is being recorded."""
        return self._step is not None

    def start(self) -> None:
        """Record from here on, until ``finish``."""
        self._step, self._clipped = [], None

    def finish(self) -> CapturedStep:
        """The step recorded since ``start`` by all processes, once its gradient is accumulated and clipped.

        Raises ``RuntimeError`` where the trainer's loss never asked for log-probabilities.
        """
        step, self._step = self._step, None
        seen = step if step and all(len(micro.values) == 2 for micro in step) else []
        # What one process lacks is raised on all, or the others would wait for it for ever.
        everyone = of_all(self.mesh, _joined([_rows_of(micro) for micro in seen]) if seen else None)
        captured = [rows for rows in everyone if rows is not None]
        if len(captured) < len(everyone):
            raise RuntimeError(
                f"{type(self._trainer).__name__} computed its loss without one call of {METHODS[1]}, so its "
                "coefficients are unknown; turn off use_liger_kernel, or a compute_loss of your own"
            )
        norm, max_norm = self._clipped or (0.0, float("inf"))
        clip = min(1.0, max_norm / (norm + 1e-6))
        gradient = {
            name: None if p.grad is None else p.grad.detach() if clip == 1.0 else p.grad.detach() / clip
            for name, p in self._trainer.model.named_parameters()
            if p.requires_grad
        }
        return _captured(
            _joined(captured),
            self._trainer.accelerator.device,
            gradient=gradient,
            clip=clip,
            max_grad_norm=None if max_norm == float("inf") else max_norm,
        )

    def _compute_loss(self, original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self._step is None or not torch.is_grad_enabled():
            return original(model, inputs, *args, **kwargs)
        self._open = _MicroBatch(inputs)
        try:
            loss = original(model, inputs, *args, **kwargs)
        finally:
            micro, self._open = self._open, None
        self._step.append(micro)
        return loss

    def _log_probs(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        if self._open is not None and torch.is_grad_enabled():
            for index, value in enumerate(found[:2]):
                self._open.watch(index, value, self._scale)
        return found

    def _scale(self) -> float:
        """How many times too large what reaches this process's own loss is for the step's."""
        accelerator = self._trainer.accelerator
        scaler = getattr(accelerator, "scaler", None)
        # DistributedDataParallel averages over processes whatever the loss, which trl's normalisations allow for.
        return accelerator.num_processes * (1.0 if scaler is None else float(scaler.get_scale()))

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._rewards = None
        output = original(*args, **kwargs)
        if self._rewards is not None:
            # The rewards are those of all processes, the output is this one's. The trainer shuffles and splits every
            # tensor of it alike, so that these stay with their rollouts.
            count, process = len(output["prompt_ids"]), self._trainer.accelerator.process_index
            output["rewards"] = self._rewards[process * count : (process + 1) * count]
        return output

    def _calculate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        by_function = original(*args, **kwargs)
        weights = self._trainer.reward_weights.to(by_function)
        self._rewards = (by_function * weights).nansum(dim=1)
        self._rewards[by_function.isnan().all(dim=1)] = torch.nan
        return by_function

    def _clip_grad_norm(self, original: Callable[..., Any], parameters: Any, max_norm: float, *args: Any) -> Any:
        norm = original(parameters, max_norm, *args)
        self._clipped = float(norm), float(max_norm)
        return norm


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, wrapped)


class _Rows(NamedTuple):
    """Rollouts of a micro-batch, of a process or of all: the fields of ``CapturedStep`` that are theirs, on the CPU."""

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    coefficients: Tensor
    entropy_coefficients: Tensor
    logprobs: Tensor
    entropies: Tensor
    old_logprobs: Tensor | None
    advantages: Tensor
    rewards: Tensor
    prompt_widths: Tensor


def _rows_of(micro: _MicroBatch) -> _Rows:
    inputs, prompts = micro.inputs, micro.inputs["prompt_ids"]
    count, width = prompts.shape
    outside = prompts.new_zeros(prompts.shape, dtype=torch.float32)
    counted = torch.cat([outside, inputs["completion_mask"] * inputs.get("tool_mask", 1)], dim=1).bool()

    def on_counted(values: Tensor) -> Tensor:
        return torch.cat([outside, values.float()], dim=1).masked_fill(~counted, 0.0)

    def coefficients(index: int) -> Tensor:
        return on_counted(-micro.gradients.get(index, torch.zeros_like(micro.values[index])))

    logprobs, old = on_counted(micro.values[0]), None
    if OLD in inputs:
        old = on_counted(inputs[OLD])
    elif "old_logps" not in inputs:
        # The trainer keeps none where the policy is still the one that sampled.
        old = logprobs
    rows = _Rows(
        input_ids=torch.cat([prompts, inputs["completion_ids"]], dim=1),
        attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).bool(),
        completion_mask=counted,
        coefficients=coefficients(0),
        entropy_coefficients=coefficients(1),
        logprobs=logprobs,
        entropies=on_counted(micro.values[1]),
        old_logprobs=old,
        advantages=inputs.get("advantages", torch.full((count,), torch.nan)).flatten(),
        rewards=inputs.get("rewards", torch.full((count,), torch.nan)).flatten(),
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
    return CapturedStep(batch, rows.advantages, rows.rewards, *values, rows.prompt_widths, **of_the_step)


def _prompt_numbers(rows: _Rows) -> Tensor:
    # By what the policy reads, and among the rows of all processes, whose groups may span two of them.
    each = zip(rows.input_ids, rows.attention_mask, rows.prompt_widths.tolist(), strict=True)
    prompts = [tuple(ids[:width][mask[:width]].tolist()) for ids, mask, width in each]
    number = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    return torch.tensor([number[prompt] for prompt in prompts])
