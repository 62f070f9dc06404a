"""Windows of real steps of ``torch.optim.AdamW`` on a small policy, recorded, and replayed with other weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fx_influence as fx
from fx_influence.types import AdamWState, Apply, Batch, Params
from helpers.cases import TinyPolicy, make_apply, random_adamw_state, random_batch

VOCAB, WIDTH = 6, 7


class Scales(NamedTuple):
    """Factors on what enters a window: rollouts' losses by step (n_u,), both moments before it, and weight decay."""

    rollouts: Sequence[Tensor]
    momentum: float = 1.0
    second_moment: float = 1.0
    weight_decay: float = 1.0


@dataclass(frozen=True)
class Run:
    """A window to be made: ``advantages`` a_it of each step's batch, and ``old`` log-probabilities of the ratio.

    ``old`` is None where the loss is linear in log-probabilities. ``kappas`` and ``points``: clipping factors and
    parameters of the steps as they were made, to hold fixed.
    """

    model: TinyPolicy
    apply: Apply
    state: AdamWState
    advantages: list[Batch]
    old: list[Tensor] | None
    rates: list[float]
    max_grad_norm: float | None
    batch_e: Batch
    temperature: float
    kappas: list[float] | None = None
    points: list[Params] | None = None

    def loss(self, k: int, params: Params, weights: Tensor) -> Tensor:
        """Return -sum_i w_i sum_t (a_it r_it + b_it h_it) of step k, from all logits."""
        batch = self.advantages[k]
        assert batch.coefficients is not None
        logprobs, entropies = self.values(params, batch)
        term = batch.coefficients * (logprobs if self.old is None else (logprobs - self.old[k]).exp())
        if batch.entropy_coefficients is not None:
            term = term + batch.entropy_coefficients * entropies
        return -(weights.unsqueeze(-1) * torch.where(batch.completion_mask, term, 0.0)).sum()

    def values(self, params: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return log pi(y) and h at every position (B, T)."""
        logits = self.apply(params, batch.input_ids, batch.attention_mask)[:, :-1] / self.temperature
        log_pi = torch.nn.functional.pad(logits.log_softmax(-1), (0, 0, 1, 0))
        chosen = log_pi.gather(-1, batch.input_ids.unsqueeze(-1)).squeeze(-1)
        return chosen, -(log_pi.exp() * log_pi).sum(-1)

    def ones(self) -> Scales:
        return Scales([torch.ones(len(b.input_ids), dtype=torch.float64) for b in self.advantages])

    def made(self, scales: Scales) -> tuple[Params, list[Params], list[float]]:
        """Return the parameters after the window, and before each of its steps, and the clipping factors."""
        model = copy.deepcopy(self.model)
        optimizer = self._optimizer(model, scales)
        points, kappas = [], []
        for k, rate in enumerate(self.rates):
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            points.append({name: p.detach().clone() for name, p in model.named_parameters()})
            leaves = points[-1] if self.points is None else self.points[k]
            leaves = {name: p.detach().clone().requires_grad_() for name, p in leaves.items()}
            grads = torch.autograd.grad(self.loss(k, leaves, scales.rollouts[k]), [*leaves.values()], allow_unused=True)
            for p, g in zip(model.parameters(), grads, strict=True):
                p.grad = g
            norm = torch.cat([g.flatten() for g in grads if g is not None]).norm()
            limit = torch.inf if self.max_grad_norm is None else self.max_grad_norm
            kappas.append(min(1.0, limit / (float(norm) + 1e-6)))
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.mul_(kappas[-1] if self.kappas is None else self.kappas[k])
            optimizer.step()
        return {name: p.detach().clone() for name, p in model.named_parameters()}, points, kappas

    def _optimizer(self, model: TinyPolicy, scales: Scales) -> torch.optim.AdamW:
        groups: list[dict[str, Any]] = []
        for name, p in model.named_parameters():
            if name in self.state.hyper:
                hyper = self.state.hyper[name]
                groups.append(
                    {
                        "params": [p],
                        "scale": hyper.lr_scale,
                        "betas": (hyper.beta1, hyper.beta2),
                        "eps": hyper.eps,
                        "weight_decay": hyper.weight_decay * scales.weight_decay,
                        "amsgrad": hyper.amsgrad,
                        "maximize": hyper.maximize,
                    }
                )
        optimizer = torch.optim.AdamW(groups)
        for name, p in model.named_parameters():
            if name in self.state.hyper:
                optimizer.state[p] = {
                    "step": torch.tensor(float(self.state.step[name])),
                    "exp_avg": self.state.exp_avg[name] * scales.momentum,
                    "exp_avg_sq": self.state.exp_avg_sq[name] * scales.second_moment,
                }
                if name in self.state.max_exp_avg_sq:
                    optimizer.state[p]["max_exp_avg_sq"] = self.state.max_exp_avg_sq[name] * scales.second_moment
        return optimizer

    def window(self) -> fx.Window:
        """Return the window as recorded: coefficients at each step's parameters."""
        params, steps = {name: p.detach().clone() for name, p in self.model.named_parameters()}, []
        for k, (point, rate) in enumerate(zip(self.made(self.ones())[1], self.rates, strict=True)):
            batch = self.advantages[k]
            if self.old is not None:
                ratio = (self.values(point, batch)[0] - self.old[k]).exp()
                assert batch.coefficients is not None
                batch = batch._replace(coefficients=batch.coefficients * ratio)
            slopes = None if self.old is None else batch.coefficients
            steps.append(
                fx.RecordedStep(batch=batch, lr=rate, max_grad_norm=self.max_grad_norm, coefficient_slopes=slopes)
            )
        return fx.Window(params=params, opt_state=self.state, steps=steps)

    def holding(self, *, clip: bool, gradients: bool) -> Run:
        """Return the run with its clipping factors, and the parameters that its gradients are taken at, held fixed."""
        _, points, kappas = self.made(self.ones())
        return replace(self, kappas=kappas if clip else None, points=points if gradients else None)

    def entropy_change(self) -> Callable[[Scales], Tensor]:
        """Return a function from scales to the entropy after the window made with them, less that of the window."""
        end = self.made(self.ones())[0]

        def change(scales: Scales) -> Tensor:
            moved = self.made(scales)[0]
            direction = {name: moved[name] - end[name] for name in end}
            options: dict[str, Any] = {"apply": self.apply, "clip": None, "temperature": self.temperature}
            return fx.snis_delta(end, direction, 1.0, self.batch_e, **options).delta_h

        return change


def random_run(
    seed: int,
    steps: int,
    *,
    ratio: bool = True,
    bonus: bool = False,
    max_grad_norm: float | None = None,
    temperature: float = 1.0,
    rate: float = 0.02,
    **hyper: Any,
) -> Run:
    """Return a run of some steps, of other batches and learning rates each; a third of the tokens is clipped away."""
    generator = torch.Generator().manual_seed(seed)
    model = TinyPolicy(VOCAB, 4, 1, 2, WIDTH, tied=bool(seed % 2), seed=seed)
    apply, params = make_apply(model)
    state = random_adamw_state(generator, params, **hyper)
    batches = []
    for k in range(steps):
        batch = random_batch(generator, 3 + k % 2, WIDTH, VOCAB, entropy_coefficients=bonus)
        passes = torch.rand(batch.input_ids.shape, generator=generator) > 0.3
        assert batch.coefficients is not None
        batches.append(batch._replace(coefficients=batch.coefficients * passes))
    batch_e = random_batch(generator, 4, WIDTH, VOCAB, coefficients=False)
    batch_e = batch_e._replace(group=torch.arange(4))
    rates = [rate * (1 + 0.5 * k) for k in range(steps)]
    run = Run(model, apply, state, batches, None, rates, max_grad_norm, batch_e, temperature)
    if not ratio:
        return run
    old = [run.values(params, b)[0] for b in batches]
    return replace(run, old=[x + 0.2 * torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in old])


def with_prompts(run: Run, prompts: int, each: int) -> Run:
    """Return the run with other rollouts in every step, ``each`` of every prompt by ``group``."""
    generator = torch.Generator().manual_seed(prompts)
    group = torch.arange(prompts * each) // each
    batches = [random_batch(generator, len(group), WIDTH, VOCAB)._replace(group=group) for _ in run.rates]
    return replace(run, advantages=batches)


def over_steps(run: Run, own_rollouts: bool = False, **options: Any) -> fx.InfluenceOverSteps:
    """Return the influences over the run's window on its E, or on the last step's rollouts."""
    batch_e = None if own_rollouts else run.batch_e
    return fx.influence_over_steps(run.window(), batch_e, apply=run.apply, temperature=run.temperature, **options)


def size_of(out: fx.InfluenceOverSteps) -> Tensor:
    return torch.cat(out.per_sequence).abs().sum()


def scaled(run: Run, eta: float, step: int | None = None, row: int | None = None) -> Scales:
    """Return weights 1 + eta of one rollout, of all those of a step, or of everything that enters the window."""
    weights = [w.clone() for w in run.ones().rollouts]
    for k, w in enumerate(weights):
        if step is None or k == step:
            w[slice(None) if row is None else row] += eta
    return Scales(weights) if step is not None else Scales(weights, 1 + eta, 1 + eta, 1 + eta)
