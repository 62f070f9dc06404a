"""The influence of every rollout and token of one optimizer step on the policy's entropy."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fx_influence.attribution.attribute import Inputs, attribute
from fx_influence.attribution.cross_fitting import evaluation_rows, split_into_groups
from fx_influence.attribution.error_bars.label_parts import token_labels
from fx_influence.attribution.objective_gradients import normalises_by_rank
from fx_influence.attribution.result import Influence
from fx_influence.autodiff.ghost import default_budget
from fx_influence.batching.prompts import warn_of_shared_prompts
from fx_influence.core.batch_checks import check_is_batch, check_update_and_evaluation
from fx_influence.core.checks import check_dtypes, check_number, check_options
from fx_influence.core.parameter_checks import check_policy, check_state
from fx_influence.core.tree import detached
from fx_influence.distributed.engine import make_engine
from fx_influence.estimators.consistency import tolerance_of
from fx_influence.labels import Labels
from fx_influence.objectives import Entropy, Objective, check_evaluation, check_objective
from fx_influence.optim.adamw import check_adamw_inputs, check_clip
from fx_influence.policy.policy import with_all_derivatives
from fx_influence.policy.precision import pass_precision
from fx_influence.types import AdamWState, Apply, Batch, Clip, Gradients, Params, Preconditioner

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def influence(
    params: Params,
    batch_u: Batch,
    batch_e: Batch | None,
    opt_state: AdamWState,
    *,
    apply: Apply,
    cross_fit: bool = False,
    objective: Entropy | Objective = Entropy(),
    preconditioner: Preconditioner = "frozen",
    temperature: float = 1.0,
    max_grad_norm: float | None = None,
    clip: Clip = "frozen",
    grad: Gradients | None = None,
    matrix: bool = False,
    stderr: bool = True,
    per_token: bool = True,
    labels: Tensor | Labels | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    compute_dtype: torch.dtype | None = None,
    direction_dtype: torch.dtype | None = None,
    offload: torch.device | str | None = None,
    tolerance: float | None = None,
    mesh: DeviceMesh | None = None,
) -> Influence:
    """Return how much each rollout and token of U changes the policy's entropy in one AdamW step, to first order in lr.

    With g_i the gradient of rollout i's loss and v = v_baseline + sum_i gamma * g_i the step's direction,

        delta_i = <grad H, gamma * g_i> = -sum_t (c_it <u, grad log pi(y_it)> + b_it <u, grad h_it>), u = gamma * grad H

    by the adjoint method: a reverse pass over E for grad H, one over U for gamma, and a JVP of U's log-probabilities in
    direction u; no per-sequence gradient is stored. E must be sampled from the policy at ``params``: a batch without
    ``behaviour_logprobs`` says so. Rollouts of another policy carry their log-probabilities under it. They then have
    weights pi_theta / pi_behaviour, self-normalised, of each token's prefix ("per_decision") or of the rollout
    ("sequence"), in H, its gradient, what is left out, and the error bars.

    Without an E the rollouts of U are their own (cross-fitting): each influence is taken over the other prompts,

        delta_i = sum_{a not in fold k(i)} <grad s_a - x_a grad log E[T], gamma * g_i> / (1 - f_k(i))

    with k(i) one of at most eight folds of prompts, or with ``matrix`` i's prompt alone; f_k its share of the
    objective's denominator; and x_a the excess of row a's entropy over H per token, which puts the H of the other folds
    in place of H. The means by rank that reduce the variance are over all folds, and bias nothing.

    Args:
        params: trainable parameters by name, from ``make_functional``. In bfloat16 or float16 they are raised to
            float32, with the frozen weights of a ``Policy``: the result is that of the function that these weights
            define, to float32's rounding, and obeys float32's tolerance.
        batch_u: update batch, n_u rows, with coefficients (see ``coefficients``). Where no row has a completion token
            every influence is 0 and the baseline remains.
        batch_e: evaluation batch, n_e rows of fresh rollouts. None takes those of U, which must then be sampled from
            the policy at ``params``, or carry ``behaviour_logprobs``, and have four prompts at least (``group``, or
            without it equal prompt tokens).
        opt_state: AdamW's state before the step.
        apply: the policy, from ``make_functional``.
        cross_fit: leave the prompt of each row of U out of ``batch_e``, where its rollouts have the same ``group``: for
            an E that holds U, such as the generation batch of several optimizer steps. With ``batch_e=None`` it is so
            anyway.
        objective: ``Entropy(estimator, normalize, baseline)``, or surrogates of another functional of the policy, such
            as ``expected_reward(rewards)``; see ``objectives``.
        preconditioner: what a rollout's gradient is multiplied with; see ``adamw_decompose``.
        temperature: divides the logits before log-probabilities and entropies.
        max_grad_norm: the trainer's gradient clipping; see ``adamw_decompose``.
        clip: ``"differentiated"`` follows the clipping factor as the weights of rollouts change, as in leaving one out.
            Where the step clips, the influences then add up to 0 and ``baseline`` is all of ``total``.
        grad: U's gradient by name, before clipping, where the trainer has it; saves the reverse pass over U.
        matrix: also return M_ai = <grad s_a, gamma * g_i>, from per-sequence gradients in blocks.
        stderr: also return standard errors over E's clusters, which are ``batch_e.group`` or without it the rows, with
            a ``UserWarning`` where these share prompts. They are exact with ``matrix``, else from min(8, C) random
            groups of E's clusters or from the folds: the reverse pass over U leaves layer inputs and output gradients,
            from which all groups together cost about one more forward. Those that do not fit ``memory_budget`` are
            recomputed, for the JVP of tokens as well. The groups' directions are rounded to bfloat16 where they do not
            fit it, which moves the error bars by less than their noise; where not even two fit, each costs a JVP. Per
            token E goes backward once more, for the gradient of its length. With "per_decision" weights of another
            policy's rollouts each group costs a reverse pass over all of E, with ``matrix`` too.
        per_token: also return influences of tokens. Without them those of rollouts come from ghost products, where all
            parameters have layer inputs and output gradients, without the JVP.
        labels: of tokens, (n_u, T), see ``Influence.sums``, whose sums get standard errors: by a reverse pass over U
            for each label that a row has beside the last, without weights' gradients; or with more of these than groups
            of E by a JVP a group. Sums over labels of rollouts have them anyway.
        chunk_size: rows per forward; None chooses by tokens.
        memory_budget: bytes for E's forward, then for the directions of the error bars and, beside them, for U's
            reverse pass, then for the gradients of the matrix, beside the pass that runs; None takes 16 a trainable
            parameter, 768 MiB to 4 GiB in all. Below the size of one gradient error bars hold no sum of gradients, for
            a pass over E and a JVP more; 0 caches nothing.
        compute_dtype: bfloat16 for the matrix products of all passes, as under ``torch.autocast``; the
            parameters, gradients, directions, softmaxes and sums stay as they are. None computes in the parameters'
            precision, and U's losses in that of the policy's own autocast.
        direction_dtype: of grad H and of u, both as large as the parameters; bfloat16 halves them and rounds each
            entry to 3 digits. None takes at least float32.
        offload: device to hold u on, ``"cpu"`` for host memory, from where the JVP brings it a parameter at a time.
            None leaves it where the parameters are.
        tolerance: relative residual above which the result is refused; None takes 1e-4 for float32 models, 1e-9 for
            float64, 3e-2 where ``apply`` itself computes in half precision.
        mesh: a ``torch.distributed`` device mesh whose ranks all make this call, each with rows of its own in
            ``batch_u`` and ``batch_e`` (none at all is allowed) and everything else the same. Every rank then has the
            result of one process with all rows, rank 0's first; ``objective`` is given all rows of E too.

    Returns:
        ``Influence``. Pure: nothing given is changed and nothing is remembered.

    Raises:
        IdentityError: if the residual exceeds ``tolerance`` times max(sum |delta_i|, |<u, g>|), so that a derivative
            was lost on the way, or if ``rounding`` exceeds sum |delta_i|. Beyond a tenth of it there is a warning.
        TypeError: for an argument of another kind, with the remedy.
        ValueError: for inputs that disagree, for fewer than four prompts where U is part of E, and for an effective
            sample size below a quarter of E's rows.

    Example:
        >>> ids = torch.tensor([[1, 2, 3], [2, 3, 0]])
        >>> mask = torch.tensor([[False, True, True], [False, True, False]])
        >>> batch = Batch(ids, ids > 0, mask, coefficients=0.5 * mask)
        >>> apply = lambda p, ids, mask: p["table"][ids]
        >>> params = {"table": torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(4, 4)}
        >>> zero = {"table": torch.zeros(4, 4, dtype=torch.float64)}
        >>> from fx_influence.types import AdamWHyper
        >>> state = AdamWState(zero, zero, {}, {"table": 0}, {"table": AdamWHyper()}, lr=1e-3)
        >>> out = influence(params, batch, batch, state, apply=apply)
        >>> bool(torch.isclose(out.total, out.per_sequence.sum())), abs(out.residual.item()) < 1e-12
        (True, True)

    Source: influence functions through a step, Koh & Liang 2017, TracIn 2020; cross-fitting, Chernozhukov et al. 2018.
    """
    _check_types(params, apply, batch_u, batch_e, opt_state, objective)
    check_options(temperature, chunk_size, memory_budget)
    check_dtypes(compute_dtype, direction_dtype)
    if tolerance is not None:
        check_number("tolerance", tolerance, "pass a relative residual, or None for the dtype's", lambda x: x >= 0)
    params, engine = detached(params), make_engine(params, apply, temperature, chunk_size, mesh)
    engine.check_consistent(
        params=params,
        cross_fit=(cross_fit, batch_e is None),
        opt_state=opt_state,
        grad=grad,
        objective=objective,
        preconditioner=preconditioner,
        max_grad_norm=max_grad_norm,
        clip=clip,
        matrix=matrix,
        stderr=stderr,
        per_token=per_token,
        labelled=labels is not None,
        memory_budget=memory_budget,
        compute_dtype=compute_dtype,
        direction_dtype=direction_dtype,
        offload=offload,
        tolerance=tolerance,
    )
    of_tokens = token_labels(batch_u, labels, engine, stderr=stderr, per_token=per_token, matrix=matrix)
    batch_u = engine.full_batch("batch_u", batch_u)
    batch_e = None if batch_e is None else engine.full_batch("batch_e", batch_e)
    if matrix:
        engine.check_gram("matrix=True")
    check_update_and_evaluation(params, batch_u, batch_e, apply)
    check_adamw_inputs({} if grad is None else grad, opt_state, params, preconditioner, max_grad_norm)
    check_clip(clip, preconditioner, matrix)
    rows = evaluation_rows(batch_u, batch_e, cross_fit)
    check_evaluation(objective, rows.batch)
    if stderr and batch_e is not None:
        warn_of_shared_prompts("batch_e", batch_e)
    precision = pass_precision(params, apply, batch_u, compute_dtype)
    return attribute(
        Inputs(
            params=precision.params,
            batch_u=batch_u,
            batch_e=rows.batch,
            groups=split_into_groups(rows, stderr, matrix, normalises_by_rank(objective, rows.batch)),
            opt_state=opt_state,
            objective=objective,
            preconditioner=preconditioner,
            max_grad_norm=max_grad_norm,
            clip=clip,
            grad=grad,
            matrix=matrix,
            stderr=stderr,
            per_token=per_token,
            labels=of_tokens,
            memory_budget=default_budget(params) if memory_budget is None else memory_budget,
            direction_dtype=direction_dtype,
            offload=offload,
            bound=tolerance_of(precision.lowest) if tolerance is None else tolerance,
            precision=precision,
            # U's losses are differentiated as the trainer does, in its precision; E's objective with all derivatives.
            engine_u=replace(engine, apply=precision.update_apply),
            engine_e=replace(engine, apply=with_all_derivatives(precision.exact_apply)),
        )
    )


def _check_types(
    params: Params, apply: Apply, batch_u: Batch, batch_e: Batch | None, opt_state: AdamWState, objective: object
) -> None:
    check_policy(params, apply)
    check_state(opt_state)
    check_is_batch("batch_u", batch_u)
    if batch_e is not None:
        check_is_batch("batch_e", batch_e)
    check_objective(objective, may_estimate_share=True)
