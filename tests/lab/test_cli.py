"""The command line itself: help, version and the plan to copy without torch, progress and errors in plain lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fx_influence as fx
from fx_influence.lab.cli import COMMENTED_PLAN, main
from fx_influence.lab.commands import one_line
from fx_influence.lab.experiment.progress import ProgressLines

ROOT = Path(__file__).parents[2]
SMALL = {
    "update": {"prompt": "3+14+9=", "completion": "3+14=17"},
    "evaluations": [{"prompts": "demo/eval", "num_prompts": 2, "completions_per_prompt": 2}],
    "directions": ["full"],
    "eta_multiples": [1.0],
    "scaled_eta_multiples": [],
}


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["plan"]])
def test_cli_answers_without_importing_torch(arguments: list[str]) -> None:
    """Importing torch takes seconds, and what is heavier imports it."""
    code = (
        "import sys\nfrom fx_influence.lab.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "print({'torch', 'numpy', 'rich', 'yaml', 'transformers'} & set(sys.modules))"
    )
    assert python("-c", code).splitlines()[-1] == "set()"


def test_package_runs_as_a_module_and_tells_its_version() -> None:
    assert python("-m", "fx_influence", "--version") == f"fx-influence {fx.__version__}\n"


def test_cli_prints_the_commented_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 0
    assert capsys.readouterr().out == COMMENTED_PLAN.read_text(encoding="utf-8")


@pytest.mark.slow
def test_influence_is_a_function_after_its_module_is_imported() -> None:
    """Python sets a module as an attribute of its package, over the function of the same name."""
    code = "import fx_influence.attribution.influence, fx_influence as fx; print(type(fx.influence).__name__)"
    assert python("-c", code) == "function\n"


def test_public_names_exist_in_their_modules() -> None:
    assert {name for name in fx.__all__ if not hasattr(fx, name)} == set()
    assert set(fx.__all__) <= set(dir(fx))
    with pytest.raises(AttributeError, match="no attribute 'influenc'"):
        _ = fx.influenc


def test_package_tells_where_a_former_name_went() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'functionalize'; it is now make_functional"):
        _ = fx.functionalize
    with pytest.raises(AttributeError, match=r"no attribute 'run'; it is now lab\.run"):
        _ = fx.run


def test_rooms_offer_their_own_names() -> None:
    for module in (fx.interop, fx.lab):
        assert {name for name in module.__all__ if not hasattr(module, name)} == set()
        assert set(module.__all__) <= set(dir(module))


@pytest.mark.slow
def test_modules_can_each_be_imported_first() -> None:
    """No module may need another to have been imported before it."""
    paths = (ROOT / "fx_influence").rglob("*.py")
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    names = sorted(name for name in names if not name.endswith("__main__"))
    code = f"""
import sys, importlib
for name in {names!r}:
    for loaded in [loaded for loaded in sys.modules if loaded.startswith("fx_influence")]:
        del sys.modules[loaded]
    importlib.import_module(name)
print("all")
"""
    assert len(names) > 50
    assert python("-W", "ignore", "-c", code) == "all\n"


def test_progress_lines_mark_phases_and_half_minutes() -> None:
    written: list[str] = []
    times = iter([0.0, 10.0, 29.0, 31.0, 45.0, 60.0, 60.0])
    lines = ProgressLines(written.append, lambda: next(times))
    for phase, done in (("a", 0), ("a", 1), ("a", 2), ("a", 3), ("a", 4), ("a", 5), ("b", 0)):
        lines(phase, done, 5)
    assert written == [f"fx-influence: {what}" for what in ("a 0/5", "a 3/5, 31 s", "a 5/5, 60 s", "b 0/5")]


def test_run_keeps_progress_off_stdout_when_not_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(SMALL))
    assert main(["run", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")]) == 0
    output = capfd.readouterr()
    lines = [line for line in output.err.splitlines() if line.startswith("fx-influence: ")]
    phases = {line.removeprefix("fx-influence: ").rpartition(" ")[0].partition(" 0/")[0] for line in lines}
    assert any(line.startswith("fx-influence: sampling E 4/4") for line in lines)
    assert any(line.startswith("fx-influence: first order ") for line in lines), phases
    assert "\x1b" not in output.err
    assert "fx-influence: " not in output.out
    assert "What the step does to the entropy" in output.out


def test_one_line_names_file_and_reason() -> None:
    assert one_line(ValueError("a is 1;\n  expected 2\x1b[0m")) == "a is 1; expected 2\\x1b[0m"
    assert one_line(FileNotFoundError(2, "No such file or directory", "x")).startswith("'x' cannot be used: No such")
    assert one_line(OSError("no name")) == "no name"
    assert one_line(ValueError()) == "ValueError"


def test_cli_is_silent_when_its_output_is_closed() -> None:
    command = f"{sys.executable} -m fx_influence plan | true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
