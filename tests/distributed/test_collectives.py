"""Sums over ranks: small tensors are sent together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fx_influence.distributed import collectives


def test_small_tensors_of_a_dtype_are_summed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    def all_reduce(x: Tensor, group: Any) -> None:
        """Sum over two ranks that have the same."""
        sent.append(x.nbytes)
        x.mul_(2)

    monkeypatch.setattr(collectives.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(collectives, "BUCKET_BYTES", 40)
    generator = torch.Generator().manual_seed(0)
    shapes = [((2, 3), torch.float32), ((), torch.float32), ((3,), torch.float32), ((4,), torch.float64)]
    shapes += [((5, 5), torch.float64), ((0,), torch.float64), ((2,), torch.float64)]
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape, dtype in shapes]
    expected = [2 * x for x in tensors]
    collectives.sum_over_groups([None], tensors)  # type: ignore[list-item]
    assert sent == [24 + 4 + 12, 32, 200, 0 + 16]
    for x, total in zip(tensors, expected, strict=True):
        torch.testing.assert_close(x, total, rtol=0, atol=0)
