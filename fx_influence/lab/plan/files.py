"""Read and write plans as YAML files."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import yaml

from fx_influence.interop.runtime.renamed import plan_notes
from fx_influence.lab.plan.batch_request import with_paths
from fx_influence.lab.plan.demo import demo_path
from fx_influence.lab.plan.errors import PlanError
from fx_influence.lab.plan.step_plan import AnyPlan, StepPlan


class _PlanLoader(yaml.SafeLoader):
    """Load YAML without Python objects; a key that is given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} of line {lines[key.value]} is given again", problem_mark=key.start_mark
                )
            lines[str(key.value)] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def print_note(text: str) -> None:
    """Print a note on standard error, behind the name of the command."""
    print(f"fx-influence: {text}", file=sys.stderr, flush=True)


def read_plan(path: Path, plan_type: type[AnyPlan], note: Callable[[str], object] = print_note) -> AnyPlan:
    """Return the plan in a YAML file; relative paths in it are taken from the file's folder.

    Args:
        path: of the YAML file.
        plan_type: ``EntropyInfluencePlan`` or ``FisherKernelPlan``.
        note: called with a sentence for each field that the file names as version 0.1 did.

    Raises:
        PlanError: for a file that cannot be read, is not YAML, or holds no valid plan.
    """
    file = f"plan file {str(path)!r}"
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), _PlanLoader)
    except FileNotFoundError as error:
        raise PlanError(f"{file} does not exist; expected a YAML file. Check the path") from error
    except OSError as error:
        raise PlanError(f"{file} cannot be read: {error.strerror}; expected a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        problem = _yaml_problem(error)
        raise PlanError(f"{file} is not YAML: {problem}; expected a plan. `fx-influence plan` prints one") from error
    plan = resolved(plan_type.from_dict({} if values is None else values), path.resolve().parent)
    for sentence in plan_notes(values or {}, plan_type.old_fields):
        note(f"{file}: {sentence}")
    return plan


def _yaml_problem(error: Exception) -> str:
    """Return in one line what the YAML reader says, and the line of the file."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    tab = " (indent with spaces, not tabs)" if "\\t" in str(error.problem) else ""
    return f"{error.problem or error.context}, in line {error.problem_mark.line + 1}{tab}"


def plan_text(plan: StepPlan) -> str:
    """Return the plan as YAML."""
    return yaml.safe_dump(plan.to_dict(), sort_keys=False, allow_unicode=True)


def resolved(plan: AnyPlan, folder: Path) -> AnyPlan:
    """Return the plan with its relative paths taken from ``folder``, so that it may be stored anywhere."""

    def absolute(path: str) -> str:
        return path if demo_path(path) != path else str((folder / Path(path).expanduser()).resolve())

    return dataclasses.replace(
        plan,
        checkpoint=absolute(plan.checkpoint),
        base=None if plan.base is None else absolute(plan.base),
        update=with_paths(plan.update, absolute),
        evaluations=tuple(with_paths(request, absolute) for request in plan.evaluations),
    )
