"""Recompute a run's worst case from weights and images alone.

    kwta-exp verify RUN_FOLDER

For evaluations made with ``evaluation.save_images=true``: reads the adversarial images, checks that each lies
inside the threat around its test image, and classifies it again, on the kind of device that the run used if
this machine has it. No attack is run and no record is used.

Another GPU or CPU rounds differently. So an accuracy may differ by images whose class rounding decides
(:func:`is_at_rounding`), and the line for the evaluation says by how many. Any other difference is an error.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kwta_exp import hardware
from kwta_exp.attacks import Threat
from kwta_exp.attacks.losses import margin
from kwta_exp.data.base import Images
from kwta_exp.data.batches import Split, first_test_images, to_float
from kwta_exp.errors import UserError
from kwta_exp.evaluation.judge import Judge, misclassified
from kwta_exp.evaluation.random_networks import LOOKED_AT, judge_for
from kwta_exp.evaluation.stored import evaluation_folders, finished
from kwta_exp.parts import planned_network
from kwta_exp.plan import Plan
from kwta_exp.randomness import fold, key, uniform
from kwta_exp.sealed import read_arrays
from kwta_exp.storage import damaged, read_json

MAX_VALUES = 2**30
"""The largest batch, in values (4 GiB of float32), that an evaluation's ``batch_size`` may give."""

NEAR = 1e-4
"""A margin this small, as a share of the range of an image's logits, is at rounding: sums of thousands of
float32 products in another order differ by about 1e-6 to 1e-5 of their size.
"""

NUDGES = 4
"""Copies of an image, each pixel moved by :data:`_ROUNDING` up or down, that must all be in the same class: in
a discontinuous network rounding changes winners, and by them logits by far more than rounding.
"""

_ROUNDING = 1e-6
"""How far float32 rounding may move a pixel, or an image out of its ball."""


def verify(plan: Plan, folder: Path) -> list[str]:
    """Verify each evaluation of a run folder that has images, and return one line for each.

    Args:
        plan: from :func:`~kwta_exp.plan.plan_to_judge`.
        folder: the run folder.

    Raises:
        UserError: if no evaluation has images, an image lies outside the threat, or an accuracy differs by more
            than rounding.
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


def _device_for(evaluation: Path) -> torch.device:
    """The kind of device that the evaluation ran on, if this machine has it; else the CPU."""
    environment = read_json(evaluation / "evaluation.json").get("environment")
    runtime = environment.get("runtime") if isinstance(environment, dict) else None
    on_gpu = isinstance(runtime, dict) and runtime.get("accelerator") == "cuda"
    return torch.device("cuda" if on_gpu and hardware.torch_has_cuda() else "cpu")


def _verify_one(evaluation: Path, network: nn.Module, data: Images) -> str:
    results, identity = finished(evaluation)
    threat = Threat(norm=results["threat"]["norm"], eps=results["threat"]["eps"])
    device = _device_for(evaluation)
    images = first_test_images(data, results["clean"]["n"], device)
    if len(images) != results["clean"]["n"]:
        raise UserError(
            f"{evaluation}: is of {results['clean']['n']} test images, but the data has {len(images)}"
        )
    judge = judge_for(
        network.to(device), to_float(images.x[torch.arange(min(LOOKED_AT, len(images)), device=device)]),
        identity["batch_size"], identity.get("draws", 1), results["run"]["seed"],
    )  # fmt: skip
    if (values := judge.batch_size * math.prod(images.x.shape[1:])) > MAX_VALUES:
        raise UserError(
            f"{evaluation}: batch_size={judge.batch_size:,} gives batches of {values:,} values;"
            f" expected at most {MAX_VALUES:,}"
        )
    right = {name: torch.ones(len(images), dtype=torch.bool) for name in ("clean", "worst case")}
    for piece in _judged(evaluation, judge, images, threat):
        for name in piece.counts_for:
            right[name][piece.rows[piece.failed]] = False

    found = {name: which.double().mean().item() for name, which in right.items()}
    claimed = {
        "clean": results["clean"]["accuracy"],
        "worst case": results["worst_case"]["robust_accuracy"],
    }
    summary = ", ".join(f"{name} {100 * share:.2f}%" for name, share in found.items())
    if found == claimed:
        return f"{evaluation}: {summary} (n = {len(images)}), as results.json says"
    possible = _possible(_judged(evaluation, judge, images, threat), judge, len(images))
    counts = {name: share * len(images) for name, share in claimed.items()}
    if not all(_is_whole_and_within(counts[name], *possible[name]) for name in counts):
        raise UserError(f"{evaluation}: found {summary}, but results.json says {claimed}")
    differ = max(abs(round(counts[name]) - int(right[name].sum())) for name in counts)
    return (
        f"{evaluation}: {summary} (n = {len(images)}) on this {device.type}, as results.json says but for"
        f" {differ} image{'s' if differ > 1 else ''} whose class rounding decides"
    )


@dataclass(frozen=True)
class _Piece:
    """Some images and how they were judged.

    Attributes:
        counts_for: the accuracies that a failure lowers.
        rows: int64 ``(N,)`` on the CPU, which of the test images they are or were made from.
        x: the images.
        y: their labels.
        failed: bool ``(N,)`` on the CPU: misclassified if clean, else confirmed to be.
    """

    counts_for: tuple[str, ...]
    rows: Tensor
    x: Tensor
    y: Tensor
    failed: Tensor


def _judged(evaluation: Path, judge: Judge, images: Split, threat: Threat) -> Iterator[_Piece]:
    """The clean images, and the adversarial ones that the evaluation saved, piece by piece."""
    device = images.y.device
    for rows in torch.arange(len(images)).split(judge.batch_size):
        x, y = to_float(images.x[rows.to(device)]), images.y[rows.to(device)]
        yield _Piece(("clean", "worst case"), rows, x, y, misclassified(judge.answers(x, y).logits, y).cpu())
    row_of = {index: row for row, index in enumerate(images.index.tolist())}
    for path in sorted((evaluation / "images").glob("*.npz")):
        index, x_adv = read_images(path)
        if not set(index) <= row_of.keys():
            raise UserError(f"{path}: its index is not among the {len(images)} test images")
        rows = torch.tensor([row_of[i] for i in index])
        x, y, x_adv = to_float(images.x[rows.to(device)]), images.y[rows.to(device)], x_adv.to(device)
        if x_adv.shape != x.shape or not _is_inside(threat, x_adv, x):
            raise UserError(f"{path}: holds images outside {threat.norm} eps {threat.eps:g} or [0, 1]")
        yield _Piece(("worst case",), rows, x_adv, y, judge(x_adv, y).confirmed.cpu())


def _possible(pieces: Iterable[_Piece], judge: Judge, n: int) -> dict[str, tuple[int, int]]:
    """The fewest and the most of the ``n`` images that count as right, whatever rounding decides."""
    names = ("clean", "worst case")
    surely_wrong, surely_right = ({name: torch.full((n,), start) for name in names} for start in (False, True))
    for piece in pieces:
        doubtful = is_at_rounding(judge, piece.x, piece.y).cpu()
        for name in piece.counts_for:
            surely_wrong[name][piece.rows[piece.failed & ~doubtful]] = True
            surely_right[name][piece.rows[piece.failed | doubtful]] = False
    return {name: (int(surely_right[name].sum()), n - int(surely_wrong[name].sum())) for name in names}


def is_at_rounding(judge: Judge, x: Tensor, y: Tensor) -> Tensor:
    """Whether rounding decides that images ``x (N, C, H, W)`` are classified as ``y``, bool ``(N,)``.

    It does if the margin in float64 is below :data:`NEAR` times the range of the logits, or if the outcome in
    float32 is not the same in batches of two sizes, in float64, and for :data:`NUDGES` copies that differ by
    rounding.
    """
    other = Judge(judge.network, judge.batch_size // 2 if judge.batch_size > 1 else 2)
    keys = fold(key(0, "nudges"), torch.arange(len(x), device=x.device))
    logits = [judge.logits(x), other.logits(x)]
    for nudge in range(NUDGES):
        signs = uniform(fold(nudge, keys), x.shape[1:]).sub(0.5).sign()
        logits.append(judge.logits(x + _ROUNDING * signs))
    double = judge.logits_in_double(x)
    exact = logits[0].double() if double is None else double
    wrong = torch.stack([misclassified(each, y) for each in (*logits, exact)])
    span = exact.amax(1) - exact.amin(1)
    return (margin(exact, y).abs() <= NEAR * span) | (wrong != wrong[0]).any(0)


def read_images(path: Path) -> tuple[list[int], Tensor]:
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


def _is_whole_and_within(count: float, fewest: int, most: int) -> bool:
    return abs(count - round(count)) < 1e-6 and fewest <= round(count) <= most
