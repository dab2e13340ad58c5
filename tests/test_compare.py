"""Paired comparison: on the same images, by those on which two runs disagree."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from kwta_exp.errors import UserError
from kwta_exp.report.compare import Outcomes, compare


def outcomes(name: str, clean: list[int], standing: list[int], order: list[int] | None = None) -> Outcomes:
    rows = np.array(order or range(len(clean)))
    digest = np.array([f"{i:016x}".encode() for i in rows], dtype="S16")
    return Outcomes(
        name, ("linf", 0.1), rows, digest, np.array(clean, bool)[rows], np.array(standing, bool)[rows]
    )


def test_only_images_on_which_the_runs_disagree_count() -> None:
    a = outcomes("one", [1] * 20, [1] * 12 + [0] * 8)
    b = outcomes("two", [1] * 20, [1] * 3 + [0] * 16 + [1], order=list(range(19, -1, -1)))
    said = compare(a, b)
    assert "clean: A 100.0%, B 100.0%\n  right in A alone 0, in B alone 0; they agree on every image" in said
    p = binomtest(9, 10).pvalue
    assert (
        f"that ran: A 60.0%, B 20.0%\n  right in A alone 9, in B alone 1; p = {p:.2g}: A has more right" in said
    )
    few = outcomes("few", [1] * 20, [1] * 11 + [0] * 9)
    assert "right in A alone 1, in B alone 0; p = 1: no difference is shown" in compare(a, few)


def test_runs_on_other_images_or_threats_are_not_compared() -> None:
    a = outcomes("one", [1, 1], [1, 0])
    with pytest.raises(UserError, match=r"judged on other images \(2 and 3\)"):
        compare(a, outcomes("two", [1, 1, 1], [1, 0, 0]))
    b = outcomes("two", [1, 1], [1, 0])
    b.digest[0] = b"0" * 15 + b"9"
    with pytest.raises(UserError, match="judged on other images"):
        compare(a, b)
    other = Outcomes("two", ("l2", 0.1), a.index, a.digest, a.clean, a.standing)
    with pytest.raises(UserError, match="expected the same threat"):
        compare(a, other)


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished evaluation"):
        Outcomes.of(tmp_path)
