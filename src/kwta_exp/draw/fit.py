"""The 1-D fit: a k-WTA network and a ReLU network through the same points of a curve."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kwta_exp.analysis.fit import DOMAIN, Fit, curve, points
from kwta_exp.draw.style import COLOURS, SHOWN_AS, WARNING, Drawing, styled


def draw(fits: Mapping[str, Fit], n: int) -> Drawing:
    """The fits side by side, with a mark at each discontinuity below, and a tenth of the domain enlarged.

    Args:
        fits: by the activation's option, such as ``"kwta"``.
        n: points that they were fitted to.
    """
    rows: list[dict[str, Any]] = []
    x, y = points(n)
    for name, fit in fits.items():
        found = {"curve": (fit.x, curve(fit.x)), "point": (x, y), "network": (fit.x, fit.y)}
        for what, (at, values) in found.items():
            pairs = zip(at.tolist(), values.tolist(), strict=True)
            rows += [{"activation": name, "what": what, "x": a, "y": b} for a, b in pairs]
        rows += [
            {"activation": name, "what": "discontinuity", "x": at, "y": jump}
            for at, jump in zip(fit.pieces.changes.tolist(), fit.pieces.jumps.tolist(), strict=True)
            if at in fit.pieces.discontinuities
        ]
    with styled():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.9, 3.6))
        axes = figure.subplots(2, len(fits), sharey="row", squeeze=False)
        for column, (name, fit) in enumerate(fits.items()):
            for axis in axes[:, column]:
                axis.plot(fit.x, curve(fit.x), color="#777777", dashes=(1, 1.5), label="curve")
                _plot(axis, fit, COLOURS[name])
                axis.plot(x, y, "o", color=WARNING, label="training points", zorder=3)
            count, shown = len(fit.pieces.discontinuities), SHOWN_AS.get(name, name)
            axes[0, column].set_title(
                f"{shown}: {count} discontinuities, {fit.pieces.density:.3g} a unit of length", loc="left"
            )
            low, high = 0.0, (DOMAIN[1] - DOMAIN[0]) / 10
            inside = ((fit.pieces.discontinuities >= low) & (fit.pieces.discontinuities <= high)).sum()
            axes[1, column].set_xlim(low, high)
            axes[1, column].set_title(f"enlarged: {inside} discontinuities", loc="left")
            axes[1, column].set_xlabel("x")
        within = (x >= 0) & (x <= (DOMAIN[1] - DOMAIN[0]) / 10)
        middle = float(y[within].mean()) if within.any() else 0.0
        axes[1, 0].set_ylim(middle - 0.9, middle + 0.9)
        for axis in axes[:, 0]:
            axis.set_ylabel("f(x)")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure, rows


def _plot(axis: Any, fit: Fit, colour: str) -> None:
    """The function, broken at its discontinuities, and a mark below each of these."""
    jumps = fit.pieces.discontinuities
    x = np.concatenate([fit.x.numpy(), jumps])
    y = np.concatenate([fit.y.numpy(), np.full(len(jumps), np.nan)])
    order = np.argsort(x, kind="stable")
    axis.plot(x[order], y[order], color=colour, linewidth=0.9, label="network")
    if len(jumps):
        axis.plot(
            jumps, np.full(len(jumps), 0.03), "|", transform=axis.get_xaxis_transform(), color=colour,
            markersize=5, markeredgewidth=0.4, label="discontinuity",
        )  # fmt: skip
