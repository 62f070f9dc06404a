"""The core on a simulated accelerator: no tensors of the wrong device, the CPU's results, and few host reads."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from helpers.cases import assert_close
from helpers.device_cases import CALLS, Outcome, compute
from helpers.simulated_device import DEVICE_TYPE, register


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """A process with the simulated device, which no other test must see."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=register) as executor:
        yield executor


@pytest.mark.parametrize("name", CALLS)
def test_results_equal_those_on_the_cpu(process: ProcessPoolExecutor, name: str) -> None:
    expected, actual = (process.submit(compute, name, device).result() for device in ("cpu", DEVICE_TYPE))
    assert actual.results.keys() == expected.results.keys()
    assert actual.devices <= {DEVICE_TYPE}
    for path, value in expected.results.items():
        assert_close(actual.results[path].double().nan_to_num(), value.double().nan_to_num())
