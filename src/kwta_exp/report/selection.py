"""The runs that a command's arguments name: folders, a part of their names, values that they must have."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from kwta_exp.errors import UserError
from kwta_exp.report.runs import Run, find, selected
from kwta_exp.sweeps import Sweep


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Let a command take what :func:`selection` reads, as ``select``."""
    parser.add_argument(
        "select", nargs="*", metavar="FOLDER | PATTERN | KEY=VALUE",
        help="folders with runs or of a grid (default: outputs), a part of their names, values they must have",
    )  # fmt: skip


def selection(texts: Sequence[str]) -> list[Run]:
    """The runs that ``texts`` name.

    Args:
        texts: folders of runs, of grids or with runs in them (none: :func:`outputs`); at most one pattern of
            names; and ``KEY=VALUE``.

    Raises:
        UserError: for two patterns.
    """
    wanted = [text for text in texts if "=" in text]
    folders = [Path(text) for text in texts if "=" not in text and Path(text).is_dir()]
    patterns = [text for text in texts if "=" not in text and not Path(text).is_dir()]
    if len(patterns) > 1:
        raise UserError(
            f"{' '.join(patterns)}: expected one pattern; quote it, so that the shell leaves it as it is"
        )
    roots = [root for folder in folders or [outputs()] for root in Sweep(folder).runs() or [folder]]
    return selected(map(Run.read, find(roots)), patterns[0] if patterns else None, wanted)


def first_folder(texts: Sequence[str]) -> Path:
    """The folder that a command writes to: the first of its arguments if that is one, else :func:`outputs`."""
    return Path(texts[0]) if texts and Path(texts[0]).is_dir() else outputs()


def outputs() -> Path:
    """Where runs lie, as in ``conf/config.yaml``."""
    return Path(os.environ.get("KWTA_EXP_OUTPUTS", "outputs"))
