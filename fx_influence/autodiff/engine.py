"""The passes over a batch that every estimate is made of, with the policy and the way it is read kept in one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fx_influence.autodiff.directional import curvature, token_jvp
from fx_influence.autodiff.ghost import JvpFn, linearize_losses
from fx_influence.autodiff.gradients import LinearOutputCaches, gradient_with_cache, reweighted_gradient
from fx_influence.autodiff.gram import gradient_gram
from fx_influence.autodiff.perturbed_values import can_vmap_directions, perturbed_token_values
from fx_influence.autodiff.token_values import all_token_values
from fx_influence.types import Apply, Batch, Gradients, Params, TokenValues


@dataclass(frozen=True)
class Engine:
    """Of ``apply`` over batches that this process holds; ``sharding`` has the same over several ranks.

    Each takes whole batches and gives whole results; see the function of the same name for what it is.
    """

    apply: Apply
    temperature: float = 1.0
    chunk_size: int | None = None

    def full_batch(self, field: str, batch: Batch) -> Batch:
        """The batch that the rows given belong to; ``field``: its name, for errors."""
        return batch

    def check_consistent(self, **facts: object) -> None:
        """Raise ``ValueError`` unless whoever takes part was given the same."""

    def check_gram(self, asked_by: str) -> None:
        """Raise ``ValueError`` where ``kernel`` cannot be had, naming what asks for it."""

    def values(self, params: Params, batch: Batch) -> TokenValues:
        return all_token_values(params, batch, *self._read)

    def perturbed_values(
        self, params: Params, block: Params, eta: float, batch: Batch, vmapped: bool = True
    ) -> TokenValues:
        return perturbed_token_values(params, block, eta, batch, *self._read, vmapped)

    def can_vmap_directions(self, params: Params, batch: Batch) -> bool:
        return can_vmap_directions(params, batch, *self._read)

    def gradient(self, params: Params, batch: Batch) -> Gradients:
        return self.gradient_with_cache(params, batch, 0)[0]

    def gradient_with_cache(
        self, params: Params, batch: Batch, memory_budget: int
    ) -> tuple[Gradients, LinearOutputCaches | None]:
        return gradient_with_cache(params, batch, *self._read, memory_budget)

    def reweighted_gradient(
        self, params: Params, batch: Batch, coefficients_fn: Callable[[TokenValues], Batch], memory_budget: int
    ) -> tuple[Batch, Gradients]:
        return reweighted_gradient(
            params, batch, self.apply, coefficients_fn, self.temperature, self.chunk_size, memory_budget
        )

    def jvp(
        self, params: Params, direction: Params, batch: Batch, caches: LinearOutputCaches | None = None
    ) -> TokenValues:
        return token_jvp(params, direction, batch, *self._read, caches)

    def linearize(
        self, params: Params, batch: Batch, memory_budget: int, at_once: int
    ) -> tuple[Gradients, JvpFn] | None:
        return linearize_losses(params, batch, *self._read, memory_budget, at_once)

    def gram(
        self, params: Params, batch_a: Batch, batch_b: Batch, diagonal: Params, memory_budget: int, apply_b: Apply
    ) -> Tensor:
        return gradient_gram(
            params,
            batch_a,
            batch_b,
            diagonal,
            self.apply,
            self.temperature,
            memory_budget,
            self.chunk_size,
            apply_b=apply_b,
        )

    def curvature(self, params: Params, direction: Params, batch: Batch) -> Tensor:
        return curvature(params, direction, batch, *self._read)

    @property
    def _read(self) -> tuple[Apply, float, int | None]:
        return self.apply, self.temperature, self.chunk_size
