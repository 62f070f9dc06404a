"""Plans are values that round-trip through YAML and refuse what cannot be run."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fx_influence.lab.cli import COMMENTED_PLAN
from fx_influence.lab.plan import (
    CustomSequence,
    EntropyInfluencePlan,
    FisherKernelPlan,
    PlanError,
    RolloutFile,
    SampledBatch,
    demo_path,
    plan_text,
    read_plan,
)


def test_plan_round_trips_through_yaml(tmp_path: Path) -> None:
    plan = EntropyInfluencePlan(
        checkpoint=str(tmp_path / "c"),
        reward="m:f",
        loss="prompt_max",
        max_new_tokens=16,
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


def test_plan_text_omits_default_chat_fields() -> None:
    """A run begun then is continued only by a plan of the same values, and found by the hash of its text."""
    plain = {"prompts": "p.txt", "prompt_ids": None, "num_prompts": None, "completions_per_prompt": 8}
    plain |= {"resample_zero_advantage": 0, "seed": None}
    stored = EntropyInfluencePlan(
        update=SampledBatch("p.txt"), evaluations=(SampledBatch("p.txt", chat=True),)
    ).to_dict()
    assert list(stored["update"].items()) == list(plain.items())
    assert stored["evaluations"] == [{**plain, "chat": True}]


def test_read_plan_resolves_paths_from_the_file(tmp_path: Path) -> None:
    values: dict[str, Any] = {"checkpoint": "runs/step-7", "update": {"prompts": "p.txt"}, "base": "../base"}
    values |= {"reward": "m:f", "loss": "grpo", "max_new_tokens": 8}
    values["evaluations"] = [{"prompts": "demo/eval"}, {"rollouts": "r.jsonl"}, {"prompts": ["p.txt"]}]
    text = yaml.safe_dump(values)
    (tmp_path / "plan.yaml").write_text(text)
    plan = read_plan(tmp_path / "plan.yaml", EntropyInfluencePlan)
    assert plan.checkpoint == str(tmp_path / "runs/step-7")
    assert plan.update == SampledBatch(str(tmp_path / "p.txt"))
    assert plan.base == str(tmp_path.parent / "base")
    assert plan.evaluations == (
        SampledBatch("demo/eval"),
        RolloutFile(str(tmp_path / "r.jsonl")),
        SampledBatch(("p.txt",)),
    )


def test_fisher_plan_round_trips_and_is_no_other_plan(tmp_path: Path) -> None:
    plan = FisherKernelPlan(update=RolloutFile(str(tmp_path / "u.jsonl")), preconditioner="identity", top=2)
    (tmp_path / "plan.yaml").write_text(plan_text(plan))
    assert read_plan(tmp_path / "plan.yaml", FisherKernelPlan) == plan
    with pytest.raises(PlanError, match=r"top is 2; .*plans of fx-influence fisher"):
        read_plan(tmp_path / "plan.yaml", EntropyInfluencePlan)
    (tmp_path / "bad.yaml").write_text("top: 0")
    with pytest.raises(PlanError, match="top is 0; expected at least 1"):
        read_plan(tmp_path / "bad.yaml", FisherKernelPlan)


def test_read_plan_gives_default_when_file_is_empty(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("")
    plan = read_plan(tmp_path / "plan.yaml", EntropyInfluencePlan)
    assert plan == EntropyInfluencePlan()
    requests = [request for request in plan.requests() if isinstance(request, SampledBatch)]
    assert [(r.num_prompts, r.completions_per_prompt) for r in requests] == [(16, 4), (256, 2)]
    for name in (plan.checkpoint, *(r.prompts for r in requests)):
        assert Path(demo_path(str(name))).exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, r"sed is 1; expected one of the fields checkpoint, .*\(the nearest is 'seed'\)"),
        ({"seed": "x"}, r"seed is 'x'; expected a whole number"),
        ({"seed": True}, r"seed is True; expected a number, not true or false"),
        ({"seed": None}, r"seed is None; expected a whole number\. Give one, or leave the line out"),
        ({"seed": 2**64}, r"seed is 18446744073709551616; expected a whole number of 64 bits"),
        ({"loss": "ppo"}, r"loss is 'ppo'; expected one of .*dr_grpo"),
        ({"loss": "drgrpo"}, r"loss is 'drgrpo'; .*the nearest is 'dr_grpo'"),
        ({"num_prompts": 3}, r"num_prompts is 3; .*is a field of a batch: put it into update or evaluations"),
        ({"top": 3}, r"top is 3; .*is a field of the plans of fx-influence fisher"),
        ({"update": {"prompts": "p.txt", "n": 1}}, r"update\.n is 1; expected one of the fields prompts, prompt_ids, "),
        ({"update": {"promts": "p.txt"}}, r"update\.promts is 'p\.txt'; .*the nearest is 'prompts'"),
        ({"update": {"rolouts": "r.jsonl"}}, r"update\.rolouts is 'r\.jsonl'; .*the nearest is 'rollouts'"),
        (
            {"update": {"prompts": "p", "temperature": 1}},
            r"temperature is a field of the plan itself: put it beside up",
        ),
        ({"update": {"prompts": "p", "rollouts": "r"}}, r"expected one of rollouts and prompts, not both"),
        ({"update": {"prompts": "p.txt", "chat": "user"}}, r"update\.chat is 'user'; expected true or false"),
        ({"update": {"prompts": "p.txt", "system": 3}}, r"update\.system is 3; expected a text\. Quote it"),
        ({"update": {"prompt": "1+1=", "completion": "2", "chat": True}}, r"update\.chat is True; expected one of"),
        ({"update": {"num_prompts": 3}}, r"update is \{'num_prompts': 3\}; expected an object with prompts"),
        ({"update": "p.jsonl"}, r"update is 'p\.jsonl'; .*Write \{prompts: p\.jsonl\}"),
        ({"update": None}, r"update is None; expected an object"),
        ({"update": {"prompts": 3}}, r"update\.prompts is 3; expected the path of a file, or a list of prompts"),
        ({"update": {"prompts": ""}}, r"update\.prompts is ''; expected at least one"),
        (
            {"update": {"prompts": "p.txt", "completions_per_prompt": 0}},
            r"completions_per_prompt is 0; expected at leas",
        ),
        ({"update": {"prompts": "p.txt", "num_prompts": 2.5}}, r"update\.num_prompts is 2\.5; expected a whole number"),
        (
            {"update": {"prompts": "p.txt", "prompt_ids": "7"}},
            r"update\.prompt_ids is '7'; expected a list\. Put it in",
        ),
        ({"evaluations": []}, r"evaluations is \[\]; expected at least one"),
        ({"evaluations": {"prompts": "p"}}, r"evaluations is \{'prompts': 'p'\}; expected a list of batches"),
        ({"evaluations": ["p"]}, r"evaluations\[0\] is 'p'; expected an object"),
        (
            {"evaluations": [{"prompts": "p"}, {"prompts": "p", "sed": 1}]},
            r"evaluations\[1\]\.sed is 1; .*st is \'seed\'",
        ),
        (
            {"evaluations": [{"prompts": "p", "resample_zero_advantage": 2}]},
            r"resample_zero_advantage is 2; expected 0",
        ),
        ({"temperature": 0}, r"temperature is 0"),
        ({"temperature": math.inf}, r"temperature is inf"),
        ({"clip_range": 0.2}, r"clip_range is 0\.2; expected a list"),
        ({"clip_range": [0.2]}, r"clip_range is \[0\.2\]; expected two numbers"),
        ({"eta_multiples": [math.inf]}, r"eta_multiples is \[inf\]"),
        (
            {"update": {"prompts": "p", "resample_zero_advantage": -1}},
            r"resample_zero_advantage is -1; expected 0 rounds",
        ),
        (
            {"update": {"prompt": "1+1=", "completion": "2", "advantage": 0}},
            r"update\.advantage is 0\.0; expected a finite",
        ),
        ({"eta_multiples": [1.0, -1.0]}, r"eta_multiples is \[1.0, -1.0\]; expected positive"),
        ({"eta_multiples": []}, r"eta_multiples is \[\]; expected at least one"),
        ({"scaled_eta_multiples": [0.0]}, r"scaled_eta_multiples is \[0.0\]; expected positive"),
        ({"auto_scale": 0}, r"auto_scale is 0\.0; expected a factor such as 100, or null"),
        ({"directions": "grad"}, r"directions is 'grad'; expected a list\. Put it into \[ \]: \[grad\]"),
        ({"directions": ["grad", "sideways"]}, r"directions\[1\] is 'sideways'; expected one of .*baseline_plus_grad"),
        ({"directions": ["baseline_plus_grad"]}, r"baseline_plus_grad is read less baseline: add baseline"),
        ({"sequences_per_block": 0}, r"sequences_per_block is 0; expected at least 1"),
        ({"memory_budget": 0}, r"memory_budget is 0; expected at least 1"),
        ({"memory_budget": "1GB"}, r"memory_budget is '1GB'; expected a whole number"),
        ({"update": {"rollouts": "r.jsonl", "n": 1}}, r"update\.n is 1; expected one of the fields rollouts"),
        ({"update": {"completion": "2"}}, r"update\.prompt is missing; expected a text\. Add it beside completion"),
        ({"update": {"prompts": []}}, r"update\.prompts is \(\); expected at least one"),
        ({"evaluations": [{"prompts": "p", "prompt_ids": []}]}, r"evaluations\[0\]\.prompt_ids is \(\); expected at"),
        ({"evaluations": [{"prompts": [{"prompt": "a"}, 3]}]}, r"evaluations\[0\]\.prompts\[1\] is 3; expected a text"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm is 0.0; expected the trainer's"),
        (["a list"], r"the plan is \['a list'\]; expected fields"),
        ([], r"the plan is \[\]; expected fields"),
        (False, r"the plan is False; expected fields"),
    ],
)
def test_read_plan_names_field_and_value_when_invalid(tmp_path: Path, values: object, message: str) -> None:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(PlanError, match=message) as refused:
        read_plan(tmp_path / "plan.yaml", EntropyInfluencePlan)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nloss: grpo\nseed: 2", r"seed of line 1 is given again, in line 3"),
        ("update: {prompts: p, prompts: q}", r"prompts of line 1 is given again, in line 1"),
        ("update:\n\tprompts: p", r"in line 2 \(indent with spaces, not tabs\)"),
        ("update: {prompts: p", r"is not YAML: .*in line 1; expected a plan. `fx-influence plan` prints one"),
        ("seed: 1\n---\nseed: 2", r"is not YAML: but found another document, in line 2"),
        ("seed: \x00", r"is not YAML: "),
    ],
)
def test_read_plan_names_yaml_error_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(PlanError, match=message) as refused:
        read_plan(tmp_path / "plan.yaml", EntropyInfluencePlan)
    assert "\n" not in str(refused.value)


TRAINING_FIELDS = {
    "update": {"prompts": "u.jsonl"},
    "evaluations": [{"prompts": "e.jsonl"}],
    "reward": "m:f",
    "loss": "grpo",
    "max_new_tokens": 64,
}


@pytest.mark.parametrize("kind", [EntropyInfluencePlan, FisherKernelPlan])
@pytest.mark.parametrize(
    "missing", [*((name,) for name in TRAINING_FIELDS), ("update", "loss"), tuple(TRAINING_FIELDS)]
)
def test_plan_requires_training_fields_without_demo(kind: type[EntropyInfluencePlan], missing: tuple[str, ...]) -> None:
    values = {name: value for name, value in {"checkpoint": "step-7", **TRAINING_FIELDS}.items() if name not in missing}
    with pytest.raises(PlanError, match=r"checkpoint is 'step-7' and not the demo") as refused:
        kind.from_dict(values)
    said, remedy = str(refused.value).split("missing; ")
    assert re.findall(r"update|evaluations|reward|loss|max_new_tokens", said) == list(missing)
    assert all(f"{name}: " in remedy for name in missing)
    plan = kind.from_dict({"checkpoint": "step-7", **TRAINING_FIELDS})
    assert (plan.loss, plan.max_new_tokens, plan.reward) == ("grpo", 64, "m:f")
    assert kind.from_dict(plan.to_dict()) == plan


def test_plan_of_stored_rollouts_needs_no_reward_or_loss() -> None:
    """A live trainer stores such plans: its rollouts have their coefficients, and nothing is rewarded."""
    files = {"update": {"rollouts": "u.jsonl"}, "evaluations": [{"rollouts": "e.jsonl"}], "max_new_tokens": 64}
    plan = EntropyInfluencePlan.from_dict({"checkpoint": "state", **files})
    assert (plan.reward, plan.loss) == (None, None)
    assert EntropyInfluencePlan.from_dict(plan.to_dict()) == plan
    with pytest.raises(PlanError, match="reward is missing"):
        EntropyInfluencePlan.from_dict({"checkpoint": "state", **files, "evaluations": [{"prompts": "e.jsonl"}]})
    with pytest.raises(PlanError, match="reward is None; expected the training run's"):
        EntropyInfluencePlan(reward=None)


def test_prompt_ids_may_be_numbers_in_yaml(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("update: {prompts: demo/train, prompt_ids: [7, x]}")
    assert read_plan(tmp_path / "plan.yaml", EntropyInfluencePlan).update == SampledBatch(
        "demo/train", prompt_ids=("7", "x")
    )


def test_batch_made_in_python_is_type_checked() -> None:
    with pytest.raises(PlanError, match=r"update\.num_prompts is '3x'; expected a whole number"):
        EntropyInfluencePlan(update=SampledBatch("p.txt", num_prompts="3x"))  # type: ignore[arg-type]


def test_commented_plan_is_default_and_names_all_fields() -> None:
    assert read_plan(COMMENTED_PLAN, EntropyInfluencePlan) == EntropyInfluencePlan()
    fields = {field.name for field in dataclasses.fields(EntropyInfluencePlan)}
    assert set(yaml.safe_load(COMMENTED_PLAN.read_text())) == fields


def test_read_plan_expands_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "plan.yaml").write_text("update: {prompts: ~/p.txt}")
    plan = read_plan(tmp_path / "plan.yaml", EntropyInfluencePlan)
    assert plan.update == SampledBatch(str(tmp_path / "home" / "p.txt"))


def test_read_plan_names_missing_or_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"absent\.yaml' does not exist; expected a YAML file. Check the path"):
        read_plan(tmp_path / "absent.yaml", EntropyInfluencePlan)
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(PlanError, match=r"bad\.yaml' is not YAML"):
        read_plan(tmp_path / "bad.yaml", EntropyInfluencePlan)
    with pytest.raises(PlanError, match=r"cannot be read: Is a directory; expected a YAML file"):
        read_plan(tmp_path, EntropyInfluencePlan)


def test_read_plan_constructs_no_python_objects(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("checkpoint: !!python/object/apply:os.getcwd []")
    with pytest.raises(PlanError, match="is not YAML"):
        read_plan(tmp_path / "plan.yaml", EntropyInfluencePlan)


def test_plan_made_in_python_is_type_checked() -> None:
    plan = EntropyInfluencePlan(eta_multiples=[1, 2.0], directions=["grad"])  # type: ignore[arg-type]
    assert (plan.eta_multiples, plan.directions) == ((1.0, 2.0), ("grad",))
    with pytest.raises(PlanError, match=r"estimator is 'sequnce'; .*the nearest is 'sequence'"):
        EntropyInfluencePlan(estimator="sequnce")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"directions\[0\] is 'gradd'"):
        EntropyInfluencePlan(directions=("gradd",))  # type: ignore[arg-type]


@pytest.mark.parametrize(("old", "present"), [("share", "frozen"), ("marginal", "jacobian"), ("rmsprop", "rmsprop")])
def test_read_plan_reads_version_0_1_with_a_note(tmp_path: Path, old: str, present: str) -> None:
    (tmp_path / "plan.yaml").write_text(f"gain: {old}\nseed: 3")
    notes: list[str] = []
    plan = read_plan(tmp_path / "plan.yaml", EntropyInfluencePlan, notes.append)
    assert (plan.preconditioner, plan.seed) == (present, 3)
    assert len(notes) == 1
    assert notes[0].endswith(f"plan.yaml': gain: {old} is called preconditioner: {present} now; it is read as that")
    assert "gain" not in plan.to_dict()


def test_read_plan_prints_its_note_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.yaml").write_text("gain: share")
    read_plan(tmp_path / "plan.yaml", EntropyInfluencePlan)
    assert capsys.readouterr().err.count("is called preconditioner: frozen now") == 1
    read_plan(COMMENTED_PLAN, EntropyInfluencePlan)
    assert capsys.readouterr().err == ""


def test_read_plan_rejects_gain_beside_preconditioner(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("gain: share\npreconditioner: frozen")
    with pytest.raises(PlanError, match="gain is 'share' beside preconditioner, its present name"):
        read_plan(tmp_path / "plan.yaml", EntropyInfluencePlan)


def test_fisher_plan_has_no_gain() -> None:
    """The Fisher plan has a preconditioner of other values, and never had the old field."""
    with pytest.raises(PlanError, match="gain is 'share'; expected one of the fields"):
        FisherKernelPlan.from_dict({"gain": "share"})
