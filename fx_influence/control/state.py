"""The state of the controller: influences by kind, accumulated over steps with exponential forgetting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fx_influence.attribution.display import ILL_CONDITIONED
from fx_influence.control.sums import KindSums
from fx_influence.core.checks import check_number


class ControlState(NamedTuple):
    """Sums over steps s of influences of K kinds, those of a steps ago times forgetting^a; float64.

    A kind's age is counted in steps that measured it.

    Attributes:
        kinds: K names.
        evidence: (K,), N = sum_s forgetting^a; 0 for a kind that was never measured.
        entropy: (K,), sum_s forgetting^a x_s of influences on the entropy at weight 1, nats per unit lr.
        reward: (K,), of influences on the reward.
        entropy_covariance: (K, K), sum_s forgetting^(a_k + a_l) C_s of the errors of x_s.
        reward_covariance: (K, K).
        steps: sum_s forgetting^a over all steps.
        rest: sum_s forgetting^a of the entropy's change that no weight multiplies.
        squares: sum_s forgetting^(2 a).
        fourths: sum_s forgetting^(4 a) / degrees of freedom of step s.
    """

    kinds: tuple[str, ...]
    evidence: Tensor
    entropy: Tensor
    reward: Tensor
    entropy_covariance: Tensor
    reward_covariance: Tensor
    steps: float = 0.0
    rest: float = 0.0
    squares: float = 0.0
    fourths: float = 0.0

    def estimate(self) -> KindSums:
        """Return the means over steps with the covariances of their errors: 0 for kinds that were never measured.

            mean_k = entropy_k / N_k,  C_kl = entropy_covariance_kl / (N_k N_l),  degrees = squares^2 / fourths

        The degrees of freedom are Satterthwaite's for steps of equal variance.
        """
        n = torch.where(self.evidence > 0, self.evidence, torch.inf)
        pairs = n.unsqueeze(0) * n.unsqueeze(1)
        rest = torch.tensor(self.rest / self.steps if self.steps else 0.0, dtype=torch.float64)
        degrees = self.squares**2 / self.fourths if self.fourths else math.inf
        return KindSums(
            kinds=self.kinds,
            entropy=self.entropy / n,
            reward=self.reward / n,
            entropy_covariance=self.entropy_covariance / pairs,
            reward_covariance=self.reward_covariance / pairs,
            rest=rest,
            degrees_of_freedom=degrees,
        )


def control_state(kinds: Sequence[str] = ()) -> ControlState:
    """Return the state before any step.

    Args:
        kinds: names of the kinds; ``update`` adds others as they occur.

    Example:
        >>> control_state(["A>0", "A<0"]).evidence.tolist()
        [0.0, 0.0]
    """
    zero = torch.zeros(len(kinds), dtype=torch.float64)
    return ControlState(tuple(kinds), zero, zero, zero, zero.outer(zero), zero.outer(zero))


def update(
    state: ControlState, sums: KindSums, *, forgetting: float, in_force: Mapping[str, float] | None = None
) -> ControlState:
    """Return the state with one more step.

        N <- forgetting N + 1,   entropy <- forgetting entropy + x / w,   reward likewise
        covariance_kl <- forgetting^2 covariance_kl + C_kl / (w_k w_l)

    for the kinds that the step measured: those in ``sums`` whose weight w in force was not 0. Influences are linear in
    the coefficients, so that x / w is the influence at weight 1 beside the denominators and clipping of the step that
    was made. A kind of weight 0 cannot be measured, and like one that is not in ``sums`` it keeps its estimate. A step
    whose conditioning is above 0.5 changes nothing: denominators that come from its very gradient make influences
    hundreds of times those of later steps.

    Args:
        state: before the step.
        sums: of the step, see ``kind_sums``.
        forgetting: factor from 0 to 1 on earlier steps; 0.9 averages over about the last ten.
        in_force: weights by kind that multiplied the coefficients of this step; 1 for those not in it.

    Raises:
        ValueError: for sums that are not finite or of other shapes than their kinds, and for numbers out of range.

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> sums = KindSums(("A>0",), -2 * one, one, one.outer(one), one.outer(one), torch.tensor(0.0))
        >>> state = update(control_state(), sums, forgetting=0.5)
        >>> state = update(state, sums, forgetting=0.5, in_force={"A>0": 0.5})
        >>> state.evidence.tolist(), state.entropy.tolist(), state.estimate().entropy.tolist()
        ([1.5], [-5.0], [-3.3333333333333335])
    """
    remedy = "Pass 0.9 to average over about ten steps"
    check_number("forgetting", forgetting, remedy, lambda x: 0 <= x <= 1, "a factor from 0 to 1")
    _check_sums(sums)
    w = torch.tensor([(in_force or {}).get(name, 1.0) for name in sums.kinds], dtype=torch.float64)
    if not (torch.isfinite(w) & (w >= 0)).all():
        raise ValueError(f"in_force is {w.tolist()}; expected weights of at least 0. Pass those that were applied")
    if sums.conditioning > ILL_CONDITIONED:
        return state
    state = _with_kinds(state, sums.kinds)
    place = torch.tensor([state.kinds.index(name) for name in sums.kinds], dtype=torch.int64)
    inverse = torch.where(w > 0, 1 / w, 0.0)
    measured = torch.zeros_like(state.evidence)
    measured[place] = (w > 0).double()
    decay = 1 - (1 - float(forgetting)) * measured

    def add(total: Tensor, values: Tensor) -> Tensor:
        spread = torch.zeros_like(total)
        spread[place] = inverse * values
        return decay * total + spread

    def add_pairs(total: Tensor, values: Tensor) -> Tensor:
        spread = torch.zeros_like(total)
        spread[place.unsqueeze(1), place] = inverse.outer(inverse) * values
        return decay.outer(decay) * total + spread

    return ControlState(
        kinds=state.kinds,
        evidence=decay * state.evidence + measured,
        entropy=add(state.entropy, sums.entropy),
        reward=add(state.reward, sums.reward),
        entropy_covariance=add_pairs(state.entropy_covariance, sums.entropy_covariance),
        reward_covariance=add_pairs(state.reward_covariance, sums.reward_covariance),
        steps=forgetting * state.steps + 1,
        rest=forgetting * state.rest + float(sums.rest),
        squares=forgetting**2 * state.squares + 1,
        fourths=forgetting**4 * state.fourths + 1 / sums.degrees_of_freedom,
    )


def to_values(state: ControlState) -> dict[str, Any]:
    """Return the state as lists, numbers and strings, for a JSON file.

    Example:
        >>> from_values(to_values(control_state(["A>0"]))).kinds
        ('A>0',)
    """
    return {name: x.tolist() if isinstance(x, Tensor) else x for name, x in state._asdict().items()}


def from_values(values: Mapping[str, Any]) -> ControlState:
    """Return the state that ``to_values`` wrote.

    Raises ``ValueError`` for values of another form.
    """
    try:
        kinds = tuple(str(name) for name in values["kinds"])
        count = len(kinds)

        def tensor(name: str, *shape: int) -> Tensor:
            return torch.tensor(values[name], dtype=torch.float64).reshape(shape)

        return ControlState(
            kinds,
            tensor("evidence", count),
            tensor("entropy", count),
            tensor("reward", count),
            tensor("entropy_covariance", count, count),
            tensor("reward_covariance", count, count),
            *(float(values[name]) for name in ("steps", "rest", "squares", "fourths")),
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"values is no state of a controller ({error}); expected what to_values returns. Start with control_state()"
        ) from error


def _with_kinds(state: ControlState, names: Sequence[str]) -> ControlState:
    """Return the state with these kinds added, never measured."""
    added = tuple(name for name in dict.fromkeys(names) if name not in state.kinds)
    more = len(added)

    def pad(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, more) * x.ndim)

    return state._replace(
        kinds=(*state.kinds, *added),
        evidence=pad(state.evidence),
        entropy=pad(state.entropy),
        reward=pad(state.reward),
        entropy_covariance=pad(state.entropy_covariance),
        reward_covariance=pad(state.reward_covariance),
    )


def _check_sums(sums: KindSums) -> None:
    count = len(sums.kinds)
    shapes: dict[str, tuple[int, ...]] = {"entropy": (count,), "reward": (count,), "rest": ()}
    shapes |= {"entropy_covariance": (count, count), "reward_covariance": (count, count)}
    for name, shape in shapes.items():
        x = getattr(sums, name)
        if tuple(x.shape) != shape or not torch.isfinite(x).all():
            raise ValueError(
                f"sums.{name} has shape {tuple(x.shape)}; expected finite values of shape {shape}, by kind. Make them "
                "with kind_sums"
            )
    if len(set(sums.kinds)) < count or sums.degrees_of_freedom <= 0:
        raise ValueError(
            f"sums has kinds {sums.kinds} and {sums.degrees_of_freedom} degrees of freedom; expected distinct names "
            "and a positive number. Make them with kind_sums"
        )
