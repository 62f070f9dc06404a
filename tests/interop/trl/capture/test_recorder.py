"""Captured steps are the trainer's own: rollouts' gradients add up to its gradient, and to the step it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tolerances import TINY_POLICY, rounding_bound
from helpers.trl_runs import HELD_OUT, PLAIN, assert_training_unchanged, gpt2, measure_training
from torch import Tensor

from benchmarks.trl.bench_trl_steps import Errors, measure
from benchmarks.trl.variants import Variant, trainer, variants
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.interop.trl.capture.micro_batch import SCORE

# The warnings that trl, transformers and accelerate give about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]

# Relative to the gradient, whose passes are as deep as those of TINY_POLICY; and to the step, theta' - theta of weights
# up to a thousand times as large.
GRADIENT = rounding_bound(torch.float32, TINY_POLICY)
STEP = rounding_bound(torch.float32, 1, 1e3)


def chosen_variants() -> Iterator[Variant]:
    """Yield every loss with half of its settings, in which any three of four occur in every combination; and all else.

    The benchmark ``trl_steps`` has every variant.
    """
    for variant in variants():
        in_grid = set(variant.options) <= {"entropy_coef"} and variant.loss != "rloo"
        settings = [variant.lora, variant.off_policy, variant.accumulation == 3, bool(variant.options)]
        if not in_grid or sum(settings) % 2 == 0:
            yield variant


@pytest.mark.slow
@pytest.mark.parametrize("variant", list(chosen_variants()), ids=lambda variant: variant.name)
def test_captured_rollouts_add_up_to_gradient_and_step(variant: Variant) -> None:
    errors = measure(variant)
    assert errors["tokens"] > 0
    assert errors["steps"] == 3
    assert errors["gradient"] <= GRADIENT
    assert errors["step"] <= STEP


def test_capture_reproduces_positions_counted_from_padding(tmp_path: Path) -> None:
    """GPT-2 under trl counts positions from the first column, padding included."""
    training = trainer(PLAIN, str(tmp_path), 2, gpt2(), disable_dropout=True)
    errors = Errors(training)
    training.train()
    assert max(errors.gradient) <= GRADIENT
    settings = {"eval_prompts": [*HELD_OUT, "1+1+1="], "completions_per_prompt": 3}
    options = {"model": gpt2(), "disable_dropout": True, "learning_rate": 1e-4}
    for metrics in measure_training(tmp_path / "live", settings=settings, **options).history:
        assert metrics["unattributed"] == 0
        assert metrics["measured"] == pytest.approx(metrics["total"], rel=0.1)


def with_token_advantages(training: Any) -> None:
    """Give advantages the shape (B, T), as a subclass may."""
    original = training._generate_and_score_completions

    def generate(inputs: Any) -> Any:
        output = original(inputs)
        count = output["completion_ids"].shape[1]
        signs = torch.linspace(1.0, -1.0, count) if count > 1 else torch.ones(1)
        output["advantages"] = output["advantages"].unsqueeze(1) * signs
        return output

    training._generate_and_score_completions = generate


@pytest.mark.slow
def test_token_advantages_are_attributed(tmp_path: Path) -> None:
    measured = measure_training(tmp_path / "a", prepare=with_token_advantages, learning_rate=1e-4)
    assert not measured.warnings
    for metrics in measured.history:
        by_sign = metrics["positive_advantage"], metrics["negative_advantage"]
        scale = sum(map(abs, by_sign)) + abs(metrics["momentum"])
        assert metrics["unattributed"] == 0
        assert metrics["measured"] == pytest.approx(metrics["total"], abs=0.1 * scale)
        # The last columns have an advantage of the other sign, and one between may have none.
        assert sum(by_sign) == pytest.approx(metrics["rollouts"], abs=1e-5 * scale)
    assert_training_unchanged(measured.trainer, tmp_path / "b", prepare=with_token_advantages, learning_rate=1e-4)


def reinforce(training: Any, scorings: int = 1) -> Callable[..., Tensor]:
    """Return a REINFORCE loss that asks for its log-probabilities ``scorings`` times."""

    def compute(model: Any, inputs: Any) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        completion_mask = inputs["completion_mask"]
        logprobs = [getattr(training, SCORE)(model, ids, mask, completion_mask.shape[1])[0] for _ in range(scorings)]
        weighted = sum(logprobs) * inputs["advantages"].unsqueeze(1) * completion_mask
        return -weighted.sum() / completion_mask.sum() / scorings

    return compute


@pytest.mark.slow
@pytest.mark.parametrize("scorings", [1, 2])
def test_users_loss_is_attributed(scorings: int, tmp_path: Path) -> None:
    """Entropies are None then, as the loss needs none; scored twice, log-probabilities have two coefficients."""

    def replace_loss(training: Any) -> None:
        training.compute_loss = lambda model, inputs, **_: reinforce(training, scorings)(model, inputs)

    measured = measure_training(tmp_path / "a", prepare=replace_loss, learning_rate=1e-4)
    assert not measured.warnings
    for metrics in measured.history:
        assert metrics["unattributed"] == pytest.approx(0, abs=1e-3 * abs(metrics["rollouts"]))
        assert metrics["measured"] == pytest.approx(metrics["total"], rel=0.1)
    assert_training_unchanged(measured.trainer, tmp_path / "b", prepare=replace_loss, learning_rate=1e-4)


def test_capture_fails_when_the_loss_is_replaced_later(tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    influence = EntropyInfluence(1, HELD_OUT).attach(training)
    training.compute_loss = lambda model, inputs, **_: reinforce(training)(model, inputs)
    with pytest.warns(UserWarning, match="step 1 is not attributed: .*without a call of _get_per_token"):
        training.train()
    assert not influence.history
    influence.detach()


@pytest.mark.parametrize(
    ("name", "shape"), [("token_type_ids", (6, 6)), ("pixel_values", (6, 3)), ("soft_prompt", (6, 3))]
)
def test_capture_fails_on_more_forward_inputs(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    kind, more = type(training), {name: torch.ones(shape)}

    class WithMoreInputs(kind):  # type: ignore[valid-type, misc]
        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            known = {key: x for key, x in kwargs.items() if key not in more}
            return super()._get_per_token_logps_and_entropies(*args, **known)

        def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
            score = self._get_per_token_logps_and_entropies
            try:
                setattr(self, SCORE, lambda *a, **k: score(*a, **{**k, **more}))
                return super()._compute_loss(model, inputs)
            finally:
                setattr(self, SCORE, score)

    training.__class__ = WithMoreInputs
    influence = EntropyInfluence(1, HELD_OUT).attach(training)
    with pytest.warns(UserWarning, match=f"step 1 is not attributed: .*{name} went into the trainer's forward"):
        training.train()
    assert not influence.history
