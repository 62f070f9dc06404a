"""Windows of a training loop: the account of steps that a test records by hand, their files, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.loops import MAX_NORM, PROMPT, Loop, Rollouts, closed_form, completion_values, named
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding
from helpers.trl_runs import warnings_of
from torch import Tensor, nn

import fx_influence as fx
from fx_influence.interop.ledger.file import read_ledger
from fx_influence.interop.loop.window import FOLDER
from fx_influence.interop.window import recorder
from fx_influence.interop.window.files import WindowFiles, bound_in_bytes
from fx_influence.lab.report.training_page import training_page
from fx_influence.lab.training.windows import compare_accounts
from fx_influence.trajectory.result import InfluenceOverSteps
from fx_influence.trajectory.window import RecordedStep, Window
from fx_influence.types import AdamWState, Batch, Params


def in_all_columns(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values, (PROMPT, 0))


class ByHand(Loop):
    """A loop whose steps are recorded in memory from the closed form of its loss."""

    def __init__(self, **fields: Any) -> None:
        self.recorded: list[tuple[Params, AdamWState, RecordedStep]] = []
        super().__init__(before_step=self.note, **fields)

    def note(self, model: nn.Module, optimizer: torch.optim.Optimizer, rollouts: Rollouts) -> None:
        with torch.no_grad():
            logprobs = completion_values(model, rollouts)[0]
        group = torch.unique(rollouts.input_ids[:, :PROMPT], dim=0, return_inverse=True)[1]
        c = in_all_columns(closed_form(rollouts, logprobs))
        batch = Batch(
            input_ids=rollouts.input_ids,
            attention_mask=rollouts.attention_mask,
            completion_mask=in_all_columns(rollouts.completion_mask),
            coefficients=c,
            # Other prompts in every step, as the loop samples them at random.
            group=100 * len(self.recorded) + group,
            behaviour_logprobs=in_all_columns(rollouts.behaviour),
        )
        params = {name: p.detach().clone() for name, p in model.named_parameters()}
        state = fx.adamw_state(optimizer, model)
        step = RecordedStep(batch=batch, lr=1e-3, max_grad_norm=MAX_NORM, coefficient_slopes=c)
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


def windowed(directory: Path, **options: Any) -> dict[str, Any]:
    return {"every": 1, "directory": directory, "window": 2, "window_ratio": True, **options}


@pytest.fixture
def tiny_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignore nothing: the behaviour's noise makes effective sample sizes small, which is no matter of windows."""


def test_window_is_that_of_steps_recorded_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    discard = WindowFiles.discard

    def noting(files: WindowFiles) -> None:
        if files.folder.exists():
            params, state = files.state(torch.device("cpu"))
            sizes.append((files.size(), bound_in_bytes(params, state, 2, 15, 8)))
        discard(files)

    monkeypatch.setattr(WindowFiles, "discard", noting)
    loop = ByHand(steps=4, options=windowed(tmp_path), add=with_behaviour)
    loop.run()
    assert len(sizes) == 2
    assert all(0 < size <= bound for size, bound in sizes)
    assert not (tmp_path / FOLDER).exists()
    entries = read_ledger(tmp_path)
    assert [entry["step"] for entry in entries if "window" in entry] == [2, 4]
    for entry in entries[1::2]:
        account, out = entry["window"], loop.account(entry["step"] - 1, entry["step"])
        assert (account["first"], account["last"]) == (entry["step"] - 1, entry["step"])
        scale = float(sum(x.abs().sum() for x in out.per_sequence))

        def same(value: float, expected: Tensor, scale: float = scale) -> None:
            assert_close_to_rounding(value, expected, terms=TINY_POLICY, scale=scale, dtype=torch.float32)

        figures = account["figures"]
        same(figures["rollouts"], torch.cat(out.per_sequence).sum())
        for name in ("momentum", "total", "total_stderr", "momentum_stderr"):
            same(figures[name], getattr(out, name))
        same(figures["weight_decay"], out.weight_decay.sum())
        for row, influences, decay in zip(account["steps"], out.per_sequence, out.weight_decay, strict=True):
            same(row[1], influences.sum())
            same(row[3], decay)
        signs = {name: value for name, value, *_ in account["sums"]["advantage"]}
        same(sum(signs.values()), torch.cat(out.per_sequence).sum())
    assert entries[-1]["window"]["figures"]["momentum"] != 0


def test_frame_and_page_have_the_ledgers_numbers(tmp_path: Path) -> None:
    ByHand(steps=5, options=windowed(tmp_path), add=with_behaviour).run()
    entries = read_ledger(tmp_path)
    accounts = [entry["window"]["figures"] for entry in entries if "window" in entry]
    training = fx.load_training(tmp_path)
    assert training.windows.figures["total"].tolist() == [x["total"] for x in accounts]
    assert training.windows.steps["step"].tolist() == [1, 2, 3, 4]
    assert set(training.windows.labels["kind"]) >= {"region", "third", "band", "advantage"}
    rows = {row.name: row for row in compare_accounts(training.windows, training.steps)}
    for name in ("rollouts", "momentum", "weight_decay", "total"):
        assert rows[name].window == pytest.approx(sum(x[name] for x in accounts))
        assert rows[name].one_step == pytest.approx(sum(entry["figures"][name] for entry in entries[:4]))
    page = training_page(training, figures=False)
    assert "2 windows of 2 steps; both accounts are of the 2 whose steps all are measured" in page
    assert page.count("1 step before") == 1
