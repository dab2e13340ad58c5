"""Loss landscapes of several networks side by side, on one scale."""

from collections.abc import Mapping
from typing import Any

from kwta_exp.analysis.landscape import Landscape, roughness
from kwta_exp.draw.style import Drawing, styled


def draw(found: Mapping[str, Landscape]) -> Drawing:
    """A surface and a contour for each network; heights and colours have one scale.

    Args:
        found: by the name to show, all over the same plane.
    """
    rows = [
        {
            "network": name,
            "images": each.n,
            "gradient_step": float(a),
            "random_step": float(b),
            "loss": float(value),
        }
        for name, each in found.items()
        for b, line in zip(each.steps, each.loss, strict=True)
        for a, value in zip(each.steps, line, strict=True)
    ]
    low = min(float(each.loss.min()) for each in found.values())
    high = max(float(each.loss.max()) for each in found.values())
    with styled():
        import matplotlib as mpl
        from matplotlib.figure import Figure

        figure = Figure(figsize=(1.75 * max(2, len(found)) + 0.6, 3.6))
        scale = mpl.colors.Normalize(low, high)
        flat = []
        for column, (name, each) in enumerate(found.items()):
            solid: Any = figure.add_subplot(2, len(found), column + 1, projection="3d")
            across, along = each.steps[:, None].expand_as(each.loss), each.steps[None].expand_as(each.loss)
            solid.plot_surface(
                along.numpy(), across.numpy(), each.loss.numpy(), cmap="cividis", norm=scale, rcount=200,
                ccount=200, linewidth=0, antialiased=False, rasterized=True,
            )  # fmt: skip
            solid.set_zlim(low, high)
            solid.set_box_aspect((1, 1, 0.8), zoom=1.2)
            solid.set_title(f"{name}\nroughness {roughness(each):.3f}")
            solid.tick_params(labelsize=5, pad=-3)
            solid.set_zticks([]) if column else solid.set_zlabel("loss", labelpad=-9)
            axis = figure.add_subplot(2, len(found), len(found) + column + 1)
            levels: Any = axis.contourf(
                along.numpy(), across.numpy(), each.loss.numpy(), 20, cmap="cividis", norm=scale
            )
            levels.set_rasterized(True)
            axis.set_box_aspect(1)
            axis.grid(visible=False)
            axis.set_xlabel("along the gradient's sign")
            if not column:
                axis.set_ylabel("along random signs")
            flat.append(axis)
        images = next(iter(found.values())).n
        many = "1 image" if images == 1 else f"{images} images"
        bar = figure.colorbar(mpl.cm.ScalarMappable(scale, "cividis"), ax=flat, shrink=0.9)
        bar.set_label(f"cross-entropy (nats), {many}")
    return figure, rows
