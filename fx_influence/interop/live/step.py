"""A captured optimizer step as a value."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from fx_influence.core.computed import layout_of, local_shards
from fx_influence.core.parameter_checks import first_not_finite
from fx_influence.interop.live.rows import RolloutRows
from fx_influence.optim.clipping import UnclippedGradient
from fx_influence.policy.row_inputs import RowInputs
from fx_influence.types import AdamWState, Batch, Gradients

Value = TypeVar("Value")


class CapturedStep(NamedTuple):
    """The rollouts of all micro-batches of one optimizer step, with coefficients and gradient of the trainer's loss.

    With several processes, each has the rollouts of all, rank 0's first, and L is the mean of their losses.

    Attributes:
        batch: the update batch U with ``coefficients`` c = -dL/dlog pi, ``entropy_coefficients`` b = -dL/dh (None
            without an entropy bonus), and a ``group`` for every prompt, (n, T). Rows are padded as
            by the trainer, because without position ids the model counts positions from the first column.
        advantages: (n,), on the CPU; the mean over a row's completion tokens where the trainer has one for each.
        rewards: (n,), on the CPU; NaN where no reward function gave one.
        logprobs: (n, T), of the completion tokens, from the trainer's own forward at its temperature.
        entropies: (n, T), likewise; None where the trainer computes none.
        old_logprobs: (n, T), under the policy that sampled; None where the trainer keeps only their sums.
        sampled_logprobs: (n, T), that the tokens were sampled with, NaN where not known; None where the trainer was
            given none.
        prompt_widths: (n,), columns of each row that hold its prompt and the prompt's padding.
        gradient: by name, before the optimizer's step: the trainer's own tensors, or those of its
            partitions, which are gathered at an access.
        gradient_scale: factor by which ``gradient`` is sum_i g_i: ``clip`` where it is clipped, times a loss scale that
            is still in it.
        clip: the factor by which the gradient was clipped.
        max_grad_norm: the norm it was clipped to; None where nothing clips.
        token_advantages: (n, T), where the trainer has an advantage for each token, else None.
        sources: n names of data sources or environments, None where the data set has none.
        images: further inputs of the model's forward for these rows; None where no rollout shows an image.
    """

    batch: Batch
    advantages: Tensor
    rewards: Tensor
    logprobs: Tensor
    entropies: Tensor | None
    old_logprobs: Tensor | None
    sampled_logprobs: Tensor | None
    prompt_widths: Tensor
    gradient: Gradients
    gradient_scale: float
    clip: float
    max_grad_norm: float | None
    token_advantages: Tensor | None = None
    sources: tuple[str | None, ...] = ()
    images: RowInputs | None = None

    def unclipped_gradient(self) -> Gradients:
        """Return sum_i g_i by name, from the trainer's own tensors; nothing of the parameters' size is copied.

        See ``UnclippedGradient`` for its rounding.
        """
        scale = self.gradient_scale
        return self.gradient if scale == 1.0 else cast(Gradients, UnclippedGradient(self.gradient, scale))

    def drawn_logprobs(self) -> Tensor | None:
        """Return float64 (m,), the log-probs that U was sampled with: the generation's, or else the trainer's."""
        logprobs = self.old_logprobs if self.sampled_logprobs is None else self.sampled_logprobs
        return None if logprobs is None else logprobs[self.batch.completion_mask].double().cpu()


def accumulated_gradient(model: nn.Module) -> Gradients:
    """Return the gradient of a model's trained parameters by name, its own tensors; None where no backward went."""
    return {
        name: None if p.grad is None else p.grad.detach() for name, p in model.named_parameters() if p.requires_grad
    }


def captured_step(
    rows: RolloutRows,
    device: torch.device,
    gradient: Gradients,
    clip: float,
    max_grad_norm: float | None,
    gradient_scale: float,
) -> CapturedStep:
    """Return the step with its token values on ``device``, numbering the prompts.

    Args:
        rows: the rollouts of all processes, on the CPU.
        device: the trainer's.
        gradient: by name, as the trainer has it before the optimizer's step.
        clip: factor by which the step's gradient is clipped.
        max_grad_norm: norm it is clipped to, None where nothing clips.
        gradient_scale: factor by which ``gradient`` is sum_i g_i: of its clipping, if it is clipped already, and of
            what the optimizer's step will take out.
    """
    on_device = rows.to(device)
    batch = Batch(
        on_device.input_ids,
        on_device.attention_mask,
        on_device.completion_mask,
        on_device.coefficients,
        on_device.entropy_coefficients if rows.entropy_coefficients.any() else None,
        _prompt_numbers(rows).to(device),
    )
    return CapturedStep(
        batch=batch,
        advantages=rows.advantages,
        rewards=rows.rewards,
        logprobs=on_device.logprobs,
        entropies=on_device.entropies,
        old_logprobs=on_device.old_logprobs,
        sampled_logprobs=on_device.sampled_logprobs,
        prompt_widths=rows.prompt_widths,
        gradient=gradient,
        gradient_scale=gradient_scale,
        clip=clip,
        max_grad_norm=max_grad_norm,
        token_advantages=on_device.token_advantages,
        sources=rows.sources,
        images=RowInputs.of(rows.input_ids, rows.attention_mask, rows.images) if rows.images else None,
    )


def _prompt_numbers(rows: RolloutRows) -> Tensor:
    """Return a number for each row's prompt, int64 (n,), from 0.

    Prompts without a number are distinguished by the tokens that the policy reads, over the rows of all processes,
    because a prompt's rollouts may be spread over two of them.
    """
    if rows.group is not None:
        return torch.unique(rows.group, return_inverse=True)[1]
    tokens = zip(rows.input_ids, rows.attention_mask, rows.prompt_widths.tolist(), strict=True)
    prompts = [tuple(ids[:width][mask[:width]].tolist()) for ids, mask, width in tokens]
    number = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    return torch.tensor([number[prompt] for prompt in prompts])


def with_step_counted(opt_state: AdamWState, gradient: Gradients) -> AdamWState:
    """Return the state with the numbers of updates after the step; a parameter without a gradient makes none."""
    layout = layout_of(gradient)
    steps = {name: step + (layout.get(name) is not None) for name, step in opt_state.step.items()}
    return opt_state._replace(step=steps)


def check_finite(gradient: Gradients) -> None:
    """Raise ``ValueError`` for a gradient that is not finite."""
    name = first_not_finite(local_shards(gradient))
    if name is not None:
        raise ValueError(f"the gradient of {name} is not finite, so the step has no direction")


def on_host(record: Value) -> Value:
    """Return a named tuple or dataclass with its tensors on the CPU, so that records are made without more waits.

    A dictionary of scalars takes one wait. The ``gradient`` of a captured step stays where it is.

    Example:
        >>> from fx_influence.types import TokenValues
        >>> on_host(TokenValues(torch.ones(1), torch.zeros(1))).logprobs.device.type
        'cpu'
    """
    return cast(Value, _on_host(record))


def _on_host(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.cpu()
    if isinstance(x, CapturedStep):
        return x._replace(**{name: _on_host(y) for name, y in x._asdict().items() if name != "gradient"})
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(_on_host, x))
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{field.name: _on_host(getattr(x, field.name)) for field in fields(x)})
    if isinstance(x, dict) and x and all(isinstance(y, Tensor) and y.dim() == 0 for y in x.values()):
        return dict(zip(x, torch.stack(list(x.values())).cpu().unbind(), strict=True))
    return x
