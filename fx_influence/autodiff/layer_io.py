"""Per-row gradients as factors: what enters each linear map and the gradient of what leaves it, from one plain pass."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fx_influence.autodiff.token_values import scaled_weights
from fx_influence.batching.microbatch import MicroBatch
from fx_influence.core.tree import accumulate, promote
from fx_influence.policy.lm_head import TokenWeights, head_vjp, logit_gradient
from fx_influence.policy.modes.level_aware import LevelAwareMode
from fx_influence.policy.split import SplitPolicy, split_policy
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
    params: Params, batch: Batch, part: MicroBatch, apply: Apply, names: frozenset[str], temperature: float = 1.0
) -> tuple[Factors, Gradients]:
    """Factors of the gradient of every row's rollout loss, for the parameters ``names``, see ``factored_names``.

    Rows stand in the order of ``part.row_index``. One forward and one reverse pass, as in a training step. The gradient
    of the whole part's loss, at least float32, comes along for the parameters that require one; where none does, the
    reverse pass stops short of the weights. Memory: inputs and output gradients of every use, (b, S, in + out), inputs
    that uses share only once. Raises ``ValueError`` where a parameter of ``names`` is used in a way that has no factor.

    Example:
        >>> ids = torch.tensor([[1, 2], [1, 3]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True]] * 2), coefficients=torch.tensor([[0.0, 1.0]] * 2))
        >>> from fx_influence.batching.microbatch import micro_batches
        >>> [part], params = micro_batches(batch, None, left_alignable=False), {"w": torch.zeros(4, 4)}
        >>> table = lambda p, ids, mask: F.embedding(ids, p["w"])
        >>> factors, _ = row_factors(params, batch, part, table, frozenset({"w"}))
        >>> row_gradients(factors, "w", params["w"], slice(0, 4), rows=2)[0, 1].tolist()
        [0.25, 0.25, -0.75, 0.25]
    """
    policy, count = split_policy(apply), len(part.row_index)
    total: Gradients = dict.fromkeys(params)
    body = _Recorder(params, part.input_ids.shape, names)
    with torch.enable_grad(), body:
        features = policy.backbone_eager(params, part.input_ids, part.attention_mask)
    weights = scaled_weights(batch, part, policy)
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
    if policy.loss_scale != 1:
        factors = {name: [_unscaled(use, policy.loss_scale) for use in uses] for name, uses in factors.items()}
        total = {name: None if g is None else g / policy.loss_scale for name, g in total.items()}
    return factors, total


def _unscaled(use: Factor, loss_scale: float) -> Factor:
    return use._replace(grads=use.grads.to(promote(use.grads.dtype)) / loss_scale)


_FEATURES = "what enters the head"


def _through_head(
    params: Params,
    features: Tensor,
    part: MicroBatch,
    weights: TokenWeights,
    policy: SplitPolicy,
    names: frozenset[str],
    temperature: float,
    total: Gradients,
) -> tuple[_Recorder, Tensor]:
    """What the head makes of the scored features, recorded, and the loss's gradient by all features."""
    toward = torch.zeros_like(features)
    at = part.row, part.position
    if not _seen_in_head(params, features[:, :1], policy, names).uses:
        toward[at], found = head_vjp(policy, params, features[at], part.targets, weights, temperature)
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
    d_logits = logit_gradient(logits.detach(), targets, (c, b), temperature)
    found = dict(_differentiate(logits, d_logits, recorder, {_FEATURES: own, **params}))
    d_own = found.pop(_FEATURES)
    assert d_own is not None
    toward[at] = d_own[part.row, slot]
    accumulate(total, found.items())
    return recorder, toward


def _seen_in_head(params: Params, features: Tensor, policy: SplitPolicy, names: frozenset[str]) -> _Recorder:
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
    """Return the parameters whose per-row gradients are the sums of their ``Factor`` products.

    A probe of three short rows decides, with those of the batch's tokens and padding. A parameter w has factors where

    - every differentiable path from w to the logits is a use of a kind of ``Factor``: recorded uses take w detached,
      so a path that is left in the graph (``w.T``, a slice, w in a list, a custom function) is one that none records;
    - d logits[i] / d y[j] is exactly 0 for rows i != j and the output y of every use, split as ``Factor`` splits it:
      tokens in another order than that of the batch, an axis that has the length of the rows by chance, and rows that
      see one another all break this.

    Every other parameter is left to ``per_sample_grads``. Cost: one forward and three reverse passes of 12 tokens
    without the products that make weights' gradients.
    """
    policy, leaves = split_policy(apply), {name: p.detach().requires_grad_() for name, p in params.items()}
    ids, mask = _probe_rows(batch, policy.left_alignable)
    names = frozenset(params)
    body, head = (_Recorder(leaves, ids.shape, names, detached=True) for _ in range(2))
    with torch.enable_grad(), body:
        features = policy.backbone_eager(leaves, ids, mask)
    inputs = features.detach().requires_grad_()
    with torch.enable_grad(), head:
        logits = policy.head(leaves, inputs.view_as(inputs))
    rejected: set[str] = set()
    for output, recorder in ((features, body), (logits, head)):
        rejected |= recorder.unfactored() | _in_graph(output, leaves) | _mixed(output, recorder)
    return frozenset({use.name for use in (*body.uses, *head.uses)} - rejected)


PROBE_ROWS, PROBE_COLUMNS = 3, 4


def _probe_rows(batch: Batch, left_alignable: bool) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, (3, L <= 4), of the batch's tokens, padded to three lengths where the batch is padded."""
    width = min(PROBE_COLUMNS, batch.input_ids.shape[1])
    columns = torch.arange(width, device=batch.input_ids.device)
    rows = []
    for i in range(PROBE_ROWS):
        row, attended = (field[i % len(batch.input_ids)] for field in batch[:2])
        tokens = row[attended] if bool(attended.any()) else row
        rows.append(tokens[columns % len(tokens)])
    ids = torch.stack(rows)
    if left_alignable or bool(batch.attention_mask.all()):
        return ids, torch.ones_like(ids, dtype=torch.bool)
    # Neither ascending nor descending, so that a model which sorts rows by length changes their order.
    lengths = columns.new_tensor([width - 1, width, width - 2]).clamp(min=1).unsqueeze(1)
    left = bool((~batch.attention_mask[:, 0]).any())
    return ids, columns >= width - lengths if left else columns < lengths


def _in_graph(output: Tensor, leaves: Params) -> set[str]:
    """Names of the leaves that the graph of ``output`` leads to."""
    names = {id(p): name for name, p in leaves.items()}
    reached = {names[id(output)]} if id(output) in names else set()
    pending, seen = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if id(variable) in names:
            reached.add(names[id(variable)])
        pending.extend(following for following, _ in node.next_functions)
    return reached


def _mixed(output: Tensor, recorder: _Recorder) -> set[str]:
    """Names of the uses that put out, where the factors of one row are read, what another row's output depends on."""
    rows = len(output)
    outputs = [use.output for use in recorder.uses]
    if not output.requires_grad or not outputs:
        return set()
    # Without structure: the sum of a layer norm's output, for one, depends on nothing.
    toward = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(output)
    mixed = [torch.zeros((), dtype=torch.bool, device=output.device)] * len(outputs)
    for i in range(rows):
        one = torch.zeros_like(toward).index_copy(0, torch.tensor([i], device=toward.device), toward[i : i + 1])
        grads = torch.autograd.grad(output, outputs, one, allow_unused=True, retain_graph=True)
        for k, g in enumerate(grads):
            if g is not None:
                # Not a number counts too.
                others = _by_row(g, rows)[torch.arange(rows, device=g.device) != i]
                mixed[k] = mixed[k] | (others != 0).any()
    flags = torch.stack(mixed).tolist()
    return {use.name for use, flag in zip(recorder.uses, flags, strict=True) if flag}


def bytes_per_token(params: Params, batch: Batch, apply: Apply, names: frozenset[str]) -> int:
    """What the factors of ``names`` take for one token of one row, at most."""
    policy, (ids, mask) = split_policy(apply), _probe_rows(batch, left_alignable=True)
    body = _Recorder(params, ids.shape, names)
    with torch.no_grad(), body:
        features = policy.backbone_eager(params, ids, mask)
    head = _seen_in_head(params, features, policy, names)
    held = {
        id(x): x.numel() * x.element_size()
        for use in (*body.uses, *head.uses)
        for x in (use.inputs, use.output)
        if x is not None
    }
    return sum(held.values()) // ids.numel()


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
        write_rows(factor, part, out, add=k > 0)
    return out


def write_rows(factor: Factor, part: slice, out: Tensor, add: bool) -> None:
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
    versions: tuple[int, int]
    padding: int | None = None

    @property
    def changed(self) -> bool:
        """Whether its input or output was written to after it, so that they are no longer what the use had."""
        return _versions(self.inputs, self.output) != self.versions


def _versions(inputs: Tensor | None, output: Tensor) -> tuple[int, int]:
    return 0 if inputs is None else inputs._version, output._version


_MULTIPLY = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}
_ADD = {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__}


def _factors(recorder: _Recorder, rows: int) -> Factors:
    factors: Factors = {}
    for use, g in zip(recorder.uses, recorder.grads, strict=True):
        if g is not None:
            factors.setdefault(use.name, []).append(_factor(use, g, rows))
    return factors


class _Recorder(LevelAwareMode):
    """Watches a forward: every use of a parameter that has a factor, and the parameters used in any other way.

    What leaves a use becomes part of the graph even where no parameter requires a gradient, so that its own gradient
    can be asked for. Parameters outside ``names`` pass by unseen. ``detached``: uses that have factors take their
    parameters detached, so that the graph leads to a parameter only where it is used otherwise.
    """

    def __init__(
        self, params: Params, shape: tuple[int, ...], names: frozenset[str], *, detached: bool = False
    ) -> None:
        super().__init__()
        self._names = {id(p): name for name, p in params.items() if name in names}
        self._shape = tuple(shape)
        self._detached = detached
        self.uses: list[_Use] = []
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}
        self.grads: tuple[Tensor | None, ...] = ()
        self.others: set[str] = set()

    def unfactored(self) -> set[str]:
        """Parameters used in other ways, or with what was then changed in place, so that its gradient is lost."""
        return self.others | {use.name for use in self.uses if use.changed}

    def on_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        names = self._names_in((args, kwargs))
        # What a parameter merely is (its shape, dtype, device) is no use of it; a view by ``.T`` shows in the graph.
        if not names or getattr(func, "__name__", "") == "__get__":
            return func(*args, **kwargs)
        out = self._factored(func, args, kwargs)
        if out is None:
            self.others |= names
            return func(*args, **kwargs)
        return out

    def on_nested_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        # In a transformation of the model's own rows may be hidden in a batched axis.
        self.others |= self._names_in((args, kwargs))
        return func(*args, **kwargs)

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
            return self._scale_or_shift(func, *args)
        return None

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        if not self._rows_first(input) or weight.dim() != 2 or (bias is not None and bias.dim() != 1):
            return None
        output = F.linear(input, self._given(weight), None if bias is None else self._given(bias))
        return self._used(output, (weight, "linear", self._entered(input, output)), (bias, "shift", None))

    def _addmm(self, bias: Tensor, x: Tensor, w: Tensor) -> Tensor | None:
        if not self._rows_first(x) or bias.shape != w.shape[1:]:
            return None
        output = torch.addmm(self._given(bias), x, self._given(w))
        return self._used(output, (w, "transposed", self._entered(x, output)), (bias, "shift", None))

    def _scale_or_shift(self, func: Any, left: Any, right: Any) -> Tensor | None:
        w, x = (left, right) if self._name(left) is not None else (right, left)
        if not isinstance(x, Tensor) or not self._rows_first(x) or w.shape != x.shape[-1:]:
            return None
        kind: Kind = "scale" if func in _MULTIPLY else "shift"
        output = func(*(self._given(a) if a is w else a for a in (left, right)))
        return self._used(output, (w, kind, x if kind == "scale" else None))

    def _embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor | None:
        if tuple(input.shape) != self._shape or max_norm is not None or scale_grad_by_freq:
            return None
        padding = padding_idx if padding_idx is None or padding_idx >= 0 else len(weight) + padding_idx
        output = F.embedding(input, self._given(weight), padding)
        return self._used(output, (weight, "embedding", input), padding=padding)

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor | None:
        if not self._rows_first(input) or len(normalized_shape) != 1:
            return None
        normal = F.layer_norm(input.detach(), normalized_shape, None, None, eps)
        w, b = (None if p is None else self._given(p) for p in (weight, bias))
        output = F.layer_norm(input, normalized_shape, w, b, eps)
        return self._used(output, (weight, "scale", normal), (bias, "shift", None))

    def _given(self, p: Tensor) -> Tensor:
        return p.detach() if self._detached and self._name(p) is not None else p

    def _used(
        self, output: Tensor, *uses: tuple[Tensor | None, Kind, Tensor | None], padding: int | None = None
    ) -> Tensor:
        if torch.is_grad_enabled() and not output.requires_grad:
            # No leaf itself: hooks on modules (those of torch's flop counter are) do not bear one in autograd.grad.
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        for w, kind, inputs in uses:
            name = self._name(w)
            if name is not None:
                self.uses.append(_Use(name, kind, inputs, output, _versions(inputs, output), padding))
        return output

    def _entered(self, x: Tensor, output: Tensor) -> Tensor:
        """Return x as the product took it: under autocast in the dtype of what left, cast once for all its uses."""
        if x.dtype == output.dtype:
            return x
        known, cast = self._casts.get(id(x), (None, None))
        if cast is None or known is not x or cast.dtype != output.dtype:
            cast = x.detach().to(output.dtype)
            self._casts[id(x)] = x, cast
        return cast

    def _rows_first(self, x: Tensor) -> bool:
        rows, positions = self._shape
        if x.dim() == 2:
            # Tokens in one axis: all of them, and a view, which no order of the data's own has.
            return x._is_view() and len(x) == rows * positions
        return x.dim() > 2 and len(x) == rows

    def _name(self, x: object) -> str | None:
        return self._names.get(id(x)) if isinstance(x, Tensor) else None

    def _names_in(self, argument: object) -> set[str]:
        """Names of the parameters among the arguments, in lists, tuples and dicts too."""
        if isinstance(argument, Tensor):
            name = self._name(argument)
            return set() if name is None else {name}
        if isinstance(argument, dict):
            argument = list(argument.values())
        if isinstance(argument, (list, tuple)):
            return {name for part in argument for name in self._names_in(part)}
        return set()
