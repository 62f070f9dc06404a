"""An update batch without any completion token has influences of 0, never NaN; a trainer makes such a step too."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from helpers.cases import TinyPolicy, random_adamw_state, random_batch, random_direction
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding

import fx_influence as fx
from fx_influence.types import AdamWState, Apply, Batch, Params


class Case(NamedTuple):
    model: TinyPolicy
    apply: Apply
    params: Params
    batch_u: Batch
    batch_e: Batch
    state: AdamWState

    def influence(self, **options: Any) -> fx.Influence:
        return fx.influence(self.params, self.batch_u, self.batch_e, self.state, apply=self.apply, **options)


def make_case() -> Case:
    generator = torch.Generator().manual_seed(3)
    model = TinyPolicy(6, 6, 1, 2, 8)
    apply, params = fx.make_functional(model)
    params = {name: p.clone() for name, p in params.items()}
    batch_u = random_batch(generator, 4, 8, 6, entropy_coefficients=True)
    batch_u = batch_u._replace(completion_mask=torch.zeros_like(batch_u.completion_mask))
    batch_e = random_batch(generator, 5, 8, 6, coefficients=False, groups=3)
    return Case(model, apply, params, batch_u, batch_e, random_adamw_state(generator, params))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"matrix": True},
    {"per_token": False},
    {"per_token": False, "stderr": False},
    {"memory_budget": 0},
    {"preconditioner": "jacobian"},
    {"max_grad_norm": 0.5},
    {"chunk_size": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_influence_is_zero_without_completion(options: dict[str, Any]) -> None:
    case = make_case()
    out = case.influence(**options)
    for name in ("per_sequence", "stderr", "residual", "unattributed"):
        value = getattr(out, name)
        assert torch.equal(value, torch.zeros_like(value)) or (name == "stderr" and options.get("stderr") is False), (
            name
        )
    for influences in (out.per_token, out.matrix):
        assert influences is None or not influences.any()
    assert out.baseline != 0
    assert out.total == out.baseline


def test_influence_baseline_is_adamw_step_without_completion() -> None:
    """A trainer's step, by torch's AdamW, is then momentum and weight decay alone."""
    case = make_case()
    lr = 1e-3
    hypers = case.state.hyper
    by_name = dict(case.model.named_parameters())
    groups = [
        {
            "params": [p],
            "lr": lr * hypers[name].lr_scale,
            "betas": (hypers[name].beta1, hypers[name].beta2),
            "eps": hypers[name].eps,
            "weight_decay": hypers[name].weight_decay,
        }
        for name, p in by_name.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    for name, p in by_name.items():
        moments = {
            "exp_avg": case.state.exp_avg[name].clone(),
            "exp_avg_sq": case.state.exp_avg_sq[name].clone(),
        }
        optimizer.state[p] = {"step": torch.tensor(float(case.state.step[name])), **moments}
        p.grad = torch.zeros_like(p)
    optimizer.step()
    v = {name: (p.detach() - case.params[name]) / lr for name, p in by_name.items()}
    slope = fx.jvp_delta(case.params, v, case.batch_e, apply=case.apply).first
    # theta' - theta has the rounding error of theta, which is divided by lr.
    size = max(float(p.abs().max()) for p in case.params.values()) / lr
    assert_close_to_rounding(case.influence().baseline, slope, terms=TINY_POLICY, scale=size)


def test_influence_grad_is_unattributed_without_completion() -> None:
    case = make_case()
    extra = random_direction(torch.Generator().manual_seed(0), case.params)
    out = case.influence(grad=extra)
    assert not out.per_sequence.any()
    assert out.unattributed != 0


@pytest.mark.parametrize("preconditioner", ["adam", "identity"])
def test_fisher_kernel_is_zero_without_completion(preconditioner: Any) -> None:
    case = make_case()
    for a, b in (
        (case.batch_u, case.batch_e),
        (case.batch_e, case.batch_u),
        (case.batch_u, case.batch_u),
    ):
        kernel = fx.fisher_kernel(case.params, a, b, case.state, apply=case.apply, preconditioner=preconditioner)
        assert torch.equal(kernel, torch.zeros(len(a.input_ids), len(b.input_ids), dtype=kernel.dtype))


def test_per_sample_grads_are_zero_without_completion() -> None:
    case = make_case()
    grads = fx.per_sample_grads(fx.rollout_loss(case.apply), case.params, case.batch_u)
    assert not any(g.any() or g.isnan().any() for g in grads.values())


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo", "prompt_max"])
def test_coefficients_are_zero_without_completion(loss_type: Any) -> None:
    mask = torch.zeros(3, 4, dtype=torch.bool)
    c = fx.coefficients(loss_type, torch.ones(3), mask, group=torch.tensor([0, 0, 1]), max_completion_length=4)
    assert torch.equal(c, torch.zeros(3, 4))


@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_entropy_estimate_raises_without_completion(normalize: Any) -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    values = fx.TokenValues(*(torch.zeros(2, 3) for _ in range(2)))
    batch = Batch(ids, ids > 0, ids < 0)
    with pytest.raises(ValueError, match=r"batch\.completion_mask of shape \(2, 3\) has no True .*entropy of none"):
        fx.entropy_estimate(values, batch, normalize)
