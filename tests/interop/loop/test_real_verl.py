"""The README's example for verl in verl's own actor, sharded by its FSDP2 engine over two processes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.ranks import run_on_ranks
from helpers.sharded_results import assert_influences_of_one_process, assert_steps_add_up
from helpers.tolerances import rounding_bound

import fx_influence.interop as interop
from benchmarks.trl.variants import policy

README = (Path(str(interop.__file__)).parent / "README.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"<!-- example: verl -->\n```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.extra
def test_verl_actor_is_measured_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "measured_actor.py").write_text(EXAMPLE.replace("every=10", "every=1"), encoding="utf-8")
    policy().save_pretrained(tmp_path / "policy")
    for rank in run_on_ranks(2, "ranks_verl.py", tmp_path):
        assert rank["version"] == "0.9.1"
        for dtype in ("fp32", "bf16"):
            plain, measured = rank[dtype]["plain"], rank[dtype]["measured"]
            assert measured["sharded"]
            assert all(torch.equal(plain["weights"][key], x) for key, x in measured["weights"].items())
            assert [metrics["step"] for metrics in measured["history"]] == [1, 2]
            for metrics in measured["history"]:
                # theta' - theta of weights up to a thousand times as large.
                assert metrics["step_rounding"] <= rounding_bound(torch.float32, 1, 1e3)
        assert_steps_add_up(rank["fp32"]["measured"]["history"])
        assert_influences_of_one_process(rank["fp32"]["records"])
