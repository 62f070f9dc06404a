"""The core on a simulated accelerator: no tensors of the wrong device, the CPU's results, and few host reads."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import assert_close
from helpers.device_cases import CALLS, compute, self_check
from helpers.simulated_device import DEVICE_TYPE, register
from helpers.tolerances import assert_close_to_rounding

READS = {
    "influence": 53,
    "influence, no stderr": 36,
    "influence, per_token=False": 51,
    "influence, matrix": 51,
    "influence, matrix, per_token=False": 46,
    "influence, cross-fitted": 55,
    "influence, labels": 65,
    "snis_delta": 19,
    "snis_sweep": 21,
    "jvp_delta": 22,
    "fisher_kernel": 13,
    "check_derivatives": 78,
    "adamw_decompose": 3,
    "token_values": 0,
}
"""Host reads of a call, at most, whatever the number of parameters and micro-batches; see autodiff/README.md."""

LANGUAGE_MODEL = 10_000
"""Roundings on the way to an influence of the two-layer models of ``hf_models``; see ``policy_terms``."""

Call = Callable[..., Any]

# The process with the device takes seconds to start.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def in_process() -> Iterator[Call]:
    """Call a function in a process with the simulated device, which no other test must see; results are remembered."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=register) as executor:
        yield cache(lambda function, *args: executor.submit(function, *args).result())


def host_reads(in_process: Call, name: str, chunk_size: int) -> int:
    transfers = in_process(compute, name, DEVICE_TYPE, "plain", chunk_size).transfers
    return Counter(transfer.kind for transfer in transfers)["read"]


def test_simulated_device_counts_reads_and_refuses_mixing(in_process: Call) -> None:
    message, transfers = in_process(self_check)
    assert "aten.add.Tensor was given tensors on ['simulated:0', 'cpu']" in message
    assert [transfer.kind for transfer in transfers] == 7 * ["read"] + ["write"]


calls = pytest.mark.parametrize("name", CALLS)


@calls
def test_results_on_device_equal_those_on_the_cpu(in_process: Call, name: str) -> None:
    expected, actual = (in_process(compute, name, device, "plain", 2) for device in ("cpu", DEVICE_TYPE))
    assert actual.devices <= {DEVICE_TYPE}
    assert actual.results.keys() == expected.results.keys()
    for path, value in expected.results.items():
        result, reference = (torch.from_numpy(x).nan_to_num() for x in (actual.results[path], value))
        assert_close(result, reference)


@pytest.mark.parametrize("name", ["influence", "influence, matrix", "snis_delta", "fisher_kernel"])
def test_language_model_on_device_gives_the_cpu_results(in_process: Call, name: str) -> None:
    expected, actual = (in_process(compute, name, device, "qwen2", None) for device in ("cpu", DEVICE_TYPE))
    assert actual.devices <= {DEVICE_TYPE}
    for path, value in expected.results.items():
        size = 1 + abs(value[np.isfinite(value)]).max(initial=0.0)
        assert_close_to_rounding(
            actual.results[path], value, terms=LANGUAGE_MODEL, scale=size, dtype=torch.float32, name=path
        )


@pytest.mark.parametrize("name", READS)
def test_host_reads_do_not_grow(in_process: Call, name: str) -> None:
    few, many = (host_reads(in_process, name, chunk_size) for chunk_size in (2, 1))
    assert few <= READS[name]
    assert many == few, "a read per micro-batch"
