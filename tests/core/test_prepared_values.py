"""Values that users prepare before a call: losses, rollouts, models; and values that are never read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.arguments import (
    WIDTH,
    Arguments,
    assert_rejected,
    shared_arguments,
)
from helpers.present import present

import fx_influence as fx
from fx_influence.types import Batch


@pytest.mark.parametrize("wrong", [[1.0, -1.0], np.ones(2), 0.5, None])
def test_losses_reject_other_types_than_tensors(wrong: Any) -> None:
    mask, two = torch.ones(2, 3, dtype=torch.bool), torch.ones(2)
    kind = "None" if wrong is None else f"of type {type(wrong).__name__}"
    rest = rf" is {kind}; expected a tensor\. Make it one: torch\.as_tensor"
    with pytest.raises(TypeError, match="advantages" + rest):
        fx.coefficients("grpo", wrong, mask)
    with pytest.raises(TypeError, match="completion_mask" + rest):
        fx.coefficients("grpo", two, wrong)
    with pytest.raises(TypeError, match="rewards" + rest):
        fx.group_advantages(wrong, two)
    with pytest.raises(TypeError, match="group" + rest):
        fx.group_advantages(two, wrong)
    with pytest.raises(TypeError, match="old_logprobs" + rest):
        fx.clipped_ratio(torch.zeros(2, 3), wrong, two)
    with pytest.raises(TypeError, match="rewards" + rest):
        fx.expected_reward(wrong)
    with pytest.raises(TypeError, match="reference_logprobs" + rest):
        fx.kl_to_reference(wrong)


def test_coefficients_names_cast_of_integer_mask() -> None:
    with pytest.raises(ValueError, match=r"completion_mask is torch\.int64 of shape \(2, 3\); .*Pass mask\.bool\(\)"):
        fx.coefficients("grpo", torch.ones(2), torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"loss_type is 'dr-grpo'; .*the nearest is 'dr_grpo'"):
        fx.coefficients("dr-grpo", torch.ones(2), torch.ones(2, 3, dtype=torch.bool))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"max_completion_length is of type float; expected an integer"):
        fx.coefficients("dr_grpo", torch.ones(2), torch.ones(2, 3, dtype=torch.bool), max_completion_length=3.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_reject_nonfinite_values_where_they_count(bad: float) -> None:
    mask = torch.tensor([[False, True], [False, False]])
    with pytest.raises(ValueError, match=r"advantages\[0\] is .*Drop those rollouts"):
        fx.coefficients("grpo", torch.tensor([bad, 1.0]), mask)
    with pytest.raises(ValueError, match=r"rewards\[1\] is .*Drop those rollouts or repair their rewards"):
        fx.group_advantages(torch.tensor([1.0, bad]), torch.zeros(2))
    # A row without completion tokens is never read.
    assert fx.coefficients("grpo", torch.tensor([1.0, bad]), mask).tolist() == [[0.0, 0.5], [0.0, 0.0]]
    per_token = torch.tensor([[bad, 1.0], [bad, bad]])
    assert fx.coefficients("grpo", per_token, mask).tolist() == [[0.0, 0.5], [0.0, 0.0]]


def test_collate_rejects_other_types() -> None:
    one = fx.Rollout("0/0", "0", 0, "a", "b", (7,), (8, 1), True)
    with pytest.raises(TypeError, match=r"rollouts is of type Rollout; expected a list of them\. Pass \[rollout\]"):
        fx.collate(one, 0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"rollouts\[1\] is of type dict; expected a fx\.Rollout\. .*fx\.read_rollouts"):
        fx.collate([one, {"id": "1"}], 0)  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"pad_id is None; expected an integer\. Pass any token's id, such as 0"):
        fx.collate([one], None)  # type: ignore[arg-type]


def test_read_rollouts_rejects_other_types(tmp_path: Any) -> None:
    class Tokenizer:
        def decode(self) -> str:
            return ""

    with pytest.raises(TypeError, match=r"path is of type Tokenizer; expected a path\. Give the file first"):
        fx.read_rollouts(Tokenizer(), tmp_path)  # type: ignore[arg-type]  # refused
    with pytest.raises(TypeError, match=r"tokenizer is of type str; .*AutoTokenizer\.from_pretrained"):
        fx.read_rollouts(tmp_path, "gpt2")


def test_adamw_state_and_make_functional_reject_other_types() -> None:
    arguments = shared_arguments()
    with pytest.raises(TypeError, match=r"model is of type AdamW; .*Swap the two: fx\.adamw_state\(optimizer, model\)"):
        fx.adamw_state(arguments.model, arguments.optimizer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model is of type dict; expected a torch\.nn\.Module"):
        fx.adamw_state(arguments.optimizer, arguments.params)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizer is of type dict; .*load_state_dict"):
        fx.adamw_state(arguments.optimizer.state_dict(), arguments.model)  # type: ignore[arg-type]
    for wrong in ("gpt2", arguments.params):
        with pytest.raises(TypeError, match=rf"model is of type {type(wrong).__name__}; expected a torch\.nn\.Module"):
            fx.make_functional(wrong)  # type: ignore[arg-type]

    class Trainer:
        model = arguments.model

    with pytest.raises(TypeError, match=r"model is of type Trainer; expected .*\. Pass trainer\.model"):
        fx.make_functional(Trainer())  # type: ignore[arg-type]


def test_entropy_estimate_rejects_other_types() -> None:
    arguments = shared_arguments()
    values = arguments.values()
    with pytest.raises(TypeError, match=r"values is of type Tensor; expected TokenValues\. Pass fx\.token_values"):
        fx.entropy_estimate(values.entropies, arguments.e)
    with pytest.raises(ValueError, match=r"normalize is 'batch'; expected one of token, sequence"):
        fx.entropy_estimate(values, arguments.e, "batch")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"matrix": True}, {"per_token": False}, {"memory_budget": 0}], ids=str)
def test_influence_ignores_coefficients_outside_completions(options: dict[str, Any]) -> None:
    arguments = shared_arguments()
    nonfinite = arguments.u._replace(
        coefficients=present(arguments.u.coefficients).masked_fill(~arguments.u.completion_mask, math.nan)
    )
    plain, out = arguments.influence(**options), arguments.influence(batch_u=nonfinite, **options)
    assert torch.equal(out.per_sequence, plain.per_sequence)
    assert torch.equal(out.total, plain.total)
    grads = [
        fx.per_sample_grads(fx.rollout_loss(arguments.policy), arguments.params, u) for u in (nonfinite, arguments.u)
    ]
    for name, g in grads[0].items():
        assert torch.equal(g, grads[1][name])


def test_coefficients_of_eval_batch_are_ignored() -> None:
    arguments = shared_arguments()
    nonfinite = arguments.e._replace(coefficients=torch.full((4, WIDTH), math.nan))
    assert torch.equal(arguments.influence(batch_e=nonfinite).per_sequence, arguments.influence().per_sequence)
    assert torch.equal(arguments.jvp(batch_e=nonfinite).first, arguments.jvp().first)
    kernel = arguments.fisher(preconditioner="identity", batch_a=nonfinite)
    assert torch.equal(kernel, arguments.fisher(preconditioner="identity"))


def test_fisher_kernel_checks_coefficients_when_adam() -> None:
    def nonfinite(arguments: Arguments) -> Batch:
        return arguments.u._replace(coefficients=torch.full((4, WIDTH), math.nan))

    assert_rejected(Arguments.fisher, r"batch_b\.coefficients is not finite in row 0", ValueError, batch_b=nonfinite)
    arguments = shared_arguments()
    assert arguments.fisher(preconditioner="identity", batch_b=nonfinite(arguments)).isfinite().all()
