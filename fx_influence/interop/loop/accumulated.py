"""The gradient as the backward passes leave it, and what happens to it before the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fx_influence.core.dtensor import reduce_over_shards, to_local, to_numbers
from fx_influence.interop.live.guard import CaptureError

UNIFORM = 1e-4
"""Relative error up to which the gradients of all parameters have been multiplied by one factor; in half precision the
rounding of their dtype is allowed for too."""


class Clipped(NamedTuple):
    """Change of the gradient between the last backward pass and the optimizer's step.

    Attributes:
        factor: that it was multiplied by, at most 1.
        norm: of the gradient afterwards.
    """

    factor: float
    norm: float


class AccumulatedGradient:
    """Record the norm of each parameter's gradient after every backward pass, before clipping changes it.

    A hook on each parameter queues one reading for the end of its backward pass, when data parallelism has averaged
    too. Nothing is waited for and no gradient is copied.

    Args:
        model: whose trained parameters are looked at.
        guard: context of what runs inside a backward pass, which lets no exception pass.
    """

    def __init__(self, model: nn.Module, guard: Callable[[], AbstractContextManager[None]]) -> None:
        self._model, self._guard = model, guard
        self._parameters: dict[str, nn.Parameter] = {}
        self._handles: list[Any] = []
        self._norms: dict[str, Tensor] = {}
        self._is_queued = False

    def start(self) -> None:
        """Record from now on, until ``stop``."""
        self.stop()
        self._parameters = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        self._handles = [p.register_post_accumulate_grad_hook(self._queue) for p in self._parameters.values()]

    def stop(self) -> None:
        """Record no longer, and forget what was recorded."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._norms, self._is_queued = [], {}, False

    def has_arrived(self) -> bool:
        """Return whether a backward pass has left gradients at the parameters since ``start`` or ``forget``.

        FSDP2 keeps them elsewhere until a pass in which they are reduced, with ``set_requires_gradient_sync(False)``.
        """
        return bool(self._norms)

    def forget(self) -> None:
        """Forget the backward passes made up to now, whose gradients the loop has discarded."""
        self._norms = {}

    def is_reset(self) -> bool:
        """Return whether no gradient is left of the backward passes that were made: all are None."""
        return all(p.grad is None for p in self._parameters.values())

    def is_zero(self) -> bool:
        """Return whether every gradient is 0 or None."""
        return not any(bool(to_local(p.grad).any()) for p in self._parameters.values() if p.grad is not None)

    def clipped(self, loss_scale: float) -> Clipped:
        """Return the factor by which the gradient was multiplied since the last backward pass, as by clipping.

        Args:
            loss_scale: factor by which the loss was multiplied, which is taken out of the recorded norms.

        Raises:
            CaptureError: where parameters have different factors, or one above 1.
        """
        names = [name for name, p in self._parameters.items() if p.grad is not None]
        if set(names) != self._norms.keys():
            raise CaptureError(
                f"{len(names)} parameters have gradients at the optimizer's step and {len(self._norms)} had them after "
                "the last backward pass; expected the same. Zero gradients before the backward passes of a step"
            )
        if not names:
            raise CaptureError("no parameter has a gradient; expected a backward pass of a loss of the rollouts")
        before = self._full_norms(names, [self._norms[name] for name in names]) / loss_scale
        after = self._full_norms(names, norms_of(self._parameters, names))
        norm = float(after.norm())
        if not float(before.norm()):
            return Clipped(1.0, norm)
        factor = norm / float(before.norm())
        error = float((after - factor * before).norm()) / norm if norm else 0.0
        bound = max(UNIFORM, 4 * max(torch.finfo(self._parameters[name].dtype).eps for name in names))
        if not error <= bound:
            raise CaptureError(
                "the gradient was changed between its backward pass and the optimizer's step by other factors for some "
                "parameters than for others; expected one factor for all, as clip_grad_norm_ has. Clip by the norm "
                "over all parameters, and add no gradient without a backward pass"
            )
        if factor > 1 + bound:
            raise CaptureError(
                f"the gradient was multiplied by {factor:.4g} between its backward pass and the optimizer's step; "
                "expected at most 1, as clipping has. Scale the loss, and pass loss_scale= to add"
            )
        return Clipped(min(factor, 1.0), norm)

    def _full_norms(self, names: list[str], local: list[Tensor]) -> Tensor:
        """Return the norms of the full gradients from those of their local shards, float64 on the CPU."""
        squares = reduce_over_shards([x.double().square() for x in local], [self._parameters[name] for name in names])
        return torch.tensor(to_numbers(squares), dtype=torch.float64).sqrt()

    def _queue(self, _: Tensor) -> None:
        if self._is_queued:
            return
        self._is_queued = True
        with self._guard():
            engine: Any = torch.autograd.Variable._execution_engine
            # A callback that a callback queues runs after those that data parallelism has queued by then.
            engine.queue_callback(lambda: engine.queue_callback(self._read))

    def _read(self) -> None:
        self._is_queued = False
        # A backward pass that began before ``stop`` may end after it.
        if self._handles:
            with self._guard():
                names = [name for name, p in self._parameters.items() if p.grad is not None]
                self._norms = dict(zip(names, norms_of(self._parameters, names), strict=True))


def norms_of(parameters: dict[str, nn.Parameter], names: list[str]) -> list[Tensor]:
    """Return the norms of the named parameters' gradients, of their local shards, scalars on their devices."""
    grads = [to_local(g.detach()) for name in names if (g := parameters[name].grad) is not None]
    return [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
