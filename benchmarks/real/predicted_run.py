"""A GRPO training run of a chat model, every step predicted before it and measured after it on three sets of rollouts.

A plain loop of torch: the loss's gradient, ``fx.influence`` on rollouts of held-out prompts, AdamW's step, and
``fx.snis_delta`` on rollouts of the policy before it; or gradient and step alone. A run continues from its last step.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import fx_influence as fx
from benchmarks.evidence.arithmetic import fresh_optimizer, score_tokens, update_batch
from benchmarks.evidence.bench_counterfactual import MAX_NORM, proxies
from benchmarks.evidence.bench_prediction import OTHER, SAME
from benchmarks.harness import write_json
from benchmarks.real.frozen_layers import trainable_end
from benchmarks.real.tasks import KINDS, drawn_tasks, tasks
from benchmarks.real.training_run import LORA
from benchmarks.real.two_sources.training import MODULES
from fx_influence.autodiff.token_values import surrogate
from fx_influence.interop.prompts import Prompt
from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.sampling import sample, sample_rewarded
from fx_influence.types import Batch, Params, TokenValues

E_ITSELF = "E itself"
MEASURED = (E_ITSELF, SAME, OTHER)
"""Rollouts that a step's change is measured on: those that predict it, fresh ones of the same prompts, or of others."""
DRAWN_KINDS = {name: KINDS[name] for name in ("chain_sum", "products", "letter_counting")}
DRAWN_KINDS["products"] = {**KINDS["products"], "max_digits": 2}
"""Kinds of tasks with short questions, as many as a run needs: products of one digit alone are too few."""
PROMPTS, COMPLETIONS = 4, 4
"""Prompts of a step and completions of each."""
TRUSTED_EVERY = 20
"""Steps between measurements of the second derivative."""
SEED = 0
Weights = Literal["lora", "full"]


class Settings(NamedTuple):
    """Settings of a training run.

    Attributes:
        model: directory of the model.
        layers: those that are trained, the last ones.
        lr: learning rate.
        reward: a reward function.
        train: prompts of the steps.
        held_out: prompts of the rollouts that predict and measure, taken in turn.
        steps: number of optimizer steps.
        tokens: length of the longest completion.
        evaluated: prompts of E, and as many others.
        weights: "lora" trains adapters in the layers, "full" the layers themselves.
    """

    model: Path
    layers: Sequence[int]
    lr: float
    reward: Callable[..., list[float]]
    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    steps: int
    tokens: int
    evaluated: int
    weights: Weights = "lora"


class Policy(NamedTuple):
    """A model of which the last layers are trained, its ``end``, its tokenizer and its optimizer."""

    model: Any
    end: Any
    tokenizer: Any
    optimizer: torch.optim.AdamW

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name."""
        return {name: p for name, p in self.end.named_parameters() if p.requires_grad}

    def collate(self, rollouts: Sequence[Rollout]) -> Batch:
        """Return rollouts as a batch."""
        return collate(rollouts, self.tokenizer.pad_token_id)


def training_tasks() -> list[Prompt]:
    """Return the stored training tasks of ``DRAWN_KINDS``."""
    return [task for task in tasks("train") if task.columns["task"] in DRAWN_KINDS]


def held_out_tasks(count: int) -> list[Prompt]:
    """Return at least ``count`` tasks of ``DRAWN_KINDS`` that no file has."""
    stored = {task.question or "" for split in ("train", "eval") for task in tasks(split)}
    return drawn_tasks(DRAWN_KINDS, count, 2, "drawn", stored)


def initial_policy(settings: Settings) -> Policy:
    """Return the model with new adapters or its own last layers to train, and a new optimizer."""
    torch.manual_seed(SEED)
    base = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    if settings.weights == "lora":
        adapters = {**LORA, "target_modules": list(MODULES), "layers_to_transform": list(settings.layers)}
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **adapters)).eval()
        end = trainable_end(model.get_base_model(), len(settings.layers))
    else:
        model = base.eval().requires_grad_(False)
        end = trainable_end(model, len(settings.layers))
        end.model.layers.requires_grad_(True)
    return Policy(model, end, tokenizer, fresh_optimizer(end, settings.lr))


def train(
    folder: Path,
    settings: Settings,
    make_step: Callable[[Policy, Settings, int], dict[str, Any]] | None = None,
    states: Collection[int] = (),
) -> list[dict[str, Any]]:
    """Return the figures of every step; those that ``folder`` has are not made again.

    Args:
        folder: of the figures and the states.
        settings: of the training run.
        make_step: makes the step of a number and returns its figures; by default ``predicted_step``.
        states: numbers of steps whose ``state_file`` is stored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    steps, policy = stored_steps(folder), initial_policy(settings)
    if (file := folder / "state.pt").exists():
        # A run may have been stopped after it wrote a step's figures and before it wrote its state.
        steps = steps[: load_state(policy, file)]
    for step in range(len(steps) + 1, settings.steps + 1):
        start = time.process_time()
        figures = (make_step or predicted_step)(policy, settings, step)
        steps.append({"step": step, "seconds": time.process_time() - start, **figures})
        write_json(folder / "steps.json", {"steps": steps})
        state = {"step": step, "parameters": policy.parameters(), "optimizer": policy.optimizer.state_dict()}
        part = file.with_suffix(".part")
        torch.save(state, part)
        if step in states:
            shutil.copy(part, state_file(folder, step))
        os.replace(part, file)
        print(f"step {step}: {steps[-1]}", file=sys.stderr, flush=True)
    return steps


def state_file(folder: Path, step: int) -> Path:
    """Return the file of the state after a step of the training run in ``folder``."""
    return folder / f"state_after_{step}.pt"


def load_state(policy: Policy, file: Path) -> int:
    """Copy a stored state into a policy and its optimizer, and return the number of steps before it."""
    saved = torch.load(file, weights_only=True)
    policy.optimizer.load_state_dict(saved["optimizer"])
    with torch.no_grad():
        for name, p in policy.parameters().items():
            p.copy_(saved["parameters"][name])
    return int(saved["step"])


def stored_steps(folder: Path) -> list[dict[str, Any]]:
    """Return the figures of the steps that have been made."""
    file = folder / "steps.json"
    return list(json.loads(file.read_text(encoding="utf-8"))["steps"]) if file.exists() else []


def prompts_of_step(settings: Settings, step: int) -> tuple[list[Prompt], list[Prompt], list[Prompt]]:
    """Return the prompts of a step's U, of its E, and others; the training prompts are shuffled in each epoch."""
    per_epoch = len(settings.train) // PROMPTS
    epoch, place = divmod(step - 1, per_epoch)
    shuffled = random.Random(epoch).sample(list(settings.train), len(settings.train))
    count, size = settings.evaluated, len(settings.held_out)
    held_out = [settings.held_out[(2 * count * (step - 1) + k) % size] for k in range(2 * count)]
    return shuffled[place * PROMPTS :][:PROMPTS], held_out[:count], held_out[count:]


def sampled_update(
    policy: Policy, settings: Settings, prompts: Sequence[Prompt], seed: int
) -> tuple[list[Rollout], Batch]:
    """Return rewarded rollouts of prompts, and their batch with the coefficients of the loss.

    What the frozen layers hold of earlier rollouts is dropped.
    """
    policy.end.get_input_embeddings().forget()
    rollouts = sample_rewarded(
        policy.model,
        policy.tokenizer,
        prompts,
        settings.reward,
        completions_per_prompt=COMPLETIONS,
        max_new_tokens=settings.tokens,
        temperature=1.0,
        seed=seed,
    )
    return rollouts, update_batch(rollouts, policy.tokenizer.pad_token_id, settings.tokens)


def sampled_evaluation(
    policy: Policy, settings: Settings, prompts: Sequence[Prompt], completions: int, seed: int
) -> list[Rollout]:
    """Return as many rollouts of each prompt."""
    return sample(
        policy.model,
        policy.tokenizer,
        prompts,
        completions_per_prompt=completions,
        max_new_tokens=settings.tokens,
        temperature=1.0,
        seed=seed,
    )


def clip_and_step(policy: Policy) -> None:
    """Clip the gradient that the parameters hold, and make the optimizer's step."""
    nn.utils.clip_grad_norm_(policy.end.parameters(), MAX_NORM)
    policy.optimizer.step()


def unpredicted_step(policy: Policy, settings: Settings, step: int) -> dict[str, float]:
    """Make a step and return its rewards, as ``predicted_step`` without a prediction."""
    rollouts, u = sampled_update(policy, settings, prompts_of_step(settings, step)[0], seed=3 * step)
    loss_gradient(policy, u)
    clip_and_step(policy)
    return reward_figures(rollouts)


def predicted_step(policy: Policy, settings: Settings, step: int) -> dict[str, Any]:
    """Make a step; return its rewards, its predicted change in nats, the measured ones, and sums of proxies times lr.

    Args:
        policy: the policy, which the step changes.
        settings: of the training run.
        step: its number, from 1.
    """
    u_prompts, e_prompts, other_prompts = prompts_of_step(settings, step)
    end, optimizer = policy.end, policy.optimizer
    rollouts, u = sampled_update(policy, settings, u_prompts, seed=3 * step)
    pairs = sampled_evaluation(policy, settings, e_prompts, 2, seed=3 * step + 1)
    others = sampled_evaluation(policy, settings, other_prompts, 1, seed=3 * step + 2)
    batches = {E_ITSELF: pairs[::2], SAME: pairs[1::2], OTHER: others}
    measured_on = {name: policy.collate(chosen) for name, chosen in batches.items()}
    apply, live = fx.make_functional(end)
    params, state = {name: p.clone() for name, p in live.items()}, fx.adamw_state(optimizer, end)
    grad = loss_gradient(policy, u)
    advantages = torch.tensor([r.advantage or 0.0 for r in rollouts], dtype=torch.float64)
    predicted = prediction(params, u, measured_on[E_ITSELF], state, apply, grad, trusted=step % TRUSTED_EVERY == 1)
    moments = fx.proxies.token_moments(params, u, apply=apply)
    clip_and_step(policy)
    moved = {name: live[name] - p for name, p in params.items()}
    return {
        **rollout_figures(rollouts, moments, u),
        "predicted": {name: x if name in UNSCALED else settings.lr * x for name, x in predicted.items()},
        "measured": {name: measured_change(params, moved, e, apply) for name, e in measured_on.items()},
        "proxies": {name: settings.lr * float(x.sum()) for name, x in proxies(moments, u, advantages).items()},
    }


UNSCALED = ("degrees_of_freedom", "noise_share", "eta_trust", "entropy", "conditioning")
"""Figures of a prediction that are not per unit of learning rate."""


def rollout_figures(rollouts: Sequence[Rollout], moments: fx.TokenMoments, u: Batch) -> dict[str, float]:
    """Return means over the rollouts of a step."""
    return {
        **reward_figures(rollouts),
        "entropy": float(moments.entropies[u.completion_mask].mean()),
        "length": float(u.completion_mask.sum() / len(rollouts)),
    }


def reward_figures(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return the mean reward of rollouts, and the share of those with an advantage."""
    return {
        "reward": sum(r.reward or 0.0 for r in rollouts) / len(rollouts),
        "with_advantage": sum(bool(r.advantage) for r in rollouts) / len(rollouts),
    }


def loss_gradient(policy: Policy, u: Batch) -> dict[str, Tensor]:
    """Return the loss's gradient by name, before clipping, and leave it for the optimizer."""
    policy.optimizer.zero_grad()
    surrogate(TokenValues(*score_tokens(policy.end, u)), u).backward()
    return {name: p.grad.clone() for name, p in policy.parameters().items() if p.grad is not None}


def prediction(
    params: Params,
    u: Batch,
    e: Batch,
    state: fx.AdamWState,
    apply: fx.Policy,
    grad: Mapping[str, Tensor],
    trusted: bool,
) -> dict[str, float]:
    """Return the derivative of the entropy along the step and its terms, per unit of learning rate.

    ``without_score`` leaves out that the step changes which texts are sampled, which is most of the noise.

    Args:
        params: parameters by name.
        u: rollouts of the step.
        e: rollouts that predict.
        state: of the optimizer.
        apply: the policy.
        grad: the loss's gradient, before clipping.
        trusted: whether to add the step at which the first order is 10% off.
    """
    out = fx.influence(params, u, e, state, apply=apply, max_grad_norm=MAX_NORM, grad=dict(grad), per_token=False)
    terms = ("total", "total_stderr", "momentum", "weight_decay", "unattributed", "conditioning")
    figures = {name: float(getattr(out, name)) for name in terms}
    figures["rollouts"] = float(out.per_sequence.sum())
    figures["degrees_of_freedom"] = float(out.degrees_of_freedom or 0)
    assert out.values_e is not None
    figures["entropy"] = float(out.values_e.entropies[e.completion_mask].mean())
    if (squares := float((out.per_sequence**2).sum())) > 0:
        figures["noise_share"] = float((out.stderr**2).sum()) / squares
    v = fx.adamw_decompose(dict(grad), state, params, max_grad_norm=MAX_NORM).direction
    with warnings.catch_warnings():
        # The bias is what is looked at.
        warnings.filterwarnings("ignore", message="objective.score is 0")
        pathwise = fx.jvp_delta(params, v, e, apply=apply, objective=fx.Entropy(score=0.0), second_order=False)
    figures["without_score"] = float(pathwise.first)
    if trusted:
        derivatives = fx.jvp_delta(params, v, e, apply=apply)
        figures["eta_trust"] = float((0.2 * derivatives.first / derivatives.second).abs())
    return figures


def measured_change(params: Params, moved: Params, e: Batch, apply: fx.Policy) -> dict[str, float]:
    """Return a step's change of entropy on rollouts of the policy before it, with its error and degrees of freedom."""
    change = fx.snis_delta(params, moved, 1.0, e, apply=apply)
    assert e.group is not None
    return {
        "delta_h": float(change.delta_h),
        "stderr": float(change.stderr),
        "degrees_of_freedom": float(len(e.group.unique()) - 1),
        "ess": float(change.ess),
    }
