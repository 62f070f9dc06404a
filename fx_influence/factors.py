"""Per-row gradients as factors: what enters each linear map and the gradient of what leaves it, from one plain pass."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fx_influence.logprobs import surrogate, token_values
from fx_influence.tree import promote
from fx_influence.types import Apply, Batch, Params

Kind = Literal["linear", "transposed", "embedding", "scale", "shift"]


class Factor(NamedTuple):
    """One use of a parameter w in the forward of B rows; S positions each, ``grads`` (B, S, out) of what leaves it.

    ``linear``: y = x w^T, ``inputs`` x (B, S, in). ``transposed``: y = x w. ``embedding``: ``inputs`` ids (B, S).
    ``scale``: y = w x elementwise, ``inputs`` x (B, S, out). ``shift``: y = x + w, no inputs.
    """

    kind: Kind
    inputs: Tensor | None
    grads: Tensor


Factors = dict[str, list[Factor]]
"""Factors of a batch's rows by parameter; a row's gradient is the sum over the uses."""


def row_factors(params: Params, batch: Batch, apply: Apply, names: frozenset[str], temperature: float = 1.0) -> Factors:
    """Factors of the gradient of every row's rollout loss, for the parameters ``names``, see ``factored_names``.

    One forward, and one reverse pass that stops short of the weights: what a training step computes, less its sum over
    rows. Memory: inputs and output gradients of every use, (B, S, in + out), inputs that uses share only once.
    Raises ``ValueError`` where a parameter of ``names`` is used in a way that has no factor.

    Example:
        >>> ids = torch.tensor([[1, 2], [1, 3]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True]] * 2), coefficients=torch.tensor([[0.0, 1.0]] * 2))
        >>> params = {"w": torch.zeros(4, 4)}
        >>> factors = row_factors(params, batch, lambda p, ids, mask: F.embedding(ids, p["w"]), frozenset({"w"}))
        >>> row_gradients(factors, "w", params["w"], slice(0, 4), rows=2)[0, 1].tolist()
        [0.25, 0.25, -0.75, 0.25]
    """
    params = {name: p.detach() for name, p in params.items()}
    recorder = _Recorder(params, batch, names)
    with torch.enable_grad(), recorder:
        loss = surrogate(token_values(params, batch, apply, temperature), batch)
    if recorder.unfactored():
        name = min(recorder.unfactored())
        raise ValueError(f"parameter {name!r} is used in a way that has no factor; leave it out of names")
    outputs = [use.output for use in recorder.uses]
    grads = torch.autograd.grad(loss, outputs, allow_unused=True) if loss.requires_grad else []
    factors: Factors = {}
    for use, g in zip(recorder.uses, grads, strict=False):
        if g is not None:
            factors.setdefault(use.name, []).append(_factor(use, g, len(batch.input_ids)))
    return factors


def factored_names(params: Params, batch: Batch, apply: Apply) -> frozenset[str]:
    """The parameters that the forward uses in no other ways than those of ``Factor``, with the rows on the first axis.

    Seen by running the first tokens of two rows forward and watching where each parameter goes. What is used otherwise
    (experts that gather tokens, weights that are computed with before they are used) is left to ``vmap(grad)``.
    """
    first = batch._replace(group=None)
    # Two rows and four columns, or three and two: an axis of rows is told from one of positions by its length.
    count = 3 if batch.input_ids.shape[1] == 2 else 2
    index = torch.arange(count, device=batch.input_ids.device) % len(batch.input_ids)
    few = Batch._make(None if field is None else field[index, :4] for field in first)
    recorder = _Recorder(params, few, frozenset(params))
    with torch.no_grad(), recorder:
        apply(params, few.input_ids, few.attention_mask)
    return frozenset({use.name for use in recorder.uses} - recorder.unfactored())


def row_gradients(factors: Factors, name: str, like: Tensor, part: slice, rows: int) -> Tensor:
    """Every row's gradient of the entries ``like[part]`` of a parameter, (rows, ...), at least float32."""
    dtype = promote(like.dtype)
    total: Tensor | None = None
    for factor in factors.get(name, []):
        g = _gradient(factor, part, dtype)
        total = g if total is None else total.add_(g)
    return like.new_zeros(rows, *like[part].shape, dtype=dtype) if total is None else total


def _gradient(factor: Factor, part: slice, dtype: torch.dtype) -> Tensor:
    kind, x, g = factor
    if x is None:
        return g[..., part].to(dtype).sum(1)
    if kind == "scale":
        return (g[..., part].to(dtype) * x[..., part]).sum(1)
    if kind == "embedding":
        inside = ((x >= part.start) & (x < part.stop)).unsqueeze(-1)
        at = (x - part.start).clamp(0, part.stop - part.start - 1).unsqueeze(-1).expand_as(g)
        out = g.new_zeros(len(g), part.stop - part.start, g.shape[-1], dtype=dtype)
        return out.scatter_add_(1, at, torch.where(inside, g, 0.0).to(dtype))
    left, right = (g[..., part], x) if kind == "linear" else (x[..., part], g)
    return torch.bmm(left.transpose(1, 2).to(dtype), right.to(dtype))


def _factor(use: _Use, g: Tensor, rows: int) -> Factor:
    inputs = use.inputs if use.inputs is None or use.kind == "embedding" else _by_row(use.inputs.detach(), rows)
    if use.padding is not None and inputs is not None:
        g = g.masked_fill((inputs == use.padding).unsqueeze(-1), 0.0)
    return Factor(use.kind, inputs, _by_row(g, rows))


def _by_row(x: Tensor, rows: int) -> Tensor:
    return x.reshape(rows, -1, x.shape[-1])


class _Use(NamedTuple):
    name: str
    kind: Kind
    inputs: Tensor | None
    output: Tensor
    version: int
    padding: int | None = None


_MULTIPLY = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}
_ADD = {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__}


class _Recorder(TorchFunctionMode):
    """Watches a forward: every use of a parameter that has a factor, and the parameters used in any other way.

    What leaves a use becomes part of the graph even where no parameter requires a gradient, so that its own gradient
    can be asked for. Parameters outside ``names`` pass by unseen.
    """

    def __init__(self, params: Params, batch: Batch, names: frozenset[str]) -> None:
        super().__init__()
        self._names = {id(p): name for name, p in params.items() if name in names}
        self._shape = tuple(batch.input_ids.shape)
        self.uses: list[_Use] = []
        self.others: set[str] = set()

    def unfactored(self) -> set[str]:
        """Parameters used in other ways, or whose output was then changed in place, so that its gradient is lost."""
        return self.others | {use.name for use in self.uses if use.output._version != use.version}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = {name for x in (*args, *kwargs.values()) if (name := self._name(x)) is not None}
        # What a parameter merely is (its shape, dtype, device) is no use of it.
        if not found or getattr(func, "__name__", "") == "__get__":
            return func(*args, **kwargs)
        out = self._factored(func, args, kwargs)
        if out is None:
            self.others |= found
            return func(*args, **kwargs)
        return out

    def _factored(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.embedding:
            return self._embedding(*args, **kwargs)
        if func is F.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func is torch.addmm and len(args) == 3 and not kwargs:
            return self._addmm(*args)
        if func in _MULTIPLY | _ADD and len(args) == 2 and not kwargs:
            w, x = args if self._name(args[0]) is not None else args[::-1]
            if isinstance(x, Tensor) and self._rows_first(x) and w.shape == x.shape[-1:]:
                kind: Kind = "scale" if func in _MULTIPLY else "shift"
                return self._used(func(*args), (w, kind, x if kind == "scale" else None))
        return None

    def _linear(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor | None:
        if not self._rows_first(x):
            return None
        return self._used(F.linear(x, w, bias), (w, "linear", x), (bias, "shift", None))

    def _addmm(self, bias: Tensor, x: Tensor, w: Tensor) -> Tensor | None:
        if not self._rows_first(x) or bias.dim() != 1:
            return None
        return self._used(torch.addmm(bias, x, w), (w, "transposed", x), (bias, "shift", None))

    def _embedding(
        self,
        ids: Tensor,
        w: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor | None:
        if tuple(ids.shape) != self._shape or max_norm is not None or scale_grad_by_freq:
            return None
        padding = padding_idx if padding_idx is None or padding_idx >= 0 else len(w) + padding_idx
        return self._used(F.embedding(ids, w), (w, "embedding", ids), padding=padding)

    def _layer_norm(
        self, x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor | None:
        if not self._rows_first(x) or len(shape) != 1:
            return None
        normal = F.layer_norm(x.detach(), shape, None, None, eps)
        return self._used(F.layer_norm(x, shape, weight, bias, eps), (weight, "scale", normal), (bias, "shift", None))

    def _used(
        self, output: Tensor, *uses: tuple[Tensor | None, Kind, Tensor | None], padding: int | None = None
    ) -> Tensor:
        if torch.is_grad_enabled() and not output.requires_grad:
            # No leaf itself: hooks on modules (those of torch's flop counter are) do not bear one in autograd.grad.
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        for w, kind, inputs in uses:
            name = self._name(w)
            if name is not None:
                self.uses.append(_Use(name, kind, inputs, output, output._version, padding))
        return output

    def _rows_first(self, x: Tensor) -> bool:
        rows, positions = self._shape
        if x.dim() == 2:
            # Tokens in one axis: all of them, in the order of the batch, only where this is a view of rows of them.
            return x._is_view() and len(x) == rows * positions
        return x.dim() > 2 and len(x) == rows

    def _name(self, x: object) -> str | None:
        return self._names.get(id(x)) if isinstance(x, Tensor) else None
