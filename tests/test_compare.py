"""Paired comparison of two evaluations: only the images on which they disagree count."""

from pathlib import Path

import pytest
from scipy.stats import binomtest

from kwta_exp.attacks import Threat
from kwta_exp.errors import UserError
from kwta_exp.evaluation.stored import Stored
from kwta_exp.report.compare import compare
from tests import stored


def evaluated(folder: Path, fooled: range | None, n: int = 20, eps: float = 0.1) -> Stored:
    """An evaluation of ``n`` images, all of them classified correctly clean."""
    attacks = {} if fooled is None else {"pgd": fooled}
    stored.evaluation(folder, "quick-x", [True] * n, attacks, threat=Threat(norm="linf", eps=eps))
    return Stored.read(folder)


def test_mcnemar_counts_only_images_on_which_the_networks_disagree(tmp_path: Path) -> None:
    a, b = evaluated(tmp_path / "a", range(12, 20)), evaluated(tmp_path / "b", range(3, 19))
    shown = compare(a, b)
    assert "clean: A 100.0%, B 100.0%\n  only A correct: 0, only B correct: 0; no image on which" in shown
    p = binomtest(9, 10).pvalue
    assert (
        "worst case: A 60.0%, B 20.0%\n"
        f"  only A correct: 9, only B correct: 1; p = {p:.2g}, A is better"
    ) in shown  # fmt: skip
    c = evaluated(tmp_path / "c", range(11, 20))
    assert "only A correct: 1, only B correct: 0; p = 1, no significant difference" in compare(a, c)
    assert "attacks differ" not in shown


def test_different_attacks_are_reported(tmp_path: Path) -> None:
    a, b = evaluated(tmp_path / "a", range(5)), evaluated(tmp_path / "b", range(5))
    b.settings["pgd"] = {"steps": 9}
    assert "A, suite quick: pgd\n  B, suite quick: pgd\n  same name, other settings: pgd" in compare(a, b)


def test_evaluations_of_different_images_or_threats_are_refused(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", range(1), n=2)
    with pytest.raises(UserError, match=r"the test images differ \(2 and 3\)"):
        compare(a, evaluated(tmp_path / "b", range(1), n=3))
    other_pixels = evaluated(tmp_path / "c", range(1), n=2)
    other_pixels.outcome.clean.columns["digest"][0] = b"0" * 15 + b"9"
    with pytest.raises(UserError, match="the test images differ"):
        compare(a, other_pixels)
    with pytest.raises(UserError, match="expected the same threat"):
        compare(a, evaluated(tmp_path / "d", range(1), n=2, eps=0.2))


def test_an_evaluation_without_attacks_is_refused(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", range(1))
    with pytest.raises(UserError, match="no attack ran; expected an evaluation with a suite"):
        compare(a, evaluated(tmp_path / "b", None))
