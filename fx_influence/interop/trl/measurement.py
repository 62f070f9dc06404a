"""Measure the optimizer steps of a TRL trainer: on the step's own rollouts, or on fresh ones of held-out prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fx_influence.interop.live.guard import GenerationError
from fx_influence.interop.live.measurement import Evaluation, MeasurementSettings, PendingStep, StepMeasurement
from fx_influence.interop.live.metrics import MeasuredStep
from fx_influence.interop.live.policy_checks import rounding_bound
from fx_influence.interop.live.step import CapturedStep, on_host
from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.trl.capture.rollout_rows import OLD_LOGPROBS
from fx_influence.interop.trl.precision import AUTOCAST_DTYPES, in_trainers_precision
from fx_influence.interop.trl.prompts import check_images_measurable, makes_several_steps
from fx_influence.interop.trl.sampling import held_out_rollouts
from fx_influence.interop.trl.store.contents import update_rollouts
from fx_influence.policy.policy import Policy
from fx_influence.policy.row_inputs import RowInputs
from fx_influence.types import Params


class TrlTraining:
    """The training run of a TRL trainer, as its measurement reads it.

    Args:
        trainer: a ``GRPOTrainer`` or ``RLOOTrainer``, which may make its optimizer and prepare its model later.
    """

    position_ids = False
    forward_remedy = (
        "Something else goes into the trainer's forward (noise, prompts that are learned, hooks); train "
        "without it to measure"
    )

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    @property
    def model(self) -> Any:
        return self._trainer.model

    @property
    def optimizer(self) -> Any:
        return self._trainer.optimizer

    @property
    def temperature(self) -> float:
        return float(self._trainer.temperature)

    def in_forward_precision(self, policy: Policy) -> Policy:
        """Return the policy under the autocast of the trainer's forward."""
        return in_trainers_precision(policy, self._trainer.accelerator)

    def rounding_bound(self) -> float:
        """Return the bound on the mean difference of two forwards in the lowest precision in use, vLLM's included."""
        autocast = AUTOCAST_DTYPES.get(self._trainer.accelerator.mixed_precision)
        vllm = torch.bfloat16 if getattr(self._trainer, "use_vllm", False) else None
        return rounding_bound(self._trainer.model, (dtype for dtype in (autocast, vllm) if dtype is not None))


class HeldOutSampling(NamedTuple):
    """Settings for the sampling of E.

    Attributes:
        prompts: of E; None where E is the update batch, cross-fitted.
        completions_per_prompt: of E.
        seed: of E; the step's number is added to it.
    """

    prompts: list[Any] | None
    completions_per_prompt: int
    seed: int


class TrlStepMeasurement(StepMeasurement):
    """Measure the steps of one TRL training run.

    Args:
        trainer: a ``GRPOTrainer`` or ``RLOOTrainer``.
        sampling: how E is sampled.
        settings: how steps are measured.
        mesh: of the trainer's processes, None for a single process.
        warn: called with a sentence that the user should read.
    """

    def __init__(
        self,
        trainer: Any,
        sampling: HeldOutSampling,
        settings: MeasurementSettings,
        mesh: DeviceMesh | None,
        warn: Callable[[str], None],
    ) -> None:
        super().__init__(TrlTraining(trainer), settings, mesh, warn)
        self._trainer, self._sampling = trainer, sampling
        self._images: RowInputs | None = None

    def before_update(
        self, step: int, captured: CapturedStep, store_state: Callable[[Params], None] | None = None
    ) -> PendingStep:
        """Attribute a step that the optimizer is about to make, with the images that its rollouts show."""
        self._images = captured.images
        if captured.images is not None:
            check_images_measurable(self._trainer, self._sampling.prompts, self.settings.matrix)
        return super().before_update(step, captured, store_state)

    def after_update(self, pending: PendingStep) -> MeasuredStep:
        """Measure how much the update changed the entropy, on the same E; nothing where the optimizer skipped it."""
        skipped = self._trainer.accelerator.optimizer_step_was_skipped
        return pending.measured if skipped else super().after_update(pending)

    def _functional_policy(self) -> Policy:
        policy = super()._functional_policy()
        return policy if self._images is None else policy.with_row_inputs(self._images)

    def _with_behaviour(self, captured: CapturedStep) -> CapturedStep:
        """Return the step with U's log-probabilities under an older policy, where U is E and may be of one.

        Raises ``GenerationError`` where the trainer does not keep them.
        """
        if self._sampling.prompts is not None or not makes_several_steps(self._trainer):
            return captured
        if captured.old_logprobs is None:
            raise GenerationError(
                "the trainer keeps no log-probabilities of its rollouts under the policy that sampled them; expected "
                f"{OLD_LOGPROBS}, since it makes several optimizer steps a generation. Pass held-out prompts as "
                "eval_prompts"
            )
        return captured._replace(batch=captured.batch._replace(behaviour_logprobs=captured.old_logprobs))

    def _evaluation(self, step: int, captured: CapturedStep) -> Evaluation:
        """Return E as records and as the rows of all processes: the rollouts of U, or fresh ones."""
        sampling = self._sampling
        if sampling.prompts is None:
            return (
                super()._evaluation(step, captured)._replace(rollouts=update_rollouts(on_host(captured), self._trainer))
            )
        rollouts = held_out_rollouts(
            self._trainer, sampling.prompts, sampling.completions_per_prompt, sampling.seed + step, self._mesh
        )
        # Padding is masked, so any token will do.
        batch_e = collate(rollouts, pad_id=0, device=captured.batch.input_ids.device)
        return Evaluation(batch_e, rollouts, False, _drawn_logprobs(rollouts))


def _drawn_logprobs(rollouts: list[Rollout]) -> Tensor | None:
    """Return the log-probs that all rollouts' tokens were drawn with, float64 (m,), or None where some are unknown."""
    known = [r.behaviour_logprobs for r in rollouts if r.behaviour_logprobs is not None]
    if len(known) < len(rollouts):
        return None
    return torch.tensor([x for row in known for x in row], dtype=torch.float64)
