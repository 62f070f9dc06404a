"""Check the settings of windows."""

from __future__ import annotations

from typing import get_args

from fx_influence.trajectory.influence_over_steps import Denominators


def check_window_settings(window: int, preconditioner: str, processes: int, is_partitioned: bool) -> None:
    """Raise ``ValueError`` for windows that are not attributed.

    Args:
        window: number of steps.
        preconditioner: of the influences.
        processes: number of the training run's processes.
        is_partitioned: whether the optimizer is DeepSpeed's, which partitions its state.
    """
    if window < 1:
        raise ValueError(f"window is {window}; expected at least 1. Pass the number of its steps, or None")
    if preconditioner not in get_args(Denominators):
        raise ValueError(
            f"preconditioner is {preconditioner!r} with window={window}; expected one of "
            f"{', '.join(get_args(Denominators))}, by which steps are differentiated. Leave one of the two out"
        )
    if processes > 1:
        raise ValueError(
            f"window is {window} and {processes} processes train; expected one, since a window is replayed with the "
            "complete model and all rollouts in one process. Leave window out, or train in one process"
        )
    if is_partitioned:
        raise ValueError(
            f"window is {window} and the training runs under DeepSpeed; expected torch's own optimizer, whose state is "
            "recorded. Leave window out, or train without DeepSpeed"
        )


def check_window_ledger(window: int, directory: object) -> None:
    """Raise ``ValueError`` for windows without a ledger that their accounts go to."""
    if directory is None:
        raise ValueError(
            f"directory is None with window={window}; expected that of the training run's ledger, where a window is "
            "recorded and its account written. Pass one, or leave window out"
        )
