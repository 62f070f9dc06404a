"""The order of an attribution: E differentiated by group, U linearised, the step between them, sums and checks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fx_influence.attribution.cross_fitting import EvaluationGroups
from fx_influence.attribution.error_bars.label_parts import label_parts
from fx_influence.attribution.error_bars.parts_of_e import (
    PartsOfE,
    leave_own_rows_out,
    parts_of_clusters,
    self_influence,
    with_token_deviations,
)
from fx_influence.attribution.group_derivatives import differentiate_by_group, folds_of_tokens
from fx_influence.attribution.linearized_losses import linearize_update
from fx_influence.attribution.objective_gradients import evaluate_objective
from fx_influence.attribution.result import Influence
from fx_influence.attribution.row_influences import check_sums, conditioning, sum_groups
from fx_influence.autodiff.engine import Engine
from fx_influence.estimators.consistency import check_identity, check_rounding
from fx_influence.labels import Labels
from fx_influence.objectives import Entropy, Objective, score_share, with_known_share
from fx_influence.optim.step import AdamWStep
from fx_influence.policy.precision import PassPrecision
from fx_influence.types import AdamWState, Batch, Clip, Gradients, Params, Preconditioner


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The checked arguments of ``influence``; ``groups`` of E's rows, ``bound`` of the identity's relative residual."""

    params: Params
    batch_u: Batch
    batch_e: Batch
    groups: EvaluationGroups
    opt_state: AdamWState
    objective: Entropy | Objective
    preconditioner: Preconditioner
    max_grad_norm: float | None
    clip: Clip
    grad: Gradients | None
    matrix: bool
    stderr: bool
    per_token: bool
    labels: Labels | None
    memory_budget: int
    direction_dtype: torch.dtype | None
    offload: torch.device | str | None
    bound: float
    precision: PassPrecision
    engine_u: Engine
    engine_e: Engine


def attribute(x: Inputs) -> Influence:
    """Return the influences: E's gradients by group, U linearised, the step between them, sums, checks and errors."""
    pilot = replace(x, per_token=False, labels=None)
    x = replace(x, objective=with_known_share(x.objective, lambda o: attribute(replace(pilot, objective=o))))
    several = x.groups.num_groups > 1
    evaluation = evaluate_objective(
        x.params,
        x.batch_e,
        x.objective,
        x.groups,
        x.stderr or x.groups.leave_out,
        x.engine_e,
        x.memory_budget,
        x.direction_dtype,
    )
    num_directions = x.groups.num_groups if several or x.precision.wants_two_methods else 3 * x.matrix
    labelled = label_parts(x.labels, x.batch_u.completion_mask, x.groups.num_groups)
    only_tokens = x.per_token and not labelled.by_token and not x.matrix
    folds = folds_of_tokens(x.params, x.groups, only_tokens, x.direction_dtype, x.memory_budget)
    update = linearize_update(
        x.params,
        x.batch_u,
        x.grad,
        x.engine_u,
        num_directions,
        x.per_token,
        x.memory_budget,
        folds,
        labelled.losses(x.batch_u),
    )
    step = AdamWStep.of(update.gradient, x.opt_state, x.params, x.preconditioner, x.max_grad_norm, x.clip)
    shares = evaluation.group_shares
    groups = differentiate_by_group(
        evaluation,
        update,
        step,
        x.groups,
        x.per_token,
        x.matrix,
        labelled.by_token,
        folds,
        x.direction_dtype,
        x.offload,
    )
    rows = sum_groups(update, groups, shares, x.groups.left_out, x.per_token, x.precision)
    identity = check_sums(x.params, update, x.grad, groups, rows, x.engine_u, x.precision.under_autocast, x.bound)
    conditioned = conditioning(update, step, groups, rows.over_all)
    slopes, on_step, by_group = groups.slopes, groups.on_step, groups.derivatives.sum(-1)
    update_products = groups.update_products
    parts = PartsOfE(by_group, groups.along_step, shares, x.groups.left_out) if x.stderr and several else None
    deviations = None if parts is None else parts.deviations()
    if deviations is not None and rows.per_token is not None:
        deviations = with_token_deviations(deviations, rows.per_token, groups, shares, x.labels, labelled)
    # The caches of U's passes may take as much memory as the matrix.
    del update, groups, labelled
    pairwise, rounding = None, rows.rounding
    if x.matrix:
        pairwise = -x.engine_e.gram(
            x.params, evaluation.batch, x.batch_u, step.gain(), x.memory_budget, x.precision.update_apply
        )
        columns = pairwise.double().sum(0)
        check_identity("the matrix", identity.expected - columns.sum(), columns, identity.expected, x.bound)
        rounding = torch.where(rounding.isnan(), (rows.over_all - columns).abs(), rounding)
        if x.stderr and not several:
            parts = parts_of_clusters(x.params, pairwise, slopes, evaluation, step, x.engine_e, x.groups)
            deviations = parts.deviations()
        pairwise = leave_own_rows_out(pairwise, slopes, evaluation, x.groups)
    check_rounding(rounding, rows.over_all, x.precision.lowest, x.bound)
    # Added up in float64 the terms are exactly additive; the sum of two float32 directions is rounded.
    is_split = x.preconditioner == "frozen" and x.clip == "frozen"
    baseline = on_step.momentum + on_step.weight_decay if is_split else on_step.baseline
    return Influence(
        per_sequence=rows.per_sequence,
        per_token=rows.per_token,
        stderr=torch.full_like(rows.per_sequence, torch.nan) if deviations is None else deviations.stderr(),
        baseline=baseline,
        momentum=on_step.momentum,
        weight_decay=on_step.weight_decay,
        total=baseline + rows.per_sequence.sum() + identity.unattributed,
        residual=identity.residual,
        unattributed=identity.unattributed,
        per_parameter=update_products,
        matrix=pairwise,
        total_stderr=torch.full_like(baseline, torch.nan) if parts is None else parts.total_stderr(),
        conditioning=conditioned,
        rounding=rounding,
        self_influence=self_influence(by_group, evaluation, x.groups),
        deviations=deviations,
        ess=evaluation.ess,
        score_share=torch.full_like(baseline, score_share(x.objective)),
        total_deviations=None if parts is None else parts.total_deviations(),
        values_e=evaluation.values,
    )
