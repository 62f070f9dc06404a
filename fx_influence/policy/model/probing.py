"""Forwards of a few tokens on random weights, which show what a model's structure does whatever its weights are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fx_influence.core.dtensor import is_sharded, to_local
from fx_influence.policy.model.template import Template, base_model, state_of
from fx_influence.types import Params

if TYPE_CHECKING:
    pass


LENGTHS = (8, 4)
"""Tokens of a row of a probe; the shorter one where a model has fewer positions."""

_STEPS = (1, 3, 101, 1009, 10007)


class Probe(NamedTuple):
    """Four rows of T tokens that belong together, T even and at least 4.

    Row 0 has no padding. Row 1 is the start of row 0, padded on the right. Row 2 is row 1, padded on the left. Row 3
    begins with half of row 0 and goes on otherwise.
    ``input_ids``: (4, T). ``attention_mask``: bool (4, T). ``short``: tokens of rows 1 and 2.
    """

    input_ids: Tensor
    attention_mask: Tensor
    short: int

    @property
    def half(self) -> int:
        """Tokens that rows 0 and 3 have in common."""
        return self.input_ids.shape[1] // 2


def probe_of(model: nn.Module, vocab_size: int | None, length: int, device: torch.device) -> Probe:
    """Return a probe of ids that a text may hold: neither padding nor other special tokens, where the model names them.

    ``vocab_size``: None for a model that does not tell; then the ids are 0 and 1, which any vocabulary has.
    """
    if vocab_size is None:
        row = torch.tensor([1, 0, 0, 1, 0, 1, 1, 0][:length], device=device)
        other = 1 - row
    else:
        config = getattr(base_model(model), "config", None)
        named = (getattr(config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad", "unk", "mask", "sep"))
        special = {x for ids in named if ids is not None for x in (ids if isinstance(ids, list) else [ids])}
        usable = [k % vocab_size for k in range(vocab_size // 3, vocab_size // 3 + vocab_size)]
        usable = [k for k in usable[: 2 * length + len(special)] if k not in special] or [0]
        ids = torch.tensor([usable[k % len(usable)] for k in range(2 * length)], device=device)
        row, other = ids[:length], ids[length:]
    half, short = length // 2, length - length // 4
    filler = row[-1:].expand(length - short)
    ids = torch.stack(
        [row, torch.cat([row[:short], filler]), torch.cat([filler, row[:short]]), torch.cat([row[:half], other[half:]])]
    )
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, short:], mask[2, : length - short] = False, False
    return Probe(ids, mask, short)


def random_weights(model: nn.Module, widest: torch.dtype | None) -> Params:
    """Return random values for all parameters by name, of their shapes, in memory that hardly depends on their size.

    All are views of a few short vectors, every row of a matrix some entries further on than the one before. What a
    training has yet to learn, a gate that starts at 0 or an adapter's second map, is random too. Parameters whose
    values only their own kernels can read, as quantised ones, are the live ones.

    ``widest``: half precision is raised to it; None keeps every dtype.
    """
    generator = torch.Generator().manual_seed(0)
    vectors: dict[tuple[torch.dtype, torch.device, int], Tensor] = {}
    out: Params = {}
    for k, (name, p) in enumerate(model.named_parameters()):
        value: Any = p.detach()
        if not p.is_floating_point() or not (is_sharded(p) or type(value) is Tensor):
            out[name] = value
            continue
        dtype = p.dtype if widest is None else torch.promote_types(p.dtype, widest)
        steps = [*reversed(_STEPS[: p.dim()])]
        size = k + 1 + sum((n - 1) * step for n, step in zip(p.shape[-len(_STEPS) :], steps, strict=False) if n)
        width = p.shape[-1] if p.dim() > 1 else 0
        key = dtype, to_local(value).device, width
        vector = vectors.get(key)
        if vector is None or len(vector) < size:
            drawn = torch.rand(2 * size, generator=generator, dtype=torch.float32, device="cpu")
            # Norms and biases are positive and of order 1; a matrix keeps the size of what it is applied to.
            drawn = 0.5 + drawn if not width else (2 * drawn - 1) * (3 / width) ** 0.5
            vector = vectors[key] = drawn.to(key[1], dtype)
        out[name] = vector.as_strided(p.shape, steps, k)
    return out


class WriteWatch(TorchDispatchMode):
    """While active, no operation writes into ``tensors``: it is left out, and the tensor's name noted in ``written``.

    What the forward gives then is worth nothing where something was noted. ``vocabulary``: rows of the table in which
    ``ids`` were looked up, None where they were not.
    """

    def __init__(self, tensors: Params, ids: Tensor) -> None:
        super().__init__()
        self.written: dict[str, str] = {}
        self.vocabulary: int | None = None
        self._ids = ids
        self._names: dict[int, dict[int, str]] = {}
        for name, x in tensors.items():
            local = to_local(x)
            if local.numel() and not local.is_meta:
                places = self._names.setdefault(local.untyped_storage().data_ptr(), {})
                places[int(local.storage_offset())] = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.embedding.default and torch.equal(args[1], self._ids):
            self.vocabulary = min(len(args[0]), self.vocabulary or len(args[0]))
        if func._schema.is_mutable and not _binds_itself(func, args):
            for k, argument in enumerate(func._schema.arguments):
                if argument.alias_info is None or not argument.alias_info.is_write:
                    continue
                value = args[k] if k < len(args) else kwargs.get(argument.name)
                for x in value if isinstance(value, (list, tuple)) else [value]:
                    name = self._name(x) if isinstance(x, Tensor) else None
                    if name is not None:
                        self.written.setdefault(name, str(func.overloadpacket))
                        return value if func._schema.returns else None
        return func(*args, **kwargs)

    def _name(self, x: Tensor) -> str | None:
        try:
            places = self._names.get(x.untyped_storage().data_ptr())
        except (RuntimeError, NotImplementedError):
            # A wrapper without storage of its own is none of them.
            return None
        if places is None:
            return None
        return places.get(int(x.storage_offset()), next(iter(places.values())))


def _binds_itself(func: Any, args: Any) -> bool:
    """Whether a tensor is given the storage that it has, as parametrizations do that peft makes in a forward."""
    if func is not torch.ops.aten.set_.source_Tensor:
        return False
    x, source = args
    same = x.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
    return (
        same
        and x.shape == source.shape
        and x.stride() == source.stride()
        and x.storage_offset() == source.storage_offset()
    )


def stateful_modules(template: Template, call: Callable[[], object]) -> list[nn.Module]:
    """Return the modules of a template whose attributes are bound to something else after ``call`` than before."""
    modules = list(template.module.modules())
    before = [state_of(module) for module in modules]
    call()
    found = []
    for module, old in zip(modules, before, strict=True):
        new = state_of(module)
        if any(a.keys() != b.keys() or any(a[key] is not b[key] for key in a) for a, b in zip(old, new, strict=True)):
            found.append(module)
            vars(module).clear()
            vars(module).update(old[0])
            module._buffers.clear()
            module._buffers.update(old[1])
    return found


def agree(actual: Tensor, expected: Tensor, bound: float) -> bool:
    """Return whether two tensors differ by at most ``bound`` times the largest entry of ``expected``; NaN never does.

    Example:
        >>> agree(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]), 0.1), agree(torch.ones(1), torch.ones(2), 0.1)
        (True, False)
    """
    if actual.shape != expected.shape:
        return False
    gap = (actual.double() - expected.double()).abs()
    return bool(gap.max() <= bound * expected.double().abs().max())


def rounding_bound(dtypes: Sequence[torch.dtype]) -> float:
    """Return the relative difference that rounding in the coarsest of ``dtypes`` may make of two forwards.

    The square root of its machine epsilon: errors of a forward grow with the root of the number of operations in a
    row, and 1 / sqrt(eps) of them leave room for a model of any depth, while a mistake in what is computed shows.
    """
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
    return float(coarsest**0.5)


class ProbeCase(NamedTuple):
    """A setting in which a policy and its model run: weights and buffers by name, tokens, and what rounding may do."""

    known: Params
    probe: Probe
    bound: float
