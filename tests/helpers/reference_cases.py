"""Small policies and generators for the tests of the reference."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from fx_influence.types import Apply, Estimator, Normalize, Params
from helpers.cases import TinyPolicy, make_apply

ESTIMATES = [(e, n) for e in get_args(Estimator) for n in get_args(Normalize)]

estimates = pytest.mark.parametrize(("estimator", "normalize"), ESTIMATES)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def policy(**options: Any) -> tuple[Apply, Params]:
    return make_apply(TinyPolicy(vocab=5, dim=4, layers=1, heads=2, max_len=8, **options))
