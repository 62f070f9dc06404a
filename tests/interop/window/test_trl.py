"""Windows of real TRL training runs: both accounts, their files, and a training run that stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding
from helpers.trl_runs import measure_training

import fx_influence as fx
from benchmarks.trl.variants import Variant
from fx_influence.interop.ledger.file import read_ledger
from fx_influence.interop.trl.store.training import WINDOW
from fx_influence.interop.window import recorder
from fx_influence.interop.window.files import WindowStep, bound_in_bytes
from fx_influence.trajectory.window import Window

# The warnings that trl, transformers and accelerate give about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]
BATCH: dict[str, Any] = {"per_device_train_batch_size": 12, "learning_rate": 1e-3}
WINDOWED: dict[str, Any] = {"every": 1, "eval_prompts": "batch", "window": 2}
STEPS = "entropy_influence"
PLAIN = Variant("dapo", False, 1, False, {})


def window_folder(out: Path) -> list[Path]:
    return list((out / STEPS).glob(f"{WINDOW}*"))


class Recorded:
    """What the files of every window had when it was attributed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.windows: list[tuple[Window, list[WindowStep], int]] = []
        attribute = recorder.WindowRecorder._attribute

        def noting(this: recorder.WindowRecorder, pending: Any) -> Any:
            files = this._files
            assert files is not None
            params, state = files.state(torch.device("cpu"))
            steps = files.steps(torch.device("cpu"))
            window = Window(params=params, opt_state=state, steps=[x.step for x in steps])
            self.windows.append((window, steps, files.size()))
            return attribute(this, pending)

        monkeypatch.setattr(recorder.WindowRecorder, "_attribute", noting)


def test_window_of_a_training_is_that_of_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second window begins with moments; every number of the ledger is that of ``influence_over_steps``."""
    recorded = Recorded(monkeypatch)
    measured = measure_training(tmp_path, 4, PLAIN, settings=WINDOWED, **BATCH)
    assert measured.warnings == []
    assert window_folder(tmp_path) == []
    entries = read_ledger(tmp_path / STEPS)
    assert [entry["step"] for entry in entries if "window" in entry] == [2, 4]
    apply, _ = fx.make_functional(measured.trainer.model, position_ids=False)
    for (window, steps, size), entry in zip(recorded.windows, entries[1::2], strict=True):
        account = entry["window"]
        assert [x.number for x in steps] == [account["first"], account["last"]]
        assert size <= bound_in_bytes(window.params, window.opt_state, 2, 12, window.steps[0].batch.input_ids.shape[1])
        options: dict[str, Any] = {"apply": apply, "preconditioner": "frozen", "temperature": 1.0}
        out = fx.influence_over_steps(window, None, stderr=True, per_token=True, **options)
        terms = dict(
            zip(("rollouts", "momentum"), (sum(float(x.sum()) for x in out.per_sequence), out.momentum), strict=True)
        )
        scale = sum(float(x.abs().sum()) for x in out.per_sequence)
        for name, value in {**terms, "total": out.total, "total_stderr": out.total_stderr}.items():
            expected = torch.as_tensor(value, dtype=torch.float32)
            got = torch.tensor(account["figures"][name])
            assert_close_to_rounding(got, expected, terms=TINY_POLICY, scale=scale, dtype=torch.float32)
        sums = out.sums([x.kinds["region"] for x in steps])
        for name, value in zip(sums.names, sums.influence.tolist(), strict=True):
            known = {row[0]: row[1] for row in account["sums"]["region"]}
            assert known.get(name, 0.0) == pytest.approx(value, abs=1e-6 * scale)
        assert account["figures"]["replay_error"] < 1e-3
    assert entries[-1]["window"]["figures"]["momentum"] != 0
