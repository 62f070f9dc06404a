"""Trainers derived from TRL's: the README's lines for ms-swift, and the refusals that point to them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.derived_trainers import SwiftTrainer, UnslothTrainer, derived_trainer, swift_installed
from helpers.trl_runs import assert_trains_like

import fx_influence as fx
import fx_influence.interop as interop
from fx_influence.interop.live import measurement
from fx_influence.interop.trl import EntropyInfluence

# The warnings that trl, transformers and accelerate give about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]

README = (Path(str(interop.__file__)).parent / "README.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"<!-- example: swift -->\n```python\n(.*?)```", README, flags=re.DOTALL)


def test_swift_example_measures_the_trainers_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[fx.Batch] = []

    def record(params: Any, batch_u: fx.Batch, *rest: Any, **options: Any) -> fx.Influence:
        batches.append(batch_u)
        return fx.influence(params, batch_u, *rest, **options)

    monkeypatch.setattr(measurement, "influence", record)
    with swift_installed() as kind:
        exec(compile(EXAMPLE.replace("every=10", "every=1"), "README.md, swift", "exec"), {})
        training = derived_trainer(kind, str(tmp_path / "measured"))
        training.train()
    history = training.entropy_capture.history
    assert [metrics["step"] for metrics in history] == [1, 2]
    for metrics, batch in zip(history, batches, strict=True):
        assert metrics["unattributed"] == 0
        assert batch.coefficients is not None
        # Every ratio is 1, and an advantage is shared by the tokens of its row.
        shares = batch.coefficients * batch.completion_mask.sum()
        row = shares.sum(1, keepdim=True) / batch.completion_mask.sum(1, keepdim=True)
        torch.testing.assert_close(shares, row * batch.completion_mask)
    assert_trains_like(training, lambda: derived_trainer(SwiftTrainer, str(tmp_path / "plain")))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (SwiftTrainer, "takes model, model_inputs, grpo_batch as ms-swift's does.*interop/README.md"),
        (UnslothTrainer, "gives no log-probabilities.*Train without importing unsloth"),
    ],
    ids=["swift", "unsloth"],
)
def test_attach_refuses_derived_trainers_with_the_remedy(kind: Any, message: str, tmp_path: Path) -> None:
    training = derived_trainer(kind, str(tmp_path))
    with pytest.raises(TypeError, match=message):
        EntropyInfluence(1).attach(training)
