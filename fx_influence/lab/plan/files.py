"""Plans as YAML files."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from fx_influence.lab.plan.batch_request import (
    with_paths,
)
from fx_influence.lab.plan.demo import demo_path
from fx_influence.lab.plan.errors import PlanError
from fx_influence.lab.plan.plans import AnyPlan, StepPlan


class _Loader(yaml.SafeLoader):
    """YAML without objects of Python, where a key that is given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} of line {lines[key.value]} is given again", problem_mark=key.start_mark
                )
            lines[str(key.value)] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def read_plan(path: Path, kind: type[AnyPlan]) -> AnyPlan:
    """A plan from a YAML file; relative paths in it are relative to the file. Raises ``PlanError``."""
    named = f"plan file {str(path)!r}"
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except FileNotFoundError as error:
        raise PlanError(f"{named} does not exist; check the path") from error
    except OSError as error:
        raise PlanError(f"{named} cannot be read: {error.strerror}; give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise PlanError(f"{named} is not YAML: {_yaml_problem(error)}; `fx-influence plan` prints one") from error
    return resolved(kind.from_dict({} if values is None else values), path.resolve().parent)


def _yaml_problem(error: Exception) -> str:
    """Return in one line what a reader of YAML has to say, and in which line of the file."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    tab = " (indent with spaces, not tabs)" if "\\t" in str(error.problem) else ""
    return f"{error.problem or error.context}, in line {error.problem_mark.line + 1}{tab}"


def plan_text(plan: StepPlan) -> str:
    """The plan as YAML."""
    return yaml.safe_dump(plan.to_dict(), sort_keys=False, allow_unicode=True)


def resolved(plan: AnyPlan, folder: Path) -> AnyPlan:
    """The plan with its relative paths taken from ``folder``, so that it means the same wherever it is stored."""

    def absolute(path: str) -> str:
        return path if demo_path(path) != path else str((folder / Path(path).expanduser()).resolve())

    return dataclasses.replace(
        plan,
        checkpoint=absolute(plan.checkpoint),
        base=None if plan.base is None else absolute(plan.base),
        update=with_paths(plan.update, absolute),
        evaluations=tuple(with_paths(request, absolute) for request in plan.evaluations),
    )
