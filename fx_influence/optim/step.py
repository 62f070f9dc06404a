"""AdamW's step applied to gradients of an objective, block by block, so that the step itself takes little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from fx_influence.core.computed import Partition, local_shards, partition_of
from fx_influence.core.dtensor import reduce_over_shards, to_local
from fx_influence.core.tree import Direction, dot, dot_by_name, every_nth, promote
from fx_influence.optim.adamw import MOMENTS, StepInputs, moments_of, optimized_weight, step_terms
from fx_influence.optim.clipping import UnclippedGradient, clip_factor, stored_gradient
from fx_influence.types import AdamWHyper, AdamWState, Clip, Gradients, Params, Preconditioner

Value = TypeVar("Value")

BLOCK, CPU_BLOCK = 2**20, 2**16
"""Entries whose step is computed at once, on an accelerator and on a CPU, whose caches hold the terms of so many: about
ten times their memory."""


class InnerProducts(NamedTuple):
    """Inner products <x, .> of a vector x with the terms of a step that do not contain U's gradient, float64 scalars.

    ``direction``: with the step itself. ``clipping``: what the derivative of kappa takes off <x, gain * g>, a part of
    the baseline; 0 where kappa is fixed.
    """

    direction: Tensor
    baseline: Tensor
    momentum: Tensor
    weight_decay: Tensor
    clipping: Tensor


def add_inner_products(products: Sequence[InnerProducts]) -> InnerProducts:
    """Return the inner products of a sum of vectors from those of its terms."""
    return InnerProducts(*(torch.stack(field).sum() for field in zip(*products, strict=True)))


@dataclass(frozen=True)
class AdamWStep:
    """One AdamW step as a map of other vectors: ``adamw_decompose`` without its five vectors of the parameters' size.

    Where processes have a partition of the optimizer's state each, a process computes the step of its own entries, and
    the vectors that a step is given or gives are complete: each is gathered once it is computed.

    Attributes:
        grads: g by name, before clipping. An ``UnclippedGradient`` is divided a block of entries at a time.
        opt_state: m, s and step before the step.
        params: theta by name, or its roundings that the forward has.
        preconditioner: see ``adamw_decompose``.
        clip: kappa, scalar.
        clipping: whether derivatives hold kappa fixed or follow it as a function of the gradient's norm.
        partition: of the optimizer's state over processes, of which the first three then are the shards; else None.
    """

    grads: Gradients
    opt_state: AdamWState
    params: Params
    preconditioner: Preconditioner
    clip: Tensor
    clipping: Clip = "frozen"
    partition: Partition | None = None

    @classmethod
    def of(
        cls,
        grads: Gradients,
        opt_state: AdamWState,
        params: Params,
        preconditioner: Preconditioner,
        max_grad_norm: float | None,
        clipping: Clip = "frozen",
    ) -> AdamWStep:
        """Return the step; the inputs are those of ``adamw_decompose``, checked by its ``check_adamw_inputs``."""
        partition = partition_of(opt_state.exp_avg)
        if partition is not None:
            grads, params = _shards_of_gradient(grads, partition), {**local_shards(params, partition)}
            opt_state = _shards_of_state(opt_state, partition)
        clip = clip_factor(grads, max_grad_norm, params)
        return cls(grads, opt_state, params, preconditioner, clip, clipping, partition)

    def shards(self, x: Mapping[str, Value]) -> dict[str, Value]:
        """Return the entries of tensors that this process makes the step of; all of them without a partition."""
        return {**local_shards(x, self.partition)}

    def gather_(self, shards: Params) -> Params:
        """Return the complete tensors of ``shards``, which is emptied; itself without a partition."""
        return shards if self.partition is None else self.partition.gather_(shards)

    def update_products(self, u: Direction) -> dict[str, Tensor]:
        """Return <u, g> by parameter, float64 scalars: with u = gain * x the terms of <x, gain * g>."""
        stored, divisor = stored_gradient(self.grads)
        products, scale = dot_by_name(stored, self.shards(u.unit)), u.scale / divisor
        return {name: (scale * product).to(self.params[name].device) for name, product in products.items()}

    def precondition_(self, x: Params) -> InnerProducts:
        """Return <x, .> with the step and its terms, and multiply x by the step's gain, in place: one pass does both.

        Entries of parameters that the step does not move become 0. Where kappa is differentiated, x becomes the
        transposed derivative of the step with respect to g, and the baseline what is left of the step.

        Example:
            >>> from fx_influence.types import AdamWHyper
            >>> zero = torch.zeros(2)
            >>> state = AdamWState({"w": zero}, {"w": zero}, {}, {"w": 0}, {"w": AdamWHyper(weight_decay=0.1)}, lr=1e-3)
            >>> step = AdamWStep.of({"w": torch.tensor([3.0, -2.0])}, state, {"w": torch.ones(2)}, "frozen", None)
            >>> x = {"w": torch.ones(2)}
            >>> round(step.precondition_(x).weight_decay.item(), 6), torch.equal(x["w"], step.gain()["w"])
            (-0.2, True)
        """
        return self.precondition_all_([x])[0]

    def precondition_all_(self, xs: Sequence[Params]) -> list[InnerProducts]:
        """Do the same for several vectors with the same names, for whose entries the step's terms are computed once."""
        names, shards = list(xs[0]), [self.shards(x) for x in xs]
        totals = [self._precondition_(name, [x[name] for x in shards]) for name in names]
        by_vector = torch.stack(reduce_over_shards(totals, [shards[0][name] for name in names])).sum(0)
        products = [self._with_clipping_(x, total) for x, total in zip(shards, by_vector, strict=True)]
        for x, local in zip(xs, shards, strict=True):
            self._replace_(x, local)
        return products

    def _replace_(self, x: Params, shards: Params) -> None:
        """Replace the tensors of x, whose memory the shards have, by the complete ones that are gathered of these."""
        # Freed before those are gathered.
        x.clear()
        x.update(self.gather_(shards))

    def _with_clipping_(self, x: Params, products: Tensor) -> InnerProducts:
        """Return the inner products (4,) with kappa fixed as those wanted, and change x likewise."""
        direction, baseline, momentum, weight_decay = products
        differentiated = self.clipping == "differentiated"
        clipping = self.differentiate_clipping_(x) if differentiated else torch.zeros_like(direction)
        return InnerProducts(direction, baseline + clipping, momentum, weight_decay, clipping)

    def differentiate_clipping_(self, x: Params) -> Tensor:
        """Add the term of kappa's derivative to a cotangent x of g with kappa fixed; return what it takes off <x, g>.

        Where the step clips, kappa = max_norm / (n + 1e-6) with n = |g|, and x becomes x - <x, g> g / (n (n + 1e-6)):
        next to nothing along g, since a longer gradient is clipped to the same length.

        Example:
            >>> from fx_influence.types import AdamWHyper
            >>> zero, g = {"w": torch.zeros(2)}, {"w": torch.tensor([3.0, 4.0])}
            >>> state = AdamWState(zero, zero, {}, {"w": 0}, {"w": AdamWHyper()}, lr=1e-3)
            >>> x = {"w": torch.tensor([5.0, 0.0])}
            >>> _ = AdamWStep.of(g, state, zero, "frozen", max_grad_norm=1.0).differentiate_clipping_(x)
            >>> [round(entry, 3) for entry in x["w"].tolist()]
            [3.2, -2.4]
        """
        stored, divisor = stored_gradient(self.grads)
        reached = {name: g for name, g in stored.items() if g is not None}
        norm = dot(reached, reached).sqrt() / divisor
        if not self.clip < 1:
            return torch.zeros_like(norm)
        product = dot({name: g for name, g in reached.items() if name in x}, x) / divisor
        factor = float(product / (norm * (norm + 1e-6))) / divisor
        for name, g in reached.items():
            # The norm is over all parameters, those that the optimizer does not hold included.
            if name in x:
                x[name].sub_(g.to(x[name].dtype), alpha=factor)
            else:
                x[name] = -factor * g.to(promote(g.dtype))
        return product * (norm / (norm + 1e-6))

    def keep_fresh_(self, x: Params) -> None:
        """Set x to 0, in place, except on coordinates J, whose denominator comes from this very gradient or eps.

            J = {j: sqrt(shat_j / B2) <= 10 eps,  or  (1 - beta2) ghat_j^2 > shat_j / 2}

        There gamma is about 1 / |g|: the step has the size of the learning rate whatever the gradient's, and rollouts
        whose gradients cancel in g have large influences that cancel too. At the first step of a fresh optimizer J is
        everything.

        Example:
            >>> from fx_influence.types import AdamWHyper
            >>> one, s = torch.ones(2), torch.tensor([0.0, 1.0])
            >>> state = AdamWState({"w": one}, {"w": s}, {}, {"w": 9}, {"w": AdamWHyper()}, lr=1e-3)
            >>> x = {"w": torch.tensor([3.0, 1.0])}
            >>> AdamWStep.of({"w": one}, state, {"w": one}, "frozen", None).keep_fresh_(x)
            >>> x["w"].tolist()
            [3.0, 0.0]
        """
        self._scale_(x, _is_fresh)

    def gain(self) -> Params:
        """Return the diagonal gamma by name, a vector of the parameters' size."""
        return self._term("gain")

    def direction(self) -> Params:
        """Return v by name, a vector of the parameters' size."""
        return self._term("direction")

    def baseline(self) -> Params:
        """Return v_baseline by name, a vector of the parameters' size."""
        return self._term("baseline")

    def move_(
        self, name: str, xs: Sequence[Tensor], theta: Tensor, gradient: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """Replace the local entries of several tensors by theta + lr v(g_k), each with a gradient g_k in place of g.

        The clipping factor stays that of g.

        Args:
            name: of the parameter.
            xs: K tensors like the parameter's shard, from which the g_k are made.
            theta: the parameter's shard, to which the step is added.
            gradient: function that returns g_k (K, B) from B entries of the xs, (K, B), and of g, (B,).

        Example:
            >>> from fx_influence.types import AdamWHyper
            >>> zero = {"w": torch.zeros(2)}
            >>> state = AdamWState(zero, zero, {}, {"w": 0}, {"w": AdamWHyper()}, lr=1e-3)
            >>> step = AdamWStep.of({"w": torch.tensor([3.0, -2.0])}, state, zero, "frozen", None)
            >>> x = torch.tensor([4.0, 1.0])
            >>> step.move_("w", [x], zero["w"], lambda xs, g: g - xs)
            >>> [round(entry, 6) for entry in x.tolist()]
            [0.001, 0.001]
        """
        local = [to_local(x) for x in xs]
        if not self.moves(name):
            for x in local:
                x.copy_(to_local(theta))
            return
        hyper, tau = self.opt_state.hyper[name], self.opt_state.step[name] + 1
        for (*blocks, start), inputs in self._blocks(name, [*local, to_local(theta)]):
            g = gradient(torch.stack(blocks), inputs.g.to(blocks[0].dtype))
            directions = self._terms(inputs._replace(g=g.to(inputs.g.dtype)), hyper, tau)["direction"]
            for block, direction in zip(blocks, directions, strict=True):
                torch.add(start, direction.to(start.dtype), alpha=self.opt_state.lr, out=block)

    def sample(self, stride: int) -> AdamWStep:
        """Return the step of every ``stride``-th entry of each parameter's shard, in tensors of its own.

        Clipping stays that of the full gradient.

        Example:
            >>> from fx_influence.types import AdamWHyper
            >>> zero = torch.zeros(9)
            >>> state = AdamWState({"w": zero}, {"w": zero}, {}, {"w": 0}, {"w": AdamWHyper()}, lr=1e-3)
            >>> step = AdamWStep.of({"w": torch.ones(9)}, state, {"w": torch.arange(9.0)}, "frozen", None)
            >>> step.sample(3).params["w"].tolist()
            [0.0, 3.0, 6.0]
        """
        state, masters = self.opt_state, self.opt_state.master_weights
        exp_avg, exp_avg_sq, maximum = (
            every_nth(x, stride) for x in (state.exp_avg, state.exp_avg_sq, state.max_exp_avg_sq)
        )
        return replace(
            self,
            grads={**every_nth(self.grads, stride)},
            opt_state=state._replace(
                exp_avg=exp_avg,
                exp_avg_sq=exp_avg_sq,
                max_exp_avg_sq=maximum,
                master_weights=None if masters is None else every_nth(masters, stride),
            ),
            params=every_nth(self.params, stride),
            partition=None,
        )

    def inputs(self, name: str) -> StepInputs:
        """Return the inputs of a parameter that the step moves."""
        g = self.grads[name]
        assert g is not None
        theta, *moments = self._stored(name)
        return StepInputs.promoted(theta, moments, g, self.clip)

    def _stored(self, name: str) -> list[Tensor]:
        """Return theta of a parameter, as the optimizer moves it, and its moments."""
        return [optimized_weight(name, self.opt_state, self.params), *moments_of(name, self.opt_state)]

    def _ones(self) -> Params:
        return {name: torch.ones_like(p, dtype=promote(p.dtype)) for name, p in self.params.items()}

    def _term(self, term: str) -> Params:
        out = self._ones()
        self._scale_(out, lambda inputs, hyper, tau: self._terms(inputs, hyper, tau)[term])
        return out

    def _terms(self, inputs: StepInputs, hyper: AdamWHyper, tau: int) -> dict[str, Tensor]:
        return step_terms(inputs, hyper, tau, self.preconditioner)

    def _precondition_(self, name: str, xs: Sequence[Tensor]) -> Tensor:
        """Multiply the x by the gain in place; return their inner products with the step's terms, (len(xs), 4)."""
        local = [to_local(x) for x in xs]
        total = torch.zeros(len(xs), 4, dtype=torch.float64, device=local[0].device)
        if not self.moves(name):
            for x in local:
                x.zero_()
            return total
        hyper, tau = self.opt_state.hyper[name], self.opt_state.step[name] + 1
        for blocks, inputs in self._blocks(name, local):
            terms = self._terms(inputs, hyper, tau)
            gain = terms.pop("gain")
            vectors, others = (torch.stack([t.double().flatten() for t in y]) for y in (blocks, terms.values()))
            total += vectors @ others.T
            for block in blocks:
                block.mul_(gain)
        return total

    def _scale_(self, x: Params, factor: Callable[[StepInputs, AdamWHyper, int], Tensor]) -> None:
        shards = self.shards(x)
        for name, v in shards.items():
            local = to_local(v)
            if not self.moves(name):
                local.zero_()
                continue
            hyper, tau = self.opt_state.hyper[name], self.opt_state.step[name] + 1
            for [block], inputs in self._blocks(name, [local]):
                block.mul_(factor(inputs, hyper, tau).to(block.device))
        self._replace_(x, shards)

    def moves(self, name: str) -> bool:
        """Return whether the step moves a parameter: backward reached it, and the optimizer holds it."""
        return stored_gradient(self.grads)[0].get(name) is not None and name in self.opt_state.hyper

    def _blocks(self, name: str, xs: Sequence[Tensor]) -> Iterator[tuple[Sequence[Tensor], StepInputs]]:
        """Yield views of the local entries of the x, some at a time, and the step's inputs there."""
        stored, divisor = stored_gradient(self.grads)
        g = stored[name]
        assert g is not None
        tensors = [*xs, *map(to_local, (g, *self._stored(name)))]
        if all(t.is_contiguous() for t in tensors):
            size = CPU_BLOCK if xs[0].device.type == "cpu" else BLOCK
            columns = [t.view(-1).split(size) for t in tensors]
        else:
            # Entries of tensors with different strides cannot be paired as flat blocks.
            columns = [(t,) for t in tensors]
        for entries in zip(*columns, strict=True):
            g_block, theta, *moments = entries[len(xs) :]
            yield entries[: len(xs)], StepInputs.promoted(theta, moments, g_block, self.clip, divisor)


def _shards_of_gradient(grads: Gradients, partition: Partition) -> Gradients:
    stored, factor = stored_gradient(grads)
    shards = {**local_shards(stored, partition)}
    return shards if factor == 1.0 else cast(Gradients, UnclippedGradient(shards, factor))


def _shards_of_state(state: AdamWState, partition: Partition) -> AdamWState:
    trees: dict[str, Any] = {name: getattr(state, name) for name in (*MOMENTS, "master_weights")}
    shards: dict[str, Any] = {name: x if x is None else local_shards(x, partition) for name, x in trees.items()}
    return state._replace(**shards)


def _is_fresh(inputs: StepInputs, hyper: AdamWHyper, tau: int) -> Tensor:
    ghat, second = inputs.second_moment(hyper)
    highest = second if inputs.maximum is None else torch.maximum(inputs.maximum, second)
    floor = (10 * hyper.eps) ** 2 * (1 - hyper.beta2**tau)
    return (highest <= floor) | ((1 - hyper.beta2) * ghat.square() > highest / 2)
