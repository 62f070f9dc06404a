"""Make the picture of a training run's page for README.md: the first screen, as Chromium shows it.

    python -m benchmarks.trl.run_page           writes docs/run_page.png from results/run_page.jsonl
    python -m benchmarks.trl.run_page --train   first trains and stores that ledger anew; five minutes

The embedded policy is trained further by GRPO on 32 of its arithmetic problems, of two sources: those with three
numbers and those with more. Every one of 40 steps is measured on its own rollouts. The picture needs Chromium.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.costs.bench_report import chromium
from benchmarks.harness import RESULTS, ROOT, one_thread
from benchmarks.trl.bench_trl_run import trainer
from benchmarks.trl.variants import quiet
from fx_influence.interop.ledger.file import LEDGER
from fx_influence.interop.prompts import read_prompts
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.lab.plan import demo_path
from fx_influence.lab.report import training_page
from fx_influence.lab.training.load import load_training

STORED, PICTURE = RESULTS / "run_page.jsonl", ROOT / "docs" / "run_page.png"
STEPS, PROMPTS = 40, 32
WIDTH, HEIGHT = 1280, 900
"""Size of the first screen in pixels."""


def train(out: Path, steps: int = STEPS) -> Path:
    """Train with every step measured, and return the directory of the measured steps."""
    problems = read_prompts(demo_path("demo/train"))[:PROMPTS]
    rows = [{"prompt": p.text, "source": source_of(p.text), **p.columns} for p in problems]
    with quiet():
        training = trainer(str(out), steps, rows)
        EntropyInfluence(every=1).attach(training)
        training.train()
    return out / "entropy_influence"


def source_of(problem: str) -> str:
    """Return the source that a problem is said to come from, by how many numbers it has."""
    return "three numbers" if len(re.findall(r"\d+", problem)) == 3 else "four and more"


def screenshot(page: Path, picture: Path, **options: Any) -> None:
    """Write the first screen of a page as PNG; ``options``: of the browser's context."""
    with chromium() as browser:
        context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}, **options)
        shown = context.new_page()
        shown.goto(page.as_uri())
        shown.screenshot(path=picture)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train first, and store the ledger")
    arguments = parser.parse_args(argv)
    one_thread()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.train:
            shutil.copy(train(Path(folder)) / LEDGER, STORED)
        copy = Path(folder) / "arithmetic" / "entropy_influence"
        copy.mkdir(parents=True)
        shutil.copy(STORED, copy / LEDGER)
        page = Path(folder) / "page.html"
        page.write_text(training_page(load_training(copy)), encoding="utf-8")
        screenshot(page, PICTURE)
    print(PICTURE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
