"""Tensors that are gathered at each access: checks and displays know them by their layout, without a collective."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fx_influence as fx
from fx_influence.core.computed import ComputedTensors, layout_of
from fx_influence.distributed.consistency import comparable_facts
from fx_influence.optim.adamw import check_adamw_inputs
from fx_influence.types import AdamWHyper


def gathered(shape: tuple[int, ...]) -> ComputedTensors:
    """Return a tensor "w" of a shape, reading which fails, as a collective that one process makes would."""

    def read() -> Tensor:
        raise AssertionError("a check gathers")

    return ComputedTensors({"w": read}, {"w": torch.empty(shape, device="meta")})


def state_of(moment: ComputedTensors, masters: ComputedTensors) -> fx.AdamWState:
    hyper = {"w": AdamWHyper(weight_decay=0.1)}
    return fx.AdamWState(moment, moment, {}, {"w": 1}, hyper, 1e-3, masters)  # type: ignore[arg-type]


def test_checks_and_repr_read_the_layout_alone() -> None:
    params, state = {"w": torch.zeros(2, 3)}, state_of(gathered((2, 3)), gathered((2, 3)))
    check_adamw_inputs({}, state, params, "frozen", None)
    assert "exp_avg=1 tensors of 6 numbers" in repr(state)
    facts = dict(comparable_facts("opt_state", state))
    assert facts["the layout of opt_state.master_weights['w']"] == ((2, 3), "torch.float32")
    assert not any(name.startswith("the checksum") for name in facts)


@pytest.mark.parametrize("field", ["exp_avg", "master_weights"])
def test_checks_refuse_a_layout_of_another_model(field: str) -> None:
    right, wrong = gathered((2, 3)), gathered((3, 2))
    state = state_of(wrong if field == "exp_avg" else right, wrong if field == "master_weights" else right)
    with pytest.raises(ValueError, match=rf"opt_state.{field}\['w'\] has shape \(3, 2\)"):
        check_adamw_inputs({}, state, {"w": torch.zeros(2, 3)}, "frozen", None)


def test_layout_of_tensors_that_are_only_computed_is_themselves() -> None:
    computed = ComputedTensors({"w": lambda: torch.ones(2)})
    assert layout_of(computed) is computed
