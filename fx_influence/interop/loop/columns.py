"""Layouts of a micro-batch's rollouts in its tensors: rows padded to one width, or packed one after another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PaddedColumns(NamedTuple):
    """Rows (B, T), one rollout each, whose values belong to the tokens on the right: (B, T_c) to the last T_c columns.

    Example:
        >>> PaddedColumns(1, 4).to_rows(torch.tensor([[1.0, 2.0]])).tolist()
        [[0.0, 0.0, 1.0, 2.0]]
    """

    num_rows: int
    width: int

    def to_rows(self, values: Tensor) -> Tensor:
        """Return values of tokens as rows (B, T), 0 where there are none."""
        if values.dim() != 2 or len(values) != self.num_rows or values.shape[1] > self.width:
            raise ValueError(
                f"a value for each token has shape {tuple(values.shape)}; expected ({self.num_rows}, T_c) with T_c at "
                f"most {self.width}, the columns of input_ids. Pass those of the tokens on the right"
            )
        return torch.nn.functional.pad(values, (self.width - values.shape[1], 0))


class PackedColumns(NamedTuple):
    """Rollouts one after another in (N,) or (1, N), without padding; rows (R, T) are made of them, padded on the right.

    ``starts``: the first token of each rollout and, last, N; all on the CPU.

    Example:
        >>> PackedColumns.from_starts(torch.tensor([0, 2, 5]), 5).to_rows(torch.arange(1, 6)).tolist()
        [[1, 2, 0], [3, 4, 5]]
    """

    starts: tuple[int, ...]

    @classmethod
    def from_starts(cls, cu_seqlens: Tensor, total: int) -> PackedColumns:
        """Return the columns from cumulative lengths (R + 1,), from 0 to the number of tokens, ``total``."""
        starts = cu_seqlens.tolist()
        if len(starts) < 2 or starts[0] != 0 or starts[-1] != total or sorted(set(starts)) != starts:
            raise ValueError(
                f"cu_seqlens is {starts}; expected increasing integers from 0 to {total}, the number of tokens. Pass "
                "the cumulative lengths of the rollouts"
            )
        return cls(tuple(starts))

    @classmethod
    def from_positions(cls, position_ids: Tensor) -> PackedColumns:
        """Return the columns from position ids, which begin anew at 0 with each rollout."""
        positions = position_ids.flatten()
        starts = (positions == 0).nonzero().flatten().cpu()
        return cls.from_starts(torch.cat([starts, torch.tensor([len(positions)])]), len(positions))

    def to_rows(self, values: Tensor) -> Tensor:
        """Return values of tokens as rows (R, T), 0 where there are none; fewer than N are those on the right."""
        flat, total = values.flatten(), self.starts[-1]
        if len(flat) > total:
            raise ValueError(
                f"a value for each token has shape {tuple(values.shape)}; expected at most {total} values, as "
                "input_ids has. Pass those of the tokens on the right"
            )
        flat = torch.nn.functional.pad(flat, (total - len(flat), 0))
        rows = [flat[start:end] for start, end in zip(self.starts, self.starts[1:], strict=False)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


Columns = PaddedColumns | PackedColumns
"""Either layout of a micro-batch."""
