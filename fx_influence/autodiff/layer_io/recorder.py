"""Function mode that records the uses of parameters in a forward: their inputs and their outputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fx_influence.autodiff.layer_io.row_gradients import Kind, LayerIO, LayerIOs
from fx_influence.policy.modes.level_aware import LevelAwareMode
from fx_influence.policy.modes.tangents_by_group import ADD, MULTIPLY
from fx_influence.types import Params


class Use(NamedTuple):
    """One recorded use of the parameter ``name``: its ``inputs``, None for a shift, and its ``output``.

    ``versions``: of input and output when they were recorded. ``padding``: the embedding's padding index, or None.
    """

    name: str
    kind: Kind
    inputs: Tensor | None
    output: Tensor
    versions: tuple[int, int]
    padding: int | None = None

    @property
    def overwritten(self) -> bool:
        """Return whether input or output was written to in place after the use, so that its values are lost."""
        return _versions(self.inputs, self.output) != self.versions


def _versions(inputs: Tensor | None, output: Tensor) -> tuple[int, int]:
    return 0 if inputs is None else inputs._version, output._version


class LayerRecorder(LevelAwareMode):
    """Record, while active, every supported use of a parameter, and the parameters used in any other way.

    The output of a use becomes part of the autograd graph even where no parameter requires a gradient, so that the
    output's gradient can be asked for. Parameters outside ``names`` are ignored.

    Args:
        params: parameters by name, the very tensors that the forward is given.
        shape: (rows, positions) of the forward.
        names: the parameters to record.
        detached: whether supported uses take their parameters detached, so that the graph leads to a parameter only
            where it is used otherwise.
    """

    def __init__(
        self, params: Params, shape: tuple[int, ...], names: frozenset[str], *, detached: bool = False
    ) -> None:
        super().__init__()
        self._names = {id(p): name for name, p in params.items() if name in names}
        self._shape = tuple(shape)
        self._detached = detached
        self.uses: list[Use] = []
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}
        self.grads: tuple[Tensor | None, ...] = ()
        """Gradients of the uses' outputs, in order, once a reverse pass has set them."""
        self.others: set[str] = set()

    def unsupported(self) -> set[str]:
        """Return the parameters used in other ways, or with tensors that were overwritten, so the gradient is lost."""
        return self.others | {use.name for use in self.uses if use.overwritten}

    def layer_ios(self, rows: int) -> LayerIOs:
        """Return the recorded uses with their output gradients, split by row."""
        layer_ios: LayerIOs = {}
        for use, g in zip(self.uses, self.grads, strict=True):
            if g is not None:
                layer_ios.setdefault(use.name, []).append(_layer_io(use, g, rows))
        return layer_ios

    def on_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        names = self._names_in((args, kwargs))
        # Reading an attribute (shape, dtype, device) is not a use of a parameter; a view by ``.T`` shows in the graph.
        if not names or getattr(func, "__name__", "") == "__get__":
            return func(*args, **kwargs)
        out = self._record(func, args, kwargs)
        if out is None:
            self.others |= names
            return func(*args, **kwargs)
        return out

    def on_nested_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        # Inside a transformation of the model's own, a batched axis may hide the rows.
        self.others |= self._names_in((args, kwargs))
        return func(*args, **kwargs)

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return the output of a supported use, which is recorded, or None."""
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.embedding:
            return self._embedding(*args, **kwargs)
        if func is F.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func is torch.addmm and len(args) == 3 and not kwargs:
            return self._addmm(*args)
        if func in MULTIPLY | ADD and len(args) == 2 and not kwargs:
            return self._scale_or_shift(func, *args)
        return None

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        if not self._rows_first(input) or weight.dim() != 2 or (bias is not None and bias.dim() != 1):
            return None
        output = F.linear(input, self._maybe_detached(weight), None if bias is None else self._maybe_detached(bias))
        return self._add_uses(output, (weight, "linear", self._as_multiplied(input, output)), (bias, "shift", None))

    def _addmm(self, bias: Tensor, x: Tensor, w: Tensor) -> Tensor | None:
        if not self._rows_first(x) or bias.shape != w.shape[1:]:
            return None
        output = torch.addmm(self._maybe_detached(bias), x, self._maybe_detached(w))
        return self._add_uses(output, (w, "transposed", self._as_multiplied(x, output)), (bias, "shift", None))

    def _scale_or_shift(self, func: Any, left: Any, right: Any) -> Tensor | None:
        w, x = (left, right) if self._name(left) is not None else (right, left)
        if not isinstance(x, Tensor) or not self._rows_first(x) or w.shape != x.shape[-1:]:
            return None
        kind: Kind = "scale" if func in MULTIPLY else "shift"
        output = func(*(self._maybe_detached(a) if a is w else a for a in (left, right)))
        return self._add_uses(output, (w, kind, x if kind == "scale" else None))

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
        output = F.embedding(input, self._maybe_detached(weight), padding)
        return self._add_uses(output, (weight, "embedding", input), padding=padding)

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
        normalized = F.layer_norm(input.detach(), normalized_shape, None, None, eps)
        w, b = (None if p is None else self._maybe_detached(p) for p in (weight, bias))
        output = F.layer_norm(input, normalized_shape, w, b, eps)
        return self._add_uses(output, (weight, "scale", normalized), (bias, "shift", None))

    def _maybe_detached(self, p: Tensor) -> Tensor:
        return p.detach() if self._detached and self._name(p) is not None else p

    def _add_uses(
        self, output: Tensor, *uses: tuple[Tensor | None, Kind, Tensor | None], padding: int | None = None
    ) -> Tensor:
        """Record the uses (parameter, kind, inputs) of the parameters to record; return the output with a graph."""
        if torch.is_grad_enabled() and not output.requires_grad:
            # A sum, not the leaf itself: module hooks (e.g. FlopCounterMode) break when a leaf goes to autograd.grad.
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        for w, kind, inputs in uses:
            name = self._name(w)
            if name is not None:
                self.uses.append(Use(name, kind, inputs, output, _versions(inputs, output), padding))
        return output

    def _as_multiplied(self, x: Tensor, output: Tensor) -> Tensor:
        """Return x in the dtype of the product, to which autocast casts it; one cast serves all uses of x."""
        if x.dtype == output.dtype:
            return x
        source, cast = self._casts.get(id(x), (None, None))
        if cast is None or source is not x or cast.dtype != output.dtype:
            cast = x.detach().to(output.dtype)
            self._casts[id(x)] = x, cast
        return cast

    def _rows_first(self, x: Tensor) -> bool:
        rows, positions = self._shape
        if x.dim() == 2:
            # A view has all tokens in order; tokens gathered in an order that depends on the data are not a view.
            return x._is_view() and len(x) == rows * positions
        return x.dim() > 2 and len(x) == rows

    def _name(self, x: object) -> str | None:
        return self._names.get(id(x)) if isinstance(x, Tensor) else None

    def _names_in(self, argument: object) -> set[str]:
        """Return the names of the parameters among the arguments, in lists, tuples and dicts too."""
        if isinstance(argument, Tensor):
            name = self._name(argument)
            return set() if name is None else {name}
        if isinstance(argument, dict):
            argument = list(argument.values())
        if isinstance(argument, (list, tuple)):
            return {name for item in argument for name in self._names_in(item)}
        return set()


def split_rows(x: Tensor, rows: int) -> Tensor:
    """Return x as (rows, positions, dim), whatever axes it has between its rows and its last axis."""
    return x.reshape(rows, -1, x.shape[-1])


def _layer_io(use: Use, g: Tensor, rows: int) -> LayerIO:
    """Return a use with the gradient g of its output; padding tokens of an embedding have none."""
    inputs = use.inputs if use.inputs is None or use.kind == "embedding" else split_rows(use.inputs.detach(), rows)
    if use.padding is not None and inputs is not None:
        g = g.masked_fill((inputs == use.padding).unsqueeze(-1), 0.0)
    return LayerIO(use.kind, inputs, split_rows(g, rows))
