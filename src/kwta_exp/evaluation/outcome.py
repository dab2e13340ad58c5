"""What an evaluation found: one record for the clean pass, one for each attack."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kwta_exp.evaluation.records import Record

Bools = npt.NDArray[np.bool_]


@dataclass
class Outcome:
    """The records of an evaluation.

    Attributes:
        clean: the clean record of all n images.
        records: one for each attack, in the suite's order.
        inapplicable: attacks that were not run or do not apply, with the reason.
    """

    clean: Record
    records: dict[str, Record] = field(default_factory=dict)
    inapplicable: dict[str, str] = field(default_factory=dict)

    @property
    def clean_correct(self) -> Bools:
        """Which images are classified correctly clean, bool ``(n,)``."""
        correct: Bools = self.clean.columns["prediction"] == self.clean.columns["label"]
        return correct

    def fooled(self, name: str) -> Bools:
        """Which images the attack ``name`` fooled, bool ``(n,)``."""
        fooled = np.zeros(len(self.clean), dtype=np.bool_)
        record = self.records[name]
        if len(record):
            images = self.clean.columns["index"]
            order = np.argsort(images)
            fooled[order[np.searchsorted(images, record.columns["index"], sorter=order)]] = record.columns[
                "fooled"
            ]
        return fooled

    def share_right(self, names: Iterable[str]) -> npt.NDArray[np.float64] | None:
        """Of each image, the smallest share of draws that are right, clean and under these attacks, ``(n,)``.

        ``None`` for a network that is not random.
        """
        if "errors" not in self.clean.columns:
            return None
        images = self.clean.columns["index"]
        order = np.argsort(images)
        share = 1 - self.clean.columns["errors"] / self.clean.columns["draws"]
        for record in (self.records[name] for name in names):
            if len(record):
                at = order[np.searchsorted(images, record.columns["index"], sorter=order)]
                right = 1 - record.columns["errors"] / record.columns["draws"]
                share[at] = np.minimum(share[at], right)
        return share

    @property
    def robust(self) -> Bools:
        """Which images are classified correctly clean and fooled by no attack so far, bool ``(n,)``."""
        return self.robust_to(self.records)

    def robust_to(self, names: Iterable[str]) -> Bools:
        """The same for some of the attacks."""
        robust = self.clean_correct
        for name in names:
            robust = robust & ~self.fooled(name)
        return robust

    def due(self, everywhere: int | None) -> npt.NDArray[np.intp]:
        """The positions of the images that the next attack must run on, in order.

        Args:
            everywhere: how many of the first images every attack runs on; beyond these, only on robust ones.
                ``None`` for all.
        """
        first = np.arange(len(self.clean)) < (len(self.clean) if everywhere is None else everywhere)
        return np.flatnonzero(self.clean_correct & (first | self.robust))
