"""Synthetic runs, whose influences a test chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fx_influence.interop.rollouts.record import Rollout
from fx_influence.lab.plan import EntropyInfluencePlan
from fx_influence.lab.results import EntropyInfluenceResults, EvaluationResults

PROMPT, ROLLOUTS_PER_PROMPT = 2, 4
"""Number of tokens and of rollouts of each prompt."""


def synthetic_run(
    path: Path, prompts: int = 12, tokens: int = 6, seed: int = 0, **arrays: Any
) -> EntropyInfluenceResults:
    """Return a run in which delta_it falls with log pi where A > 0 and rises where A < 0.

    Args:
        path: directory of the run, which is not written.
        prompts: number of prompts, each with 4 rollouts.
        tokens: completion tokens of each rollout.
        seed: of the random numbers.
        arrays: replacements for arrays of the evaluation; None removes one.
    """
    rng, n = np.random.default_rng(seed), prompts * ROLLOUTS_PER_PROMPT
    group = np.repeat(np.arange(prompts), ROLLOUTS_PER_PROMPT)
    reward = rng.integers(0, 2, n).astype(float)
    advantage = np.round(reward - 0.5 + 0.3 * rng.standard_normal(n), 3)
    logprobs = np.pad(-rng.exponential(1.0, (n, tokens)), ((0, 0), (PROMPT, 0)))
    per_token = np.pad(rng.standard_normal((n, tokens)), ((0, 0), (PROMPT, 0))) - logprobs * advantage[:, None]
    per_token[:, :PROMPT] = 0.0
    entropies = np.where(logprobs != 0, 1.0 + 0.1 * rng.standard_normal(logprobs.shape), 0.0)
    values = _arrays(rng, per_token) | arrays
    rollouts = [_rollout(i, int(group[i]), tokens, reward[i], advantage[i], logprobs[i]) for i in range(n)]
    sequences = [_record(r, values["per_sequence"][i], logprobs[i], entropies[i]) for i, r in enumerate(rollouts)]
    matrix = values.pop("matrix", rng.standard_normal((8, n)))
    summary = _summary(values)
    evaluated = [_rollout(i, i // 2, 3, 1.0, 0.0, logprobs[0]) for i in range(8)]
    evaluation = EvaluationResults({k: v for k, v in values.items() if v is not None}, matrix, summary, evaluated)
    return EntropyInfluenceResults(
        path=path,
        plan=EntropyInfluencePlan(),
        environment={},
        summary={**summary, "lr": 1e-3, "reference_lr": 1e-3},
        sequences=sequences,
        update_rollouts=rollouts,
        tokens={"logprobs": logprobs.astype(np.float32), "entropies": entropies.astype(np.float32)},
        evaluations=(evaluation,),
    )


def _arrays(rng: np.random.Generator, per_token: np.ndarray) -> dict[str, Any]:
    eta = np.array([1e-4, 1e-3, 1e-2])
    influence = per_token.sum(1)
    arrays = {"per_sequence": influence, "per_token": per_token, "stderr": np.full(len(influence), 0.5), "eta": eta}
    for name, slope in (
        ("full", -2.0),
        ("baseline", -3.0),
        ("rmsprop", 10.0),
        ("momentum", -2.5),
        ("weight_decay", -0.5),
    ):
        arrays |= {name: slope * eta, f"{name}_stderr": 0.1 * eta, f"{name}_first": np.array(slope)}
        arrays[f"{name}_second"] = np.array(3.0)
    arrays |= {"per_sequence_rmsprop": 10 * influence, "per_sequence_reward": rng.standard_normal(len(influence))}
    return arrays | {
        "per_sequence_reward_stderr": np.full(len(influence), 0.5),
        "reward_baseline": np.array(1.0),
        "reward_total_stderr": np.array(0.25),
    }


def _summary(arrays: dict[str, Any]) -> dict[str, Any]:
    total = -3.0 + float(arrays["per_sequence"].sum())
    parts = {"baseline": -3.0, "momentum": -2.5, "weight_decay": -0.5, "baseline_stderr": 0.4}
    return {**parts, "total": total, "total_stderr": 0.5, "rollouts": 8, "entropy": 1.0}


def _rollout(i: int, group: int, tokens: int, reward: float, advantage: float, logprobs: np.ndarray) -> Rollout:
    return Rollout(
        id=f"{group}/{i}",
        prompt_id=str(group),
        group=group,
        prompt=f"prompt {group}",
        completion="abc",
        prompt_ids=(1,) * PROMPT,
        completion_ids=(2,) * tokens,
        finished=True,
        behaviour_logprobs=tuple(np.asarray(logprobs, dtype=np.float32)[PROMPT : PROMPT + tokens].tolist()),
        reward=float(reward),
        advantage=float(advantage),
    )


def _record(r: Rollout, influence: float, logprobs: np.ndarray, entropies: np.ndarray) -> dict[str, Any]:
    return {
        "id": r.id,
        "prompt_id": r.prompt_id,
        "prompt": r.prompt,
        "completion": r.completion,
        "tokens": ["tok"] * len(r.completion_ids),
        "reward": r.reward,
        "advantage": r.advantage,
        "prompt_length": PROMPT,
        "completion_length": len(r.completion_ids),
        "finished": True,
        "mean_entropy": float(entropies[PROMPT:].mean()),
        "mean_logprob": float(logprobs[PROMPT:].mean()),
        "gradient_norm": 1.0 + abs(float(influence)),
        "influence": float(influence),
        "stderr": 0.5,
    }
