"""Adversarial examples of a run, as a figure: clean image, difference, adversarial image, what is seen in them.

    kwta-exp draw examples RUN_FOLDER

For evaluations made with ``evaluation.save_images=true``. The network is built again, to say how sure it is.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kwta_exp.data.base import Images
from kwta_exp.data.batches import first_test_images, to_float
from kwta_exp.draw.style import Drawing, Rows, named, styled, titled
from kwta_exp.errors import UserError
from kwta_exp.evaluation.judge import Judge
from kwta_exp.evaluation.stored import Stored
from kwta_exp.parts import planned_network
from kwta_exp.plan import Plan
from kwta_exp.verify import read_images

_ACROSS = 6
"""Examples side by side."""


def draw(plan: Plan, folder: Path, count: int) -> Drawing:
    """The figure of the first ``count`` images that are fooled, and its numbers.

    Each image has the adversarial image of the first attack that fooled it.

    Args:
        plan: from :func:`~kwta_exp.plan.plan_to_judge`.
        folder: the run's, or that of one of its evaluations.
        count: how many images, 1 or more.

    Raises:
        UserError: if the evaluation kept no images, or no image is fooled.
    """
    if count < 1:
        raise UserError(f"--images {count}: expected 1 or more")
    stored = Stored.read(folder)
    if not (stored.folder / "images").is_dir():
        raise UserError(
            f"{stored.folder}: has no adversarial images; expected a run with evaluation.save_images=true"
        )
    chosen = _chosen(stored, count)
    data = plan.dataset.load()
    images = first_test_images(data, stored.results["clean"]["n"], torch.device("cpu"))
    places = torch.tensor([place for place, _ in chosen])
    x, x_adv = to_float(images.x[places]), _adversarial(stored, chosen)
    if x.shape != x_adv.shape:
        raise UserError(f"{stored.folder}: its adversarial images are not of the shape of the test images")
    judge = Judge(_network(plan, data), batch_size=256)
    table = [
        {
            "index": int(images.index[place]), "label": int(images.y[place]), "attack": attack,
            "clean class": clean[0], "clean confidence": clean[1], "adversarial class": fooled[0],
            "adversarial confidence": fooled[1],
        }
        for (place, attack), clean, fooled in zip(chosen, _seen(judge, x), _seen(judge, x_adv), strict=True)
    ]  # fmt: skip
    return _figure(stored, table, x, x_adv)


def _network(plan: Plan, data: Images) -> torch.nn.Module:
    return planned_network(plan, data).eval().requires_grad_(False)


def _chosen(stored: Stored, count: int) -> list[tuple[int, str]]:
    """The places of the first fooled images, each with the first attack that fooled it."""
    first: dict[int, str] = {}
    for name in stored.outcome.records:
        for place in np.flatnonzero(stored.outcome.fooled(name)):
            first.setdefault(int(place), name)
    if not first:
        raise UserError(f"{stored.folder}: no attack fooled an image, so there is no example to draw")
    return sorted(first.items())[:count]


def _adversarial(stored: Stored, chosen: list[tuple[int, str]]) -> Tensor:
    """The adversarial images, float32 ``(N, C, H, W)``."""
    index = stored.outcome.clean.columns["index"]
    wanted = {(int(index[place]), attack): row for row, (place, attack) in enumerate(chosen)}
    found: dict[int, Tensor] = {}
    for attack in dict.fromkeys(attack for _, attack in chosen):
        for path in sorted((stored.folder / "images").glob("*.npz")):
            if path.stem.rpartition("-")[0] != attack:
                continue
            indices, x_adv = read_images(path)
            found |= {
                wanted[i, attack]: x for i, x in zip(indices, x_adv, strict=True) if (i, attack) in wanted
            }
    if len(found) < len(chosen):
        raise UserError(f"{stored.folder}: lacks the adversarial images of {len(chosen) - len(found)} images")
    return torch.stack([found[row] for row in range(len(chosen))])


def _seen(judge: Judge, x: Tensor) -> list[tuple[int, float]]:
    """The class of each image and the network's confidence in it, by softmax."""
    confidence, predicted = judge.logits(x).softmax(1).max(1)
    return list(zip(predicted.tolist(), confidence.tolist(), strict=True))


def _figure(stored: Stored, table: Rows, x: Tensor, x_adv: Tensor) -> Drawing:
    difference = x_adv - x
    gain = max(1, int(0.5 / max(1e-6, difference.abs().max().item()) + 0.01))
    shown = (x, 0.5 + gain * difference, x_adv)
    blocks = -(-len(table) // _ACROSS)
    across = min(_ACROSS, len(table))
    with styled():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.3, 0.35 + 2.0 * blocks))
        axes = figure.subplots(3 * blocks, across, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for number, row in enumerate(table):
            block, column = divmod(number, _ACROSS)
            texts = (
                f"{row['clean class']} ({100 * row['clean confidence']:.0f}%)",
                row["attack"],
                f"{row['adversarial class']} ({100 * row['adversarial confidence']:.0f}%)",
            )
            for line, (content, text) in enumerate(zip(shown, texts, strict=True)):
                axis = axes[3 * block + line, column]
                axis.imshow(_pixels(content[number]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axis.set_title(text, fontsize=6, pad=2)
        titled(figure, f"{named(stored.results)}: clean, difference x {gain}, adversarial: class (confidence)")
    return figure, [row | {"difference times": gain} for row in table]


def _pixels(x: Tensor) -> npt.NDArray[Any]:
    """``(H, W)`` or ``(H, W, 3)`` in [0, 1]."""
    channels_last: npt.NDArray[Any] = x.clamp(0, 1).permute(1, 2, 0).numpy()
    return channels_last if channels_last.shape[2] == 3 else channels_last.mean(2)
