"""AdamW as a stateless map from a batch's gradient to a direction, split into a term for each sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from fx_influence.core.checks import check_choice, check_max_grad_norm
from fx_influence.core.computed import layout_of, local_shards
from fx_influence.core.display import record_line
from fx_influence.core.dtensor import is_sharded
from fx_influence.core.parameter_checks import check_names, check_params, check_state, first_not_finite
from fx_influence.core.tree import detached, promote
from fx_influence.optim.clipping import clip_factor, stored_gradient
from fx_influence.types import AdamWHyper, AdamWState, Clip, Params, Preconditioner

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
"""Fields of ``AdamWState`` that hold a tensor of each parameter's shape."""


class AdamWDecomposition(NamedTuple):
    """One AdamW step per unit learning rate, split; every dictionary has all names of ``params``.

    Attributes:
        direction: v.
        baseline: v without the batch's gradients; v = baseline + sum_i gain * g_i.
        momentum: the term of v from the first moment before the step.
        weight_decay: the term of v from weight decay.
        gain: gamma, the diagonal that maps a sequence's gradient to its term of v.
        clip: kappa, scalar.
    """

    direction: Params
    baseline: Params
    momentum: Params
    weight_decay: Params
    gain: Params
    clip: Tensor

    def __repr__(self) -> str:
        return record_line(self)


def adamw_decompose(
    grads: Mapping[str, Tensor | None],
    opt_state: AdamWState,
    params: Params,
    preconditioner: Preconditioner = "frozen",
    max_grad_norm: float | None = None,
) -> AdamWDecomposition:
    """Return the direction v of one AdamW step, theta' = theta + lr v, split affinely over the batch's gradients.

    With g the batch's gradient, kappa = min(1, max_grad_norm / (|g| + 1e-6)) frozen, ghat = kappa g (-kappa g under
    ``maximize``), tau = step + 1, B_k = 1 - beta_k^tau and rho = lr_group / lr_ref:

        m' = beta1 m + (1 - beta1) ghat        s' = beta2 s + (1 - beta2) ghat^2
        den = sqrt(shat / B2) + eps            shat = max(max_exp_avg_sq, s') with amsgrad, else s'
        v = rho (-(m' / B1) / den - lambda theta)

    The ``preconditioner`` is the diagonal gamma that a sequence's gradient is multiplied with:

    - ``"frozen"``: gamma = -rho kappa (1 - beta1) / (B1 den); baseline = momentum + weight decay, exactly.
    - ``"jacobian"``: gamma = dv/dg with kappa frozen, den's dependence on g included; baseline = v - gamma g.
    - ``"rmsprop"``: gamma = -rho / den; v is replaced by gamma g, and baseline, momentum and decay by 0.
    - ``"lifetime"``: gamma = -rho kappa / den, the effect of a gradient now and, through momentum, in later steps if
      these are equal (sum_k beta1^k (1 - beta1) = 1); v is replaced by gamma g plus weight decay, momentum by 0.

    It is the step of ``torch.optim.AdamW``: v = (theta' - theta) / lr for the hyperparameters of its param_groups. The
    clip is ``torch.nn.utils.clip_grad_norm_`` over all of ``grads``.

    Args:
        grads: g by name, the parameter's shape. Parameters with None or without an entry (backward never reached them)
            and those that the optimizer does not hold have v = 0, decay included.
        opt_state: m, s and step before the step, as optax's ``state``.
        params: theta by name, or the roundings of ``opt_state.master_weights`` that the forward has.
        preconditioner: see above.
        max_grad_norm: the trainer's; None clips nothing.

    Returns:
        ``AdamWDecomposition``, float64 where the parameter or its state is, else float32, in units of parameter per
        unit lr_ref; a positive v raises the parameter.

    Raises:
        TypeError: for arguments of another kind, with the remedy.
        ValueError: for names or shapes that disagree, a gradient that is not finite, an unknown preconditioner.

    Example:
        >>> zero = torch.zeros(2)
        >>> state = AdamWState({"w": zero}, {"w": zero}, {}, {"w": 0}, {"w": AdamWHyper(weight_decay=0.1)}, lr=1e-3)
        >>> step = adamw_decompose({"w": torch.tensor([3.0, -2.0])}, state, {"w": torch.ones(2)})
        >>> step.direction["w"], step.weight_decay["w"]
        (tensor([-1.1000,  0.9000]), tensor([-0.1000, -0.1000]))

    Source: Loshchilov & Hutter, arXiv 1711.05101; amsgrad: Reddi et al., arXiv 1904.09237.
    """
    check_params(params)
    params = detached(params)
    check_adamw_inputs(grads, opt_state, params, preconditioner, max_grad_norm)
    clip = clip_factor(grads, max_grad_norm, params)
    by_field: dict[str, Params] = {field: {} for field in AdamWDecomposition._fields if field != "clip"}
    for name, p in params.items():
        g = grads.get(name)
        moves = g is not None and name in opt_state.hyper
        if moves and g is not None:
            theta = optimized_weight(name, opt_state, params)
            inputs = StepInputs.promoted(theta, moments_of(name, opt_state), g, clip)
            terms = step_terms(inputs, opt_state.hyper[name], opt_state.step[name] + 1, preconditioner)
        else:
            terms = _no_step(p)
        for field, value in terms.items():
            by_field[field][name] = value
    return AdamWDecomposition(**by_field, clip=clip)


def second_moment_denominator(
    hyper: AdamWHyper, second: Tensor, step: int, maximum: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (den, r, is_current): den = sqrt(shat / B2) + eps, r = sqrt(second / B2), and where ``second`` is shat.

    Args:
        hyper: of the parameter.
        second: s after ``step`` updates, the parameter's shape.
        step: number of updates, tau.
        maximum: amsgrad's max_exp_avg_sq, so that shat = max(maximum, second); None without amsgrad.
    """
    correction = 1 - hyper.beta2**step
    r = (second / correction).sqrt()
    if maximum is None:
        return r + hyper.eps, r, torch.ones((), dtype=torch.bool, device=r.device)
    is_current = second > maximum
    return (torch.maximum(maximum, second) / correction).sqrt() + hyper.eps, r, is_current


class StepInputs(NamedTuple):
    """The inputs of one parameter's step, or of a block of its entries: tensors of one shape and one dtype.

    Attributes:
        theta: the parameter.
        m: first moment before the step.
        s: second moment before the step.
        maximum: amsgrad's max_exp_avg_sq, or None.
        g: gradient, before clipping.
        clip: kappa, scalar.
    """

    theta: Tensor
    m: Tensor
    s: Tensor
    maximum: Tensor | None
    g: Tensor
    clip: Tensor

    @classmethod
    def promoted(
        cls, theta: Tensor, moments: Sequence[Tensor], g: Tensor, clip: Tensor, divisor: float = 1.0
    ) -> StepInputs:
        """Return the inputs in float64 where the parameter or its first moment is, else in float32.

        Args:
            theta: the parameter.
            moments: m and s, and with amsgrad max_exp_avg_sq; see ``moments_of``.
            g: gradient, before clipping once it is divided.
            clip: kappa, scalar.
            divisor: of the gradient.
        """
        dtype = promote(torch.promote_types(theta.dtype, moments[0].dtype))
        m, s, *maximum = (x.to(dtype) for x in moments)
        g = g.to(dtype) if divisor == 1.0 else g.to(dtype) / divisor
        return cls(theta.to(dtype), m, s, maximum[0] if maximum else None, g, clip.to(dtype))

    def second_moment(self, hyper: AdamWHyper) -> tuple[Tensor, Tensor]:
        """Return (ghat, s')."""
        ghat = ((-1.0 if hyper.maximize else 1.0) * self.clip) * self.g
        return ghat, torch.addcmul(hyper.beta2 * self.s, ghat, ghat, value=1 - hyper.beta2)

    def first_moment(self, ghat: Tensor, hyper: AdamWHyper) -> Tensor:
        """Return m'."""
        return hyper.beta1 * self.m + (1 - hyper.beta1) * ghat


def moments_of(name: str, state: AdamWState) -> list[Tensor]:
    """Return m and s of a parameter, and max_exp_avg_sq where its group has amsgrad."""
    moments = [state.exp_avg[name], state.exp_avg_sq[name]]
    return [*moments, state.max_exp_avg_sq[name]] if state.hyper[name].amsgrad else moments


def optimized_weight(name: str, state: AdamWState, params: Params) -> Tensor:
    """Return theta of a parameter as the optimizer moves it; only weight decay reads it.

    Args:
        name: of the parameter, which the optimizer holds.
        state: its ``master_weights`` are theta where the forward's weights are roundings.
        params: the forward's weights by name.

    Example:
        >>> from fx_influence.types import AdamWHyper
        >>> theta, zero = {"w": torch.tensor([1.001])}, {"w": torch.zeros(1)}
        >>> state = AdamWState(zero, zero, {}, {"w": 0}, {"w": AdamWHyper(weight_decay=0.1)}, 1e-3, theta)
        >>> round(optimized_weight("w", state, {"w": theta["w"].bfloat16()}).item(), 3)
        1.001
    """
    if state.master_weights is None or state.hyper[name].weight_decay == 0.0:
        return params[name]
    return state.master_weights[name]


def step_terms(inputs: StepInputs, hyper: AdamWHyper, tau: int, preconditioner: Preconditioner) -> dict[str, Tensor]:
    """Return direction, baseline, momentum, weight_decay and gain, elementwise, as ``adamw_decompose`` defines them.

    Args:
        inputs: tensors of one parameter, or of a block of its entries.
        hyper: hyperparameters of the parameter.
        tau: number of the step, from 1.
        preconditioner: see ``adamw_decompose``.
    """
    theta, m, _, maximum, g, clip = inputs
    # One stored entry for a plain tensor; a DTensor does not mix with plain tensors.
    zero = torch.zeros_like(theta) if is_sharded(theta) else theta.new_zeros(()).expand_as(theta)
    sign = -1.0 if hyper.maximize else 1.0
    ghat, s_new = inputs.second_moment(hyper)
    den, r, is_current = second_moment_denominator(hyper, s_new, tau, maximum)
    b1, rho = 1 - hyper.beta1**tau, hyper.lr_scale

    if preconditioner == "rmsprop":
        gamma = -sign * rho / den
        return {"direction": gamma * g, "baseline": zero, "momentum": zero, "weight_decay": zero, "gain": gamma}
    inverse = den.reciprocal()
    decay = -rho * hyper.weight_decay * theta
    if preconditioner == "lifetime":
        gamma = (-rho * sign * clip) * inverse
        direction = torch.addcmul(decay, gamma, g)
        return {"direction": direction, "baseline": decay, "momentum": zero, "weight_decay": decay, "gain": gamma}
    momentum = (-rho * hyper.beta1 / b1 * m) * inverse
    gamma = (-rho * sign * (1 - hyper.beta1) / b1 * clip) * inverse
    baseline = momentum + decay
    direction = torch.addcmul(baseline, gamma, g)
    if preconditioner == "jacobian":
        b2 = 1 - hyper.beta2**tau
        m_hat = inputs.first_moment(ghat, hyper) / b1
        change = m_hat * (1 - hyper.beta2) * ghat / (b2 * r * den.square())
        gamma = gamma + rho * sign * clip * torch.where(is_current & (r > 0), change, torch.zeros_like(change))
        baseline = direction - gamma * g
    return {
        "direction": direction,
        "baseline": baseline,
        "momentum": momentum,
        "weight_decay": decay,
        "gain": gamma,
    }


def _no_step(p: Tensor) -> dict[str, Tensor]:
    zero = torch.zeros_like(p, dtype=promote(p.dtype))
    return dict.fromkeys(("direction", "baseline", "momentum", "weight_decay", "gain"), zero)


def check_adamw_inputs(
    grads: Mapping[str, Tensor | None],
    opt_state: AdamWState,
    params: Params,
    preconditioner: str,
    max_grad_norm: float | None,
) -> None:
    """Raise ``TypeError`` or ``ValueError`` for arguments, those of ``adamw_decompose``, that it cannot use."""
    check_choice("preconditioner", preconditioner, get_args(Preconditioner))
    check_max_grad_norm(max_grad_norm)
    check_state(opt_state)
    stored, _ = stored_gradient(grads)
    check_names("grads", layout_of(stored), params, "pass the gradient of this model's own trainable parameters")
    name = first_not_finite(local_shards(stored))
    if name is not None:
        raise ValueError(
            f"grads[{name!r}] is not finite; expected finite entries, or the step has no direction. Drop the batch"
        )
    remedy = "the optimizer state is another model's: make it with adamw_state(optimizer, model) from the same model"
    for field in MOMENTS:
        check_names(f"opt_state.{field}", layout_of(getattr(opt_state, field)), params, remedy)
    if opt_state.master_weights is not None:
        check_names("opt_state.master_weights", layout_of(opt_state.master_weights), params, remedy)
    if not any(name in opt_state.hyper for name in params):
        raise ValueError(f"opt_state.hyper has none of the {len(params)} trainable parameters; {remedy}")
    for name, hyper in opt_state.hyper.items():
        if name not in opt_state.exp_avg or name not in opt_state.exp_avg_sq or name not in opt_state.step:
            raise ValueError(f"opt_state has no exp_avg, exp_avg_sq or step for {name!r}; {remedy}")
        if hyper.amsgrad and name not in opt_state.max_exp_avg_sq:
            raise ValueError(f"opt_state has no max_exp_avg_sq for {name!r}, whose group has amsgrad=True; {remedy}")
        if opt_state.master_weights is not None and name not in opt_state.master_weights:
            raise ValueError(f"opt_state.master_weights has none of {name!r}, which the optimizer holds; {remedy}")


def check_clip(clip: str, preconditioner: str, matrix: bool) -> None:
    """Raise ``ValueError`` for a derivative of the clipping factor that is not defined or not computed."""
    check_choice("clip", clip, get_args(Clip))
    if clip == "differentiated" and preconditioner == "rmsprop":
        raise ValueError(
            f"clip is {clip!r} with preconditioner {preconditioner!r}; expected 'frozen', since that step is not "
            "clipped. Take preconditioner='frozen' or 'jacobian'"
        )
    if clip == "differentiated" and matrix:
        raise ValueError(
            f"clip is {clip!r} with matrix=True; expected 'frozen', since M_ai is of a diagonal gain. Leave the "
            "matrix out"
        )
