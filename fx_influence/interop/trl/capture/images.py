"""The images of each rollout of a micro-batch of TRL, as inputs of the model's forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

IMAGE_INPUTS = (
    *("pixel_values", "image_grid_thw", "image_position_ids", "spatial_shapes", "pixel_attention_mask"),
    *("image_sizes", "token_type_ids", "mm_token_type_ids"),
)
"""Trainer's inputs that its scoring passes on to the model's forward (trl 1.16)."""

IMAGE_COUNTS = ("num_images", "num_tiles")
"""Trainer's inputs with numbers for each rollout, which the scoring cuts ``IMAGE_INPUTS`` by."""


def images_of_rows(inputs: Mapping[str, Any]) -> tuple[Mapping[str, Tensor], ...] | None:
    """Return each rollout's share of the image inputs by name, None where the micro-batch shows no image.

    They are cut as in ``GRPOTrainer._get_per_token_logps_and_entropies``: by patches where images have a grid, by
    tiles, by images or by rows.

    Args:
        inputs: of the trainer's ``compute_loss``.
    """
    if inputs.get("pixel_values") is None:
        return None
    count, pixels = len(inputs["prompt_ids"]), inputs["pixel_values"]
    rows = list(range(count + 1))
    images = _offsets(inputs.get("num_images"), rows)
    tiles = _offsets(inputs.get("num_tiles"), images)
    starts = dict.fromkeys(("image_grid_thw", "image_position_ids", "image_sizes"), images)
    starts |= {"pixel_values": rows, "pixel_attention_mask": rows, "spatial_shapes": tiles}
    if inputs.get("image_grid_thw") is not None:
        patches = [0, *accumulate(inputs["image_grid_thw"].prod(-1).tolist())]
        starts["pixel_values"] = [patches[image] for image in images]
    elif inputs.get("spatial_shapes") is not None:
        starts |= {"pixel_values": tiles, "pixel_attention_mask": tiles}
    elif inputs.get("num_tiles") is not None:
        starts["pixel_values"] = tiles
    elif inputs.get("image_position_ids") is not None or len(pixels) == images[-1]:
        starts["pixel_values"] = images
    present = {name: inputs[name] for name in IMAGE_INPUTS if inputs.get(name) is not None}
    cuts = {name: (x, starts.get(name, rows)) for name, x in present.items()}
    parts = ({name: x[cut[k] : cut[k + 1]] for name, (x, cut) in cuts.items()} for k in range(count))
    return tuple({name: x for name, x in part.items() if len(x)} for part in parts)


def _offsets(counts: Tensor | Sequence[int] | None, otherwise: list[int]) -> list[int]:
    """Return where the share of each rollout begins, and where the last one ends."""
    if counts is None:
        return otherwise
    return [0, *accumulate(counts.tolist() if isinstance(counts, torch.Tensor) else counts)]
