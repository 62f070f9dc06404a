"""Short TRL training runs of a tiny policy with every step measured, and comparisons between them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.trl.variants import Variant, trainer
from fx_influence.interop.live.metrics import REGION_METRICS
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.interop.trl.capture.recorder import METHODS

PLAIN = Variant("dapo", False, 1, False, {})
HELD_OUT = ["4+5=", "6=", "70+1="]
PREFIX = "entropy_influence/"
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time")
"""Names that a trainer logs and whose values differ between two equal training runs."""


class MeasuredTraining(NamedTuple):
    """A finished training run, its measurement, and its warnings about steps that are not attributed or measured."""

    trainer: Any
    influence: EntropyInfluence
    warnings: list[str]

    @property
    def history(self) -> list[dict[str, float]]:
        return self.influence.history


def leave_unchanged(training: Any) -> None:
    """Do nothing: the default of ``prepare``."""


def warnings_of(call: Callable[[], Any]) -> list[str]:
    """Return the texts of all warnings that a call makes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught]


def warnings_about_steps(call: Callable[[], Any]) -> list[str]:
    """Return the warnings of a call about steps that are not attributed or measured."""
    return [x for x in warnings_of(call) if "attributed" in x or "is measured" in x]


def measure_training(
    out: Path,
    steps: int = 2,
    variant: Variant = PLAIN,
    prepare: Callable[[Any], Any] = leave_unchanged,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> MeasuredTraining:
    """Train with every step measured.

    Args:
        out: the trainer's directory.
        steps: number of optimizer steps.
        variant: kind of training run.
        prepare: called with the trainer before the attachment.
        settings: of ``EntropyInfluence``, beside ``every=1``, ``HELD_OUT`` and two completions of each prompt.
        **options: of the trainer's config, and ``model``.
    """
    training = trainer(variant, str(out), steps, **options)
    prepare(training)
    influence = EntropyInfluence(
        **{"every": 1, "eval_prompts": HELD_OUT, "completions_per_prompt": 2, **(settings or {})}
    )

    def train() -> None:
        influence.attach(training)
        training.train()

    return MeasuredTraining(training, influence, warnings_about_steps(train))


def without_seconds(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return the metrics of measured steps that are equal in two equal training runs."""
    return [{name: x for name, x in metrics.items() if name != "seconds"} for metrics in history]


def trainers_own_log(training: Any) -> list[dict[str, Any]]:
    """Return what a trainer logged itself, without times."""
    return [
        {name: x for name, x in entry.items() if not name.startswith(PREFIX) and name not in TIMES}
        for entry in training.state.log_history
    ]


def weights_of(training: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in training.model.named_parameters()}


def assert_logged(entry: dict[str, Any], metrics: dict[str, float]) -> None:
    """Assert that an entry of a log has at most 16 of a step's metrics, the total and the regions among them."""
    logged = {name.removeprefix(PREFIX): value for name, value in entry.items() if name.startswith(PREFIX)}
    assert logged == {name: metrics[name] for name in logged}
    assert {"total", "stderr", "measured", *REGION_METRICS[:4]} <= set(logged)
    assert len(logged) <= 16


def assert_training_unchanged(
    measured: Any,
    out: Path,
    steps: int = 2,
    prepare: Callable[[Any], Any] = leave_unchanged,
    **options: Any,
) -> None:
    """Assert that measuring changes no bit of a training run: of its weights, its log or the random state."""

    def make_plain() -> Any:
        plain = trainer(PLAIN, str(out), steps, **options)
        prepare(plain)
        return plain

    assert_trains_like(measured, make_plain)


def assert_trains_like(measured: Any, make_plain: Callable[[], Any]) -> None:
    """Assert that a trainer that has just trained agrees with another one in weights, log and random state.

    Args:
        measured: the trainer that has trained.
        make_plain: returns the other one, which is trained here.
    """
    random_state = torch.get_rng_state()
    plain = make_plain()
    plain.train()
    weights, expected = weights_of(measured), weights_of(plain)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    # As text, because NaN differs from itself.
    assert str(trainers_own_log(measured)) == str(trainers_own_log(plain))
    assert torch.equal(random_state, torch.get_rng_state())


def assert_detached(training: Any) -> None:
    """Assert that no method of the trainer is wrapped."""
    assert not set(METHODS) & set(vars(training))
    assert "clip_grad_norm_" not in vars(training.accelerator)


def gpt2() -> GPT2LMHeadModel:
    """Return a GPT-2 of one layer, with its default dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.4}
        return GPT2LMHeadModel(GPT2Config(vocab_size=14, eos_token_id=1, bos_token_id=None, pad_token_id=0, **sizes))
