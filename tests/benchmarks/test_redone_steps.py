"""A step of a training state redone without rollouts, by which predictors are compared, and their table."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.evidence.counterfactual_tables import KINDS, SIGNLESS
from benchmarks.harness import result_path, write_json
from benchmarks.real import bench_real_counterfactual_states
from benchmarks.real.bench_real_estimators import CROSS_FITTED, DIRECT, FRESH
from benchmarks.real.language_model import tiny_model
from benchmarks.real.predicted_run import (
    COMPLETIONS,
    Settings,
    initial_policy,
    load_state,
    predicted_step,
    state_file,
    train,
    unpredicted_step,
)
from benchmarks.real.predictor_tables import NEEDS, by_predictor, by_state, predictors
from benchmarks.real.redone_steps import CHANGES, PREDICTIONS, figures_of, measure, with_unequal_rewards
from benchmarks.real.tasks import by_length, tasks

PROMPTS, HALVES = 4, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def settings(model: Path, weights: Any = "lora", steps: int = 1, **changed: Any) -> Settings:
    made = Settings(model, (1,), 1e-3, by_length, tasks("train"), tasks("eval"), steps, 3, 3, weights)
    return made._replace(**changed)


class Measured(NamedTuple):
    """A measured state after a step, and the folders of its training run and of its figures."""

    settings: Settings
    run: Path
    folder: Path


@pytest.fixture(scope="module")
def measured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    run = tmp_path_factory.mktemp("run")
    x = Measured(settings(model, "full"), run, run / "redone")
    train(run, x.settings, unpredicted_step, [1])
    policy = initial_policy(x.settings)
    load_state(policy, state_file(run, 1))
    measure(policy, x.settings, 2, x.folder, PROMPTS, HALVES)
    return x


def test_full_run_moves_all_weights_of_its_layers_alone(model: Path) -> None:
    policy = initial_policy(settings(model, "full"))
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    unpredicted_step(policy, settings(model, "full"), 1)
    moved = {name for name, p in policy.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.startswith("model.layers.1.")}
    assert len(policy.parameters()) == len(moved)


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_step_is_the_same_without_prediction(model: Path, weights: str) -> None:
    policies = [initial_policy(settings(model, weights)) for _ in range(2)]
    for policy, make_step in zip(policies, (predicted_step, unpredicted_step), strict=True):
        make_step(policy, settings(model, weights), 1)
    first, second = (policy.parameters() for policy in policies)
    assert all(torch.equal(p, second[name]) for name, p in first.items())


def test_stored_state_leads_to_the_next_step(model: Path, tmp_path: Path) -> None:
    train(tmp_path, settings(model, steps=2), unpredicted_step, [1, 2])
    policy, expected = (initial_policy(settings(model)) for _ in range(2))
    assert load_state(policy, state_file(tmp_path, 1)) == 1
    unpredicted_step(policy, settings(model), 2)
    assert load_state(expected, state_file(tmp_path, 2)) == 2
    assert all(torch.equal(p, policy.parameters()[name]) for name, p in expected.parameters().items())


def test_rollouts_of_u_have_a_loss(model: Path) -> None:
    policy = initial_policy(settings(model))
    rollouts = with_unequal_rewards(policy, settings(model), 2, PROMPTS)
    groups = [r.group for r in rollouts]
    assert [groups.count(group) for group in dict.fromkeys(groups)] == [COMPLETIONS] * PROMPTS
    assert {r.group for r in rollouts if r.advantage} == set(groups)


def test_prompts_of_equal_rewards_are_refused(model: Path) -> None:
    equal = settings(model, reward=lambda completions, **columns: [1.0] * len(completions), train=tasks("train")[:4])
    with pytest.raises(ValueError, match="prompts with unequal rewards are 0 of 4; expected 4"):
        with_unequal_rewards(initial_policy(equal), equal, 2, 4)


def test_measured_state_is_not_measured_again(measured: Measured, tmp_path: Path) -> None:
    """Figures that are missing are made again and equal those that were there; marks on all others stay."""
    folder = tmp_path / "redone"
    shutil.copytree(measured.folder, folder)
    figures, stored, rows = figures_of(folder, 2), read(folder / PREDICTIONS), read(folder / CHANGES)["changes"]
    assert len(rows) == PROMPTS * COMPLETIONS + HALVES + 1
    marked = {**stored, "entropy": 9.0}
    missing = {**marked, CROSS_FITTED: {k: x for k, x in marked[CROSS_FITTED].items() if k != DIRECT}}
    write_json(folder / PREDICTIONS, missing)
    write_json(folder / CHANGES, {"changes": [[9.0] * 3, *rows[1:-1]]})
    assert figures_of(folder, 2) is None
    policy = initial_policy(measured.settings)
    load_state(policy, state_file(measured.run, 1))
    measure(policy, measured.settings, 2, folder, PROMPTS, HALVES)
    assert read(folder / CHANGES)["changes"] == [[9.0] * 3, *rows[1:]]
    assert without_seconds(read(folder / PREDICTIONS)) == without_seconds(marked)
    write_json(folder / PREDICTIONS, stored)
    write_json(folder / CHANGES, {"changes": rows})
    assert figures_of(folder, 2) == figures


def read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def without_seconds(made: dict[str, Any]) -> dict[str, Any]:
    by_kind = {kind: {name: {**x, "seconds": 0} for name, x in made[kind].items()} for kind in (FRESH, CROSS_FITTED)}
    return {**made, **by_kind}


def test_every_predictor_has_a_row(measured: Measured) -> None:
    figures = figures_of(measured.folder, 2)
    assert figures is not None
    assert set(figures["size"]) == set(NEEDS)
    assert set(figures["loo"]) == set(figures["lds"]) == {*NEEDS, "ceiling"} - set(SIGNLESS)


def test_effects_are_of_the_rollouts_left_out(measured: Measured, tmp_path: Path) -> None:
    """The steps without each rollout come first, so that changes in the order of the predictions rank perfectly."""
    made = read(measured.folder / PREDICTIONS)
    share = made["predictions"]["share"]
    halves = [sum(share[k] for k in half) for half in chosen_halves(len(share))]
    changes = [[1.0 - x] * 2 for x in share] + [[x] * 2 for x in halves] + [[1.0] * 2]
    write_json(tmp_path / PREDICTIONS, made)
    write_json(tmp_path / CHANGES, {"changes": changes})
    figures = figures_of(tmp_path, 2)
    assert figures is not None
    assert figures["loo"]["share"] == figures["lds"]["share"] == figures["size"]["share"] == pytest.approx(1.0)


def chosen_halves(n: int) -> list[list[int]]:
    """Return the rollouts in each random half, by the documented source of the draw."""
    rng = random.Random(0)
    return [rng.sample(range(n), n // 2) for _ in range(HALVES)]


def state(**loo: float) -> dict[str, Any]:
    return {"step": 2, "delta_h": -1.0, "effect": 2.0, "effect_stderr": 0.5, **dict.fromkeys(KINDS, loo)}


def test_summary_compares_predictors_within_states() -> None:
    """Leads of 0.1 and 0.3 have a narrower interval than the correlations; states without a predictor do not count."""
    states = [
        state(share=0.9, sgd=0.8, ceiling=1.0),
        state(share=0.5, sgd=0.2, ceiling=0.8),
        state(share=0.1, ceiling=0.6),
    ]
    rows = {row["predictor"]: row["loo"] for row in predictors([{"found": states[:2]}, {"found": states[2:]}])}
    assert (rows["share"]["states"], rows["sgd"]["states"]) == (3, 2)
    assert rows["share"]["mean"]["mean"] == pytest.approx(0.5)
    assert rows["share"]["of_ceiling"] == pytest.approx(0.5 / 0.8)
    assert rows["sgd"]["of_ceiling"] == pytest.approx(0.5 / 0.9)
    # Student's t of one degree of freedom is 12.7.
    assert rows["sgd"]["lead"] == {"mean": pytest.approx(-0.2), "half_width": pytest.approx(12.706 * 0.1, rel=1e-4)}
    assert set(rows) == {"share", "sgd", "ceiling"}


def test_tables_name_states_and_predictors() -> None:
    run = {"policy": "LoRA", "lr": 0.5, "found": [state(share=0.9, sgd=-0.25, ceiling=1.0)]}
    earlier = {"policy": "earlier", "lr": 2.0, "found": [state(share=0.5, ceiling=1.0)]}
    report = {"runs": [run], "earlier": [earlier], "predictors": predictors([run])}
    cells = "-0.25 | -1.15 | -25%"
    assert f"| plain SGD | fresh rollouts | {cells} | {cells} | -0.25 |" in by_predictor(report)
    assert "| frozen | +0.90 | +0.90 | +0.50 | +0.50 |" in by_predictor(report)
    assert "| leaving one out | LoRA, lr 0.5, step 2 | earlier, lr 2, step 2 |" in by_state(report)
    assert "| plain SGD | -0.25 |  |" in by_state(report)


def test_states_of_all_layers_are_the_stored_ones() -> None:
    stored = read(result_path(bench_real_counterfactual_states.NAME))
    assert stored["earlier"] == [bench_real_counterfactual_states.all_layers_run()], "run it with --collect"
