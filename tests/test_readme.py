"""The README's Python runs as it stands, and what it promises about the package is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

import fx_influence as fx
from benchmarks import bench_linearity
from benchmarks.__main__ import main, module, names
from benchmarks.harness import result, with_block
from fx_influence.lab.plan import EntropyInfluencePlan

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_example_runs_and_is_short() -> None:
    (example,) = blocks("python")
    statements = [
        line for line in example.splitlines() if line.strip() and not line.startswith((" ", "import", "from"))
    ]
    assert len(statements) <= 15
    scope: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), scope)
    out = scope["out"]
    assert isinstance(out, fx.Influence)
    assert out.per_token.shape == (8, 12)
    assert (out.baseline + out.per_sequence.sum() - out.total).abs() < 1e-9


def test_the_plan_in_the_readme_is_a_plan() -> None:
    (text,) = blocks("yaml")
    assert EntropyInfluencePlan.from_dict(yaml.safe_load(text)).evaluations[0].num_prompts == 64


def test_every_function_in_the_table_exists() -> None:
    table = README[README.index("| quantity |") : README.index("Works on plain")]
    names = {name for cell in re.findall(r"\| ([^|]*) \| [^|]* \|\n", table) for name in re.findall(r"`(\w+)", cell)}
    assert {"influence", "snis_sweep", "fisher_kernel"} <= names
    assert not {name for name in names if not hasattr(fx, name)}


@pytest.mark.parametrize("name", [name for name in names() if result(f"bench_{name}").exists()])
def test_a_table_in_the_readme_is_made_from_the_figures_that_are_stored(name: str) -> None:
    bench = module(name)
    report = json.loads(result(bench.NAME).read_text(encoding="utf-8"))
    assert with_block(README, bench.NAME, bench.markdown(report)) == README
    assert bench.markdown(report) in README


def test_the_linearity_benchmark_works_on_a_small_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_linearity.main(["--quick", "--out", str(tmp_path / "run")]) == 0
    page = capsys.readouterr().out
    assert "R² of the whole step's ΔH against η" in page
    assert "one direction at a time" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in names() if name != "linearity"])
def test_every_benchmark_works_on_a_tiny_model_and_writes_nothing(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = {path: path.read_bytes() for path in result(name).parent.iterdir()}
    assert main([name, "--quick"]) == 0
    page = capsys.readouterr().out
    assert page.count("\n|") >= 3, "a table with at least one row of figures"
    assert "nan" not in page
    assert {path: path.read_bytes() for path in result(name).parent.iterdir()} == stored


def test_the_cost_of_the_large_run_is_the_one_that_is_stored() -> None:
    report = json.loads(result("run_entropy_influence_large").read_text(encoding="utf-8"))
    entropy, fisher = (report["runs"][name] for name in ("entropy_influence", "fisher_kernel"))
    memory = {name: f"{run['peak_memory_bytes'] / 2**20:.0f} MiB" for name, run in report["runs"].items()}
    text = " ".join(README.split())
    assert f"{report['pairs']:,} pairs, took {entropy['seconds']:.0f} s and {memory['entropy_influence']}" in text
    assert f"the Fisher run {fisher['seconds']:.0f} s and {memory['fisher_kernel']}" in text


def test_the_benchmarks_are_listed_and_an_unknown_one_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out
    found = {line.split()[0] for line in listed.splitlines()}
    assert found == {"linearity", "loops", "memory", "precision", "routes"}
    assert main(["nothing"]) == 1
    assert "no benchmark 'nothing'; there are linearity, loops, memory, precision, routes" in capsys.readouterr().err
