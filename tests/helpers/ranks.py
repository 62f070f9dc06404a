"""Scripts of the tests on several ranks, started by torch's launcher, and the result of each rank."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

TESTS = Path(__file__).parents[1]
TIMEOUT = 300
"""Seconds after which ranks that wait for each other are killed; their work takes a few."""


def launch(
    ranks: int, script: str | Path, *args: object, launcher: Sequence[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``tests/helpers/<script>`` on several processes; ``stdout`` of the result has the output of all.

    Args:
        ranks: number of processes.
        script: file name of the script.
        args: arguments of the script.
        launcher: module and options of another launcher than torchrun.
    """
    torchrun = ("torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    command = [sys.executable, "-m", *(launcher or torchrun)]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [*command, str(TESTS / "helpers" / script), *map(str, args)],
        # Ranks share the cores: with more threads they would wait for each other in turns.
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=TIMEOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_on_ranks(ranks: int, script: str, out: Path, *args: object, launcher: Sequence[str] | None = None) -> list[Any]:
    """Run a script on several ranks; return what each passed to ``save_result``, or fail with their output.

    Args:
        ranks: number of processes.
        script: file name of the script, whose first argument is ``out``.
        out: directory of the results.
        args: further arguments of the script.
        launcher: module and options of another launcher than torchrun.
    """
    done = launch(ranks, script, out, *args, launcher=launcher)
    assert done.returncode == 0, done.stdout
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def save_result(out: str, result: Any) -> None:
    """Save the result of this rank for ``run_on_ranks``."""
    torch.save(result, Path(out) / f"{dist.get_rank()}.pt")


def end_rank() -> NoReturn:
    """Exit the process of a rank without the interpreter's shutdown.

    A gloo thread that releases its last tensor during the shutdown aborts the process ("terminate called
    without an active exception"), and where DDP or FSDP hold a group, its threads outlive ``destroy_process_group``.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextmanager
def global_mesh(*shape: int) -> Iterator[DeviceMesh]:
    """Yield, in a rank's process, the mesh of all ranks, with one axis unless ``shape`` says otherwise."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT / 2))
    try:
        yield init_device_mesh("cpu", shape or (dist.get_world_size(),))
    finally:
        dist.destroy_process_group()
