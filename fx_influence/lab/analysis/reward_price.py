"""The entropy price of reward: changes of both, their ratio, and the Pareto set of rollouts."""

from __future__ import annotations

from typing import Any

import numpy as np

from fx_influence.estimators.stderr import MAX_RANDOM_GROUPS, interval_half_width
from fx_influence.lab.analysis.correlation import Row, adjust, correlation_rows
from fx_influence.lab.analysis.covariates import prompts
from fx_influence.lab.results import EntropyInfluenceResults


def reward_price(results: EntropyInfluenceResults, evaluation: int = 0) -> tuple[list[Row], list[Row]]:
    """Return the entropy price of reward: delta_i beside r_i, the influence of rollout i on E's expected reward.

    Both are per unit lr.

    Returns:
        The figures, rows with ``quantity``, ``value``, ``stderr`` over the draw of E, ``low``, ``high``, ``p``, ``q``,
        ``note``: the step's change of entropy and of reward, in total and from the rollouts, their ratio in nats per
        unit of reward (negative: entropy is paid), counts of rollouts by both signs, the number of r_i whose 95%
        interval excludes 0, and the correlation of delta_i with r_i.
        The Pareto set, see ``pareto``: a row for each of its rollouts with ``id``, ``entropy``, ``reward`` and their
        standard errors.
    """
    arrays, summary = results.evaluations[evaluation].arrays, results.evaluations[evaluation].summary
    if "per_sequence_reward" not in arrays:
        missing = "not defined: influences on the reward were not stored (no rewards on E, or a step of a training run)"
        return [_figure("price", note=missing)], []
    entropy, reward, error = (
        arrays[name] for name in ("per_sequence", "per_sequence_reward", "per_sequence_reward_stderr")
    )
    rows = [*_changes(summary, arrays), *_quadrants(entropy, reward)]
    # Runs of version 0.2 and before do not have the degrees; their errors come from random groups too.
    degrees = arrays.get("reward_degrees_of_freedom", MAX_RANDOM_GROUPS - 1)
    told = int((np.abs(reward) > interval_half_width(error, degrees)).sum())
    rows.append(_figure("rollouts whose reward has a 95% interval that excludes 0", told))
    correlated = adjust(correlation_rows({"none": entropy}, {"reward influence": reward}, prompts(results)))
    keys = ("value", "low", "high", "p", "q", "note")
    rows += [{**_figure(f"{row['measure']} of entropy and reward"), **{k: row[k] for k in keys}} for row in correlated]
    stderr = arrays["stderr"]
    pareto_set = [
        {
            "id": results.sequences[i]["id"],
            "entropy": float(entropy[i]),
            "entropy_stderr": float(stderr[i]),
            "reward": float(reward[i]),
            "reward_stderr": float(error[i]),
        }
        for i in pareto(entropy, reward)
    ]
    return rows, pareto_set


def pareto(entropy: np.ndarray, reward: np.ndarray) -> list[int]:
    """Return indices of the Pareto set, by falling reward: no other point is as high in both and higher in one.

    Equal points are all in the set or all outside.

    Example:
        >>> pareto(np.array([1.0, 3.0, 2.0, 0.0]), np.array([5.0, 1.0, 1.0, 4.0]))
        [0, 1]
    """
    order = np.lexsort((-entropy, -reward))
    members: list[int] = []
    for i in order:
        last = members[-1] if members else None
        if last is None or entropy[i] > entropy[last] or (entropy[i] == entropy[last] and reward[i] == reward[last]):
            members.append(int(i))
    return members


def _changes(summary: dict[str, Any], arrays: dict[str, np.ndarray]) -> list[Row]:
    """Return the changes of entropy and reward, and their ratio, for the whole step and for its rollouts."""
    entropy, reward = (float(arrays[f"per_sequence{suffix}"].sum()) for suffix in ("", "_reward"))
    total, gained = float(summary["total"]), reward + float(arrays["reward_baseline"])
    errors = summary["total_stderr"], float(arrays["reward_total_stderr"])
    return [
        _figure("entropy, whole step (nats per unit lr)", total, errors[0]),
        _figure("reward, whole step (per unit lr)", gained, errors[1]),
        _price("price, whole step (nats per unit of reward)", total, gained),
        _figure("entropy, rollouts (nats per unit lr)", entropy, summary.get("sum_per_sequence_stderr")),
        _figure("reward, rollouts (per unit lr)", reward),
        _price("price, rollouts (nats per unit of reward)", entropy, reward),
    ]


def _quadrants(entropy: np.ndarray, reward: np.ndarray) -> list[Row]:
    raising, lowering, better, worse = entropy > 0, entropy < 0, reward > 0, reward < 0
    counts = {
        "rollouts that raise entropy and reward": raising & better,
        "rollouts that lower entropy, raise reward": lowering & better,
        "rollouts that raise entropy, lower reward": raising & worse,
        "rollouts that lower entropy and reward": lowering & worse,
    }
    return [_figure(quantity, int(mask.sum())) for quantity, mask in counts.items()]


def _price(quantity: str, entropy: float, reward: float) -> Row:
    if not reward:
        return _figure(quantity, note="not defined: the reward does not change")
    return _figure(quantity, entropy / reward)


def _figure(quantity: str, value: float | None = None, stderr: float | None = None, note: str = "") -> Row:
    row = {"quantity": quantity, "value": value, "stderr": stderr}
    return {**row, **dict.fromkeys(("low", "high", "p", "q")), "note": note}
