"""What activations let through of one vector: ReLU, max-pooling, LWTA and k-WTA side by side."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kwta_exp.activations import kwta, lwta
from kwta_exp.draw.style import COLOURS, OTHER, Drawing, styled
from kwta_exp.errors import UserError

VALUES = (0.7, -0.6, 1.9, 0.3, -0.4, -1.1, -0.2, -0.8, 1.2, 2.4, -0.5, 1.6)
"""Twelve values: the three largest lie in two of the three groups of four, and the second group is negative."""


def draw(values: Sequence[float] = VALUES, k: int = 3, group_size: int = 4) -> Drawing:
    """The vector, and what each activation makes of it.

    Args:
        values: the vector.
        k: winners of k-WTA.
        group_size: neighbours that compete in LWTA, or that max-pooling reduces to one value.

    Raises:
        UserError: if ``k`` or ``group_size`` does not fit the vector.
    """
    if not 1 <= k <= len(values):
        raise UserError(f"--k {k}: expected 1 to {len(values)}, the number of values")
    if group_size < 1 or len(values) % group_size:
        raise UserError(f"--group-size {group_size}: expected a divisor of {len(values)}, the number of values")
    x = torch.tensor([values], dtype=torch.float64)
    outputs = {
        "input": x, "ReLU": x.relu(), "max-pooling": _pooled(x, group_size), "LWTA": lwta(x, group_size),
        "k-WTA": kwta(x, k=k),
    }  # fmt: skip
    titles = {
        "input": f"input: {len(values)} values",
        "ReLU": "ReLU: positive values",
        "max-pooling": f"max-pooling: one value of {group_size}",
        "LWTA": f"LWTA: largest of each {group_size}",
        "k-WTA": f"k-WTA: {k} largest of all",
    }
    rows: list[dict[str, Any]] = []
    with styled():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.9, 1.7))
        axes = figure.subplots(1, len(outputs), sharey=True)
        for axis, (name, output) in zip(axes, outputs.items(), strict=True):
            _panel(axis, name, x[0], output[0])
            axis.set_title(titles[name].replace(": ", ":\n"), loc="left")
            rows += [
                {"activation": name, "unit": unit, "value": value, "zeroed": value == 0}
                for unit, value in enumerate(output[0].tolist())
            ]
        axes[0].set_ylabel("value")
    return figure, rows


def _pooled(x: Tensor, group_size: int) -> Tensor:
    return nn.functional.max_pool1d(x[:, None], group_size)[:, 0]


def _panel(axis: Any, name: str, x: Tensor, output: Tensor) -> None:
    """Bars of the output over outlines of the input. A value of a group stands in its middle."""
    width = len(x) / len(output)
    places = [width * (unit + 0.5) - 0.5 for unit in range(len(output))]
    colour = COLOURS.get(name.lower().replace("-", ""), OTHER if name == "max-pooling" else "#777777")
    axis.bar(range(len(x)), x.tolist(), width=0.8, fill=False, edgecolor="#999999", linewidth=0.6)
    axis.bar(places, output.tolist(), width=0.8 * width if width > 1 else 0.8, color=colour, alpha=0.85)
    axis.axhline(0, color="#000000", linewidth=0.6)
    axis.set_xticks([])
    axis.set_xlabel("unit")
    axis.grid(visible=False)
