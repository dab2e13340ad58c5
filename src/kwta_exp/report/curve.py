"""Accuracy against eps, from all evaluations of one network.

    python run.py -m training=none weights=RUN_FOLDER suite=strong threat.eps=0.02,0.05,0.1
    kwta-exp curve FOLDER_OF_THAT_RUN

An adversarial image found at one eps lies inside every larger ball too. So an image is robust at an eps only if
no evaluation at that eps or a smaller one fooled it. Evaluations at the same eps (of different suites, say) add
up. A curve combines only evaluations of the same weights, norm and images.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kwta_exp.errors import UserError
from kwta_exp.evaluation.stored import Stored, evaluation_folders

_BAR = 40


@dataclass(frozen=True)
class Point:
    """One eps of a curve.

    Attributes:
        eps: the radius.
        robust_accuracy: the worst case of the evaluations at this eps alone.
        cumulative: the worst case of all evaluations up to this eps.
        verdicts: of the evaluations at this eps, sorted.
        suites: of the evaluations at this eps, sorted.
    """

    eps: float
    robust_accuracy: float
    cumulative: float
    verdicts: tuple[str, ...]
    suites: tuple[str, ...]


@dataclass(frozen=True)
class Curve:
    """Points by rising eps, over ``n`` images; ``clean_accuracy`` is the accuracy at eps 0."""

    norm: str
    n: int
    clean_accuracy: float
    points: tuple[Point, ...]


def curves(folder: Path) -> list[Curve]:
    """The curves in a run's folder, one for each norm and set of images; or the curve of one evaluation.

    Raises:
        UserError: if no evaluation there ran an attack, or one is damaged.
    """
    groups = defaultdict(list)
    for stored in map(Stored.read, evaluation_folders(folder)):
        if stored.results["worst_case"] is not None:
            weights, norm = stored.results["run"]["weights_sha256"], stored.results["threat"]["norm"]
            groups[weights, norm, stored.outcome.clean.columns["digest"].tobytes()].append(stored)
    if not groups:
        raise UserError(f"{folder}: no evaluation with attacks; expected the folder of a finished run")
    return [_curve(evaluations) for evaluations in groups.values()]


def _curve(evaluations: Sequence[Stored]) -> Curve:
    by_eps = defaultdict(list)
    for each in evaluations:
        by_eps[each.results["threat"]["eps"]].append(each)
    clean_correct = by_eps[min(by_eps)][0].outcome.clean_correct
    cumulative, points = clean_correct, []
    for eps, here in sorted(by_eps.items()):
        robust = np.all([each.outcome.robust for each in here], axis=0)
        cumulative = cumulative & robust
        verdicts = tuple(sorted({each.results["masking"]["verdict"] for each in here}))
        suites = tuple(sorted({each.results["run"]["suite"] for each in here}))
        points.append(Point(eps, float(robust.mean()), float(cumulative.mean()), verdicts, suites))
    norm = evaluations[0].results["threat"]["norm"]
    return Curve(norm, len(clean_correct), float(clean_correct.mean()), tuple(points))


def text(curve: Curve) -> str:
    """The curve as a table with bars."""
    lines = [f"{curve.norm}, n = {curve.n}", f"{'eps':>8}  {'this eps':>8}  {'up to it':>8}"]
    lines.append(_line(0.0, curve.clean_accuracy, curve.clean_accuracy, "clean"))
    lines += [_line(p.eps, p.robust_accuracy, p.cumulative, ", ".join(p.verdicts)) for p in curve.points]
    if len({point.suites for point in curve.points}) > 1:
        lines.append("the suite differs between values of eps:")
        lines += [f"{point.eps:8.4g}  {', '.join(point.suites)}" for point in curve.points]
    return "\n".join(lines)


def _line(eps: float, robust_accuracy: float, cumulative: float, note: str) -> str:
    bar = "#" * round(_BAR * cumulative)
    return f"{eps:8.4g}  {100 * robust_accuracy:7.1f}%  {100 * cumulative:7.1f}%  {bar:<{_BAR}}  {note}"
