"""One look for all figures, and files that are the same each time they are drawn."""

import csv
import io
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from kwta_exp.storage import write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.axis import XAxis, YAxis
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
"""The numbers of a figure, with the same keys in each: what its CSV file holds."""

Drawing: TypeAlias = "tuple[Figure, Rows]"

STYLE = Path(__file__).with_name("kwta_exp.mplstyle")

COLOURS = {"relu": "#000000", "lwta": "#009E73", "kwta": "#0072B2"}
"""An activation's colour in every figure, from Okabe and Ito's palette for the colour-blind."""

SHOWN_AS = {
    "relu": "ReLU", "lwta": "LWTA", "kwta": "k-WTA", "lwta_stochastic": "stochastic LWTA",
    "mean_sparse": "MeanSparse",
}  # fmt: skip
"""An activation's name in every figure."""

WARNING = "#D55E00"
"""What is left in the worst case, beside what plain PGD leaves."""

OTHER = "#CC79A7"
"""What is none of the project's activations, such as max-pooling."""


_PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
_DASHES = ((None, None), (4, 1.5), (1, 1), (5, 1, 1, 1))
_MARKERS = "os^Dv<>P"


def look(number: int) -> dict[str, Any]:
    """Colour, dashes and marker of the curve ``number``, for things that have no colour of their own."""
    return {
        "color": _PALETTE[number % len(_PALETTE)], "dashes": _DASHES[number % len(_DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)],
    }  # fmt: skip


def look_of(activation: str, number: int) -> dict[str, Any]:
    """The same of the curve ``number``, in the colour of its activation."""
    family = activation.partition("_")[0]
    return look(number) | {"color": COLOURS.get(activation, COLOURS.get(family, "#777777"))}


def named(results: Mapping[str, Any]) -> str:
    """What an evaluation was of, in a few words, for a title."""
    run, threat = results["run"], results["threat"]
    return f"{run['name']}, {threat['norm'].replace('linf', 'L-inf').replace('l2', 'L2')} {threat['eps']:.3g}"


_LONGEST_TITLE = 216


def titled(figure: "Figure", text: str) -> None:
    """Give a figure of one column a title that fits."""
    figure.suptitle(textwrap.fill(text[:_LONGEST_TITLE], 54), fontsize=8, x=0.02, ha="left")


def logarithmic(axis: "XAxis | YAxis") -> None:
    """Make an axis logarithmic, with plain numbers at its powers of ten."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_formatter("{x:,g}")  # the usual formatter sets powers as formulas, which takes long
    axis.set_minor_formatter("")


def span(numbers: Iterable[int]) -> str:
    """The number, or the least and the largest, such as ``27 to 47``."""
    found = sorted(set(numbers))
    return " to ".join(map(str, dict.fromkeys((found[0], found[-1]))))


@contextmanager
def styled() -> Iterator[None]:
    """Draw in this context, without a display."""
    import matplotlib as mpl

    with mpl.rc_context(fname=str(STYLE)):
        yield


def drawn(figure: "Figure", kind: str) -> bytes:
    """The figure as a file of this kind, ``"svg"`` or ``"png"``."""
    content = io.BytesIO()
    with styled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a name in a script that the font lacks
        figure.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else {})
    return content.getvalue()


def inline_svg(figure: "Figure", prefix: str = "") -> str:
    """The ``<svg>`` element alone, for a page.

    Args:
        figure: to draw.
        prefix: of its names, so that several figures of a page have none in common.
    """
    text = drawn(figure, "svg").decode()
    text = text[text.index("<svg") :]
    for before in (' id="', 'href="#', "url(#"):
        text = text.replace(before, before + prefix)
    return text


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
