"""Whatever goes wrong in measuring a live training is one warning: the training goes on bit for bit."""

from __future__ import annotations

import errno
import gc
import shutil
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from transformers import TrainerCallback

import fx_influence as fx
import fx_influence.interop.trl.callback as measuring
from benchmarks.trl_variants import Variant, trainer
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.interop.trl.capture import METHODS, Capture
from fx_influence.interop.trl.store import StepStore

pytestmark = [pytest.mark.filterwarnings("ignore")]  # those of trl, transformers and accelerate about themselves
PLAIN = Variant("dapo", False, 1, False, {})
HELD_OUT = ["4+5=", "6=", "70+1="]
OURS = "entropy_influence/"
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time")
SCORE = "_get_per_token_logps_and_entropies"


def trained(out: Path, prepare: Callable[[Any], Any] = lambda training: None, steps: int = 2, **options: Any) -> Any:
    training = trainer(PLAIN, str(out), steps, **options)
    prepare(training)
    training.train()
    return training


def measured(
    out: Path, prepare: Callable[[Any], Any] = lambda training: None, steps: int = 2, **options: Any
) -> tuple[Any, EntropyInfluence, list[str]]:
    """A training with every step measured after ``prepare``, and what was told of steps."""
    training = trainer(PLAIN, str(out), steps, **options)
    prepare(training)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attached = EntropyInfluence(1, HELD_OUT, completions_per_prompt=2).attach(training)
        training.train()
    texts = [str(w.message) for w in caught]
    return training, attached, [text for text in texts if "attributed" in text or "measured" in text]


def state_of(training: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]], Tensor]:
    logged = [
        {name: x for name, x in entry.items() if not name.startswith(OURS) and name not in TIMES}
        for entry in training.state.log_history
    ]
    return dict(training.model.named_parameters()), logged, torch.get_rng_state()


def same(training: Any, out: Path, prepare: Callable[[Any], Any] = lambda training: None, **options: Any) -> None:
    """The training is the one that nobody measures: parameters and random state bit for bit, and what it logs."""
    weights, logged, state = state_of(training)
    other_weights, other_logged, other_state = state_of(trained(out, prepare, **options))
    assert all(torch.equal(weights[name], other_weights[name]) for name in other_weights)
    # As text, because NaN differs from itself.
    assert str(logged) == str(other_logged)
    assert torch.equal(state, other_state)


def failing(error: BaseException, times: int = 1) -> Callable[..., Any]:
    calls = []

    def fail(*_: object, **__: object) -> None:
        calls.append(1)
        raise error

    return fail


PLACES = [
    (measuring, "make_functional"),
    (measuring, "adamw_state"),
    (measuring, "held_out_rollouts"),
    (measuring, "collate"),
    (measuring, "influence"),
    (measuring, "entropy_estimate"),
    (measuring, "snis_delta"),
    (Capture, "overflowed"),
    (Capture, "_scale"),
    (StepStore, "write"),
]


@pytest.mark.parametrize("place", PLACES, ids=[name for _, name in PLACES])
def test_a_fault_is_one_warning_a_step(place: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.OutOfMemoryError("no room") if place[1] == "influence" else RuntimeError("out of luck")

    def broken(training: Any) -> None:
        # After the attachment, which calls some of them too.
        training.add_callback(Breaking(monkeypatch, place, error))

    training, attached, told = measured(tmp_path / "a", broken)
    assert [text[:24] for text in told] == ["step 1 is not attributed", "step 2 is not attributed"]
    assert all(f"{type(error).__name__}: {error}" in text for text in told)
    assert not attached.history
    assert not any(OURS in name for entry in training.state.log_history for name in entry)
    assert not (tmp_path / "a" / "entropy_influence").exists()
    monkeypatch.undo()
    same(training, tmp_path / "b")


class Breaking(TrainerCallback):
    """Puts a failing function in the place of one where a training begins."""

    def __init__(self, patch: pytest.MonkeyPatch, place: tuple[Any, str], error: BaseException) -> None:
        self._patch, self._place, self._error = patch, place, error

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._patch.setattr(*self._place, failing(self._error))


def test_one_failed_step_leaves_the_next_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a failed step held is let go of, and the step after it is as ever."""
    seen: list[Any] = []

    def once(params: Any, batch_u: Any, *rest: Any, **options: Any) -> Any:
        seen.append(weakref.ref(batch_u.input_ids))
        if len(seen) == 1:
            raise RuntimeError("once")
        return fx.influence(params, batch_u, *rest, **options)

    monkeypatch.setattr(measuring, "influence", once)
    _, attached, told = measured(tmp_path / "a")
    gc.collect()
    assert seen[0]() is None
    assert [figures["step"] for figures in attached.history] == [2]
    assert told == ["step 1 is not attributed: RuntimeError: once"]
    assert [path.name for path in (tmp_path / "a" / "entropy_influence").iterdir()] == ["step_000002"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=["interrupt", "exit"])
def test_an_interruption_passes_through(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "influence", failing(error))
    training = trainer(PLAIN, str(tmp_path), 1)
    EntropyInfluence(1, HELD_OUT).attach(training)
    with pytest.raises(type(error)):
        training.train()


def test_a_warning_that_is_an_error_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "influence", failing(RuntimeError("no")))
    training = trainer(PLAIN, str(tmp_path), 1)
    attached = EntropyInfluence(1, HELD_OUT).attach(training)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*attributed")
        training.train()
    assert training.state.global_step == 1
    assert not attached.history


@pytest.mark.parametrize("where", [*METHODS, "clip_grad_norm_"])
def test_the_trainers_own_exception_passes_unchanged(where: str, tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 2)
    own, calls = ZeroDivisionError("the trainer's"), []
    owner = training.accelerator if where == "clip_grad_norm_" else training
    original = getattr(owner, where)

    def once(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise own
        return original(*args, **kwargs)

    setattr(owner, where, once)
    attached = EntropyInfluence(1, HELD_OUT, completions_per_prompt=2).attach(training)
    with pytest.raises(ZeroDivisionError) as caught:
        training.train()
    assert caught.value is own
    training.train()
    assert [figures["step"] for figures in attached.history] == [1, 2]


def no_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fx_influence.interop.trl.store.sequence_records", no_room)
    training, attached, told = measured(tmp_path / "a")
    assert [text[:26] for text in told] == ["step 1 is not attributed: ", "step 2 is not attributed: "]
    assert all("No space left on device" in text for text in told)
    assert not attached.history
    assert not (tmp_path / "a" / "entropy_influence").exists()
    same(training, tmp_path / "b")


def test_a_place_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    def occupy(training: Any) -> None:
        training.args.output_dir = str(tmp_path / "file")

    (tmp_path / "file").write_text("in the way")
    training, attached, told = measured(tmp_path / "a", occupy)
    assert training.state.global_step == 2
    assert len(told) == 2
    assert not attached.history
    assert (tmp_path / "file").read_text() == "in the way"


def test_completions_that_are_all_masked_end_nothing(tmp_path: Path) -> None:
    """As mask_truncated_completions leaves a batch in which everything is cut off."""

    def mask(training: Any) -> None:
        original = training._generate_and_score_completions

        def generate(inputs: Any) -> Any:
            output = original(inputs)
            output["completion_mask"] = torch.zeros_like(output["completion_mask"])
            return output

        training._generate_and_score_completions = generate

    training, attached, told = measured(tmp_path / "a", mask)
    assert len(attached.history) + len(told) == 2
    for figures in attached.history:
        assert figures["rollouts"] == figures["positive_advantage"] == 0
    same(training, tmp_path / "b", mask)


def scaled(init_scale: float) -> Callable[[Any], None]:
    """A loss scaler as accelerate puts one in for fp16, which it does on a GPU alone."""

    def put(training: Any) -> None:
        accelerator = training.accelerator
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale, backoff_factor=0.9)

        def unscale(_: Any = None) -> None:
            optimizer = training.optimizer
            while isinstance(optimizer, AcceleratedOptimizer):
                optimizer = optimizer.optimizer
            accelerator.scaler.unscale_(optimizer)

        accelerator.unscale_gradients = unscale

    return put


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_step_that_a_loss_scaler_skips_is_told_once(max_grad_norm: float, tmp_path: Path) -> None:
    options = {"max_grad_norm": max_grad_norm, "steps": 4}
    training, attached, told = measured(tmp_path / "a", scaled(3e38), **options)
    skipped = 4 - len(attached.history)
    assert skipped >= 2
    assert told == ["step 1 is not attributed: the loss scaler skips it, as it will others, untold"]
    same(training, tmp_path / "b", scaled(3e38), **options)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_loss_scaler_leaves_the_figures(max_grad_norm: float, tmp_path: Path) -> None:
    """Powers of two scale without rounding, so the figures are those without a scaler, unscaled by clipping or not."""
    options = {"max_grad_norm": max_grad_norm, "steps": 1}
    [with_scaler] = measured(tmp_path / "a", scaled(2.0**10), **options)[1].history
    [without] = measured(tmp_path / "b", **options)[1].history
    for name in ("total", "rollouts", "residual", "unattributed"):
        assert with_scaler[name] == pytest.approx(without[name], rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_rewards_that_are_not_finite_end_nothing(value: float, tmp_path: Path) -> None:
    def judge(training: Any) -> None:
        training.reward_funcs = [lambda completions, **_: [value, *[float(len(x)) for x in completions[1:]]]]

    training, attached, told = measured(tmp_path / "a", judge, steps=1)
    assert len(attached.history) + len(told) == 1
    same(training, tmp_path / "b", judge, steps=1)


def by_token(training: Any) -> None:
    """Advantages of shape (B, T), as a subclass may make them."""
    original = training._generate_and_score_completions

    def generate(inputs: Any) -> Any:
        output = original(inputs)
        count = output["completion_ids"].shape[1]
        signs = torch.linspace(1.0, -1.0, count) if count > 1 else torch.ones(1)
        output["advantages"] = output["advantages"].unsqueeze(1) * signs
        return output

    training._generate_and_score_completions = generate


def test_advantages_of_each_token_are_attributed(tmp_path: Path) -> None:
    training, attached, told = measured(tmp_path / "a", by_token, learning_rate=1e-4)
    assert not told
    for figures in attached.history:
        signs = figures["positive_advantage"], figures["negative_advantage"]
        size = sum(map(abs, signs)) + abs(figures["momentum"])
        assert figures["unattributed"] == 0
        assert figures["measured"] == pytest.approx(figures["total"], abs=0.1 * size)
        # The last columns have an advantage of the other sign, and one between may have none.
        assert sum(signs) == pytest.approx(figures["rollouts"], abs=1e-5 * size)
    same(training, tmp_path / "b", by_token, learning_rate=1e-4)


def without_entropies(training: Any) -> None:
    original = getattr(training, SCORE)

    def score(*args: Any, **kwargs: Any) -> Any:
        logprobs, _, *further = original(*args, **kwargs)
        return logprobs, torch.zeros_like(logprobs) if not torch.is_grad_enabled() else None, *further

    setattr(training, SCORE, score)
    # The trainer's metrics want them, which are no part of its loss.
    training._compute_loss = own_loss(training)


def own_loss(training: Any, scorings: int = 1) -> Callable[..., Tensor]:
    """A loss of one's own: REINFORCE, with its log-probabilities asked for as often as told."""

    def compute(model: Any, inputs: Any) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        counted = inputs["completion_mask"]
        asked = [getattr(training, SCORE)(model, ids, mask, counted.shape[1])[0] for _ in range(scorings)]
        return -(sum(asked) * inputs["advantages"].unsqueeze(1) * counted).sum() / counted.sum() / scorings

    return compute


@pytest.mark.parametrize("scorings", [1, 2])
def test_a_loss_of_ones_own_is_attributed(scorings: int, tmp_path: Path) -> None:
    """Entropies are None then, as nobody asks for them; asked for twice, log-probabilities have two coefficients."""

    def replace(training: Any) -> None:
        training.compute_loss = lambda model, inputs, **_: own_loss(training, scorings)(model, inputs)

    training, attached, told = measured(tmp_path / "a", replace, learning_rate=1e-4)
    assert not told
    for figures in attached.history:
        assert figures["unattributed"] == pytest.approx(0, abs=1e-3 * abs(figures["rollouts"]))
        assert figures["measured"] == pytest.approx(figures["total"], rel=0.1)
    same(training, tmp_path / "b", replace, learning_rate=1e-4)


def test_a_loss_replaced_after_the_attachment_is_told(tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    attached = EntropyInfluence(1, HELD_OUT).attach(training)
    training.compute_loss = lambda model, inputs, **_: own_loss(training)(model, inputs)
    with pytest.warns(UserWarning, match="step 1 is not attributed: .*without a call of _get_per_token"):
        training.train()
    assert not attached.history
    attached.detach()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"token_type_ids": torch.ones(6, 6)}, "token_type_ids went into the trainer's forward"),
        ({"pixel_values": torch.ones(6, 3)}, "pixel_values went into the trainer's forward"),
        ({"soft_prompt": torch.ones(6, 3)}, "soft_prompt went into the trainer's forward"),
    ],
)
def test_inputs_beside_ids_and_masks_are_told(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    kind = type(training)

    class Further(kind):  # type: ignore[valid-type, misc]
        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            known = {name: x for name, x in kwargs.items() if name not in more}
            return super()._get_per_token_logps_and_entropies(*args, **known)

        def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
            score = self._get_per_token_logps_and_entropies
            try:
                self._get_per_token_logps_and_entropies = lambda *a, **k: score(*a, **{**k, **more})
                return super()._compute_loss(model, inputs)
            finally:
                self._get_per_token_logps_and_entropies = score

    training.__class__ = Further
    attached = EntropyInfluence(1, HELD_OUT).attach(training)
    with pytest.warns(UserWarning, match=f"step 1 is not attributed: .*{message}"):
        training.train()
    assert not attached.history


def test_a_forward_that_is_not_the_policys_is_told(tmp_path: Path) -> None:
    """Noise that a hook adds in training, as nobody but the trainer's own forward would have it."""

    def noisy(module: Any, _: Any, output: Tensor) -> Tensor | None:
        return output + torch.rand(output.shape) if module.training else None

    def hook(training: Any) -> None:
        training.model.get_input_embeddings().register_forward_hook(noisy)

    training, attached, told = measured(tmp_path / "a", hook, steps=1)
    assert len(told) == 1
    assert "something else goes into the trainer's forward" in told[0]
    assert not attached.history
    same(training, tmp_path / "b", hook, steps=1)


def test_a_policy_that_cannot_be_split_is_refused_at_attach(tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    training.model.requires_grad_(False)
    with pytest.raises(ValueError, match="none with requires_grad"):
        EntropyInfluence(1, HELD_OUT).attach(training)
    assert not set(METHODS) & set(vars(training))


def test_an_optimizer_that_is_known_late_is_told_and_nothing_measured(tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 2)
    kind = type(training)

    class Late(kind):  # type: ignore[valid-type, misc]
        def create_optimizer(self, *_: Any) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
            return self.optimizer

    training.__class__ = Late
    attached = EntropyInfluence(1, HELD_OUT).attach(training)
    with pytest.warns(UserWarning, match="nothing of this training is measured: optimizer is .*SGD"):
        training.train()
    assert training.state.global_step == 2
    assert not attached.history


def test_noise_on_the_embeddings_is_refused(tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1, neftune_noise_alpha=5.0)
    with pytest.raises(ValueError, match="neftune_noise_alpha is 5"):
        EntropyInfluence(1, HELD_OUT).attach(training)


@pytest.mark.parametrize("column", ["image", "images"])
def test_images_are_refused(column: str, tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    training.train_dataset = training.train_dataset.add_column(column, ["a picture"] * len(training.train_dataset))
    with pytest.raises(ValueError, match=f"train_dataset has the column '{column}'"):
        EntropyInfluence(1, HELD_OUT).attach(training)


def test_a_training_whose_directory_is_removed_goes_on(tmp_path: Path) -> None:
    class Removing(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            shutil.rmtree(tmp_path / "a" / "entropy_influence")

    _, attached, told = measured(tmp_path / "a", lambda training: training.add_callback(Removing()))
    assert not told
    assert [figures["step"] for figures in attached.history] == [1, 2]
