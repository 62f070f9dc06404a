"""Record a window of steps from a training state: its steps, and rollouts of the policy before it and on its way."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fx_influence as fx
from benchmarks.evidence.arithmetic import reinforce
from benchmarks.evidence.replayed_windows import trainable
from benchmarks.real.bench_main_command import processor_seconds
from benchmarks.real.bench_real_counterfactual import ROLLOUTS, progress
from fx_influence.batching.rows import select_rows
from fx_influence.interop.checkpoints.optimizer_state import restore_optimizer
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.lab.inputs.rollouts import ScoredRollouts, load_rollouts, load_state
from fx_influence.lab.inputs.update import update_batch
from fx_influence.lab.plan import EntropyInfluencePlan, demo_path
from fx_influence.lab.store import RunDirectory
from fx_influence.types import AdamWState, Batch, Params, TokenValues


class Recorded(NamedTuple):
    """The steps of a window, and rollouts that predict and measure.

    ``model`` and ``optimizer`` before it, with ``params`` and ``state`` for the policy ``apply``; ``batches`` of its
    steps, ``advantages`` of the first; ``first_e`` of the policy before it; by number of steps made, ``e`` of the
    policy there, its parameters in ``ends``, and the processor ``seconds`` of the steps, without sampling.
    """

    model: Any
    optimizer: torch.optim.AdamW
    params: Params
    state: AdamWState
    apply: fx.Policy
    batches: list[Batch]
    advantages: Tensor
    first_e: Batch
    e: dict[int, Batch]
    ends: dict[int, Params]
    seconds: dict[int, float]


class Setting(NamedTuple):
    """A window to measure: the plan of U, which its steps share, of E before them and of E after them, and the steps.

    ``weights`` are those that are trained, "lora" or "full". ``before`` and ``folder`` are the folders of the rollouts
    of U and of E before the window, and of those after it and of all figures; what they have is not made again.
    ``lengths`` are the numbers of steps after which the entropy is measured, the last that of the window.
    ``left_out`` is the number of rollouts of the first step that are left out, of those with an advantage.
    """

    plan: EntropyInfluencePlan
    weights: str
    before: Path
    folder: Path
    lr: float
    lengths: Sequence[int]
    left_out: int

    def after(self, length: int) -> Path:
        """Return the folder of what is made after a number of steps."""
        return self.folder / f"after_{length}"


def record(setting: Setting) -> Recorded:
    """Make the steps of a window and return it."""
    plan = setting.plan
    loaded = load_state(plan)
    saved = torch.load(Path(demo_path(plan.checkpoint)) / "optimizer.pt", map_location="cpu", weights_only=True)
    before = loaded.model, restore_optimizer(saved, loaded.model)
    for group in before[1].param_groups:
        group["lr"] = setting.lr
    directory = RunDirectory(setting.before)
    u, first_e = (load_rollouts(plan, loaded, directory, k, ROLLOUTS[k], progress) for k in range(2))
    updates = [rows_of(u, rows) for rows in rows_by_step(u.rollouts, setting.lengths[-1])]
    batches = [update_batch(plan, update) for update in updates]
    advantages = torch.tensor([r.advantage or 0.0 for r in updates[0].rollouts])
    model, optimizer = copy.deepcopy(before)
    e, ends, seconds, passed = {}, {}, {}, 0.0
    for k, batch in enumerate(batches, 1):
        passed += processor_seconds(partial(reinforce, model, optimizer, batch))
        if k in setting.lengths:
            apply, params = fx.make_functional(model)
            moved = loaded._replace(model=model, apply=apply, params=params)
            e[k] = load_rollouts(plan, moved, RunDirectory(setting.after(k)), 2, ROLLOUTS[2], progress).batch
            ends[k], seconds[k] = trainable(model), passed
    apply, params = fx.make_functional(before[0])
    state = fx.adamw_state(before[1], before[0], copy=False)
    return Recorded(*before, params, state, apply, batches, advantages, first_e.batch, e, ends, seconds)


def rows_by_step(rollouts: Sequence[Rollout], steps: int) -> list[list[int]]:
    """Return the rows of each step: the groups are dealt to the steps, those with an advantage first."""
    groups: dict[Any, list[int]] = {}
    for row, rollout in enumerate(rollouts):
        groups.setdefault(rollout.group, []).append(row)
    by_advantage = sorted(groups.values(), key=lambda rows: not any(rollouts[row].advantage for row in rows))
    return [[row for rows in by_advantage[k::steps] for row in rows] for k in range(steps)]


def rows_of(u: ScoredRollouts, rows: Sequence[int]) -> ScoredRollouts:
    """Return some rows of scored rollouts."""
    index = torch.tensor(rows)
    values = TokenValues(*(x[index] for x in u.values))
    return u._replace(rollouts=[u.rollouts[row] for row in rows], batch=select_rows(u.batch, index), values=values)
