"""What a script of the tests does on several ranks, started by torch's own launcher, and the answers of each rank."""

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
"""Seconds after which ranks that wait for each other are ended; what they do takes a few."""


def launch(
    ranks: int, script: str | Path, *args: object, launcher: Sequence[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``tests/helpers/<script>`` with ``args`` on ``ranks`` processes, and with ``stdout`` what all of them wrote.

    ``launcher``: another module than torchrun's, with its options.
    """
    torchrun = ("torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    command = [sys.executable, "-m", *(launcher or torchrun)]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return subprocess.run(
        [*command, str(TESTS / "helpers" / script), *map(str, args)],
        env={**os.environ, "PYTHONPATH": path},
        timeout=TIMEOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_on_ranks(ranks: int, script: str, out: Path, *args: object, launcher: Sequence[str] | None = None) -> list[Any]:
    """What each rank gave to ``save_result`` in ``out``; fails with what they wrote where one failed."""
    done = launch(ranks, script, out, *args, launcher=launcher)
    assert done.returncode == 0, done.stdout
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def save_result(out: str, answer: Any) -> None:
    torch.save(answer, Path(out) / f"{dist.get_rank()}.pt")


def end_rank() -> NoReturn:
    """End the process of a rank that is done, without the end of its interpreter.

    A gloo thread that lets go of its last tensor while the interpreter ends aborts the process ("terminate called
    without an active exception"), and where DDP or FSDP hold a group, its threads outlive ``destroy_process_group``.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextmanager
def global_mesh(*shape: int) -> Iterator[DeviceMesh]:
    """In a rank's process: the mesh of all ranks, of one axis where no ``shape`` is given."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT / 2))
    try:
        yield init_device_mesh("cpu", shape or (dist.get_world_size(),))
    finally:
        dist.destroy_process_group()
