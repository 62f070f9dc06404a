"""Do influences over several steps predict the entropy at their end? Windows replayed without each rollout.

    python -m benchmarks several_steps            writes results/several_steps.json and its tables in README.md;
                                                  half an hour on one core, resumed where it stopped
    python -m benchmarks several_steps --quick    one short window, written nowhere, to check that it works

Windows of eight steps of GRPO runs are recorded, and made again by ``torch.optim.AdamW`` in float64, with the same
batches: without each rollout of the first step, and as they were. The entropy after 1, 2, 4 and 8 steps is measured
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
    ceiling,
    exact_change,
    predictions,
    rank_correlation,
    sampled_change,
)
from benchmarks.evidence.several_steps_tables import markdown, summary
from benchmarks.evidence.training_runs import Benchmark, Policy, initial_policy, step_states
from fx_influence.autodiff.rollout_gradients import rollout_gradients
from fx_influence.types import AdamWState, Batch, Params

NAME = "bench_several_steps"
COMPLETIONS = 4
WINDOW_OPTIONS: dict[str, dict[str, Any]] = {
    "window": {},
    "window, frozen": {"preconditioner": "frozen"},
    "window, no curvature": {"curvature": False},
}
"""Options of ``influence_over_steps`` by the names of their predictors."""


class TrainingRun(NamedTuple):
    """A GRPO run with a window of ``lengths[-1]`` steps from each step of ``starts`` on, numbered from 1."""

    policy: str
    lr: float
    seed: int
    starts: tuple[int, ...] = (10, 30)
    lengths: tuple[int, ...] = (1, 2, 4, 8)
    prompts: int = 8
    evaluated: int = 512
    is_stored: bool = True

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.lr:g}-{self.seed}"


class Recorded(NamedTuple):
    """A window of a training run.

    ``model`` and ``optimizer`` before it, in float64; ``batches`` and ``advantages`` of its steps; by number of steps
    made, ``e`` to predict and ``fresh`` to measure on; ``seconds`` of processor time of its sampling and steps.
    """

    policy: Policy
    model: torch.nn.Module
    optimizer: torch.optim.AdamW
    batches: list[Batch]
    advantages: list[Tensor]
    e: list[Batch]
    fresh: list[Batch]
    seconds: float


def train(training: TrainingRun) -> list[dict[str, Any]]:
    """Make the run and return the measurements of its windows."""
    policy = initial_policy(training.policy, training.is_stored)
    length, found = training.lengths[-1], []
    steps = step_states(
        policy, training.lr, training.seed, training.starts[-1] + length - 1, training.prompts, COMPLETIONS
    )
    for step_state in steps:
        if step_state.step in training.starts:
            recorded = record(training, policy, step_state, steps)
            if recorded.batches[0].coefficients is not None and recorded.batches[0].coefficients.any():
                found.append({"start": step_state.step, **measure(training, recorded)})
        else:
            reinforce(policy.model, step_state.optimizer, step_state.batch)
    return found


def record(training: TrainingRun, policy: Policy, first: Any, later: Any) -> Recorded:
    """Make the steps of a window and return it.

    Args:
        training: the run.
        policy: the policy before the first step.
        first: state of the run before that step.
        later: iterator over the states that follow, which is advanced to the window's last step.
    """
    model, optimizer = copy.deepcopy((policy.model, first.optimizer))
    in_float64(model, optimizer)
    e, fresh, batches, advantages, seconds = [], [], [], [], 0.0
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
        batches.append(state.batch._replace(coefficients=state.batch.coefficients.double()))
        advantages.append(torch.tensor([r.advantage or 0.0 for r in state.rollouts]).double())
    evaluations()
    length = training.lengths[-1]
    return Recorded(policy, model, optimizer, batches, advantages, e, fresh, seconds * length / (length - 1))


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
    every_length = range(1, training.lengths[-1] + 1)
    made = [params, *replayed(recorded, first, every_length)]
    present = recorded.advantages[0].nonzero().flatten()
    without = [replayed(recorded, without_row(first, int(row)), training.lengths) for row in present]
    rollout_grads = rollout_gradients(params, first, apply)
    one_step = predictions(params, first, recorded.e[0], state, apply, rollout_grads, recorded.advantages[0])
    one_step["lifetime"] = fx.influence(
        params,
        first,
        recorded.e[0],
        state,
        apply=apply,
        preconditioner="lifetime",
        max_grad_norm=MAX_NORM,
        stderr=False,
    ).per_sequence
    accounts = step_accounts(training, recorded, made, apply, state)
    rows = []
    for index, length in enumerate(training.lengths):
        end = made[length]
        exact = training.policy == "toy"
        change = (
            exact_change(recorded.policy, end, apply) if exact else sampled_change(end, recorded.fresh[length], apply)
        )
        moved = [after[index] for after in without]
        block = {name: torch.stack([x[name] for x in moved]) - p for name, p in end.items()}
        effects = torch.cat(
            [-change({n: x[rows_] for n, x in block.items()}) for rows_ in torch.arange(len(moved)).split(8)]
        )
        window = fx.Window(params=params, opt_state=state, steps=recorded_steps(training, recorded, length))
        over = {
            name: fx.influence_over_steps(window, recorded.e[length], apply=apply, **options)
            for name, options in WINDOW_OPTIONS.items()
        }
        predicted = {name: out.per_sequence[0] for name, out in over.items()} | one_step
        effect = torch.zeros(len(first.input_ids), dtype=torch.float64).index_copy(0, present, effects.mean(1))
        rows.append(
            {
                "length": length,
                "effect": float(effect.square().mean().sqrt()),
                "ranks": {name: rank_correlation(x, effect) for name, x in predicted.items()}
                | {"ceiling": ceiling(effects)},
                "slope": float(
                    (effect @ over["window"].per_sequence[0]) / over["window"].per_sequence[0].square().sum()
                ),
                **measured_change(recorded, params, end, apply, exact),
                **{name: sum(a[name] for a in accounts[:length]) for name in accounts[0]},
                "window_total": float(over["window, frozen"].total),
                "window_momentum": float(over["window, frozen"].momentum),
                "window_rollouts": float(torch.cat(over["window, frozen"].per_sequence).sum()),
            }
        )
    return {"lengths": rows, "seconds": {"training": recorded.seconds, **seconds(window, recorded, apply)}}


def without_row(batch: Batch, row: int) -> Batch:
    """Return the batch with one rollout's coefficients at 0, which leaves its loss out."""
    assert batch.coefficients is not None
    return batch._replace(coefficients=batch.coefficients.index_fill(0, torch.tensor([row]), 0.0))


def recorded_steps(training: TrainingRun, recorded: Recorded, length: int) -> list[fx.RecordedStep]:
    """Return the first steps of the window; its coefficients are the same whatever the policy."""
    return [fx.RecordedStep(batch=b, lr=training.lr, max_grad_norm=MAX_NORM) for b in recorded.batches[:length]]


def measured_change(
    recorded: Recorded, before: Params, after: Params, apply: fx.Policy, exact: bool
) -> dict[str, float]:
    """Return the change of entropy from one policy to the other, on fresh rollouts of the first or exactly."""
    movement = {name: after[name] - before[name] for name in before}
    if exact:
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


def seconds(window: fx.Window, recorded: Recorded, apply: fx.Policy) -> dict[str, float]:
    """Return seconds of processor time of an attribution over the longest window, by what is asked for."""
    works: Mapping[str, Callable[[], object]] = {
        "influences": lambda: fx.influence_over_steps(window, recorded.e[-1], apply=apply),
        "error bars": lambda: fx.influence_over_steps(window, recorded.e[-1], apply=apply, stderr=True),
        "last step's rollouts": lambda: fx.influence_over_steps(window, None, apply=apply),
        "no curvature": lambda: fx.influence_over_steps(window, recorded.e[-1], apply=apply, curvature=False),
    }
    found = {}
    for name, work in works.items():
        begin = time.process_time()
        work()
        found[name] = time.process_time() - begin
    return found


def training_runs(quick: bool) -> list[TrainingRun]:
    """Return the training runs of the benchmark."""
    if quick:
        return [TrainingRun("demo", 1e-4, 0, starts=(2,), lengths=(1, 2), prompts=4, evaluated=16)]
    return [
        *(TrainingRun("demo", lr, seed) for seed in range(5) for lr in (1e-5, 1e-4)),
        *(TrainingRun("toy", lr, seed) for seed in range(5) for lr in (1e-5, 1e-4)),
    ]


BENCHMARK = Benchmark(NAME, __doc__, training_runs, train, summary, markdown)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
