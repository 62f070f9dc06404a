"""Tangents in a narrower dtype, cast where a parameter is used, against tangents that are cast beforehand."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp, vmap
from torch.nn import functional as F

from fx_influence.policy.modes.forward_ad import DeferredTangents, forward_mode_jvp
from fx_influence.types import Params

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


USES: dict[str, Callable[[Params], Tensor]] = {
    "linear": lambda p: F.linear(X, p["w"], p["b"]),
    "embedding": lambda p: F.embedding(torch.tensor([[1, 0, 1]]), p["w"]),
    "transposed": lambda p: X @ p["w"].T,
    "attribute": lambda p: X @ p["w"].mT + p["b"].data.new_zeros(4),
    "list": lambda p: torch.cat([p["w"], p["w"].sin()]),
    "keyword": lambda p: torch.add(X[:1], other=p["b"]),
    "shape first": lambda p: p["b"].expand(p["w"].shape[0], p["w"].size(1)) * p["w"].dim(),
    "twice": lambda p: (p["w"] * p["w"]) @ p["w"],
    "slice": lambda p: p["w"][1:3] * p["b"],
    "vmap of the model": lambda p: vmap(lambda x: x @ p["w"])(X),
}


def weights() -> tuple[Params, Params]:
    generator = torch.Generator().manual_seed(1)
    params, tangent = (
        {name: torch.randn(shape, generator=generator) for name, shape in (("w", (4, 4)), ("b", (4,)))}
        for _ in range(2)
    )
    return params, {name: v.bfloat16() for name, v in tangent.items()}


@pytest.mark.parametrize("use", USES)
def test_deferred_tangents_equal_cast_ones(use: str) -> None:
    params, narrow = weights()
    value, derivative = forward_mode_jvp(USES[use], params, narrow)
    cast = {name: v.float() for name, v in narrow.items()}
    expected_value, expected, *_ = jvp(USES[use], (params,), (cast,))
    torch.testing.assert_close(value, expected_value, rtol=0, atol=0)
    # The library's rules add a linear layer's products in another order than torch.
    torch.testing.assert_close(derivative, expected, rtol=0, atol=float(expected.abs().max()) * 64 * 2**-23)


def test_at_most_one_cast_copy_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers of one size: never two of their tangents in float32 at once."""
    params = {str(k): torch.ones(64, 64) for k in range(3)}
    alive: list[int] = []
    created: list[Callable[[], Tensor | None]] = []
    make = DeferredTangents._dual

    def counted(self: DeferredTangents, x: Tensor) -> Tensor:
        out = make(self, x)
        tangent = forward_ad.unpack_dual(out).tangent
        if out is not x and tangent is not None:
            created.append(weakref.ref(out))
            alive.append(sum(reference() is not None for reference in created))
        return out

    monkeypatch.setattr(DeferredTangents, "_dual", counted)

    def model(p: Params) -> Tensor:
        x = torch.ones(2, 64)
        for k in range(3):
            x = F.linear(x, p[str(k)]).tanh()
        return x

    forward_mode_jvp(model, params, {name: p.bfloat16() for name, p in params.items()})
    assert alive == [1, 1, 1]
