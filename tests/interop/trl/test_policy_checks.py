"""Completions and log-probabilities that are not the policy's end the measuring, not the training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trl_runs import HELD_OUT, PLAIN, assert_training_unchanged, measure_training
from torch import Tensor

from benchmarks.trl.variants import trainer
from fx_influence.interop.trl import EntropyInfluence

# The warnings that trl, transformers and accelerate give about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]


def sample_hotter(training: Any) -> None:
    """Set a temperature in the model's own generate, which no setting shows."""
    original = training.model.generate

    def generate(*args: Any, generation_config: Any, **kwargs: Any) -> Any:
        generation_config.temperature = 2.5
        return original(*args, generation_config=generation_config, **kwargs)

    training.model.generate = generate


def sample_elsewhere(training: Any) -> None:
    """Replace the completions by those of a sampler that returns no log-probabilities."""
    original = training._generate

    def generate(prompts: Any) -> Any:
        prompt_ids, completion_ids, *more = original(prompts)
        uniform = [torch.randint(2, 14, (6,)).tolist() for _ in completion_ids]
        return prompt_ids, uniform, *more

    training.model._get_logits_processor = None
    training.model.generate = lambda input_ids, **_: torch.cat([input_ids, torch.full((len(input_ids), 6), 2)], 1)
    training._generate = generate


@pytest.mark.slow
@pytest.mark.parametrize(
    ("replace_sampler", "message"),
    [(sample_hotter, "differ by .* nats a token"), (sample_elsewhere, "times likelier at .* times its temperature")],
)
def test_completions_of_another_policy_end_measuring(
    replace_sampler: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    training = trainer(PLAIN, str(tmp_path), 2)
    influence = EntropyInfluence(1, HELD_OUT * 8, completions_per_prompt=4).attach(training)
    replace_sampler(training)
    with pytest.warns(UserWarning, match=f"step 1 and those after it are not attributed: .*{message}"):
        training.train()
    assert training.state.global_step == 2
    assert not influence.history


def test_forward_that_is_not_the_policys_is_warned_of(tmp_path: Path) -> None:
    """A hook adds noise in training, which only the trainer's own forward has."""

    def add_noise(module: Any, _: Any, output: Tensor) -> Tensor | None:
        return output + torch.rand(output.shape) if module.training else None

    def hook(training: Any) -> None:
        training.model.get_input_embeddings().register_forward_hook(add_noise)

    measured = measure_training(tmp_path / "a", 1, prepare=hook)
    assert len(measured.warnings) == 1
    assert "Something else goes into the trainer's forward" in measured.warnings[0]
    assert not measured.history
    assert_training_unchanged(measured.trainer, tmp_path / "b", 1, hook)
