"""Real GRPO and RLOO trainings: captured steps are the trainer's own, and measuring them changes nothing."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding, rounding_bound
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import fx_influence as fx
from benchmarks.bench_trl_steps import Errors, measure
from benchmarks.trl_variants import PROMPTS, Variant, policy, reward, trainer, variants
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.interop.trl.capture import METHODS
from fx_influence.lab.cli import main
from fx_influence.lab.plan import read_plan

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # those of trl, transformers and accelerate about themselves
]
PLAIN = Variant("dapo", False, 1, False, {})
HELD_OUT = ["4+5=", "6=", "70+1=", "1+1+1="]
OURS = "entropy_influence/"
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time")


def measured(variant: Variant, out: Path, steps: int = 3, every: int = 1, **more: Any) -> tuple[Any, EntropyInfluence]:
    training = trainer(variant, str(out), steps, **more)
    attached = EntropyInfluence(every, HELD_OUT, completions_per_prompt=3).attach(training)
    training.train()
    return training, attached


def gpt2() -> GPT2LMHeadModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.4}
        return GPT2LMHeadModel(GPT2Config(vocab_size=14, eos_token_id=1, bos_token_id=None, pad_token_id=0, **sizes))


def weights(training: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in training.model.named_parameters()}


# Relative to the gradient, whose passes are as deep as those of TINY_POLICY; and to the step, theta' - theta of weights
# up to a thousand times as large.
GRADIENT = rounding_bound(torch.float32, TINY_POLICY)
STEP = rounding_bound(torch.float32, 1, 1e3)


def quick(variant: Variant) -> bool:
    """Each loss and option with all of its other choices or none; the rest is slow."""
    choices = [variant.lora, variant.off_policy]
    if set(variant.options) <= {"entropy_coef"} and variant.loss != "rloo":
        choices += [variant.accumulation == 3, bool(variant.options)]
    return all(choices) or not any(choices)


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, id=v.name, marks=[] if quick(v) else pytest.mark.slow) for v in variants()],
)
def test_captured_rollouts_add_up_to_the_trainers_gradient_and_step(variant: Variant) -> None:
    errors = measure(variant)
    assert errors["tokens"] > 0
    assert errors["steps"] == 3
    assert errors["gradient"] <= GRADIENT
    assert errors["step"] <= STEP


@pytest.mark.parametrize("lora", [False, True])
def test_measuring_changes_nothing_of_the_training(lora: bool, tmp_path: Path) -> None:
    variant = Variant("grpo", lora, 2, True, {"entropy_coef": 0.05})
    plain = trainer(variant, str(tmp_path / "plain"), 6)
    plain.train()
    training, attached = measured(variant, tmp_path / "measured", 6)
    assert [figures["step"] for figures in attached.history] == [1, 2, 3, 4, 5, 6]
    ours, theirs = weights(training), weights(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    kept = [
        {name: value for name, value in entry.items() if not name.startswith(OURS) and name not in TIMES}
        for entry in training.state.log_history
    ]
    expected = [{name: x for name, x in entry.items() if name not in TIMES} for entry in plain.state.log_history]
    assert kept == expected
    assert training.state.num_input_tokens_seen == plain.state.num_input_tokens_seen


def test_what_is_logged_adds_up_and_foretells_the_realised_change(tmp_path: Path) -> None:
    training, attached = measured(PLAIN, tmp_path, 4, learning_rate=1e-4)
    logged = [entry for entry in training.state.log_history if OURS + "total" in entry]
    assert len(logged) == len(attached.history) == 4
    for entry, figures in zip(logged, attached.history, strict=True):
        assert all(entry[OURS + name] == value for name, value in figures.items() if name != "step")
        parts = sum(figures[name] for name in ("momentum", "weight_decay", "rollouts", "unattributed"))
        size = sum(abs(figures[name]) for name in ("momentum", "weight_decay", "rollouts", "unattributed"))
        assert_close_to_rounding(figures["total"], parts, terms=TINY_POLICY, scale=size, dtype=torch.float32)
        signs = figures["positive_advantage"] + figures["negative_advantage"]
        size = abs(figures["positive_advantage"]) + abs(figures["negative_advantage"])
        assert_close_to_rounding(figures["rollouts"], signs, terms=12, scale=size, dtype=torch.float32)
        assert figures["measured"] == pytest.approx(figures["total"], rel=0.1)
        assert figures["stderr"] > 0
        assert figures["measured_stderr"] == pytest.approx(figures["stderr"], rel=0.5)
        assert_close_to_rounding(figures["residual"], 0.0, terms=TINY_POLICY, scale=size, dtype=torch.float32)
        assert 0 < figures["concentration"] < 1
        assert 0 < figures["entropy"] < math.log(14)
        assert 11 < figures["ess"] <= 12
    assert attached.history[0]["momentum"] == 0
    assert attached.history[1]["momentum"] != 0
    assert all(figures["weight_decay"] != 0 for figures in attached.history)


def test_a_warm_ups_first_step_moves_nothing(tmp_path: Path) -> None:
    _, attached = measured(PLAIN, tmp_path, 2, warmup_steps=2, lr_scheduler_type="constant_with_warmup")
    first, second = attached.history
    assert first["lr"] == first["total"] == first["measured"] == first["stderr"] == 0
    assert second["lr"] > 0
    assert second["total"] != 0


def test_every_counts_as_logging_steps_does(tmp_path: Path) -> None:
    training, attached = measured(PLAIN, tmp_path, 5, every=2)
    assert [figures["step"] for figures in attached.history] == [2, 4]
    assert [e["step"] for e in training.state.log_history if OURS + "total" in e] == [2, 4]
    assert sorted(path.name for path in (tmp_path / "entropy_influence").iterdir()) == ["step_000002", "step_000004"]


def test_rloo_is_measured(tmp_path: Path) -> None:
    _, attached = measured(Variant("rloo", True, 3, False, {"beta": 0.1}), tmp_path, 2, learning_rate=1e-3)
    assert [figures["step"] for figures in attached.history] == [1, 2]
    assert all(f["measured"] == pytest.approx(f["total"], rel=0.2) for f in attached.history)


def test_a_position_counted_from_the_padding_is_reproduced(tmp_path: Path) -> None:
    """GPT-2 under trl counts positions from the first column, padding included."""
    training = trainer(PLAIN, str(tmp_path), 2, gpt2(), disable_dropout=True)
    errors = Errors(training)
    training.train()
    assert max(errors.gradient) <= GRADIENT
    attached = measured(PLAIN, tmp_path / "live", 2, model=gpt2(), disable_dropout=True, learning_rate=1e-4)[1]
    for figures in attached.history:
        assert figures["unattributed"] == 0
        assert figures["measured"] == pytest.approx(figures["total"], rel=0.1)


def test_a_measured_step_is_a_run_that_all_readers_read(tmp_path: Path) -> None:
    _, attached = measured(Variant("dapo", False, 2, False, {"entropy_coef": 0.05}), tmp_path, 2)
    results = fx.load_run(tmp_path / "entropy_influence" / "step_000002")
    figures, lr = attached.history[1], attached.history[1]["lr"]
    assert_close_to_rounding(results.summary["total"] * lr, figures["total"], terms=2)
    assert results.summary["in_this_step"]["measured"] == figures["measured"]
    arrays = results.evaluations[0].arrays
    size = np.abs(arrays["per_token"]).sum()
    summed = {"terms": arrays["per_token"].size, "dtype": torch.float32}
    assert_close_to_rounding(arrays["per_sequence"].sum() * lr, figures["rollouts"], scale=size * lr, **summed)
    assert_close_to_rounding(arrays["per_token"].sum(1), arrays["per_sequence"], scale=size, **summed)
    assert arrays["full"].tolist() == [figures["measured"]]
    assert set(results.tokens) == {"logprobs", "entropies", "coefficients", "entropy_coefficients"}
    for name, stored in (("logprobs", "behaviour_logprobs"), ("coefficients", "coefficients")):
        for row, rollout in zip(results.tokens[name], results.update_rollouts, strict=True):
            own = row[len(rollout.prompt_ids) :][: len(rollout.completion_ids)]
            assert_close_to_rounding(own, getattr(rollout, stored), terms=TINY_POLICY, dtype=torch.float32)
    assert (results.tokens["entropies"] >= 0).all()
    assert [record["influence"] for record in results.sequences] == arrays["per_sequence"].tolist()
    assert len(results.update_rollouts) == 12
    assert len(results.evaluations[0].rollouts) == 12
    for record, rollout in zip(results.sequences, results.update_rollouts, strict=True):
        assert rollout.prompt in PROMPTS
        assert rollout.reward == pytest.approx(reward([rollout.completion])[0])
        assert (rollout.advantage is None) is False
        assert len(record["tokens"]) == len(rollout.completion_ids) == len(rollout.coefficients)
    summed = sum(r.advantage for r in results.update_rollouts)
    assert_close_to_rounding(summed, 0.0, terms=12, scale=12, dtype=torch.float32)


@pytest.mark.parametrize("lora", [False, True])
def test_a_stored_state_repeats_the_step_from_its_plan(lora: bool, tmp_path: Path) -> None:
    """Off-policy, with an entropy bonus and clipping: what is stored of U is enough without the trainer's loss."""
    training = trainer(Variant("grpo", lora, 3, True, {"entropy_coef": 0.05}), str(tmp_path), 2, learning_rate=1e-3)
    EntropyInfluence(1, HELD_OUT, completions_per_prompt=3, save_state=True, matrix=True).attach(training)
    training.train()
    place = tmp_path / "entropy_influence" / "step_000002"
    live, again_at = fx.load_run(place), tmp_path / "again"
    again = fx.lab.run(
        dataclasses.replace(read_plan(place / "plan.yaml", fx.lab.EntropyInfluencePlan), dtype="float32"), again_at
    )
    assert again.summary["lr"] == live.summary["lr"]
    size = np.abs(live.evaluations[0].matrix).sum() + abs(live.summary["momentum"]) + abs(live.summary["weight_decay"])
    near = {"terms": TINY_POLICY, "dtype": torch.float32}
    for name in ("total", "momentum", "weight_decay", "sum_per_sequence", "total_stderr"):
        assert_close_to_rounding(again.summary[name], live.summary[name], scale=size, name=name, **near)
    ours, theirs = live.evaluations[0].arrays, again.evaluations[0].arrays
    for name in ("per_sequence", "per_token"):
        assert_close_to_rounding(ours[name], theirs[name], scale=size, name=name, **near)
    assert_close_to_rounding(live.evaluations[0].matrix, again.evaluations[0].matrix, scale=size, **near)
    # m / den of a gradient that is nearly 0 is rounded as coarsely as that gradient is beside the others.
    before, after = (torch.cat([x.flatten() for x in run.baseline().values()]) for run in (live, again))
    assert (after - before).norm() <= rounding_bound(torch.float32, TINY_POLICY, before.norm())


def test_report_prints_a_measured_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, attached = measured(PLAIN, tmp_path, 1)
    assert main(["report", str(tmp_path / "entropy_influence" / "step_000001")]) == 0
    page = capsys.readouterr().out
    assert "Step 1 of a training" in page
    assert f"{attached.history[0]['measured']:.4g}" in page


def test_all_conversations_and_the_eval_dataset_serve_as_prompts(tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    training.processing_class.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    training.train_dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": p[:-1]}]} for p in PROMPTS])
    training.eval_dataset = training.train_dataset
    attached = EntropyInfluence(1, completions_per_prompt=2).attach(training)
    training.reward_funcs = [lambda completions, **_: [float(len(c[0]["content"])) for c in completions]]
    training.train()
    rollouts = fx.load_run(tmp_path / "entropy_influence" / "step_000001").evaluations[0].rollouts
    assert [r.prompt for r in rollouts] == [p for p in PROMPTS for _ in range(2)]
    assert [r.group for r in rollouts] == [i for i in range(6) for _ in range(2)]
    assert attached.history[0]["total"] != 0


def test_tensorboard_gets_the_figures(tmp_path: Path) -> None:
    _, attached = measured(PLAIN, tmp_path / "run", 2, report_to=["tensorboard"])
    [file] = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file.parent)).Reload()
    for name, value in attached.history[-1].items():
        if name != "step":
            assert events.Scalars(f"train/{OURS}{name}")[-1].value == pytest.approx(
                value, rel=rounding_bound(torch.float32)
            )


def test_detached_the_trainer_is_as_it_was(tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    attached = EntropyInfluence(1, HELD_OUT).attach(training)
    attached.detach()
    assert not set(METHODS) & set(vars(training))
    assert "clip_grad_norm_" not in vars(training.accelerator)
    training.train()
    assert not attached.history
    assert not (tmp_path / "entropy_influence").exists()


def test_a_result_that_does_not_add_up_is_not_logged_and_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise fx.IdentityError("the residual is 0.5")

    monkeypatch.setattr("fx_influence.interop.trl.callback.influence", refuse)
    with pytest.warns(UserWarning, match="step 1 is not attributed: the residual is 0.5"):
        training, attached = measured(PLAIN, tmp_path, 2)
    assert training.state.global_step == 2
    assert not attached.history


def test_terms_that_no_coefficient_expresses_are_told_apart(tmp_path: Path) -> None:
    """Under bfloat16 autocast the trainer's gradient is rounded; what the rollouts' own do not explain is reported."""
    training, attached = measured(PLAIN, tmp_path, 1, bf16=True, learning_rate=1e-4)
    figures = attached.history[0]
    assert figures["unattributed"] != 0
    parts = sum(figures[name] for name in ("momentum", "weight_decay", "rollouts", "unattributed"))
    size = sum(abs(figures[name]) for name in ("momentum", "weight_decay", "rollouts", "unattributed"))
    assert_close_to_rounding(figures["total"], parts, terms=TINY_POLICY, scale=size, dtype=torch.float32)
    sequences = fx.load_run(tmp_path / "entropy_influence" / "step_000001").sequences
    assert abs(figures["unattributed"]) < 0.1 * figures["lr"] * sum(abs(r["influence"]) for r in sequences)
    assert next(training.model.parameters()).dtype == torch.float32


def lora_dropout() -> Any:
    return get_peft_model(policy(), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))


def attention_dropout() -> Any:
    model = policy()
    model.model.layers[1].self_attn.attention_dropout = 0.2
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": gpt2}, r"drop has dropout 0.1, .*disable_dropout=True"),
        ({"model": lora_dropout}, r"lora_dropout.default has dropout 0.1"),
        ({"model": attention_dropout}, r"layers.1.self_attn.attention_dropout has dropout 0.2"),
        ({"top_k": 5}, "top_k is 5 in the trainer's generation.*set top_k to 0"),
        ({"top_p": 0.9}, "top_p is 0.9"),
        ({"min_p": 0.1}, "min_p is 0.1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty is 1.1"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 2}}, "no_repeat_ngram_size is 2"),
        ({"generation_kwargs": {"suppress_tokens": [3]}}, r"suppress_tokens is \[3\]"),
        ({"use_transformers_continuous_batching": True}, "casts the weights in place"),
    ],
)
def test_what_cannot_be_attributed_is_refused_with_the_remedy(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = change.pop("model")() if "model" in change else None
    training = trainer(PLAIN, str(tmp_path), 1, **change)
    if model is not None:
        training.model = model
    with pytest.raises(ValueError, match=message):
        EntropyInfluence(1, HELD_OUT).attach(training)
    assert not set(METHODS) & set(vars(training))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_deepspeed_enabled": True}, "under DeepSpeed; .*launch one process, or several with DistributedData"),
        ({"is_fsdp_enabled": True}, "under FSDP; "),
        ({"accelerator": SimpleNamespace(num_processes=8, distributed_type=DistributedType.XLA)}, "8 .* under XLA; "),
        ({"model": SimpleNamespace(parameters=lambda: [SimpleNamespace(placements=[])])}, "under tensor parallelism"),
    ],
)
def test_a_model_that_no_process_holds_whole_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    vars(training).update(change)
    with pytest.raises(ValueError, match=message):
        EntropyInfluence(1, HELD_OUT).attach(training)


def test_another_optimizer_is_refused_at_attach(tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1, optim="sgd")
    with pytest.raises(TypeError, match="SGD"):
        EntropyInfluence(1, HELD_OUT).attach(training)


def test_another_trainer_is_refused(tmp_path: Path) -> None:
    other = Trainer(policy(), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    with pytest.raises(TypeError, match="trainer is Trainer; attach to trl's GRPOTrainer or RLOOTrainer"):
        EntropyInfluence(1, HELD_OUT).attach(other)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "eval_prompts is None and the trainer has no eval_dataset"),
        ([], "eval_prompts is empty"),
        (["1+1=", 7], r"eval_prompts\[1\] is 7; give a text or a conversation"),
        (["1+1=", ""], r"eval_prompts\[1\] is ''"),
        (Dataset.from_list([{"question": "1+1="}]), r"has the columns \['question'\], not prompt"),
        ({"a": ["1+1="]}, r"holds \['a'\]; pass one of them"),
    ],
)
def test_prompts_must_be_texts_or_conversations(prompts: Any, message: str, tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    with pytest.raises(ValueError, match=message):
        EntropyInfluence(1, prompts).attach(training)


@pytest.mark.parametrize("name", ["every", "completions_per_prompt"])
def test_counts_begin_at_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; give at least 1"):
        EntropyInfluence(**{name: 0})
