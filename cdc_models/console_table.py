"""A table of figures for a terminal of any width."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

__all__ = ["ConsoleTable"]

GAP = 2  # between two columns


class ConsoleTable:
    """A table whose cells stay whole: columns that do not fit beside each other follow below, with the labels again.

    Args:
        title: stands above.
        head: a name for each column; long ones are broken at spaces.
        body: lines of as many cells.
        labels: how many of the first columns say what a line is; the others hold figures.
    """

    def __init__(self, title: str, head: Sequence[str], body: Sequence[Sequence[str]], labels: int = 1) -> None:
        self.title, self.head, self.body, self.labels = title, head, body, labels

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = zip(self.head, *self.body, strict=True)
        widths = [max(map(cell_len, [*name.split(), *cells])) for name, *cells in columns]
        labels = list(range(self.labels))
        parts: list[list[int]] = []
        for i in range(self.labels, len(widths)):
            if not parts or sum(widths[j] + GAP for j in [*parts[-1], i]) - GAP > options.max_width:
                parts.append(labels.copy())
            parts[-1].append(i)
        for part in parts:
            table = Table(
                title=self.title if part is parts[0] else None,
                title_justify="left",
                box=box.SIMPLE_HEAD,
                show_edge=False,
                pad_edge=False,
                collapse_padding=True,
            )
            for i in part:
                table.add_column(
                    self.head[i], justify="left" if i in labels else "right", width=widths[i], overflow="fold"
                )
            for line in self.body:
                table.add_row(*(line[i] for i in part))
            yield table
            yield ""
