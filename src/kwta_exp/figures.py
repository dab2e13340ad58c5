"""``kwta-exp draw KIND``: the kinds of figures, what each takes, and where the files go."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kwta_exp.draw.style import Drawing, save
from kwta_exp.errors import UserError
from kwta_exp.report.selection import add_selection, first_folder, selection
from kwta_exp.run_folder import run_of

if TYPE_CHECKING:
    from kwta_exp.trained_networks import TrainedNetworks


def add_kinds(parser: argparse.ArgumentParser) -> None:
    """Give ``kwta-exp draw`` its kinds. Each sets ``drawing``, a function of the parsed arguments."""
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True, dest="kind")

    def kind(
        name: str, drawing: Callable[[argparse.Namespace], Drawing], about: str
    ) -> argparse.ArgumentParser:
        added = kinds.add_parser(name, help=about, description=about)
        added.set_defaults(drawing=drawing, select=[])
        added.add_argument(
            "-o", "--output", type=Path, metavar="FOLDER",
            help="where KIND.svg, KIND.png and KIND.csv go (default: figures, in the first folder given)",
        )  # fmt: skip
        return added

    activations = kind("activations", _activations, "what ReLU, max-pooling, LWTA and k-WTA let through")
    activations.add_argument("--values", nargs="+", type=float, metavar="X", help="the vector")
    activations.add_argument("--k", type=int, default=3, help="winners of k-WTA (default: 3)")
    activations.add_argument(
        "--group-size", type=int, default=4, metavar="N", help="of LWTA and max-pooling (default: 4)"
    )

    fit = kind("fit", _fit, "a k-WTA and a ReLU network fitted to points of a curve, and their discontinuities")
    fit.add_argument("--ratio", type=float, default=0.1, help="sparsity ratio of k-WTA (default: 0.1)")
    fit.add_argument("--hidden", nargs="+", type=int, default=[1000], metavar="WIDTH", help="(default: 1000)")
    fit.add_argument("--points", type=int, default=12, help="training points (default: 12)")
    fit.add_argument("--steps", type=int, default=2000, help="of Adam (default: 2000)")
    fit.add_argument("--seed", type=int, default=0, help="of the initial weights (default: 0)")

    landscape = kind(
        "landscape", _landscape, "the loss of runs over the gradient's direction and a random one, side by side"
    )
    _add_runs(landscape, images=1)
    landscape.add_argument("--points", type=int, default=41, help="along each axis (default: 41)")
    landscape.add_argument("--extent", type=float, help="how far the axes go, in pixel units (default: 2 eps)")

    jumps = kind(
        "discontinuities",
        _discontinuities,
        "how often networks jump inside the ball, and which units take part",
    )
    _add_runs(jumps, images=5)

    ratio = kind("ratio", _ratio, "accuracy against the sparsity ratio, under plain PGD and in the worst case")
    add_selection(ratio)
    for name, drawing, about in (
        ("passes", _passes, "accuracy against passes an image, for each attack of an evaluation"),
        ("checks", _checks, "the checks behind a verdict against their thresholds"),
        ("confusion", _confusion, "accuracy of each class, and which class an attack makes of which"),
    ):
        _add_evaluation(kind(name, drawing, about))
    add_selection(kind("training", _training, "loss, accuracies and ratio against the epoch"))
    add_selection(kind("eps", _eps, "accuracy against eps, from all evaluations of each run"))

    examples = kind("examples", _examples, "adversarial examples of a run with evaluation.save_images=true")
    _add_evaluation(examples)
    examples.add_argument("--images", type=int, default=6, metavar="N", help="how many (default: 6)")
    _add_trust(examples)


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    """The evaluation that is drawn."""
    about = "a run's folder, or that of one of its evaluations"
    parser.add_argument("select", nargs=1, type=Path, metavar="RUN_FOLDER", help=about)


def _add_runs(parser: argparse.ArgumentParser, images: int) -> None:
    """The runs whose networks are looked at."""
    parser.add_argument("select", nargs="+", type=Path, metavar="RUN_FOLDER")
    parser.add_argument(
        "--images", type=int, default=images,
        help=f"test images that all of them classify correctly (default: {images})",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the random directions (default: 0)")
    _add_trust(parser)


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust", action="store_true", help="build any class that the run folders name; only for your own runs"
    )


def draw(args: argparse.Namespace) -> str:
    """Draw what the arguments of :func:`add_kinds` say; the files written, one a line."""
    figure, rows = args.drawing(args)
    folder = args.output or run_of(first_folder(list(map(str, args.select)))) / "figures"
    return "\n".join(map(str, save(figure, folder / args.kind, rows)))


def _activations(args: argparse.Namespace) -> Drawing:
    from kwta_exp.draw import activations

    return activations.draw(args.values or activations.VALUES, args.k, args.group_size)


def _fit(args: argparse.Namespace) -> Drawing:
    from functools import partial

    from torch import nn

    from kwta_exp.activations import KWTA
    from kwta_exp.analysis.fit import fit
    from kwta_exp.draw import fit as drawing
    from kwta_exp.models.factory import ActivationFactory

    _require("--ratio", args.ratio, "in (0, 1]", valid=0 < args.ratio <= 1)
    _require("--hidden", args.hidden, "widths of 1 or more", valid=all(width >= 1 for width in args.hidden))
    _require("--points", args.points, "2 or more", valid=args.points >= 2)
    _require("--steps", args.steps, "1 or more", valid=args.steps >= 1)
    kinds: dict[str, ActivationFactory] = {"kwta": partial(KWTA, ratio=args.ratio), "relu": nn.ReLU}
    fits = {name: fit(kind, args.points, args.hidden, args.steps, args.seed) for name, kind in kinds.items()}
    return drawing.draw(fits, args.points)


def _landscape(args: argparse.Namespace) -> Drawing:
    from kwta_exp.analysis.landscape import landscape
    from kwta_exp.draw import landscape as drawing

    _require("--points", args.points, "an odd number of 3 or more", valid=args.points >= 3 and args.points % 2)
    _require("--extent", args.extent, "more than 0", valid=args.extent is None or args.extent > 0)
    trained = _trained(args)
    extent = args.extent or 2 * trained.threat.eps
    return drawing.draw(
        {
            name: landscape(network, trained.x, trained.y, extent, args.points, seed=args.seed)
            for name, network in trained.networks.items()
        }
    )


def _discontinuities(args: argparse.Namespace) -> Drawing:
    from kwta_exp.analysis.pieces import Patterns, around
    from kwta_exp.draw import discontinuities as drawing

    trained = _trained(args)
    found = {}
    for name, network in trained.networks.items():
        patterns = Patterns(network)
        lines = around(patterns, trained.x, trained.threat.eps, args.seed)
        activity = patterns.activity(trained.test)
        found[name] = drawing.Jumps(trained.activations[name], lines, *activity, n=len(trained.test))
    return drawing.draw(found, trained.threat.eps)


def _trained(args: argparse.Namespace) -> "TrainedNetworks":
    from kwta_exp.trained_networks import TrainedNetworks

    _require("--images", args.images, "1 or more", valid=args.images >= 1)
    return TrainedNetworks.of(args.select, args.images, args.trust)


def _require(option: str, value: object, expected: str, *, valid: bool) -> None:
    if not valid:
        raise UserError(f"{option} {value}: expected {expected}")


def _ratio(args: argparse.Namespace) -> Drawing:
    from kwta_exp.draw import ratio
    from kwta_exp.report.summary import measured

    return ratio.draw(ratio.points(measured(selection(args.select))))


def _passes(args: argparse.Namespace) -> Drawing:
    from kwta_exp.draw import passes
    from kwta_exp.evaluation.stored import Stored

    return passes.draw(Stored.read(args.select[0]))


def _checks(args: argparse.Namespace) -> Drawing:
    from kwta_exp.draw import checks
    from kwta_exp.evaluation.stored import Stored

    return checks.draw(Stored.read(args.select[0]).results)


def _confusion(args: argparse.Namespace) -> Drawing:
    from kwta_exp.draw import confusion
    from kwta_exp.evaluation.stored import Stored

    return confusion.draw(Stored.read(args.select[0]))


def _training(args: argparse.Namespace) -> Drawing:
    from kwta_exp.draw import training

    return training.draw(selection(args.select))


def _eps(args: argparse.Namespace) -> Drawing:
    from kwta_exp.draw import eps

    return eps.draw(selection(args.select))


def _examples(args: argparse.Namespace) -> Drawing:
    from kwta_exp import examples
    from kwta_exp.config import user_errors
    from kwta_exp.plan import plan_to_judge

    (folder,) = args.select
    with user_errors():
        plan = plan_to_judge(run_of(folder), [], None, args.trust)
        return examples.draw(plan, folder, args.images)
