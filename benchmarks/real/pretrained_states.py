"""Eight training states of a pretrained chat model, each with a step's rollouts, a fresh E and other rollouts.

The states are of one GRPO run on tasks of reasoning-gym with LoRA; their rollouts are sampled once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import fx_influence as fx
from benchmarks.evidence.bench_counterfactual import MAX_NORM
from benchmarks.real.__main__ import prepare_policies
from benchmarks.real.bench_real_counterfactual import COMPLETIONS, PROMPTS, ROLLOUTS, batch, progress, real_plan
from benchmarks.real.language_model import FOLDER, prepare_model
from fx_influence.lab.inputs.rollouts import ScoredRollouts, load_rollouts, load_state
from fx_influence.lab.inputs.update import update_batch
from fx_influence.lab.plan import EntropyInfluencePlan
from fx_influence.lab.store import RunDirectory
from fx_influence.types import AdamWState, Batch, Params

STEPS = tuple(range(3, 27, 3))
"""Optimizer steps before the states."""
TASKS = 64
MODEL = "SmolLM2-135M, LoRA"


class PretrainedState(NamedTuple):
    """A training state before a step on ``update``, with two E of the same policy."""

    params: Params
    apply: fx.Policy
    opt_state: AdamWState
    u: ScoredRollouts
    """32 rollouts, 8 prompts x 4."""
    update: Batch
    """Their batch with the coefficients of the loss."""
    fresh: Batch
    """32 rollouts of 8 other prompts."""
    others: Batch
    """112 rollouts of 56 further prompts, two of each."""

    def influence(self, evaluation: Batch | None, **options: Any) -> fx.Influence:
        """Return ``fx.influence`` of the step on an E, None for cross-fitting, as the trainer clips."""
        options = {"apply": self.apply, "max_grad_norm": MAX_NORM, **options}
        return fx.influence(self.params, self.update, evaluation, self.opt_state, **options)


def load_pretrained_state(plan: EntropyInfluencePlan, folder: Path) -> PretrainedState:
    """Return a state with its rollouts; those that ``folder`` has are not sampled again."""
    folder.mkdir(parents=True, exist_ok=True)
    state, directory = load_state(plan), RunDirectory(folder)
    u, e, others = (load_rollouts(plan, state, directory, k, name, progress) for k, name in enumerate(ROLLOUTS))
    update = update_batch(plan, u)
    return PretrainedState(state.params, state.apply, state.opt_state, u, update, e.batch, others.batch)


def pretrained_plans() -> dict[int, tuple[EntropyInfluencePlan, Path]]:
    """Return the plan of each state and the folder of its rollouts, by the number of optimizer steps before it."""
    base = prepare_model()
    evaluations = (batch("eval", 0, PROMPTS, COMPLETIONS), batch("eval", PROMPTS, TASKS - PROMPTS, 2))
    policies = prepare_policies(FOLDER, base, STEPS)
    return {
        steps: (real_plan(policy, base, *evaluations), FOLDER / f"cross_fitting_{steps}")
        for steps, policy in zip(STEPS, policies, strict=True)
    }
