"""Function mode that records the uses of parameters in a forward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fx_influence.autodiff.layer_io.row_gradients import Kind
from fx_influence.policy.modes.level_aware import LevelAwareMode
from fx_influence.types import Params


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
