"""Plans: values that round-trip through YAML and refuse what cannot be run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from fx_influence.lab.plan import EntropyInfluencePlan, FisherKernelPlan, demo_path, plan_text, read_plan
from fx_influence.lab.requests import CustomSequence, PlanError, RolloutFile, SampledBatch


def test_a_plan_round_trips_through_yaml(tmp_path: Path) -> None:
    plan = EntropyInfluencePlan(
        checkpoint=str(tmp_path / "c"),
        reward="m:f",
        loss="prompt_max",
        max_grad_norm=None,
        update=SampledBatch(str(tmp_path / "u.jsonl"), num_prompts=None, completions_per_prompt=3),
        evaluations=(
            SampledBatch(str(tmp_path / "a.txt"), ("7", "x"), 2, 5, seed=11),
            SampledBatch(("1+1=", {"prompt": "2+2=", "id": "four", "answer": "4"}), num_prompts=1),
            SampledBatch(str(tmp_path / "a.parquet"), chat=True, system=""),
            SampledBatch(({"prompt": [{"role": "user", "content": "1+1?"}]},), system="Be brief."),
            CustomSequence("1+1=", "2", advantage=-0.5, end=False),
            RolloutFile(str(tmp_path / "r.jsonl")),
        ),
        directions=("grad", "full"),
        eta_multiples=(0.5, 2.0),
        scaled_eta_multiples=(),
        auto_scale=None,
        compare_float64=True,
        second_order_per_sequence=True,
        chunk_size=3,
        seed=7,
    )
    (tmp_path / "plan.yaml").write_text(plan_text(plan))
    assert read_plan(tmp_path / "plan.yaml", EntropyInfluencePlan) == plan


def test_a_plan_without_conversations_is_stored_as_before_there_were_any() -> None:
    """A run begun then is continued only by a plan of the same values, and found by the hash of its text."""
    plain = {"prompts": "p.txt", "prompt_ids": None, "num_prompts": None, "completions_per_prompt": 8}
    plain |= {"resample_zero_advantage": 0, "seed": None}
    stored = EntropyInfluencePlan(
        update=SampledBatch("p.txt"), evaluations=(SampledBatch("p.txt", chat=True),)
    ).to_dict()
    assert list(stored["update"].items()) == list(plain.items())
    assert stored["evaluations"] == [{**plain, "chat": True}]


def test_paths_in_a_plan_file_are_relative_to_the_file(tmp_path: Path) -> None:
    values = {"checkpoint": "runs/step-7", "update": {"prompts": "p.txt"}, "base": "../base"}
    values["evaluations"] = [{"prompts": "demo/eval"}, {"rollouts": "r.jsonl"}, {"prompts": ["p.txt"]}]
    text = yaml.safe_dump(values)
    (tmp_path / "plan.yaml").write_text(text)
    plan = read_plan(tmp_path / "plan.yaml", EntropyInfluencePlan)
    assert plan.checkpoint == str(tmp_path / "runs/step-7")
    assert plan.update.prompts == str(tmp_path / "p.txt")
    assert plan.base == str(tmp_path.parent / "base")
    assert plan.evaluations == (
        SampledBatch("demo/eval"),
        RolloutFile(str(tmp_path / "r.jsonl")),
        SampledBatch(("p.txt",)),
    )


def test_a_fisher_plan_round_trips_and_is_no_other_plan(tmp_path: Path) -> None:
    plan = FisherKernelPlan(update=RolloutFile(str(tmp_path / "u.jsonl")), preconditioner="identity", top=2)
    (tmp_path / "plan.yaml").write_text(plan_text(plan))
    assert read_plan(tmp_path / "plan.yaml", FisherKernelPlan) == plan
    with pytest.raises(PlanError, match=r"preconditioner is 'identity': Unexpected"):
        read_plan(tmp_path / "plan.yaml", EntropyInfluencePlan)
    (tmp_path / "bad.yaml").write_text("top: 0")
    with pytest.raises(PlanError, match="top is 0; name at least 1"):
        read_plan(tmp_path / "bad.yaml", FisherKernelPlan)


def test_an_empty_plan_is_the_embedded_default(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("")
    plan = read_plan(tmp_path / "plan.yaml", EntropyInfluencePlan)
    assert plan == EntropyInfluencePlan()
    assert (plan.update.num_prompts, plan.update.completions_per_prompt) == (16, 8)
    assert [(e.num_prompts, e.completions_per_prompt) for e in plan.evaluations] == [(64, 4)]
    for name in (plan.checkpoint, plan.update.prompts, plan.evaluations[0].prompts):
        assert Path(demo_path(name)).exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, r"sed is 1: Unexpected field; a plan's fields are .*seed"),
        ({"seed": "x"}, r"seed is 'x'"),
        ({"loss": "ppo"}, r"loss is 'ppo': .*'dr_grpo'"),
        ({"update": {"prompts": "p.txt", "n": 1}}, r"update\.n is 1"),
        ({"update": {"prompts": "p.txt", "chat": "user"}}, r"update\.chat is 'user'"),
        ({"update": {"prompts": "p.txt", "system": 3}}, r"update\.system is 3"),
        ({"update": {"prompt": "1+1=", "completion": "2", "chat": True}}, r"update\.chat is True: Unexpected"),
        ({"update": {"num_prompts": 3}}, r"update\.prompts .* required"),
        ({"update": {"prompts": "p.txt", "completions_per_prompt": 0}}, r"update is None prompts x 0; use at least 1"),
        ({"evaluations": []}, r"evaluations is empty; name at least one"),
        ({"evaluations": [{"prompts": "p", "resample_zero_advantage": 2}]}, r"resample_zero_advantage is 2; use 0"),
        ({"temperature": 0}, r"temperature is 0"),
        ({"temperature": math.inf}, r"temperature is inf"),
        ({"eta_multiples": [math.inf]}, r"eta_multiples is \[inf\]"),
        ({"update": {"prompts": "p", "resample_zero_advantage": -1}}, r"resample_zero_advantage is -1; give 0 rounds"),
        (
            {"update": {"prompt": "1+1=", "completion": "2", "advantage": 0}},
            r"update\.advantage is 0\.0; give a finite",
        ),
        ({"eta_multiples": [1.0, -1.0]}, r"eta_multiples is \[1.0, -1.0\], scaled_eta_multiples .*; give positive"),
        ({"scaled_eta_multiples": [0.0]}, r"scaled_eta_multiples \[0.0\]; give positive"),
        ({"auto_scale": 0}, r"auto_scale is 0\.0; give a factor such as 100, or null"),
        ({"directions": ["grad", "sideways"]}, r"directions\.1 is 'sideways': .*'baseline_plus_grad'"),
        ({"directions": ["baseline_plus_grad"]}, r"baseline_plus_grad is read less baseline: add baseline"),
        ({"sequences_per_block": 0}, r"sequences_per_block is 0; give at least 1"),
        ({"memory_budget": 0}, r"memory_budget is 0; give at least 1"),
        ({"update": {"rollouts": "r.jsonl", "n": 1}}, r"update\.n is 1: Unexpected"),
        ({"update": {"completion": "2"}}, r"update\.prompt .* required"),
        ({"update": {"prompts": []}}, r"update names no prompt; give at least one"),
        ({"evaluations": [{"prompts": "p", "prompt_ids": []}]}, r"evaluations\[0\] names no prompt"),
        ({"evaluations": [{"prompts": [{"prompt": "a"}, 3]}]}, r"evaluations\.0\.prompts.* is 3"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm is 0.0; give the trainer's"),
        (["a list"], r"plan is \['a list'\]"),
    ],
)
def test_a_bad_plan_names_the_field_and_the_value(tmp_path: Path, values: object, message: str) -> None:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(PlanError, match=message):
        read_plan(tmp_path / "plan.yaml", EntropyInfluencePlan)


def test_a_missing_or_unreadable_plan_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"absent\.yaml' does not exist; check the path"):
        read_plan(tmp_path / "absent.yaml", EntropyInfluencePlan)
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(PlanError, match=r"bad\.yaml' is not YAML"):
        read_plan(tmp_path / "bad.yaml", EntropyInfluencePlan)


def test_a_plan_constructs_no_python_objects(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("checkpoint: !!python/object/apply:os.getcwd []")
    with pytest.raises(PlanError, match="is not YAML"):
        read_plan(tmp_path / "plan.yaml", EntropyInfluencePlan)


def test_a_plan_made_in_python_is_held_to_the_same_types() -> None:
    plan = EntropyInfluencePlan(eta_multiples=[1, 2.0], directions=["grad"])  # type: ignore[arg-type]
    assert (plan.eta_multiples, plan.directions) == ((1.0, 2.0), ("grad",))
    with pytest.raises(PlanError, match=r"estimator is 'sequnce': .*'per_decision'"):
        EntropyInfluencePlan(estimator="sequnce")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"directions\.0 is 'gradd'"):
        EntropyInfluencePlan(directions=("gradd",))  # type: ignore[arg-type]
