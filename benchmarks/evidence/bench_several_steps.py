"""Do influences over several steps predict the entropy at their end? Windows replayed without each rollout.

    python -m benchmarks several_steps            writes results/several_steps.json and its tables in README.md;
                                                  half an hour on one core, resumed where it stopped
    python -m benchmarks several_steps --quick    one short window, written nowhere, to check that it works

Windows of eight steps of GRPO runs are recorded, and made again by ``torch.optim.AdamW`` with the same batches: without
each of some rollouts of the first step, and as they were. The entropy after 1, 2, 4 and 8 steps is measured
exactly where all completions can be enumerated ("toy"), else by importance sampling on fresh rollouts of the policy
there, which no predictor has used. Predictors are ranked by the effect of leaving a rollout out; and the change of
entropy over the window is compared with sums over its steps and with the window's account.
"""

from __future__ import annotations

import copy
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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
)
from benchmarks.evidence.several_steps_tables import markdown, summary
from benchmarks.evidence.training_runs import Benchmark, Policy, all_completions, initial_policy, step_states
from fx_influence.autodiff.rollout_gradients import rollout_gradients
from fx_influence.interop.rollouts.batch import collate
from fx_influence.types import AdamWState, Batch, Params

NAME = "bench_several_steps"
COMPLETIONS = 4
SEEDS = 5
WINDOW_OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"clip": "differentiated"},
    "window, no curvature": {"clip": "differentiated", "curvature": False},
    "window, clip frozen": {},
    "window, frozen": {"preconditioner": "frozen"},
}
"""Options of ``influence_over_steps`` by the names of their predictors."""


class TrainingRun(NamedTuple):
    """A GRPO run with a window of ``lengths[-1]`` steps from each step of ``starts`` on, numbered from 1.

    ``left_out`` is the number of rollouts of the first step that are left out, one by one, of those with an advantage.
    """

    policy: str
    lr: float
    seed: int
    starts: tuple[int, ...] = (10,)
    lengths: tuple[int, ...] = (1, 2, 4, 8)
    prompts: int = 8
    evaluated: int = 256
    left_out: int = 16
    is_stored: bool = True

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.lr:g}-{self.seed}"


class Recorded(NamedTuple):
    """A window of a training run.

    ``model`` and ``optimizer`` before it; ``batches`` and ``advantages`` of its steps; by number of steps made, ``e``
    to predict and ``fresh`` to measure on; ``seconds`` of processor time of sampling and steps; ``rng`` of choices.
    """

    policy: Policy
    model: torch.nn.Module
    optimizer: torch.optim.AdamW
    batches: list[Batch]
    advantages: list[Tensor]
    e: list[Batch]
    fresh: list[Batch]
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
    e: list[Batch] = []
    fresh: list[Batch] = []
    batches, advantages, seconds = [], [], 0.0
    rng = random.Random(first.rng.randrange(2**30))
    count = min(training.evaluated // 2, len(policy.held_out))

    def evaluations() -> None:
        for batches_of in (e, fresh):
            batches_of.append(policy.evaluation(count, training.evaluated // count, rng.randrange(2**30)))

    state = first
    for k in range(training.lengths[-1]):
        evaluations()
        begin = time.process_time()
        state = state if k == 0 else next(later)
        reinforce(policy.model, state.optimizer, state.batch)
        # The first step's rollouts were sampled before.
        seconds += time.process_time() - begin if k else 0.0
        batches.append(state.batch)
        advantages.append(torch.tensor([r.advantage or 0.0 for r in state.rollouts]).double())
    evaluations()
    length = training.lengths[-1]
    return Recorded(policy, model, optimizer, batches, advantages, e, fresh, seconds * length / (length - 1), rng)


def in_float64(model: torch.nn.Module, optimizer: torch.optim.AdamW) -> None:
    """Raise a model and its optimizer's moments to float64, in place."""
    model.double()
    for state in optimizer.state.values():
        state.update({name: x.double() for name, x in state.items() if name != "step"})


def replayed(recorded: Recorded, first: Batch, lengths: Sequence[int]) -> list[Params]:
    """Return the parameters after each number of steps of the window, with another batch in its first step."""
    model, optimizer = copy.deepcopy((recorded.model, recorded.optimizer))
    after = []
    for k, batch in enumerate([first, *recorded.batches[1 : lengths[-1]]]):
        reinforce(model, optimizer, batch)
        if k + 1 in lengths:
            after.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return after


def measure(training: TrainingRun, recorded: Recorded) -> dict[str, Any]:
    """Return rank correlations by length of the window, changes of entropy over it, and seconds."""
    apply, params = fx.make_functional(recorded.model)
    state, first = fx.adamw_state(recorded.optimizer, recorded.model), recorded.batches[0]
    made = [params, *replayed(recorded, first, range(1, training.lengths[-1] + 1))]
    movers = recorded.advantages[0].nonzero().flatten().tolist()
    chosen = recorded.rng.sample(movers, min(training.left_out, len(movers)))
    without = [replayed(recorded, without_row(first, row), training.lengths) for row in chosen]
    one_step = one_step_predictions(recorded, params, state, apply)
    accounts = step_accounts(training, recorded, made, apply, state)
    rows = []
    for moved, length in zip(zip(*without, strict=True), training.lengths, strict=True):
        window = recorded_window(training, recorded, params, state, length)
        over = {
            name: fx.influence_over_steps(window, recorded.e[length], apply=apply, **options)
            for name, options in WINDOW_OPTIONS.items()
        }
        effects = effects_of(training, recorded, made[length], moved, apply, length)
        if training.policy == "toy":
            every = collate(all_completions(recorded.policy), recorded.policy.tokenizer.pad_token_id)
            options = WINDOW_OPTIONS["window"] | {"objective": entropy_of_all}
            over["window, exact"] = fx.influence_over_steps(window, every, apply=apply, **options)
        if length == training.lengths[0]:
            one_step["first length"] = over["window"].per_sequence[0]
        predicted = {name: out.per_sequence[0] for name, out in over.items()} | one_step
        ranks = {name: rank_correlation(x[chosen], effects.mean(1)) for name, x in predicted.items()}
        delta, frozen = over["window"].per_sequence[0][chosen], over["window, frozen"]
        rows.append(
            {
                "length": length,
                "effect": float(effects.mean(1).square().mean().sqrt()),
                "ranks": {**ranks, "ceiling": ceiling(effects)},
                "slope": float((effects.mean(1) @ delta) / delta.square().sum()),
                **measured_change(training, recorded, params, made[length], apply),
                **{name: sum(account[name] for account in accounts[:length]) for name in accounts[0]},
                "window_total": float(frozen.total),
                "window_momentum": float(frozen.momentum),
                "window_rollouts": float(torch.cat(frozen.per_sequence).sum()),
            }
        )
    is_timed = training.seed == 0
    return {"lengths": rows, "seconds": seconds(training, recorded, params, state, apply) if is_timed else {}}


def effects_of(
    training: TrainingRun,
    recorded: Recorded,
    end: Params,
    moved: Sequence[Params],
    apply: fx.Policy,
    length: int,
) -> Tensor:
    """Return the entropy that each rollout adds after the window, (n, prompts), whose mean over prompts it is.

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


def one_step_predictions(recorded: Recorded, params: Params, state: AdamWState, apply: fx.Policy) -> dict[str, Tensor]:
    """Return what one step's measures say of the rollouts of the first step, (n,) by predictor."""
    first, e = recorded.batches[0], recorded.e[0]
    options: dict[str, Any] = {"apply": apply, "max_grad_norm": MAX_NORM, "stderr": False, "preconditioner": "lifetime"}
    lifetime = fx.influence(params, first, e, state, **options).per_sequence
    gradients = rollout_gradients(params, first, apply)
    step = Step(params, apply, state, first, recorded.advantages[0], gradients)
    return {"lifetime": lifetime, **predictions(step, e)}


def without_row(batch: Batch, row: int) -> Batch:
    """Return the batch with one rollout's coefficients at 0, which leaves its loss out."""
    assert batch.coefficients is not None
    return batch._replace(coefficients=batch.coefficients.index_fill(0, torch.tensor([row]), 0.0))


def recorded_window(
    training: TrainingRun, recorded: Recorded, params: Params, state: AdamWState, length: int
) -> fx.Window:
    """Return the first steps of the window; their coefficients are the same whatever the policy."""
    batches = recorded.batches[:length]
    steps = [fx.RecordedStep(batch=batch, lr=training.lr, max_grad_norm=MAX_NORM) for batch in batches]
    return fx.Window(params=params, opt_state=state, steps=steps)


def measured_change(
    training: TrainingRun, recorded: Recorded, before: Params, after: Params, apply: fx.Policy
) -> dict[str, float]:
    """Return the change of entropy from one policy to the other, on fresh rollouts of the first or exactly."""
    movement = {name: after[name] - before[name] for name in before}
    if training.policy == "toy":
        change = exact_change(recorded.policy, before, apply)({name: x.unsqueeze(0) for name, x in movement.items()})
        return {"realised": float(change), "realised_stderr": 0.0}
    out = fx.snis_delta(before, movement, 1.0, recorded.fresh[0], apply=apply)
    return {"realised": float(out.delta_h), "realised_stderr": float(out.stderr)}


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
    window = recorded_window(training, recorded, params, state, training.lengths[-1])
    works: Mapping[str, Callable[[], object]] = {
        "influences": lambda: fx.influence_over_steps(window, recorded.e[-1], apply=apply),
        "error bars": lambda: fx.influence_over_steps(window, recorded.e[-1], apply=apply, stderr=True),
        "last step's rollouts": lambda: fx.influence_over_steps(window, None, apply=apply),
        "no curvature": lambda: fx.influence_over_steps(window, recorded.e[-1], apply=apply, curvature=False),
    }
    times = {"training": recorded.seconds}
    for name, work in works.items():
        begin = time.process_time()
        work()
        times[name] = time.process_time() - begin
    return times


def training_runs(quick: bool) -> list[TrainingRun]:
    """Return the training runs of the benchmark."""
    if quick:
        return [TrainingRun("demo", 1e-4, 0, starts=(2,), lengths=(1, 2), prompts=4, evaluated=16, left_out=6)]
    return [TrainingRun(policy, lr, seed) for seed in range(SEEDS) for policy in ("demo", "toy") for lr in (1e-5, 1e-4)]


BENCHMARK = Benchmark(NAME, __doc__, training_runs, train, summary, markdown)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
