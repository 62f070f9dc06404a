"""Sums over regions of tokens and over sources in the log of a training run, with the errors of the sums."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.present import present
from helpers.tolerances import TINY_POLICY, rounding_bound
from helpers.trl_runs import PREFIX, assert_logged, measure_training

import fx_influence as fx
from benchmarks.trl.variants import PROMPTS
from fx_influence.interop.live import measurement
from fx_influence.interop.live.metrics import MAX_SOURCES, REGION_METRICS, LogSelection
from fx_influence.labels import REGIONS, Labels

# The warnings that trl, transformers and accelerate give about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]

SOURCE_OF = dict(zip(PROMPTS, ["a", "b", None, "a", "c/d", "b"], strict=True))
"""Data sources by prompt; one prompt has none."""


def name_sources(training: Any) -> None:
    """Give the data set a column of sources."""
    rows = [{"prompt": prompt, "data_source": source} for prompt, source in SOURCE_OF.items()]
    training.train_dataset = Dataset.from_list(rows)


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[fx.Influence]:
    """Return the results of the steps that are measured from now on."""
    outs: list[fx.Influence] = []

    def record(*args: Any, **options: Any) -> fx.Influence:
        outs.append(fx.influence(*args, **options))
        return outs[-1]

    monkeypatch.setattr(measurement, "influence", record)
    return outs


def regions_by_hand(run: Any) -> torch.Tensor:
    """Return the region of each completion token of a stored step, row by row: 0 to 3, 4 without an advantage."""
    tokens = []
    for i, rollout in enumerate(run.update_rollouts):
        start = len(rollout.prompt_ids)
        for k in range(start, start + len(rollout.completion_ids)):
            likely = run.tokens["logprobs"][i, k] > -run.tokens["entropies"][i, k]
            sign = 0 if rollout.advantage > 0 else 2 if rollout.advantage < 0 else 4
            tokens.append(sign if sign == 4 else sign + (not likely))
    return torch.tensor(tokens)


def test_log_has_regions_and_sources_of_the_step(tmp_path: Path, results: list[fx.Influence]) -> None:
    """The log has the result's sums over labels made by hand from the stored step, and a partition adds up."""
    measured = measure_training(
        tmp_path, 2, prepare=name_sources, settings={"eval_prompts": "batch"}, per_device_train_batch_size=15
    )
    assert not measured.warnings
    logged = [entry for entry in measured.trainer.state.log_history if PREFIX + "total" in entry]
    for entry, metrics, out in zip(logged, measured.history, results, strict=True):
        assert_logged(entry, metrics)
        run = fx.load_run(tmp_path / "entropy_influence" / f"step_{int(metrics['step']):06d}")
        size = metrics["lr"] * float(out.per_sequence.abs().sum())
        bound = rounding_bound(torch.float32, TINY_POLICY, size)
        lr, by_hand = metrics["lr"], regions_by_hand(run)
        tokens = present(out.per_token)
        index = torch.full(tokens.shape, -1)
        index[present(present(out.deviations).by_label).labels >= 0] = by_hand
        sums = out.sums(Labels(index, REGIONS))
        for k, name in enumerate(REGION_METRICS):
            assert metrics[name] == pytest.approx(lr * float(sums.influence[k]))
            # A region without tokens has no error.
            expected = lr * float(sums.stderr[k]) if sums.count[k] else math.nan
            assert metrics.get(f"{name}_stderr", math.nan) == pytest.approx(expected, nan_ok=True)
        assert abs(sum(metrics[name] for name in REGION_METRICS) - metrics["rollouts"]) < bound
        sources = [SOURCE_OF[r.prompt] for r in run.update_rollouts]
        assert [r.source for r in run.update_rollouts] == sources
        assert [record.get("source") for record in run.sequences] == sources
        for name in {source or "unknown" for source in sources}:
            rows = torch.tensor([(source or "unknown") == name for source in sources])
            of_rows = out.sums(torch.where(rows, 0, -1))
            assert metrics[f"source/{name}"] == pytest.approx(lr * float(of_rows.influence))
            assert metrics[f"source_stderr/{name}"] == pytest.approx(lr * float(of_rows.stderr))
        in_history = [name for name in metrics if name.startswith("source/")]
        assert len(in_history) == len({source or "unknown" for source in sources})
        assert abs(sum(metrics[name] for name in in_history) - metrics["rollouts"]) < bound


@pytest.mark.slow
def test_regions_without_errors_on_request(tmp_path: Path) -> None:
    plain, matrix = (
        measure_training(tmp_path / str(k), 1, settings=settings).history[0]
        for k, settings in enumerate(({"region_stderr": False}, {"matrix": True}))
    )
    for metrics in (plain, matrix):
        assert all(math.isfinite(metrics[name]) for name in REGION_METRICS)
        assert not any(f"{name}_stderr" in metrics for name in REGION_METRICS)


def step(**sources: float) -> dict[str, float]:
    """Return the metrics of a step with these sources."""
    names = ("total", "stderr", "measured", "self_influence", "momentum", "rollouts", "entropy", "conditioning", "lr")
    regions = [name + end for name in REGION_METRICS for end in ("", "_stderr")]
    metrics = dict.fromkeys([*names, *regions], 1.0)
    for name, value in sources.items():
        metrics |= {f"source/{name}": value, f"source_stderr/{name}": 0.1}
    return metrics


def test_log_selection_takes_sixteen_and_keeps_sources() -> None:
    selection = LogSelection()
    first = selection.of_step(step(b=1.0))
    assert len(first) == 16
    assert {"source/b", "source_stderr/b", "momentum", "rollouts"} <= set(first)
    second = selection.of_step(step(c=3.0, a=2.0, b=1.0))
    assert [name for name in second if "/" in name] == ["source/b", "source_stderr/b", "source/c", "source_stderr/c"]
    assert len(second) == 16
    assert "momentum" not in second
    third = selection.of_step(step(a=1.0))
    assert set(third) == {name for name in second if "/" not in name}
    assert len(LogSelection().of_step(step())) == 16


@pytest.mark.slow
def test_metrics_have_the_strongest_of_many_sources(tmp_path: Path, results: list[fx.Influence]) -> None:
    """Each prompt has a source of its own, more than there are places: the strongest have metrics."""

    def name_each(training: Any) -> None:
        training.train_dataset = Dataset.from_list([{"prompt": f"{k}=", "source": f"s{k}"} for k in range(20)])

    size = MAX_SOURCES + 2
    history = measure_training(
        tmp_path, 1, prepare=name_each, per_device_train_batch_size=2 * size, num_generations=2
    ).history
    names = [name.removeprefix("source/") for name in history[0] if name.startswith("source/")]
    assert len(names) == MAX_SOURCES
    run = fx.load_run(tmp_path / "entropy_influence" / "step_000001")
    shares: dict[str, float] = {}
    for rollout, value in zip(run.update_rollouts, results[0].per_sequence.abs().tolist(), strict=True):
        shares[present(rollout.source)] = shares.get(present(rollout.source), 0.0) + value
    assert names == sorted(shares, key=lambda name: -shares[name])[:MAX_SOURCES]
