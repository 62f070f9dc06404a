"""The examples of the pages run and print what the pages show; functions and files that the pages name exist."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from helpers.ranks import launch

import fx_influence as fx
from benchmarks import harness
from benchmarks.costs.problems import Setting, problem
from fx_influence.autodiff.token_values import all_token_values
from fx_influence.estimators.deviations import Deviations
from fx_influence.estimators.snis import SnisDelta
from fx_influence.interop.live.metrics import LOGGED_FIRST, LOGGED_LAST, REGION_METRICS, MeasuredStep
from fx_influence.interop.live.step import CapturedStep
from fx_influence.lab.plan import EntropyInfluencePlan, SampledBatch
from fx_influence.labels import REGIONS, Labels

ROOT = Path(__file__).parents[1]
FRONT, MATHEMATICS, INTEROP = (
    ROOT / "README.md",
    ROOT / "fx_influence/README.md",
    ROOT / "fx_influence/interop/README.md",
)
PAGES = [FRONT, *sorted((ROOT / "fx_influence").rglob("README.md")), *sorted((ROOT / "benchmarks").rglob("README.md"))]


class Example(NamedTuple):
    """A block of a page after ``<!-- example: NAME -->``, and the ``text`` block that follows it, its output."""

    page: str
    language: str
    source: str
    output: str

    def run(self, scope: dict[str, Any]) -> None:
        exec(compile(self.source, self.page, "exec"), scope)


@functools.cache
def examples() -> dict[str, Example]:
    """Return the examples of all pages by name; no two have the same name."""
    pattern = r"<!-- example: ([\w-]+) -->\n```(\w+)\n(.*?)```(?:\n\n```text\n(.*?)```)?"
    by_name: dict[str, Example] = {}
    for page in PAGES:
        for name, *blocks in re.findall(pattern, page.read_text(encoding="utf-8"), flags=re.DOTALL):
            assert name not in by_name, f"{page} and {by_name[name].page} both have the example {name}"
            by_name[name] = Example(str(page.relative_to(ROOT)), *blocks)
    return by_name


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def table_rows(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the table whose first line begins with ``heading``."""
    lines = text[text.index(heading) :].splitlines()
    end = next((k for k, line in enumerate(lines) if not line.startswith("|")), len(lines))
    # A bar in a cell is written "\|".
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:end]]


def shape_of(output: str) -> str:
    """Return the words of an output, without its numbers and sums, which differ between processors."""
    return re.sub(r"[-+]?\d[\d.e+=-]*", "#", output)


def figures_of(line: str) -> dict[str, float]:
    """Return the named numbers of a line."""
    return {name: float(value) for name, value in re.findall(r"(\w+)[ =]([-+]?\d[\d.]*(?:e[-+]\d+)?)", line)}


def unit_of(*values: float) -> float:
    """Return a unit of the second digit of the largest value: the rounding of a sum of figures of two digits."""
    return 10.0 ** (math.floor(math.log10(max(map(abs, values)))) - 1)


def test_front_page_is_one_page() -> None:
    assert len(read(FRONT).splitlines()) <= 150


def test_every_python_block_is_a_named_example() -> None:
    count = sum(len(re.findall(r"^```(?:python|yaml)$", read(page), flags=re.MULTILINE)) for page in PAGES)
    assert count == len(examples())


def test_influence_example_prints_an_influence(capsys: pytest.CaptureFixture[str]) -> None:
    example, scope = examples()["influence"], dict[str, Any]()
    assert len(example.source.splitlines()) <= 15
    example.run(scope)
    out, printed = scope["out"], capsys.readouterr().out
    assert shape_of(printed.splitlines()[0]) == shape_of(example.output.splitlines()[0])
    # The same step by other means: its gradient, AdamW's map, and one derivative along the step.
    params, apply, state = scope["params"], scope["apply"], scope["state"].optimizer_state
    u = scope["batch_u"]._replace(coefficients=scope["c"])
    gradients = fx.per_sample_grads(fx.rollout_loss(apply), params, u)
    total_grad = {name: g.sum(0) for name, g in gradients.items()}
    step = fx.adamw_decompose(total_grad, state, params, max_grad_norm=1.0).direction
    derivative = fx.jvp_delta(params, step, scope["batch_e"], apply=apply).first
    assert float(out.total) == pytest.approx(float(derivative), rel=1e-3)
    for text in (printed, example.output):
        figures = figures_of(text.splitlines()[0])
        terms = sum(figures[name] for name in ("momentum", "weight_decay", "sum_per_sequence"))
        assert figures["total"] == pytest.approx(terms, abs=4 * unit_of(figures["total"]) / 100)
        assert len(re.findall(r"influence [-+]\d.*? ± \d", text)) == 3
        assert not re.findall(r"influence [-+]0\.000", text)
    # Other processors may draw other rollouts, as another seed would.
    error = float(re.findall(r"total=\S+ ± (\S+),", example.output)[0])
    assert abs(figures_of(example.output)["total"] - float(out.total)) < 4 * (error + float(out.total_stderr))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trl_examples_predict_and_repeat_their_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    live, offline = examples()["trl"], examples()["offline"]
    assert len(live.source.splitlines()) <= 25
    scope: dict[str, Any] = {}
    live.run(scope)
    history, printed = scope["influence"].history, capsys.readouterr().out
    assert [figures["step"] for figures in history] == [4, 8]
    for text in (printed, live.output):
        steps = [figures_of(line) for line in text.splitlines() if line.startswith("total")]
        assert [set(step) for step in steps] == [{"total", "stderr", "momentum", "rollouts", "measured"}] * 2
        for step in steps:
            assert all(step.values()), "no figure of the example is zero"
            unit = unit_of(step["momentum"], step["rollouts"])
            assert step["total"] == pytest.approx(step["momentum"] + step["rollouts"], abs=2 * unit)
            # The same E before and after: the difference is the curvature of a short step.
            assert abs(step["total"] - step["measured"]) < 2 * step["stderr"]
    added_up = examples()["training"]
    added_up.run({})
    assert shape_of(capsys.readouterr().out) == shape_of(added_up.output)
    sums = {line[:12].strip(): float(line[12:].split()[0]) for line in added_up.output.splitlines() if "±" in line}
    for name, column in (("predicted", "total"), ("momentum", "momentum"), ("measured", "measured")):
        written = [figures_of(line)[column] for line in live.output.splitlines()]
        assert sums[name] == pytest.approx(sum(written), abs=2 * unit_of(*written))
    offline.run(scope)
    again, stored = re.findall(r"[-+]\d[\d.]*", capsys.readouterr().out)
    size = sum(abs(x) for x in scope["out"].per_sequence.tolist())
    assert float(again) == pytest.approx(float(stored), abs=1e-3 + 1e-4 * size)
    assert float(stored) * 3e-5 == pytest.approx(history[-1]["total"], rel=1e-3), "per unit lr, and in the step"
    written = re.findall(r"[-+]\d[\d.]*", offline.output)
    assert float(written[0]) == pytest.approx(float(written[1]), rel=1e-3)
    last = figures_of(live.output.splitlines()[-1])
    assert float(written[0]) * 3e-5 == pytest.approx(last["total"], abs=unit_of(last["total"]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_attach_example_prints_what_trl_example_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The front page's example needs a trainer, which the script of the ``trl`` example sets up."""
    monkeypatch.chdir(tmp_path)
    script, example = examples()["trl"], examples()["attach"]
    scope: dict[str, Any] = {}
    setup = script.source[: script.source.index("influence = ")]
    exec(compile(setup, script.page, "exec"), scope)
    scope |= {"model": scope["demo_path"]("demo"), "reward": scope["exact_match"], "held_out": scope["eval_prompts"]}
    example.run(scope)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("predicted")]
    assert shape_of("\n".join(printed)) == shape_of(example.output.rstrip())
    names = ("total", "stderr", "momentum", "rollouts", "measured")
    history = [figures_of(line) for line in script.output.splitlines()]
    for line, step in zip(example.output.splitlines(), history, strict=True):
        figures = [float(x) for x in re.findall(r"[-+]?\d\.\de[-+]\d+", line)]
        assert figures == [step[name] for name in names]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_own_loop_example_predicts_its_steps(capsys: pytest.CaptureFixture[str]) -> None:
    example, scope = examples()["own_loop"], dict[str, Any]()
    assert len(example.source.splitlines()) <= 30
    example.run(scope)
    history, printed = scope["capture"].history, capsys.readouterr().out
    assert [figures["step"] for figures in history] == [2, 4]
    for figures in history:
        assert abs(figures["unattributed"]) < 1e-3 * abs(figures["rollouts"]), "the gradient is the rollouts' own"
    for text in (printed, example.output):
        steps = [figures_of(line) for line in text.splitlines() if line.startswith("total")]
        assert len(steps) == 2
        for step in steps:
            assert all(step.values()), "no figure of the example is zero"
            unit = unit_of(step["momentum"], step["rollouts"])
            assert step["total"] == pytest.approx(step["momentum"] + step["rollouts"], abs=2 * unit)
            assert abs(step["total"] - step["measured"]) < 2 * step["stderr"]


@pytest.mark.slow
def test_loop_example_passes_its_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    example, scope = examples()["loop"], dict[str, Any]()
    example.run(scope)
    out, printed = scope["out"], capsys.readouterr().out
    assert abs(out.unattributed) < 1e-3 * out.per_sequence.abs().sum(), "the gradient is the rollouts' own"
    for text in (printed, example.output):
        steps = [figures_of(line) for line in text.splitlines()]
        assert len(steps) == 4
        assert steps[0]["momentum"] == 0, "a new optimizer has none"
        assert all(step["momentum"] for step in steps[1:])
        totals, measured = ([step[name] for step in steps] for name in ("total", "measured"))
        assert all(totals)
        # The first order predicts the change on the same E, up to its curvature.
        squared_error = sum((x - y) ** 2 for x, y in zip(totals, measured, strict=True))
        assert squared_error < 0.5 * sum(y**2 for y in measured)


@pytest.mark.slow
def test_processes_example_gives_every_rank_the_result(tmp_path: Path) -> None:
    example, script = examples()["processes"], tmp_path / "two.py"
    script.write_text(example.source + "from helpers.ranks import end_rank\nend_rank()\n", encoding="utf-8")
    done = launch(2, script)
    assert done.returncode == 0, done.stdout
    for text in (done.stdout, example.output):
        lines = dict(re.findall(r"rank (\d): (16 influences, total [-+]\d\S* ± \d\S*)", text))
        assert set(lines) == {"0", "1"}
        assert lines["0"] == lines["1"], "the result is the same on every rank"
        assert figures_of(lines["0"])["total"] != 0


def test_yaml_examples_are_plans() -> None:
    plans = [
        EntropyInfluencePlan.from_dict(yaml.safe_load(x.source)) for x in examples().values() if x.language == "yaml"
    ]
    assert plans
    sampled = [plan.evaluations[0] for plan in plans if isinstance(plan.evaluations[0], SampledBatch)]
    assert [request.num_prompts for request in sampled] == [64] * len(plans)


def test_logged_figures_are_explained() -> None:
    rows = table_rows(read(INTEROP), "| name | in the log | meaning |")
    explained = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    out: dict[str, Any] = {name: torch.ones(()) for name in fx.Influence._fields}
    out |= {
        "deviations": Deviations(torch.zeros(2, 2), torch.full((2,), -1)),
        "per_sequence": torch.ones(2),
        "per_token": torch.ones(2, 3),
        "per_parameter": {"w": torch.ones(())},
    }
    influence = fx.Influence(**out)
    batch = fx.Batch(*[torch.ones(2, 3, dtype=torch.bool)] * 3)
    fields: dict[str, Any] = {name: torch.ones(()) for name in CapturedStep._fields}
    fields |= {"batch": batch, "advantages": torch.ones(2), "token_advantages": None, "sources": ("a", "b")}
    captured = CapturedStep(**fields)
    regions = Labels(torch.zeros(2, 3, dtype=torch.int64), REGIONS)
    delta = SnisDelta(*[torch.ones(())] * 6)
    told: dict[str, Any] = {"regions": regions, "moment_rounding": 0.01, "unexplained_stderr": 0.1}
    told |= {"forward_rounding": 0.9, "unrounded_change": delta}
    metrics = MeasuredStep(*(1, 0.1, captured, [], influence, 1.0, delta, 0.5), **told).metrics()
    of_sources = {"source/a", "source/b", "source_stderr/a", "source_stderr/b"}
    assert explained == set(metrics) - of_sources
    assert of_sources < set(metrics)
    assert "`source/NAME`" in rows[-1][0]
    logged = {name for row in rows if row[1] for name in re.findall(r"`(\w+)`", row[0])}
    assert logged == {*LOGGED_FIRST, *LOGGED_LAST} - {f"{name}_stderr" for name in REGION_METRICS}


def resolve(name: str) -> bool:
    """Return whether a dotted name exists in the package."""
    value: Any = fx
    for part in name.split("."):
        value = getattr(value, part, None)
    return value is not None


def test_functions_of_the_tables_exist() -> None:
    costs = table_rows(read(MATHEMATICS), "| quantity |")
    names = {name for row in costs for name in re.findall(r"`([\w.]+)[(`]", row[1])}
    calls = table_rows(read(FRONT), "| question |")
    names |= {name for row in calls for name in re.findall(r"`fx\.([\w.]+)[(`]", row[1])}
    assert {"influence", "snis_sweep", "fisher_kernel", "lab.select", "lab.analyze"} <= names
    assert not {name for name in names if not resolve(name)}


def test_walks_name_files_in_order_without_a_step_back() -> None:
    """Each step of a walk links a file and names a function or class that the file has; no walk passes a file twice."""
    text = read(MATHEMATICS)
    for title in ("### `params` through `influence`", "### `batch_u` through `influence`"):
        walk = text[text.index(title) :].partition("\n\n#")[0].partition("\nIn each of these passes")[0]
        steps = re.findall(r"^(\d+)\. \[`([\w/.]+)`\]\(([\w/.]+)\)(.*)$", walk, flags=re.MULTILINE)
        assert [int(number) for number, *_ in steps] == list(range(1, len(steps) + 1))
        assert len(steps) >= 10
        files = [path for _, path, *_ in steps]
        assert len(set(files)) == len(files)
        for _, label, path, sentence in steps:
            assert label == path
            source = read(MATHEMATICS.parent / path)
            names = re.findall(r"`(\w+)`", sentence)
            assert any(re.search(rf"^(?:def|class|    def) {name}\b", source, re.MULTILINE) for name in names), path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_costs_in_forwards_are_those_counted(lora: bool) -> None:
    p = problem(Setting("3M", lora))
    settings: dict[str, Any] = {"apply": p.apply}
    influence = functools.partial(fx.influence, p.params, p.u, p.e, p.state, **settings)
    grouped = p.u._replace(group=torch.arange(len(p.u.input_ids)))
    signs = torch.where(torch.arange(len(p.u.input_ids)) % 2 == 0, 1.0, -1.0)
    regions = fx.labels.regions(p.u, all_token_values(p.params, p.u, p.apply), signs)
    works: dict[str, harness.Work] = {
        "influence(..., stderr=False)": lambda: influence(stderr=False),
        "influence(..., per_token=False, stderr=False)": lambda: influence(per_token=False, stderr=False),
        "influence(..., grad=g, stderr=False)": lambda: influence(grad=dict(p.gradient), stderr=False),
        "influence(...)": influence,
        "influence(..., labels=regions)": lambda: influence(labels=regions),
        "influence(params, u, None, ...)": lambda: fx.influence(p.params, grouped, None, p.state, **settings),
        "influence(..., matrix=True)": lambda: influence(matrix=True),
        "snis_delta": lambda: fx.snis_delta(p.params, p.gain, 1e-6, p.e, **settings),
        "jvp_delta": lambda: fx.jvp_delta(p.params, p.gain, p.e, **settings),
        "per_sample_grads": lambda: fx.per_sample_grads(fx.rollout_loss(p.apply), p.params, p.u),
        "fisher_kernel": lambda: fx.fisher_kernel(p.params, p.e, p.u, p.state, **settings),
    }
    forward = harness.flops(lambda: all_token_values(p.params, p.u, p.apply))
    pattern = r"^\| .* \| `(.*)` \| ([0-9.]+) F(?: / ([0-9.]+) F)? \|$"
    stated = re.findall(pattern, read(MATHEMATICS), flags=re.MULTILINE)
    assert [name for name, *_ in stated] == list(works)
    for name, full, with_lora in stated:
        figure = with_lora or full if lora else full
        decimals = len(figure.partition(".")[2])
        assert f"{harness.flops(works[name]) / forward:.{decimals}f}" == figure, name
