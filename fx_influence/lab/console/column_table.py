"""A table for a terminal of any width: numbers and names stay complete, texts are shortened, columns move below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from fx_influence.core.display import printable

Kind = Literal["name", "number", "text"]

MIN_TEXT, MIN_NAME = 10, 16
"""Smallest width in terminal cells of a text, and of a name before it is folded."""
PADDING = 3
"""Cells of a column beside its content: a blank on either side and a line; the table has one line more."""


class Column(NamedTuple):
    """Title of a column and the kind of its cells.

    ``number``: on one line, complete. ``name``: complete, folded where it is long. ``text``: on one line, shortened
    at its end to the width that is left.
    """

    title: str
    kind: Kind = "number"


@dataclass(frozen=True)
class ColumnTable:
    """Rows under a title, laid out for the width that they are printed at.

    If the columns do not fit at their smallest widths, the last of them move to further tables below, each of which
    begins with the first column again. A column without any content is omitted. ``rows``: cells as text, printed
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
        limits = [_WidthLimits.of(column, [row[k] for row in self.rows]) for k, column in enumerate(self.columns)]
        nonempty = [k for k in range(len(limits)) if k == 0 or any(row[k] for row in self.rows)]
        for i, group in enumerate(_column_groups(nonempty, limits, options.max_width)):
            title = self.title if i == 0 else f"{self.title} (continued)"
            yield self._table(title, group, _widths([limits[k] for k in group], options.max_width))

    def _table(self, title: str, group: Sequence[int], widths: Sequence[int]) -> Table:
        table = Table(title=Text(title), title_justify="left")
        for k, width in zip(group, widths, strict=True):
            column = self.columns[k]
            table.add_column(
                Text(column.title),
                width=width,
                justify="right" if column.kind == "number" else "left",
                overflow="ellipsis" if column.kind == "text" else "fold",
                no_wrap=column.kind == "text",
            )
        for row in self.rows:
            table.add_row(*(_cell(row[k]) for k in group))
        return table


class _WidthLimits(NamedTuple):
    """Width in cells below which a column is unreadable, and beyond which it gains nothing."""

    smallest: int
    largest: int

    @classmethod
    def of(cls, column: Column, cells: Sequence[str | Text]) -> _WidthLimits:
        content = max((_cell(cell).cell_len for cell in cells), default=0)
        word = max((cell_len(word) for word in column.title.split()), default=0)
        smallest = {"number": content, "name": min(content, MIN_NAME), "text": min(content, MIN_TEXT)}[column.kind]
        return cls(max(smallest, word), max(content, cell_len(column.title)))


def _column_groups(columns: Sequence[int], limits: Sequence[_WidthLimits], width: int) -> list[list[int]]:
    """Split column numbers into tables that fit ``width``, each beginning with the first column."""
    groups = [[columns[0]]]
    for k in columns[1:]:
        remaining = width - 1 - sum(limits[j].smallest + PADDING for j in groups[-1])
        if remaining < limits[k].smallest + PADDING and len(groups[-1]) > 1:
            groups.append([columns[0]])
        groups[-1].append(k)
    return groups


def _widths(limits: Sequence[_WidthLimits], width: int) -> list[int]:
    """Return the smallest widths, widened a cell at a time in turn until the table is full or no column gains."""
    widths = [limit.smallest for limit in limits]
    remaining = width - 1 - sum(w + PADDING for w in widths)
    while remaining > 0 and (narrow := [k for k, limit in enumerate(limits) if widths[k] < limit.largest]):
        for k in narrow[:remaining]:
            widths[k] += 1
        remaining -= len(narrow[:remaining])
    return widths


def _cell(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text(printable(cell))
