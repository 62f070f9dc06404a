"""Per-row gradients as factors: what enters each linear map and the gradient of what leaves it, from one plain pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fx_influence.head import Weights, loss_by_logits, pull
from fx_influence.logprobs import weights_of
from fx_influence.parts import Part
from fx_influence.policy import Halves, halves
from fx_influence.tree import accumulate, promote
from fx_influence.types import Apply, Batch, Gradients, Params

ENTRIES_AT_ONCE = 2**24
"""Entries of rows' gradients that ``inner_products`` forms at once: 64 MiB of float32."""

PIECE = 1024
"""Columns that a product of two blocks of gradients sums up at once."""

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


def row_factors(
    params: Params, batch: Batch, part: Part, apply: Apply, names: frozenset[str], temperature: float = 1.0
) -> tuple[Factors, Gradients]:
    """Factors of the gradient of every row's rollout loss, for the parameters ``names``, see ``factored_names``.

    Rows stand in the order of ``part.members``. One forward and one reverse pass, as in a training step. The gradient
    of the whole part's loss, at least float32, comes along for the parameters that require one; where none does, the
    reverse pass stops short of the weights. Memory: inputs and output gradients of every use, (b, S, in + out), inputs
    that uses share only once. Raises ``ValueError`` where a parameter of ``names`` is used in a way that has no factor.

    Example:
        >>> ids = torch.tensor([[1, 2], [1, 3]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True]] * 2), coefficients=torch.tensor([[0.0, 1.0]] * 2))
        >>> from fx_influence.parts import parts
        >>> [part], params = parts(batch, None, aligned=False), {"w": torch.zeros(4, 4)}
        >>> table = lambda p, ids, mask: F.embedding(ids, p["w"])
        >>> factors, _ = row_factors(params, batch, part, table, frozenset({"w"}))
        >>> row_gradients(factors, "w", params["w"], slice(0, 4), rows=2)[0, 1].tolist()
        [0.25, 0.25, -0.75, 0.25]
    """
    policy, count = halves(apply), len(part.members)
    total: Gradients = dict.fromkeys(params)
    body = _Recorder(params, part.input_ids.shape, names)
    with torch.enable_grad(), body:
        features = policy.eager(params, part.input_ids, part.attention_mask)
    weights = weights_of(batch, part)
    if all(w is None for w in weights):
        return {}, total
    head, toward = _through_head(params, features.detach(), part, weights, policy, names, temperature, total)
    if body.unfactored() | head.unfactored():
        name = min(body.unfactored() | head.unfactored())
        raise ValueError(f"parameter {name!r} is used in a way that has no factor; leave it out of names")
    factors = _factors(head, count)
    if features.requires_grad:
        accumulate(total, _differentiate(features, toward, body, params))
        for name, uses in _factors(body, count).items():
            factors[name] = uses + factors.get(name, [])
    return factors, total


_FEATURES = "what enters the head"


def _through_head(
    params: Params,
    features: Tensor,
    part: Part,
    weights: Weights,
    policy: Halves,
    names: frozenset[str],
    temperature: float,
    total: Gradients,
) -> tuple[_Recorder, Tensor]:
    """What the head makes of the scored features, recorded, and the loss's gradient by all features."""
    toward = torch.zeros_like(features)
    at = part.row, part.column
    if not _seen_in_head(params, features[:, :1], policy, names).uses:
        toward[at], found = pull(policy, params, features[at], part.targets, weights, temperature)
        accumulate(total, found.items())
        return _Recorder(params, features.shape[:2], frozenset()), toward
    # Row by row: the scored tokens of each from the left, those of short rows followed by tokens of no weight.
    counts = torch.bincount(part.row, minlength=len(features))
    slot = torch.arange(len(part.row), device=part.row.device) - (counts.cumsum(0) - counts)[part.row]
    shape = len(features), int(counts.max())
    own = features.new_zeros(*shape, features.shape[-1]).index_put((part.row, slot), features[at]).requires_grad_()
    targets = part.targets.new_zeros(shape).index_put((part.row, slot), part.targets)
    c, b = (w if w is None else w.new_zeros(shape).index_put((part.row, slot), w) for w in weights)
    recorder = _Recorder(params, own.shape[:2], names)
    with torch.enable_grad(), recorder:
        logits = policy.head(params, own.view_as(own))
    d_logits = loss_by_logits(logits.detach(), targets, (c, b), temperature)
    found = dict(_differentiate(logits, d_logits, recorder, {_FEATURES: own, **params}))
    d_own = found.pop(_FEATURES)
    assert d_own is not None
    toward[at] = d_own[part.row, slot]
    accumulate(total, found.items())
    return recorder, toward


def _seen_in_head(params: Params, features: Tensor, policy: Halves, names: frozenset[str]) -> _Recorder:
    recorder = _Recorder(params, features.shape[:2], names)
    with torch.no_grad(), recorder:
        policy.head(params, features)
    return recorder


def _differentiate(
    output: Tensor, toward: Tensor, recorder: _Recorder, params: Params
) -> list[tuple[str, Tensor | None]]:
    """Gradients of the parameters that require one, by name; those of the recorded uses are left with the uses."""
    leaves = {name: p for name, p in params.items() if p.requires_grad}
    wanted = [use.output for use in recorder.uses]
    grads = torch.autograd.grad(output, [*wanted, *leaves.values()], toward, allow_unused=True)
    recorder.grads = grads[: len(wanted)]
    return list(zip(leaves, grads[len(wanted) :], strict=True))


def factored_names(params: Params, batch: Batch, apply: Apply) -> frozenset[str]:
    """The parameters that the forward uses in no other ways than those of ``Factor``, with the rows on the first axis.

    Seen by running the first tokens of two rows forward and watching where each parameter goes. What is used otherwise
    (experts that gather tokens, weights that are computed with before they are used) is left to ``vmap(grad)``.
    """
    body, head = _look(params, batch, apply, frozenset(params))
    return frozenset({use.name for use in (*body.uses, *head.uses)} - body.unfactored() - head.unfactored())


def bytes_per_token(params: Params, batch: Batch, apply: Apply, names: frozenset[str]) -> int:
    """What the factors of ``names`` take for one token of one row, at most."""
    recorders = _look(params, batch, apply, names)
    held = {
        id(x): x.numel() * x.element_size()
        for recorder in recorders
        for use in recorder.uses
        for x in (use.inputs, use.output)
        if x is not None
    }
    return sum(held.values()) // recorders[0].positions


def _look(params: Params, batch: Batch, apply: Apply, names: frozenset[str]) -> tuple[_Recorder, _Recorder]:
    # Two rows and four columns, or three and two: an axis of rows is told from one of positions by its length.
    count = 3 if batch.input_ids.shape[1] == 2 else 2
    index = torch.arange(count, device=batch.input_ids.device) % len(batch.input_ids)
    ids, mask = batch.input_ids[index, :4], batch.attention_mask[index, :4]
    policy = halves(apply)
    body = _Recorder(params, ids.shape, names)
    with torch.no_grad(), body:
        features = policy.eager(params, ids, mask)
    return body, _seen_in_head(params, features, policy, names)


def row_gradients(
    factors: Factors, name: str, like: Tensor, part: slice, rows: int, out: Tensor | None = None
) -> Tensor:
    """Every row's gradient of the entries ``like[part]`` of a parameter, (rows, ...), at least float32.

    ``out``: where to write it, of that shape and dtype.
    """
    if out is None:
        out = like.new_empty(rows, *like[part].shape, dtype=promote(like.dtype))
    uses = factors.get(name, [])
    if not uses:
        return out.zero_()
    for k, factor in enumerate(uses):
        _write(factor, part, out, add=k > 0)
    return out


def _write(factor: Factor, part: slice, out: Tensor, add: bool) -> None:
    kind, x, g = factor
    if x is not None and kind in ("linear", "transposed"):
        left, right = (g[..., part], x) if kind == "linear" else (x[..., part], g)
        pair = left.transpose(1, 2).to(out.dtype), right.to(out.dtype)
        # Into its place at once: for all rows and a large weight a copy costs as much as the product.
        out.baddbmm_(*pair) if add else torch.bmm(*pair, out=out)
        return
    found = _elementwise(factor, part, out.dtype)
    out.add_(found) if add else out.copy_(found)


def _elementwise(factor: Factor, part: slice, dtype: torch.dtype) -> Tensor:
    kind, x, g = factor
    if x is None:
        return g[..., part].to(dtype).sum(1)
    if kind == "scale":
        return (g[..., part].to(dtype) * x[..., part]).sum(1)
    inside = ((x >= part.start) & (x < part.stop)).unsqueeze(-1)
    at = (x - part.start).clamp(0, part.stop - part.start - 1).unsqueeze(-1).expand_as(g)
    out = g.new_zeros(len(g), part.stop - part.start, g.shape[-1], dtype=dtype)
    return out.scatter_add_(1, at, torch.where(inside, g, 0.0).to(dtype))


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


def inner_products(factors: Factors, directions: Sequence[Params], rows: int) -> Tensor:
    """<g_i, u_k> of every row's gradient with directions u_k over the parameters that have factors, (K, rows) float64.

    For one direction no gradient is formed: a linear map's is sum_s g_s . (x_s u^T), one product of the size of its
    forward. For several they are, some of a weight's entries at a time, at that cost once and little for each u_k.
    Source: the ghost dot product, Wang et al. 2024, arXiv 2406.11011.
    """
    device = next(iter(directions[0].values())).device
    total = torch.zeros(len(directions), rows, dtype=torch.float64, device=device)
    for name, uses in factors.items():
        along = [u[name] for u in directions]
        for use in uses:
            if len(along) > 1 and use.kind in ("linear", "transposed"):
                total += _through_gradients(use, along)
            else:
                total += torch.stack([_inner_product(use, u) for u in along])
    return total


def _through_gradients(factor: Factor, along: Sequence[Tensor]) -> Tensor:
    u = torch.stack(list(along)).to(promote(factor.grads.dtype))
    count, inner = len(factor.grads), u[0, 0].numel()
    step = max(1, ENTRIES_AT_ONCE // (count * inner))
    total = torch.zeros(len(u), count, dtype=torch.float64, device=u.device)
    for start in range(0, u.shape[1], step):
        part = slice(start, min(start + step, u.shape[1]))
        own = u.new_empty(count, part.stop - part.start, inner)
        _write(factor, part, own, add=False)
        total += thin_product(u[:, part].flatten(1), own.flatten(1))
    return total


def thin_product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of few rows and very many columns: cut into short pieces, where BLAS is twice as fast."""
    whole = a.shape[1] // PIECE * PIECE
    out = a[:, whole:] @ b[:, whole:].T
    if whole:
        left, right = (x[:, :whole].unflatten(1, (-1, PIECE)).transpose(0, 1) for x in (a, b))
        out += torch.bmm(left, right.mT).sum(0)
    return out


def _inner_product(factor: Factor, u: Tensor) -> Tensor:
    kind, x, g = factor
    u = u.to(g.dtype)
    if x is None:
        mapped = u
    elif kind == "linear":
        mapped = x @ u.T
    elif kind == "transposed":
        mapped = x @ u
    else:
        mapped = F.embedding(x, u) if kind == "embedding" else x * u
    return (mapped * g).sum((1, 2), dtype=promote(g.dtype)).double()


def _factors(recorder: _Recorder, rows: int) -> Factors:
    factors: Factors = {}
    for use, g in zip(recorder.uses, recorder.grads, strict=True):
        if g is not None:
            factors.setdefault(use.name, []).append(_factor(use, g, rows))
    return factors


class _Recorder(TorchFunctionMode):
    """Watches a forward: every use of a parameter that has a factor, and the parameters used in any other way.

    What leaves a use becomes part of the graph even where no parameter requires a gradient, so that its own gradient
    can be asked for. Parameters outside ``names`` pass by unseen.
    """

    def __init__(self, params: Params, shape: tuple[int, ...], names: frozenset[str]) -> None:
        super().__init__()
        self._names = {id(p): name for name, p in params.items() if name in names}
        self._shape = tuple(shape)
        self.uses: list[_Use] = []
        self.grads: tuple[Tensor | None, ...] = ()
        self.others: set[str] = set()

    @property
    def positions(self) -> int:
        return self._shape[0] * self._shape[1]

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
        return self._used(F.embedding(ids, w, padding), (w, "embedding", ids), padding=padding)

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
