"""Measure one optimizer step of a training run: influences before the update, change of entropy after it."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fx_influence.attribution.display import CONDITIONING_REMEDY, ILL_CONDITIONED
from fx_influence.attribution.influence import influence
from fx_influence.batching.rows import select_rows
from fx_influence.core.computed import Partition, local_shards
from fx_influence.core.tree import shift_
from fx_influence.distributed.engine import make_engine
from fx_influence.distributed.zero.flat_shards import sharded_parameters
from fx_influence.estimators.entropy import entropy_estimate
from fx_influence.functional import make_functional
from fx_influence.interop.ledger.entry import lifetime_factor
from fx_influence.interop.live.change.measured import measure_change
from fx_influence.interop.live.change.over_others import PartsOfRows, parts_of_rows, shifts_without_own_fold
from fx_influence.interop.live.metrics import MeasuredStep, regions_of
from fx_influence.interop.live.policy_checks import check_sampled_logprobs, check_scored, check_temperature
from fx_influence.interop.live.precision import roundings_of_step, sampling_stride
from fx_influence.interop.live.processes import count_and_rank, local_rows, local_slice
from fx_influence.interop.live.step import CapturedStep, check_finite, with_step_counted
from fx_influence.interop.optimizers import adamw_state, rounds_at_random
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.labels import Labels
from fx_influence.objectives import Entropy
from fx_influence.optim.step import AdamWStep
from fx_influence.policy.policy import Policy
from fx_influence.policy.precision import in_float32
from fx_influence.types import Batch, Params, Preconditioner, TokenValues

logger = logging.getLogger(__name__)

RESCORED_ROWS = 4
"""Approximate number of rollouts of a step that are scored again, to check the trainer's forward by the policy's."""


class Training(Protocol):
    """A live training run, as the measurement of its steps reads it.

    Attributes:
        model: the policy that is trained.
        optimizer: an AdamW over its parameters.
        temperature: of the policy.
        position_ids: whether the forward has position ids, as for ``make_functional``.
        forward_remedy: the sentence for a user whose log-probabilities are not those of the model.
    """

    @property
    def model(self) -> nn.Module: ...
    @property
    def optimizer(self) -> torch.optim.Optimizer: ...
    @property
    def temperature(self) -> float: ...
    @property
    def position_ids(self) -> bool: ...
    @property
    def forward_remedy(self) -> str: ...

    def in_forward_precision(self, policy: Policy) -> Policy:
        """Return the policy in the precision of the training run's forward."""

    def rounding_bound(self) -> float:
        """Return the largest mean difference between two forwards by rounding alone, in nats per token."""


class MeasurementSettings(NamedTuple):
    """Settings for measuring the steps of a training run: arguments of ``fx.influence``.

    Attributes:
        objective: how the entropy is estimated.
        preconditioner: what a rollout's gradient is multiplied with.
        matrix: whether pairwise influences are computed too.
        chunk_size: rows per forward, None chooses.
        memory_budget: bytes, None for the default.
        region_stderr: whether the sums over regions of tokens get standard errors.
    """

    objective: Entropy
    preconditioner: Preconditioner
    matrix: bool
    chunk_size: int | None
    memory_budget: int | None
    region_stderr: bool


class Evaluation(NamedTuple):
    """The evaluation batch E of a step.

    Attributes:
        batch: the rows of all processes.
        rollouts: the same as records; empty where nothing stores them.
        is_update: whether E is the update batch, so that prompts are left out.
        drawn: (m,), log-probs that E's completion tokens were drawn with; None where they are not known.
    """

    batch: Batch
    rollouts: list[Rollout]
    is_update: bool
    drawn: Tensor | None


class PendingStep(NamedTuple):
    """A step measured up to the optimizer's update.

    Attributes:
        measured: the step without its change of entropy.
        batch_e: the rows of E of all processes.
        values: of E's tokens before the update, in float32 at least.
        sampled: the optimizer's step on some entries of the parameters, or of this process's shards of them.
        partition: of the optimizer's state, which the shards are of; None without one.
        parts: of E.
        shifts: of E's token values after the step by leaving each row's fold out of it; None with an E that is not U.
        unrounded: of E's tokens at the step without the rounding of the forward's weights; None where these are the
            weights that the optimizer moves.
    """

    measured: MeasuredStep
    batch_e: Batch
    values: TokenValues
    sampled: AdamWStep
    partition: Partition | None
    parts: PartsOfRows
    shifts: TokenValues | None
    unrounded: TokenValues | None


class StepMeasurement:
    """Measure the steps of one training run on their own rollouts; a subclass may have another E.

    Args:
        training: its model, optimizer and forward.
        settings: how steps are measured.
        mesh: of the training run's processes, None for a single process.
        warn: called with a sentence that the user should read.
    """

    def __init__(
        self,
        training: Training,
        settings: MeasurementSettings,
        mesh: DeviceMesh | None,
        warn: Callable[[str], None],
    ) -> None:
        self.training, self.settings = training, settings
        self._mesh, self._warn = mesh, warn
        self._policy: Policy | None = None
        self._temperature_checked = self._rounding_warned = self._conditioning_logged = False

    def before_update(
        self, step: int, captured: CapturedStep, store_state: Callable[[Params], None] | None = None
    ) -> PendingStep:
        """Attribute a step that the optimizer is about to make.

        Args:
            step: its number, from 1.
            captured: its update batch and gradient.
            store_state: called with v_baseline, by name, before the update.

        Raises:
            ValueError: for a gradient that is not finite.
            CaptureError: where the trainer's forward is not the policy's.
            GenerationError: where E is not sampled from the policy.
            IdentityError: for influences that do not add up.
        """
        start = time.perf_counter()
        training, settings = self.training, self.settings
        forward, params = self.forward_policy(), self.trainable()
        check_finite(captured.gradient)
        # Live moments: all that reads them is done before the optimizer steps.
        opt_state = adamw_state(training.optimizer, training.model, copy=False)
        captured = self.complete(captured)
        evaluation = self._evaluation(step, captured)
        batch_e, rollouts, _, drawn = evaluation
        regions, gradient = regions_of(captured), captured.unclipped_gradient()
        result = influence(
            params,
            local_rows(captured.batch, self._mesh),
            None if evaluation.is_update else local_rows(batch_e, self._mesh),
            opt_state,
            apply=forward,
            objective=settings.objective,
            preconditioner=settings.preconditioner,
            grad=gradient,
            max_grad_norm=captured.max_grad_norm,
            temperature=training.temperature,
            matrix=settings.matrix,
            chunk_size=settings.chunk_size,
            memory_budget=settings.memory_budget,
            labels=self._local_labels(regions) if settings.region_stderr and not settings.matrix else None,
            mesh=self._mesh,
        )
        self._log_conditioning(step, float(result.conditioning))
        values = result.values_e
        assert values is not None
        result = result._replace(values_e=None)
        if batch_e.behaviour_logprobs is None:
            self._check_sampled_from_policy(drawn, values, batch_e, params)
            # Not stored: they are in the trainer's precision, which is not the one that a repetition scores in.
            rollouts = [dataclasses.replace(r, behaviour_logprobs=None) for r in rollouts]
        objective = settings.objective
        entropy = entropy_estimate(values, batch_e, objective.normalize, objective.estimator).item()
        step_of = functools.partial(AdamWStep.of, gradient, opt_state, params)
        if store_state is not None:
            store_state(step_of(settings.preconditioner, captured.max_grad_norm).baseline())
        adamw_step = step_of("frozen", captured.max_grad_norm)
        parts = parts_of_rows(batch_e, values, objective, settings.matrix)
        shifts = None
        if evaluation.is_update:
            options = forward, training.temperature, settings.chunk_size, settings.memory_budget, self._mesh
            shifts = shifts_without_own_fold(adamw_step, params, captured.batch, parts, *options)
        unrounded = None
        if opt_state.master_weights is not None:
            unrounded = self._exact_values(shift_(adamw_step.direction(), params, opt_state.lr), batch_e)
        factor = lifetime_factor(with_step_counted(opt_state, captured.gradient))
        before = step, opt_state.lr, captured, rollouts, result, entropy, None, time.perf_counter() - start
        measured = MeasuredStep(*before, regions=regions, lifetime_factor=factor)
        sampled = adamw_step.sample(sampling_stride(params))
        return PendingStep(measured, batch_e, values, sampled, adamw_step.partition, parts, shifts, unrounded)

    def after_update(self, pending: PendingStep) -> MeasuredStep:
        """Measure how much the update changed the entropy, on the same E."""
        start, params = time.perf_counter(), self.trainable()
        unrounded = None if pending.unrounded is None else self._with_change(pending, pending.unrounded).change()
        measured = self._with_change(pending, self._exact_values(params, pending.batch_e))
        optimizer = self.training.optimizer
        shards = {**local_shards(params, pending.partition)}
        roundings = roundings_of_step(pending.sampled, measured.lr, shards, optimizer, self.training.model)
        seconds = measured.seconds + time.perf_counter() - start
        warning = roundings.warning(measured.step, params, rounds_at_random(optimizer))
        if warning is not None and not self._rounding_warned:
            self._rounding_warned = True
            self._warn(warning)
        return measured._replace(**roundings._asdict(), unrounded_change=unrounded, seconds=seconds)

    def _with_change(self, pending: PendingStep, after: TokenValues) -> MeasuredStep:
        """Return the measured step with its change of entropy, from token values of E after it."""
        measured, scored = pending.measured, (pending.values, after, pending.shifts, pending.parts)
        options = measured.influence, self.settings.objective, measured.lr
        return measured._replace(**measure_change(pending.batch_e, *scored, *options)._asdict())

    def complete(self, captured: CapturedStep) -> CapturedStep:
        """Return a step that is about to be made with entropies and, where they count, older log-probabilities."""
        return self._with_behaviour(self._with_entropies(captured, self.trainable()))

    def forward_policy(self) -> Policy:
        """Return the policy in the precision of the training run's forward."""
        return self.training.in_forward_precision(self._functional_policy())

    def _with_behaviour(self, captured: CapturedStep) -> CapturedStep:
        """Return the step with U's log-probabilities under an older policy, where U is E and may be of one."""
        return captured

    def _evaluation(self, step: int, captured: CapturedStep) -> Evaluation:
        """Return E: the rollouts of U, each without its own prompt."""
        batch_e = captured.batch._replace(coefficients=None, entropy_coefficients=None)
        return Evaluation(batch_e, [], True, captured.drawn_logprobs())

    def _local_labels(self, labels: Labels) -> Labels:
        """Return the labels of this process's rows."""
        return dataclasses.replace(labels, index=labels.index[local_slice(len(labels.index), self._mesh)])

    def _functional_policy(self) -> Policy:
        """Return the policy, made at the first step, when the trainer has prepared its model."""
        if self._policy is None:
            self._policy = make_functional(self.training.model, position_ids=self.training.position_ids)[0]
        return self._policy

    def trainable(self) -> Params:
        """Return the training run's own parameters, by name, as they are now."""
        return {name: p.detach() for name, p in sharded_parameters(self.training.model).items() if p.requires_grad}

    def _exact_values(self, params: Params, batch_e: Batch) -> TokenValues:
        """Score E, the rows of all processes, in float32 at least."""
        raised, exact_policy = in_float32(params, self._functional_policy(), batch_e)
        engine = make_engine(raised, exact_policy, self.training.temperature, self.settings.chunk_size, self._mesh)
        return engine.values(raised, batch_e)

    def _token_values(self, params: Params, batch: Batch, temperature_factor: float = 1.0) -> TokenValues:
        """Score a batch in the weights' own precision, on this process alone."""
        temperature = temperature_factor * self.training.temperature
        engine = make_engine(params, self._functional_policy(), temperature, self.settings.chunk_size, None)
        return engine.values(params, batch)

    def _log_conditioning(self, step: int, conditioning: float) -> None:
        """Log once per training run that single influences are ill-conditioned, as is the rule in its first steps."""
        if conditioning > ILL_CONDITIONED and count_and_rank(self._mesh)[1] == 0:
            if not self._conditioning_logged:
                logger.warning(
                    f"step {step}: {conditioning:.0%} of the sum of |influence| rests on denominators that AdamW has "
                    f"from this very gradient, so single influences are large and cancel. {CONDITIONING_REMEDY}"
                )
            self._conditioning_logged = True

    def _with_entropies(self, captured: CapturedStep, params: Params) -> CapturedStep:
        """Return the step with entropies where the trainer computes none.

        Raises ``CaptureError`` where the trainer's log-probabilities are not the policy's.
        """
        count = len(captured.batch.input_ids)
        # A few rows are enough for the check; all are scored where their entropies are wanted.
        stride = 1 if captured.entropies is None else max(1, count // RESCORED_ROWS)
        batch = select_rows(captured.batch, slice(0, count, stride))
        mask = batch.completion_mask
        if not mask.any():
            zeros = torch.zeros_like(captured.logprobs)
            return captured if captured.entropies is not None else captured._replace(entropies=zeros)
        values = self._token_values(params, batch)
        bound, remedy = self.training.rounding_bound(), self.training.forward_remedy
        check_scored(captured.logprobs[::stride][mask], values.logprobs[mask], bound, remedy)
        if captured.entropies is not None:
            return captured
        return captured._replace(entropies=values.entropies.masked_fill(~mask, 0.0).to(captured.logprobs.dtype))

    def _check_sampled_from_policy(
        self, drawn: Tensor | None, values: TokenValues, batch_e: Batch, params: Params
    ) -> None:
        """Raise ``GenerationError`` where E's tokens were not sampled from the policy.

        The log-probs that they were sampled with are compared with the policy's. If they are not known, likelihoods at
        other temperatures are compared instead, once per training run.

        Args:
            drawn: (m,), the log-probs of E's completion tokens as they were drawn, or None.
            values: of E's tokens, in float32 at least.
            batch_e: E, (n_e, T).
            params: by name.
        """
        if drawn is not None:
            scored = values.logprobs[batch_e.completion_mask].double().cpu()
            finite = drawn.isfinite()
            check_sampled_logprobs(drawn[finite], scored[finite], self.training.rounding_bound())
        elif not self._temperature_checked:

            def logprobs_at(factor: float) -> Tensor:
                return self._token_values(params, batch_e, factor).logprobs

            check_temperature(logprobs_at, batch_e)
            self._temperature_checked = True
