"""One AdamW step as a map of the training state, (theta, m, s, g) to (theta', m', s'), and its transpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fx_influence.core.tree import dot
from fx_influence.optim.adamw import StepInputs, second_moment_denominator, step_terms
from fx_influence.optim.step import AdamWStep
from fx_influence.types import AdamWHyper, AdamWState, Clip, Params


class ParameterState(NamedTuple):
    """One parameter with its moments, or a cotangent of each: tensors of one shape and one dtype.

    Attributes:
        theta: the parameter.
        m: first moment.
        s: second moment.
        maximum: amsgrad's max_exp_avg_sq, or None.
    """

    theta: Tensor
    m: Tensor
    s: Tensor
    maximum: Tensor | None = None


class StepCotangents(NamedTuple):
    """Cotangents of one parameter's step: of the state before it, of the gradient before clipping, and of eps.

    Attributes:
        before: of theta, m, s and amsgrad's maximum.
        g: of the gradient, with kappa frozen.
        eps: of the hyperparameter eps, float64 scalar.
    """

    before: ParameterState
    g: Tensor
    eps: Tensor


def step_forward(inputs: StepInputs, hyper: AdamWHyper, tau: int, lr: float) -> ParameterState:
    """Return theta' = theta + lr v, m', s' and max(maximum, s') of one parameter; v is that of ``adamw_decompose``.

    Args:
        inputs: the parameter, its moments before the step, its gradient and kappa.
        hyper: hyperparameters of the parameter.
        tau: number of the step, from 1.
        lr: reference learning rate of the step.

    Example:
        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> after = step_forward(StepInputs(zero, zero, zero, None, one, torch.tensor(1.0)), AdamWHyper(), 1, 0.5)
        >>> round(after.theta.item(), 6), round(after.m.item(), 6), round(after.s.item(), 6)
        (-0.5, 0.1, 0.001)
    """
    ghat, s = inputs.second_moment(hyper)
    direction = step_terms(inputs, hyper, tau, "frozen")["direction"]
    maximum = None if inputs.maximum is None else torch.maximum(inputs.maximum, s)
    return ParameterState(inputs.theta + lr * direction, inputs.first_moment(ghat, hyper), s, maximum)


def step_vjp(
    inputs: StepInputs,
    hyper: AdamWHyper,
    tau: int,
    lr: float,
    cotangent: ParameterState,
    preconditioner: Literal["frozen", "jacobian"] = "jacobian",
) -> StepCotangents:
    """Return the vector-Jacobian product of ``step_forward``, elementwise, with kappa frozen.

    With h = lr rho, B_k = 1 - beta_k^tau, root = sqrt(shat / B2), den = root + eps and (l_theta, l_m, l_s, l_max) the
    cotangent of the state after the step:

        q = h l_theta m' / (B1 den^2)                     (cotangent of den, and entrywise of eps)
        a = l_m - h l_theta / (B1 den)                    (cotangent of m')
        b = l_s + q / (2 B2 root)                         (cotangent of s')
        (l_theta (1 - h lambda),  beta1 a,  beta2 b)      (cotangents of theta, m, s)
        +- kappa [(1 - beta1) a + 2 (1 - beta2) ghat b]   (cotangent of g; - under ``maximize``)

    With amsgrad l_max + q / (2 B2 root) goes to s' where s' is the new maximum, else to the old maximum.

    Args:
        inputs: as in ``step_forward``.
        hyper: hyperparameters of the parameter.
        tau: number of the step, from 1.
        lr: reference learning rate of the step.
        cotangent: of the parameter's state after the step.
        preconditioner: ``"jacobian"`` differentiates the denominator as well; ``"frozen"`` holds it fixed, q = 0 in b.

    Returns:
        ``StepCotangents``. Where root is 0, and the derivative of the square root infinite, den counts as fixed.

    Example:
        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> inputs = StepInputs(zero, zero, one, None, one, torch.tensor(1.0))
        >>> out = step_vjp(inputs, AdamWHyper(weight_decay=0.1), 1, 0.5, ParameterState(one, zero, zero))
        >>> round(out.before.theta.item(), 6)
        0.95
    """
    ghat, s_new = inputs.second_moment(hyper)
    shat = s_new if inputs.maximum is None else torch.maximum(inputs.maximum, s_new)
    den, root, _ = second_moment_denominator(hyper, shat, tau)
    b1, b2, h = 1 - hyper.beta1**tau, 1 - hyper.beta2**tau, lr * hyper.lr_scale
    per_den = (h / b1) * cotangent.theta / den
    of_den = per_den * inputs.first_moment(ghat, hyper) / den
    of_shat = torch.zeros_like(of_den)
    if preconditioner == "jacobian":
        of_shat = torch.where(root > 0, of_den / (2 * b2 * root), of_shat)
    of_m, of_s, of_maximum = cotangent.m - per_den, cotangent.s, None
    if inputs.maximum is None:
        of_s = of_s + of_shat
    else:
        of_shat = of_shat if cotangent.maximum is None else of_shat + cotangent.maximum
        is_current, zero = s_new > inputs.maximum, torch.zeros_like(of_shat)
        of_s, of_maximum = of_s + torch.where(is_current, of_shat, zero), torch.where(is_current, zero, of_shat)
    sign = -1.0 if hyper.maximize else 1.0
    of_ghat = (1 - hyper.beta1) * of_m + (2 * (1 - hyper.beta2)) * ghat * of_s
    of_theta = (1 - h * hyper.weight_decay) * cotangent.theta
    before = ParameterState(of_theta, hyper.beta1 * of_m, hyper.beta2 * of_s, of_maximum)
    return StepCotangents(before, (sign * inputs.clip) * of_ghat, of_den.double().sum())


@dataclass(frozen=True)
class StateCotangent:
    """A cotangent of the training state: of theta, m, s and amsgrad's maximum, by parameter name."""

    theta: Params
    m: Params
    s: Params
    maximum: Params

    @classmethod
    def of_parameters(cls, theta: Params, state: AdamWState) -> StateCotangent:
        """Return the cotangent of a function of the parameters alone: 0 for the moments that ``state`` holds."""
        fields = (state.exp_avg, state.exp_avg_sq, state.max_exp_avg_sq)
        return cls(theta, *({name: torch.zeros_like(theta[name]) for name in field} for field in fields))

    def of_parameter(self, name: str) -> ParameterState:
        """Return the cotangent of one parameter's state, which the optimizer holds."""
        return ParameterState(self.theta[name], self.m[name], self.s[name], self.maximum.get(name))

    def replace_(self, name: str, x: ParameterState) -> None:
        """Put the cotangent of one parameter's state in place of the present one."""
        self.theta[name], self.m[name], self.s[name] = x.theta, x.m, x.s
        if x.maximum is not None:
            self.maximum[name] = x.maximum


class TransposedStep(NamedTuple):
    """Cotangents of a step's own inputs, from one of the state after it.

    Attributes:
        g: cotangent of the gradient before clipping, by name; without the parameters that the step does not move.
        weight_decay: derivative along the step's decay, <l_theta, -lr rho lambda theta>, float64 scalar.
        eps: sum over parameters of eps times its cotangent, float64 scalar.
    """

    g: Params
    weight_decay: Tensor
    eps: Tensor


def advance(step: AdamWStep, lr: float) -> tuple[Params, AdamWState]:
    """Return the parameters and AdamW's state after the step; what the step does not move is returned as it is.

    Args:
        step: the gradient, the state and the parameters before the step, and kappa.
        lr: reference learning rate of the step.

    Example:
        >>> zero, one = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
        >>> state = AdamWState(zero, zero, {}, {"w": 0}, {"w": AdamWHyper()}, lr=0.5)
        >>> params, state = advance(AdamWStep.of(one, state, zero, "frozen", None), 0.5)
        >>> round(params["w"].item(), 6), state.step
        (-0.5, {'w': 1})
    """
    old = step.opt_state
    params, counts = dict(step.params), dict(old.step)
    m, s, maximum = dict(old.exp_avg), dict(old.exp_avg_sq), dict(old.max_exp_avg_sq)
    for name in filter(step.moves, params):
        tau = old.step[name] + 1
        after = step_forward(step.inputs(name), old.hyper[name], tau, lr)
        params[name], m[name], s[name], counts[name] = after.theta, after.m, after.s, tau
        if after.maximum is not None:
            maximum[name] = after.maximum
    return params, old._replace(exp_avg=m, exp_avg_sq=s, max_exp_avg_sq=maximum, step=counts)


def transpose_(step: AdamWStep, lr: float, cotangent: StateCotangent, clip: Clip = "frozen") -> TransposedStep:
    """Apply the vector-Jacobian product of ``advance``, in place, so that one cotangent of the state is in memory.

    With the clipping factor differentiated the cotangent of g gets ``AdamWStep.differentiate_clipping_``'s term of rank
    one over all parameters.

    Args:
        step: the gradient, the state and the parameters before the step, and kappa. Its ``preconditioner``, ``frozen``
            or ``jacobian``, says whether denominators are held fixed or differentiated.
        lr: reference learning rate of the step.
        cotangent: of the state after the step, whose dictionaries then hold new tensors: those of the state before the
            step, through the optimizer alone, where the gradient counts as given.
        clip: whether kappa is held fixed.

    Example:
        >>> zero, one = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
        >>> state = AdamWState(zero, one, {}, {"w": 0}, {"w": AdamWHyper()}, lr=0.5)
        >>> step = AdamWStep.of(one, state, zero, "frozen", None)
        >>> cotangent = StateCotangent.of_parameters(one, state)
        >>> bool(torch.isclose(transpose_(step, 0.5, cotangent).g["w"], 0.5 * step.gain()["w"]))
        True
        >>> bool(torch.isclose(cotangent.m["w"], 0.9 * 0.5 * step.gain()["w"] / (1 - 0.9)))
        True
    """
    preconditioner: Literal["frozen", "jacobian"] = "frozen" if step.preconditioner == "frozen" else "jacobian"
    of_g, decay, of_eps = {}, *torch.zeros(2, dtype=torch.float64, device=step.clip.device)
    for name in filter(step.moves, step.params):
        hyper, tau = step.opt_state.hyper[name], step.opt_state.step[name] + 1
        out = step_vjp(step.inputs(name), hyper, tau, lr, cotangent.of_parameter(name), preconditioner)
        size = dot({name: cotangent.theta[name]}, {name: step.params[name]})
        decay -= lr * hyper.lr_scale * hyper.weight_decay * size.to(decay.device)
        of_eps += hyper.eps * out.eps.to(of_eps.device)
        of_g[name] = out.g
        cotangent.replace_(name, out.before)
    if clip == "differentiated" and of_g:
        step.differentiate_clipping_(of_g)
    return TransposedStep(of_g, decay, of_eps)
