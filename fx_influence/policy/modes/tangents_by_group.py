"""Forward-mode derivatives of one forward whose tokens move along different directions, each group along its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from fx_influence.core.tree import DirectionDifference
from fx_influence.policy.modes.forward_ad import ForwardMode
from fx_influence.policy.modes.linear_cache import linear_arguments
from fx_influence.types import Params

MULTIPLY = frozenset({torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__})
ADD = frozenset({torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__})


class GroupedTangents:
    """The directions of the groups of a micro-batch's tokens, each read a parameter at a time, over their ``scale``.

    Args:
        directions: of the groups, all with the same minuend.
        tokens: by group, the indices of its tokens in the flattened (b, L) of the micro-batch, every token in one of
            them; groups without a token are left out.
    """

    def __init__(self, directions: Sequence[DirectionDifference], tokens: Mapping[int, Tensor]) -> None:
        self.scale = directions[0].minuend.scale
        self._directions = [directions[k] for k in tokens]
        self.tokens = list(tokens.values())
        self._inverse = torch.cat(self.tokens).argsort() if len(self.tokens) > 1 else None
        sizes = [torch.full_like(index, k) for k, index in enumerate(self.tokens)]
        self._group = self.in_order(sizes)

    def of(self, name: str, p: Tensor) -> list[Tensor]:
        """Return each group's entries of the parameter p, over ``scale``, in its dtype; none where it does not move."""
        return [x for direction in self._directions if (x := direction.over_scale(name, p)) is not None]

    def rows_of(self, name: str, p: Tensor, index: Tensor) -> Tensor | None:
        """Return for each token the row of a table's direction that it looks up, (tokens, d).

        Args:
            name: of the table p, (V, d).
            p: the table.
            index: int64 (tokens,), the row of each token.
        """
        parts = []
        for direction, tokens in zip(self._directions, self.tokens, strict=True):
            part = direction.over_scale(name, p, index[tokens])
            if part is None:
                return None
            parts.append(part)
        return self.in_order(parts)

    def by_token(self, name: str, p: Tensor) -> Tensor | None:
        """Return for each token the entries of its group of the vector p, (tokens, d)."""
        by_group = self.of(name, p)
        return torch.stack(by_group)[self._group] if by_group else None

    def in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """Return values by group, (tokens of the group, ...) each, in the order of the tokens."""
        return parts[0] if self._inverse is None else torch.cat(list(parts))[self._inverse]


class GroupedForwardMode(ForwardMode):
    """While active, parameters move along the direction of the group of each token that they act on.

    It has rules for the uses of a parameter that have layer IO: linear layers, embeddings, layer norms, products with
    vectors and sums with them. Another function of a parameter raises ``NotImplementedError``.

    Args:
        params: by name, the very tensors that the forward is given.
        tangents: of the micro-batch.
        shape: (b, L) of the micro-batch.
        outputs: see ``ForwardMode``.
    """

    def __init__(
        self, params: Params, tangents: GroupedTangents, shape: Sequence[int], outputs: Sequence[Tensor] | None
    ) -> None:
        super().__init__(outputs)
        self._names = {id(p): name for name, p in params.items()}
        self._tangents, self._shape = tangents, tuple(shape)

    def on_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not any(id(x) in self._names for x in (*args, *kwargs.values())) or _is_query(func):
            return super().on_call(func, args, kwargs)
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.embedding:
            return self._embedding(*args, **kwargs)
        if func is F.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func is torch.addmm and len(args) == 3 and not kwargs:
            bias, x, weight = args
            out = torch.addmm(bias, x, weight)
            return self._moved(out, self._product(x, weight, lambda x, d: x @ d), bias)
        if func in MULTIPLY | ADD and len(args) == 2 and not kwargs:
            return self._elementwise(func, *args)
        raise _no_rule(func)

    def on_nested_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if any(id(x) in self._names for x in (*args, *kwargs.values())):
            raise _no_rule(func)
        return super().on_nested_call(func, args, kwargs)

    def _linear(self, *args: Any, **kwargs: Any) -> Tensor:
        x, weight, bias = linear_arguments(*args, **kwargs)
        (x, dx), output = forward_ad.unpack_dual(x), self.next_output(x, weight)
        out = F.linear(x, weight, bias) if output is None else output
        term = self._product(x, weight, lambda x, d: x @ d.T)
        if dx is not None:
            flat = dx.reshape(-1, dx.shape[-1])
            if term is None:
                term = flat @ weight.T
            else:
                # Only under autocast do the dtypes differ, and autocast does not cast for in-place operations.
                same_dtype = term.dtype == flat.dtype == weight.dtype
                term = term.addmm_(flat, weight.T) if same_dtype else term + flat @ weight.T
        return self._moved(out, term, bias)

    def _embedding(
        self, input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        out, name = F.embedding(input, weight, padding_idx, *args, **kwargs), self._names.get(id(weight))
        if name is None or tuple(input.shape) != self._shape:
            raise _no_rule(F.embedding)
        rows = self._tangents.rows_of(name, weight, input.flatten())
        if rows is not None and padding_idx is not None:
            # Reverse mode has no gradient there either, see ``frozen_padding_embedding``.
            rows = rows.masked_fill((input.flatten() == padding_idx % len(weight)).unsqueeze(-1), 0.0)
        return self._moved(out, rows, None)

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        out = F.layer_norm(input, normalized_shape, weight, bias, eps)
        name = self._names.get(id(weight))
        by_token = None if name is None or weight is None else self._tangents.by_token(name, weight)
        if by_token is not None:
            normalized = F.layer_norm(forward_ad.unpack_dual(input).primal, normalized_shape, None, None, eps)
            by_token = self._flat(normalized) * by_token
        return self._moved(out, by_token, bias)

    def _product(self, x: Tensor, weight: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
        """Return the products of each token's x with its group's entries of a weight, (tokens, out)."""
        name = self._names.get(id(weight))
        if name is None:
            return None
        flat, tangents = self._flat(forward_ad.unpack_dual(x).primal), self._tangents
        by_group = tangents.of(name, weight)
        if not by_group:
            return None
        if len(by_group) == 1:
            return multiply(flat, by_group[0])
        parts = (multiply(flat[tokens], d) for tokens, d in zip(tangents.tokens, by_group, strict=True))
        return tangents.in_order(list(parts))

    def _moved(self, out: Tensor, term: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return an output with a term (tokens, d), and that of its bias, added to its tangent."""
        name = self._names.get(id(bias))
        shifts = None if name is None or bias is None else self._tangents.by_token(name, bias)
        term = shifts if term is None else term if shifts is None else term + shifts
        if term is None:
            return out
        out, tangent = forward_ad.unpack_dual(out)
        term = term.reshape(out.shape).to(out.dtype)
        return forward_ad.make_dual(out, term if tangent is None else tangent + term)

    def _elementwise(self, func: Any, left: Any, right: Any) -> Tensor:
        """Return the product or sum of a vector parameter and the tokens' values (b, L, d)."""
        w, x = (left, right) if id(left) in self._names else (right, left)
        if not isinstance(x, Tensor) or tuple(x.shape) != (*self._shape, *w.shape):
            raise _no_rule(func)
        # With the parameter fixed; a dual of the parameter for each token would be a copy of it for each.
        out = super().on_call(func, (left, right), {})
        term = self._tangents.by_token(self._names[id(w)], w)
        if term is not None and func in MULTIPLY:
            term = term * self._flat(forward_ad.unpack_dual(x).primal)
        return self._moved(out, term, None)

    def _flat(self, x: Tensor) -> Tensor:
        """Return x as (tokens, d)."""
        return x.reshape(-1, x.shape[-1])


def _no_rule(func: Any) -> NotImplementedError:
    return NotImplementedError(
        f"the model gives a parameter to {getattr(func, '__name__', func)}; expected uses that have layer IO, see "
        "supported_names"
    )


def _is_query(func: Any) -> bool:
    return getattr(func, "__name__", "") == "__get__"


def grouped_jvp(
    f: Callable[[Params], Tensor],
    params: Params,
    tangents: GroupedTangents,
    shape: Sequence[int],
    outputs: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return f(params) and its derivative, each token's along the direction of its group.

    Args:
        f: a function of the parameters, over a micro-batch in which groups do not see each other.
        params: by name.
        tangents: directions of the groups; the derivative is over their ``scale``.
        shape: (b, L) of the micro-batch.
        outputs: of the linear layers that f calls, in order. If they do not fit, they are computed again.

    Raises:
        NotImplementedError: where f uses a parameter in a way that has no layer IO.
    """
    with forward_ad.dual_level(), GroupedForwardMode(params, tangents, shape, outputs) as mode:
        value, derivative = forward_ad.unpack_dual(f(params))
    if not mode.outputs_fit:
        return grouped_jvp(f, params, tangents, shape)
    return value, torch.zeros_like(value) if derivative is None else derivative
