"""Is one setting more robust than another, image by image?

The test images are the same for all runs, so settings are compared on each of them. For every image, the
outcomes of a setting (robust or not) are averaged over its seeds, and so are the baseline's. The mean of these
paired differences is reported, with a p-value for its being zero: with one seed on both sides McNemar's exact
test, else a t-test over the images. The p-values of a table are corrected together by Holm's method ("A simple
sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979).

The test is of these networks on other images. How much other seeds differ, the interval of each mean says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kwta_exp.errors import UserError
from kwta_exp.evaluation.stored import Stored
from kwta_exp.report.runs import shown

if TYPE_CHECKING:
    from kwta_exp.report.summary import Measured


@dataclass(frozen=True)
class Difference:
    """Of a setting to the baseline: ``None`` for the baseline itself, or where it cannot be computed.

    Attributes:
        mean: of the paired differences in robust accuracy.
        p: corrected for the number of rows.
        why: why there is none.
    """

    mean: float | None
    p: float | None
    why: str = ""

    def cells(self) -> dict[str, str]:
        """For a table."""
        if self.mean is None or self.p is None:
            return {"difference": self.why, "p": ""}
        return {"difference": f"{100 * self.mean:+.1f}", "p": f"{self.p:.2g}"}

    def numbers(self) -> dict[str, Any]:
        """For a CSV file."""
        return {"difference": self.mean, "p": self.p}


def differences(
    settings: Sequence[Sequence["Measured"]], baseline: Sequence[str]
) -> tuple[list[Difference], str]:
    """The difference of each setting's worst case to the baseline's, and a note that explains them.

    Args:
        settings: the evaluations of each setting.
        baseline: ``KEY=VALUE`` texts that one setting matches.

    Raises:
        UserError: if not exactly one setting matches ``baseline``, or an evaluation is damaged.
    """
    wanted = [text.partition("=") for text in baseline]
    matching = [
        position
        for position, evaluations in enumerate(settings)
        if all(shown(evaluations[0].run.settings.get(key)) == value for key, _, value in wanted)
    ]
    if len(matching) != 1:
        raise UserError(
            f"--baseline {' '.join(baseline)}: {len(matching)} rows of this table match; expected KEY=VALUE"
            " texts that one row alone has (choose fewer runs, such as those of one grid)"
        )
    (chosen,) = matching
    images, base = _outcomes(settings[chosen])
    found: list[Difference] = []
    raw: dict[int, float] = {}
    for position, evaluations in enumerate(settings):
        if position == chosen:
            found.append(Difference(None, None, "baseline"))
            continue
        its_images, robust = _outcomes(evaluations)
        if not np.array_equal(images, its_images):
            found.append(Difference(None, None, "other images"))
            continue
        raw[position] = p_value(robust, base)
        found.append(Difference(float(robust.mean() - base.mean()), None))
    corrected = dict(zip(raw, holm(list(raw.values())), strict=True))
    found = [
        Difference(each.mean, corrected[position]) if position in corrected else each
        for position, each in enumerate(found)
    ]
    note = (
        f"difference: worst case in points against {' '.join(baseline)}, paired image by image over the mean of"
        f" the seeds; p corrected for {len(raw)} comparisons (Holm)"
    )
    return found, note


def _outcomes(evaluations: Sequence["Measured"]) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """The digests of the images, and how each fared: ``(seeds, n)``, 1 where it is robust."""
    stored = [Stored.read(each.folder) for each in evaluations]
    digests = [each.outcome.clean.columns["digest"] for each in stored]
    if any(not np.array_equal(digests[0], other) for other in digests[1:]):
        return np.array([]), np.zeros((1, 1))
    return digests[0], np.array([each.outcome.robust for each in stored], dtype=np.float64)


def p_value(robust: npt.NDArray[np.float64], base: npt.NDArray[np.float64]) -> float:
    """The probability of a mean difference this large if there were none.

    Args:
        robust: ``(seeds, n)``, 1 where an image is robust.
        base: the same of the baseline; it may have another number of seeds.
    """
    from scipy.stats import binomtest, ttest_1samp  # slow to import

    each_image = robust.mean(0) - base.mean(0)
    if not each_image.any():
        return 1.0
    if len(robust) == len(base) == 1:
        better, worse = int((each_image > 0).sum()), int((each_image < 0).sum())
        return float(binomtest(better, better + worse).pvalue)
    if np.ptp(each_image) == 0:
        return 0.0
    return float(ttest_1samp(each_image, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, corrected so that the chance of any false claim among them stays below the level."""
    order = np.argsort(p_values)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, position in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        corrected[int(position)] = largest
    return corrected
