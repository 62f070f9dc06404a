"""Train a chat model on two sources of tasks, one too hard, and check what the page of the run says first.

    python -m benchmarks real_ledger            writes results/real_ledger.json and its table in README.md; hours
    python -m benchmarks real_ledger --quick    a tiny random model, written nowhere
    python -m benchmarks.real.bench_real_ledger --collect    stores what an interrupted benchmark has trained so far

SmolLM2-135M-Instruct is trained by GRPO on multiplications of one digit and of two, every step measured on its own
rollouts. The ledger is compared with a second one of the same steps, whose E are fresh rollouts of other prompts, with
the entropy of fresh rollouts before and after the run, and with training runs in which the rewards of one source are
silenced. An interrupted benchmark continues from the last checkpoints. All need Chromium (``chromium`` on the path).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.costs.bench_report import ON_SCREEN, chromium
from benchmarks.harness import COSTS, one_thread, parser, store, write_json
from benchmarks.real.language_model import FOLDER, prepare_model, prepare_verifiers, tiny_model
from benchmarks.real.tasks import by_length, verified
from benchmarks.real.two_sources.agreement import agreement, label_totals, pairs, with_self_influence
from benchmarks.real.two_sources.entropy import Estimate, entropy_change, prompt_sums
from benchmarks.real.two_sources.tables import markdown
from benchmarks.real.two_sources.tasks import COUNTS, EASY, HARD, SOURCES
from benchmarks.real.two_sources.training import (
    COMPLETIONS,
    LEARNING_RATE,
    PROMPTS,
    SECOND,
    Settings,
    last_step,
    saved_policies,
    train,
)
from benchmarks.trl.variants import quiet
from fx_influence.interop.ledger.file import LEDGER, STEP
from fx_influence.interop.runtime.environment import environment
from fx_influence.interop.runtime.run_files import UPDATE_ROLLOUTS, without_nan
from fx_influence.lab.report import write_training_report
from fx_influence.lab.training.account import (
    SOURCE_KIND,
    account,
    degrees_of_freedom,
    label_sums,
    strongest_labels,
)
from fx_influence.lab.training.health import training_health
from fx_influence.lab.training.load import Training, load_training
from fx_influence.lab.training.sentences import training_sentences

__all__ = ["NAME", "main", "markdown"]

NAME = "bench_real_ledger"
STORED = "entropy_influence"
PROMPTS_OF_AN_EPOCH = COUNTS["train"] * len(SOURCES)
LAYERS = range(24, 30)
"""Layers with adapters, the last of 30: a step then costs little more than its forward passes."""


class Run(NamedTuple):
    """A training run: its folder, and the sources whose rewards are not silenced."""

    folder: str
    sources: tuple[str, ...]


BOTH = Run("both", SOURCES)
APART = (Run("easy", (EASY,)), Run("hard", (HARD,)))


class Sampled(NamedTuple):
    """Fresh rollouts by which the entropy of a policy is estimated: number of prompts, completions of each."""

    prompts: int
    completions: int


SAMPLED, QUICK_SAMPLED = Sampled(80, 1), Sampled(4, 1)


def sums_file(folder: Path, run: Run, step: int) -> Path:
    """Return the file of the sums of a policy's fresh rollouts; step 0 is the model alone."""
    return folder / (f"entropy_{run.folder}_{step}.json" if step else "entropy_0.json")


def sample_policies(folder: Path, settings: Settings, sampled: Sampled) -> None:
    """Sample fresh rollouts of the model, of the first and the last policy saved, and of the last ones of sources.

    Sources that have not been trained alone yet are left out.
    """
    first, *_, last = saved_policies(folder / BOTH.folder)
    alone = [(run, step) for run in APART if (step := last_step(folder / run.folder))]
    steps = [(BOTH, 0), (BOTH, first), (BOTH, last), *(x for x in alone if not same_policy(folder, *x))]
    for run, step in steps:
        file = sums_file(folder, run, step)
        if not file.exists():
            adapter = saved_policies(folder / run.folder)[step] if step else None
            write_json(file, {"prompts": prompt_sums(settings.model, adapter, settings.tokens, *sampled)})


def read_sums(folder: Path, run: Run, step: int) -> list[dict[str, Any]] | None:
    """Return the sums of a policy's fresh rollouts, None where they are not sampled."""
    file = sums_file(folder, run, step)
    return json.loads(file.read_text(encoding="utf-8"))["prompts"] if file.exists() else None


def same_policy(folder: Path, run: Run, step: int) -> str | None:
    """Return which policy that of a training run is to the last bit: of ``both``, the ``model``, or None."""
    adapter = load_file(saved_policies(folder / run.folder)[step] / "adapter_model.safetensors")
    # The second factor of an adapter begins at 0.
    if not any(x.any() for name, x in adapter.items() if "lora_B" in name):
        return "model"
    both = load_file(saved_policies(folder / BOTH.folder)[step] / "adapter_model.safetensors")
    return "both" if all(torch.equal(x, both[name]) for name, x in adapter.items()) else None


def until(training: Training, step: int) -> Training:
    """Return the measured steps up to one."""
    steps, labels = (
        {name: x[columns[STEP] <= step] for name, x in columns.items()} for columns in (training.steps, training.labels)
    )
    return dataclasses.replace(training, steps=steps, labels=labels)


def first_screen(training: Training) -> dict[str, Any]:
    """Return what the page of a training run says first, and the sums that it rests on."""
    findings, summed = training_health(training), account(training)
    return {
        "sentences": training_sentences(training, findings),
        "alerts": {x.name: x.text for x in findings if x.level == "attention"},
        "measured": summed.measured,
        "predicted": summed.predicted,
        "unexplained": summed.unexplained,
        "terms": summed.terms,
        "sources": [x._asdict() for x in label_sums(training, SOURCE_KIND)],
        "kinds": [x._asdict() for x in strongest_labels(training)[:5]],
    }


def scores(folder: Path, last: int) -> dict[str, list[dict[str, float]]]:
    """Return for each source the share of rollouts with a reward and the mean, in both halves of the measured steps."""
    rewards: dict[str, list[list[float]]] = {source: [[], []] for source in SOURCES}
    for step in range(1, last + 1):
        file = folder / f"step_{step:06}" / UPDATE_ROLLOUTS
        for line in file.read_text(encoding="utf-8").splitlines():
            rollout = json.loads(line)
            rewards[rollout["source"]][2 * step > last].append(rollout["reward"])
    return {
        source: [
            {"above_0": statistics.fmean(x > 0 for x in half), "reward": statistics.fmean(half)} for half in halves
        ]
        for source, halves in rewards.items()
    }


def second_ledger(training: Training, folder: Path) -> dict[str, Any]:
    """Return how far a ledger agrees with the one of the same steps by fresh rollouts in ``folder``."""
    second = load_training(folder)
    common = np.isin(training.steps[STEP], second.steps[STEP])
    seen = np.isin(second.steps[STEP], training.steps[STEP])
    compared, degrees = pairs(training, second), [float(degrees_of_freedom(x)[0]) for x in (training, second)]
    kinds = dict.fromkeys(pair.kind for pair in compared)
    return {
        "steps": second.steps[STEP][seen].tolist(),
        "all": agreement(compared, degrees),
        "kinds": {kind: agreement([pair for pair in compared if pair.kind == kind], degrees) for kind in kinds},
        "totals": {kind: label_totals(compared, kind) for kind in kinds},
        "predicted": [float(training.steps["total"][common].sum()), float(second.steps["total"][seen].sum())],
        "measured": [float(training.steps["measured"][common].sum()), float(second.steps["measured"][seen].sum())],
        "self_influence": with_self_influence(training),
        "pairs": compared,
    }


def source_alone(training: Training, run: Run, folder: Path) -> dict[str, Any] | None:
    """Return what a source does alone, beside what the ledger says of it over as many steps; None before the run."""
    steps = min(last_step(folder / run.folder), last_step(folder / BOTH.folder))
    if not steps:
        return None
    ledger = until(training, steps)
    before, alone = read_sums(folder, BOTH, 0), read_sums(folder, run, steps)
    [source] = run.sources
    return {
        "source": source,
        "steps": steps,
        "same_policy": same_policy(folder, run, steps),
        "alone": entropy_change(before, alone) if before and alone else None,
        "measured": account(ledger).measured,
        **{
            name: next(x.term for x in label_sums(ledger, SOURCE_KIND, over_lifetime=lifetime) if x.term.name == source)
            for name, lifetime in (("ledger", False), ("ledger_lifetime", True))
        },
    }


def levels(training: Training) -> dict[str, Any]:
    """Return the change of the mean entropy from the first to the last steps, by their rollouts and by the ledger.

    The rollouts of a step are fresh and of the policy before it, so their entropies are independent of the measured
    changes. As many steps as have the prompts of an epoch are taken, at most half of all.
    """
    count = min(PROMPTS_OF_AN_EPOCH // PROMPTS, len(training.steps[STEP]) // 2)
    entropies, changes = training.steps["entropy"], training.steps["measured"]
    first, last = entropies[:count], entropies[-count:]
    # A step's change is in the entropies of all later steps.
    later = np.tri(len(changes), k=-1)
    weights = later[-count:].mean(0) - later[:count].mean(0)
    stderr = float(np.sqrt(np.square(weights * training.steps["measured_stderr"]).sum()))
    return {
        "steps": count,
        "entropies": [float(first.mean()), float(last.mean())],
        "change": Estimate(
            float(last.mean() - first.mean()), float(np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / count))
        ),
        "ledger": Estimate(float(weights @ changes), stderr),
    }


def opened(training: Training) -> dict[str, Any]:
    """Return the bytes of a training run's page, and the seconds to build and to open it."""
    start = time.perf_counter()
    path = write_training_report(training)
    built = time.perf_counter() - start
    with chromium() as browser:
        seconds = []
        for _ in range(3):
            page = browser.new_page()
            start = time.perf_counter()
            page.goto(path.as_uri())
            page.evaluate(ON_SCREEN)
            seconds.append(time.perf_counter() - start)
            page.close()
    size, opening = path.stat().st_size, statistics.median(seconds)
    return {"bytes": size, "build_seconds": built, "open_seconds": opening, **_load()}


def _load() -> dict[str, float]:
    """Return what else the machine does: processes that run or wait, and processors."""
    return {"load": os.getloadavg()[0], "processors": os.cpu_count() or 1}


def stored_bytes(folder: Path, count: int) -> dict[str, float]:
    """Return bytes a measured step, of the ledger and of the step's directory."""
    directories = sum(x.stat().st_size for x in folder.glob("step_*/**/*") if x.is_file())
    return {"ledger": (folder / LEDGER).stat().st_size / count, "directory": directories / count}


def sampled_changes(training: Training, folder: Path) -> list[dict[str, Any]]:
    """Return changes of entropy by fresh rollouts and by the ledger: of all steps, the first ones, and the others."""
    policies = [step for step in (0, *saved_policies(folder / BOTH.folder)) if read_sums(folder, BOTH, step)]
    if len(policies) < 2:
        return []
    return [
        {
            "steps": [start + 1, end],
            "sampled": entropy_change(read_sums(folder, BOTH, start) or [], read_sums(folder, BOTH, end) or []),
            "measured": _sum(training, start, end, "measured", "measured_stderr"),
            "predicted": _sum(training, start, end, "total", "stderr"),
        }
        for start, end in dict.fromkeys([(policies[0], policies[-1]), *itertools.pairwise(policies)])
    ]


def _sum(training: Training, start: int, end: int, name: str, stderr: str) -> Estimate:
    steps = training.steps
    rows = (steps[STEP] > start) & (steps[STEP] <= end)
    return Estimate(float(steps[name][rows].sum()), float(np.sqrt(np.square(steps[stderr][rows]).sum())))


def report_of(name: str, folder: Path, settings: Settings, sampled: Sampled) -> dict[str, Any]:
    """Return the report of what has been trained and sampled so far.

    Args:
        name: of the model.
        folder: of the benchmark.
        settings: of all training runs.
        sampled: fresh rollouts by which a policy's entropy is estimated.
    """
    stored = folder / BOTH.folder / STORED
    training = load_training(stored)
    report = {
        "environment": environment(),
        "model": name,
        "settings": {
            **{key: getattr(settings, key) for key in ("steps", "tokens", "every", "fresh")},
            "layers": list(settings.layers),
            "prompts": PROMPTS,
            "completions": COMPLETIONS,
            "learning_rate": LEARNING_RATE,
            "sampled": sampled._asdict(),
        },
        "measured_steps": len(training.steps[STEP]),
        "seconds": statistics.median(training.steps["seconds"].tolist()),
        "scores": scores(stored, training.last_step),
        "first_screen": first_screen(training),
        "second": second_ledger(training, folder / BOTH.folder / f"{STORED}-{SECOND}"),
        "levels": levels(training),
        "sampled": sampled_changes(training, folder),
        "apart": [x for run in APART if (x := source_alone(training, run, folder)) is not None],
        "bytes": stored_bytes(stored, len(training.steps[STEP])),
        "page": opened(training),
    }
    return dict(without_nan(report))


def make(folder: Path, settings: Settings, sampled: Sampled) -> None:
    """Make the training runs that are not complete, and sample their policies; that of both sources comes first."""
    for runs in ((BOTH,), APART):
        for run in runs:
            if last_step(folder / run.folder) < settings.steps:
                with quiet():
                    train(folder / run.folder, settings, run.sources, attributed=run is BOTH)
        sample_policies(folder, settings, sampled)


def main(argv: list[str] | None = None) -> int:
    command = parser(__doc__, "a tiny random model, written nowhere")
    command.add_argument("--collect", action="store_true", help="store what an interrupted benchmark has trained")
    arguments = command.parse_args(argv)
    one_thread()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = tiny_model(folder / "model")
            settings = Settings(model, (0, 1), by_length, steps=4, tokens=6, saved=2, every=2, fresh=6)
            make(folder, settings, QUICK_SAMPLED)
            print(markdown(report_of("a tiny model", folder, settings, QUICK_SAMPLED)))
        return 0
    folder = FOLDER / "two_sources"
    settings = Settings(prepare_model(), LAYERS, verified, steps=40, tokens=16, saved=4, every=4, fresh=12)
    prepare_verifiers()
    if not arguments.collect:
        make(folder, settings, SAMPLED)
    report = report_of("SmolLM2-135M-Instruct", folder, settings, SAMPLED)
    store(NAME, report, {COSTS: {NAME: markdown(report)}})
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
