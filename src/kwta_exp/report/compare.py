"""Two runs on the same images: which is more robust, image by image?

    kwta-exp compare RUN_FOLDER RUN_FOLDER

Two accuracies with overlapping intervals may still differ for certain, because the images are the same. Only
those on which the runs disagree tell them apart (McNemar, "Note on the sampling error of the difference between
correlated proportions or percentages", Psychometrika 1947; here the exact binomial form).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kwta_exp.errors import UserError
from kwta_exp.evaluation.records import Record
from kwta_exp.naming import safe_names
from kwta_exp.run_folder import RunFolder, read_results


@dataclass(frozen=True)
class Outcomes:
    """What became of each image in the latest evaluation of a run."""

    name: str
    threat: tuple[str, float]
    index: npt.NDArray[np.int64]
    digest: npt.NDArray[np.bytes_]
    clean: npt.NDArray[np.bool_]
    standing: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, folder: Path) -> "Outcomes":
        """Read the rows of a run's latest evaluation.

        Raises:
            UserError: if there is none, or its files are not those its results speak of.
        """
        results = read_results(RunFolder(folder).results)
        if results is None or results["worst_case"] is None:
            raise UserError(f"{folder}: no attacked evaluation there; expected a finished run's folder")
        found = [path for path in folder.glob("evaluation/*") if read_results(path / "results.json") == results]
        if not found:
            raise UserError(f"{folder}: its results.json is not that of any of its evaluations")
        return cls.of_evaluation(found[0], results)

    @classmethod
    def of_evaluation(cls, folder: Path, results: Mapping[str, Any]) -> "Outcomes":
        """Read the rows of the evaluation in ``folder``, whose ``results`` are known.

        Raises:
            UserError: if an attack's name there leads out of it.
        """
        attacks = safe_names(results["attacks"], f"{folder}/results.json")
        clean = Record.open(folder / "clean.npz")
        right = clean.columns["prediction"] == clean.columns["label"]
        standing = right.copy()
        place = {index: number for number, index in enumerate(clean.columns["index"].tolist())}
        for name in attacks:
            rows = Record.open(folder / f"{name}.npz").columns
            for index, fooled in zip(rows.get("index", []), rows.get("fooled", []), strict=True):
                standing[place[int(index)]] &= not fooled
        threat = results["threat"]["norm"], results["threat"]["eps"]
        name = f"{results['run']['name']}, seed {results['run']['seed']}"
        return cls(name, threat, clean.columns["index"], clean.columns["digest"], right, standing)


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


def _mcnemar(only_a: int, only_b: int) -> str:
    from scipy.stats import binomtest  # slow to import

    if only_a + only_b == 0:
        return "they agree on every image"
    p = binomtest(only_a, only_a + only_b).pvalue
    verdict = "no difference is shown" if p >= 0.05 else f"{'A' if only_a > only_b else 'B'} has more right"
    return f"p = {p:.2g}: {verdict}"
