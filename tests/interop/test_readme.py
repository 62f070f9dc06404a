"""The room's README: its examples compile, its plan is a plan, its tables name every field and figure."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import yaml

import fx_influence.interop as interop
from fx_influence.interop.rollouts import Rollout

README = (Path(str(interop.__file__)).parent / "README.md").read_text(encoding="utf-8")


def names_in_table(header: str) -> set[str]:
    """Return the names in code style in the first column of the table with this header."""
    table = README[README.index(header) :].partition("\n\n")[0]
    return {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split(" | ")[0])}


def test_readme_examples_compile() -> None:
    examples = re.findall(r"<!-- example: (\w+) -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    assert [name for name, _ in examples] == [
        "trl",
        "training",
        "offline",
        "own_loop",
        "verl",
        "swift",
        "loop",
        "processes",
    ]
    for name, text in examples:
        compile(text, f"README.md, {name}", "exec")


def test_readme_lists_every_rollout_field() -> None:
    assert names_in_table("| field | type | meaning |") == {field.name for field in dataclasses.fields(Rollout)}


def test_readme_plan_is_valid_yaml() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    assert set(yaml.safe_load(text)) == {"reward", "update", "evaluations"}
