"""The curves of a figure of several runs: what each is of, and how it looks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kwta_exp.draw.style import look_of
from kwta_exp.errors import UserError
from kwta_exp.report.runs import Run, shown, varying

MOST = 8
"""More curves than this cannot be told apart."""


@dataclass(frozen=True)
class Group:
    """Runs that one curve is of.

    Attributes:
        label: what tells them from the others.
        look: colour, dashes and marker; all curves of an activation are of one colour.
        runs: one, or several that differ in their seed.
    """

    label: str
    look: dict[str, Any]
    runs: tuple[Run, ...]


def groups(kind: str, runs: Sequence[Run], *, seeds_apart: bool = False) -> list[Group]:
    """The curves of a figure.

    Args:
        kind: of the figure, for messages.
        runs: that it shows.
        seeds_apart: give each run a curve of its own.

    Raises:
        UserError: for more than :data:`MOST` curves, or none.
    """
    keys = _needed([key for key in varying(runs) if key != "seed" or seeds_apart], runs)
    found: dict[str, list[Run]] = {}
    for run in runs:
        parts = [_part(key, run.settings[key]) for key in keys if run.settings.get(key) is not None]
        found.setdefault(", ".join(parts) or _activation(run), []).append(run)
    if not found:
        raise UserError(f"draw {kind}: no runs to draw; kwta-exp list shows which there are")
    if len(found) > MOST:
        raise UserError(
            f"draw {kind}: {len(found)} curves; expected at most {MOST}: choose runs by KEY=VALUE, such as"
            " training=natural activation.ratio=0.1,0.2"
        )
    return [
        Group(label, look_of(_activation(of_label[0]), number), tuple(of_label))
        for number, (label, of_label) in enumerate(found.items())
    ]


def _needed(keys: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """``keys`` without those that follow from the others: a point decides an activation and its ratio.

    An option follows from other options only: a ratio of its own does not name an activation.
    """
    kept = list(keys)
    for key in reversed([key for key in keys if key != "seed"]):
        others = [each for each in kept if each not in (key, "seed") and ("." in key or "." not in each)]
        if len(_told_apart(others, runs)) == len(_told_apart([*others, key], runs)):
            kept.remove(key)
    return kept


def _told_apart(keys: Sequence[str], runs: Sequence[Run]) -> set[tuple[str, ...]]:
    return {tuple(shown(run.settings.get(key)) for key in keys) for run in runs}


def _activation(run: Run) -> str:
    return str(run.settings.get("activation"))


def _part(key: str, value: Any) -> str:
    """``kwta`` for an option, ``ratio=0.1`` for a value."""
    return f"{key.rpartition('.')[2]}={shown(value)}" if "." in key or key == "seed" else shown(value)
