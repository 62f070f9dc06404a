"""The result of an attribution over several steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fx_influence.core.display import record_line


@dataclass(frozen=True, repr=False)
class InfluenceOverSteps:
    """Influences of all rollouts of a window on the objective after its last step: nats, positive raises it; float64.

    Attributes:
        per_sequence: for each step (n_u,), delta_i = dH(theta_K) / dw_i at w = 1, w_i the weight of rollout i's loss.
        per_token: for each step (n_u, T), adding up to delta_i, 0 outside completions; None where not asked for.
        momentum: scalar, derivative along the first moment before the window.
        second_moment: scalar, derivative along the second moment before the window (with amsgrad its maximum as well);
            0 with denominators held fixed.
        weight_decay: (K,), derivative along each step's weight decay.
        eps: scalar, derivative with respect to log eps of all parameters, through every denominator.
        total: scalar, all rollouts + momentum + second_moment + weight_decay: the derivative of H(theta_K) as all of
            them are scaled by one factor.
        residual: (K,), <l_g, g> - sum_i delta_i of each step, with g from reverse mode.
    """

    per_sequence: tuple[Tensor, ...]
    per_token: tuple[Tensor, ...] | None
    momentum: Tensor
    second_moment: Tensor
    weight_decay: Tensor
    eps: Tensor
    total: Tensor
    residual: Tensor

    def __repr__(self) -> str:
        return record_line(self)
