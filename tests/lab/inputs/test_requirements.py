"""Batches that cannot be made as a plan asks are refused before anything is sampled."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
from helpers.run_files import GSM8K
from pyarrow import parquet

from fx_influence.lab.cli import main
from fx_influence.lab.experiment import entropy as run_module
from fx_influence.lab.inputs.rollouts import load_state
from fx_influence.lab.plan import (
    CustomSequence,
    EntropyInfluencePlan,
    PlanError,
    resolved,
)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"prompts": ["1+1="], "prompt_ids": ["7"]}, r"prompt_ids has '7'; expected one of the 1 ids of 'prompts'"),
        ({"prompts": ["1+1="], "prompt_ids": ["0", "0"]}, r"prompt_ids is \['0', '0'\]; expected each prompt once"),
        ({"prompts": ["1+1="], "num_prompts": 2}, r"num_prompts is 2; expected at most 1, as 'prompts' holds"),
        ({"prompts": ["1+1=", {"prompt": "2+2=", "id": "0"}]}, r"prompt 1: id '0' is already the id of prompt 0"),
        ({"prompts": [{"text": "1"}]}, r'prompt 0 has no "prompt", "messages" or "question"'),
        ({"prompt": "1+1=", "completion": "", "end": False}, r"completion is '', which has no tokens"),
        ({"prompt": "", "completion": "2"}, r"has no tokens; expected at least one"),
        ({"prompt": "1+1=", "completion": "2" * 70}, r"model has 64 positions"),
        ({"rollouts": "absent.jsonl"}, r"rollouts file .*absent\.jsonl' does not exist"),
        ({"rollouts": "empty.jsonl"}, r"empty\.jsonl' holds no rollout"),
        ({"rollouts": "twice.jsonl"}, r"twice\.jsonl' gives 1 ids to more than one rollout: x; expected unique ids"),
        ({"rollouts": "unjudged.jsonl"}, r"reward of rollout 'x' of .*unjudged\.jsonl' is None; .*group 0 lacks"),
        ({"rollouts": "foreign.jsonl"}, r"rollout 'x' of .*foreign\.jsonl' has token 999; expected ids below 15"),
    ],
)
def test_run_rejects_impossible_batch_before_passes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    update: dict[str, Any],
    message: str,
) -> None:
    record = {"id": "x", "prompt_id": "0", "group": 0, "prompt": "1+1=", "completion": "2", "prompt_ids": [4, 5]}
    record |= {"completion_ids": [6, 1], "finished": True, "behaviour_logprobs": [-9.0, -9.0]}
    lines = {"empty": [], "twice": [record] * 2, "unjudged": [record]}
    lines["foreign"] = [record | {"advantage": 1.0, "prompt_ids": [4, 999]}]
    for name, records in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    values = {"update": update, "evaluations": [{"prompts": "demo/eval", "num_prompts": 2}]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(run_module, "first_order", lambda *args: pytest.fail("the long work began"))
    assert main(["run", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("request_", "reward", "absent", "message"),
    [
        ({"prompts": [{"prompt": "1+1=", "gold": "2"}]}, "exact_match", "", r"columns \['gold'\]: missing .* 'answer'"),
        ({"prompts": [{"prompt": "1+1=", "gold": "2"}]}, "math_verify", "", r'expected "answer" or "solution"'),
        ({"prompts": "g.parquet"}, "math_verify", "math_verify", r"pip install 'fx-influence\[math\]'"),
        ({"prompts": "g.parquet"}, "math_verify", "pyarrow", r"pip install 'fx-influence\[parquet\]'"),
        (
            {"prompts": "g.parquet", "system": "s"},
            "math_verify",
            "",
            r"'0' a plain text; expected a conversation. Set chat: true",
        ),
        ({"prompts": "g.parquet", "chat": True}, "math_verify", "", r"'0' is a conversation and the tokenizer has no"),
        (
            {"prompts": [{"messages": [{"role": "user", "content": "?"}]}, "?"]},
            "exact_match",
            "",
            r"Set chat: true, or",
        ),
    ],
)
def test_load_state_names_missing_requirements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: dict[str, Any], reward: str, absent: str, message: str
) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(GSM8K), tmp_path / "g.parquet")
    values: dict[str, Any] = {"update": CustomSequence("1+1=", "2"), "evaluations": [request_]}
    plan = EntropyInfluencePlan(**values, reward=f"fx_influence.interop.rewards:{reward}")
    if absent:
        monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises((ValueError, ImportError), match=message):
        load_state(resolved(plan, tmp_path))


@pytest.mark.parametrize("device", ["cuda:99", "nowhere"])
def test_load_state_names_missing_device(device: str) -> None:
    with pytest.raises(PlanError, match=rf"device is '{device}', which cannot be used here"):
        load_state(EntropyInfluencePlan(device=device))
