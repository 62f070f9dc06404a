"""Token values of a step's rollouts, each at the step that the optimizer would have made without the rollout's prompt.

After a step the policy is fitted to exactly the rollouts that it was made from. An estimate of the entropy on them is
then biased, whatever weights they have: to first order by what ``Influence.self_influence`` has, and at a finite step
by more. A rollout that the step was not made from has no such bias, so fold k of U is evaluated at

    theta_k = theta + eta v(g_k),    g_k = g + sum_j f_j / (1 - f_j) G_j - G_k / (1 - f_k)

with G_j the gradient of fold j's rollouts, f_j the fold's share of the objective's denominator, and v the optimizer's
step with the second moment that g_k makes; the clipping factor stays that of g. Where the second moment is that of many
steps, the mean of v(g_k) over the rows is v(g), and the change is to first order the cross-fitted prediction.

Source: cross-fitting, Chernozhukov et al. 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fx_influence.autodiff.engine import Engine
from fx_influence.autodiff.ghost import DirectionPlan, default_budget, plan_directions
from fx_influence.batching.rows import has_loss, rows_by_group, select_rows
from fx_influence.core.tree import shift_
from fx_influence.distributed.engine import make_engine
from fx_influence.estimators.deviations import share_left
from fx_influence.estimators.entropy import behaviour_weights
from fx_influence.estimators.stderr import MAX_RANDOM_GROUPS, cluster_index
from fx_influence.objectives import Entropy, denominator_shares
from fx_influence.optim.step import AdamWStep
from fx_influence.policy.policy import Policy
from fx_influence.policy.precision import pass_precision
from fx_influence.types import Batch, Gradients, Params, TokenValues


class PartsOfRows(NamedTuple):
    """Parts of E, drawn independently: ``part`` int64 (n,), that of each row, and ``shares`` (C,) of the denominator.

    They are those of the error bars of ``influence``, and where E is U the folds that it leaves out.
    """

    part: Tensor
    shares: Tensor


def parts_of_rows(batch_e: Batch, values: TokenValues, objective: Entropy, matrix: bool) -> PartsOfRows:
    """Return the parts of E.

    Args:
        batch_e: E, (n, T).
        values: (n, T), of its tokens before the step.
        objective: how the entropy is estimated.
        matrix: whether ``influence`` has a matrix, which makes each cluster a part.
    """
    cluster = cluster_index(batch_e)
    index = cluster if matrix else cluster % MAX_RANDOM_GROUPS
    weights = behaviour_weights(values, batch_e, objective.estimator)
    shares = denominator_shares(objective, batch_e.completion_mask, weights)
    return PartsOfRows(index, shares.new_zeros(int(index.max()) + 1).index_add(0, index, shares))


class _Passes(NamedTuple):
    """A policy at theta, and the engine of the passes over it."""

    params: Params
    engine: Engine


def shifts_without_own_fold(
    step: AdamWStep,
    params: Params,
    batch_u: Batch,
    folds: PartsOfRows,
    apply: Policy,
    temperature: float,
    chunk_size: int | None,
    memory_budget: int | None,
    mesh: DeviceMesh | None,
) -> TokenValues:
    """Return by how much leaving a row's fold out of the step changes the row's token values after it, (n, T).

    It takes two forwards over U, and a reverse pass over its rows that have a loss; where none has, it takes nothing.
    Where the folds' gradients do not fit the memory budget it takes another reverse pass, and memory for two vectors of
    the parameters' size.

    Args:
        step: the optimizer's step, before it is made.
        params: theta by name, as the forward has it.
        batch_u: U, (n, T), with coefficients.
        folds: of its rows.
        apply: the policy in the precision of the trainer's forward.
        temperature: of the policy.
        chunk_size: rows per forward, None chooses.
        memory_budget: bytes of gradients, and of layer IO to make them from; None for the default.
        mesh: of the training run's processes, None for a single process.
    """
    precision = pass_precision(params, apply, batch_u)
    update, exact = (
        _Passes(precision.params, make_engine(precision.params, x, temperature, chunk_size, mesh))
        for x in (precision.update_apply, precision.exact_apply)
    )
    lr = step.opt_state.lr
    cancels = torch.finfo(precision.lowest).eps ** 0.5
    scored = batch_u._replace(coefficients=None, entropy_coefficients=None)
    with_loss = has_loss(batch_u)
    if not with_loss.any():
        zeros = torch.zeros_like(batch_u.input_ids, dtype=next(iter(exact.params.values())).dtype)
        return TokenValues(zeros, zeros)
    planned = exact.engine.values(shift_(step.direction(), exact.params, lr), scored)
    changes = TokenValues(*(torch.zeros_like(x) for x in planned))
    count, rows = len(folds.shares), rows_by_group(folds.part, len(folds.shares))
    differentiated = rows_by_group(torch.where(with_loss, folds.part, -1), count)
    budget = default_budget(update.params) if memory_budget is None else memory_budget
    fit = plan_directions(update.params, count, budget) == DirectionPlan(count, None)
    mean: Gradients | None = None
    if not fit:
        weighted = select_rows(_scaled(batch_u, _odds(folds)), with_loss.nonzero().squeeze(-1))
        mean = _add(step.grads, step.shards(update.engine.gradient(update.params, weighted)))
    for numbers in [list(range(count))] if fit else [[k] for k in range(count)]:
        gradients = update.engine.gradients_by_group(
            update.params, batch_u, [differentiated[k] for k in numbers], budget
        )
        shares = folds.shares[numbers]
        for k, moved in zip(numbers, _moved(step, exact.params, gradients, mean, shares, cancels), strict=True):
            # Gathered, and freed, one after the other as they are used.
            values = exact.engine.values(step.gather_(moved), select_rows(scored, rows[k]))
            moved.clear()
            for change, after, before in zip(changes, values, planned, strict=True):
                change[rows[k]] = after - before[rows[k]]
    return changes


def _moved(
    step: AdamWStep,
    params: Params,
    gradients: Sequence[Gradients],
    mean: Gradients | None,
    shares: Tensor,
    cancels: float,
) -> list[Params]:
    """Return the shards of theta_k of some folds k, from their gradients G_k, which are freed a parameter at a time.

    Args:
        step: the optimizer's step.
        params: theta by name.
        gradients: G_k of these folds.
        mean: shards of g + sum_j f_j / (1 - f_j) G_j; None makes them from ``gradients``, which are then those of all
            folds.
        shares: f_k of these folds.
        cancels: share of G_k / (1 - f_k) below which what is left of an entry of g_k is the rounding of both terms and
            becomes 0, since a fresh optimizer would make a step of the full size from it.
    """
    # The clipping factor stays that of g.
    step = step if mean is None else replace(step, grads=mean)
    moved: list[Params] = [{} for _ in gradients]

    def without_fold(by_fold: Tensor, g: Tensor) -> Tensor:
        weight = shares.to(by_fold.device, by_fold.dtype).reshape(-1, *[1] * g.dim())
        base = g + (weight / (1 - weight) * by_fold).sum(0) if mean is None else g
        scaled = by_fold / (1 - weight)
        g_k = base - scaled
        return g_k * (g_k.abs() > cancels * scaled.abs())

    for name, p in step.shards(params).items():
        by_fold = [step.shards({name: gradient.pop(name)})[name] for gradient in gradients]
        # A part of a gathered gradient is copied, so that the rest of that is freed.
        buffers = [_buffer(x, p, step.partition is not None) for x in by_fold]
        step.move_(name, buffers, p, without_fold)
        for of_fold, buffer in zip(moved, buffers, strict=True):
            of_fold[name] = buffer
    return moved


def _buffer(x: Tensor | None, p: Tensor, copy: bool) -> Tensor:
    """Return a gradient like a parameter, of its dtype, in memory that may be overwritten; zeros for None."""
    if x is None:
        return torch.zeros_like(p)
    return x.to(p.dtype, copy=copy)


def _odds(folds: PartsOfRows) -> Tensor:
    """Return f / (1 - f) of each row's fold, float64 (n,)."""
    left = share_left(folds.shares, folds.part)
    return (1 - left) / left


def _scaled(batch: Batch, factor: Tensor) -> Batch:
    """Return a batch with each row's loss multiplied by a factor (n,)."""
    c, b = (
        None if w is None else w * factor.to(w).unsqueeze(1) for w in (batch.coefficients, batch.entropy_coefficients)
    )
    return batch._replace(coefficients=c, entropy_coefficients=b)


def _add(gradient: Gradients, more: Gradients) -> Gradients:
    """Return the sum in the memory of ``more``; None in ``gradient`` stays None, in ``more`` it is 0."""
    out: Gradients = {}
    for name, g in gradient.items():
        m = more.get(name)
        out[name] = g if g is None or m is None else m.add_(g)
    return out
