"""Recompute a run's worst case from weights and images alone.

    kwta-exp verify RUN_FOLDER

For evaluations made with ``evaluation.save_images=true``: reads the adversarial images, checks that each lies
inside the threat around its test image, and classifies it again. No attack is run and no record is used.
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
"""The largest batch, in values (4 GiB of float32), that an evaluation's ``batch_size`` may give."""

_ROUNDING = 1e-6
"""How far float32 rounding may move an image out of its ball."""


def verify(plan: Plan, folder: Path) -> list[str]:
    """Verify each evaluation of a run folder that has images, and return one line for each.

    Args:
        plan: from :func:`~kwta_exp.plan.plan_to_judge`.
        folder: the run folder.

    Raises:
        UserError: if no evaluation has images, an image lies outside the threat, or an accuracy differs.
    """
    data = plan.dataset.load()
    network = planned_network(plan, data).eval().requires_grad_(False)

    evaluations = [path for path in evaluation_folders(folder) if _has_images(path)]
    if not evaluations:
        raise UserError(f"{folder}: has no adversarial images; expected a run with evaluation.save_images=true")
    return [_verify_one(evaluation, network, data) for evaluation in evaluations]


def _has_images(evaluation: Path) -> bool:
    """Whether the evaluation saved its adversarial images; one without attacks has none."""
    results, identity = finished(evaluation)
    return results["worst_case"] is not None and identity.get("save_images") is True


def _verify_one(evaluation: Path, network: nn.Module, data: Images) -> str:
    results, identity = finished(evaluation)
    threat = Threat(norm=results["threat"]["norm"], eps=results["threat"]["eps"])
    judge = Judge(network, batch_size=identity["batch_size"])
    images = first_test_images(data, results["clean"]["n"], torch.device("cpu"))
    if len(images) != results["clean"]["n"]:
        raise UserError(
            f"{evaluation}: is of {results['clean']['n']} test images, but the data has {len(images)}"
        )
    if (values := judge.batch_size * math.prod(images.x.shape[1:])) > MAX_VALUES:
        raise UserError(
            f"{evaluation}: batch_size={judge.batch_size:,} gives batches of {values:,} values;"
            f" expected at most {MAX_VALUES:,}"
        )
    row_of = {index: row for row, index in enumerate(images.index.tolist())}

    clean = torch.cat(
        [
            ~misclassified(judge.logits(to_float(images.x[rows])), images.y[rows])
            for rows in torch.arange(len(images)).split(judge.batch_size)
        ]
    )
    robust = clean.clone()
    for path in sorted((evaluation / "images").glob("*.npz")):
        index, x_adv = _read_images(path)
        if not set(index) <= row_of.keys():
            raise UserError(f"{path}: its index is not among the {len(images)} test images")
        rows = torch.tensor([row_of[i] for i in index])
        x, y = to_float(images.x[rows]), images.y[rows]
        if x_adv.shape != x.shape or not _is_inside(threat, x_adv, x):
            raise UserError(f"{path}: holds images outside {threat.norm} eps {threat.eps:g} or [0, 1]")
        robust[rows[judge(x_adv, y).confirmed]] = False

    found = {"clean": clean.double().mean().item(), "worst case": robust.double().mean().item()}
    claimed = {
        "clean": results["clean"]["accuracy"],
        "worst case": results["worst_case"]["robust_accuracy"],
    }
    summary = ", ".join(f"{name} {100 * share:.2f}%" for name, share in found.items())
    if found != claimed:
        raise UserError(f"{evaluation}: found {summary}, but results.json says {claimed}")
    return f"{evaluation}: {summary} (n = {len(images)}), as results.json says"


def _read_images(path: Path) -> tuple[list[int], Tensor]:
    """The indices of test images, and their adversarial images, float32 ``(N, C, H, W)``."""
    arrays = read_arrays(path)
    index, x_adv = arrays.get("index"), arrays.get("x_adv")
    if index is None or x_adv is None or index.dtype != np.int64 or x_adv.dtype != np.float32:
        raise damaged(path, "expected an int64 index and a float32 x_adv")
    if index.ndim != 1 or x_adv.shape[:1] != index.shape or not len(index):
        raise damaged(path, "expected one index for each image")
    return index.tolist(), torch.from_numpy(x_adv)


def _is_inside(threat: Threat, x_adv: Tensor, x: Tensor) -> bool:
    in_ball = (threat.distance(x_adv, x) <= threat.eps + _ROUNDING).all()  # False for NaN
    return bool(in_ball) and x_adv.min().item() >= 0 and x_adv.max().item() <= 1
