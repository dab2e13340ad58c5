"""Accuracy against eps: an image fooled at a smaller eps counts as fooled at a larger one."""

from pathlib import Path

import pytest

from kwta_exp.attacks import Threat
from kwta_exp.errors import UserError
from kwta_exp.report.curve import Curve, Point, curves, text
from tests import stored


def evaluation(
    run: Path, name: str, eps: float, fooled: list[int], weights: str = "0", norm: str = "linf", n: int = 5,
    suite: str = "quick",
) -> None:  # fmt: skip
    """An evaluation of n images; the last one is misclassified clean."""
    stored.evaluation(
        run, name, [True] * (n - 1) + [False], {"pgd": fooled}, threat=Threat(norm=norm, eps=eps),
        verdict=name.split("-")[0], weights_sha256=weights * 64, suite=suite,
    )  # fmt: skip


def test_an_image_fooled_at_a_smaller_eps_is_fooled_at_a_larger(tmp_path: Path) -> None:
    evaluation(tmp_path, "sound-a", 0.3, [0])
    evaluation(tmp_path, "masked-b", 0.1, [1])
    evaluation(tmp_path, "suspect-c", 0.2, [])
    evaluation(tmp_path, "masked-d", 0.2, [2], suite="strong")  # two suites at one eps
    (curve,) = curves(tmp_path)
    assert curve == Curve(
        "linf",
        5,
        0.8,
        (
            Point(0.1, 0.6, 0.6, ("masked",), ("quick",)),
            Point(0.2, 0.6, 0.4, ("masked", "suspect"), ("quick", "strong")),
            Point(0.3, 0.6, 0.2, ("sound",), ("quick",)),
        ),
    )
    table = text(curve).splitlines()
    assert table[0] == "linf, n = 5"
    assert table[4].split()[:3] == ["0.2", "60.0%", "40.0%"]
    assert all(len(line) < 90 for line in table)
    assert table[-4:-2] == ["the suite differs between values of eps:", "     0.1  quick"]
    assert table[-2] == "     0.2  quick, strong"


def test_curves_do_not_mix_weights_norms_or_images(tmp_path: Path) -> None:
    evaluation(tmp_path, "sound-a", 0.1, [0])
    evaluation(tmp_path, "sound-b", 0.2, [1], weights="1")
    evaluation(tmp_path, "sound-c", 0.3, [2], norm="l2")
    evaluation(tmp_path, "sound-d", 0.4, [3], n=6)
    assert [[point.eps for point in curve.points] for curve in curves(tmp_path)] == [[0.1], [0.2], [0.3], [0.4]]


def test_a_folder_without_attacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no evaluation with attacks"):
        curves(tmp_path)


def test_one_evaluation_gives_a_curve_of_one_point(tmp_path: Path) -> None:
    evaluation(tmp_path, "sound-a", 0.1, [0])
    evaluation(tmp_path, "sound-b", 0.2, [1])
    (curve,) = curves(tmp_path / "evaluation" / "sound-b")
    assert [point.eps for point in curve.points] == [0.2]
    assert "suite differs" not in text(curve)


def test_an_evaluation_with_a_missing_record_is_refused(tmp_path: Path) -> None:
    evaluation(tmp_path, "sound-a", 0.1, [0])
    (tmp_path / "evaluation" / "sound-a" / "pgd.npz").unlink()
    with pytest.raises(UserError, match=r"sound-a: damaged \(missing or changed .*: pgd\.npz"):
        curves(tmp_path)
