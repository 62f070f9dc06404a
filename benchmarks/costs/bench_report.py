"""Measure the page of a large run: its size, the time to build it, and its reaction times in a browser.

    python -m benchmarks report            writes results/report.json and the table in README.md; two minutes
    python -m benchmarks report --quick    a few rollouts, written nowhere, to check that it works

Both need Chromium (``chromium`` on the path) and ``pip install playwright``. A reaction is timed from the event to the
second frame after it, when the change is on the screen.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import COSTS, one_thread, parser, store
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.runtime.environment import environment
from fx_influence.lab.plan import EntropyInfluencePlan
from fx_influence.lab.report.page import write_report
from fx_influence.lab.results import EntropyInfluenceResults, EvaluationResults

NAME = "bench_report"
PROMPT = 100
COMPLETIONS = 16
WORDS = 30_000
REACTIONS = {
    "sort": "document.querySelector('[data-sort=advantage]').click()",
    "search": "search.value = 'word12 '; search.dispatchEvent(new Event('input', {bubbles: true}))",
    "clear the search": "document.querySelector('[type=reset]').click()",
    "scroll to the middle": "rows.scrollTop = rows.scrollHeight / 2",
    "move by key": "rows.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowDown', bubbles: true}))",
}
ON_SCREEN = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
OPENED = """new Promise(done => new MutationObserver((_, seen) => { seen.disconnect(); done(); })
    .observe(document.getElementById('detail'), {childList: true}))"""


class Size(NamedTuple):
    """Numbers of rollouts in U and in E, and of tokens in every completion."""

    rollouts: int
    evaluation: int
    tokens: int


def synthetic(size: Size, folder: Path) -> EntropyInfluenceResults:
    """Return a run with heavy-tailed influences, random words and a matrix, as ``load_run`` would return it."""
    rng = np.random.default_rng(0)
    shape = (size.rollouts, PROMPT + size.tokens)
    per_token = rng.standard_t(3, shape) * (np.arange(shape[1]) >= PROMPT)
    per_sequence, matrix = per_token.sum(1), rng.standard_normal((size.evaluation, size.rollouts))
    arrays = {"per_sequence": per_sequence, "per_token": per_token, "eta": np.zeros(0)}
    arrays["stderr"] = np.abs(rng.standard_normal(size.rollouts)) * np.abs(per_sequence).mean()
    tokens = {name: rng.standard_normal(shape, np.float32) for name in ("logprobs", "entropies")}
    signs = 1.0 - 2 * (np.arange(size.rollouts, dtype=np.float32) % 2)
    tokens["coefficients"] = np.repeat(signs[:, None], shape[1], axis=1)
    total = float(per_sequence.sum())
    summary: dict[str, Any] = dict.fromkeys(("momentum", "weight_decay", "baseline", "residual"), 0.0)
    summary |= {"total": total, "sum_per_sequence": total, "total_stderr": 1.0, "entropy": 1.0, "lr": 1e-6}
    summary |= {"rollouts": size.evaluation, "update_rollouts": size.rollouts, "trainable_parameters": 0}
    texts = [_words(rng, size.tokens) for _ in range(size.rollouts)]
    rollouts = [_rollout(i, "".join(text)) for i, text in enumerate(texts)]
    sequences = [
        {
            **{name: getattr(r, name) for name in ("id", "prompt_id", "prompt", "completion", "reward", "advantage")},
            "tokens": text,
            "prompt_length": PROMPT,
            "finished": True,
            **dict.fromkeys(("mean_entropy", "mean_logprob", "gradient_norm"), 1.0),
        }
        for r, text in zip(rollouts, texts, strict=True)
    ]
    e = EvaluationResults(arrays, matrix, summary, [rollouts[a % len(rollouts)] for a in range(size.evaluation)])
    return EntropyInfluenceResults(folder, EntropyInfluencePlan(), {}, summary, sequences, rollouts, tokens, (e,))


def _words(rng: np.random.Generator, count: int) -> list[str]:
    return [f"word{k} " for k in rng.integers(WORDS, size=count).tolist()]


def _rollout(i: int, completion: str) -> Rollout:
    group = i // COMPLETIONS
    return Rollout(
        id=f"{group}/{i % COMPLETIONS}",
        prompt_id=str(group),
        group=group,
        prompt=f"the question {group}?",
        prompt_ids=(),
        completion=completion,
        completion_ids=(),
        finished=True,
        reward=float(i % 2),
        advantage=1.0 - 2 * (i % 2),
    )


def measure(size: Size) -> dict[str, Any]:
    """Return bytes of the page without figures, seconds to build and to load it, and milliseconds of every reaction."""
    with tempfile.TemporaryDirectory() as folder:
        results = synthetic(size, Path(folder))
        start = time.perf_counter()
        page = write_report(results, figures=False)
        seconds = time.perf_counter() - start
        return {"size": size._asdict(), "bytes": page.stat().st_size, "build_seconds": seconds, **_in_browser(page)}


def _in_browser(path: Path) -> dict[str, Any]:
    with chromium() as browser:
        page = browser.new_page()
        start = time.perf_counter()
        page.goto(path.as_uri())
        page.wait_for_selector("#rows tbody [data-rollout]")
        load = time.perf_counter() - start
        reactions = {name: _reaction(page, act, ON_SCREEN) for name, act in REACTIONS.items()}
        opening = "document.querySelectorAll('#rows tbody [data-rollout]')[%d].click()"
        times = [_reaction(page, opening % (3 * k + 1), f"{OPENED}.then(() => {ON_SCREEN})") for k in range(3)]
        reactions[f"open a rollout beside {COMPLETIONS - 1} others"] = statistics.median(times)
        reactions["point at a token"] = _reaction(
            page,
            "document.querySelector('.token').dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))",
            ON_SCREEN,
        )
        return {
            "load_seconds": load,
            "reactions_ms": reactions,
            "nodes": page.evaluate("document.querySelectorAll('*').length"),
        }


def _reaction(page: Any, act: str, after: str) -> float:
    """Return the milliseconds from the act until the promise ``after`` is fulfilled."""
    return float(
        page.evaluate(
            f"async () => {{ const t = performance.now(); const done = {after}; {act}; await done;"
            " return performance.now() - t; }"
        )
    )


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a headless browser; raise ``FileNotFoundError`` if none is installed."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    if path is None:
        raise FileNotFoundError("chromium is not on the PATH; expected a browser. Run apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def markdown(report: dict[str, Any]) -> str:
    """Return the table of the page."""
    lines = ["| run | page without figures | built in | loaded in | reactions |", "|---|---|---|---|---|"]
    for x in report["pages"]:
        s = x["size"]
        reactions = ", ".join(f"{name} {ms:.0f} ms" for name, ms in x["reactions_ms"].items())
        title = f"{s['rollouts']:,} rollouts x {s['tokens']:,} tokens, {s['evaluation']:,} in E"
        lines.append(
            f"| {title} | {x['bytes'] / 2**20:.1f} MiB | {x['build_seconds']:.1f} s | {x['load_seconds']:.2f} s "
            f"| {reactions} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__, "a few rollouts, written nowhere").parse_args(argv)
    one_thread()
    sizes = [Size(32, 16, 20)] if arguments.quick else [Size(128, 256, 200), Size(2000, 1024, 1000)]
    report = {"environment": environment(), "pages": [measure(size) for size in sizes]}
    print(markdown(report))
    if not arguments.quick:
        store(NAME, report, {COSTS: {NAME: markdown(report)}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
