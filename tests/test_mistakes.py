"""The first implementation's mistakes, each with a test that would have caught it, in this file or another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import TinyPolicy, assert_close, make_apply, max_error, random_adamw_state, random_batch
from helpers.golden import load_golden
from helpers.present import present
from helpers.tolerances import assert_close_to_rounding, policy_terms
from torch import Tensor

import fx_influence as fx
from fx_influence.types import Apply, Batch, Estimator, Params

HELD_BY = {
    "the published head returned exactly 0 for every delta H": "test_snis_delta_matches_golden",
    "hyperparameters read from the optimizer's defaults": "test_adamw_state_reads_hyperparameters_of_groups",
    "dropout active in a model that is training": "test_policy_disables_dropout",
    "dropout active whatever the mode": "test_influence_refuses_a_random_policy",
    "noise at eta = 1e-6 in float32": "test_first_order_is_right_where_a_float32_step_is_noise",
    "uncentred rows": "test_snis_contributions_match_centred_golden",
    "temperature applied to the entropies but not to the weights": "test_temperature_equals_divided_logits_everywhere",
    "the end of sequence dropped where it is also the padding": "test_collate_keeps_eos_that_is_also_padding",
    "the same, of sampled rollouts": "test_sample_keeps_eos_that_is_also_padding",
    "a crash at an empty completion": "test_collate_accepts_empty_completion",
    "the same, in the mathematics": "test_empty_completion_contributes_0_and_counts_in_n",
    "left padding attended to": "test_influence_is_invariant_to_padding_side",
    "caches by id() that outlived a change of parameters": "test_influence_follows_changed_parameters",
    "the same, of frozen parameters": "test_policy_reads_frozen_tensors_live",
    "top_k=50 in sampling that was called on-policy": "test_sample_frequencies_match_full_softmax",
    "a silent fall-back from vmap to a loop": "test_per_sample_grads_take_one_pass_or_fail",
}


def test_every_mistake_has_an_existing_test() -> None:
    texts = [file.read_text(encoding="utf-8") for file in Path(__file__).parent.rglob("test_*.py")]
    defined = {name for text in texts for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    assert set(HELD_BY.values()) <= defined


class Case:
    """A float64 policy with an update batch, an evaluation batch and a warm optimizer state."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(6)
        self.apply, self.params = make_apply(TinyPolicy(6, 6, 1, 2, 8))
        self.batch_u = random_batch(generator, 4, 8, 6)
        self.batch_e = random_batch(generator, 6, 8, 6, groups=4, coefficients=False)
        self.state = random_adamw_state(generator, self.params)
        self.direction = {
            name: 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in self.params.items()
        }

    def influence(self, apply: Apply, estimator: Estimator = "per_decision", temperature: float = 1.0) -> fx.Influence:
        return fx.influence(
            self.params,
            self.batch_u,
            self.batch_e,
            self.state,
            apply=apply,
            objective=fx.Entropy(estimator),
            temperature=temperature,
            matrix=True,
        )


def test_influence_refuses_a_random_policy() -> None:
    """Additivity was off by 42% with dropout: rollouts and total saw different networks."""
    case = Case()

    def dropping(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return case.apply(
            {**params, "head.weight": torch.nn.functional.dropout(params["head.weight"], 0.1)},
            input_ids,
            attention_mask,
        )

    case.influence(case.apply)
    with pytest.raises(fx.IdentityError, match="free of dropout"):
        case.influence(dropping)
    with pytest.raises(RuntimeError, match="randomness"):
        fx.per_sample_grads(fx.rollout_loss(dropping), case.params, case.batch_u)


def test_first_order_is_right_where_a_float32_step_is_noise() -> None:
    """Column i of the recorded float64 matrix has the change of each rollout of E per unit lr along v_i."""
    golden = load_golden(torch.float32)
    exact = torch.from_numpy(np.asarray(golden.expected["first_order_centred_per_token"][2:])).T
    apply, params = fx.make_functional(golden.model)
    options: dict[str, Any] = {"apply": apply, "objective": fx.Entropy("sequence")}
    out = fx.influence(params, golden.batch_u, golden.batch_e, golden.opt_state, matrix=True, **options)
    terms, size = policy_terms(params, golden.batch_e.input_ids.shape[1]), exact.abs().sum(0)
    assert_close_to_rounding(out.per_sequence, exact.sum(0), terms=terms, scale=size, dtype=torch.float32)
    assert_close_to_rounding(out.matrix, exact, terms=terms)
    assert torch.equal(out.per_sequence.sign(), exact.sum(0).sign())

    grads = fx.per_sample_grads(fx.rollout_loss(apply), params, golden.batch_u)
    step = fx.adamw_decompose({name: g.sum(0) for name, g in grads.items()}, golden.opt_state, params)
    eta, sampled = 1e-6, range(0, 32, 4)
    moved = [
        fx.snis_delta(params, {k: gain * grads[k][i] for k, gain in step.gain.items()}, eta, golden.batch_e, **options)
        for i in sampled
    ]
    literal = torch.stack([m.contributions for m in moved], dim=1) / eta
    part = exact[:, list(sampled)]
    error, wrong = max_error(literal, part), (literal.sign() != part.sign()).double().mean().item()
    ours = (present(out.matrix).sign() != exact.sign()).double().mean().item()
    print(f"literal step: error {error:.2g}, {wrong:.0%} of signs wrong; first order: {ours:.2%} of signs wrong")
    assert error > 0.3
    assert wrong > 0.1
    assert ours == 0


@pytest.mark.parametrize("estimator", ["per_decision", "sequence"])
def test_temperature_equals_divided_logits_everywhere(estimator: Estimator) -> None:
    case, temperature = Case(), 0.4

    def divided(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return case.apply(params, input_ids, attention_mask) / temperature

    def everything(apply: Apply, temperature: float) -> list[Tensor | None]:
        options: dict[str, Any] = {"apply": apply, "temperature": temperature}
        jvp_options: dict[str, Any] = {"objective": fx.Entropy(estimator), **options}
        out = case.influence(apply, estimator, temperature)
        moved = fx.snis_delta(case.params, case.direction, 0.5, case.batch_e, **jvp_options)
        slope = fx.jvp_delta(case.params, case.direction, case.batch_e, **jvp_options)
        kernel = fx.fisher_kernel(case.params, case.batch_e, case.batch_u, case.state, **options)
        results = [out.per_token, out.stderr, out.matrix, out.total, *moved, *slope, kernel]
        return [*results, *fx.token_values(case.params, case.batch_e, apply, temperature)]

    for ours, expected in zip(everything(case.apply, temperature), everything(divided, 1.0), strict=True):
        assert_close(present(ours), present(expected))
    weights = [
        fx.snis_delta(case.params, case.direction, 0.5, case.batch_e, apply=case.apply, temperature=x).log_weights
        for x in (1.0, temperature)
    ]
    assert (weights[1] - weights[0]).abs().max() > 0.1


def test_per_sample_grads_take_one_pass_or_fail() -> None:
    case, calls = Case(), []

    def counted(params: Params, row: Batch) -> Tensor:
        calls.append(row.input_ids.shape)
        return fx.rollout_loss(case.apply)(params, row)

    fx.per_sample_grads(counted, case.params, case.batch_u)
    assert calls == [(8,)]
    fx.per_sample_grads(counted, case.params, case.batch_u, chunk_size=2)
    assert calls == [(8,)] * 3

    def branches_on_values(params: Params, row: Batch) -> Tensor:
        loss = counted(params, row)
        return loss if loss > 0 else -loss

    calls.clear()
    with pytest.raises(RuntimeError, match="data-dependent control flow"):
        fx.per_sample_grads(branches_on_values, case.params, case.batch_u)
    assert len(calls) == 1
