"""TRL training runs with transformers' quantised optimizers and with a 4-bit base (QLoRA), measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.four_bit import save_four_bit_policy, without_packing
from helpers.trl_runs import assert_training_unchanged, measure_training

from benchmarks.trl.variants import Variant

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

LORA = Variant("dapo", True, 1, False, {})


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "adamw_torch_8bit"])
def test_trl_is_measured_with_quantised_optimizers(optim: str, tmp_path: Path) -> None:
    with torch.compiler.set_stance("force_eager"):
        training = measure_training(tmp_path / "measured", 3, optim=optim)
        assert training.warnings == []
        assert [metrics["step"] for metrics in training.history] == [1, 2, 3]
        for metrics in training.history:
            assert metrics["step_rounding"] < 0.1
            # No parameter of this policy is large enough to be quantised.
            assert metrics["moment_rounding"] < 1e-6
        assert_training_unchanged(training.trainer, tmp_path / "plain", 3, optim=optim)


@pytest.mark.parametrize(
    ("compute_dtype", "options"), [("float32", {}), ("bfloat16", {}), ("bfloat16", {"bf16": True})], ids=str
)
def test_qlora_of_trl_is_measured(compute_dtype: str, options: dict[str, Any], tmp_path: Path) -> None:
    """TRL trains QLoRA's adapter in bfloat16, whose rounding is reported; the prediction is that of the full step."""
    base = save_four_bit_policy(tmp_path / "base", getattr(torch, compute_dtype))
    more = {"learning_rate": 2e-3, "optim": "adamw_8bit", "prepare": without_packing, **options}
    training = measure_training(tmp_path / "measured", 2, LORA, model=base, **more)
    assert training.warnings == []
    assert [metrics["step"] for metrics in training.history] == [1, 2]
    for metrics in training.history:
        assert metrics["measured"] == pytest.approx(metrics["total"], rel=0.3)
        assert abs(metrics["residual"]) < 1e-2 * abs(metrics["total"])
