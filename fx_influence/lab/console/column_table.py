"""A table for a terminal of any width: numbers and names stay complete, texts give way, columns move below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

Kind = Literal["name", "number", "text"]

LEAST_TEXT, LEAST_NAME = 10, 16
"""Cells that a text, and a name before it is folded, are given at least."""
PADDING = 3
"""Cells of a column beside its content: a blank on either side and a line; the table has one line more."""


def printable(text: str) -> str:
    """Untrusted text with every character that is not printable (controls, escapes, bidirectional marks) escaped.

    Example:
        >>> printable("a\\x1b[31m\\u202eb")
        'a\\\\x1b[31m\\\\u202eb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


class Column(NamedTuple):
    """One column: its title, and what its cells are.

    ``number``: on one line, complete. ``name``: complete, folded where it is long. ``text``: on one line, its end left
    out where there is no room.
    """

    title: str
    kind: Kind = "number"


@dataclass(frozen=True)
class ColumnTable:
    """Rows under a title, laid out for the width that they are printed at.

    Where even the least widths of the columns do not fit, those that are too many stand in further tables below, each
    beginning with the first column again. A column without any content is left out. ``rows``: cells as text, printed
    literally, or as ``rich`` ``Text``.

    Example:
        >>> from rich.console import Console
        >>> rows = [("train-1/0", "+1.2346e-05"), ("train-1/1", "-9.8765e-12")]
        >>> table = ColumnTable("Influences", (Column("id", "name"), Column("nats per unit lr")), rows)
        >>> Console(width=30).print(table)  # doctest: +NORMALIZE_WHITESPACE
        Influences
        ┏━━━━━━━━━━━┳━━━━━━━━━━━━━━━━┓
        ┃           ┃  nats per unit ┃
        ┃ id        ┃             lr ┃
        ┡━━━━━━━━━━━╇━━━━━━━━━━━━━━━━┩
        │ train-1/0 │    +1.2346e-05 │
        │ train-1/1 │    -9.8765e-12 │
        └───────────┴────────────────┘
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str | Text]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        sizes = [_Size.of(column, [row[k] for row in self.rows]) for k, column in enumerate(self.columns)]
        shown = [k for k in range(len(sizes)) if k == 0 or any(row[k] for row in self.rows)]
        for i, part in enumerate(_parts(shown, sizes, options.max_width)):
            title = self.title if i == 0 else f"{self.title} (continued)"
            yield self._table(title, part, _widths([sizes[k] for k in part], options.max_width))

    def _table(self, title: str, part: Sequence[int], widths: Sequence[int]) -> Table:
        table = Table(title=Text(title), title_justify="left")
        for k, width in zip(part, widths, strict=True):
            column = self.columns[k]
            table.add_column(
                Text(column.title),
                width=width,
                justify="right" if column.kind == "number" else "left",
                overflow="ellipsis" if column.kind == "text" else "fold",
                no_wrap=column.kind == "text",
            )
        for row in self.rows:
            table.add_row(*(_cell(row[k]) for k in part))
        return table


class _Size(NamedTuple):
    """Cells of a column: those it can do with, and those it would use."""

    least: int
    most: int

    @classmethod
    def of(cls, column: Column, cells: Sequence[str | Text]) -> _Size:
        content = max((_cell(cell).cell_len for cell in cells), default=0)
        word = max((cell_len(word) for word in column.title.split()), default=0)
        most = max(content, cell_len(column.title))
        least = {"number": content, "name": min(content, LEAST_NAME), "text": min(content, LEAST_TEXT)}[column.kind]
        return cls(max(least, word), most)


def _parts(shown: Sequence[int], sizes: Sequence[_Size], width: int) -> list[list[int]]:
    """The columns of each table that fits ``width``, by number; all begin with the first of them."""
    step_terms = [[shown[0]]]
    for k in shown[1:]:
        room = width - 1 - sum(sizes[j].least + PADDING for j in step_terms[-1])
        if room < sizes[k].least + PADDING and len(step_terms[-1]) > 1:
            step_terms.append([shown[0]])
        step_terms[-1].append(k)
    return step_terms


def _widths(sizes: Sequence[_Size], width: int) -> list[int]:
    """Least widths, and what is left over to each column in turn that would use more, a cell at a time."""
    widths = [size.least for size in sizes]
    left = width - 1 - sum(w + PADDING for w in widths)
    while left > 0 and (wanting := [k for k, size in enumerate(sizes) if widths[k] < size.most]):
        for k in wanting[:left]:
            widths[k] += 1
        left -= len(wanting[:left])
    return widths


def _cell(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text(printable(cell))
