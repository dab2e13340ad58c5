"""What happened to each image: one small columnar file an attack, whole after every chunk."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kwta_exp.errors import DamagedError
from kwta_exp.sealed import read_arrays, write_arrays
from kwta_exp.storage import damaged, set_aside

log = logging.getLogger(__name__)

Column = npt.NDArray[Any]

CLEAN_COLUMNS = {"index": "i", "digest": "S", "label": "i", "prediction": "i", "margin": "f"}
"""What each column of the clean record is called, and of which kind it is (numpy's ``dtype.kind``)."""

ATTACK_COLUMNS = CLEAN_COLUMNS | {
    "fooled": "b", "unconfirmed": "b", "distance": "f", "queries": "i", "steps": "i", "key": "i",
}  # fmt: skip
"""The same of an attack's record."""

RANDOM_COLUMNS = {"errors": "i", "draws": "i"}
"""What every record of a random network has beside."""

_COSTS = {"forwards": int, "backwards": int, "seconds": float}


@dataclass
class Record:
    """Rows of one attack (or of the clean pass), in the order the images were judged.

    The ``.npz`` file holds one array a column, all of one length, the costs so far, and a checksum.

    Columns: ``index`` (of the test image in its dataset), ``digest`` (first 16 hex digits of the
    uint8 image's SHA-256), ``label``, ``prediction``, ``margin`` (the largest other logit minus
    the true one: positive is an error), and for attacks ``fooled``, ``unconfirmed`` (an error that was not
    confirmed, so the image counts as robust), ``distance`` (in the threat's norm), ``queries`` and ``steps``
    (forward and backward passes until fooled; see :class:`~kwta_exp.evaluation.query_counter.QueryCounter`) and
    ``key`` (the seed of its random stream). Of a random network also ``errors``, how many of its ``draws`` err.
    """

    path: Path
    columns: dict[str, Column] = field(default_factory=dict)
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0

    @classmethod
    def read(cls, path: Path, expected: Mapping[str, str]) -> "Record":
        """The record at ``path``.

        Args:
            path: the file.
            expected: :data:`CLEAN_COLUMNS` or :data:`ATTACK_COLUMNS`.

        Raises:
            UserError: if there is none.
            DamagedError: if it is not as it was written, or has other columns.
        """
        columns = read_arrays(path)
        try:
            costs = {name: kind(columns.pop(name).item()) for name, kind in _COSTS.items()}
            kinds = {name: column.dtype.kind for name, column in columns.items()}
            if kinds not in (dict(expected), {**expected, **RANDOM_COLUMNS}):
                lacking = ", ".join(sorted(expected.keys() - kinds.keys())) or "none"
                raise ValueError(f"its columns are not those of a record; lacking: {lacking}")
            index = columns["index"]
            if {column.shape for column in columns.values()} != {(len(np.unique(index)),)}:
                raise ValueError("its columns are not all of one row for each image")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise damaged(path, error) from error
        return cls(path, columns, **costs)

    @classmethod
    def resumed(cls, path: Path, expected: Mapping[str, str], images: Tensor) -> "Record":
        """Continue the record at ``path``, or begin one; a damaged file is set aside.

        Args:
            path: the file.
            expected: as for :meth:`read`.
            images: the ``index`` of the images to judge, in order; the rows must be its beginning.
        """
        if not path.exists():
            return cls(path)
        try:
            record = cls.read(path, expected)
            index = record.columns["index"]
            if index.tolist() != images[: len(index)].tolist():
                raise damaged(path, "its rows are not those of the images to judge")
        except DamagedError as error:
            return cls.anew(path, error)
        return record

    @classmethod
    def anew(cls, path: Path, why: object) -> "Record":
        """Set the file aside and begin the record again."""
        log.warning("judging anew: %s; kept as %s", why, set_aside(path, ".damaged").name)
        return cls(path)

    def __len__(self) -> int:
        return len(self.columns["index"]) if self.columns else 0

    def append(self, rows: Mapping[str, Column], forwards: int, backwards: int, seconds: float) -> None:
        """Add the rows of one chunk and what they cost; :meth:`save` makes them last."""
        self.columns = {
            name: np.concatenate([self.columns[name], new]) if self.columns else new
            for name, new in rows.items()
        }
        self.forwards += forwards
        self.backwards += backwards
        self.seconds += seconds

    def save(self) -> None:
        """Replace the file."""
        costs = {name: np.array(getattr(self, name)) for name in _COSTS}
        write_arrays(self.path, {**self.columns, **costs})
