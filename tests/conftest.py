"""One profile for hypothesis, one thread unless OMP_NUM_THREADS says more, and the mark of tests with a tolerance."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import CodeType
from typing import Any

import hypothesis
import pytest
import torch
import torch.distributed as dist

# Read by torch here and, inherited, in every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# torch's first call takes seconds, so a deadline would fail a test at random.
hypothesis.settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
# Other processors' kernels round differently; the shapes and options that are drawn are those of the default profile.
hypothesis.settings.register_profile("kernels", hypothesis.settings.get_profile("default"), max_examples=8)
hypothesis.settings.load_profile("default")


HELPERS = {f"helpers.{path.stem}" for path in (Path(__file__).parent / "helpers").glob("*.py")}


def names_in(code: CodeType) -> Iterator[str]:
    """Yield the globals and attributes that code reads, those of the functions inside it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def compares_within_bounds(function: Callable[..., Any], seen: set[Callable[..., Any]]) -> bool:
    """Return whether a test, or a helper of the tests that it names, uses a bound of ``tolerances``."""
    function = getattr(getattr(function, "hypothesis", None), "inner_test", function)
    seen.add(function)
    values = [function.__globals__.get(name) for name in names_in(function.__code__)]
    if any(getattr(value, "__module__", None) == "helpers.tolerances" for value in values):
        return True
    helpers = [f for f in values if inspect.isfunction(f) and f.__module__ in HELPERS | {function.__module__}]
    return any(compares_within_bounds(f, seen) for f in helpers if f not in seen)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and compares_within_bounds(item.function, set()):
            item.add_marker("tolerance")


@pytest.fixture
def process_group() -> Iterator[None]:
    """Yield within the group of one process, which sharded tensors and DeepSpeed's optimizers ask for."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session", autouse=True)
def pages_without_figures() -> Iterator[None]:
    """Skip drawing, which takes longer than the small runs of most tests; figures have their own tests."""
    with pytest.MonkeyPatch.context() as patch:
        # the mathematics alone is tested without what a page needs
        with suppress(ImportError):
            from fx_influence.lab.report.figures import NO_FIGURES

            patch.setattr("fx_influence.lab.report.page.draw_figures", lambda *_: NO_FIGURES)
        yield
