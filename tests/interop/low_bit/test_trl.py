"""TRL training runs with transformers' quantised optimizers, measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.trl_runs import assert_training_unchanged, measure_training

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "adamw_torch_8bit"])
def test_trl_is_measured_with_quantised_optimizers(optim: str, tmp_path: Path) -> None:
    with torch.compiler.set_stance("force_eager"):
        training = measure_training(tmp_path / "measured", 3, optim=optim)
        assert training.warnings == []
        assert [metrics["step"] for metrics in training.history] == [1, 2, 3]
        assert all(metrics["step_rounding"] < 0.1 for metrics in training.history)
        assert_training_unchanged(training.trainer, tmp_path / "plain", 3, optim=optim)
