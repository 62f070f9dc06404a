"""The version of torch as numbers, for tests of what a later one added."""

from __future__ import annotations

import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
"""Major and minor number, such as (2, 6)."""
