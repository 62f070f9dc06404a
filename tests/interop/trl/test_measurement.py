"""Measure a TRL step without copies of the parameters, and get what copies give."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers.tolerances import assert_within, policy_terms, rounding_bound
from helpers.trl_runs import PLAIN, measure_training

import fx_influence as fx
from fx_influence.core.tree import promote
from fx_influence.functional import make_functional
from fx_influence.interop.live import precision
from fx_influence.interop.live.measurement import PendingStep
from fx_influence.interop.live.metrics import MeasuredStep
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.interop.trl.measurement import TrlStepMeasurement

SAMPLED = 500


class CopyingMeasurement(TrlStepMeasurement):
    """Measurement of the change of entropy a second time, by ``snis_delta`` on copies of the parameters."""

    deltas: ClassVar[list[tuple[fx.SnisDelta, fx.SnisDelta]]] = []
    num_bytes: ClassVar[list[int]] = []

    def before_update(self, *args: Any) -> PendingStep:
        self._copies = {name: p.clone() for name, p in self.trainable().items()}
        pending = super().before_update(*args)
        sampled = pending.sampled
        tensors = [*sampled.grads.values(), *sampled.params.values(), *sampled.opt_state.exp_avg.values()]
        self.num_bytes.append(sum(x.untyped_storage().nbytes() for x in tensors if x is not None))
        return pending

    def after_update(self, pending: PendingStep) -> MeasuredStep:
        measured = super().after_update(pending)
        apply, _ = make_functional(self._trainer.model, position_ids=False)
        live, temperature = self.trainable(), self._trainer.temperature
        change = {name: live[name].to(promote(p.dtype)) - p for name, p in self._copies.items()}
        expected = fx.snis_delta(self._copies, change, 1.0, pending.batch_e, apply=apply, temperature=temperature)
        assert measured.measured_change is not None
        self.deltas.append((measured.measured_change, expected))
        return measured


@pytest.mark.filterwarnings("ignore")
def test_measured_change_needs_no_copy_of_the_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "SAMPLED_ENTRIES", SAMPLED)
    monkeypatch.setattr(CopyingMeasurement, "deltas", [])
    monkeypatch.setattr(CopyingMeasurement, "num_bytes", [])
    monkeypatch.setattr(EntropyInfluence, "_measurement_type", CopyingMeasurement)
    training = measure_training(tmp_path, 2, PLAIN, learning_rate=1e-3)
    assert len(training.history) == 2, training.warnings
    trained = {name: p for name, p in training.trainer.model.named_parameters() if p.requires_grad}
    config = training.trainer.model.config
    width, vocabulary = config.max_position_embeddings, config.vocab_size
    assert len(CopyingMeasurement.deltas) == 2
    for change, expected in CopyingMeasurement.deltas:
        # Both add up differences of entropies, of at most the vocabulary's log, that a forward rounds.
        bound = rounding_bound(torch.float32, policy_terms(trained, width, passes=1), math.log(vocabulary))
        assert expected.delta_h.abs() > bound
        assert_within(change.contributions, expected.contributions, bound)
        assert change.ess == pytest.approx(float(expected.ess), rel=bound)
    # Three vectors, of which each tensor has at least one entry, and one more than its share.
    assert all(size <= 3 * 4 * (SAMPLED + 2 * len(trained)) for size in CopyingMeasurement.num_bytes)
    assert all(0 < metrics["step_rounding"] < 0.1 for metrics in training.history)


class GradientRecorder(TrlStepMeasurement):
    """Measurement that notes by how much each gradient was clipped, and whether it is the trainer's own memory."""

    clips: ClassVar[list[float]] = []

    def before_update(self, *args: Any) -> PendingStep:
        captured = args[1]
        for name, p in self._trainer.model.named_parameters():
            g = captured.gradient[name]
            assert (g is None) == (p.grad is None)
            assert g is None or p.grad is None or g.data_ptr() == p.grad.data_ptr()
        self.clips.append(captured.clip)
        return super().before_update(*args)


@pytest.mark.filterwarnings("ignore")
def test_clipped_gradient_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clipped step is attributed from the trainer's own tensors, and nothing of it is unattributed."""
    monkeypatch.setattr(GradientRecorder, "clips", [])
    monkeypatch.setattr(EntropyInfluence, "_measurement_type", GradientRecorder)
    training = measure_training(tmp_path, 2, PLAIN, learning_rate=1e-3, max_grad_norm=0.01)
    assert len(training.history) == 2, training.warnings
    assert len(GradientRecorder.clips) == 2
    assert all(clip < 0.1 for clip in GradientRecorder.clips)
    assert all(metrics["unattributed"] == 0 for metrics in training.history)
