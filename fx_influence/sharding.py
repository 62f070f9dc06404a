"""Passes whose rows are dealt to the ranks of a device mesh: every rank takes its own and has the whole result."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fx_influence.checks import check_fields
from fx_influence.contraction import Contract
from fx_influence.derivatives import Tapes
from fx_influence.parts import rows
from fx_influence.passes import Passes
from fx_influence.tree import promote
from fx_influence.types import AdamWState, Apply, Batch, Gradients, Params, TokenValues

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Value = TypeVar("Value")


def passes_over(apply: Apply, temperature: float, chunk_size: int | None, mesh: DeviceMesh | None) -> Passes:
    """The passes of this process alone, or with a mesh those of its ranks together."""
    if mesh is None:
        return Passes(apply, temperature, chunk_size)
    return DealtPasses(apply, temperature, chunk_size, mesh=mesh)


@dataclass(frozen=True, kw_only=True)
class DealtPasses(Passes):
    """``Passes`` over the ranks of ``mesh``: batches, parameters and directions are the same on each, the work is not.

    Rows are dealt by length, so that no rank has more to do than another; a rank's passes are those of ``Passes``
    over its own rows. Gradients are summed by one all-reduce; what belongs to rows or tokens is gathered; a JVP and a
    kernel need nothing else from other ranks. In float64 results agree with those of one process to rounding.
    """

    mesh: DeviceMesh

    def whole_batch(self, field: str, batch: Batch) -> Batch:
        return gathered_batch(self.mesh, field, batch)

    def check_agreed(self, **facts: object) -> None:
        check_agreed(self.mesh, {key: fact for name, value in facts.items() for key, fact in _facts(name, value)})

    def values(self, params: Params, batch: Batch) -> TokenValues:
        deal = deal_of(batch, self.mesh)
        return deal.whole_values(super().values(params, deal.own(batch)))

    def moved_values(self, params: Params, block: Params, eta: float, batch: Batch) -> TokenValues:
        deal = deal_of(batch, self.mesh)
        return deal.whole_values(super().moved_values(params, block, eta, deal.own(batch)))

    def taped_gradient(self, params: Params, batch: Batch, memory_budget: int) -> tuple[Gradients, Tapes | None]:
        own, tapes = super().taped_gradient(params, deal_of(batch, self.mesh).own(batch), memory_budget)
        return self._summed(params, own), tapes

    def weighted_gradient(
        self, params: Params, batch: Batch, weigh: Callable[[TokenValues], Batch], memory_budget: int
    ) -> tuple[Batch, Gradients]:
        deal = deal_of(batch, self.mesh)
        weighted: list[Batch] = []

        def weigh_own(values: TokenValues) -> Batch:
            weighted.append(weigh(deal.whole_values(values)))
            return deal.own(weighted[0])

        _, own = super().weighted_gradient(params, deal.own(batch), weigh_own, memory_budget)
        return weighted[0], self._summed(params, own)

    def jvp(self, params: Params, direction: Params, batch: Batch, tapes: Tapes | None = None) -> TokenValues:
        deal = deal_of(batch, self.mesh)
        return deal.whole_values(super().jvp(params, direction, deal.own(batch), tapes))

    def contraction(self, params: Params, batch: Batch, memory_budget: int) -> tuple[Gradients, Contract] | None:
        deal = deal_of(batch, self.mesh)
        found = super().contraction(params, deal.own(batch), memory_budget)
        if not all(collected(self.mesh, found is not None)):
            return None
        assert found is not None
        gradient, contract = found
        return self._summed(params, gradient), lambda u: deal.whole(contract(u))

    def kernel(
        self, params: Params, batch_a: Batch, batch_b: Batch, diagonal: Params, memory_budget: int, apply_b: Apply
    ) -> Tensor:
        # Each rank has a block of the matrix, and needs the gradients of the block's rows and columns alone.
        shape, rank = (len(batch_a.input_ids), len(batch_b.input_ids)), rank_in(self.mesh)
        down = _blocks_down(*shape, self.mesh.size())
        a, b = (
            _cut(n, k, batch_a.input_ids.device) for n, k in zip(shape, (down, self.mesh.size() // down), strict=True)
        )
        own = rows(batch_a, a[rank // len(b)]), rows(batch_b, b[rank % len(b)])
        blocks = gathered(self.mesh, super().kernel(params, *own, diagonal, memory_budget, apply_b))
        out = blocks.new_empty(shape)
        for k, block in enumerate(blocks):
            out[a[k // len(b)].unsqueeze(1), b[k % len(b)]] = block
        return out

    def curvature(self, params: Params, direction: Params, batch: Batch) -> Tensor:
        own = super().curvature(params, direction, deal_of(batch, self.mesh).own(batch))
        return gathered(self.mesh, own).sum()

    def _summed(self, params: Params, gradient: Gradients) -> Gradients:
        """The sum over ranks, by name; None where no rank's rows reach a parameter."""
        reached = [any(by_rank) for by_rank in zip(*self._everyones_reach(gradient), strict=True)]
        out: Gradients = {}
        for (name, g), some in zip(gradient.items(), reached, strict=True):
            out[name] = torch.zeros_like(params[name], dtype=promote(params[name].dtype)) if some and g is None else g
        sum_over_ranks(self.mesh, [g for g in out.values() if g is not None])
        return out

    def _everyones_reach(self, gradient: Gradients) -> list[list[bool]]:
        return collected(self.mesh, [g is not None for g in gradient.values()])


class Deal(NamedTuple):
    """Which rank takes which rows of a batch, each as many; where they do not go round some are taken a second time.

    ``table``: (ranks, m), the rows by rank. ``first``: bool (ranks, m), False for a row taken a second time.
    """

    mesh: DeviceMesh
    table: Tensor
    first: Tensor

    def own(self, batch: Batch) -> Batch:
        """This rank's rows; one taken a second time has no coefficients but 0, so that no sum counts it twice."""
        rank = rank_in(self.mesh)
        mine, once = rows(batch, self.table[rank]), self.first[rank].unsqueeze(1)
        c, b = (None if w is None else torch.where(once, w, 0.0) for w in mine[3:5])
        return mine._replace(coefficients=c, entropy_coefficients=b)

    def whole(self, own: Tensor, axis: int = 0) -> Tensor:
        """What every rank found of its rows along ``axis``, in the order of the batch."""
        everyone = gathered(self.mesh, own.movedim(axis, 0)).flatten(0, 1)
        out = everyone.new_empty(int(self.first.sum()), *everyone.shape[1:])
        out[self.table[self.first]] = everyone[self.first.flatten()]
        return out.movedim(0, axis)

    def whole_values(self, own: TokenValues) -> TokenValues:
        return TokenValues(*(self.whole(x, axis=-2) for x in own))


def deal_of(batch: Batch, mesh: DeviceMesh) -> Deal:
    """Rows by length in turn, so that ranks have rows of about the same lengths."""
    count, ranks = len(batch.input_ids), mesh.size()
    order = batch.attention_mask.sum(-1).argsort(descending=True, stable=True)
    each = -(-count // ranks)
    place = torch.arange(each * ranks, device=order.device).view(each, ranks).T
    return Deal(mesh, order[place.clamp(max=count - 1)], place < count)


def _blocks_down(n_a: int, n_b: int, ranks: int) -> int:
    """Into how many blocks of rows a matrix is best cut, so that each rank's block has few rows and columns."""
    return min((d for d in range(1, ranks + 1) if ranks % d == 0), key=lambda d: -(-n_a // d) + -(-n_b * d // ranks))


def _cut(count: int, pieces: int, device: torch.device) -> Tensor:
    """(pieces, m): every row once, and the last as often again as it takes to make the pieces equal."""
    each = -(-count // pieces)
    return torch.arange(each * pieces, device=device).clamp(max=count - 1).view(pieces, each)


def gathered_batch(mesh: DeviceMesh, field: str, batch: Batch) -> Batch:
    """The rows of all ranks as one batch, those of rank 0 first; padded on the right to the widest rank's.

    A rank may hold no row: ``input_ids`` of shape (0, T). ``group`` means the same prompt on every rank. Raises
    ``ValueError`` on every rank where one has fields that do not fit, or others than the rest.
    """
    _check_everywhere(mesh, lambda: check_fields(field, batch))
    present = {name: x for name, x in batch._asdict().items() if x is not None}
    held = collected(mesh, (batch.input_ids.shape, {name: x.dtype for name, x in present.items()}))
    full = [(shape, dtypes) for shape, dtypes in held if shape[0]]
    if not full:
        raise ValueError(f"{field}.input_ids has no row on any of {len(held)} ranks; pass at least one rollout")
    for name in Batch._fields:
        kinds = [dtypes.get(name) for _, dtypes in full]
        if len(set(kinds)) > 1:
            raise ValueError(f"{field}.{name} is {kinds} by rank; pass the same fields of one dtype on every rank")
    counts, width = [shape[0] for shape, _ in held], max(shape[1] for shape, _ in full)

    def field_of_all(name: str, dtype: torch.dtype) -> Tensor:
        own, size = getattr(batch, name), (max(counts), width)[: 1 if name == "group" else 2]
        padded = torch.zeros(size, dtype=dtype, device=batch.input_ids.device)
        if own is not None:
            padded[tuple(slice(n) for n in own.shape)] = own
        return torch.cat([x[:count] for x, count in zip(gathered(mesh, padded), counts, strict=True)])

    return Batch(**{name: field_of_all(name, dtype) for name, dtype in full[0][1].items()})


def check_agreed(mesh: DeviceMesh, facts: Mapping[str, object]) -> None:
    """Raise ``ValueError`` on every rank where two differ in a fact, naming it and them."""
    everyone = collected(mesh, dict(facts))
    for rank, theirs in enumerate(everyone):
        for name in everyone[0].keys() | theirs.keys():
            ours, other = everyone[0].get(name), theirs.get(name)
            if ours != other:
                raise ValueError(
                    f"{name} is {reprlib.repr(ours)} on rank 0 and {reprlib.repr(other)} on rank {rank}; only the rows "
                    "of the batches are a rank's own, so give every rank the same"
                )


def _check_everywhere(mesh: DeviceMesh, check: Callable[[], None]) -> None:
    """What one rank's check raises is raised on all, or the others would wait for it for ever."""
    problem = None
    try:
        check()
    except ValueError as error:
        problem = str(error)
    for rank, found in enumerate(collected(mesh, problem)):
        if found is not None:
            raise ValueError(f"on rank {rank}: {found}")


def _facts(name: str, value: object) -> Iterator[tuple[str, object]]:
    """What can be compared of an argument: of tensors their layout and a checksum, of a function that there is one."""
    if isinstance(value, AdamWState):
        for field, part in value._asdict().items():
            yield from _facts(f"{name}.{field}", part)
    elif isinstance(value, dict) and any(isinstance(x, Tensor) for x in value.values()):
        for key, x in value.items():
            yield f"the layout of {name}[{key!r}]", None if x is None else (tuple(x.shape), str(x.dtype))
        yield f"the checksum of {name}", fingerprint(value)
    else:
        yield name, "a function" if callable(value) else value


def fingerprint(tree: Mapping[str, Tensor | None]) -> str:
    """A checksum of all bits, whatever the order in which a device adds them up."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [int(x.view(integers[x.element_size()]).sum(dtype=torch.int64)) for x in tree.values() if x is not None]
    return f"{hash(tuple(sums)) % 2**64:016x}"


def rank_in(mesh: DeviceMesh) -> int:
    """This rank's place in the mesh, counted along its last axis first."""
    return int((mesh.mesh.flatten() == dist.get_rank()).nonzero())


def collected(mesh: DeviceMesh, value: Value) -> list[Value]:
    """Every rank's value in the order of the mesh; values are pickled, as is safe among ranks of one job."""
    found = [value]
    for group in _groups(mesh):
        lists: list[list[Value]] = [[] for _ in range(group.size())]
        dist.all_gather_object(lists, found, group=group)
        found = [one for some in lists for one in some]
    return found


def gathered(mesh: DeviceMesh, own: Tensor) -> Tensor:
    """Every rank's tensor of one shape, (ranks, ...), in the order of the mesh."""
    # gloo gathers no bool
    found = (own.to(torch.uint8) if own.dtype == torch.bool else own).contiguous().unsqueeze(0)
    for group in _groups(mesh):
        everyone = found.new_empty(group.size() * len(found), *own.shape)
        dist.all_gather_into_tensor(everyone, found, group=group)
        found = everyone
    return found.to(own.dtype)


def sum_over_ranks(mesh: DeviceMesh, tensors: list[Tensor]) -> None:
    """In place, every rank's sum of the same tensors."""
    for group in _groups(mesh):
        for work in [dist.all_reduce(x, group=group, async_op=True) for x in tensors]:
            work.wait()


def _groups(mesh: DeviceMesh) -> list[dist.ProcessGroup]:
    # The last axis first: what is gathered along the others then follows in the order of the mesh.
    return [mesh.get_group(axis) for axis in reversed(range(mesh.ndim))]
