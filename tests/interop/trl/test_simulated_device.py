"""A TRL training run on a simulated accelerator: measured as on the CPU, with few host reads."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
from helpers.device_training import STEPS, DeviceTraining, train
from helpers.simulated_device import DEVICE_TYPE, register
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding
from torch import float32

READS = 262
"""Host reads of one measured step, at most, whatever the number of rollouts and parameters; passes over a fold have
some each."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs() -> Iterator[tuple[DeviceTraining, DeviceTraining]]:
    """Return the training run on the CPU and on the device, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, context) as on_cpu,
        ProcessPoolExecutor(1, context, initializer=register) as on_device,
    ):
        yield on_cpu.submit(train, "cpu").result(), on_device.submit(train, DEVICE_TYPE).result()


def test_step_on_device_is_measured_as_on_the_cpu(runs: tuple[DeviceTraining, DeviceTraining]) -> None:
    """The first step of both has the same rollouts; those after it follow weights that rounding tells apart."""
    expected, actual = runs
    assert (expected.device, actual.device) == ("cpu", DEVICE_TYPE)
    assert len(actual.history) == len(expected.history) == STEPS
    first, reference = actual.history[0], expected.history[0]
    assert first.keys() == reference.keys()
    scale = max(map(abs, (reference[name] for name in ("total", "self_influence", "stderr", "positive_advantage"))))
    for name in ("entropy", "total", "rollouts", "stderr", "measured", "self_influence", "positive_advantage"):
        size = max(scale, abs(reference[name]))
        assert_close_to_rounding(first[name], reference[name], terms=TINY_POLICY, scale=size, dtype=float32, name=name)
    assert all(metrics["unattributed"] == 0 for metrics in actual.history)


def test_host_reads_of_a_step_do_not_grow(runs: tuple[DeviceTraining, DeviceTraining]) -> None:
    """The first step also makes the policy and checks it, which the others do not."""
    on_cpu, on_device = runs
    assert not any(on_cpu.transfers)
    assert sum(transfer.kind == "read" for transfer in on_device.transfers[-1]) <= READS
