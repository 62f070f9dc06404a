"""A step of a training state redone without rollouts: its rollouts, every predictor, and the measured changes."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fx_influence as fx
from benchmarks.evidence.arithmetic import update_batch
from benchmarks.evidence.bench_counterfactual import (
    INFLUENCES,
    Step,
    compared,
    predictions,
    random_halves,
    sampled_change,
    weights_of_steps,
)
from benchmarks.evidence.bench_estimators import OBJECTIVES
from benchmarks.harness import write_json
from benchmarks.real.bench_real_counterfactual import measured_changes, progress
from benchmarks.real.bench_real_estimators import (
    CROSS_FITTED,
    DEFAULT,
    DIRECT,
    FRESH,
    FULL,
    estimates,
    influences,
)
from benchmarks.real.predicted_run import (
    COMPLETIONS,
    Policy,
    Settings,
    prompts_of_step,
    sampled_evaluation,
    sampled_update,
)
from benchmarks.real.pretrained_states import PretrainedState, joined
from fx_influence.autodiff.rollout_gradients import rollout_gradients
from fx_influence.autodiff.token_values import all_token_values
from fx_influence.interop.on_policy import check_on_policy
from fx_influence.interop.rollouts.native_format import read_native_rollouts, write_rollouts
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.lab.inputs.rollouts import ON_POLICY_TOLERANCE, ScoredRollouts

PREDICTIONS, CHANGES = "predictions.json", "changes.json"
SEED = 10**6
"""Seed of the states' rollouts: none of a training step's."""
PREDICTED_BY = tuple(name for name in INFLUENCES if name != "rmsprop")
"""Influences on a fresh E; ``rmsprop`` and ``lifetime`` are ``frozen`` times a number, so that they rank alike."""
ESTIMATORS = {FRESH: (FULL, DIRECT), CROSS_FITTED: (DEFAULT, FULL, DIRECT)}
"""Estimators of the entropy's gradient by kind of E, beside the default on a fresh one."""
ENDINGS = {
    DEFAULT: "",
    FULL: ", shrunk",
    DIRECT: ", no score term",
    "half the score term, shrunk": ", half the score term",
    "estimated share of the score term, shrunk": ", estimated share",
}
"""Endings of predictors' names by estimator."""


def measure(policy: Policy, settings: Settings, step: int, folder: Path, prompts: int, halves: int) -> None:
    """Store every predictor's estimates for a step, and the measured changes of the steps without rollouts.

    Args:
        policy: at the state before the step.
        settings: of its training run.
        step: the step's number.
        folder: of rollouts, predictions and measured changes; those that are there are not made again.
        prompts: of U, ``COMPLETIONS`` rollouts each.
        halves: number of random halves of U.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = load_rollouts(policy, settings, step, folder, prompts)
    advantages = torch.tensor([r.advantage or 0.0 for r in state.u.rollouts])
    gradients = rollout_gradients(state.params, state.update, state.apply)
    redone = Step(state.params, state.apply, state.opt_state, state.update, advantages, gradients)
    store_predictions(state, redone, halves, folder / PREDICTIONS)
    change = sampled_change(state.params, state.others, state.apply)
    measured_changes(redone, weights_of_steps(halves_of(len(advantages), halves)), change, folder / CHANGES)


def figures_of(folder: Path, step: int) -> dict[str, Any] | None:
    """Return correlations of every predictor with the measured effects on a step, None until all are stored.

    Args:
        folder: of the stored predictions and measured changes.
        step: the step's number.
    """
    if not (folder / CHANGES).exists():
        return None
    made, changes = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (PREDICTIONS, CHANGES))
    predicted, measured = predictors_of(made), torch.tensor(changes["changes"], dtype=torch.float64)
    n = len(predicted["share"])
    if len(measured) < n + made["halves"] + 1:
        return None
    return {"step": step, "entropy": made["entropy"], **compared(measured, predicted, halves_of(n, made["halves"]))}


def halves_of(n: int, count: int) -> Tensor:
    """Return 1 for the rollouts in each of ``count`` random halves of ``n``, (count, n), the same at every call."""
    return random_halves(random.Random(0), n, count)


def load_rollouts(policy: Policy, settings: Settings, step: int, folder: Path, prompts: int) -> PretrainedState:
    """Return a state with rollouts of U, of an E, and of other prompts that measure; stored ones are not sampled again.

    Args:
        policy: at the state before the step.
        settings: of its training run; ``evaluated`` prompts of E, one completion each, and two of as many others.
        step: the step's number.
        folder: of the rollouts.
        prompts: of U, ``COMPLETIONS`` rollouts each.
    """
    _, e_prompts, other_prompts = prompts_of_step(settings, step)
    seed = SEED + 4 * step
    u = stored(folder / "u.jsonl", lambda: with_unequal_rewards(policy, settings, step, prompts))
    e = stored(folder / "e.jsonl", lambda: sampled_evaluation(policy, settings, e_prompts, 1, seed + 1))
    others = stored(folder / "others.jsonl", lambda: sampled_evaluation(policy, settings, other_prompts, 2, seed + 2))
    apply, live = fx.make_functional(policy.end)
    params, batch = {name: p.detach() for name, p in live.items()}, policy.collate(u)
    values = all_token_values(params, batch, apply)
    difference = check_on_policy(u, values.logprobs, batch, ON_POLICY_TOLERANCE)
    return PretrainedState(
        params,
        apply,
        fx.adamw_state(policy.optimizer, policy.end),
        ScoredRollouts(u, batch, values, difference),
        update_batch(u, policy.tokenizer.pad_token_id, settings.tokens),
        policy.collate(e),
        policy.collate(others),
        joined(e, others),
    )


def stored(file: Path, make: Callable[[], Sequence[Rollout]]) -> list[Rollout]:
    """Return the rollouts of a file, which is made at the first call."""
    if not file.exists():
        write_rollouts(file, make())
    return read_native_rollouts(file)


def with_unequal_rewards(policy: Policy, settings: Settings, step: int, count: int) -> list[Rollout]:
    """Return rollouts of the first training prompts, in an order of the step's, whose rewards are not all equal.

    A prompt of equal rewards has no loss, and its rollouts no effect.

    Raises:
        ValueError: where the training prompts have fewer.
    """
    order = random.Random(step).sample(list(settings.train), len(settings.train))
    rollouts: list[Rollout] = []
    for k, begin in enumerate(range(0, len(order), count)):
        block, _ = sampled_update(policy, settings, order[begin : begin + count], SEED + 1000 * step + k)
        moving = {r.group for r in block if r.advantage}
        rollouts += [dataclasses.replace(r, group=begin + r.group) for r in block if r.group in moving]
        if len(rollouts) >= count * COMPLETIONS:
            return rollouts[: count * COMPLETIONS]
    raise ValueError(
        f"prompts with unequal rewards are {len(rollouts) // COMPLETIONS} of {len(order)}; expected {count}. "
        "Give settings more training prompts, or measure an earlier state"
    )


def store_predictions(state: PretrainedState, step: Step, halves: int, file: Path) -> None:
    """Store each predictor's estimate of the entropy that every rollout adds; those that are stored are not made again.

    Args:
        state: has the rollouts.
        step: the step that is redone.
        halves: number of random halves, which is stored beside them.
        file: of the estimates.
    """
    made: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if "predictions" not in made:
        by_name = predictions(step, state.fresh, PREDICTED_BY)
        made["halves"] = halves
        made["entropy"] = float(state.u.values.entropies[state.u.batch.completion_mask].mean())
        made["predictions"] = {name: x.tolist() for name, x in by_name.items()}
        write_json(file, made)
    missing = [(kind, name) for kind, names in ESTIMATORS.items() for name in names if name not in made.get(kind, {})]
    for k, (kind, name) in enumerate(missing):
        made.setdefault(kind, {})[name] = influences(state, kind, OBJECTIVES[name])
        write_json(file, made)
        progress("influences", k + 1, len(missing))


def predictors_of(made: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the estimates (n,) by predictor from the stored ones, with the mixtures of two of them."""
    by_objective = {
        predictor + ENDINGS[name]: estimate.per_sequence
        for kind, predictor in ((FRESH, "share"), (CROSS_FITTED, "cross-fitted"))
        for name, estimate in estimates(made[kind]).items()
    }
    doubles = {name: torch.tensor(x, dtype=torch.float64) for name, x in made["predictions"].items()}
    return {**doubles, **by_objective}
