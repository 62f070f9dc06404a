"""Probes: a few tokens and random weights, on which forwards show what a model's structure does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fx_influence.core.dtensor import full_shape, is_sharded, to_local
from fx_influence.policy.model.template import Template, base_model, module_state, restore_state
from fx_influence.types import Params

LENGTHS = (8, 4)
"""Number of tokens of a probe's rows; the second for models with fewer positions."""

_STEPS = (1, 3, 101, 1009, 10007)
"""Strides of ``random_weights`` by axis, the last axis first."""


class Probe(NamedTuple):
    """Four rows of T tokens, T even and at least 4.

    Row 0 has no padding. Row 1 is the start of row 0, padded on the right. Row 2 is row 1, padded on the left. Row 3
    begins with half of row 0 and continues with other tokens.
    ``input_ids``: (4, T). ``attention_mask``: bool (4, T). ``short``: number of tokens of rows 1 and 2.
    """

    input_ids: Tensor
    attention_mask: Tensor
    short: int

    @property
    def half(self) -> int:
        """Number of tokens that rows 0 and 3 have in common."""
        return self.input_ids.shape[1] // 2


def make_probe(model: nn.Module, vocab_size: int | None, length: int, device: torch.device) -> Probe:
    """Return a probe of ids that a text may hold: neither padding nor other special tokens, where the model names them.

    Args:
        model: its configuration names the special tokens.
        vocab_size: None for a model that does not tell; the ids are then 0 and 1, which any vocabulary has.
        length: T.
        device: of the ids.
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

    All are views of a few short vectors, each row of a matrix shifted by some entries against the row before. Weights
    that start at 0, as a gate or an adapter's second map, are random too. Quantised parameters,
    whose values only their own kernels can read, are the live ones.

    Args:
        model: its parameters' names, shapes, dtypes and devices are read.
        widest: half precision is raised to it; None leaves every dtype.
    """
    generator = torch.Generator().manual_seed(0)
    vectors: dict[tuple[torch.dtype, torch.device, int], Tensor] = {}
    out: Params = {}
    for k, (name, p) in enumerate(model.named_parameters()):
        value: Any = p.detach()
        if not p.is_floating_point() or not (is_sharded(p) or type(value) is Tensor):
            out[name] = value
            continue
        dtype, shape = p.dtype if widest is None else torch.promote_types(p.dtype, widest), full_shape(p)
        steps = [*reversed(_STEPS[: len(shape)])]
        size = k + 1 + sum((n - 1) * step for n, step in zip(shape[-len(_STEPS) :], steps, strict=False) if n)
        width = shape[-1] if len(shape) > 1 else 0
        key = dtype, to_local(value).device, width
        vector = vectors.get(key)
        if vector is None or len(vector) < size:
            uniform = torch.rand(2 * size, generator=generator, dtype=torch.float32, device="cpu")
            # Norms and biases are positive and of order 1; a matrix preserves the size of what it is applied to.
            scaled = 0.5 + uniform if not width else (2 * uniform - 1) * (3 / width) ** 0.5
            vector = vectors[key] = scaled.to(key[1], dtype)
        out[name] = vector.as_strided(shape, steps, k)
    return out


def stateful_modules(template: Template, call: Callable[[], object]) -> list[nn.Module]:
    """Return the modules of a template whose attributes ``call`` rebinds; the old values are restored."""
    modules = list(template.module.modules())
    before = [module_state(module) for module in modules]
    call()
    changed = []
    for module, old in zip(modules, before, strict=True):
        new = module_state(module)
        if any(a.keys() != b.keys() or any(a[key] is not b[key] for key in a) for a, b in zip(old, new, strict=True)):
            changed.append(module)
            restore_state(module, old)
    return changed


def agree(actual: Tensor, expected: Tensor, bound: float) -> bool:
    """Return whether two tensors differ by at most ``bound`` times the largest entry of ``expected``; NaN never agrees.

    Args:
        actual: tensor of any shape; one of another shape than ``expected`` never agrees.
        expected: tensor with at least one entry.
        bound: relative difference that is allowed.

    Example:
        >>> agree(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]), 0.1), agree(torch.ones(1), torch.ones(2), 0.1)
        (True, False)
    """
    if actual.shape != expected.shape:
        return False
    gap = (actual.double() - expected.double()).abs()
    return bool(gap.max() <= bound * expected.double().abs().max())


def rounding_bound(dtypes: Sequence[torch.dtype]) -> float:
    """Return the relative difference that rounding in the coarsest of ``dtypes`` may cause between two forwards.

    It is the square root of that machine epsilon. Errors of a forward grow with the root of the number of successive
    operations, and 1 / sqrt(eps) of them leave room for a model of any depth, while a mistake in what is computed
    shows.
    """
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
    return float(coarsest**0.5)


class ProbeCase(NamedTuple):
    """A setting in which a policy and its model run.

    ``known``: weights and buffers by name. ``probe``: the tokens. ``bound``: relative difference that rounding may
    cause.
    """

    known: Params
    probe: Probe
    bound: float
