"""Inputs of a forward that belong to rows are those of the very rows that a pass has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny_models import AttentionModel, full_batch, make_float64, warm_state
from torch import Tensor

import fx_influence as fx
from fx_influence.policy.row_inputs import RowInputs

U = full_batch(1)
E = U._replace(coefficients=None)


class SeesImages(AttentionModel):
    """A policy whose logits move with an image of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = torch.nn.Linear(3, self.head.weight.shape[0])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        logits = super().forward(input_ids, attention_mask)
        return logits if image is None else logits * (1 + self.vision(image)[:, None])


def test_passes_with_row_inputs_are_those_of_the_images() -> None:
    torch.manual_seed(0)
    model = make_float64(SeesImages)
    images = torch.randn(len(U.input_ids), 3, dtype=torch.float64)
    apply, params = fx.make_functional(model)
    row_inputs = RowInputs.of(U.input_ids, U.attention_mask, [{"image": x[None]} for x in images])
    state = warm_state(model)

    def plain(params: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits with the images found by the rows' first tokens, which differ."""
        known = U.input_ids[:, : input_ids.shape[1]]
        order = [int((known == row).all(1).nonzero()[0]) for row in input_ids]
        return torch.func.functional_call(model, params, (input_ids, attention_mask, images[order]))

    expected = fx.influence(params, U, E, state, apply=plain)
    out = fx.influence(params, U, E, state, apply=apply.with_row_inputs(row_inputs))
    size = expected.per_sequence.abs().sum()
    assert (out.per_sequence - expected.per_sequence).abs().max() <= 1e-9 * size
    text = fx.influence(params, U, E, state, apply=apply)
    assert (text.per_sequence - expected.per_sequence).abs().max() > 1e-3 * size


def test_row_inputs_refuse_equal_rows_with_other_images() -> None:
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
    inputs = [{"image": torch.zeros(1)}, {"image": torch.ones(1)}]
    with pytest.raises(ValueError, match="two rollouts have the same tokens and other images"):
        RowInputs.of(ids, ids > 0, inputs)


def test_row_inputs_refuse_an_unknown_row() -> None:
    ids = torch.tensor([[1, 2, 3]])
    row_inputs = RowInputs.of(ids, ids > 0, [{}])
    with pytest.raises(ValueError, match="a row that is none of the step's"):
        row_inputs.of_rows(ids + 1, ids > 0)


def test_row_inputs_lay_token_types_out_again() -> None:
    """Rows of a narrower micro-batch are padded on the right, and a pass leaves out the last column."""
    ids = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
    types = [{"token_type_ids": torch.tensor([[0, 1, 0]])}, {"token_type_ids": torch.tensor([[1, 0, 0, 1, 1]])}]
    row_inputs = RowInputs.of(ids, ids > 0, types)
    joined = row_inputs.of_rows(ids[:, :-1], ids[:, :-1] > 0)["token_type_ids"]
    assert joined.tolist() == [[0, 1, 0, 0], [1, 0, 0, 1]]
