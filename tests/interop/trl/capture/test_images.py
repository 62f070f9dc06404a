"""Images of a micro-batch are cut by rollouts as the trainer's scoring cuts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fx_influence.interop.trl.capture.images import images_of_rows

COUNTS = [2, 0, 1]
"""Numbers of images of three rollouts."""


def numbered(count: int) -> Tensor:
    return torch.arange(count).float()[:, None]


CASES: dict[str, tuple[dict[str, Any], list[list[float]]]] = {
    "grid": (
        {"image_grid_thw": torch.tensor([[1, 2, 1], [1, 1, 1], [1, 3, 1]]), "pixel_values": numbered(6)},
        [[0, 1, 2], [], [3, 4, 5]],
    ),
    "images": ({"pixel_values": numbered(3)}, [[0, 1], [], [2]]),
    "tiles": ({"pixel_values": numbered(5), "num_tiles": [3, 0, 2]}, [[0, 1, 2], [], [3, 4]]),
    "shapes": (
        {"pixel_values": numbered(5), "spatial_shapes": numbered(5), "num_tiles": [3, 0, 2]},
        [[0, 1, 2], [], [3, 4]],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_images_are_cut_by_rollouts(case: str) -> None:
    inputs, expected = CASES[case]
    rows = images_of_rows({"prompt_ids": torch.zeros(3, 2), "num_images": COUNTS, **inputs})
    assert rows is not None
    assert [row["pixel_values"].flatten().tolist() if row else [] for row in rows] == expected
    for name in inputs.keys() - {"num_tiles"}:
        assert torch.equal(torch.cat([row[name] for row in rows if name in row]), inputs[name])


def test_a_row_of_pixels_for_each_rollout_is_its_share() -> None:
    inputs = {"prompt_ids": torch.zeros(2, 2), "pixel_values": torch.arange(4.0).reshape(2, 2), "num_images": [2, 1]}
    rows = images_of_rows({**inputs, "pixel_attention_mask": torch.ones(2, 2)})
    assert rows is not None
    assert [row["pixel_values"].tolist() for row in rows] == [[[0.0, 1.0]], [[2.0, 3.0]]]


def test_texts_alone_have_no_images() -> None:
    assert images_of_rows({"prompt_ids": torch.zeros(2, 2)}) is None
