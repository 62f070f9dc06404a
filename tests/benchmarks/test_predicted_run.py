"""The training run of a chat model that is predicted step by step, and the figures of its predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding
from peft import LoraConfig, get_peft_model
from scipy.stats import t as student
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.real.frozen_layers import trainable_end
from benchmarks.real.language_model import tiny_model
from benchmarks.real.predicted_run import MEASURED, Settings, prompts_of_step, stored_steps, train
from benchmarks.real.prediction_figures import (
    averaged,
    averaged_rows,
    coverage,
    figures_of,
    in_windows,
    jackknife,
    measured_rows,
    measurement_rows,
    regression,
)
from benchmarks.real.tasks import by_length, tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def settings(model: Path, steps: int) -> Settings:
    return Settings(model, (1,), 1e-3, by_length, tasks("train"), tasks("eval"), steps, tokens=3, evaluated=3)


class Layers(NamedTuple):
    """A model with adapters in its last layer, that layer alone on top of the others, and rows of tokens."""

    model: Any
    end: Any
    ids: Tensor


@pytest.fixture
def layers(folder: Path) -> Layers:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
    model = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    ids = torch.randint(3, 200, (3, 7), generator=generator)
    return Layers(model, trainable_end(model.get_base_model(), 1), ids)


def test_trainable_end_is_the_model(layers: Layers) -> None:
    """Logits and gradients agree on rows padded on the right, whose padding no token of theirs sees."""
    mask = torch.ones_like(layers.ids, dtype=torch.bool)
    mask[1, 5:] = False
    logits = [m(input_ids=layers.ids, attention_mask=mask.long()).logits[mask] for m in (layers.model, layers.end)]
    assert_close_to_rounding(logits[1], logits[0], terms=TINY_POLICY)
    trained = [[p for p in m.parameters() if p.requires_grad] for m in (layers.model, layers.end)]
    assert [p.data_ptr() for p in trained[0]] == [p.data_ptr() for p in trained[1]]
    gradients = [torch.autograd.grad(x.square().sum(), p) for x, p in zip(logits, trained, strict=True)]
    for result, expected in zip(gradients[1], gradients[0], strict=True):
        assert_close_to_rounding(result, expected, terms=TINY_POLICY)


def test_frozen_layers_compute_a_row_once(layers: Layers) -> None:
    rows: list[int] = []
    first = layers.model.get_base_model().model.layers[0]
    first.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    frozen = layers.end.get_input_embeddings()
    first_states = frozen(layers.ids[:2])
    states = frozen(layers.ids)
    assert rows == [2, 1]
    assert torch.equal(states[:2], first_states)
    frozen.forget()
    frozen(layers.ids)
    assert rows == [2, 1, 3]


def test_run_continues_where_it_was_stopped(folder: Path, tmp_path: Path) -> None:
    interrupted = tmp_path / "interrupted"
    train(interrupted, settings(folder, 1))
    figures = [train(x, settings(folder, 2)) for x in (interrupted, tmp_path / "whole")]
    seconds = [[step.pop("seconds") for step in steps] for steps in figures]
    assert figures[0] == figures[1]
    assert len(seconds[0]) == 2
    assert len(stored_steps(interrupted)) == 2
    for step in figures[0]:
        # The loss of torch has the gradient that the coefficients say.
        assert abs(step["predicted"]["unattributed"]) < 1e-3 * step["predicted"]["total_stderr"]
    assert set(figures[0][1]["measured"]) == set(MEASURED)


def test_prompts_of_steps_do_not_repeat(folder: Path) -> None:
    steps = [prompts_of_step(settings(folder, 10), step) for step in range(1, 11)]
    held_out = [prompt.id for _, e, others in steps for prompt in (*e, *others)]
    assert len(set(held_out)) == len(held_out) == 60
    assert len({prompt.id for u, _, _ in steps for prompt in u}) == 40


def rows(errors: list[float]) -> list[dict[str, Any]]:
    """Return predictions 1, 2, ... whose measured changes have these errors, both error bars 3 and 4."""
    return [
        {
            **dict.fromkeys(("momentum", "weight_decay", "rollouts"), 0.0),
            "total": float(k),
            "total_stderr": 3.0,
            "realised": k + error,
            "realised_stderr": 4.0,
            "stderrs": [3.0, 4.0],
            "degrees": [7.0, 15.0],
        }
        for k, error in enumerate(errors, 1)
    ]


def test_expected_r2_is_reached_by_errors_as_large_as_bars() -> None:
    figures = figures_of(rows([5.0, -5.0, 5.0, -5.0]), lr=1.0)
    assert figures["spread"] == pytest.approx(1.0)
    assert figures["r2"]["mean"] == pytest.approx(figures["expected"])


def test_coverage_is_by_students_t() -> None:
    # By Welch and Satterthwaite, (9 + 16)^2 / (81 / 7 + 256 / 15).
    degrees = 625 / (81 / 7 + 256 / 15)
    width = 5 * student.ppf(0.975, degrees)
    assert coverage(rows([0.999 * width, -1.001 * width])) == 0.5


def test_windows_add_up_changes_and_variances() -> None:
    first, second = in_windows(rows([1.0, 2.0, 3.0, 4.0, 5.0]), 2)
    assert (first["total"], first["realised"]) == (3.0, 6.0)
    assert (second["total"], second["realised"]) == (7.0, 14.0)
    assert (first["total_stderr"], first["realised_stderr"]) == pytest.approx((18**0.5, 32**0.5))
    assert (first["stderrs"], first["degrees"]) == ([3.0, 4.0, 3.0, 4.0], [7.0, 15.0, 7.0, 15.0])


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.array([1.0, 4.0, 2.0, 8.0, 5.0])
    interval = jackknife(5, lambda chosen: float(values[list(chosen)].mean()))
    width = student.ppf(0.975, 4) * values.std(ddof=1) / 5**0.5
    assert interval == {"mean": pytest.approx(4.0), "half_width": pytest.approx(width)}


def test_averages_are_adamws() -> None:
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer, values, expected = torch.optim.AdamW([p]), np.array([3.0, -1.0, 2.0]), []
    for step, value in enumerate(values, 1):
        p.grad = torch.full_like(p, value)
        optimizer.step()
        expected.append(optimizer.state[p]["exp_avg"].item() / (1 - 0.9**step))
    assert averaged(values) == pytest.approx(expected)


def test_regression_takes_the_best_slope() -> None:
    predicted, measured = np.array([1.0, 2.0, -1.0, -2.0]), np.array([2.0, 4.0, -2.0, -4.0])
    exact = regression(predicted, measured)
    assert (exact["slope"], exact["r2"], exact["correlation"]["mean"]) == pytest.approx((2.0, 1.0, 1.0))
    # An error that is orthogonal to the prediction: 4 of the variance of 10 + 4.
    error = np.array([2.0, -1.0, 2.0, -1.0]) * (4 / 2.5) ** 0.5
    assert regression(predicted, measured + error)["slope"] == pytest.approx(2.0)


def test_predictions_on_other_prompts_are_of_either_kind() -> None:
    """The prediction is 9; the change is 0 on E itself, 1 on fresh rollouts of its prompts, and 2 on other prompts."""
    predicted = {"total": 9.0, "total_stderr": 9.0, "momentum": 0.0, "weight_decay": 0.0, "rollouts": 0.0}
    measured = {
        name: {"delta_h": float(k), "stderr": k + 0.5, "degrees_of_freedom": 15.0} for k, name in enumerate(MEASURED)
    }
    step = {"step": 1, "predicted": {**predicted, "degrees_of_freedom": 7.0}, "measured": measured}
    [by_prediction], [by_measurement] = measured_rows([step], "other"), measurement_rows([step])
    assert (by_prediction["total"], by_prediction["realised"], by_prediction["degrees"]) == (9.0, 2.0, [7.0, 15.0])
    assert (by_measurement["total"], by_measurement["realised"]) == (1.0, 2.0)
    [by_both] = averaged_rows([step])
    assert (by_both["total"], by_both["realised"]) == (5.0, 2.0)
    assert (by_measurement["stderrs"], by_measurement["degrees"]) == ([1.5, 2.5], [15.0, 15.0])
