"""How often networks jump inside the ball around an image, and how many of their units take part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kwta_exp.analysis.pieces import Pieces
from kwta_exp.draw.style import COLOURS, Drawing, styled


@dataclass(frozen=True)
class Jumps:
    """What was found of one network.

    Attributes:
        activation: the option, which decides the colour.
        lines: the pieces along one line for each image.
        fires: share of the units that are not zero for some test image.
        flips: share of those that fire for some and not for others.
        n: test images that these shares are over.
    """

    activation: str
    lines: Sequence[Pieces]
    fires: float
    flips: float
    n: int


def draw(found: Mapping[str, Jumps], eps: float) -> Drawing:
    """Discontinuities a unit of length, a dot for each image; and the share of units that fire and flip.

    Args:
        found: by the network's name to show.
        eps: each line goes from ``-eps`` to ``eps`` along random signs.
    """
    rows: list[dict[str, Any]] = [
        {
            "network": name, "image": image, "length": line.length, "pattern_changes": len(line.changes),
            "discontinuities": len(line.discontinuities), "discontinuities_per_unit": line.density,
            "cells": line.cells, "fires": jumps.fires, "flips": jumps.flips,
        }
        for name, jumps in found.items()
        for image, line in enumerate(jumps.lines)
    ]  # fmt: skip
    with styled():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.9, 0.9 + 0.28 * len(found)))
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        for place, jumps in enumerate(found.values()):
            densities = sorted(line.density for line in jumps.lines)
            colour = COLOURS.get(jumps.activation, "#777777")
            left.plot(densities, [place] * len(densities), "o", color=colour, alpha=0.6, markeredgewidth=0)
            middle = densities[len(densities) // 2]
            left.annotate(
                f"{middle:,.0f}", (max(densities), place), (4, 0), textcoords="offset points", va="center",
                fontsize=7,
            )  # fmt: skip
            right.barh(place - 0.18, 100 * jumps.fires, 0.34, color=colour)
            right.barh(
                place + 0.18, 100 * jumps.flips, 0.34, color="#ffffff", edgecolor=colour, hatch="/////",
                linewidth=0.8,
            )  # fmt: skip
        left.set_yticks(range(len(found)), list(found))
        left.invert_yaxis()
        left.set_xscale("symlog", linthresh=1)
        left.xaxis.set_major_formatter("{x:,g}")
        most = max(line.density for jumps in found.values() for line in jumps.lines)
        left.set_xlim(-0.3, 5 * max(1, most))
        images = max(len(jumps.lines) for jumps in found.values())
        left.set_xlabel("discontinuities a unit of L-inf distance")
        left.set_title(f"within eps {eps:.3g} of {images} images; numbers: medians", loc="left")
        right.set_xlim(0, 100)
        right.set_xlabel(f"units (%), over {next(iter(found.values())).n} images")
        right.set_title("fire (solid), flip (hatched)", loc="left")
    return figure, rows
