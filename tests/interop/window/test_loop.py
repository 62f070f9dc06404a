"""Windows of a training loop: the account of steps that a test records by hand, their files, and what is refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.loops import (
    COUNT,
    MAX_NORM,
    PROMPT,
    PROMPTS,
    WIDTH,
    Loop,
    Rollouts,
    batch_of,
    closed_form,
    completion_values,
    named,
)
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding
from helpers.trl_runs import warnings_of
from torch import Tensor, nn
from torch.nn.functional import pad

import fx_influence as fx
from fx_influence.interop.ledger.file import read_ledger
from fx_influence.interop.live.measurement import PendingStep
from fx_influence.interop.loop.window import FOLDER
from fx_influence.interop.window import recorder
from fx_influence.interop.window.checks import check_window_settings
from fx_influence.interop.window.files import bound_in_bytes
from fx_influence.interop.window.recorder import WindowRecorder, check_replayable
from fx_influence.lab.console.window_tables import window_table
from fx_influence.lab.report.training_page import training_page
from fx_influence.lab.training.windows import compare_accounts
from fx_influence.trajectory.result import InfluenceOverSteps
from fx_influence.trajectory.window import RecordedStep, Window
from fx_influence.types import AdamWState, Params


class ByHand(Loop):
    """A loop whose steps are recorded in memory from the closed form of its loss."""

    def __init__(self, **fields: Any) -> None:
        self.recorded: list[tuple[Params, AdamWState, RecordedStep]] = []
        super().__init__(before_step=self.note, **fields)

    def note(self, model: nn.Module, optimizer: torch.optim.Optimizer, rollouts: Rollouts) -> None:
        with torch.no_grad():
            logprobs = completion_values(model, rollouts)[0]
        batch = batch_of(rollouts, closed_form(rollouts, logprobs))
        assert batch.group is not None
        # Other prompts in every step, as the loop samples them at random.
        others = batch.group + PROMPTS * len(self.recorded)
        batch = batch._replace(behaviour_logprobs=pad(rollouts.behaviour, (PROMPT, 0)), group=others)
        params = {name: p.detach().clone() for name, p in model.named_parameters()}
        state = fx.adamw_state(optimizer, model)
        step = RecordedStep(batch=batch, lr=1e-3, max_grad_norm=MAX_NORM, coefficient_slopes=batch.coefficients)
        self.recorded.append((params, state, step))

    def account(self, first: int, last: int) -> InfluenceOverSteps:
        params, state, _ = self.recorded[first - 1]
        steps = [step for _, _, step in self.recorded[first - 1 : last]]
        apply, _ = fx.make_functional(self.model)
        window = Window(params=params, opt_state=state, steps=steps)
        options: dict[str, Any] = {"apply": apply, "preconditioner": "frozen", "cross_fit": True}
        return fx.influence_over_steps(window, None, stderr=True, per_token=True, **options)


def with_behaviour(rollouts: Rollouts, logprobs: Tensor, _: Tensor) -> dict[str, Any]:
    return {**named(rollouts, logprobs), "behaviour_logprobs": rollouts.behaviour}


def windowed(directory: Path | None, **options: Any) -> dict[str, Any]:
    return {"every": 1, "directory": directory, "window": 2, "window_ratio": True} | options


class Finished(NamedTuple):
    """A loop of five steps with windows of two, the directory of its ledger, and the sizes of its windows' files."""

    loop: ByHand
    directory: Path
    sizes: list[tuple[int, int]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    sizes: list[tuple[int, int]] = []
    attribute = WindowRecorder._attribute

    def noting(recorder: WindowRecorder, pending: PendingStep) -> dict[str, Any]:
        files = recorder._files
        assert files is not None
        sizes.append((files.size(), bound_in_bytes(*files.state(torch.device("cpu")), 2, COUNT, WIDTH)))
        return attribute(recorder, pending)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WindowRecorder, "_attribute", noting)
        directory = tmp_path_factory.mktemp("steps")
        loop = ByHand(steps=5, options=windowed(directory), add=with_behaviour)
        capture = loop.run()
    yield Finished(loop, directory, sizes)
    assert capture is not None


def test_window_is_that_of_steps_recorded_by_hand(finished: Finished) -> None:
    entries = read_ledger(finished.directory)
    assert [entry["step"] for entry in entries if "window" in entry] == [2, 4]
    for entry in entries[1:4:2]:
        account, out = entry["window"], finished.loop.account(entry["step"] - 1, entry["step"])
        assert (account["first"], account["last"]) == (entry["step"] - 1, entry["step"])
        scale = float(sum(x.abs().sum() for x in out.per_sequence))

        def same(value: float, expected: Tensor, scale: float = scale) -> None:
            # Behaviour log-probabilities and coefficients are captured in float32.
            assert_close_to_rounding(value, expected, terms=TINY_POLICY, scale=scale, dtype=torch.float32)

        figures = account["figures"]
        same(figures["rollouts"], torch.cat(out.per_sequence).sum())
        for name in ("momentum", "total", "total_stderr", "momentum_stderr"):
            same(figures[name], getattr(out, name))
        same(figures["weight_decay"], out.weight_decay.sum())
        assert figures["degrees_of_freedom"] == out.degrees_of_freedom == PROMPTS - 2
        for row, influences, decay in zip(account["steps"], out.per_sequence, out.weight_decay, strict=True):
            same(row[1], influences.sum())
            same(row[3], decay)
        for kind in ("advantage", "region", "third"):
            same(sum(value for _, value, *_ in account["sums"][kind]), torch.cat(out.per_sequence).sum())
    assert entries[3]["window"]["figures"]["momentum"] != 0


def test_files_are_bounded_and_removed(finished: Finished) -> None:
    assert len(finished.sizes) == 2
    assert all(0 < size <= bound for size, bound in finished.sizes)
    [left] = (finished.directory / FOLDER).glob("step_*")
    assert left.name == "step_000000005.safetensors", "the window that begins with the last step"


def test_frame_and_page_have_the_ledgers_numbers(finished: Finished) -> None:
    entries = read_ledger(finished.directory)
    accounts = [entry["window"]["figures"] for entry in entries if "window" in entry]
    training = fx.load_training(finished.directory)
    assert training.windows.figures["total"].tolist() == [x["total"] for x in accounts]
    assert training.windows.steps["step"].tolist() == [1, 2, 3, 4]
    assert set(training.windows.labels["kind"]) >= {"region", "third", "band", "advantage"}
    rows = {row.name: row for row in compare_accounts(training.windows, training.steps)}
    for name in ("rollouts", "momentum", "weight_decay", "total"):
        assert rows[name].window == pytest.approx(sum(x[name] for x in accounts))
        assert rows[name].one_step == pytest.approx(sum(entry["figures"][name] for entry in entries[:4]))
    table = window_table(training)
    assert table is not None
    page = training_page(training, figures=False)
    assert "2 windows of 2 steps; both accounts are of the 2 whose steps all are measured" in page
    for row in table.accounts:
        cells = (row.one_step, row.window, row.stderr, row.difference)
        assert re.search(r"\s*".join(f"<td>{re.escape(x)}</td>" for x in cells), page)
    assert [name for name, _, _ in table.distances] == ["the last step", "1 step before"]


def test_windows_leave_the_training_unchanged(finished: Finished) -> None:
    plain = Loop(steps=5)
    plain.run()
    weights, expected = finished.loop.weights(), plain.weights()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_fault_is_one_warning_and_the_step_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(recorder, "influence_over_steps", fail)
    loop = Loop(steps=2, options=windowed(tmp_path), add=with_behaviour)
    assert warnings_of(loop.run) == ["step 2: the window of steps 1 to 2 is not attributed: RuntimeError: out of luck"]
    assert ["window" in entry for entry in read_ledger(tmp_path)] == [False, False]
    assert not (tmp_path / FOLDER).exists()


def test_ratio_that_is_not_told_is_one_warning(tmp_path: Path) -> None:
    loop = Loop(steps=1, options=windowed(tmp_path, window_ratio=None), add=with_behaviour)
    [text] = warnings_of(loop.run)
    assert text.startswith("step 1: the window of steps 1 to 2 is not attributed: window_ratio is None")
    assert len(read_ledger(tmp_path)) == 1


def test_interrupted_window_is_discarded_with_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / FOLDER
    folder.mkdir()
    (folder / "step_000000007.safetensors").write_bytes(b"of a training run that was killed")
    loop = Loop(steps=1, options=windowed(tmp_path), add=with_behaviour)
    with caplog.at_level(logging.WARNING):
        capture = loop.run()
        assert capture is not None
        assert "is discarded: its training run was interrupted" in caplog.text
        assert [path.name for path in sorted(folder.iterdir())] == ["state.safetensors", "step_000000001.safetensors"]
        capture.detach()
    assert "the window of steps 1 to 2 is discarded: the capture is detached" in caplog.text
    assert not folder.exists()


def test_step_without_a_record_ends_its_window(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The second step, where the window ends, is not recorded."""
    loop = Loop(steps=5, options=windowed(tmp_path, window=2, every=1), add=with_behaviour)
    record = recorder.WindowRecorder.record

    def forgetting(this: recorder.WindowRecorder, step: int, captured: Any) -> None:
        if step != 2:
            record(this, step, captured)

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(recorder.WindowRecorder, "record", forgetting)
        loop.run()
    assert [entry["step"] for entry in read_ledger(tmp_path) if "window" in entry] == [4]
    assert "the window of steps 1 to 2 is discarded: step 2 could not be measured" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window is 0; expected at least 1"),
        ({"preconditioner": "rmsprop"}, "preconditioner is 'rmsprop' with window=2"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_attach_refuses_a_window_that_cannot_be(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    loop = Loop(steps=1, options=windowed(tmp_path, **options))
    with pytest.raises(ValueError, match=message):
        loop.run()


def test_window_without_a_ledger_is_refused() -> None:
    with pytest.raises(ValueError, match="directory is None with window=2; expected that of"):
        Loop(steps=1, options=windowed(None)).run()


def test_several_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="window is 8 and 2 processes train; expected one"):
        check_window_settings(8, "frozen", 2, is_partitioned=False)


def test_training_under_deepspeed_is_refused() -> None:
    with pytest.raises(ValueError, match="window is 8 and the training runs under DeepSpeed; expected torch's own"):
        check_window_settings(8, "frozen", 1, is_partitioned=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_refused(dtype: torch.dtype) -> None:
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    with pytest.raises(ValueError, match="expected float32 in a window"):
        check_replayable(optimizer, [torch.float32, dtype])
