"""Real GRPO training runs under control: weights multiply coefficients exactly, act, and outlive a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.present import present
from helpers.tolerances import assert_within, rounding_bound
from helpers.trl_runs import PLAIN, assert_detached, assert_trains_like, warnings_of
from torch import Tensor

import fx_influence as fx
from benchmarks.trl.variants import PROMPTS, Variant, trainer
from fx_influence.interop.live.metrics import regions_of
from fx_influence.interop.live.step import CapturedStep
from fx_influence.interop.trl import EntropyControl
from fx_influence.interop.trl.capture.recorder import METHODS, Capture
from fx_influence.interop.trl.control.advantages import AdvantageWeights

# The warnings that trl, transformers and accelerate give about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]
SIZE: dict[str, Any] = {"per_device_train_batch_size": 18, "learning_rate": 1e-3}
FAR = 10.0
"""A target that no weights reach."""


def captured_step(out: Path, variant: Variant, weights: dict[str, float], sources: bool = False) -> CapturedStep:
    """Return the first step of a training run with these weights."""
    training = trainer(variant, str(out), 1)
    if sources:
        rows = [{"prompt": p, "source": ("math", "code")[k % 2]} for k, p in enumerate(PROMPTS)]
        training.train_dataset = Dataset.from_list(rows)
    capture = Capture(training)
    weighting = AdvantageWeights(training, lambda: weights)
    steps: list[CapturedStep] = []
    clip = training.accelerator.clip_grad_norm_

    def clip_and_finish(*args: Any, **kwargs: Any) -> Any:
        norm = clip(*args, **kwargs)
        steps.append(capture.finish())
        return norm

    training.accelerator.clip_grad_norm_ = clip_and_finish
    capture.start()
    training.train()
    weighting.detach()
    capture.detach()
    assert not set(METHODS) & set(vars(training))
    return steps[0]


def weights_by_name(kinds: fx.labels.Labels, values: tuple[float, ...]) -> Tensor:
    table = torch.tensor([*values, 1.0])
    return table[kinds.index]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_weights_multiply_coefficients_exactly(loss: str, accumulation: int, tmp_path: Path) -> None:
    """Powers of two, so that no product is rounded; what the trainer's advantages are seen as does not change."""
    variant = PLAIN._replace(loss=loss, accumulation=accumulation)
    values = (0.5, 0.25, 0.0, 2.0, 1.0)
    weights = dict(zip(fx.labels.REGIONS, values, strict=True))
    plain, weighted = (
        captured_step(tmp_path / name, variant, chosen) for name, chosen in (("plain", {}), ("weighted", weights))
    )
    w = weights_by_name(regions_of(plain), values)
    c = present(plain.batch.coefficients)
    assert torch.equal(present(weighted.batch.coefficients), w * c)
    assert (w * c != c).any()
    assert torch.equal(weighted.advantages, plain.advantages)
    assert weighted.token_advantages is None


@pytest.mark.slow
def test_weights_are_by_source_too(tmp_path: Path) -> None:
    weights = {"A>0 likely, math": 0.5, "A<0 likely, code": 0.25}
    plain, weighted = (
        captured_step(tmp_path / name, PLAIN, chosen, sources=True)
        for name, chosen in (("plain", {}), ("weighted", weights))
    )
    kinds = fx.control.kinds(regions_of(plain), plain.sources)
    w = fx.control.token_weights(kinds, weights)
    assert set(w.unique().tolist()) == {0.25, 0.5, 1.0}
    c = present(plain.batch.coefficients)
    assert torch.equal(present(weighted.batch.coefficients).double(), w * c.double())


def controlled(out: Path, steps: int, resume: str | None = None) -> tuple[Any, EntropyControl]:
    """Train with a target that is far, so that weights act as soon as an influence is sure."""
    training = trainer(PLAIN, str(out), steps, **SIZE, save_strategy="steps", save_steps=2)
    control = EntropyControl(FAR, confidence=0.05)
    training.add_callback(control)
    texts = warnings_of(lambda: training.train(resume_from_checkpoint=resume))
    assert not [text for text in texts if "measured" in text or "controller" in text]
    return training, control


def weights_in(metrics: dict[str, float]) -> dict[str, float]:
    """Return the weights in force in a measured step."""
    return {name.removeprefix("weight/"): w for name, w in metrics.items() if name.startswith("weight/")}


@pytest.mark.slow
def test_control_acts_on_the_steps_after_it(tmp_path: Path) -> None:
    """The first steps of a new optimizer say nothing; after the third the weights act."""
    training, control = controlled(tmp_path, 6)
    assert [metrics["step"] for metrics in control.history] == [1, 2, 3, 4, 5, 6]
    usable = [metrics["conditioning"] <= 0.5 for metrics in control.history]
    first = usable.index(True)
    in_force = [weights_in(metrics) for metrics in control.history]
    assert all(set(w.values()) == {1.0} for w in in_force[: first + 1])
    assert all(min(w.values()) < 0.9 for w in in_force[first + 1 :])
    assert all(0.05 <= w <= 1.5 for step in in_force for w in step.values())
    assert all(metrics["target_reached"] == 0 for metrics in control.history[first:])
    assert control.state.evidence.max() == pytest.approx(sum(0.9**k for k in range(sum(usable))))
    assert control.state.kinds == fx.labels.REGIONS
    unweighted = control.state.estimate()
    assert present(control.prediction).entropy > float(unweighted.rest + unweighted.entropy.sum())
    control.detach()
    assert_detached(training)


@pytest.mark.slow
def test_control_at_a_low_target_leaves_the_training(tmp_path: Path) -> None:
    """Weights are 1 where the entropy may fall and no reward is sure, and training is as without control."""
    training = trainer(PLAIN, str(tmp_path / "control"), 2, **SIZE)
    control = EntropyControl(-100.0, confidence=0.999999).attach(training)
    training.train()
    assert all(w == 1 for w in control.weights.values())
    assert len(control.history) == 2
    assert_trains_like(training, lambda: trainer(PLAIN, str(tmp_path / "plain"), 2, **SIZE))


@pytest.mark.slow
def test_resumed_training_continues_with_the_state(tmp_path: Path) -> None:
    _, first = controlled(tmp_path, 6)
    saved = json.loads((tmp_path / "checkpoint-4" / "entropy_control.json").read_text())
    _, resumed = controlled(tmp_path, 6, str(tmp_path / "checkpoint-4"))
    assert [metrics["step"] for metrics in resumed.history] == [5, 6]
    assert min(saved["weights"].values()) < 0.9
    assert weights_in(resumed.history[0]) == saved["weights"] == weights_in(first.history[4])
    assert_within(resumed.state.evidence, first.state.evidence, rounding_bound(torch.float64, 10, 10.0))


@pytest.mark.slow
def test_checkpoint_without_state_begins_anew(tmp_path: Path) -> None:
    controlled(tmp_path, 2)
    (tmp_path / "checkpoint-2" / "entropy_control.json").write_text('{"state": {}, "weights": {}}')
    training = trainer(PLAIN, str(tmp_path), 3, **SIZE)
    control = EntropyControl(FAR, confidence=0.05)
    training.add_callback(control)
    texts = warnings_of(lambda: training.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")))
    assert any("the controller begins anew" in text for text in texts)
    assert {w for name, w in control.history[0].items() if name.startswith("weight/")} == {1.0}


@pytest.mark.slow
def test_weights_are_one_once_measuring_has_ended(tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 3, **SIZE)
    control = EntropyControl(FAR, confidence=0.05).attach(training)
    control.on_step_begin = lambda args, state, c, **k: end_at_third(control, args, state, c, **k)  # type: ignore[method-assign]
    training.train()
    assert control.weights == {}


def end_at_third(control: EntropyControl, args: Any, state: Any, c: Any, **kwargs: Any) -> None:
    control._measuring = control._measuring and state.global_step < 2
    EntropyControl.on_step_begin(control, args, state, c, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (PLAIN._replace(options={"beta": 0.1}), "beta is 0.1; expected 0"),
        (PLAIN._replace(options={"entropy_coef": 0.05}), "entropy_coef is 0.05; expected no entropy bonus"),
        (PLAIN._replace(options={"importance_sampling_level": "sequence"}), "importance_sampling_level is 'sequence'"),
        (PLAIN._replace(off_policy=True), "several optimizer steps a generation; expected one"),
        (Variant("rloo", False, 1, False, {}), "trainer is RLOOTrainer; expected a GRPOTrainer"),
    ],
)
def test_control_refuses_losses_it_cannot_weigh(variant: Variant, message: str, tmp_path: Path) -> None:
    training = trainer(variant, str(tmp_path), 1, **SIZE)
    with pytest.raises(ValueError, match=message):
        EntropyControl(0.3).attach(training)
    assert_detached(training)


def test_control_refuses_options_out_of_range() -> None:
    with pytest.raises(TypeError, match="matrix is an option that the controller sets itself"):
        EntropyControl(0.3, matrix=True)
    with pytest.raises(ValueError, match="horizon is 0; expected a positive number of steps"):
        EntropyControl(0.3, horizon=0)
    with pytest.raises(ValueError, match=r"forgetting is 2.0; expected a factor"):
        EntropyControl(0.3, forgetting=2.0)
