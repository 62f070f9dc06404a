"""The order of rooms, read from the source: core first, lab last; tests and benchmarks alone import the reference."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fx_influence"
ORDER = (
    {"types", "core"},
    {"estimators", "optim", "batching"},
    {"policy"},
    {"autodiff"},
    {"distributed"},
    {
        *("objectives", "labels", "losses", "functional", "perturbation", "derivative_check", "fisher", "proxies"),
        "attribution",
    },
    {"trajectory"},
    {"control"},
    {"interop"},
    {"lab"},
)
"""Rooms and top modules; each may import from its own set and from earlier ones."""

PLACE = {name: place for place, names in enumerate(ORDER) for name in names}
OUTSIDE_THE_ORDER = {"__init__", "__main__", "testing"}
MATHEMATICS = {name for names in ORDER[:7] for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))
THIRD_PARTY = {"torch", "einops", "numpy", "scipy"}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def resolve(node: ast.ImportFrom, package: str) -> str:
    """Return the absolute name of the module that ``from ... import`` names inside a module of ``package``."""
    if not node.level:
        return node.module or ""
    base = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def imported(source: str, package: str) -> set[str]:
    """Return every module that a source imports, at any depth, and names imported from one as ``module.name``."""
    names: set[str] = set()
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
            names |= {str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return names


def imports_of(path: Path) -> set[str]:
    return imported(path.read_text(encoding="utf-8"), ".".join(path.relative_to(ROOT).parent.parts))


def rooms_imported(path: Path) -> set[str]:
    """Return the rooms and top modules of the package that a file imports."""
    names = [name.split(".") for name in imports_of(path)]
    return {parts[1] for parts in names if parts[0] == "fx_influence" and len(parts) > 1}


def test_imports_are_seen_however_written() -> None:
    source = """
import os.path, fx_influence.lab.cli
from fx_influence.testing import reference
from . import grads
from .. import interop
def f():
    from fx_influence.interop.optimizers import adamw_state
    importlib.import_module("transformers")
"""
    names = imported(source, "fx_influence.lab")
    assert {"os.path", "fx_influence.lab.cli", "fx_influence.testing.reference", "fx_influence.lab.grads"} <= names
    assert {"fx_influence.interop", "fx_influence.interop.optimizers", "transformers"} <= names


def test_every_module_has_a_place_in_the_order() -> None:
    assert {room_of(path) for path in FILES} - OUTSIDE_THE_ORDER == PLACE.keys()


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in PLACE], ids=relative)
def test_modules_import_earlier_rooms_only(path: Path) -> None:
    later = {name for name in rooms_imported(path) if name in PLACE and PLACE[name] > PLACE[room_of(path)]}
    assert not later, f"{relative(path)} imports {sorted(later)}, which come after it"


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in MATHEMATICS], ids=relative)
def test_mathematics_imports_tensors_and_scipy_only(path: Path) -> None:
    roots = {name.partition(".")[0] for name in imports_of(path)}
    foreign = roots - THIRD_PARTY - set(sys.stdlib_module_names) - {"fx_influence"}
    assert not foreign, f"{relative(path)} imports {sorted(foreign)}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_only_tests_and_benchmarks_import_the_reference(path: Path) -> None:
    assert room_of(path) == "testing" or "testing" not in rooms_imported(path)


def test_reference_imports_only_types_of_the_package() -> None:
    testing = [path for path in FILES if room_of(path) == "testing"]
    assert {name for path in testing for name in rooms_imported(path)} <= {"types", "testing"}
    assert any("types" in rooms_imported(path) for path in testing)


def test_no_import_cycle_between_modules() -> None:
    """Imports at the top of modules alone; one inside a function or under TYPE_CHECKING makes no cycle."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        top: list[ast.stmt] = [
            n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, (ast.Import, ast.ImportFrom))
        ]
        package = ".".join(path.relative_to(ROOT).parent.parts)
        names = imported(ast.unparse(ast.Module(top, [])), package)
        graph[name] = {n for n in names if n in modules and n != name}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_folders_hold_at_most_nine_modules() -> None:
    counts: dict[str, int] = {}
    for path in FILES:
        if path.name not in ("__init__.py", "__main__.py"):
            counts[relative(path.parent)] = counts.get(relative(path.parent), 0) + 1
    assert {folder: count for folder, count in counts.items() if count > 9} == {}


def test_no_module_is_named_utils() -> None:
    vague = {"utils", "util", "common", "misc"}
    ours = [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert not [relative(p) for p in ours if vague & {p.stem, p.parent.name}]


def test_package_import_leaves_heavy_packages_alone() -> None:
    heavy = ("torch", "transformers", "peft", "accelerate", "trl", "safetensors", "rich", "yaml", "fx_influence.lab")
    code = f"import sys, fx_influence; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_mathematics_leaves_transformers_alone() -> None:
    code = "import sys, fx_influence as fx; fx.influence, fx.fisher_kernel; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
