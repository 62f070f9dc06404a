"""The result of an attribution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.core.influence_display import influence_html, influence_line
from fx_influence.estimators.deviations import Deviations

NOT_MEASURED = torch.full((), torch.nan, dtype=torch.float64)
"""Default of the fields that an older result does not have."""


class Influence(NamedTuple):
    """First-order influences of one step on an objective, by default entropy: nats per unit lr, positive raises it.

    All tensors are float64, except ``matrix``.

    Attributes:
        per_sequence: (n_u,), delta_i.
        per_token: (n_u, T), delta_it, 0 outside completions, adding up to delta_i; None where it was not asked for.
        stderr: (n_u,), over the draw of E, U's gradients given; NaN with ``stderr=False`` or fewer than two clusters.
        baseline: scalar, the influence of the step without U's gradients, ``momentum`` + ``weight_decay``.
        momentum: scalar, the term of ``baseline`` from the first moment before the step.
        weight_decay: scalar, the term of ``baseline`` from weight decay.
        total: scalar, baseline + sum_i delta_i + unattributed, the objective's derivative along the step.
        residual: scalar, <grad H, gain * g> - sum_i delta_i over all of E, with g from reverse mode.
        unattributed: scalar, <grad H, gain * (grad - sum_i g_i)>, the terms of the given gradient that no coefficient
            expresses.
        per_parameter: scalar by parameter name, the rollouts' influence through that parameter, adding up to sum_i
            delta_i (and ``unattributed``) over all of E, their own prompts included.
        matrix: (n_e, n_u), the part of E's rollout a in delta_i, M_ai or for a prompt that is left out 0; or None.
        total_stderr: scalar, standard error of ``total``, its three terms included.
        conditioning: scalar in [0, 1], sum_i |delta_i^J| / sum_i (|delta_i^J| + |delta_i - delta_i^J|), with delta_i^J
            the influence through coordinates whose denominator comes mostly from this very gradient or from eps, see
            ``AdamWStep.keep_fresh_``. Above about 0.5, as in the first steps of an optimizer, the influences of
            rollouts are large and cancel: read the total and sums over many rollouts, or measure a later step. NaN
            where it was not measured.
        rounding: (n_u,), |delta_i by the JVP - delta_i by ghost products or by the matrix|: two roundings of one
            number, nats per unit lr. NaN where only one of the two was computed: without ``stderr`` and ``matrix`` in
            float32, without ``per_token``, where a parameter has no layer inputs and output gradients, or where the
            directions of the error bars were rounded to bfloat16.
        self_influence: (n_u,), where U is part of E: the influence on the entropy of the rollout's own prompt, which
            ``per_sequence`` leaves out; see ``error_bars.self_influence``. NaN with an E of fresh rollouts, and for a
            prompt without completion tokens.
        deviations: how far each part of E carries each influence, from which ``stderr`` and the standard errors of
            sums follow; None without error bars.
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
    self_influence: Tensor = NOT_MEASURED
    deviations: Deviations | None = None

    def __repr__(self) -> str:
        return influence_line(self)

    def _repr_html_(self) -> str:
        return influence_html(self)
