"""The entropy price of reward: changes of both, their ratio, and the Pareto set of rollouts."""

from __future__ import annotations

from typing import Any

import numpy as np

from fx_influence.lab.analysis.correlation import Row, adjust, correlation_rows
from fx_influence.lab.analysis.covariates import prompts
from fx_influence.lab.results import EntropyInfluenceResults


def reward_price(results: EntropyInfluenceResults, evaluation: int = 0) -> tuple[list[Row], list[Row]]:
    """The entropy price of reward: delta_i beside r_i, what rollout i adds to E's expected reward, per unit lr.

    First the figures (``quantity``, ``value``, ``stderr`` over the draw of E, ``low``, ``high``, ``p``, ``q``,
    ``note``): the step's change of entropy and of reward, in all and from the rollouts, their ratio in nats per unit of
    reward (negative: entropy is paid), how many rollouts do what, how many of r_i can be told from 0, and the
    correlation of delta_i with r_i. Then the Pareto set, see ``pareto``: the rollouts that no other beats in both, a
    row each with ``id``, ``entropy``, ``reward`` and their standard errors.
    """
    arrays, summary = results.evaluations[evaluation].arrays, results.evaluations[evaluation].summary
    if "per_sequence_reward" not in arrays:
        missing = "not defined: influences on the reward were not stored; E was not judged, or the run is of a training"
        return [_figure("price", note=missing)], []
    entropy, reward, error = (
        arrays[name] for name in ("per_sequence", "per_sequence_reward", "per_sequence_reward_stderr")
    )
    rows = [*_changes(summary, arrays), *_quadrants(entropy, reward)]
    rows.append(_figure("rollouts whose reward is beyond two standard errors", int((np.abs(reward) > 2 * error).sum())))
    found = adjust(correlation_rows({"none": entropy}, {"reward influence": reward}, prompts(results)))
    keys = ("value", "low", "high", "p", "q", "note")
    rows += [{**_figure(f"{row['measure']} of entropy and reward"), **{k: row[k] for k in keys}} for row in found]
    stderr = arrays["stderr"]
    best = [
        {
            "id": results.sequences[i]["id"],
            "entropy": float(entropy[i]),
            "entropy_stderr": float(stderr[i]),
            "reward": float(reward[i]),
            "reward_stderr": float(error[i]),
        }
        for i in pareto(entropy, reward)
    ]
    return rows, best


def pareto(entropy: np.ndarray, reward: np.ndarray) -> list[int]:
    """Indices that no other one beats: none is at least as high in both and higher in one; by falling reward.

    Equal rollouts are all in the set or all out of it.

    Example:
        >>> pareto(np.array([1.0, 3.0, 2.0, 0.0]), np.array([5.0, 1.0, 1.0, 4.0]))
        [0, 1]
    """
    order = np.lexsort((-entropy, -reward))
    chosen: list[int] = []
    for i in order:
        last = chosen[-1] if chosen else None
        if last is None or entropy[i] > entropy[last] or (entropy[i] == entropy[last] and reward[i] == reward[last]):
            chosen.append(int(i))
    return chosen


def _changes(summary: dict[str, Any], arrays: dict[str, np.ndarray]) -> list[Row]:
    """Of the whole step and of its rollouts."""
    entropy, reward = (float(arrays[f"per_sequence{of}"].sum()) for of in ("", "_reward"))
    total, paid = float(summary["total"]), reward + float(arrays["reward_baseline"])
    errors = summary["total_stderr"], float(arrays["reward_total_stderr"])
    return [
        _figure("entropy, whole step (nats per unit lr)", total, errors[0]),
        _figure("reward, whole step (per unit lr)", paid, errors[1]),
        _price("price, whole step (nats per unit of reward)", total, paid),
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
    return [_figure(quantity, int(which.sum())) for quantity, which in counts.items()]


def _price(quantity: str, entropy: float, reward: float) -> Row:
    if not reward:
        return _figure(quantity, note="not defined: the reward does not change")
    return _figure(quantity, entropy / reward)


def _figure(quantity: str, value: float | None = None, stderr: float | None = None, note: str = "") -> Row:
    row = {"quantity": quantity, "value": value, "stderr": stderr}
    return {**row, **dict.fromkeys(("low", "high", "p", "q")), "note": note}
