"""Run on each rank: the command line, with a fault of the last rank where one is asked for.

Only the first rank is passed the real run directory.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fx_influence as fx
from fx_influence.lab.cli import main
from fx_influence.lab.experiment import finite_steps
from fx_influence.lab.plan import demo

RANK, LAST = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) - 1
NOWHERE = "/dev/null/nowhere"


def nothing() -> None:
    pass


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def failing() -> None:
    raise RuntimeError("the device is on fire")


def refusing() -> None:
    raise fx.IdentityError("a derivative was lost on the last rank")


def interrupted() -> None:
    # Ctrl-C too reaches the launcher only, because its processes run in other sessions.
    os.kill(os.getppid(), signal.SIGINT)
    signal.pause()


IN_THE_SWEEP = {fault.__name__: fault for fault in (killed, failing, refusing, interrupted)}
BLOCK = "a block of rollouts is measured"


def in_the_second_block(fault: Callable[[], None]) -> None:
    """Make the fault happen in the second block, when each rank has stored one; print when a block begins."""
    rollout_gradients, count = finite_steps.rollout_gradients, itertools.count(1)

    def faulty(*args: Any) -> Any:
        print(BLOCK, flush=True)
        if next(count) == 2:
            fault()
        return rollout_gradients(*args)

    finite_steps.rollout_gradients = faulty  # type: ignore[assignment]  # it passes on whatever it is called with


def command_line(fault: str, arguments: list[str]) -> int:
    arguments = arguments if RANK == 0 else [*arguments[:-1], NOWHERE]
    in_the_second_block(IN_THE_SWEEP.get(fault, nothing) if RANK == LAST else nothing)
    if RANK == LAST:
        if fault == "other seed":
            arguments += ["--seed", "7"]
        elif fault == "no plan":
            arguments[1] = "absent.yaml"
        elif fault == "other prompts":
            demo.DEMO_DIRECTORY = Path(arguments[1]).parent / "other"
    return main(arguments)


def gloo_threads() -> list[str]:
    """Return threads of process groups; one that is alive when the interpreter ends can abort the process."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    status = command_line(sys.argv[1], sys.argv[2:])
    assert not gloo_threads()
    sys.exit(status)
