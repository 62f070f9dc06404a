"""The golden case loads right: forward, backward and step of the loaded model match the recorded numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.golden import DATA, Golden, flatten, load_golden, unflatten
from helpers.present import present
from helpers.tolerances import assert_close_to_rounding, policy_terms
from torch import Tensor

from fx_influence.types import Batch


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=str)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


def _score(golden: Golden, batch: Batch) -> tuple[Tensor, Tensor]:
    logits = golden.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    logp = logits.log_softmax(-1)
    return logp.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def assert_golden(golden: Golden, value: Tensor, name: str) -> None:
    """Assert equality up to the rounding of a forward and a backward of the model."""
    terms = policy_terms(golden.params, golden.batch_e.input_ids.shape[1], 2)
    assert_close_to_rounding(value, golden.expected[name], terms=terms, name=name)


def test_load_golden_batches_have_recorded_lengths(golden: Golden) -> None:
    inputs = np.load(DATA / "inputs.npz")
    for batch, side in ((golden.batch_u, "U"), (golden.batch_e, "E")):
        assert batch.input_ids.shape == (32, 48)
        assert torch.equal(batch.completion_mask.sum(-1), torch.from_numpy(inputs[f"{side}_gen_lens"]).flatten())
        # Prompts have no padding inside, so prompt + completion accounts for every attended position.
        prompt = torch.from_numpy(inputs[f"{side}_prompt_lens"]).repeat_interleave(32 // len(inputs[f"{side}_ids"]))
        assert torch.equal(batch.attention_mask.sum(-1), prompt + batch.completion_mask.sum(-1))
        assert not (batch.completion_mask & ~batch.attention_mask).any()
        assert not batch.completion_mask[:, 0].any()
    assert torch.equal(golden.batch_e.completion_mask.sum(-1), torch.from_numpy(golden.expected["T_tokens"]))
    assert present(golden.batch_u.group).unique(return_counts=True)[1].tolist() == [4] * 8
    assert len(present(golden.batch_e.group).unique()) == 32


def test_load_golden_forward_matches_recorded_scores(golden: Golden) -> None:
    with torch.no_grad():
        logp, entropy = _score(golden, golden.batch_e)
    mask = golden.batch_e.completion_mask[:, 1:]
    assert_golden(golden, logp[mask], "E_tok_logp")
    assert_golden(golden, entropy[mask], "E_tok_entropy")
    assert_golden(golden, (logp * mask).sum(-1), "E_seq_logprob")
    assert_golden(golden, (entropy * mask).sum(-1), "h_base")


def test_load_golden_backward_matches_recorded_gradient(golden: Golden) -> None:
    logp, _ = _score(golden, golden.batch_u)
    losses = -(present(golden.batch_u.coefficients)[:, 1:] * logp).sum(-1)
    by_name = dict(golden.model.named_parameters())
    gradients = torch.autograd.grad(losses.sum(), [by_name[name] for name in golden.params])
    assert_golden(golden, losses, "seq_loss")
    assert_golden(golden, flatten(dict(zip(golden.params, gradients, strict=True)), golden), "agg_grad")


def test_load_golden_torch_step_matches_recorded_direction(golden: Golden) -> None:
    parameters = {name: value.clone().requires_grad_() for name, value in golden.params.items()}
    for name, gradient in unflatten(golden.expected["agg_grad"], golden).items():
        parameters[name].grad = gradient
    recorded = json.loads((DATA / "config.json").read_text())["optimizer"]
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=1.0, betas=recorded["betas"], eps=recorded["eps"], weight_decay=recorded["weight_decay"]
    )
    state = golden.opt_state
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(state.step[name])),
            "exp_avg": state.exp_avg[name].clone(),
            "exp_avg_sq": state.exp_avg_sq[name].clone(),
        }
    optimizer.step()
    direction = {name: parameter.detach() - golden.params[name] for name, parameter in parameters.items()}
    assert_golden(golden, flatten(direction, golden), "v_full")


def test_load_golden_state_has_recorded_hyperparameters(golden: Golden) -> None:
    recorded = json.loads((DATA / "config.json").read_text())["optimizer"]
    assert golden.opt_state.lr == recorded["lr"]
    assert set(golden.opt_state.step.values()) == {7}
    (hyper,) = set(golden.opt_state.hyper.values())
    assert [hyper.beta1, hyper.beta2] == recorded["betas"]
    assert (hyper.eps, hyper.weight_decay, hyper.lr_scale) == (recorded["eps"], recorded["weight_decay"], 1.0)
    assert list(golden.opt_state.exp_avg) == list(golden.params)


def test_flatten_is_inverse_of_unflatten(golden: Golden) -> None:
    vector = golden.expected["v_full"]
    restored = flatten(unflatten(vector, golden), golden)
    assert torch.equal(restored, torch.from_numpy(vector).to(restored.dtype))
