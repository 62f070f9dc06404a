"""The direction of imports, read from the source: mathematics <- interop <- lab, and the reference apart from all."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fx_influence"
MATHEMATICS = sorted(path for path in PACKAGE.glob("*.py") if path.name != "__init__.py")
INTEROP, LAB = (sorted((PACKAGE / room).rglob("*.py")) for room in ("interop", "lab"))
OURS = sorted(path for room in (PACKAGE, ROOT / "tests", ROOT / "benchmarks") for path in room.rglob("*.py"))
THIRD_PARTY = {"torch", "einops", "numpy"}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def resolve(node: ast.ImportFrom, package: str) -> str:
    """The absolute name of the module that ``from ... import`` names inside a module of ``package``."""
    if not node.level:
        return node.module or ""
    base = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def imported(source: str, package: str) -> set[str]:
    """Every module that a source imports, at any depth, and whatever it imports from one as ``module.name``."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve(node, package)
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            names |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return names


def imports_of(path: Path) -> set[str]:
    return imported(path.read_text(encoding="utf-8"), ".".join(path.relative_to(ROOT).parent.parts))


def inside(names: set[str], *modules: str) -> set[str]:
    return {name for name in names for module in modules if name == module or name.startswith(f"{module}.")}


def test_an_import_is_seen_however_it_is_written() -> None:
    source = """
import os.path, fx_influence.lab.cli
from fx_influence.testing import reference
from . import grads
from .. import interop
def f():
    from fx_influence.interop.optimizers import adamw_state
    importlib.import_module("transformers")
"""
    found = imported(source, "fx_influence.lab")
    assert {"os.path", "fx_influence.lab.cli", "fx_influence.testing.reference", "fx_influence.lab.grads"} <= found
    assert {"fx_influence.interop", "fx_influence.interop.optimizers", "transformers"} <= found


@pytest.mark.parametrize("path", MATHEMATICS, ids=relative)
def test_mathematics_imports_torch_einops_numpy_and_itself_only(path: Path) -> None:
    names = imports_of(path)
    roots = {name.partition(".")[0] for name in names}
    foreign = roots - THIRD_PARTY - set(sys.stdlib_module_names) - {"fx_influence"}
    assert not foreign, f"{relative(path)} imports {sorted(foreign)}"
    modules = {path.stem for path in MATHEMATICS}
    for name in inside(names, "fx_influence"):
        parts = name.split(".")
        assert len(parts) > 1, f"{relative(path)} imports the package, which imports interop: name the module"
        assert parts[1] in modules, f"{relative(path)} imports {name}"


def test_the_package_itself_imports_mathematics_and_interop_only() -> None:
    names = imports_of(PACKAGE / "__init__.py")
    assert not inside(names, "fx_influence.lab", "fx_influence.testing.reference")
    assert {name.partition(".")[0] for name in names} <= {"fx_influence", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", INTEROP, ids=relative)
def test_interop_does_not_import_the_lab(path: Path) -> None:
    assert not inside(imports_of(path), "fx_influence.lab")


def test_the_reference_imports_nothing_of_the_package_but_types() -> None:
    found = inside(imports_of(PACKAGE / "reference.py"), "fx_influence")
    assert "fx_influence.types" in found
    assert found == inside(found, "fx_influence.types")


@pytest.mark.parametrize("path", [p for p in OURS if p.is_relative_to(PACKAGE)], ids=relative)
def test_only_tests_and_benchmarks_import_the_reference(path: Path) -> None:
    assert not inside(imports_of(path), "fx_influence.testing.reference")


def test_no_module_is_named_utils() -> None:
    assert OURS
    named = [relative(p) for p in OURS if {"utils", "util", "common", "misc"} & {p.stem, p.parent.name}]
    assert not named


def test_importing_the_package_does_not_import_transformers_or_peft() -> None:
    heavy = ("transformers", "peft", "accelerate", "trl", "safetensors", "rich", "yaml", "fx_influence.lab")
    code = f"import sys, fx_influence; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
