"""Forward-mode derivatives of one forward whose tokens move along different directions, each group along its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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


class Members(NamedTuple):
    """Things that each belong to a group, the tokens of a micro-batch or its rows.

    Attributes:
        by_group: of each group the indices of its members.
        group: (count,), the group of each.
        places: (count,), where each is in ``by_group`` laid end to end.
    """

    by_group: list[Tensor]
    group: Tensor
    places: Tensor

    @classmethod
    def of(cls, by_group: list[Tensor]) -> Members:
        """Return the members whose indices by group these are."""
        places = torch.cat(by_group).argsort()
        numbers = [torch.full_like(index, k) for k, index in enumerate(by_group)]
        return cls(by_group, torch.cat(numbers)[places], places)

    def in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """Return values by group, (members of the group, ...) each, in the order of the members."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))[self.places]


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
        self.tokens = Members.of(list(tokens.values()))

    def rows(self, count: int) -> Members | None:
        """Return the rows of the micro-batch, ``count`` of them, or None where one holds tokens of several groups."""
        group = self.tokens.group.reshape(count, -1)
        if not bool((group == group[:, :1]).all()):
            return None
        return Members.of([(group[:, 0] == k).nonzero().flatten() for k in range(len(self._directions))])

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
        for direction, tokens in zip(self._directions, self.tokens.by_group, strict=True):
            part = direction.over_scale(name, p, index[tokens])
            if part is None:
                return None
            parts.append(part)
        return self.tokens.in_order(parts)


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
        term = self._vectors(weight, out)
        if term is not None:
            term = term * F.layer_norm(forward_ad.unpack_dual(input).primal, normalized_shape, None, None, eps)
        return self._moved(out, term, bias)

    def _product(self, x: Tensor, weight: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
        """Return the products of each member's x with its group's entries of a weight, (entries, out)."""
        name = self._names.get(id(weight))
        if name is None:
            return None
        by_group, primal = self._tangents.of(name, weight), forward_ad.unpack_dual(x).primal
        if not by_group:
            return None
        if len(by_group) == 1:
            return multiply(self._flat(primal), by_group[0])
        members = self._members(x)
        per_member = primal.reshape(len(members.group), -1, primal.shape[-1])
        parts = (multiply(per_member[index], d) for index, d in zip(members.by_group, by_group, strict=True))
        return self._flat(members.in_order(list(parts)))

    def _moved(self, out: Tensor, term: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return an output with a term of as many entries, and that of its bias, added to its tangent."""
        shifts = self._vectors(bias, out)
        term = None if term is None else term.reshape(out.shape)
        term = shifts if term is None else term if shifts is None else term + shifts
        if term is None:
            return out
        out, tangent = forward_ad.unpack_dual(out)
        term = term.to(out.dtype)
        return forward_ad.make_dual(out, term if tangent is None else tangent + term)

    def _elementwise(self, func: Any, left: Any, right: Any) -> Tensor:
        """Return the product or sum of a vector parameter and values (b, ..., d)."""
        w, x = (left, right) if id(left) in self._names else (right, left)
        if not isinstance(x, Tensor) or w.shape != x.shape[-1:]:
            raise _no_rule(func)
        # With the parameter fixed; a dual of the parameter for each token would be a copy of it for each.
        out = super().on_call(func, (left, right), {})
        term = self._vectors(w, x)
        if term is not None and func in MULTIPLY:
            term = term * forward_ad.unpack_dual(x).primal
        return self._moved(out, term, None)

    def _vectors(self, w: Tensor | None, x: Tensor) -> Tensor | None:
        """Return for every entry of x, (..., d), its group's entries of the vector w, (..., d); None for none."""
        name = self._names.get(id(w))
        by_group = [] if name is None or w is None else self._tangents.of(name, w)
        if not by_group:
            return None
        members = self._members(x)
        vectors = torch.stack(by_group)[members.group]
        per_member = x.numel() // (len(vectors) * x.shape[-1])
        return vectors.unsqueeze(1).expand(-1, per_member, -1).reshape(x.shape)

    def _members(self, x: Tensor) -> Members:
        """Return the tokens, if these are the leading dimensions of x, (..., d), or else the rows, whose groups it has.

        Norms of attention heads are over (b, heads, L, d), where every row must be of one group.
        """
        tokens, lead = len(self._tangents.tokens.group), tuple(x.shape[:-1])
        if lead[:2] == self._shape or lead[:1] == (tokens,):
            return self._tangents.tokens
        rows = self._tangents.rows(self._shape[0]) if lead[:1] == self._shape[:1] else None
        if rows is None:
            raise NotImplementedError(
                f"the model gives a parameter values of shape {tuple(x.shape)}; expected tokens, {self._shape}, first, "
                "or rows of one group each"
            )
        return rows

    def _flat(self, x: Tensor) -> Tensor:
        """Return x as (entries, d)."""
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
