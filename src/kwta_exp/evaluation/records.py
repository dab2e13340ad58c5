"""What happened to each image: one small columnar file an attack, whole after every chunk."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kwta_exp.errors import UserError
from kwta_exp.received import require_plain
from kwta_exp.storage import write_bytes

Column = npt.NDArray[Any]


@dataclass
class Record:
    """Rows of one attack (or of the clean pass), in the order the images were judged.

    The ``.npz`` file holds one array a column, all of one length, and the costs so far.

    Columns: ``index`` (of the test image in its dataset), ``digest`` (first 16 hex digits of the
    uint8 image's SHA-256), ``label``, ``prediction``, ``margin`` (true logit minus the best other
    one: negative is an error), and for attacks ``fooled``, ``unconfirmed`` (an error that was not made
    again, so the image counts as standing), ``distance`` (in the threat's norm), ``queries`` and ``steps``
    (forward and backward passes until fooled; see :class:`~kwta_exp.evaluation.counting.Counted`) and ``key``
    (the seed of its random stream).
    """

    path: Path
    columns: dict[str, Column] = field(default_factory=dict)
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0

    @classmethod
    def open(cls, path: Path, expected: Tensor | None = None) -> "Record":
        """Continue the record at ``path``, or begin one.

        Args:
            path: the file.
            expected: the ``index`` of the images to judge, in order; the rows must be its beginning.

        Raises:
            UserError: if the file is damaged or of other images.
        """
        if not path.exists():
            return cls(path)
        try:
            require_plain(path)
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                columns = dict(file)
            costs = {name: columns.pop(name).item() for name in ("forwards", "backwards", "seconds")}
            rows = {len(column) for column in columns.values()}
            index = columns["index"]
            if len(rows) != 1 or (expected is not None and index.tolist() != expected[: len(index)].tolist()):
                raise ValueError("its rows are not those of the images to judge")
        except Exception as error:  # damaged bytes make the reader fail in any way whatever
            raise UserError(f"evaluation record {path}: damaged ({error}); delete it to redo it") from error
        return cls(path, columns, **costs)

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
        buffer = io.BytesIO()
        costs = {"forwards": self.forwards, "backwards": self.backwards, "seconds": self.seconds}
        np.savez_compressed(buffer, **self.columns, **costs)  # type: ignore[arg-type]
        write_bytes(self.path, buffer.getvalue())
