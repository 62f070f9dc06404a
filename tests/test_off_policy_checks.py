"""E of another policy: rows carry its log-probabilities, and what cannot be weighted is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import assert_close
from helpers.off_policy import make_case, options
from helpers.present import present

import fx_influence as fx
from fx_influence.batching.rows import distinct_rows, select_rows


def test_rows_carry_their_behaviour() -> None:
    case = make_case()
    chosen = select_rows(case.batch, torch.tensor([4, 1]))
    assert torch.equal(
        present(chosen.behaviour_logprobs).nan_to_num(), present(case.batch.behaviour_logprobs)[[4, 1]].nan_to_num()
    )
    twice = select_rows(case.batch, torch.tensor([2, 2]))
    behaviour = present(twice.behaviour_logprobs).clone()
    behaviour[1] -= 1.0
    once, index = distinct_rows(twice._replace(behaviour_logprobs=behaviour))
    assert len(once.input_ids) == 1
    assert index.tolist() == [0, 0]


def test_small_effective_sample_size_is_refused() -> None:
    case = make_case()
    behaviour = present(case.batch.behaviour_logprobs).clone()
    behaviour[2] -= 8.0
    case = case._replace(batch=case.batch._replace(behaviour_logprobs=behaviour))
    chosen = options(case, "per_decision", "token")
    message = r"effective sample size of batch_e is .* of 12 rows .*at least 0.25 of the rows, 3,.* newer policy"
    e = case.batch._replace(coefficients=None)
    with pytest.raises(ValueError, match=message):
        fx.influence(case.params, case.batch, e, case.opt_state, **chosen)
    with pytest.raises(ValueError, match=message):
        fx.influence(case.params, case.batch, None, case.opt_state, **chosen)
    with pytest.raises(ValueError, match=message):
        fx.snis_delta(case.params, case.direction, 0.1, e, **chosen)
    with pytest.raises(ValueError, match=message):
        fx.jvp_delta(case.params, case.direction, e, **chosen)


def test_what_cannot_be_weighted_is_refused() -> None:
    case = make_case()
    e = case.batch._replace(coefficients=None)
    reward = fx.expected_reward(torch.arange(12.0))
    with pytest.raises(ValueError, match=r"behaviour_logprobs is given with another objective than fx.Entropy"):
        fx.influence(case.params, case.batch, e, case.opt_state, apply=case.apply, objective=reward)
    with pytest.raises(ValueError, match=r"behaviour_logprobs is given with another objective than fx.Entropy"):
        fx.influence(case.params, case.batch, None, case.opt_state, apply=case.apply, objective=reward)
    with pytest.raises(ValueError, match=r"matrix is True with behaviour_logprobs, .*Leave the matrix out"):
        fx.influence(case.params, case.batch, None, case.opt_state, matrix=True, apply=case.apply)
    by_sequence = fx.influence(
        case.params, case.batch, None, case.opt_state, matrix=True, **options(case, "sequence", "token")
    )
    assert_close(present(by_sequence.matrix).sum(0), by_sequence.per_sequence, by_sequence.per_sequence.abs().sum())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:, 1:], r"behaviour_logprobs is torch.float64 of shape \(12, 6\); expected float32 or float64"),
        (lambda b: b.half(), r"behaviour_logprobs is torch.float16 .* computed in float32 at least"),
        (lambda b: torch.full_like(b, torch.nan), r"no finite log-probabilities in row 0 \(12 such rows\)"),
        (lambda b: b.exp(), r"no finite log-probabilities in row 0 .*at most 0"),
    ],
    ids=["shape", "half", "nan", "probabilities"],
)
def test_behaviour_logprobs_are_checked(change: Any, message: str) -> None:
    case = make_case()
    wrong = case.batch._replace(coefficients=None, behaviour_logprobs=change(present(case.batch.behaviour_logprobs)))
    with pytest.raises(ValueError, match=message):
        fx.jvp_delta(case.params, case.direction, wrong, apply=case.apply)
