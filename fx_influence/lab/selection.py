"""Choose the rollouts or tokens that a step can leave out where it would lower the entropy too far."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from fx_influence.attribution.result import Influence
from fx_influence.core.checks import check_number, wrong_type
from fx_influence.core.display import record_line


class Selection(NamedTuple):
    """Weights for the coefficients of U, and the step predicted with them, per unit lr.

    Attributes:
        weights: w in [0, 1], float64, (n_u,) or (n_u, T) per token; 1 leaves a rollout as it is.
        entropy: baseline + sum_i w_i delta_i, nats.
        reward: the same for the reward.
        lost: sum_i (1 - w_i) max(reward_i, 0), the reward that is given up.
        reached: whether ``entropy`` is at least the floor; if no weights reach it, all that lowers the entropy has
            weight 0.
    """

    weights: Tensor
    entropy: Tensor
    reward: Tensor
    lost: Tensor
    reached: bool

    def __repr__(self) -> str:
        return record_line(self)


def select(
    influence_entropy: Influence, influence_reward: Influence, *, floor: float, per_token: bool = False
) -> Selection:
    """Return weights of U that keep the predicted entropy above a floor at the least loss of predicted reward.

    With delta_i and r_i the influences of rollout i on entropy and reward, the linear program

        minimise sum_i (1 - w_i) max(r_i, 0)   subject to   baseline + sum_i w_i delta_i >= floor,   0 <= w_i <= 1

    Among solutions of equal cost it leaves out the least. The influences are of the step as it is: other weights would
    also change its second moment and clipping, to second order in 1 - w. To use the
    weights, multiply ``batch_u.coefficients`` by them.

    Args:
        influence_entropy: of the step on the entropy.
        influence_reward: of the same step on the same U, with ``objective=expected_reward(...)``.
        floor: nats per unit lr, like the influences: for a fall of at most x nats in a step of learning rate lr,
            -x / lr.
        per_token: weigh tokens, not rollouts.

    Raises:
        TypeError: for arguments that are not influences.
        ValueError: for influences of different shape, or without tokens where ``per_token`` needs them.

    Source: the linear program is a fractional knapsack, Dantzig 1957; solved by HiGHS in ``scipy.optimize``.

    Example:
        >>> zero, nan = torch.zeros(()), torch.full((2,), torch.nan)
        >>> rest = {name: zero for name in ("momentum", "weight_decay", "residual", "unattributed", "total_stderr")}
        >>> rest |= {"stderr": nan, "rounding": nan, "per_token": None, "per_parameter": {}, "matrix": None}
        >>> rest |= {"baseline": zero}
        >>> entropy = Influence(per_sequence=torch.tensor([-3.0, -1.0]), total=torch.tensor(-4.0), **rest)
        >>> reward = Influence(per_sequence=torch.tensor([1.0, 1.0]), total=torch.tensor(2.0), **rest)
        >>> select(entropy, reward, floor=-2.5).weights.tolist()
        [0.5, 1.0]
    """
    for field, out in (("influence_entropy", influence_entropy), ("influence_reward", influence_reward)):
        if not isinstance(out, Influence):
            raise wrong_type(field, out, "an Influence", "Pass what fx.influence(...) returns")
    remedy = "pass -x / lr for a fall of x"
    check_number("floor", floor, remedy, lambda x: not math.isnan(x), "nats per unit lr")
    deltas, rewards = (_influences(out, per_token) for out in (influence_entropy, influence_reward))
    if deltas.shape != rewards.shape:
        raise ValueError(
            f"influence_reward has shape {tuple(rewards.shape)}; expected that of influence_entropy, "
            f"{tuple(deltas.shape)}. Pass two objectives of the same step on the same batch_u"
        )
    weights = _weights(deltas.flatten(), rewards.flatten(), floor - float(influence_entropy.baseline))
    w = torch.from_numpy(weights).to(deltas.device).reshape(deltas.shape)
    entropy = influence_entropy.baseline + (w * deltas).sum()
    # HiGHS meets constraints to this relative tolerance.
    slack = 1e-6 * float(deltas.abs().sum())
    return Selection(
        weights=w,
        entropy=entropy,
        reward=influence_reward.baseline + (w * rewards).sum(),
        lost=((1 - w) * rewards.clamp(min=0)).sum(),
        reached=bool(entropy >= floor - slack),
    )


def _influences(out: Influence, per_token: bool) -> Tensor:
    values = out.per_token if per_token else out.per_sequence
    if values is None:
        raise ValueError(
            "per_token is True and the influences hold no tokens; expected influences of tokens. Make them with "
            "influence(per_token=True)"
        )
    return values.double()


def _weights(deltas: Tensor, rewards: Tensor, floor: float) -> np.ndarray:
    """Solve the program in 1 - w over the entries that lower the entropy; all others have weight 1."""
    delta, reward = deltas.cpu().numpy(), rewards.cpu().numpy()
    weights, lowers = np.ones(len(delta)), delta < 0
    missing = floor - delta.sum()
    rise = -delta[lowers]
    if missing <= 0 or not lowers.any():
        return weights
    if missing >= rise.sum():
        weights[lowers] = 0.0
        return weights
    # Costs are scaled to 1, because HiGHS has an absolute zero; a millionth of the entropy breaks ties of free entries.
    cost = np.maximum(reward[lowers], 0) / max(np.abs(reward).max(), 1e-300) + 1e-6 * rise / rise.max()
    solution = linprog(cost, A_ub=-rise[None] / rise.sum(), b_ub=[-missing / rise.sum()], bounds=(0, 1), method="highs")
    weights[lowers] = 1 - np.clip(solution.x, 0, 1)
    return weights
