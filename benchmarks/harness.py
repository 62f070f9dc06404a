"""Fair comparisons: paired runs interleaved on one thread, flops counted, peak memory measured in a fresh process."""

from __future__ import annotations

import argparse
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
from torch.utils.flop_counter import FlopCounterMode

from fx_influence.estimators.stderr import interval_half_width

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COSTS, EVIDENCE = ROOT / "benchmarks" / "README.md", ROOT / "benchmarks" / "evidence" / "README.md"
"""Pages that tables are written into."""
PAIRS = 11
"""Paired runs of which a comparison takes the median."""

Work = Callable[[], object]
Tables = Mapping[Path, Mapping[str, str]]
"""Tables in Markdown by page and by the name in their marks."""


def _product_flops(target: tuple[int, ...], left: tuple[int, ...], *_: object, **__: object) -> int:
    # torch's counter passes out_shape by keyword, so no positional parameter may have that name.
    return 2 * math.prod(target) * left[-1]


IN_PLACE_PRODUCTS = {torch.ops.aten.addmm_: _product_flops, torch.ops.aten.baddbmm_: _product_flops}
"""Products that torch's flop counter does not count."""

RETURN_FREED_MEMORY = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
"""Environment in which glibc returns freed memory to the system, so that it no longer counts as the process's."""


def seconds(work: Work) -> float:
    """Return the wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def flops(work: Work) -> int:
    """Return the floating-point operations of the matrix products of one call."""
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE_PRODUCTS) as counter:
        work()
    return counter.get_total_flops()


def ratios(works: Mapping[str, Work], reference: Work, pairs: int = PAIRS) -> dict[str, dict[str, float]]:
    """Return the seconds of each work over the reference's: median and range of paired runs.

    Args:
        works: what is timed, by name; each is called once before.
        reference: what is timed right after every work.
        pairs: number of rounds. Every round takes the works in another order.
    """
    names = list(works)
    samples: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for k in range(pairs):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            gc.collect()
            samples[name].append(seconds(works[name]) / seconds(reference))
    return {
        name: {
            "median": statistics.median(values),
            "lowest": min(values),
            "highest": max(values),
        }
        for name, values in samples.items()
    }


def mean_interval(values: Sequence[float]) -> dict[str, float | None] | None:
    """Return mean and half width of its 95% interval by Student's t, None for a single value; None for no values."""
    if not values:
        return None
    summary: dict[str, float | None] = {"mean": statistics.fmean(values), "half_width": None}
    if len(values) > 1:
        stderr = statistics.stdev(values) / math.sqrt(len(values))
        summary["half_width"] = interval_half_width(stderr, len(values) - 1)
    return summary


def format_interval(summary: Mapping[str, float | None] | None, spec: str = ".3g", scale: float = 1.0) -> str:
    """Return a ``mean_interval`` as a cell of a table, empty for None.

    Args:
        summary: mean and half width of the interval.
        spec: format of the mean; a ``+`` in it is not repeated in the half width.
        scale: factor on both.
    """
    if summary is None or summary["mean"] is None:
        return ""
    mean, width = f"{scale * summary['mean']:{spec}}", summary["half_width"]
    return mean if width is None else f"{mean} ± {scale * width:{spec.lstrip('+')}}"


def figures_of_process(module: str, *arguments: str) -> dict[str, Any]:
    """Return the JSON object in the last line that ``python -m module arguments`` prints.

    Freed memory is returned to the system at once, so that peaks are those of live memory, and not of glibc's heap.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, env=RETURN_FREED_MEMORY)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def peak_extra_bytes(module: str, *arguments: str) -> int:
    """Return how far ``python -m module --memory arguments`` rises above its memory before the work, in bytes."""
    return int(figures_of_process(module, "--memory", *arguments)["peak_extra_bytes"])


def print_peak_extra(work: Work) -> None:
    """Call ``work`` and print how far memory rose above what it was before, for ``peak_extra_bytes``."""
    print(json.dumps({"peak_extra_bytes": peak_extra(work)}))


def peak_extra(work: Work) -> int:
    """Return how far this process rises above its memory before ``work``, in bytes."""
    before = reset_peak()
    work()
    return peak_bytes() - before


def reset_peak() -> int:
    """Return freed memory to the system, start the peak anew, and return the resident bytes of this process.

    Memory used before then neither counts nor is reused for free.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_bytes() -> int:
    """Return the largest number of resident bytes of this process since ``reset_peak``."""
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def with_block(page: str, name: str, text: str) -> str:
    """Return a page with another table between two marks.

    Args:
        page: text of the page.
        name: name in the marks.
        text: the table.

    Raises:
        ValueError: if the page has no such marks.
    """
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    if begin not in page or end not in page:
        raise ValueError(f"page has no marks {name}; expected {begin} and {end}. Put them where the table belongs")
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"


def result_path(name: str) -> Path:
    """Return the file that stores the figures of a benchmark."""
    return RESULTS / f"{name.removeprefix('bench_')}.json"


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON; an earlier file stays until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def store(name: str, report: Mapping[str, Any], tables: Tables) -> None:
    """Write the figures of a benchmark to ``results/`` and its tables into the pages.

    Args:
        name: name of the benchmark.
        report: its figures, as JSON values.
        tables: its tables by page and mark.
    """
    write_json(result_path(name), report)
    write_tables(tables)


def write_tables(tables: Tables) -> None:
    """Replace the tables between their marks in the pages."""
    for path, blocks in tables.items():
        page = path.read_text(encoding="utf-8")
        for name, text in blocks.items():
            page = with_block(page, name, text)
        path.write_text(page, encoding="utf-8")


def tables_of(benchmark: Any, report: Mapping[str, Any]) -> Tables:
    """Return the tables of a benchmark's module from its report: its, or its ``BENCHMARK``'s, or its ``markdown``."""
    source = getattr(benchmark, "BENCHMARK", benchmark)
    if hasattr(source, "tables"):
        tables: Tables = source.tables(report)
        return tables
    return {getattr(benchmark, "PAGE", COSTS): {benchmark.NAME: benchmark.markdown(report)}}


@contextmanager
def svg_figure(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """Yield the axes of a figure, then write it as SVG; equal figures give equal bytes.

    Args:
        path: the file.
        rows: rows of axes.
        columns: columns of axes.
        size: width and height in inches.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "fx_influence", "font.size": 9}):
        figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        for axes in grid.flat:
            axes.spines[["top", "right"]].set_visible(False)
        yield grid
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def parser(doc: str | None, quick: str = "a tiny model, written nowhere") -> argparse.ArgumentParser:
    """Return the command line of a benchmark, with ``--quick`` and its module's docstring."""
    command = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--quick", action="store_true", help=quick)
    return command


def one_thread() -> None:
    """Limit torch to one thread: on a shared machine, times of several threads cannot be compared."""
    torch.set_num_threads(1)
