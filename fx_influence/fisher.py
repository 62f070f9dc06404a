"""The Fisher kernel: the change of one sequence's log-probability in a step that raises another's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fx_influence.autodiff.ghost import MEMORY_BUDGET
from fx_influence.core.batch_checks import check_batch, check_coefficients, check_is_batch
from fx_influence.core.checks import check_options
from fx_influence.core.parameter_checks import check_names, check_policy
from fx_influence.core.tree import detached, promote
from fx_influence.distributed.engine import make_engine
from fx_influence.optim.adamw import adamw_decompose, check_adamw_inputs, second_moment_denominator
from fx_influence.policy.precision import in_float32
from fx_influence.types import AdamWState, Apply, Batch, Gradients, Params

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

FisherPreconditioner = Literal["adam", "identity"]


def fisher_kernel(
    params: Params,
    batch_a: Batch,
    batch_b: Batch,
    opt_state: AdamWState | None,
    *,
    apply: Apply,
    preconditioner: FisherPreconditioner | Params = "adam",
    temperature: float = 1.0,
    max_grad_norm: float | None = None,
    chunk_size: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
    mesh: DeviceMesh | None = None,
) -> Tensor:
    """Return K_ai = <grad S_a, P grad S_i>, with S the unnormalised log-probability of a completion.

    Args:
        params: theta by name.
        batch_a: n_a rows.
        batch_b: n_b rows.
        opt_state: AdamW's state before the step, read by ``"adam"`` alone.
        apply: the policy, from ``make_functional``.
        preconditioner: the diagonal P. ``"identity"``: 1. ``"adam"``: 1/den, with den of the step on ``batch_b``
            where it has coefficients, else den = sqrt(s / (1 - beta2^step)) + eps of ``opt_state``, and 0 for
            parameters that the optimizer does not hold. A dictionary: diagonals by name, names absent counting as 0.
        temperature: divides the logits.
        max_grad_norm: the trainer's gradient clipping, for den.
        chunk_size: rows per pass; None chooses by tokens.
        memory_budget: bytes that blocks of gradients may take.
        mesh: ranks with rows of their own, as in ``influence``.

    Returns:
        (n_a, n_b), float64 for float64 parameters, else float32; nats^2 per unit of parameter^2 times P.

    Raises:
        TypeError: for arguments of another kind.
        ValueError: for inputs that disagree, and for ``"adam"`` without coefficients before the first step.

    Source: the natural-gradient kernel, Amari 1998; empirical Fisher with Adam's diagonal.

    Example:
        >>> ids = torch.tensor([[1, 2], [1, 3]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True], [False, True]]))
        >>> apply = lambda p, ids, mask: p["b"].expand(*ids.shape, 4)
        >>> fisher_kernel({"b": torch.zeros(4)}, batch, batch, None, apply=apply, preconditioner="identity").tolist()
        [[0.75, -0.25], [-0.25, 0.75]]
    """
    check_policy(params, apply)
    check_options(temperature, chunk_size, memory_budget)
    check_is_batch("batch_a", batch_a)
    check_is_batch("batch_b", batch_b)
    params, engine = detached(params), make_engine(params, apply, temperature, chunk_size, mesh)
    batch_a, batch_b = engine.full_batch("batch_a", batch_a), engine.full_batch("batch_b", batch_b)
    engine.check_consistent(
        params=params,
        opt_state=opt_state,
        preconditioner=preconditioner,
        max_grad_norm=max_grad_norm,
        memory_budget=memory_budget,
    )
    engine.check_gram("fisher_kernel")
    check_batch("batch_a", batch_a, params, apply, may_be_empty=True)
    check_batch("batch_b", batch_b, params, apply, may_be_empty=True)
    params, apply = in_float32(params, apply, batch_a)
    engine = replace(engine, apply=apply)
    if isinstance(preconditioner, dict):
        check_names("preconditioner", preconditioner, params, "pass one diagonal per trainable parameter")
        diagonal = preconditioner
    elif preconditioner == "identity":
        diagonal = {name: torch.ones_like(p, dtype=promote(p.dtype)) for name, p in params.items()}
    elif preconditioner == "adam":
        opt_state = _checked(params, opt_state, max_grad_norm)
        makes_a_step = batch_b.coefficients is not None or batch_b.entropy_coefficients is not None
        if makes_a_step:
            check_coefficients("batch_b", batch_b)
        gradient = engine.gradient(params, batch_b) if makes_a_step else None
        diagonal = adam_diagonal(params, gradient, opt_state, max_grad_norm)
    else:
        raise ValueError(
            f"preconditioner is {preconditioner!r}; expected 'adam', 'identity' or a dictionary of diagonals"
        )
    a, b = with_unit_coefficients(batch_a), with_unit_coefficients(batch_b)
    return engine.gram(params, a, b, diagonal, memory_budget, apply)


def with_unit_coefficients(batch: Batch) -> Batch:
    """Return the batch with coefficient 1 at every completion token, so that its rollout losses are -S."""
    return batch._replace(coefficients=batch.completion_mask.to(torch.float32), entropy_coefficients=None)


def _checked(params: Params, state: AdamWState | None, max_grad_norm: float | None) -> AdamWState:
    if state is None:
        raise ValueError(
            "opt_state is None; expected an AdamWState, which preconditioner='adam' needs. Pass "
            "fx.adamw_state(optimizer, model)"
        )
    check_adamw_inputs({}, state, params, "rmsprop", max_grad_norm)
    return state


def adam_diagonal(
    params: Params, gradient: Gradients | None, state: AdamWState | None, max_grad_norm: float | None
) -> Params:
    """Return 1/den by name, for a step with ``gradient`` or, without one, from the state's second moment.

    Args:
        params: theta by name.
        gradient: the batch's gradient by name, or None.
        state: AdamW's state before the step.
        max_grad_norm: the trainer's gradient clipping.

    Raises:
        ValueError: without a gradient before the first step.
    """
    state = _checked(params, state, max_grad_norm)
    if gradient is not None:
        # rmsprop's gain is -rho/den, or +rho/den under maximize; the kernel wants 1/den.
        plain = {name: replace(hyper, lr_scale=1.0, maximize=False) for name, hyper in state.hyper.items()}
        gain = adamw_decompose(gradient, state._replace(hyper=plain), params, "rmsprop", max_grad_norm).gain
        return {name: -x for name, x in gain.items()}
    diagonal = {}
    for name, hyper in state.hyper.items():
        if state.step[name] == 0:
            raise ValueError(
                f"opt_state.step[{name!r}] is 0; expected at least one update, whose second moment divides. Give "
                "batch_b coefficients, or use preconditioner='identity'"
            )
        maximum = state.max_exp_avg_sq.get(name) if hyper.amsgrad else None
        diagonal[name] = 1 / second_moment_denominator(hyper, state.exp_avg_sq[name], state.step[name], maximum)[0]
    return diagonal
