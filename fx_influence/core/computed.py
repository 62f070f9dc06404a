"""Tensors by name that are made new at each access, so that one at a time is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from torch import Tensor

Value = TypeVar("Value")


class ComputedTensors(Mapping[str, Tensor]):
    """Tensors by parameter name, computed at each access: dequantised, or gathered from the parts of all processes.

    Args:
        reads: by name, a function that returns the tensor.
        layout: by name, a tensor on the meta device, of shape and dtype of what ``reads`` returns. It is given where
            reading is a collective whose result is the same on every process; None otherwise.

    Example:
        >>> import torch
        >>> codes = torch.tensor([0, 2], dtype=torch.uint8)
        >>> moments = ComputedTensors({"w": lambda: 0.5 * codes.float()})
        >>> list(moments), moments["w"].tolist()
        (['w'], [0.0, 1.0])
    """

    def __init__(self, reads: Mapping[str, Callable[[], Tensor]], layout: Mapping[str, Tensor] | None = None) -> None:
        self._reads, self.layout = dict(reads), layout

    def __getitem__(self, name: str) -> Tensor:
        return self._reads[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._reads

    def __iter__(self) -> Iterator[str]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)


def layout_of(tree: Mapping[str, Value]) -> Mapping[str, Value | Tensor]:
    """Return tensors of the same names, shapes and dtypes, without a collective: those of ``tree`` unless it has one.

    Example:
        >>> layout_of({"w": 1.0})
        {'w': 1.0}
    """
    layout = tree.layout if isinstance(tree, ComputedTensors) else None
    return tree if layout is None else layout
