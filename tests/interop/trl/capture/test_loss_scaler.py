"""Steps under a loss scaler, as fp16 has one: skipped ones are missing, others measured as without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from helpers.trl_runs import assert_training_unchanged, measure_training

# The warnings that trl, transformers and accelerate give about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]


def with_loss_scaler(init_scale: float) -> Callable[[Any], None]:
    """Return what puts a loss scaler into a trainer as accelerate does for fp16, which it does on a GPU only."""

    def prepare(training: Any) -> None:
        accelerator = training.accelerator
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale, backoff_factor=0.9)

        def unscale(_: Any = None) -> None:
            optimizer = training.optimizer
            while isinstance(optimizer, AcceleratedOptimizer):
                optimizer = optimizer.optimizer
            accelerator.scaler.unscale_(optimizer)

        accelerator.unscale_gradients = unscale

    return prepare


@pytest.mark.slow
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipped", "unclipped"])
def test_skipped_steps_are_missing_with_one_warning(max_grad_norm: float, tmp_path: Path) -> None:
    prepare = with_loss_scaler(3e38)
    measured = measure_training(tmp_path / "a", 4, prepare=prepare, max_grad_norm=max_grad_norm)
    assert len(measured.history) <= 2
    assert measured.warnings == [
        "step 1 is not attributed: the loss scaler skips it, as it may others without a warning"
    ]
    assert_training_unchanged(measured.trainer, tmp_path / "b", 4, with_loss_scaler(3e38), max_grad_norm=max_grad_norm)


@pytest.mark.slow
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipped", "unclipped"])
def test_loss_scaler_leaves_the_metrics(max_grad_norm: float, tmp_path: Path) -> None:
    """Powers of two scale without rounding, so the metrics are those without a scaler, unscaled by clipping or not."""
    prepare = with_loss_scaler(2.0**10)
    [scaled] = measure_training(tmp_path / "a", 1, prepare=prepare, max_grad_norm=max_grad_norm).history
    [plain] = measure_training(tmp_path / "b", 1, max_grad_norm=max_grad_norm).history
    for name in ("total", "rollouts", "residual", "unattributed"):
        assert scaled[name] == pytest.approx(plain[name], rel=1e-5, abs=1e-12)
