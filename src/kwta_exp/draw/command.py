"""``kwta-exp draw KIND``: the kinds of figures, what each takes, and where the files go."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from kwta_exp.draw.style import Drawing, save
from kwta_exp.report.selection import add_selection, first_folder, selection
from kwta_exp.run_folder import run_of

Kind: TypeAlias = "Callable[[str, Callable[[argparse.Namespace], Drawing], str], argparse.ArgumentParser]"
"""Adds a kind of figure: its name, a function of the parsed arguments, and what it shows."""


def add_kinds(parser: argparse.ArgumentParser) -> Kind:
    """Give ``kwta-exp draw`` the kinds that records alone are enough for, and return what adds another one.

    A kind whose figure is of one run takes its folder as ``select``.
    """
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True, dest="kind")

    def kind(
        name: str, drawing: Callable[[argparse.Namespace], Drawing], about: str
    ) -> argparse.ArgumentParser:
        added = kinds.add_parser(name, help=about, description=about)
        added.set_defaults(drawing=drawing)
        added.add_argument(
            "-o", "--output", type=Path, metavar="FOLDER",
            help="where KIND.svg, KIND.png and KIND.csv go (default: figures, in the first folder given)",
        )  # fmt: skip
        return added

    ratio = kind("ratio", _ratio, "accuracy against the sparsity ratio, under plain PGD and in the worst case")
    add_selection(ratio)
    for name, drawing, about in (
        ("passes", _passes, "accuracy against passes an image, for each attack of an evaluation"),
        ("checks", _checks, "the checks behind a verdict against their thresholds"),
        ("confusion", _confusion, "accuracy of each class, and which class an attack makes of which"),
    ):
        kind(name, drawing, about).add_argument(
            "select", type=Path, metavar="RUN", help="a run's folder, or that of one of its evaluations"
        )
    add_selection(kind("training", _training, "loss, accuracies and ratio against the epoch"))
    add_selection(kind("eps", _eps, "accuracy against eps, from all evaluations of each run"))
    return kind


def draw(args: argparse.Namespace) -> str:
    """Draw what the arguments of :func:`add_kinds` say; the files written, one a line."""
    figure, rows = args.drawing(args)
    named = args.select if isinstance(args.select, list) else [args.select]
    folder = args.output or run_of(first_folder(list(map(str, named)))) / "figures"
    return "\n".join(map(str, save(figure, folder / args.kind, rows)))


def _ratio(args: argparse.Namespace) -> Drawing:
    from kwta_exp.draw import ratio
    from kwta_exp.report.summary import measured

    return ratio.draw(ratio.points(measured(selection(args.select))))


def _passes(args: argparse.Namespace) -> Drawing:
    from kwta_exp.draw import passes
    from kwta_exp.evaluation.stored import Stored

    return passes.draw(Stored.read(args.select))


def _checks(args: argparse.Namespace) -> Drawing:
    from kwta_exp.draw import checks
    from kwta_exp.evaluation.stored import Stored

    return checks.draw(Stored.read(args.select).results)


def _confusion(args: argparse.Namespace) -> Drawing:
    from kwta_exp.draw import confusion
    from kwta_exp.evaluation.stored import Stored

    return confusion.draw(Stored.read(args.select))


def _training(args: argparse.Namespace) -> Drawing:
    from kwta_exp.draw import training

    return training.draw(selection(args.select))


def _eps(args: argparse.Namespace) -> Drawing:
    from kwta_exp.draw import eps

    return eps.draw(selection(args.select))
