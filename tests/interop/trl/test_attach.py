"""What an EntropyInfluence is attached with: prompts, generations, others of its kind, a directory of its training."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, IterableDataset, Value
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TrainerCallback
from trl import GRPOTrainer

import fx_influence as fx
from benchmarks.trl_variants import PROMPTS, Variant, reward, tokenizer, trainer
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.interop.trl.capture import METHODS
from fx_influence.interop.trl.generation import check_explained
from fx_influence.interop.trl.prompts import read_prompts_of
from fx_influence.types import Batch

pytestmark = [pytest.mark.filterwarnings("ignore")]  # those of trl, transformers and accelerate about themselves
PLAIN = Variant("dapo", False, 1, False, {})
HELD_OUT = ["4+5=", "6=", "70+1="]
OURS = "entropy_influence/"
SECONDS = "seconds"


def figures(attached: EntropyInfluence) -> list[dict[str, float]]:
    return [{name: x for name, x in entry.items() if name != SECONDS} for entry in attached.history]


def alone(out: Path, steps: int = 2, **settings: Any) -> list[dict[str, float]]:
    training = trainer(PLAIN, str(out), steps)
    attached = EntropyInfluence(eval_prompts=HELD_OUT, completions_per_prompt=2, **settings).attach(training)
    training.train()
    return figures(attached)


def told(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught]


def with_callbacks(out: Path, *callbacks: Any, **more: Any) -> Any:
    """A trainer made with callbacks, otherwise as ``trainer`` makes it."""
    made = trainer(PLAIN, str(out), 2)
    return GRPOTrainer(
        made.model,
        args=made.args,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer(),
        callbacks=list(callbacks),
        **more,
    )


def test_a_callback_given_to_the_trainer_is_attached(tmp_path: Path) -> None:
    inside = EntropyInfluence(1, HELD_OUT, completions_per_prompt=2)
    training = with_callbacks(tmp_path / "a", inside)
    training.train()
    assert figures(inside) == alone(tmp_path / "b", every=1)
    assert [OURS + "total" in entry for entry in training.state.log_history] == [True, True, False]
    inside.detach()
    assert not set(METHODS) & set(vars(training))


def test_a_class_given_to_the_trainer_is_attached(tmp_path: Path) -> None:
    class EveryStep(EntropyInfluence):
        def __init__(self) -> None:
            super().__init__(1, completions_per_prompt=2)

    held_out = Dataset.from_list([{"prompt": prompt} for prompt in HELD_OUT])
    training = with_callbacks(tmp_path / "a", EveryStep, eval_dataset=held_out)
    training.train()
    [inside] = [x for x in training.callback_handler.callbacks if isinstance(x, EveryStep)]
    assert figures(inside) == alone(tmp_path / "b", every=1)


def test_a_callback_that_cannot_be_attached_ends_nothing(tmp_path: Path) -> None:
    inside = EntropyInfluence(1)
    training = with_callbacks(tmp_path, inside)
    assert any("nothing of this training is measured: eval_prompts is None" in text for text in told(training.train))
    assert training.state.global_step == 2
    assert not inside.history


def test_a_callback_is_attached_once_and_goes_to_another_trainer(tmp_path: Path) -> None:
    inside = EntropyInfluence(1, HELD_OUT, completions_per_prompt=2)
    first, second = with_callbacks(tmp_path / "a", inside), with_callbacks(tmp_path / "b", inside)
    inside.attach(first)
    with pytest.raises(ValueError, match="attached to this GRPOTrainer already"):
        inside.attach(first)
    second.train()
    assert len(inside.history) == 2
    assert not set(METHODS) & set(vars(first))


@pytest.mark.slow
def test_two_with_different_settings_are_as_each_alone(tmp_path: Path) -> None:
    settings = ({"every": 1}, {"every": 2, "preconditioner": "jacobian", "seed": 3})
    training = trainer(PLAIN, str(tmp_path / "both"), 2)
    made = [EntropyInfluence(eval_prompts=HELD_OUT, completions_per_prompt=2, **x) for x in settings]
    for one in made:
        one.attach(training)
    training.train()
    for k, one in enumerate(made):
        assert figures(one) == alone(tmp_path / str(k), **settings[k])
    last = training.state.log_history[1]
    assert last[OURS + "total"] == made[0].history[1]["total"]
    assert last[OURS + "2/total"] == made[1].history[0]["total"]
    places = ("entropy_influence/step_000002", "entropy_influence-2/step_000002")
    totals = [fx.load_run(tmp_path / "both" / place).summary["in_this_step"]["total"] for place in places]
    assert totals == [made[0].history[1]["total"], made[1].history[0]["total"]]
    made[0].detach()
    assert set(METHODS) <= set(vars(training))
    made[1].detach()
    assert not set(METHODS) & set(vars(training))
    assert "clip_grad_norm_" not in vars(training.accelerator)


def test_a_name_is_a_prefix_and_taken_once(tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    EntropyInfluence(1, HELD_OUT, completions_per_prompt=1, name="arith").attach(training)
    with pytest.raises(ValueError, match="name is 'arith', as of another"):
        EntropyInfluence(1, HELD_OUT, name="arith").attach(training)
    with pytest.raises(ValueError, match="name is 'a/b'; give letters"):
        EntropyInfluence(1, HELD_OUT, name="a/b")
    training.train()
    assert OURS + "arith/total" in training.state.log_history[0]
    assert (tmp_path / "entropy_influence-arith" / "step_000001").is_dir()


def test_a_method_replaced_by_its_owner_is_put_back(tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    own = training.compute_loss
    training.compute_loss = lambda *args, **kwargs: own(*args, **kwargs)
    before = training.compute_loss
    first, second = (EntropyInfluence(1, HELD_OUT).attach(training) for _ in range(2))
    first.detach()
    second.detach()
    assert training.compute_loss is before
    first.detach()


def step_files(out: Path) -> dict[str, str]:
    """Which training each stored step says it is of."""
    files = sorted(out.glob("entropy_influence*/step_*/environment.json"))
    return {str(file.parent.relative_to(out)): json.loads(file.read_text())["training"] for file in files}


def test_a_second_training_leaves_the_firsts_steps(tmp_path: Path) -> None:
    alone(tmp_path, 1, every=1)
    before = step_files(tmp_path)
    texts = told(lambda: alone(tmp_path, 1, every=1))
    after = step_files(tmp_path)
    assert list(after) == ["entropy_influence/step_000001", "entropy_influence_2/step_000001"]
    assert after[next(iter(before))] == next(iter(before.values()))
    assert len(set(after.values())) == 2
    assert any("holds steps of another training" in text for text in texts)


@pytest.mark.slow
def test_a_resumed_training_goes_on_in_its_own_directory(tmp_path: Path) -> None:
    """Another that ran in between has one of its own, which is left alone."""
    options = {"save_strategy": "steps", "save_steps": 1, "save_only_model": False}

    def run(steps: int, resume: str | None = None) -> None:
        training = trainer(PLAIN, str(tmp_path), steps, **options)
        EntropyInfluence(1, HELD_OUT, completions_per_prompt=1).attach(training)
        training.train(resume_from_checkpoint=resume)

    run(2)
    first = step_files(tmp_path)
    (tmp_path / "entropy_influence" / "step_000002" / "note.txt").write_text("of the first time")
    alone(tmp_path, 1, every=1)
    run(3, str(tmp_path / "checkpoint-1"))
    after = step_files(tmp_path)
    assert {name: after[name] for name in first} == first
    assert after["entropy_influence/step_000003"] == first["entropy_influence/step_000001"]
    assert not (tmp_path / "entropy_influence" / "step_000002" / "note.txt").exists()
    assert [name for name in after if name not in first] == [
        "entropy_influence/step_000003",
        "entropy_influence_2/step_000001",
    ]


def endless() -> Iterator[dict[str, str]]:
    while True:
        yield {"prompt": "1+1="}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trainer(PLAIN, str(tmp_path_factory.mktemp("made")), 1)


def test_prompts_are_bounded_where_nobody_counted_them(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    many = Dataset.from_list([{"prompt": f"{k}="} for k in range(1000)])
    monkeypatch.setattr(made, "eval_dataset", many)
    found = read_prompts_of(made, None, 64)
    assert len(set(found.prompts)) == 64
    assert found.prompts[0] == "0="
    assert int(found.prompts[-1][:-1]) >= 980
    assert found.note is not None
    assert "64 of the 1000 prompts" in found.note
    assert len(read_prompts_of(made, many, 64).prompts) == 1000
    assert len(read_prompts_of(made, many["prompt"], 64).prompts) == 1000


@pytest.mark.parametrize("features", [None, Features({"prompt": Value("string")})])
def test_a_stream_is_not_read_to_its_end(made: Any, features: Features | None) -> None:
    stream = IterableDataset.from_generator(endless, features=features)
    assert len(read_prompts_of(made, stream, 5).prompts) == 5
    found = read_prompts_of(made, endless(), 5)
    assert found.prompts == ["1+1="] * 5
    assert found.note is not None
    assert "first 5" in found.note
    short = read_prompts_of(made, iter(["1=", "2="]), 5)
    assert (short.prompts, short.note) == (["1=", "2="], None)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("12+3=", ["12+3="]),
        ([{"role": "user", "content": "1+1"}], [[{"role": "user", "content": "1+1"}]]),
        ([{"prompt": "1="}, {"prompt": "2="}], ["1=", "2="]),
        (("1=", "2="), ["1=", "2="]),
    ],
)
def test_one_text_is_one_prompt(made: Any, asked: Any, expected: list[Any]) -> None:
    assert read_prompts_of(made, asked, 64).prompts == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"a": ["1="]}, r"holds \['a'\]; pass one of them"),
        (7, "eval_prompts is 7; give texts"),
        ([[{"role": "user", "content": [{"type": "image"}]}]], r"eval_prompts\[0\] shows an image"),
        (Dataset.from_list([{"prompt": "1=", "image": "x"}]), "eval_prompts has the column 'image'"),
    ],
)
def test_what_is_no_prompt_is_refused(made: Any, asked: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompts_of(made, asked, 64)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"temperature": 1.6}, "temperature"),
        ({"top_k": 3}, "top_k"),
        ({"sequence_bias": [[[3], 2.0]]}, "sequence_bias"),
        ({"forced_eos_token_id": 1}, "forced_eos_token_id"),
        ({"min_new_tokens": 2}, "min_new_tokens"),
        ({"exponential_decay_length_penalty": (2, 1.5)}, "exponential_decay_length_penalty"),
        ({"stop_strings": ["7"]}, "stop_strings"),
        ({"eos_token_id": 5}, "eos_token_id"),
        ({"top_h": 0.4}, "top_h"),
        ({"watermarking_config": {"greenlist_ratio": 0.5}}, "watermarking_config"),
        ({"max_time": 1.0}, "max_time"),
    ],
)
def test_settings_that_bend_the_distribution_are_refused(settings: dict[str, Any], name: str, tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1, generation_kwargs=settings)
    with pytest.raises(ValueError, match=f"{name} is .* in the trainer's generation"):
        EntropyInfluence(1, HELD_OUT).attach(training)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "top_p": 1.0, "typical_p": 1.0, "sequence_bias": None},
        {"max_new_tokens": 4, "use_cache": False, "renormalize_logits": True, "of_my_own": 3},
    ],
)
def test_settings_that_bend_nothing_are_not_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1, generation_kwargs=settings)
    attached = EntropyInfluence(1, HELD_OUT, completions_per_prompt=1).attach(training)
    training.train()
    assert len(attached.history) == 1


def test_what_the_model_itself_asks_for_is_refused(tmp_path: Path) -> None:
    """The trainer leaves min_p open, which the model's own generation config then fills in."""
    training = trainer(PLAIN, str(tmp_path), 1)
    training.model.generation_config.min_p = 0.2
    with pytest.raises(ValueError, match=r"min_p is .* in the trainer's generation"):
        EntropyInfluence(1, HELD_OUT).attach(training)


class Biased(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + 2.0 * (torch.arange(scores.shape[1]) == 3)


def test_a_models_own_processors_are_refused(tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    training.model._get_logits_processor = lambda **_: LogitsProcessorList([Biased()])
    with pytest.raises(ValueError, match="changes the policy's distribution by Biased"):
        EntropyInfluence(1, HELD_OUT).attach(training)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"min_p": 0.1}, "min_p"),
        ({"temperature": 0.5}, "temperature"),
        ({"logit_bias": {3: 1.0}}, "logit_bias"),
        ({"bad_words": ["no"]}, "bad_words"),
        ({"allowed_token_ids": [1, 2]}, "allowed_token_ids"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"guided_decoding": {"regex": "a"}}, "guided_decoding"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"stop": ["\n"]}, "stop"),
        ({"seed": 0}, "seed"),
        ({}, "vllm_structured_outputs_regex"),
    ],
)
def test_vllms_settings_are_refused(settings: dict[str, Any], name: str, tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    training.use_vllm, training.args.generation_kwargs = True, settings or None
    if not settings:
        training.args.vllm_structured_outputs_regex = "[0-9]+"
    with pytest.raises(ValueError, match=f"{name} is .* in the trainer's generation"):
        EntropyInfluence(1, HELD_OUT).attach(training)


def test_vllms_neutral_settings_are_not_refused(tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    training.use_vllm = True
    training.args.generation_kwargs = {"top_k": -1, "presence_penalty": 0.0, "max_tokens": 4, "logit_bias": None}
    EntropyInfluence(1, HELD_OUT).attach(training)


def hot(training: Any) -> None:
    """A temperature that no setting tells, in the model's own generate."""
    original = training.model.generate

    def generate(*args: Any, generation_config: Any, **kwargs: Any) -> Any:
        generation_config.temperature = 2.5
        return original(*args, generation_config=generation_config, **kwargs)

    training.model.generate = generate


def sampled_elsewhere(training: Any) -> None:
    """Completions of a sampler of one's own, of which nobody tells the log-probabilities."""
    original = training._generate

    def generate(prompts: Any) -> Any:
        prompt_ids, completion_ids, *further = original(prompts)
        other = [torch.randint(2, 14, (6,)).tolist() for _ in completion_ids]
        return prompt_ids, other, *further

    training.model._get_logits_processor = None
    training.model.generate = lambda input_ids, **_: torch.cat([input_ids, torch.full((len(input_ids), 6), 2)], 1)
    training._generate = generate


@pytest.mark.parametrize(
    ("bend", "message"),
    [(hot, "differ by .* nats a token"), (sampled_elsewhere, "times likelier at .* times its temperature")],
)
def test_completions_of_another_policy_end_the_measuring(
    bend: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    training = trainer(PLAIN, str(tmp_path), 2)
    attached = EntropyInfluence(1, HELD_OUT * 8, completions_per_prompt=4).attach(training)
    bend(training)
    with pytest.warns(UserWarning, match=f"step 1 and those after it are not attributed: .*{message}"):
        training.train()
    assert training.state.global_step == 2
    assert not attached.history


def test_tokens_of_the_policy_are_explained_and_others_are_not() -> None:
    """Of a policy that is nearly sure, where standard errors from a sample would be far too small."""
    generator = torch.Generator().manual_seed(0)
    for sharpness in (0.3, 3.0, 12.0):
        logits = sharpness * torch.randn(16, 20, 7, generator=generator)
        mask = torch.ones(16, 20, dtype=torch.bool)
        batch = Batch(mask.long(), mask, mask)

        def drawn(factor: float, logits: Tensor = logits) -> Tensor:
            probabilities = (logits / factor).softmax(-1).flatten(0, 1)
            return torch.multinomial(probabilities, 1, generator=generator).view(16, 20, 1)

        def scored(factor: float, tokens: Tensor, logits: Tensor = logits) -> Tensor:
            return (logits / factor).log_softmax(-1).gather(-1, tokens)[..., 0]

        tokens = drawn(1.0)
        check_explained(lambda factor, tokens=tokens: scored(factor, tokens), batch)
        if sharpness > 1:
            tokens = drawn(1.8)
            with pytest.raises(ValueError, match="times likelier"):
                check_explained(lambda factor, tokens=tokens: scored(factor, tokens), batch)


def test_a_failing_generation_leaves_the_trainer_as_it_was(tmp_path: Path) -> None:
    class Failing(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            training.model.generate = fail

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            del training.model.generate

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel")

    training = trainer(PLAIN, str(tmp_path), 2)
    training.add_callback(Failing())
    attached = EntropyInfluence(1, HELD_OUT).attach(training)
    texts = [text for text in told(training.train) if "attributed" in text]
    assert texts == [f"step {step} is not attributed: RuntimeError: no kernel" for step in (1, 2)]
    checkpointing = [vars(module).get("gradient_checkpointing") for module in training.model.modules()]
    assert {x for x in checkpointing if x is not None} == {True}
    assert training.model.training
    assert "gather" not in vars(training.accelerator)
    assert "_get_logits_processor" not in vars(training.model)
    assert not attached.history
