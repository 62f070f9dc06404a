"""The README's Python runs as it stands, and what it promises about the package is there."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.ranks import launch

import fx_influence as fx
from benchmarks import harness
from benchmarks.costs.problems import Setting, problem
from fx_influence.autodiff.token_values import all_token_values
from fx_influence.estimators.snis import SnisDelta
from fx_influence.interop.trl.capture.step import CapturedStep
from fx_influence.interop.trl.metrics import MeasuredStep
from fx_influence.lab.plan import EntropyInfluencePlan

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def printed_in_the_readme(example: int) -> str:
    """The output that stands below an example of Python."""
    return re.findall(r"```python\n.*?```(?:\n\n```text\n(.*?)```)?", README, flags=re.DOTALL)[example]


def shape_of(output: str) -> str:
    """The words of an output, with its numbers and sums left out: which differ between processors."""
    return re.sub(r"[-+]?\d[\d.e+=-]*", "#", output)


def figures_of(line: str) -> dict[str, float]:
    """The named numbers of a line."""
    return {name: float(value) for name, value in re.findall(r"(\w+)[ =]([-+]?\d[\d.]*(?:e[-+]\d+)?)", line)}


def unit_of(*values: float) -> float:
    """A unit of the second digit of the largest: what two digits of each leave unsaid, twice over."""
    return 10.0 ** (math.floor(math.log10(max(map(abs, values)))) - 1)


def test_the_first_example_shows_an_influence(capsys: pytest.CaptureFixture[str]) -> None:
    example, shown = blocks("python")[0], printed_in_the_readme(0)
    scope: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), scope)
    out, u, now = scope["out"], scope["batch_u"], capsys.readouterr().out
    assert shape_of(now.splitlines()[0]) == shape_of(shown.splitlines()[0])
    # The same step by other means: its gradient, AdamW's map, and one derivative along the step.
    params, apply, state = scope["params"], scope["apply"], scope["state"].optimizer_state
    gradients = fx.per_sample_grads(fx.rollout_loss(apply), params, u)
    whole = {name: g.sum(0) for name, g in gradients.items()}
    step = fx.adamw_decompose(whole, state, params, max_grad_norm=1.0).direction
    slope = fx.jvp_delta(params, step, scope["batch_e"], apply=apply).first
    assert float(out.total) == pytest.approx(float(slope), rel=1e-3)
    for text in (now, shown):
        figures = figures_of(text.splitlines()[0])
        parts = sum(figures[name] for name in ("momentum", "weight_decay", "sum_per_sequence"))
        assert figures["total"] == pytest.approx(parts, abs=4 * unit_of(figures["total"]) / 100)
        assert len(re.findall(r"influence [-+]\d.*? ± \d", text)) == 3
        assert not re.findall(r"influence [-+]0\.000", text)
    # Other processors may draw other rollouts, as another seed would.
    error = float(re.findall(r"total=\S+ ± (\S+),", shown)[0])
    assert abs(figures_of(shown)["total"] - float(out.total)) < 4 * (error + float(out.total_stderr))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_live_training_and_what_it_stored_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    live, offline = blocks("python")[1:3]
    assert len(live.splitlines()) <= 25
    scope: dict[str, Any] = {}
    exec(compile(live, "README.md", "exec"), scope)
    history, now = scope["influence"].history, capsys.readouterr().out
    assert [figures["step"] for figures in history] == [4, 8]
    for text in (now, printed_in_the_readme(1)):
        steps = [figures_of(line) for line in text.splitlines() if line.startswith("total")]
        assert [set(step) for step in steps] == [{"total", "stderr", "momentum", "rollouts", "measured"}] * 2
        for step in steps:
            assert all(step.values()), "no figure of the example is zero"
            unit = unit_of(step["momentum"], step["rollouts"])
            assert step["total"] == pytest.approx(step["momentum"] + step["rollouts"], abs=2 * unit)
            # The same E before and after: what is left is the curvature of a short step.
            assert abs(step["total"] - step["measured"]) < 2 * step["stderr"]
    exec(compile(offline, "README.md", "exec"), scope)
    again, stored = re.findall(r"[-+]\d[\d.]*", capsys.readouterr().out)
    size = sum(abs(x) for x in scope["out"].per_sequence.tolist())
    assert float(again) == pytest.approx(float(stored), abs=1e-3 + 1e-4 * size)
    assert float(stored) * 3e-5 == pytest.approx(history[-1]["total"], rel=1e-3), "per unit lr, and in the step"
    shown = re.findall(r"[-+]\d[\d.]*", printed_in_the_readme(2))
    assert float(shown[0]) == pytest.approx(float(shown[1]), rel=1e-3)
    last = figures_of(printed_in_the_readme(1).splitlines()[-1])
    assert float(shown[0]) * 3e-5 == pytest.approx(last["total"], abs=unit_of(last["total"]))


def test_a_loop_of_ones_own_hands_over_its_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {}
    exec(compile(blocks("python")[3], "README.md", "exec"), scope)
    out, now = scope["out"], capsys.readouterr().out
    assert abs(out.unattributed) < 1e-3 * out.per_sequence.abs().sum(), "the gradient is the rollouts' own"
    for text in (now, printed_in_the_readme(3)):
        steps = [figures_of(line) for line in text.splitlines()]
        assert len(steps) == 4
        assert steps[0]["momentum"] == 0, "a new optimizer has none"
        assert all(step["momentum"] for step in steps[1:])
        totals, measured = ([step[name] for step in steps] for name in ("total", "measured"))
        assert all(totals)
        # Of each step the first order predicts what is seen on the same E, but for its curvature.
        off = sum((x - y) ** 2 for x, y in zip(totals, measured, strict=True))
        assert off < 0.5 * sum(y**2 for y in measured)


def test_several_processes_share_the_work(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(blocks("python")[4] + "from ranks import end_rank\nend_rank()\n", encoding="utf-8")
    done = launch(2, script)
    assert done.returncode == 0, done.stdout
    for text in (done.stdout, printed_in_the_readme(4)):
        found = dict(re.findall(r"rank (\d): (16 influences, total [-+]\d\S* ± \d\S*)", text))
        assert set(found) == {"0", "1"}
        assert found["0"] == found["1"], "the result is the same on every rank"
        assert figures_of(found["0"])["total"] != 0


def test_every_logged_figure_is_explained() -> None:
    table = README[README.index("| name | what |") : README.index("Each measured step is a run")]
    explained = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if "|" in line)))
    out = {name: torch.ones(()) for name in fx.Influence._fields}
    influence = fx.Influence(**{**out, "per_sequence": torch.ones(2), "per_token": torch.ones(2, 3)})
    batch = fx.Batch(*[torch.ones(2, 3, dtype=torch.bool)] * 3)
    captured = CapturedStep(batch, torch.ones(2), *[torch.ones(())] * 5, {}, 1.0, None)
    step = MeasuredStep(1, 0.1, captured, [], influence, 1.0, SnisDelta(*[torch.ones(())] * 6), 0.5)
    assert explained == set(step.metrics())


def test_the_plan_in_the_readme_is_a_plan() -> None:
    plans = [EntropyInfluencePlan.from_dict(yaml.safe_load(text)) for text in blocks("yaml")]
    assert [plan.evaluations[0].num_prompts for plan in plans] == [64, 64]


def test_every_function_in_the_table_exists() -> None:
    table = README[README.index("| quantity |") : README.index("Works on plain")]
    names = {name for cell in re.findall(r"\| ([^|]*) \| [^|]* \|\n", table) for name in re.findall(r"`(\w+)", cell)}
    assert {"influence", "snis_sweep", "fisher_kernel"} <= names
    assert not {name for name in names if not hasattr(fx, name)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_costs_in_forwards_are_those_that_are_counted(lora: bool) -> None:
    p = problem(Setting("3M", lora))
    along = {"apply": p.apply}
    influence = functools.partial(fx.influence, p.params, p.u, p.e, p.state, **along)
    works: dict[str, harness.Work] = {
        "influence(..., stderr=False)": lambda: influence(stderr=False),
        "influence(..., per_token=False, stderr=False)": lambda: influence(per_token=False, stderr=False),
        "influence(..., grad=g, stderr=False)": lambda: influence(grad=p.gradient, stderr=False),
        "influence(...)": influence,
        "influence(..., matrix=True)": lambda: influence(matrix=True),
        "snis_delta": lambda: fx.snis_delta(p.params, p.gain, 1e-6, p.e, **along),
        "jvp_delta": lambda: fx.jvp_delta(p.params, p.gain, p.e, **along),
        "per_sample_grads": lambda: fx.per_sample_grads(fx.rollout_loss(p.apply), p.params, p.u),
        "fisher_kernel": lambda: fx.fisher_kernel(p.params, p.e, p.u, p.state, **along),
    }
    forward = harness.flops(lambda: all_token_values(p.params, p.u, p.apply))
    stated = re.findall(r"^\| .* \| `(.*)` \| ([0-9.]+) F(?: / ([0-9.]+) F)? \|$", README, flags=re.MULTILINE)
    assert [name for name, *_ in stated] == list(works)
    for name, full, with_lora in stated:
        figure = with_lora or full if lora else full
        decimals = len(figure.partition(".")[2])
        assert f"{harness.flops(works[name]) / forward:.{decimals}f}" == figure, name
