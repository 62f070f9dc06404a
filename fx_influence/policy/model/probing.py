"""Forwards of a few tokens on random weights, which show what a model's structure does whatever its weights are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fx_influence.core.dtensor import is_sharded, to_local
from fx_influence.policy.model.template import Template, base_model, state_of
from fx_influence.types import Params

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


def make_probe(model: nn.Module, vocab_size: int | None, length: int, device: torch.device) -> Probe:
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
