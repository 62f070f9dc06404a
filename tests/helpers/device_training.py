"""A TRL training run with every step measured on its own rollouts, on the CPU or on the simulated device."""

from __future__ import annotations

import os
import tempfile
import warnings
from typing import Any, NamedTuple

import torch

from benchmarks.trl.variants import Variant, policy, quiet, trainer
from fx_influence.interop.trl import EntropyInfluence
from helpers.simulated_device import DEVICE_TYPE, Transfer, count_transfers

STEPS = 2


class DeviceTraining(NamedTuple):
    """A training run's metrics by step, the transfers that measuring each step made, and the device of its weights."""

    history: list[dict[str, float]]
    transfers: list[list[Transfer]]
    device: str


class CountingInfluence(EntropyInfluence):
    """Callback that counts the transfers between host and device while it measures."""

    def __init__(self) -> None:
        super().__init__(1)
        self.transfers: list[list[Transfer]] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with count_transfers() as transfers:
            super().on_pre_optimizer_step(*args, **kwargs)
        self.transfers.append(transfers)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with count_transfers() as transfers:
            super().on_optimizer_step(*args, **kwargs)
        self.transfers[-1].extend(transfers)


def train(device: str) -> DeviceTraining:
    """Return a GRPO training run of a tiny policy, clipped, with its rollouts sampled on the device."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if device == DEVICE_TYPE:
        # Accelerate places trainers on the device that this names.
        os.environ["ACCELERATE_TORCH_DEVICE"] = f"{DEVICE_TYPE}:0"
    model = policy()
    # Moving a module to tensors of a subclass makes new parameters, so that tied ones would no longer be.
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    options: dict[str, Any] = {
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": False,
        "per_device_train_batch_size": 15,
    }
    # A first step divides by the gradient itself, which would amplify the rounding of its small entries.
    options["adam_epsilon"] = 1.0
    with tempfile.TemporaryDirectory() as out, quiet():
        training = trainer(Variant("dapo", False, 1, False, {}), out, STEPS, model, max_grad_norm=0.5, **options)
        influence = CountingInfluence()
        influence.attach(training)
        training.train()
    return DeviceTraining(influence.history, influence.transfers, next(training.model.parameters()).device.type)
