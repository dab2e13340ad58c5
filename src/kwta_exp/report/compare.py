"""Two runs on the same images: which is more robust, image by image?

    kwta-exp compare FOLDER FOLDER

Each is a run's folder, for its latest evaluation, or that of an evaluation: ``RUN/evaluation/<suite>-<hash>``.

Two accuracies with overlapping intervals may still differ for certain, because the images are the same. Only
those on which the runs disagree tell them apart (McNemar, "Note on the sampling error of the difference between
correlated proportions or percentages", Psychometrika 1947; here the exact binomial form).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kwta_exp.errors import UserError
from kwta_exp.evaluation.stored import Stored


@dataclass(frozen=True)
class Outcomes:
    """What became of each image in an evaluation.

    Attributes:
        name: whose.
        threat: norm and radius.
        index: of the images in their dataset, int64 ``(N,)``.
        digest: of the images, ``(N,)``.
        clean: bool ``(N,)``, classified correctly clean.
        standing: bool ``(N,)``, and fooled by no attack.
        suite: what attacked.
        attacks: the values of the attacks that ran, by name.
    """

    name: str
    threat: tuple[str, float]
    index: npt.NDArray[np.int64]
    digest: npt.NDArray[np.bytes_]
    clean: npt.NDArray[np.bool_]
    standing: npt.NDArray[np.bool_]
    suite: str = ""
    attacks: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> "Outcomes":
        """Read the rows of an evaluation, or of a run's latest.

        Raises:
            UserError: as :meth:`~kwta_exp.evaluation.stored.Stored.read`, or if nothing attacked there.
        """
        return cls.of_evaluation(Stored.read(folder))

    @classmethod
    def of_evaluation(cls, stored: Stored) -> "Outcomes":
        """The rows of an evaluation that was read already.

        Raises:
            UserError: if nothing attacked there.
        """
        run, threat = stored.results["run"], stored.results["threat"]
        if stored.results["worst_case"] is None:
            raise UserError(f"{stored.folder}: no attack ran there; expected an evaluation with a suite")
        rows = stored.outcome.clean.columns
        return cls(
            f"{run['name']}, seed {run['seed']}",
            (threat["norm"], threat["eps"]),
            rows["index"],
            rows["digest"],
            stored.outcome.clean_correct,
            stored.outcome.robust,
            run["suite"],
            {name: stored.settings.get(name) for name in stored.outcome.records},
        )


def compare(first: Outcomes, second: Outcomes) -> str:
    """The comparison, clean and in the worst case.

    Raises:
        UserError: if the two were not judged on the same images in the same threat.
    """
    if first.threat != second.threat:
        raise UserError(
            f"the runs were attacked in {first.threat} and {second.threat}; expected the same threat"
        )
    order = [np.argsort(each.index) for each in (first, second)]
    for of_each in ("index", "digest"):
        a, b = (getattr(each, of_each)[rows] for each, rows in zip((first, second), order, strict=True))
        if not np.array_equal(a, b):
            raise UserError(f"the runs were judged on other images ({len(a)} and {len(b)}); expected the same")
    lines = [
        f"A: {first.name}",
        f"B: {second.name}",
        f"{first.threat[0]} eps {first.threat[1]:g}, n = {len(a)}",
        *_suites(first, second),
    ]
    for title, a, b in (
        ("clean", first.clean[order[0]], second.clean[order[1]]),
        ("worst case of the attacks that ran", first.standing[order[0]], second.standing[order[1]]),
    ):
        only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
        lines += [
            f"{title}: A {100 * a.mean():.1f}%, B {100 * b.mean():.1f}%",
            f"  right in A alone {only_a}, in B alone {only_b}; {_mcnemar(only_a, only_b)}",
        ]
    return "\n".join(lines)


def _suites(first: Outcomes, second: Outcomes) -> list[str]:
    """What to say where the two were not attacked alike: then a difference may be that of the attacks."""
    if first.attacks == second.attacks:
        return []
    lines = [
        f"  {side} ran {each.suite}: {', '.join(each.attacks)}" for side, each in (("A", first), ("B", second))
    ]
    both = first.attacks.keys() & second.attacks.keys()
    if other := sorted(name for name in both if first.attacks[name] != second.attacks[name]):
        lines.append(f"  with other values in both: {', '.join(other)}")
    return ["not attacked alike, so a difference in the worst case may be that of the attacks:", *lines]


def _mcnemar(only_a: int, only_b: int) -> str:
    from scipy.stats import binomtest  # slow to import

    if only_a + only_b == 0:
        return "they agree on every image"
    p = binomtest(only_a, only_a + only_b).pvalue
    verdict = "no difference is shown" if p >= 0.05 else f"{'A' if only_a > only_b else 'B'} has more right"
    return f"p = {p:.2g}: {verdict}"
