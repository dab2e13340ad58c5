"""One look for all figures, and files that are the same each time they are drawn."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from kwta_exp.storage import write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
"""The numbers of a figure, with the same keys in each: what its CSV file holds."""

Drawing: TypeAlias = "tuple[Figure, Rows]"

STYLE = Path(__file__).with_name("kwta_exp.mplstyle")

COLOURS = {"relu": "#000000", "lwta": "#009E73", "kwta": "#0072B2"}
"""An activation's colour in every figure, from Okabe and Ito's palette for the colour-blind."""

WARNING = "#D55E00"
"""What is left in the worst case, beside what plain PGD leaves."""

OTHER = "#CC79A7"
"""What is none of the project's activations, such as max-pooling."""


@contextmanager
def styled() -> Iterator[None]:
    """Draw in this context, without a display."""
    import matplotlib as mpl

    with mpl.rc_context(fname=str(STYLE)):
        yield


def drawn(figure: "Figure", kind: str) -> bytes:
    """The figure as a file of this kind, ``"svg"`` or ``"png"``."""
    content = io.BytesIO()
    with styled():
        figure.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else {})
    return content.getvalue()


def inline_svg(figure: "Figure") -> str:
    """The ``<svg>`` element alone, for a page."""
    text = drawn(figure, "svg").decode()
    return text[text.index("<svg") :]


def save(figure: "Figure", path: Path, rows: Sequence[Mapping[str, Any]] | None) -> list[Path]:
    """Write a figure as SVG and PNG, and its numbers as CSV.

    Args:
        figure: to write.
        path: of the files, without a suffix.
        rows: the numbers that are drawn, with the same keys in each; ``None`` to write none.
    """
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in ("svg", "png", "csv")]
    for file in files[:2]:
        write_bytes(file, drawn(figure, file.suffix[1:]))
    if rows is None:
        return files[:2]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(files[2], text.getvalue())
    return files
