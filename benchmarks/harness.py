"""Fair comparisons: runs interleaved in one process on one thread, flops counted, peak memory in a fresh process."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README, EVIDENCE = ROOT / "README.md", ROOT / "benchmarks" / "EVIDENCE.md"
PAIRS = 11


def _product_flop(into: tuple[int, ...], left: tuple[int, ...], *_: object, **__: object) -> int:
    return 2 * math.prod(into) * left[-1]


IN_PLACE = {torch.ops.aten.addmm_: _product_flop, torch.ops.aten.baddbmm_: _product_flop}
"""Products that the counter of torch passes over."""

GIVEN_BACK = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
"""An environment in which what a process frees is no longer counted as its own."""

Work = Callable[[], object]


def seconds(work: Work) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def flops(work: Work) -> int:
    """Floating point operations of the matrix products of one call."""
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        work()
    return counter.get_total_flops()


def ratios(works: Mapping[str, Work], reference: Work, pairs: int = PAIRS) -> dict[str, dict[str, float]]:
    """Each work's seconds over the reference's: median and quartiles of paired runs, every round in another order."""
    names = list(works)
    found: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for k in range(pairs):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            gc.collect()
            found[name].append(seconds(works[name]) / seconds(reference))
    return {
        name: {
            "median": statistics.median(values),
            "lowest": min(values),
            "highest": max(values),
        }
        for name, values in found.items()
    }


def interval(values: Sequence[float]) -> dict[str, float | None] | None:
    """Mean and half the width of its 95% interval by Student's t, None of a single value; None of no values."""
    if not values:
        return None
    found: dict[str, float | None] = {"mean": statistics.fmean(values), "half_width": None}
    if len(values) > 1:
        quantile = float(student.ppf(0.975, len(values) - 1))
        found["half_width"] = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return found


def shown(found: Mapping[str, float | None] | None, spec: str = ".3g", scale: float = 1.0) -> str:
    """An ``interval`` in a table, or nothing."""
    if found is None or found["mean"] is None:
        return ""
    mean, width = f"{scale * found['mean']:{spec}}", found["half_width"]
    return mean if width is None else f"{mean} ± {scale * width:{spec.lstrip('+')}}"


def peak_extra_bytes(name: str, *arguments: str) -> int:
    """How far ``python -m benchmarks.name --memory arguments`` rises above the memory before its work.

    What is freed is given back at once: what is measured is what is alive, and not what the heap of glibc is left with.
    """
    command = [sys.executable, "-m", f"benchmarks.{name}", "--memory", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=GIVEN_BACK)
    return int(json.loads(done.stdout.splitlines()[-1])["peak_extra_bytes"])


def print_peak_extra(work: Work) -> None:
    """The other side of ``peak_extra_bytes``: call ``work`` and print how far above the memory before it rose."""
    print(json.dumps({"peak_extra_bytes": peak_extra(work)}))


def peak_extra(work: Work) -> int:
    """How far this process rises above its memory before ``work``, in bytes."""
    gc.collect()
    # What was freed is given back and a new peak begun: memory used before is neither the work's nor a gift to it.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def with_block(page: str, name: str, text: str) -> str:
    """A page with what stands between the marks of the benchmark ``name`` made anew."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    if begin not in page or end not in page:
        raise ValueError(f"the page has no place for {name}; put {begin} and {end} where its table belongs")
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"


def result(name: str) -> Path:
    """Where the figures of a benchmark are stored."""
    return RESULTS / f"{name.removeprefix('bench_')}.json"


def store(name: str, report: dict[str, Any], pages: Mapping[Path, str]) -> None:
    """The figures in ``results/`` and their tables in the pages."""
    result(name).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for page, markdown in pages.items():
        page.write_text(with_block(page.read_text(encoding="utf-8"), name, markdown), encoding="utf-8")


@contextmanager
def drawn(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """The axes of a figure that is written as SVG, the same bytes for the same figures."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "fx_influence", "font.size": 9}):
        figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        for one in axes.flat:
            one.spines[["top", "right"]].set_visible(False)
        yield axes
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def one_thread() -> None:
    """What every benchmark begins with: one thread can be compared, two on a shared machine cannot."""
    torch.set_num_threads(1)
