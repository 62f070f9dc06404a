"""Plans: values that round-trip through YAML and refuse what cannot be run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fx_influence.lab.plan import EntropyInfluencePlan, PlanError, SampledBatch, demo_path, plan_text, read_plan


def test_a_plan_round_trips_through_yaml(tmp_path: Path) -> None:
    plan = EntropyInfluencePlan(
        checkpoint=str(tmp_path / "c"),
        reward="m:f",
        loss="prompt_max",
        max_grad_norm=None,
        update=SampledBatch(str(tmp_path / "u.jsonl"), num_prompts=None, completions_per_prompt=3),
        evaluations=(SampledBatch(str(tmp_path / "a.txt"), 2, 5), SampledBatch("demo/eval", 1, 1)),
        eta_multiples=(0.5, 2.0),
        seed=7,
    )
    (tmp_path / "plan.yaml").write_text(plan_text(plan))
    assert read_plan(tmp_path / "plan.yaml") == plan


def test_paths_in_a_plan_file_are_relative_to_the_file(tmp_path: Path) -> None:
    text = yaml.safe_dump({"checkpoint": "runs/step-7", "update": {"prompts": "p.txt"}, "base": "../base"})
    (tmp_path / "plan.yaml").write_text(text)
    plan = read_plan(tmp_path / "plan.yaml")
    assert plan.checkpoint == str(tmp_path / "runs/step-7")
    assert plan.update.prompts == str(tmp_path / "p.txt")
    assert plan.base == str(tmp_path.parent / "base")
    assert plan.evaluations[0].prompts == "demo/eval"


def test_an_empty_plan_is_the_embedded_default(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("")
    plan = read_plan(tmp_path / "plan.yaml")
    assert plan == EntropyInfluencePlan()
    assert (plan.update.num_prompts, plan.update.completions_per_prompt) == (16, 8)
    assert [(e.num_prompts, e.completions_per_prompt) for e in plan.evaluations] == [(64, 4)]
    for name in (plan.checkpoint, plan.update.prompts, plan.evaluations[0].prompts):
        assert Path(demo_path(name)).exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, r"sed is 1: Unexpected .* fields are .*seed"),
        ({"seed": "x"}, r"seed is 'x'"),
        ({"loss": "ppo"}, r"loss is 'ppo': .*'dr_grpo'"),
        ({"update": {"prompts": "p.txt", "n": 1}}, r"update\.n is 1"),
        ({"update": {"num_prompts": 3}}, r"update\.prompts .* required"),
        ({"update": {"prompts": "p.txt", "completions_per_prompt": 0}}, r"update is None prompts x 0; use at least 1"),
        ({"evaluations": []}, r"evaluations is empty; name at least one"),
        ({"evaluations": [{"prompts": "p", "resample_zero_advantage": 2}]}, r"resample_zero_advantage is 2; use 0"),
        ({"temperature": 0}, r"temperature is 0"),
        ({"eta_multiples": [1.0, -1.0]}, r"eta_multiples is \[1.0, -1.0\]; give positive"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm is 0.0; give the trainer's"),
        (["a list"], r"plan is \['a list'\]"),
    ],
)
def test_a_bad_plan_names_the_field_and_the_value(tmp_path: Path, values: object, message: str) -> None:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(PlanError, match=message):
        read_plan(tmp_path / "plan.yaml")


def test_a_missing_or_unreadable_plan_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"absent\.yaml' does not exist; check the path"):
        read_plan(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(PlanError, match=r"bad\.yaml' is not YAML"):
        read_plan(tmp_path / "bad.yaml")


def test_a_plan_constructs_no_python_objects(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("checkpoint: !!python/object/apply:os.getcwd []")
    with pytest.raises(PlanError, match="is not YAML"):
        read_plan(tmp_path / "plan.yaml")
