"""Recorded properties of U's rollouts and tokens, against which their influence is correlated."""

from __future__ import annotations

from typing import Any

import numpy as np

from fx_influence.interop.rollouts.batch import collate
from fx_influence.lab.analysis.correlation import Column
from fx_influence.lab.inputs.rollouts import ON_POLICY_TOLERANCE
from fx_influence.lab.results import EntropyInfluenceResults
from fx_influence.labels import UNKNOWN_SOURCE

RECORDED = ("advantage", "reward", "completion_length", "mean_entropy", "mean_logprob")
NOT_RECORDED = "was not recorded for every rollout"


def prompts(results: EntropyInfluenceResults) -> np.ndarray:
    """Return the prompt of each rollout of U as a number from 0 to C-1; (n_u,)."""
    return np.unique([r.group for r in results.update_rollouts], return_inverse=True)[1]


def rollout_covariates(results: EntropyInfluenceResults) -> dict[str, Column]:
    """Return columns (n_u,) by name, or the reason why there is none.

    ``advantage``, ``reward``, ``completion_length`` (tokens), ``mean_entropy``, ``mean_logprob`` (nats per token),
    ``importance_weight`` (pi / pi_behaviour of the whole completion), ``gradient_norm`` (|g_i|),
    ``prompt_difficulty`` (1 - mean reward of the prompt in U).
    """
    columns: dict[str, Column] = {name: recorded(results, name) for name in RECORDED}
    columns["importance_weight"] = importance_weights(results)
    columns["gradient_norm"] = recorded(results, "gradient_norm")
    columns["prompt_difficulty"] = _difficulty(results)
    return columns


def recorded(results: EntropyInfluenceResults, name: str) -> Column:
    """Return a field of the run's records of U as floats (n_u,), or the reason why there is none."""
    values = [record.get(name) for record in results.sequences]
    return NOT_RECORDED if any(value is None for value in values) else np.array(values, dtype=float)


def importance_weights(results: EntropyInfluenceResults) -> Column:
    """Return exp(sum_t log pi - log pi_behaviour) over the completion mask, exactly 1 where they differ by rounding."""
    behaviour = [r.behaviour_logprobs for r in results.update_rollouts]
    if "logprobs" not in results.tokens or any(b is None for b in behaviour):
        return NOT_RECORDED
    mask, scored = completion_mask(results), results.tokens["logprobs"].astype(float)
    sampled = np.zeros_like(scored)
    for row, rollout, values in zip(sampled, results.update_rollouts, behaviour, strict=True):
        row[len(rollout.prompt_ids) :][: len(rollout.completion_ids)] = values
    gap = np.where(mask, scored - sampled, 0.0)
    return np.ones(len(gap)) if np.abs(gap).max() <= ON_POLICY_TOLERANCE else np.exp(gap.sum(1))


def sources(results: EntropyInfluenceResults) -> list[str]:
    """Return the source of each rollout of U, "unknown" where it was not recorded; all empty where none was."""
    values = [rollout.source for rollout in results.update_rollouts]
    known = any(value is not None for value in values)
    return [(UNKNOWN_SOURCE if value is None else value) if known else "" for value in values]


def completion_mask(results: EntropyInfluenceResults) -> np.ndarray:
    """Return the completion mask of U, (n_u, T), in the columns of ``per_token``."""
    return np.asarray(collate(results.update_rollouts, pad_id=0).completion_mask.numpy())


def _difficulty(results: EntropyInfluenceResults) -> Column:
    rewards = recorded(results, "reward")
    if isinstance(rewards, str):
        return rewards
    index = prompts(results)
    return 1 - (np.bincount(index, rewards) / np.bincount(index))[index]


class Tokens:
    """Columns (m,) over the tokens in U's completion mask, in the order of the rollouts."""

    def __init__(self, results: EntropyInfluenceResults, evaluation: int = 0) -> None:
        mask = completion_mask(results)
        self.influence = results.evaluations[evaluation].arrays["per_token"][mask].astype(float)
        self.rollout = np.nonzero(mask)[0]
        self.prompt = prompts(results)[self.rollout]
        self.position = (mask.cumsum(1) - 1)[mask].astype(float)
        self.logprob = _stored(results, "logprobs", mask)
        self.entropy = _stored(results, "entropies", mask)
        advantage = recorded(results, "advantage")
        self.advantage: Column = advantage if isinstance(advantage, str) else advantage[self.rollout]
        self.source = np.array(sources(results), dtype=object)[self.rollout]

    def proxy(self) -> Column:
        """Return (log pi - mean)(A - mean), means over tokens, large where the entropy falls (arXiv 2505.22617)."""
        for needed in (self.logprob, self.advantage):
            if isinstance(needed, str):
                return needed
        logprob, advantage = np.asarray(self.logprob), np.asarray(self.advantage)
        return (logprob - logprob.mean()) * (advantage - advantage.mean())


def _stored(results: EntropyInfluenceResults, name: str, mask: np.ndarray) -> Column:
    values: Any = results.tokens.get(name)
    return "was not stored with this run" if values is None else values[mask].astype(float)
