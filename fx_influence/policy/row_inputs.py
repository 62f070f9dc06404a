"""Further inputs of a model's forward that belong to single rows, such as the images that a prompt shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PER_TOKEN = frozenset(("token_type_ids", "mm_token_type_ids"))
"""Inputs with one value for each token of a row, (1, T); all others are joined along their first axis."""

Row = tuple[tuple[int, ...], tuple[bool, ...]]
"""Tokens of a row from its first attended one to its last, and which of them are attended."""


@dataclass(frozen=True, eq=False)
class RowInputs:
    """Inputs of a forward beside tokens and mask, found by the tokens of a row.

    A pass may take rows in any order and number; the tokens tell which row it has, so rows of equal tokens must have
    equal inputs. It is no function under ``vmap``, where no token can be read.

    Attributes:
        by_row: a row's tokens -> tensors by name, on any device; a row without images has none.
        width: T, number of the batch's columns. Narrower rows than T - 1 are probes of the model's structure, which
            read tokens alone.
    """

    by_row: Mapping[Row, Mapping[str, Tensor]]
    width: int

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor, inputs: Sequence[Mapping[str, Tensor]]) -> RowInputs:
        """Return the inputs of the rows of a batch.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T).
            inputs: B mappings of tensors by name.

        Raises:
            ValueError: two rows have equal tokens and other inputs.

        Example:
            >>> ids = torch.tensor([[1, 2, 4], [1, 3, 4]])
            >>> inputs = RowInputs.of(ids, ids > 0, [{"pixels": torch.zeros(1, 3)}, {}])
            >>> {name: x.shape for name, x in inputs.of_rows(ids, ids > 0).items()}
            {'pixels': torch.Size([1, 3])}
        """
        by_row: dict[Row, Mapping[str, Tensor]] = {}
        # Passes leave out the last column, whose token is scored and scores nothing.
        keys = [*_rows(input_ids, attention_mask), *_rows(input_ids[:, :-1], attention_mask[:, :-1])]
        for row, tensors in zip(keys, [*inputs, *inputs], strict=True):
            if not _equal(by_row.setdefault(row, tensors), tensors):
                raise ValueError(
                    "two rollouts have the same tokens and other images; expected other tokens, by which passes tell "
                    "rows apart. Measure with prompts that differ, or with longer completions"
                )
        return cls(by_row, input_ids.shape[1])

    def of_rows(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Return the forward's inputs by name for some of the rows, (b, T) each.

        Raises ``ValueError`` for a row that is none of the batch.
        """
        if input_ids.shape[1] < self.width - 1:
            return {}
        rows = _rows(input_ids, attention_mask)
        if any(row not in self.by_row for row in rows):
            raise ValueError("a pass has a row that is none of the step's; expected its rollouts, with their images")
        parts = [self.by_row[row] for row in rows]
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: _joined(name, [x[name] for x in parts if name in x], input_ids) for name in names}


def _joined(name: str, tensors: list[Tensor], input_ids: Tensor) -> Tensor:
    """Return one input of several rows, on the device of their tokens."""
    if name in PER_TOKEN:
        tensors = [torch.nn.functional.pad(x, (0, input_ids.shape[1] - x.shape[1])) for x in tensors]
    return torch.cat(tensors).to(input_ids.device)


def _rows(input_ids: Tensor, attention_mask: Tensor) -> list[Row]:
    rows = []
    for ids, mask in zip(input_ids.tolist(), attention_mask.bool().tolist(), strict=True):
        begin = mask.index(True) if any(mask) else 0
        end = len(mask) - mask[::-1].index(True) if any(mask) else 0
        rows.append((tuple(ids[begin:end]), tuple(mask[begin:end])))
    return rows


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
