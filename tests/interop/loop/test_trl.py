"""A TRL trainer's steps have the same figures through ``fx.attach`` as through ``EntropyInfluence``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.trl_runs import measure_training
from torch import Tensor
from transformers import TrainerCallback

import fx_influence as fx
from benchmarks.trl.variants import Variant
from fx_influence.interop.trl.capture.micro_batch import SCORE

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


class AttachOnTrainBegin(TrainerCallback):
    """Attach to the optimizer of a trainer when it has one, and add what its scoring method returns."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.capture: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        trainer = self._trainer
        self.capture = fx.attach(
            trainer.optimizer, trainer.model, every=1, temperature=trainer.temperature, position_ids=False
        )
        score, compute_loss, inputs = getattr(trainer, SCORE), trainer.compute_loss, dict[str, Any]()

        def record_inputs(model: Any, batch: Any, **options: Any) -> Any:
            inputs.update(batch)
            return compute_loss(model, batch, **options)

        def add(model: Any, input_ids: Tensor, attention_mask: Tensor, *args: Any, **options: Any) -> Any:
            logprobs, entropies, *more = score(model, input_ids, attention_mask, *args, **options)
            self.capture.add(
                logprobs=logprobs,
                entropies=entropies,
                input_ids=input_ids,
                attention_mask=attention_mask,
                completion_mask=inputs["completion_mask"],
                advantages=inputs["advantages"],
            )
            return logprobs, entropies, *more

        trainer.compute_loss = record_inputs
        setattr(trainer, SCORE, add)


def test_attach_gives_the_figures_of_trl(tmp_path: Path) -> None:
    attached: list[AttachOnTrainBegin] = []

    def prepare(trainer: Any) -> None:
        attached.append(AttachOnTrainBegin(trainer))
        trainer.add_callback(attached[0])

    variant = Variant("dapo", False, 2, False, {"entropy_coef": 0.05, "max_grad_norm": 0.05})
    measured = measure_training(
        tmp_path, 2, variant, prepare, {"eval_prompts": "batch"}, per_device_train_batch_size=9, learning_rate=1e-4
    )
    assert not measured.warnings
    history = attached[0].capture.history
    assert len(history) == len(measured.history) == 2
    for metrics, expected in zip(history, measured.history, strict=True):
        assert metrics.keys() == expected.keys()
        for name in metrics.keys() - {"seconds", "residual", "rounding", "unattributed"}:
            assert metrics[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-3 * abs(expected["total"])), name
