"""Recompute a run's worst case from weights and images alone.

    kwta-exp verify RUN_FOLDER

For evaluations made with ``evaluation.save_images=true``: reads the adversarial images, checks that each lies
inside the threat around its test image, and judges it again. No attack is run and no record is trusted.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kwta_exp.attacks import Threat
from kwta_exp.data.base import Images
from kwta_exp.data.batches import first_test_images, to_float
from kwta_exp.errors import UserError
from kwta_exp.evaluation.judge import Judge, misclassified
from kwta_exp.evaluation.stored import evaluation_folders, finished
from kwta_exp.parts import planned_network
from kwta_exp.plan import Plan
from kwta_exp.sealed import read_arrays
from kwta_exp.storage import damaged

MAX_VALUES = 2**30
"""The largest number of values in a batch that an evaluation may name: 4 GiB."""

_ROUNDING = 1e-6
"""The distance by which rounding in float32 may move an image out of its ball."""


def verify(plan: Plan, folder: Path) -> list[str]:
    """Verify each evaluation with images in a run folder; one line each.

    Args:
        plan: of judging the folder's run again, from :func:`~kwta_exp.plan.plan_to_judge`.
        folder: the run folder.

    Raises:
        UserError: if there is none, an image lies outside the threat, or a number differs.
    """
    data = plan.dataset.load()
    network = planned_network(plan, data).eval().requires_grad_(False)

    evaluations = [path for path in evaluation_folders(folder) if _keeps_images(path)]
    if not evaluations:
        raise UserError(f"{folder}: no images were kept; expected a run with evaluation.save_images=true")
    return [_verify_one(evaluation, network, data) for evaluation in evaluations]


def _keeps_images(evaluation: Path) -> bool:
    """Whether it was made with ``evaluation.save_images=true``; where no image was attacked there are none."""
    results, identity = finished(evaluation)
    return results["worst_case"] is not None and identity.get("save_images") is True


def _verify_one(evaluation: Path, network: nn.Module, data: Images) -> str:
    results, identity = finished(evaluation)
    threat = Threat(norm=results["threat"]["norm"], eps=results["threat"]["eps"])
    judge = Judge(network, batch_size=identity["batch_size"])
    images = first_test_images(data, results["clean"]["n"], torch.device("cpu"))
    if len(images) != results["clean"]["n"]:
        raise UserError(f"{evaluation}: judged {results['clean']['n']} test images; the data has {len(images)}")
    if (values := judge.batch_size * math.prod(images.x.shape[1:])) > MAX_VALUES:
        raise UserError(
            f"{evaluation}: judged {judge.batch_size:,} images at a time, {values:,} values; expected"
            f" {MAX_VALUES:,} at most"
        )
    position = {index: place for place, index in enumerate(images.index.tolist())}

    clean = torch.cat(
        [
            ~misclassified(judge.logits(to_float(images.x[at])), images.y[at])
            for at in torch.arange(len(images)).split(judge.batch_size)
        ]
    )
    robust = clean.clone()
    for path in sorted((evaluation / "images").glob("*.npz")):
        index, x_adv = _kept(path)
        if not set(index) <= position.keys():
            raise UserError(f"{path}: holds images of none of the {len(images)} test images")
        at = torch.tensor([position[i] for i in index])
        x, y = to_float(images.x[at]), images.y[at]
        if x_adv.shape != x.shape or not _is_inside(threat, x_adv, x):
            raise UserError(f"{path}: holds images outside {threat.norm} eps {threat.eps:g} or [0, 1]")
        robust[at[judge(x_adv, y).confirmed]] = False

    found = {"clean": clean.double().mean().item(), "worst case": robust.double().mean().item()}
    claimed = {
        "clean": results["clean"]["accuracy"],
        "worst case": results["worst_case"]["robust_accuracy"],
    }
    said = ", ".join(f"{name} {100 * share:.2f}%" for name, share in found.items())
    if found != claimed:
        raise UserError(f"{evaluation}: found {said}, but results.json says {claimed}")
    return f"{evaluation}: {said} (n = {len(images)}), as results.json says"


def _kept(path: Path) -> tuple[list[int], Tensor]:
    """Indices of test images and the adversarial images made of them, float32 ``(N, C, H, W)``."""
    arrays = read_arrays(path)
    index, x_adv = arrays.get("index"), arrays.get("x_adv")
    if index is None or x_adv is None or index.dtype != np.int64 or x_adv.dtype != np.float32:
        raise damaged(path, "it has no int64 index and float32 x_adv")
    if index.ndim != 1 or x_adv.shape[:1] != index.shape or not len(index):
        raise damaged(path, "it has not one index for each image")
    return index.tolist(), torch.from_numpy(x_adv)


def _is_inside(threat: Threat, x_adv: Tensor, x: Tensor) -> bool:
    near = (threat.distance(x_adv, x) <= threat.eps + _ROUNDING).all()  # NaN is not near
    return bool(near) and x_adv.min().item() >= 0 and x_adv.max().item() <= 1
