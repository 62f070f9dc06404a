"""The rules of language in CONTRIBUTING.md that a program can check: docstrings, identifiers, names of tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("fx_influence", "benchmarks", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
FRAGMENTS = {
    *("What", "Of", "Which", "With", "Where", "How", "That", "For", "From", "In", "By", "As", "Than"),
    *("Whatever", "Such"),
}
"""First words after which a docstring has no subject or no verb."""
VAGUE = {
    *("found", "own", "whole", "still", "apart", "here", "there", "some", "together", "alike", "at", "toward"),
    *("along", "room", "most", "kept", "held"),
}
"""Names that do not say what is named."""
LONGEST_TEST_NAME = 60


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def openings(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the name of everything with a docstring, and that docstring's first word."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if docstring := ast.get_docstring(node):
            yield getattr(node, "name", "the module"), docstring.split()[0].strip("`,.;:")


def bound_names(tree: ast.AST) -> Iterator[str]:
    """Yield the names of variables, parameters, functions and classes that a source binds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_docstrings_open_with_a_verb_or_a_definition(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [(name, word) for name, word in openings(tree) if word in FRAGMENTS] == []


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_identifiers_name_the_thing(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [name for name in bound_names(tree) if name.strip("_") in VAGUE] == []


@pytest.mark.parametrize("path", [p for p in FILES if p.name.startswith("test_")], ids=relative)
def test_names_of_tests_are_short(path: Path) -> None:
    names = [
        node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    ]
    assert [name for name in names if name.startswith("test_") and len(name) > LONGEST_TEST_NAME] == []
