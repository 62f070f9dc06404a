"""Vision-language policies: the images of a step's rollouts go into every pass, or attachment is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_on_ranks
from helpers.tolerances import TINY_POLICY, rounding_bound
from helpers.trl_runs import HELD_OUT, PREFIX, assert_trains_like, warnings_about_steps
from helpers.vlm_trainers import image_trainer

import fx_influence as fx
from benchmarks.trl.bench_trl_steps import Errors
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.interop.trl.prompts import check_images_measurable

# The warnings that trl, transformers and accelerate give about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]

cases = pytest.mark.parametrize(
    ("family", "place"), [("llava", "column"), ("llava", "messages"), ("qwen2_vl", "column")]
)


@pytest.mark.slow
@cases
def test_captured_rollouts_with_images_add_up(family: str, place: str, tmp_path: Path) -> None:
    training = image_trainer(family, place, str(tmp_path), learning_rate=0.02)
    errors = Errors(training)
    training.train()
    assert max(errors.gradient) <= rounding_bound(torch.float32, TINY_POLICY)
    # Weights of 20 move by 0.02.
    assert max(errors.step) <= rounding_bound(torch.float32, 1, 1e4)


@pytest.mark.slow
@cases
def test_rollouts_with_images_are_measured(family: str, place: str, tmp_path: Path) -> None:
    """Two prompts of equal text stay two prompts, and no bit of the training changes."""
    options = {
        "learning_rate": 1e-2,
        "adam_epsilon": 1e2,
        "max_grad_norm": 0.0,
        "gradient_accumulation_steps": 3,
        "per_device_train_batch_size": 5,
    }
    training = image_trainer(family, place, str(tmp_path / "measured"), 3, **options)
    influence = EntropyInfluence(1).attach(training)
    assert not warnings_about_steps(training.train)
    assert len(influence.history) == 3
    for metrics in influence.history:
        assert metrics["unattributed"] == 0
    assert abs(metrics["measured"] - metrics["total"]) <= 4 * metrics["unexplained_stderr"]
    assert_trains_like(training, lambda: image_trainer(family, place, str(tmp_path / "plain"), 3, **options))
    run = fx.load_run(tmp_path / "measured" / "entropy_influence" / "step_000003")
    assert sorted(r.group for r in run.update_rollouts) == sorted([0, 1, 2, 3, 4] * 3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_two_ranks_with_images_measure_as_one_process(family: str, tmp_path: Path) -> None:
    results = run_on_ranks(2, "ranks_trl_images.py", tmp_path, family)
    assert results[0]["history"] == results[1]["history"]
    bound = rounding_bound(torch.float32, TINY_POLICY)
    for result in results:
        plain, weights = result["weights"]
        assert all(torch.equal(plain[name], weights[name]) for name in plain)
        plain, log = result["log"]
        assert [{name: x for name, x in e.items() if not name.startswith(PREFIX)} for e in log] == plain
        # Coefficients and images of all ranks' rollouts give the averaged gradient.
        assert result["gradient"] <= bound
        assert [max(gaps.values()) <= bound for gaps in result["gaps"]] == [True] * 2
        assert [metrics["unattributed"] for metrics in result["history"]] == [0, 0]
    run = fx.load_run(tmp_path / "measured" / "0" / "entropy_influence" / "step_000002")
    assert sorted(rollout.group or 0 for rollout in run.update_rollouts) == sorted([0, 1, 2, 3, 4] * 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_prompts": HELD_OUT}, "E is 3 held-out prompts and rollouts show images.*Pass eval_prompts='batch'"),
        ({"matrix": True}, "matrix is True and rollouts show images.*Leave the matrix out"),
    ],
    ids=["held-out", "matrix"],
)
def test_attach_refuses_images_where_no_pass_has_them(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    training = image_trainer("llava", "column", str(tmp_path))
    with pytest.raises(ValueError, match=message):
        EntropyInfluence(1, **settings).attach(training)


def test_attach_refuses_images_of_a_sharded_model(tmp_path: Path) -> None:
    training = image_trainer("llava", "column", str(tmp_path))
    training.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="FSDP shards the model and rollouts show images"):
        check_images_measurable(training, None, False)
