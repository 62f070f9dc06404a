"""The passes over a batch that every estimate consists of, bound to one policy, temperature and chunk size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from fx_influence.autodiff.directional import curvature, hessian_product, token_jvp
from fx_influence.autodiff.ghost import JvpFn, gradients_by_group, linearize_losses
from fx_influence.autodiff.gradients import LinearOutputCaches, gradient_with_cache, reweighted_gradients
from fx_influence.autodiff.gram import gradient_gram
from fx_influence.autodiff.perturbed_values import can_vmap_directions, perturbed_token_values
from fx_influence.autodiff.token_values import all_token_moments, all_token_values
from fx_influence.types import Apply, Batch, Gradients, Params, TokenMoments, TokenValues


class _Options(TypedDict):
    apply: Apply
    temperature: float
    chunk_size: int | None


@dataclass(frozen=True)
class Engine:
    """Single-process evaluation of ``apply``; see ``distributed.engine`` for several ranks.

    Every method takes full batches and returns full results, whatever the number of processes. Its arguments and
    results are those of the function that it calls, which documents them.

    Args:
        apply: policy, see ``make_functional``.
        temperature: divisor of the logits.
        chunk_size: rows per forward; None chooses by tokens.
    """

    apply: Apply
    temperature: float = 1.0
    chunk_size: int | None = None

    def full_batch(self, field: str, batch: Batch) -> Batch:
        """Return the rows of all processes, of which ``batch`` holds this process's; ``field`` names it in errors."""
        return batch

    def full_tokens(self, batch: Batch, values: Tensor) -> Tensor:
        """Return int64 values (n, T) of the tokens of all processes, -1 in padding; those given belong to ``batch``."""
        return values

    def check_consistent(self, **arguments: object) -> None:
        """Raise ``ValueError`` unless every process was given the same ``arguments``."""

    def check_gram(self, asked_by: str) -> None:
        """Raise ``ValueError`` where ``gram`` is not supported; ``asked_by`` names the option that needs it."""

    def values(self, params: Params, batch: Batch) -> TokenValues:
        """Return ``all_token_values`` of the batch."""
        return all_token_values(params, batch, **self._options)

    def moments(self, params: Params, batch: Batch) -> TokenMoments:
        """Return ``all_token_moments`` of the batch."""
        return all_token_moments(params, batch, **self._options)

    def perturbed_values(
        self, params: Params, directions: Params, eta: float, batch: Batch, vmapped: bool = True
    ) -> TokenValues:
        """Return ``perturbed_token_values`` for a block of directions."""
        return perturbed_token_values(params, directions, eta, batch, vmapped=vmapped, **self._options)

    def can_vmap_directions(self, params: Params, batch: Batch) -> bool:
        """Return whether ``perturbed_values`` may take several directions in one pass."""
        return can_vmap_directions(params, batch, **self._options)

    def gradient(self, params: Params, batch: Batch) -> Gradients:
        """Return ``batch_gradient`` of the batch."""
        return self.gradient_with_cache(params, batch, 0)[0]

    def gradients_by_group(
        self, params: Params, batch: Batch, groups: Sequence[Tensor], memory_budget: int
    ) -> list[Gradients]:
        """Return the gradient of each group of rows."""
        return gradients_by_group(params, batch, groups, memory_budget=memory_budget, **self._options)

    def gradient_with_cache(
        self, params: Params, batch: Batch, memory_budget: int
    ) -> tuple[Gradients, LinearOutputCaches | None]:
        """Return the gradient and the linear layers' outputs for ``jvp`` of the same batch."""
        return gradient_with_cache(params, batch, memory_budget=memory_budget, **self._options)

    def reweighted_gradients(
        self,
        params: Params,
        batch: Batch,
        groups: Sequence[Tensor],
        coefficients_fn: Callable[[TokenValues], Sequence[Batch]],
        memory_budget: int,
        dtype: torch.dtype | None = None,
    ) -> tuple[Sequence[Batch], Iterator[Gradients]]:
        """Return the batch with coefficients made from its token values, and its gradients by group of rows."""
        return reweighted_gradients(
            params,
            batch,
            groups,
            coefficients_fn=coefficients_fn,
            memory_budget=memory_budget,
            dtype=dtype,
            **self._options,
        )

    def jvp(
        self, params: Params, direction: Params, batch: Batch, caches: LinearOutputCaches | None = None
    ) -> TokenValues:
        """Return ``token_jvp`` along ``direction``."""
        return token_jvp(params, direction, batch, caches=caches, **self._options)

    def linearize(
        self,
        params: Params,
        batch: Batch,
        memory_budget: int,
        num_directions: int,
        with_gradient: bool = True,
        groups: Sequence[Tensor] | None = None,
        parts: Sequence[Batch] = (),
    ) -> tuple[Gradients, JvpFn] | None:
        """Return the gradient and a function from directions u to <u, g_i>, or None; see ``linearize_losses``."""
        return linearize_losses(
            params,
            batch,
            memory_budget=memory_budget,
            num_directions=num_directions,
            with_gradient=with_gradient,
            groups=groups,
            parts=parts,
            **self._options,
        )

    def gram(
        self, params: Params, batch_a: Batch, batch_b: Batch, diagonal: Params, memory_budget: int, apply_b: Apply
    ) -> Tensor:
        """Return ``gradient_gram`` of the rows' gradients, with ``apply_b`` for the rows of ``batch_b``."""
        return gradient_gram(
            params, batch_a, batch_b, diagonal, apply_b=apply_b, memory_budget=memory_budget, **self._options
        )

    def hessian_product(
        self, params: Params, direction: Params, batch: Batch, slopes: Tensor | None = None
    ) -> Gradients:
        """Return the derivative of the batch's gradient along ``direction``; see the function."""
        return hessian_product(params, direction, batch, slopes=slopes, **self._options)

    def curvature(self, params: Params, direction: Params, batch: Batch) -> Tensor:
        """Return the second derivative of the batch's weighted token values along ``direction``."""
        return curvature(params, direction, batch, **self._options)

    @property
    def _options(self) -> _Options:
        return {"apply": self.apply, "temperature": self.temperature, "chunk_size": self.chunk_size}
