"""The result of an attribution."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fx_influence.core.influence_display import influence_html, influence_line

if TYPE_CHECKING:
    pass


NOT_MEASURED = torch.full((), torch.nan, dtype=torch.float64)


class Influence(NamedTuple):
    """First-order influences of one step on an objective, by default entropy: nats per unit lr, positive raises it.

    All tensors are float64, except ``matrix``.

    Attributes:
        per_sequence: (n_u,), delta_i.
        per_token: (n_u, T), delta_it, 0 outside completions, adding up to delta_i; None where it was not asked for.
        stderr: (n_u,), over the draw of E; NaN with ``stderr=False`` or fewer than two clusters. It takes the H that E
            is centred by as known: per token, where a rollout changes completion lengths much, it can be a third off.
        baseline: scalar, what the step would do without U's gradients; its parts are ``momentum`` and ``weight_decay``.
        momentum: scalar, the part of ``baseline`` that the old first moment makes.
        weight_decay: scalar, the part of ``baseline`` that decay makes.
        total: scalar, baseline + sum_i delta_i + unattributed, the derivative along the whole step.
        residual: scalar, <grad H, gain * g> - sum_i delta_i, with g from reverse mode.
        unattributed: scalar, <grad H, gain * (grad - sum_i g_i)>, the terms of a gradient handed in that no coefficient
            expresses.
        per_parameter: scalar by parameter name, the rollouts' part, adding up to sum_i delta_i (and ``unattributed``).
        matrix: (n_e, n_u), M_ai, the part of E's rollout a in delta_i, or None.
        total_stderr: scalar, standard error of ``total``, all three parts included.
        conditioning: scalar in [0, 1], sum_i |delta_i^J| / sum_i (|delta_i^J| + |delta_i - delta_i^J|), with delta_i^J
            the part on coordinates whose denominator is made by this very gradient or by eps, see
            ``AdamWStep.keep_fresh_``.
            Above about 0.5, as in the first steps of an optimizer, the parts of rollouts are large and cancel: read the
            total and sums over many rollouts, or measure a later step. NaN where it was not measured.
        rounding: (n_u,), |delta_i by the JVP - delta_i by ghost products or by the matrix|: two roundings of one
            number, nats per unit lr. NaN where only one of the two was computed: without ``stderr`` and ``matrix`` in
            float32, without ``per_token``, or where a parameter has no layer inputs and output gradients.
    """

    per_sequence: Tensor
    per_token: Tensor | None
    stderr: Tensor
    baseline: Tensor
    momentum: Tensor
    weight_decay: Tensor
    total: Tensor
    residual: Tensor
    unattributed: Tensor
    per_parameter: dict[str, Tensor]
    matrix: Tensor | None
    total_stderr: Tensor
    conditioning: Tensor = NOT_MEASURED
    rounding: Tensor = NOT_MEASURED

    def __repr__(self) -> str:
        return influence_line(self)

    def _repr_html_(self) -> str:
        return influence_html(self)
