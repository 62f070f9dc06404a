"""Hold the entropy of a live TRL training run at a target, by weights of kinds of tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fx_influence.attribution.influence import influence
from fx_influence.attribution.result import Influence
from fx_influence.control import (
    ControlWeights,
    KindSums,
    control_state,
    from_values,
    kind_sums,
    kinds,
    to_values,
    update,
    weights,
)
from fx_influence.core.checks import check_number
from fx_influence.interop.live.measurement import PendingStep
from fx_influence.interop.live.metrics import MeasuredStep
from fx_influence.interop.live.step import CapturedStep
from fx_influence.interop.optimizers import adamw_state
from fx_influence.interop.trl.callback import EntropyInfluence
from fx_influence.interop.trl.control.advantages import AdvantageWeights
from fx_influence.interop.trl.measurement import TrlStepMeasurement
from fx_influence.interop.trl.prompts import makes_several_steps
from fx_influence.labels import Labels
from fx_influence.objectives import Entropy, Objective, expected_reward

LOWEST = 0.05
"""Default lower bound of a weight: a kind at 0 would not be measured again."""

STATE_FILE = "entropy_control{}.json"
"""File in a trainer's checkpoint with the state of the controller of this name."""


class ControlMeasurement(TrlStepMeasurement):
    """Measure steps as for ``EntropyInfluence``, and their lifetime influences on entropy and reward by kind.

    Attributes:
        sums: of the last measured step.
    """

    sums: KindSums | None = None

    def before_update(self, step: int, captured: CapturedStep, store_state: Any = None) -> PendingStep:
        """Attribute a step that the optimizer is about to make, to both objectives."""
        self.sums = None
        pending = super().before_update(step, captured, store_state)
        self.sums = self._sums(pending.measured)
        return pending

    def _sums(self, measured: MeasuredStep) -> KindSums:
        captured, regions, factor = measured.captured, measured.regions, measured.lifetime_factor
        assert regions is not None
        if math.isnan(factor):
            raise ValueError("parameters differ in beta1 or in their number of steps, so no one factor gives lifetimes")
        labels = kinds(regions, captured.sources if any(captured.sources) else ())
        entropy = measured.influence
        if labels is not regions:
            entropy = self._influence(captured, self.settings.objective, labels)
        reward = self._influence(captured, expected_reward(captured.rewards), labels)
        return kind_sums(entropy, reward, labels, factor)

    def _influence(self, captured: CapturedStep, objective: Entropy | Objective, labels: Labels) -> Influence:
        """Return the influences of a step on an objective, over the other prompts of the step."""
        training, settings = self.training, self.settings
        return influence(
            self.trainable(),
            captured.batch,
            None,
            adamw_state(training.optimizer, training.model, copy=False),
            apply=self.forward_policy(),
            objective=objective,
            grad=captured.unclipped_gradient(),
            max_grad_norm=captured.max_grad_norm,
            temperature=training.temperature,
            chunk_size=settings.chunk_size,
            memory_budget=settings.memory_budget,
            labels=labels,
        )


class EntropyControl(EntropyInfluence):
    """Hold the entropy of a ``GRPOTrainer`` at or above a target, by what an ``EntropyInfluence`` measures.

    Unlike ``EntropyInfluence`` it changes the training run, which is its purpose. After each measured step the
    influences of the kinds of tokens (four regions, times the data set's sources) on entropy and expected reward are
    added to a state that forgets exponentially; from the next step on, ``fx.control.weights`` of that state multiply
    the advantages of each kind's tokens in the trainer's loss. No rollout is chosen. Influences are measured under the
    weights in force and divided by them; the first steps of a new optimizer are left out, see ``fx.control.update``.
    The state goes into the trainer's checkpoints, and a resumed training run continues with it.

    A failure while measuring is one warning; the weights stay as they were, and are 1 once measuring has ended.
    ``history`` has the weights that were in force as ``weight/<kind>``, and whether those for the next steps reach the
    target, by their prediction, as ``target_reached``.

    Args:
        target: entropy to hold, nats per token.
        every: steps n, 2n, ... are measured, and change the weights.
        forgetting: factor on earlier measured steps.
        horizon: optimizer steps in which the entropy should reach the target.
        confidence: of the error bars that the weights allow for.
        bounds: of the weights. A lower bound of 0 lets a kind fall out of the measurement for good.
        **measuring: options of ``EntropyInfluence`` but ``eval_prompts``, ``preconditioner``, ``matrix`` and
            ``region_stderr``: the step's own rollouts are E, since their rewards are known.

    Attributes:
        state: influences by kind over the steps so far.
        weights: by kind, those in force for the steps to come; 1 for kinds not among them.
        prediction: what ``fx.control.weights`` returned last; None before the first measured step.

    Raises:
        ValueError: for numbers out of range.
        TypeError: for options that the controller sets itself.

    Example:
        >>> EntropyControl(0.3, every=2).weights
        {}
    """

    _measurement_type = ControlMeasurement

    def __init__(
        self,
        target: float,
        every: int = 1,
        *,
        forgetting: float = 0.9,
        horizon: float = 10,
        confidence: float = 0.8,
        bounds: tuple[float, float] = (LOWEST, 1.5),
        **measuring: Any,
    ) -> None:
        fixed = {"eval_prompts", "preconditioner", "matrix", "region_stderr", "save_state"} & set(measuring)
        if fixed:
            raise TypeError(
                f"{sorted(fixed)[0]} is an option that the controller sets itself; expected others. Leave it out"
            )
        super().__init__(every, **measuring)
        check_number("forgetting", forgetting, "pass 0.9", lambda x: 0 <= x <= 1, "a factor from 0 to 1")
        self._forgetting, self._target = forgetting, target
        self._options: dict[str, Any] = {"horizon": horizon, "confidence": confidence, "bounds": bounds}
        # Numbers out of range are refused now, not at the first step.
        weights(control_state(), target, target, lr=1.0, **self._options)
        self._weighting: AdvantageWeights | None = None
        self._begin_control()

    def _begin_control(self) -> None:
        self.state = control_state()
        self.weights: dict[str, float] = {}
        self._in_force: dict[str, float] = {}
        self.prediction: ControlWeights | None = None

    def attach(self, trainer: Any) -> EntropyControl:
        """Measure this trainer's steps from now on and weigh its advantages; see ``EntropyInfluence.attach``.

        Raises:
            ValueError: for losses whose coefficients are not the advantages' multiples (a KL term, an entropy bonus,
                ratios of sequences), several optimizer steps a generation, and several processes.
        """
        super().attach(trainer)
        try:
            check_controllable(trainer)
        except ValueError:
            self.detach()
            raise
        self._weighting = AdvantageWeights(trainer, lambda: self.weights)
        return self

    def detach(self) -> None:
        """Leave the trainer as it was before ``attach``; do nothing if this callback is not attached."""
        if self._weighting is not None:
            self._weighting.detach()
            self._weighting = None
        super().detach()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach if not yet attached, and continue with the state of the checkpoint that training resumes from."""
        super().on_train_begin(args, state, control, **kwargs)
        self._begin_control()
        if self._trainer is None or not state.global_step:
            return
        file = self._state_file(args, state)
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            self.state = from_values(values["state"])
            self.weights = {str(name): float(w) for name, w in values["weights"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._begin_control()
            self._warn(f"the controller begins anew, since {file} has no state of it: {error}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Store the controller's state in the checkpoint."""
        super().on_save(args, state, control, **kwargs)
        if self._trainer is None:
            return
        file = self._state_file(args, state)
        try:
            file.write_text(json.dumps({"state": to_values(self.state), "weights": self.weights}), encoding="utf-8")
        except OSError as error:
            self._warn(f"{file} was not written, so that a resumed training run begins the control anew: {error}")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the micro-batches of a step that is to be measured; weights are 1 where measuring has ended."""
        super().on_step_begin(args, state, control, **kwargs)
        if not self._measuring:
            self.weights = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attribute the step that the optimizer is about to make, and set the weights of the steps after it."""
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        if self._pending is not None:
            measured = self._pending.measured
            self._guarded(measured.step, lambda: self._control(measured))

    def _control(self, measured: MeasuredStep) -> None:
        assert isinstance(self._measurement, ControlMeasurement)
        assert self._measurement.sums is not None
        sums = self._measurement.sums
        self._in_force = {name: self.weights.get(name, 1.0) for name in sums.kinds}
        self.state = update(self.state, sums, forgetting=self._forgetting, in_force=self.weights)
        # A warm-up's first step has a rate of 0 and says nothing of the rates to come.
        if measured.lr > 0 and self.state.steps:
            self.prediction = weights(self.state, measured.entropy, self._target, lr=measured.lr, **self._options)
            self.weights = self.prediction.by_kind

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the change of entropy over the step; store and log it."""
        count = len(self.history)
        super().on_optimizer_step(args, state, control, **kwargs)
        if len(self.history) > count:
            self.history[-1] |= {f"weight/{name}": w for name, w in self._in_force.items()}
            if self.prediction is not None:
                self.history[-1]["target_reached"] = float(self.prediction.reached)

    def _state_file(self, args: Any, state: Any) -> Path:
        suffix = f"-{self.name}" if self.name else ""
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE.format(suffix)


def check_controllable(trainer: Any) -> None:
    """Raise ``ValueError`` unless weights of advantages multiply the coefficients of a trainer's loss, token by token.

    Args:
        trainer: a ``GRPOTrainer``.
    """
    args, kind = trainer.args, type(trainer).__name__
    if not hasattr(args, "loss_type"):
        raise ValueError(
            f"trainer is {kind}; expected a GRPOTrainer, whose loss takes an advantage for each token. Use GRPOTrainer"
        )
    reasons = {
        "beta": (getattr(args, "beta", 0.0) != 0, "0, since weights do not multiply a KL term"),
        "entropy_coef": (
            bool(getattr(trainer, "_entropy_bonus_enabled", False)),
            "no entropy bonus, which is another controller",
        ),
        "importance_sampling_level": (
            getattr(args, "importance_sampling_level", "token") != "token",
            "'token', since the ratio of a sequence has all of its advantages",
        ),
    }
    for field, (refused, expected) in reasons.items():
        if refused:
            raise ValueError(f"{field} is {getattr(args, field)!r}; expected {expected}. Train without it to control")
    if makes_several_steps(trainer):
        raise ValueError(
            "the trainer makes several optimizer steps a generation; expected one, since influences on the reward are "
            "of rollouts of the policy itself. Set num_iterations=1 and "
            "steps_per_generation=gradient_accumulation_steps"
        )
    if trainer.accelerator.num_processes > 1:
        raise ValueError(
            f"{trainer.accelerator.num_processes} processes train; expected one. Train in one process to control"
        )
