"""Accuracy against eps: what was found at a smaller eps counts at a larger one."""

import json
from pathlib import Path

import numpy as np
import pytest

from kwta_exp.errors import UserError
from kwta_exp.evaluation.records import Record
from kwta_exp.report.curve import Curve, Point, curves, text


def evaluation(
    run: Path, name: str, eps: float, fooled: list[int], weights: str = "w", norm: str = "linf", n: int = 5
) -> None:
    """An evaluation of n images, the last of them wrong clean."""
    folder = run / "evaluation" / name
    index = np.arange(n)
    who = {"index": index, "digest": np.array([b"%016x" % i for i in index], dtype="S16")}
    clean = Record(folder / "clean.npz")
    clean.append({**who, "label": index * 0, "prediction": (index == n - 1).astype(int)}, n, 0, 0.0)
    clean.save()
    attack = Record(folder / "pgd.npz")
    rows = {column: values[:-1] for column, values in who.items()}
    attack.append({**rows, "fooled": np.isin(index[:-1], fooled)}, n, n, 0.0)
    attack.save()
    results = {
        "run": {"name": "a", "seed": 0, "weights_sha256": weights},
        "threat": {"norm": norm, "eps": eps},
        "clean": {},
        "attacks": {"pgd": {}},
        "worst_case": {},
        "masking": {"verdict": name.split("-")[0]},
    }
    (folder / "results.json").write_text(json.dumps(results))


def test_an_image_fooled_at_a_smaller_eps_is_fooled_at_a_larger(tmp_path: Path) -> None:
    evaluation(tmp_path, "sound-a", 0.3, [0])
    evaluation(tmp_path, "masked-b", 0.1, [1])
    evaluation(tmp_path, "suspect-c", 0.2, [])
    evaluation(tmp_path, "masked-d", 0.2, [2])  # two suites at one eps
    (curve,) = curves(tmp_path)
    assert curve == Curve(
        "linf",
        5,
        0.8,
        (
            Point(0.1, 0.6, 0.6, ("masked",)),
            Point(0.2, 0.6, 0.4, ("masked", "suspect")),
            Point(0.3, 0.6, 0.2, ("sound",)),
        ),
    )
    table = text(curve).splitlines()
    assert table[0] == "linf, n = 5"
    assert table[4].split()[:3] == ["0.2", "60.0%", "40.0%"]
    assert all(len(line) < 90 for line in table)


def test_only_what_belongs_together_is_put_together(tmp_path: Path) -> None:
    evaluation(tmp_path, "sound-a", 0.1, [0])
    evaluation(tmp_path, "sound-b", 0.2, [1], weights="other")
    evaluation(tmp_path, "sound-c", 0.3, [2], norm="l2")
    evaluation(tmp_path, "sound-d", 0.4, [3], n=6)
    assert [[point.eps for point in curve.points] for curve in curves(tmp_path)] == [[0.1], [0.2], [0.3], [0.4]]


def test_a_folder_without_attacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no attacked evaluation there"):
        curves(tmp_path)
