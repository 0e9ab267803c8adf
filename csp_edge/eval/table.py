"""Tables, for a terminal and for Markdown."""

from dataclasses import dataclass, field
from typing import TypeAlias

Rows: TypeAlias = list[list[str]]


@dataclass(frozen=True, slots=True)
class Table:
    """A title, a line of column names, lines of cells as long as that, and notes below."""

    title: str
    columns: list[str]
    rows: Rows
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """For a terminal: the first column to the left, numbers to the right."""
        lines = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        body = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in lines
        ]
        return "\n".join([self.title, *body, *self.notes])

    def markdown(self) -> str:
        """For a page, without a title."""
        rule = ["---"] + ["---:"] * (len(self.columns) - 1)
        lines = [self.columns, rule, *self.rows]
        body = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        ]
        return "\n".join(body + [f"\n{note}" for note in self.notes])
