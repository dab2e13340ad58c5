"""Accuracy against eps: what every evaluation of one network says together.

    python run.py -m training=none weights=RUN_FOLDER suite=strong threat.eps=0.02,0.05,0.1
    kwta-exp curve FOLDER_OF_THAT

An adversarial image found at one eps lies inside every larger ball too. So at each eps an image stands only if
no evaluation at that eps or a smaller one fooled it, and evaluations at the same eps, of other suites say, add
up. Only evaluations of the same weights, norm and images are put together.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kwta_exp.errors import UserError
from kwta_exp.evaluation.stored import Stored, evaluation_folders
from kwta_exp.report.compare import Outcomes

_BAR = 40


@dataclass(frozen=True)
class Point:
    """One eps of a curve.

    Attributes:
        eps: the radius.
        own: the worst case of the evaluations at this eps alone.
        together: that of all evaluations up to it.
        verdicts: what these evaluations were called.
        suites: what attacked in them.
    """

    eps: float
    own: float
    together: float
    verdicts: tuple[str, ...]
    suites: tuple[str, ...]


@dataclass(frozen=True)
class Curve:
    """Points by rising eps, of ``n`` images; ``clean`` is the accuracy at eps 0."""

    norm: str
    n: int
    clean: float
    points: tuple[Point, ...]


def curves(folder: Path) -> list[Curve]:
    """The curves of a run's folder, one for each norm and set of images; or of an evaluation's.

    Raises:
        UserError: if nothing was attacked there, or an evaluation is damaged.
    """
    groups: dict[Any, list[tuple[Outcomes, str]]] = defaultdict(list)
    for path in evaluation_folders(folder):
        stored = Stored.read(path)
        if stored.results["worst_case"] is None:
            continue
        outcomes = Outcomes.of_evaluation(stored)
        of = stored.results["run"]["weights_sha256"], outcomes.threat[0], outcomes.digest.tobytes()
        groups[of].append((outcomes, stored.results["masking"]["verdict"]))
    if not groups:
        raise UserError(f"{folder}: no attacked evaluation there; expected a finished run's folder")
    return [_curve(found) for found in groups.values()]


def _curve(found: Iterable[tuple[Outcomes, str]]) -> Curve:
    by_eps: dict[float, list[tuple[Outcomes, str]]] = defaultdict(list)
    for outcomes, verdict in found:
        by_eps[outcomes.threat[1]].append((outcomes, verdict))
    first = by_eps[min(by_eps)][0][0]
    standing, points = first.clean.copy(), []
    for eps, here in sorted(by_eps.items()):
        own = np.all([outcomes.standing for outcomes, _ in here], axis=0)
        standing &= own
        verdicts = tuple(sorted({verdict for _, verdict in here}))
        suites = tuple(sorted({outcomes.suite for outcomes, _ in here}))
        points.append(Point(eps, float(own.mean()), float(standing.mean()), verdicts, suites))
    return Curve(first.threat[0], len(first.clean), float(first.clean.mean()), tuple(points))


def text(curve: Curve) -> str:
    """The curve as a table with bars."""
    lines = [f"{curve.norm}, n = {curve.n}", f"{'eps':>8}  {'this eps':>8}  {'together':>8}"]
    lines.append(_line(0.0, curve.clean, curve.clean, "clean"))
    lines += [_line(p.eps, p.own, p.together, ", ".join(p.verdicts)) for p in curve.points]
    if len({point.suites for point in curve.points}) > 1:
        lines.append("not attacked alike at every eps:")
        lines += [f"{point.eps:8.4g}  {', '.join(point.suites)}" for point in curve.points]
    return "\n".join(lines)


def _line(eps: float, own: float, together: float, about: str) -> str:
    bar = "#" * round(_BAR * together)
    return f"{eps:8.4g}  {100 * own:7.1f}%  {100 * together:7.1f}%  {bar:<{_BAR}}  {about}"
