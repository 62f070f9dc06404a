"""Do influences over several steps predict the entropy at their end? Windows replayed without each rollout.

    python -m benchmarks several_steps            writes results/several_steps.json and its tables in README.md;
                                                  an hour on one core, resumed where it stopped
    python -m benchmarks several_steps --quick    one short window, written nowhere, to check that it works

Windows of sixteen steps of GRPO runs are recorded, and made again by ``torch.optim.AdamW`` with the same batches:
without each of some rollouts of the first step, and as they were. The entropy after 1, 2, 4, 8 and 16 steps is measured
exactly where all completions can be enumerated ("toy"), else by importance sampling on fresh rollouts of the policy
there, which no predictor has used: the same for the window with and without a rollout. Predictors are ranked by the
effect of leaving a rollout out; and the change of entropy over the window is compared with sums over its steps and with
the window's account.
"""

from __future__ import annotations

import copy
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fx_influence as fx
from benchmarks.evidence.arithmetic import reinforce
from benchmarks.evidence.bench_counterfactual import (
    MAX_NORM,
    Step,
    ceiling,
    entropy_of_all,
    exact_change,
    predictions,
    rank_correlation,
    sampled_change,
    stderr_of_mean,
)
from benchmarks.evidence.replayed_windows import (
    WINDOW_OPTIONS,
    recorded_window,
    replayed,
    share_at_end,
    without_row,
)
from benchmarks.evidence.several_steps_tables import WORKS, appendix, markdown, summary
from benchmarks.evidence.training_runs import Benchmark, Policy, all_completions, initial_policy, step_states
from fx_influence.autodiff.rollout_gradients import rollout_gradients
from fx_influence.interop.rollouts.batch import collate
from fx_influence.types import AdamWState, Batch, Params

NAME = "bench_several_steps"
COMPLETIONS = 4
SEEDS = 3


class TrainingRun(NamedTuple):
    """A GRPO run with a window of ``lengths[-1]`` steps from each step of ``starts`` on, numbered from 1.

    ``evaluated`` rollouts predict and ``measured`` others measure, at each length; ``left_out`` is the number of
    rollouts of the first step that are left out, one by one, of those with an advantage; ``timed`` names ``WORKS``.
    """

    policy: str
    lr: float
    seed: int
    starts: tuple[int, ...] = (10,)
    lengths: tuple[int, ...] = (1, 2, 4, 8, 16)
    prompts: int = 8
    evaluated: int = 512
    measured: int = 512
    left_out: int = 12
    timed: tuple[str, ...] = ()
    is_stored: bool = True

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.lr:g}-{self.seed}"


class Recorded(NamedTuple):
    """A window of a training run.

    ``model`` and ``optimizer`` before it; ``batches`` and ``advantages`` of its steps; by number of steps made, ``e``
    to predict on, and at the start and each length ``fresh`` to measure on; ``seconds`` of processor time of sampling
    and steps; ``rng`` of choices.
    """

    policy: Policy
    model: torch.nn.Module
    optimizer: torch.optim.AdamW
    batches: list[Batch]
    advantages: list[Tensor]
    e: list[Batch]
    fresh: dict[int, Batch]
    seconds: float
    rng: random.Random


def train(training: TrainingRun) -> list[dict[str, Any]]:
    """Make the run and return the measurements of its windows."""
    policy = initial_policy(training.policy, training.is_stored)
    length, windows = training.lengths[-1], []
    steps = step_states(
        policy, training.lr, training.seed, training.starts[-1] + length - 1, training.prompts, COMPLETIONS
    )
    for step_state in steps:
        if step_state.step in training.starts:
            recorded = record(training, policy, step_state, steps)
            if recorded.advantages[0].any():
                windows.append({"start": step_state.step, **measure(training, recorded)})
        else:
            reinforce(policy.model, step_state.optimizer, step_state.batch)
    return windows


def record(training: TrainingRun, policy: Policy, first: Any, later: Any) -> Recorded:
    """Make the steps of a window and return it.

    Args:
        training: the run.
        policy: the policy before the first step.
        first: state of the run before that step.
        later: iterator over the states that follow, which is advanced to the window's last step.
    """
    model, optimizer = copy.deepcopy((policy.model, first.optimizer))
    if training.policy == "toy":
        # Exact entropies are differences of sums, whose rounding must be far below an effect.
        in_float64(model, optimizer)
    rng = random.Random(first.rng.randrange(2**30))
    e: list[Batch] = []
    fresh: dict[int, Batch] = {}
    batches, advantages, seconds, state = [], [], 0.0, first
    length = training.lengths[-1]

    def evaluations(k: int) -> None:
        is_measured = k in (0, *training.lengths)
        e.append(evaluation(policy, training.evaluated if is_measured else training.evaluated // 2, rng))
        if is_measured and training.policy != "toy":
            fresh[k] = evaluation(policy, training.measured, rng)

    for k in range(length):
        evaluations(k)
        begin = time.process_time()
        state = state if k == 0 else next(later)
        reinforce(policy.model, state.optimizer, state.batch)
        # The first step's rollouts were sampled before.
        seconds += time.process_time() - begin if k else 0.0
        batches.append(state.batch)
        advantages.append(torch.tensor([r.advantage or 0.0 for r in state.rollouts]).double())
    evaluations(length)
    return Recorded(policy, model, optimizer, batches, advantages, e, fresh, seconds * length / (length - 1), rng)


def evaluation(policy: Policy, rollouts: int, rng: random.Random) -> Batch:
    """Return rollouts of the policy on its held-out prompts, as many of each."""
    count = min(rollouts, len(policy.held_out))
    return policy.evaluation(count, rollouts // count, rng.randrange(2**30))


def in_float64(model: torch.nn.Module, optimizer: torch.optim.AdamW) -> None:
    """Raise a model and its optimizer's moments to float64, in place."""
    model.double()
    for state in optimizer.state.values():
        state.update({name: x.double() for name, x in state.items() if name != "step"})


def measure(training: TrainingRun, recorded: Recorded) -> dict[str, Any]:
    """Return rank correlations by length of the window, changes of entropy over it, and seconds."""
    apply, params = fx.make_functional(recorded.model)
    state, first = fx.adamw_state(recorded.optimizer, recorded.model), recorded.batches[0]
    before, later = (recorded.model, recorded.optimizer), recorded.batches[1:]
    made = [params, *replayed(*before, recorded.batches, range(1, training.lengths[-1] + 1))]
    movers = recorded.advantages[0].nonzero().flatten().tolist()
    chosen = recorded.rng.sample(movers, min(training.left_out, len(movers)))
    without = [replayed(*before, [without_row(first, row), *later], training.lengths) for row in chosen]
    gradients = rollout_gradients(params, first, apply)
    step = Step(params, apply, state, first, recorded.advantages[0], gradients)
    one_step = predictions(step, recorded.e[0], ("share", "share, clip", "marginal"))
    accounts = step_accounts(training, recorded, made, apply, state)
    rows = []
    for moved, length in zip(zip(*without, strict=True), training.lengths, strict=True):
        window = recorded_window(recorded.batches[:length], training.lr, params, state)
        measuring, objective = measured_by(recorded, length)
        influences = partial(fx.influence_over_steps, window, apply=apply)
        over = {name: influences(recorded.e[length], **WINDOW_OPTIONS[name]) for name in ("window", "window, frozen")}
        for name in ("window, same E", "window, no curvature, same E"):
            over[name] = influences(measuring, objective=objective, **WINDOW_OPTIONS[name])
        effects = effects_of(training, recorded, made[length], moved, apply, length)
        if length == training.lengths[0]:
            one_step["first length"] = over["window"].per_sequence[0]
        one_step["share, same E"] = share_at_end(step, made[length], measuring, objective)
        predicted = {name: out.per_sequence[0] for name, out in over.items()} | one_step
        ranks = {name: rank_correlation(x[chosen], effects.mean(1)) for name, x in predicted.items()}
        delta, frozen = over["window, same E"].per_sequence[0][chosen], over["window, frozen"]
        rows.append(
            {
                "length": length,
                "effect": float(effects.mean(1).square().mean().sqrt()),
                "effect_stderr": stderr_of_mean(effects),
                "ranks": {**ranks, "ceiling": ceiling(effects)},
                "slope": float((effects.mean(1) @ delta) / delta.square().sum()),
                **measured_change(training, recorded, params, made[length], apply, length),
                **{name: sum(account[name] for account in accounts[:length]) for name in accounts[0]},
                "window_total": float(frozen.total),
                "window_momentum": float(frozen.momentum),
                "window_rollouts": float(torch.cat(frozen.per_sequence).sum()),
            }
        )
    return {"lengths": rows, "seconds": seconds(training, recorded, params, state, apply) if training.timed else {}}


def effects_of(
    training: TrainingRun,
    recorded: Recorded,
    end: Params,
    moved: Sequence[Params],
    apply: fx.Policy,
    length: int,
) -> Tensor:
    """Return the entropy that each rollout adds after the window, (n, pairs), whose mean over pairs of rollouts it is.

    Args:
        training: the run.
        recorded: the window.
        end: parameters after it.
        moved: parameters after it without each rollout.
        apply: the policy.
        length: its number of steps.
    """
    change = (
        exact_change(recorded.policy, end, apply)
        if training.policy == "toy"
        else sampled_change(end, recorded.fresh[length], apply)
    )
    block = {name: torch.stack([x[name] for x in moved]) - p for name, p in end.items()}
    return torch.cat(
        [-change({name: x[rows] for name, x in block.items()}) for rows in torch.arange(len(moved)).split(8)]
    )


def measured_by(recorded: Recorded, length: int) -> tuple[Batch, fx.Entropy | fx.Objective]:
    """Return the E that measures after a number of steps, and the entropy that it measures."""
    if recorded.fresh:
        return recorded.fresh[length], fx.Entropy()
    return collate(all_completions(recorded.policy), recorded.policy.tokenizer.pad_token_id), entropy_of_all


def measured_change(
    training: TrainingRun, recorded: Recorded, before: Params, after: Params, apply: fx.Policy, length: int
) -> dict[str, float]:
    """Return the change of entropy over a window: exactly, or the mean of what fresh rollouts of either end say."""
    movement = {name: after[name] - before[name] for name in before}
    if training.policy == "toy":
        change = exact_change(recorded.policy, before, apply)({name: x.unsqueeze(0) for name, x in movement.items()})
        return {"realised": float(change), "realised_stderr": 0.0}
    forth = fx.snis_delta(before, movement, 1.0, recorded.fresh[0], apply=apply)
    back = fx.snis_delta(after, movement, -1.0, recorded.fresh[length], apply=apply)
    return {
        "realised": float(forth.delta_h - back.delta_h) / 2,
        "realised_stderr": math.hypot(float(forth.stderr), float(back.stderr)) / 2,
        "realised_ess": min(float(out.ess) / len(out.contributions) for out in (forth, back)),
    }


def step_accounts(
    training: TrainingRun, recorded: Recorded, made: Sequence[Params], apply: fx.Policy, state: AdamWState
) -> list[dict[str, float]]:
    """Return for each step its predicted change of entropy: from before it, by cause, and from both of its ends."""
    model, optimizer = copy.deepcopy((recorded.model, recorded.optimizer))
    accounts = []
    for k, batch in enumerate(recorded.batches):
        e, movement = recorded.e[k], {name: made[k + 1][name] - p for name, p in made[k].items()}
        out = fx.influence(made[k], batch, e, state, apply=apply, max_grad_norm=MAX_NORM, stderr=False, per_token=False)
        after = fx.jvp_delta(made[k + 1], movement, recorded.e[k + 1], apply=apply, second_order=False).first
        steps = {name: training.lr * float(x) for name, x in (("total", out.total), ("momentum", out.momentum))}
        rollouts = training.lr * float(out.per_sequence.sum())
        accounts.append(
            {
                "steps_total": steps["total"],
                "steps_momentum": steps["momentum"],
                "steps_rollouts": rollouts,
                "both_ends": (steps["total"] + float(after)) / 2,
            }
        )
        reinforce(model, optimizer, batch)
        state = fx.adamw_state(optimizer, model)
    return accounts


def seconds(
    training: TrainingRun, recorded: Recorded, params: Params, state: AdamWState, apply: fx.Policy
) -> dict[str, float]:
    """Return seconds of processor time of training over the longest window, and of attributions by what is wanted."""
    window = recorded_window(recorded.batches, training.lr, params, state)
    works: Mapping[str, Callable[[], object]] = {
        "influences": lambda: fx.influence_over_steps(window, recorded.e[-1], apply=apply),
        "error bars": lambda: fx.influence_over_steps(window, recorded.e[-1], apply=apply, stderr=True),
        "last step's rollouts": lambda: fx.influence_over_steps(window, None, apply=apply),
        "no curvature": lambda: fx.influence_over_steps(window, recorded.e[-1], apply=apply, curvature=False),
    }
    times = {"training": recorded.seconds}
    for name in training.timed:
        begin = time.process_time()
        works[name]()
        times[name] = time.process_time() - begin
    return times


def training_runs(quick: bool) -> list[TrainingRun]:
    """Return the training runs of the benchmark."""
    if quick:
        sizes: dict[str, Any] = {"prompts": 4, "evaluated": 16, "measured": 16, "left_out": 6}
        return [TrainingRun("demo", 1e-4, 0, starts=(2,), lengths=(1, 2), timed=WORKS, **sizes)]
    runs = []
    for seed in range(SEEDS):
        for policy in ("demo", "early", "toy"):
            for lr in (1e-4, 1e-5):
                run = TrainingRun(policy, lr, seed, timed=WORKS if (policy, lr, seed) == ("demo", 1e-4, 1) else ())
                if seed:
                    # Sixteen steps and twice the rollouts to predict on take twice the time.
                    run = run._replace(lengths=(1, 2, 4, 8), evaluated=256)
                runs.append(run)
    return runs + [TrainingRun("large", lr, 0, evaluated=256, left_out=8) for lr in (1e-4, 1e-5)]


BENCHMARK = Benchmark(NAME, __doc__, training_runs, train, summary, markdown, appendix)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
