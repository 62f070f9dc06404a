"""The ledger that a training run leaves: its figures are the metrics, its sums add up, and it goes on when resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tolerances import assert_close_to_rounding
from helpers.trl_runs import HELD_OUT, PLAIN, measure_training

import fx_influence as fx
from benchmarks.trl.variants import Variant, trainer
from fx_influence.interop.ledger.file import LEDGER
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.lab.training.account import account
from fx_influence.labels import REGIONS

# The warnings that trl, transformers and accelerate give about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]


def test_ledger_holds_the_metrics_of_every_step(tmp_path: Path) -> None:
    """Over two steps, and from the directory of steps alone: figures, sums, strongest rollouts, account."""
    measured = measure_training(tmp_path, 2)
    training = fx.load_training(tmp_path / "entropy_influence")
    assert training.steps["step"].tolist() == [1, 2]
    assert training.settings == {"preconditioner": "frozen", "normalize": "token"}
    for k, metrics in enumerate(measured.history):
        for name in ("total", "stderr", "measured", "momentum", "rollouts", "entropy", "lr", "ess", "step_rounding"):
            assert training.steps[name][k] == metrics[name]
        sums = {kind: training.labels["influence"][rows_of(training, k + 1, kind)].sum() for kind in training.kinds}
        assert {"region", "third", "band", "advantage", "end", "reward"} <= set(sums)
        for kind, total in sums.items():
            rounded: dict[str, Any] = {
                "terms": 1000,
                "dtype": torch.float32,
                "scale": 10 * training.steps["absolute"][k],
            }
            assert_close_to_rounding(total, metrics["rollouts"], name=kind, **rounded)
        rows = rows_of(training, k + 1, "region")
        named = dict(zip(training.labels["label"][rows], training.labels["influence"][rows], strict=True))
        assert {name: x for name, x in named.items() if name == "A<0 unlikely"} in (
            {"A<0 unlikely": metrics["negative_unlikely"]},
            {},
        )
        assert set(named) <= set(REGIONS)
        stored = fx.load_run(training.path / f"step_{k + 1:06d}")
        assert training.steps["reward"][k] == pytest.approx(stored.summary["update_mean_reward"])
        lengths = [record["completion_length"] for record in stored.sequences]
        assert training.steps["length"][k] == np.mean(lengths)
        assert training.steps["truncated"][k] == np.mean([not record["finished"] for record in stored.sequences])
        largest = max(stored.sequences, key=lambda record: record["influence"])
        first = next(x for x in training.strongest if x["step"] == k + 1)
        assert (first["id"], first["influence"]) == (largest["id"], metrics["lr"] * largest["influence"])
    summed = account(training)
    bound: dict[str, Any] = {"terms": 1000, "dtype": torch.float32, "scale": training.steps["absolute"].sum()}
    assert_close_to_rounding(sum(term.value for term in summed.terms), summed.predicted.value, **bound)


def rows_of(training: fx.lab.Training, step: int, kind: str) -> np.ndarray:
    return (training.labels["step"] == step) & (training.labels["kind"] == kind)


@pytest.mark.slow
def test_clip_fraction_counts_the_tokens_that_the_loss_cuts(tmp_path: Path) -> None:
    """The range is so narrow that ratios of an older policy leave it; under a KL term the share is not known."""
    options = {"epsilon": 1e-6, "epsilon_high": 1e-6}
    measure_training(tmp_path / "clipped", 3, Variant("grpo", False, 1, True, options), learning_rate=1e-3)
    training = fx.load_training(tmp_path / "clipped" / "entropy_influence")
    for step, share in zip(training.steps["step"], training.steps["clip_fraction"], strict=True):
        stored = fx.load_run(training.path / f"step_{step:06d}")
        cut = [c == 0 for r in stored.update_rollouts if r.advantage for c in r.coefficients or ()]
        assert share == np.mean(cut)
    assert training.steps["clip_fraction"].max() > 0.2
    measure_training(tmp_path / "kl", 1, Variant("grpo", False, 1, False, {"beta": 0.1}))
    assert np.isnan(fx.load_training(tmp_path / "kl" / "entropy_influence").steps["clip_fraction"]).all()


@pytest.mark.slow
def test_resumed_training_continues_its_ledger(tmp_path: Path) -> None:
    """Its directories of steps may have been deleted: the ledger's id tells whose it is."""
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_only_model": False}

    def train(steps: int, resume: str | None = None) -> None:
        training = trainer(PLAIN, str(tmp_path), steps, **saving)
        EntropyInfluence(1, HELD_OUT, completions_per_prompt=1).attach(training)
        training.train(resume_from_checkpoint=resume)

    train(3)
    directory = tmp_path / "entropy_influence"
    before = [json.loads(line) for line in (directory / LEDGER).read_text().splitlines()]
    for folder in directory.glob("step_*"):
        shutil.rmtree(folder)
    train(2, str(tmp_path / "checkpoint-1"))
    assert not (tmp_path / "entropy_influence_2").exists()
    lines = [json.loads(line) for line in (directory / LEDGER).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 2]
    assert len({line["training"] for line in lines}) == 1
    training = fx.load_training(directory)
    assert training.steps["step"].tolist() == [1, 2]
    assert training.steps["total"].tolist() == [before[0]["figures"]["total"], lines[3]["figures"]["total"]]
