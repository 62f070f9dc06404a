"""The gradient of all rows of a batch by the passes that make one for each group of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fx_influence.autodiff.gradients import reweighted_gradients
from fx_influence.types import Apply, Batch, Gradients, Params, TokenValues


def reweighted_gradient(
    params: Params, batch: Batch, apply: Apply, coefficients_fn: Callable[[TokenValues], Batch], *options: Any
) -> tuple[Batch, Gradients]:
    """Return what ``reweighted_gradients`` gives for all rows as one group; ``options``: those from temperature on."""
    rows = [torch.arange(len(batch.input_ids))]
    [weighted], gradients = reweighted_gradients(
        params, batch, rows, apply, lambda values: [coefficients_fn(values)], *options
    )
    [gradient] = gradients
    return weighted, gradient
