"""A stand-in for the update of verl's actor, written after its source (0.10.0.dev, commit 1dda039, August 2026).

verl is not installed where the tests run. What the README's example touches has verl's names, signatures, shapes and
order of calls: the registry of policy losses, ``TrainingWorker.set_loss_fn``, the loss that pads log-probabilities of
packed tokens to responses, micro-batches, loss normalised by the tokens of the mini-batch, clipping, and the step.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[..., tuple[Tensor, dict[str, Any]]]
REGISTRY: dict[str, Loss] = {}


def register_policy_loss(name: str) -> Callable[[Loss], Loss]:
    def register(loss: Loss) -> Loss:
        REGISTRY[name] = loss
        return loss

    return register


@register_policy_loss("vanilla")
def vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Return PPO's clipped loss, the mean over the tokens of the mini-batch (``loss_agg_mode="token-mean"``)."""
    assert loss_agg_mode == "token-mean"
    assert rollout_is_weights is None
    ratio = (log_prob - old_log_prob).clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - config.clip_ratio, 1 + config.clip_ratio)
    per_token = torch.maximum(-advantages * ratio, -advantages * clipped) * response_mask
    info = config.global_batch_info
    return per_token.sum() / info["batch_num_tokens"] * info["dp_size"], {}


def pad_responses(packed: Tensor, data: dict[str, Any]) -> Tensor:
    """Return values of packed tokens, each at the place of the logits before it, as (B, responses)."""
    attended, width = data["attention_mask"], data["responses"].shape[1]
    lengths = attended[:, -width:].sum(1).tolist()
    ends = attended.sum(1).cumsum(0).tolist()
    rows = [packed[end - length - 1 : end - 1] for end, length in zip(ends, lengths, strict=True)]
    return torch.stack([nn.functional.pad(row, (0, width - len(row))) for row in rows])


def ppo_loss(config: Any, model_output: dict[str, Tensor], data: dict[str, Any], dp_group: Any = None) -> Any:
    log_prob = pad_responses(model_output["log_probs"], data)
    config.global_batch_info.update(dp_size=1, batch_num_tokens=data["batch_num_tokens"])
    return REGISTRY[config.loss_mode](
        old_log_prob=data["old_log_probs"],
        log_prob=log_prob,
        advantages=data["advantages"],
        response_mask=data["response_mask"].bool(),
        loss_agg_mode="token-mean",
        config=config,
        rollout_is_weights=None,
    )


class Engine:
    """The engine of a language model: forward under bfloat16 autocast, backward, clipping, step."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, clip_grad: float) -> None:
        self.module, self.optimizer, self._clip_grad = module, optimizer, clip_grad

    def train_batch(self, data: dict[str, Any], loss_function: Callable[..., Any], micro_batches: int) -> None:
        self.optimizer.zero_grad()
        tokens = data["response_mask"].sum().item()
        for indices in torch.arange(len(data["responses"])).chunk(micro_batches):
            part = {**{name: x[indices] for name, x in data.items()}, "batch_num_tokens": tokens}
            self._forward_step(part, loss_function).backward()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), max_norm=self._clip_grad)
        if torch.isfinite(norm):
            self.optimizer.step()
        else:
            self.optimizer.zero_grad()

    def _forward_step(self, data: dict[str, Any], loss_function: Callable[..., Any]) -> Tensor:
        ids = torch.cat([data["prompts"], data["responses"]], 1)
        attended = data["attention_mask"].bool()
        positions = (attended.cumsum(1) - 1).clamp(min=0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.module(ids, attention_mask=attended, position_ids=positions)[attended].float()
            # Each token is scored by the logits before it, so the last value of each sequence is of no token.
            labels = ids[attended].roll(-1)
            log_probs = logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
            loss, _ = loss_function(model_output={"log_probs": log_probs}, data=data, dp_group=None)
        return loss


class TrainingWorker:
    """A worker that holds an engine; ``reset`` has made its optimizer before ``set_loss_fn`` is called."""

    def __init__(self, engine: Engine, model_type: str = "language_model") -> None:
        self.engine, self.config = engine, SimpleNamespace(model_type=model_type)

    def set_loss_fn(self, loss_fn: Callable[..., Any]) -> None:
        self.loss_fn = loss_fn

    def train_batch(self, data: dict[str, Any], micro_batches: int) -> None:
        self.engine.module.train()
        self.engine.train_batch(data, self.loss_fn, micro_batches)


def actor_loss(loss_mode: str) -> Callable[..., Any]:
    """Return the loss that verl's worker gives to ``set_loss_fn``."""
    return functools.partial(
        ppo_loss, config=SimpleNamespace(loss_mode=loss_mode, clip_ratio=0.2, global_batch_info={})
    )


@contextmanager
def installed() -> Iterator[type[TrainingWorker]]:
    """Make the stand-in importable as ``verl`` meanwhile, and yield a worker class that may be changed."""
    worker: type[TrainingWorker] = type(
        "TrainingWorker", (TrainingWorker,), {"set_loss_fn": TrainingWorker.set_loss_fn}
    )
    contents: dict[str, dict[str, Any]] = {
        "verl": {},
        "verl.trainer": {},
        "verl.trainer.ppo": {},
        "verl.trainer.ppo.core_algos": {
            "register_policy_loss": register_policy_loss,
            "get_policy_loss_fn": REGISTRY.__getitem__,
        },
        "verl.workers": {},
        "verl.workers.engine_workers": {"TrainingWorker": worker},
    }
    assert not contents.keys() & sys.modules.keys()
    try:
        for name, attributes in contents.items():
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(attributes)
        yield worker
    finally:
        for name in contents:
            del sys.modules[name]
        REGISTRY.pop("measured", None)
