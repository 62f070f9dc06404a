"""Windows of a TRL training run: which runs have them, and how their steps are recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fx_influence.interop.live.measurement import StepMeasurement
from fx_influence.interop.trl.prompts import makes_several_steps
from fx_influence.interop.trl.store.contents import update_rollouts
from fx_influence.interop.window.checks import check_window_settings
from fx_influence.interop.window.recorder import WindowRecorder

RATIO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")
"""Loss types whose coefficients are a number times the importance ratio of the token, or 0 where it is clipped."""


def check_window(trainer: Any, window: int | None, preconditioner: str) -> None:
    """Raise ``ValueError`` for a training run whose steps cannot be replayed with other weights.

    Args:
        trainer: a ``GRPOTrainer`` or ``RLOOTrainer``.
        window: number of steps, None for no windows.
        preconditioner: of the influences.
    """
    if window is None:
        return
    check_window_settings(window, preconditioner, trainer.accelerator.num_processes, trainer.is_deepspeed_enabled)
    args, remedy = trainer.args, "Leave window out, or train without it"
    if getattr(args, "beta", 0.0):
        raise ValueError(
            f"beta is {args.beta} with window={window}; expected 0, since coefficients of a KL term follow the policy "
            f"in another way than those of a ratio. {remedy}"
        )
    if not makes_several_steps(trainer):
        # The ratio is 1 at every step, taken by the policy that is differentiated, so coefficients do not follow it.
        return
    level = getattr(args, "importance_sampling_level", "sequence")
    loss = getattr(args, "loss_type", type(trainer).__name__)
    if level != "token" or loss not in RATIO_LOSSES:
        raise ValueError(
            f"the loss is {loss} with ratios by {level}, window={window} and several optimizer steps a generation; "
            f"expected one step, or one of {', '.join(RATIO_LOSSES)} with ratios by token, whose coefficients follow "
            "the policy as the ratio does. Make one optimizer step a generation, or leave window out"
        )


def window_recorder(
    trainer: Any,
    window: int | None,
    every: int,
    measurement: StepMeasurement,
    folder: Callable[[], Path],
    warn: Callable[[str], None],
) -> WindowRecorder | None:
    """Return what records the windows of a training run that begins or goes on, None for no windows.

    Args:
        trainer: a ``GRPOTrainer`` or ``RLOOTrainer``.
        window: number of steps of each, None for no windows.
        every: steps n, 2n, ... are measured.
        measurement: of the measured steps.
        folder: returns the folder of a window's files.
        warn: called with a sentence that the user should read.
    """
    if window is None:
        return None
    return WindowRecorder(
        length=window,
        every=every,
        steps_made=trainer.state.global_step,
        measurement=measurement,
        folder=folder,
        rollouts_of=lambda captured: update_rollouts(captured, trainer),
        follows_ratio=lambda captured: makes_several_steps(trainer),
        warn=warn,
    )
