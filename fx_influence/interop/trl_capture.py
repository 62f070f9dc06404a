"""What a TRL trainer computes in a step and never hands out: its batch, its loss's coefficients, its clipping."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    they are exact whatever the loss, its clipping, masks, accumulation or version.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
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
        """The step recorded since ``start``, once its gradient is accumulated and clipped.

        Raises ``RuntimeError`` where the trainer's loss never asked for log-probabilities.
        """
        step, self._step = self._step, None
        if not step or any(len(micro.values) != 2 for micro in step):
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
        return CapturedStep(*_joined(step), gradient, clip, None if max_norm == float("inf") else max_norm)

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
                self._open.watch(index, value, self._loss_scale)
        return found

    def _loss_scale(self) -> float:
        scaler = getattr(self._trainer.accelerator, "scaler", None)
        return 1.0 if scaler is None else float(scaler.get_scale())

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._rewards = None
        output = original(*args, **kwargs)
        if self._rewards is not None:
            # The trainer shuffles and splits every tensor of its output alike, so that these stay with their rollouts.
            output["rewards"] = self._rewards
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


def _joined(step: list[_MicroBatch]) -> tuple[Batch, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """All micro-batches as one, padded on the right to the widest: that moves no token."""
    width = max(micro.inputs["prompt_ids"].shape[1] + micro.inputs["completion_ids"].shape[1] for micro in step)

    def joined(prompt: Callable[[_MicroBatch], Tensor], completion: Callable[[_MicroBatch], Tensor]) -> Tensor:
        found = [torch.cat([prompt(micro), completion(micro)], dim=1) for micro in step]
        return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in found])

    def on_completions(values: Callable[[_MicroBatch], Tensor]) -> Tensor:
        return joined(lambda m: torch.zeros_like(m.inputs["prompt_ids"], dtype=torch.float32), values)

    counted = on_completions(lambda m: m.inputs["completion_mask"] * m.inputs.get("tool_mask", 1)).bool()

    def on_counted(values: Callable[[_MicroBatch], Tensor]) -> Tensor:
        return on_completions(lambda m: values(m).float()).masked_fill(~counted, 0.0)

    def coefficients(index: int) -> Tensor:
        return on_counted(lambda m: -m.gradients.get(index, torch.zeros_like(m.values[index])))

    batch = Batch(
        input_ids=joined(lambda m: m.inputs["prompt_ids"], lambda m: m.inputs["completion_ids"]),
        attention_mask=joined(lambda m: m.inputs["prompt_mask"], lambda m: m.inputs["completion_mask"]).bool(),
        completion_mask=counted,
        coefficients=coefficients(0),
        entropy_coefficients=coefficients(1) if any(1 in m.gradients for m in step) else None,
        group=_prompt_numbers(step).to(counted.device),
    )
    advantages, rewards = (
        torch.cat([m.inputs.get(name, torch.full((len(m.values[0]),), torch.nan)).cpu().flatten() for m in step])
        for name in ("advantages", "rewards")
    )
    logprobs, entropies = on_counted(lambda m: m.values[0]), on_counted(lambda m: m.values[1])
    old = None
    if all(OLD in m.inputs for m in step):
        old = on_counted(lambda m: m.inputs[OLD])
    elif not any("old_logps" in m.inputs or OLD in m.inputs for m in step):
        # The trainer keeps none where the policy is still the one that sampled.
        old = logprobs
    widths = torch.tensor([m.inputs["prompt_ids"].shape[1] for m in step for _ in m.inputs["prompt_ids"]])
    return batch, advantages, rewards, logprobs, entropies, old, widths


def _prompt_numbers(step: list[_MicroBatch]) -> Tensor:
    rows = [row for m in step for row in zip(m.inputs["prompt_ids"], m.inputs["prompt_mask"], strict=True)]
    prompts = [tuple(ids[mask.bool()].tolist()) for ids, mask in rows]
    number = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    return torch.tensor([number[prompt] for prompt in prompts])
