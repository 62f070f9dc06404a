"""Windows of a training loop: where its steps are recorded, and how their coefficients follow the policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fx_influence.interop.live.guard import CaptureError
from fx_influence.interop.live.measurement import StepMeasurement
from fx_influence.interop.live.step import CapturedStep
from fx_influence.interop.loop.ledger import LoopLedger, captured_rollouts, end_tokens, numbers
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.window.recorder import WindowRecorder

FOLDER = ".window"
"""Name of the folder with a window's files, in the directory of the ledger."""


class LoopWindow(NamedTuple):
    """Windows of a training loop.

    Attributes:
        length: number of steps of each.
        follows_ratio: whether the loss has the ratio pi / pi_behaviour of each token as a factor; None where not told.
    """

    length: int
    follows_ratio: bool | None

    def of_step(self, captured: CapturedStep) -> bool:
        """Return whether a step's coefficients follow the policy as the ratio does.

        Raises ``CaptureError`` where that is not known.
        """
        if self.follows_ratio is None and captured.batch.behaviour_logprobs is not None:
            raise CaptureError(
                "window_ratio is None and rollouts have behaviour_logprobs; expected True or False. Pass to attach "
                "whether the loss has pi / pi_behaviour of each token as a factor, which coefficients then follow"
            )
        return bool(self.follows_ratio)

    def recorder(
        self,
        every: int,
        steps_made: int,
        measurement: StepMeasurement,
        ledger: LoopLedger,
        warn: Callable[[str], None],
    ) -> WindowRecorder:
        """Return what records the windows.

        Args:
            every: steps n, 2n, ... are measured.
            steps_made: number of steps that the optimizer has made.
            measurement: of the measured steps.
            ledger: that the windows' accounts go to.
            warn: called with a sentence that the user should read.
        """
        model = measurement.training.model

        def rollouts_of(captured: CapturedStep) -> Sequence[Rollout]:
            return captured_rollouts(captured, ledger.decode or numbers, end_tokens(model) or frozenset())

        return WindowRecorder(
            length=self.length,
            every=every,
            steps_made=steps_made,
            measurement=measurement,
            folder=lambda: ledger.directory / FOLDER,
            rollouts_of=rollouts_of,
            follows_ratio=self.of_step,
            warn=warn,
            ends_known=lambda: end_tokens(model) is not None,
        )
