"""Prompts of the rows of a batch: where they are, which are equal, and whether rows that share one are grouped."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fx_influence.types import Batch


def prompt_index(batch: Batch) -> Tensor:
    """Return the index of every row's prompt, int64 (B,): rows with equal prompts have equal indices.

    A prompt is the attended tokens before the first completion token, wherever the padding is.

    Example:
        >>> ids = torch.tensor([[0, 7, 8, 1], [7, 8, 2, 0], [7, 9, 1, 0]])
        >>> completion = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 1, 0]]).bool()
        >>> prompt_index(Batch(ids, ids > 0, completion)).tolist()
        [0, 0, 1]
    """
    begin, first = prompt_bounds(batch)
    width = batch.input_ids.shape[1]
    columns = begin.unsqueeze(1) + torch.arange(width, device=batch.input_ids.device)
    inside = columns.clamp(max=width - 1)
    outside = (columns >= first.unsqueeze(1)) | ~batch.attention_mask.gather(1, inside)
    return torch.unique(batch.input_ids.gather(1, inside).masked_fill(outside, -1), dim=0, return_inverse=True)[1]


def prompt_bounds(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the columns (B,) of each row's first attended token and first completion token.

    A row without such a token has the width of the batch instead.
    """
    width = batch.input_ids.shape[1]
    columns = torch.arange(width, device=batch.input_ids.device)
    begin, first = (torch.where(mask, columns, width).amin(1) for mask in (batch.attention_mask, batch.completion_mask))
    return begin, first


def warn_of_shared_prompts(field: str, batch: Batch, calls: int = 2) -> None:
    """Warn if rows share prompts and no ``group`` says whether they are one draw.

    Completions of one prompt are dependent. Error bars that take them for independent draws are too small, by about
    the square root of their number; only who drew the prompts knows whether equal ones were drawn once.

    Args:
        field: name of the batch, for the message.
        batch: (B, T).
        calls: number of calls up the stack of the library's caller, whose line the warning shows.
    """
    if batch.group is not None:
        return
    rows, prompts = len(batch.input_ids), len(torch.unique(prompt_index(batch)))
    if prompts < rows:
        warnings.warn(
            f"{field}.group is None and {rows} rows have {prompts} distinct prompts; expected the prompt of each row, "
            "since completions of one prompt move together. The error bars take every row for a draw of its own and "
            f"are too small unless it is: pass {field}._replace(group=...), int64 ({rows},), equal where a prompt was "
            "drawn once, or torch.arange there if every row's prompt was drawn anew",
            UserWarning,
            stacklevel=calls + 1,
        )
