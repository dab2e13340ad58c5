"""A table as text for a terminal, CSV, Markdown or HTML."""

import csv
import html
import io
from collections.abc import Callable, Sequence

from kwta_exp.errors import printable
from kwta_exp.report.summary import Table

SPACE = "  "


def text(table: Table) -> str:
    """Aligned columns."""
    lines = [table.title, *aligned([table.columns, *_cells(table)]), *table.notes]
    return "\n".join(map(printable, lines))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines with aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        SPACE.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def markdown(table: Table) -> str:
    """A Markdown table; cells cannot break out of it."""

    def line(cells: Sequence[str]) -> str:
        escaped = (cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in cells)
        return f"| {' | '.join(escaped)} |"

    header = [line(table.columns), f"|{' --- |' * len(table.columns)}"]
    notes = [f"- {note}" for note in table.notes]
    return "\n".join([f"**{table.title}**", "", *header, *map(line, _cells(table)), "", *notes])


def as_csv(table: Table) -> str:
    """Unrounded numbers, shares from 0 to 1; the bounds of intervals are columns of their own."""
    columns = list(dict.fromkeys(key for values in table.values for key in values))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: "" if value is None else _not_a_formula(value) for key, value in values.items()}
        for values in table.values
    )
    return out.getvalue().rstrip("\n")


def _not_a_formula(value: object) -> object:
    """Spreadsheets run text that begins like a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def as_html(table: Table) -> str:
    """A table element; all text is escaped."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    body = "\n".join(line(cells, "td") for cells in _cells(table))
    return (
        f"<table>\n<caption>{html.escape(table.title)}</caption>\n<thead>\n{line(table.columns, 'th')}\n"
        f"</thead>\n<tbody>\n{body}\n</tbody>\n</table>\n<ul>{notes}</ul>"
    )


FORMATS: dict[str, Callable[[Table], str]] = {
    "text": text, "csv": as_csv, "markdown": markdown, "html": as_html,
}  # fmt: skip


def _cells(table: Table) -> list[list[str]]:
    return [[row.get(column, "") for column in table.columns] for row in table.rows]
