"""Turn a measured step of any trainer into an entry of its ledger: figures, sums over kinds, rollouts and prompts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fx_influence import labels
from fx_influence.attribution.result import Influence
from fx_influence.estimators.stderr import MAX_RANDOM_GROUPS
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.labels import Labels
from fx_influence.types import AdamWState, Batch, TokenValues

STRONGEST = 3
"""Rollouts of a step in its entry that raise the entropy most, and as many that lower it most."""

MAX_TEXT = 200
"""Characters of the prompt or the completion of a strongest rollout in an entry."""

REWARD_VALUE, MAX_REWARDS = "reward value", 4
"""Kind of the labels that are values of the reward, and how many of them there may be."""

MAX_PROMPTS, MAX_PROMPT_TEXT = 64, 80
"""Prompts of a step in its entry, those with the largest shares of the sum of |influence|, and characters of each."""

DEGREES, MEASURED_DEGREES = "degrees_of_freedom", "measured_degrees_of_freedom"
"""Figures of an entry: degrees of freedom of Student's t for intervals, from the errors of influences and their sums,
and from that of the measured change."""

ASSUMED_DEGREES = float(MAX_RANDOM_GROUPS - 2)
"""Degrees of freedom where an entry has none, as those of version 0.2: of eight folds, one left out, the default."""


def step_labels(rollouts: Sequence[Rollout], batch: Batch, values: TokenValues) -> dict[str, Labels]:
    """Return the kinds that a ledger adds influences up by: of tokens ``third`` and ``band``, of rollouts the others.

    Each is a partition of U. ``reward`` and ``difficulty`` need a reward for every rollout, the latter one that is not
    the same for all; ``source`` needs a rollout that has one. ``reward`` are bands that do not depend on the step; a
    step of four values at most has ``reward value`` too, which a reader takes instead if the training run has no more.

    Args:
        rollouts: of U, in the order of the batch.
        batch: U, (n, T).
        values: (n, T), token values of U.

    Example:
        >>> mask = torch.tensor([[False, True]])
        >>> batch = Batch(mask.long(), mask | True, mask)
        >>> rollout = Rollout("0/0", "0", 0, "1+1=", "2", (4,), (5,), True, reward=1.0, advantage=0.5)
        >>> kinds = step_labels([rollout], batch, TokenValues(torch.zeros(1, 2), torch.zeros(1, 2)))
        >>> list(kinds), kinds["advantage"].names
        (['third', 'band', 'advantage', 'end', 'reward', 'reward value'], ('A<0', 'A=0', 'A>0'))
    """
    signs = torch.tensor([math.copysign(bool(r.advantage), r.advantage or 0.0) for r in rollouts]).long()
    kinds = {
        "third": labels.thirds(batch),
        "band": labels.entropy_bands(batch, values),
        "advantage": Labels(signs + 1, ("A<0", "A=0", "A>0")),
        "end": labels.completion_end(torch.tensor([r.finished for r in rollouts], dtype=torch.bool)),
    }
    rewards = [r.reward for r in rollouts if r.reward is not None]
    if rewards and len(rewards) == len(rollouts):
        reward = torch.tensor(rewards, dtype=torch.float64)
        kinds["reward"] = labels.reward_bands(reward)
        if len(reward.unique()) <= MAX_REWARDS:
            kinds[REWARD_VALUE] = labels.rewards(reward)
        if reward.min() < reward.max():
            kinds["difficulty"] = labels.difficulty(reward, torch.tensor([r.group for r in rollouts]))
    if any(r.source for r in rollouts):
        kinds["source"] = labels.sources([r.source for r in rollouts])
    return kinds


def rollout_figures(influence: Influence, batch: Batch, rollouts: Sequence[Rollout], lr: float) -> dict[str, float]:
    """Return figures of U's rollouts: means, and the error and the absolute sum of their influences in nats.

    Args:
        influence: of U.
        batch: U, (n, T).
        rollouts: of U, in the order of the batch.
        lr: lr_ref of the step; influences times it are in nats.
    """
    rewards = [r.reward for r in rollouts if r.reward is not None]
    everything = Labels(torch.zeros(len(rollouts), dtype=torch.int64), ("rollouts",))
    return {
        "rollouts_stderr": lr * float(influence.sums(everything).stderr[0]),
        "absolute": lr * float(influence.per_sequence.abs().sum()),
        "reward": sum(rewards) / len(rewards) if rewards else math.nan,
        "length": float(batch.completion_mask.sum(-1).double().mean()),
        "truncated": sum(not r.finished for r in rollouts) / len(rollouts),
        "update_count": len(rollouts),
    }


def lifetime_factor(state: AdamWState) -> float:
    """Return what the influences of a step are multiplied with to have their lifetime effects.

    The preconditioners ``lifetime`` and ``frozen`` differ by (1 - beta1^tau) / (1 - beta1) alone: what a gradient does
    now and through momentum in later steps, if these were alike, over what it does now.

    Args:
        state: AdamW's after step tau.

    Returns:
        NaN where the parameters that have been updated differ in beta1 or in tau.

    Example:
        >>> from fx_influence.types import AdamWHyper
        >>> lifetime_factor(AdamWState({}, {}, {}, {"w": 2}, {"w": AdamWHyper(beta1=0.5)}, 1e-3))
        1.5
    """
    known = {(state.hyper[name].beta1, step) for name, step in state.step.items() if step}
    if len(known) != 1:
        return math.nan
    [(beta1, tau)] = known
    return (1 - beta1**tau) / (1 - beta1)


def ledger_entry(
    step: int,
    lr: float,
    influence: Influence,
    kinds: Mapping[str, Labels],
    figures: Mapping[str, float],
    rollouts: Sequence[Rollout] = (),
    settings: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the entry of one measured step, to be given to ``append_entry``.

    Args:
        step: number of optimizer steps when it is done, from 1.
        lr: lr_ref of the step; influences times it are in nats.
        influence: of U on the entropy over E, per unit lr.
        kinds: labels of U's rollouts or tokens by the name of the kind, as from ``step_labels``.
        figures: numbers of the step by name; changes of entropy in nats.
        rollouts: of U, in the order of the batch; the strongest of them enter with the beginnings of their texts.
        settings: texts by name, such as ``preconditioner`` and ``normalize``.

    Returns:
        ``step``, the settings, ``figures``, ``sums`` (for each kind a list of name, sum in nats, its standard error,
        rollouts or tokens, share of the sum of |influence|), ``strongest``, and ``prompts`` (for each a list of key,
        sum in nats, its standard error, rollouts, mean reward or null, beginning of the text).
    """
    return {
        "step": step,
        **(settings or {}),
        "figures": dict(figures),
        "sums": {kind: _sums(influence, chosen, lr) for kind, chosen in kinds.items()},
        "strongest": _strongest(influence, rollouts, lr),
        "prompts": _prompts(influence, rollouts, lr),
    }


def prompt_key(rollout: Rollout) -> str:
    """Return what tells a rollout's prompt from others in every step of a training run: a digest of its tokens.

    Example:
        >>> prompt_key(Rollout("0/0", "0", 0, "1+1=", "2", (4, 9, 4, 10), (5, 1), True))
        '02561d771063'
    """
    return hashlib.blake2b(",".join(map(str, rollout.prompt_ids)).encode("ascii"), digest_size=6).hexdigest()


def _sums(influence: Influence, chosen: Labels, lr: float) -> list[list[Any]]:
    """Return the labels that occur, each as name, sum in nats, standard error, count and share."""
    sums = influence.sums(chosen)
    columns: list[Tensor] = [lr * sums.influence, lr * sums.stderr, sums.count, sums.share]
    rows = zip(sums.names, *(x.tolist() for x in columns), strict=True)
    return [list(row) for row in rows if row[3]]


def _strongest(influence: Influence, rollouts: Sequence[Rollout], lr: float) -> list[dict[str, Any]]:
    """Return the rollouts that raise the entropy most, the first of all, and those that lower it most, the last."""
    order = influence.per_sequence.argsort(descending=True, stable=True).tolist() if rollouts else []
    chosen = order if len(order) <= 2 * STRONGEST else [*order[:STRONGEST], *order[-STRONGEST:]]
    return [
        {
            "id": rollouts[i].id,
            "influence": lr * float(influence.per_sequence[i]),
            "stderr": lr * float(influence.stderr[i]),
            "reward": rollouts[i].reward,
            "advantage": rollouts[i].advantage,
            "length": len(rollouts[i].completion_ids),
            "finished": rollouts[i].finished,
            "source": rollouts[i].source,
            "prompt": _beginning(rollouts[i].display_prompt, MAX_TEXT),
            "completion": _beginning(rollouts[i].completion, MAX_TEXT),
        }
        for i in chosen
    ]


def _prompts(influence: Influence, rollouts: Sequence[Rollout], lr: float) -> list[list[Any]]:
    """Return the prompts, the one with the largest share of the sum of |influence| first."""
    if not rollouts:
        return []
    keys = [prompt_key(r) for r in rollouts]
    sums = influence.sums(labels.by(keys))
    members: dict[str, list[Rollout]] = {}
    for key, rollout in zip(keys, rollouts, strict=True):
        members.setdefault(key, []).append(rollout)
    order = sums.share.nan_to_num().argsort(descending=True, stable=True).tolist()[:MAX_PROMPTS]
    return [
        [
            sums.names[k],
            lr * float(sums.influence[k]),
            lr * float(sums.stderr[k]),
            int(sums.count[k]),
            _mean_reward(members[sums.names[k]]),
            _beginning(members[sums.names[k]][0].display_prompt, MAX_PROMPT_TEXT),
        ]
        for k in order
    ]


def _mean_reward(rollouts: Sequence[Rollout]) -> float | None:
    rewards = [r.reward for r in rollouts if r.reward is not None]
    return sum(rewards) / len(rewards) if rewards else None


def _beginning(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
