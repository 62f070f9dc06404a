"""The library's own forward-mode rules against torch's, with and without what an earlier forward put out."""

from __future__ import annotations

import pytest
import torch
from cases import TinyPolicy, apply_of, close, random_batch
from torch import Tensor
from torch.func import jvp
from torch.nn import functional as F

from fx_influence.derivatives import batch_gradient, taped_gradient, token_jvp
from fx_influence.forward_mode import ForwardMode, Tape


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, 5), (4, 5), (4,)))
    return x, w, b


@pytest.mark.parametrize("taped", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_a_linear_map_has_torchs_derivative_whatever_moves(moving: tuple[int, ...], bias: bool, taped: bool) -> None:
    if not bias and 2 in moving:
        moving = tuple(k for k in moving if k != 2) or (0,)
    at, along = drawn(0), drawn(1)

    def f(*moved: Tensor) -> Tensor:
        x, w, b = (dict(zip(moving, moved, strict=True)).get(k, at[k]) for k in range(3))
        return F.linear(x, w, b if bias else None).sin()

    given, tangents = tuple(at[k] for k in moving), tuple(along[k] for k in moving)
    expected = jvp(f, given, tangents)
    tape = Tape(10**6)
    with tape:
        f(*given)
    with ForwardMode(tape.outputs if taped else None):
        found = jvp(f, given, tangents)
    for value, wanted in zip(found, expected, strict=True):
        close(value, wanted)


def test_known_outputs_are_used_and_not_computed_again() -> None:
    x, w, _ = drawn(0)
    with ForwardMode([torch.full((2, 3, 4), 7.0, dtype=torch.float64)]):
        value, slope = jvp(lambda w: F.linear(x, w), (w,), (torch.ones_like(w),))
    assert (value == 7).all()
    close(slope, x.sum(-1, keepdim=True).expand(2, 3, 4))


@pytest.mark.parametrize(("room", "kept"), [(0, None), (95, None), (96 * 2, 1), (96 * 4, 2)])
def test_a_tape_keeps_all_or_nothing(room: int, kept: int | None) -> None:
    """One output is 2 x 3 x 4 float64, 192 bytes."""
    x, w, _ = drawn(0)
    tape = Tape(room)
    with tape:
        for _ in range(kept or 1):
            F.linear(x, w)
    assert (None if tape.outputs is None else len(tape.outputs)) == kept
    assert tape.bytes == 192 * (kept or 0)
    with tape:
        F.linear(x, w)
        F.linear(x, w)
    assert tape.outputs is None
    assert tape.bytes == 0


@pytest.mark.parametrize("fit", [0, 1, 3])
def test_tapes_of_any_number_of_parts_give_the_same_derivatives(fit: int) -> None:
    apply, params = apply_of(TinyPolicy(11, 6, 2, 2, 7))
    batch = random_batch(torch.Generator().manual_seed(0), 5, 7, 11)
    along = {name: torch.randn_like(p) for name, p in params.items()}
    every = taped_gradient(params, batch, apply, 1.0, 2, 10**8)[1]
    sizes = [sum(x.numel() * x.element_size() for x in tape or []) for tape in every]
    g, tapes = taped_gradient(params, batch, apply, 1.0, 2, sum(sizes[:fit]))
    assert [tape is not None for tape in tapes] == [k < fit for k in range(3)]
    for name, value in batch_gradient(params, batch, apply, chunk_size=2).items():
        assert value is not None
        found = g[name]
        assert found is not None
        close(found, value, value.abs().max() + 1e-6)
    plain, taped = (token_jvp(params, along, batch, apply, 1.0, 2, given) for given in (None, tapes))
    for value, wanted in zip(taped, plain, strict=True):
        close(value, wanted)
