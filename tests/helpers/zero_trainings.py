"""TRL trainers under DeepSpeed's ZeRO on a CPU."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fx_influence as fx
from benchmarks.trl.variants import Variant
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.interop.zero.partitions import zero_optimizer
from helpers.ranks_trl import log_of, rank_trainer, replaced_influence
from helpers.ranks_trl_sharded import FULL, compared_with_one_process
from helpers.sharded_trainings import full_tree
from helpers.tolerances import policy_terms
from helpers.trl_runs import warnings_of

TORCH_ADAMW: dict[str, Any] = {
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
    }
}
"""Part of DeepSpeed's configuration with which it makes torch's AdamW itself."""


def zero_trainer(variant: Variant, out: Path, steps: int, config: dict[str, Any], **more: Any) -> Any:
    return rank_trainer(variant, out, steps, deepspeed=config, learning_rate=1e-3, **more)


def measured_training(variant: Variant, config: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    """Train two steps without and with every step measured, on the step's rollouts; return what both leave.

    With full weights the influences are compared with those of one process.

    Args:
        variant: of the training runs.
        config: DeepSpeed's.
        out: directory of the training runs.
        more: further options of the trainer's config; ``bf16=True`` is what TRL takes unless told otherwise.
    """
    plain = zero_trainer(variant, out / "plain", 2, config, **more)
    plain.train()
    training = zero_trainer(variant, out / "measured", 2, config, **more)
    records, steps = list[dict[str, Any]](), list[dict[str, Any]]()
    call = compared_with_one_process(records) if variant is FULL else fx.influence
    with replaced_influence(recording(steps, call)):
        influence = EntropyInfluence(1).attach(training)
        texts = warnings_of(training.train)
    weights = full_weights(training.model)
    return {
        "plain": zero_outcome(plain),
        "measured": zero_outcome(training),
        "history": influence.history,
        "records": records,
        "forward_roundings": forward_roundings(steps, weights),
        "optimizer": type(zero_optimizer(training.optimizer)).__name__,
        "dtypes": {str(x.dtype) for x in weights.values()},
        "terms": policy_terms(weights, 16),
        "warnings": [text for text in texts if "roundings" in text],
    }


def recording(steps: list[dict[str, Any]], call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``call``, in the place of ``fx.influence``, that appends the forward's weights and the step from them."""

    def recorded(params: Any, batch_u: Any, batch_e: Any, opt_state: Any, **options: Any) -> Any:
        step = fx.adamw_decompose(options["grad"], opt_state, params, max_grad_norm=options["max_grad_norm"])
        v = full_tree(step.direction, torch.float64)
        steps.append({"weights": full_tree(params, torch.float64), "step": {k: opt_state.lr * x for k, x in v.items()}})
        return call(params, batch_u, batch_e, opt_state, **options)

    return recorded


def forward_roundings(steps: list[dict[str, Any]], last: dict[str, Any]) -> list[float]:
    """Return how far the forward's weights moved otherwise than the step, of its length, by step.

    Args:
        steps: of ``recording``.
        last: the trained weights after them, by name.
    """
    names = list(steps[0]["weights"])
    vectors = [flat(step["weights"], names) for step in steps] + [flat(last, names)]
    moves = [flat(step["step"], names) for step in steps]
    pairs = zip(itertools.pairwise(vectors), moves, strict=True)
    return [float((after - before - move).norm() / move.norm()) for (before, after), move in pairs]


def flat(tree: dict[str, Any], names: list[str]) -> torch.Tensor:
    return torch.cat([tree[name].double().flatten() for name in names])


def zero_outcome(training: Any) -> dict[str, Any]:
    """Return what a training run leaves: its weights, this rank's partitions of AdamW's state, and the log."""
    state = zero_optimizer(training.optimizer).optimizer.state
    tensors = {f"{k}.{name}": x.detach().clone() for k, s in enumerate(state.values()) for name, x in s.items()}
    return {"tensors": tensors | full_weights(training.model), "log": log_of(training)}


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the complete weights by name, gathered by DeepSpeed itself where it partitions them."""
    deepspeed: Any = importlib.import_module("deepspeed")
    with deepspeed.zero.GatheredParameters([p for p in model.parameters() if hasattr(p, "ds_id")]):
        return {name: p.detach().clone() for name, p in model.named_parameters()}
