"""The command line: ``kwta-exp COMMAND``, or ``python -m kwta_exp COMMAND``."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kwta_exp.errors import UserError, printable
from kwta_exp.figures import add_kinds, draw
from kwta_exp.report.selection import add_selection, outputs, selection
from kwta_exp.runtime import let_idle_threads_sleep
from kwta_exp.shell import at_the_shell

_OVERRIDES_HELP = (
    "Overrides are written as for run.py (activation=mine threat.eps=8/255). A group chosen here is not read"
    " from the run folder."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. A user's mistake prints one message and exits with status 1.

    Args:
        arguments: without the program's name; ``None``: from ``sys.argv``.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["run"]:
        _run(arguments[1:])
        return
    args = _parser().parse_args(arguments)
    let_idle_threads_sleep()
    with at_the_shell():
        print(printable(args.handler(args)))


def _run(overrides: Sequence[str]) -> None:
    from kwta_exp.command import main as run

    sys.argv = ["kwta-exp run", *overrides]
    run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kwta-exp", description="Train k-Winners-Take-All networks, attack them, and judge the result."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands.add_parser("run", help="train, attack and report: run.py for an installed package")

    def command(name: str, handler: Callable[[argparse.Namespace], str], about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about)
        added.set_defaults(handler=handler)
        return added

    plan = command("plan", _plan, "show a run's configuration, folder and progress without running it")
    plan.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for run")
    plan.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder of your own options")

    listed = command("list", _list, "show runs by what differs between them, with their state and accuracies")
    add_selection(listed)

    status = command("status", _status, "show how far a grid is: done, running, failed and why, missing")
    status.add_argument(
        "folder",
        nargs="?",
        type=Path,
        metavar="FOLDER",
        help="a grid's folder, or outputs: then its latest grid",
    )
    status.add_argument("--all", action="store_true", help="all grids of these outputs")

    summary = command(
        "summary", _summary, "one table of many runs: a row for each setting, seeds as an interval"
    )
    add_selection(summary)
    summary.add_argument(
        "--baseline", nargs="+", default=[], metavar="KEY=VALUE", help="compare every row with this one"
    )
    summary.add_argument(
        "--pivot", nargs=2, metavar=("DOWN", "ACROSS"), help="one key down and another across, one value a cell"
    )
    summary.add_argument("--value", default="worst case", help="what --pivot shows (default: worst case)")
    summary.add_argument("--format", choices=["text", "csv", "markdown", "html"], default="text")
    summary.add_argument("-o", "--output", type=Path, metavar="FILE", help="write it to a file")

    report = command("report", _report, "write report.html: a run, or many, on one page that opens offline")
    add_selection(report)
    report.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: report.html in the run's or grid's folder"
    )

    track = command("track", _track, "log runs in TensorBoard, MLflow or Weights & Biases, as tracking= does")
    track.add_argument(
        "tracker", choices=["tensorboard", "mlflow", "wandb"], help="what tracking= would choose"
    )
    add_selection(track)
    track.add_argument(
        "--with",
        nargs="+",
        default=[],
        dest="overrides",
        metavar="OVERRIDE",
        help="such as tracking.project=mine",
    )

    add_kinds(command("draw", draw, "draw a figure as SVG and PNG, with its numbers as CSV"))

    verify = command("verify", _verify, "recompute the worst case from weights and saved adversarial images")
    verify.add_argument("folder", type=Path, metavar="FOLDER", help="a run's, or one of its evaluations'")
    _add_override_options(verify)

    compare = command("compare", _compare, "compare two runs image by image (McNemar's test)")
    for name in ("first", "second"):
        compare.add_argument(name, type=Path, metavar="FOLDER", help="a run's, or one of its evaluations'")

    curve = command("curve", _curve, "print accuracy against eps, from all evaluations of a run")
    curve.add_argument("folder", type=Path, metavar="FOLDER", help="a run's, or one of its evaluations'")

    transfer = command("transfer", _transfer, "try adversarial images made on each run on all the others")
    transfer.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER")
    transfer.add_argument("--attack", default="pgd", help="an option of the group attack (default: pgd)")
    transfer.add_argument("--n", type=int, help="test images (default: all)")
    transfer.add_argument("--eps", type=_eps, help="radius, such as 8/255 (default: that of the first run)")
    transfer.add_argument("--seed", type=int, default=0, help="seed of the attack (default: 0)")
    transfer.add_argument("--work", type=Path, default=Path("outputs/transfer"), help="folder for the records")
    _add_override_options(transfer)
    return parser


def _add_override_options(parser: argparse.ArgumentParser) -> None:
    """The options of commands that rebuild a run's network."""
    parser.epilog = _OVERRIDES_HELP
    parser.add_argument(
        "--with", nargs="+", default=[], dest="overrides", metavar="OVERRIDE", help="change the configuration"
    )
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder of your own options")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="build any class and read any path that the run folder names; only for your own runs",
    )


def _eps(text: str) -> float:
    from pydantic import TypeAdapter, ValidationError

    from kwta_exp.fields import Eps

    try:
        return TypeAdapter(Eps).validate_python(float(text) if "/" not in text else text)
    except (ValueError, ValidationError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of 0 or more, such as 8/255") from error


def _plan(args: argparse.Namespace) -> str:
    from kwta_exp.config import composed, user_errors, yaml_of
    from kwta_exp.plan import Plan

    with user_errors():
        plan = Plan.of(*composed(args.overrides, args.config_dir))
        finished = plan.finished_results() is not None
    progress = "finished" if finished else "started" if plan.folder.environment.exists() else "not started"
    return f"{yaml_of(plan.cfg)}\n# {plan.folder.path}: {progress}"


def _list(args: argparse.Namespace) -> str:
    from kwta_exp.report.listing import listing

    return listing(selection(args.select))


def _status(args: argparse.Namespace) -> str:
    from kwta_exp.report.status import status, sweeps_in

    found = sweeps_in(args.folder or outputs())
    return "\n\n".join(map(status, found if args.all else found[:1]))


def _summary(args: argparse.Namespace) -> str:
    from kwta_exp.report.summary import measured, pivot, tables
    from kwta_exp.report.tabular import FORMATS

    found = tables(measured(selection(args.select)), args.baseline)
    if args.pivot:
        down, across = args.pivot
        found = [pivot(table, down, across, args.value) for table in found]
    text = "\n\n".join(map(FORMATS[args.format], found))
    if args.output is None:
        return text
    from kwta_exp.storage import write_text

    write_text(args.output, text + "\n")
    return f"{args.output} is written"


def _report(args: argparse.Namespace) -> str:
    from kwta_exp.draw.pages import figures_of
    from kwta_exp.draw.ratio import for_a_page
    from kwta_exp.report.pages import write_grid_page, write_run_page
    from kwta_exp.report.runs import Run, is_run
    from kwta_exp.run_folder import run_of
    from kwta_exp.sweeps import Sweep

    first = Path(args.select[0]) if args.select else outputs()
    if len(args.select) == 1 and first.is_dir() and is_run(run_of(first)):
        run = Run.read(run_of(first))
        return f"{write_run_page(run, args.output, figures_of(run))} is written"
    runs = selection(args.select)
    if not runs:
        raise UserError(f"{' '.join(args.select) or first}: no runs; kwta-exp list shows which there are")
    folder, command = first if first.is_dir() else outputs(), ""
    if Sweep(folder).begun:
        command = str(Sweep(folder).content().get("command", ""))
    to = args.output or folder / "report.html"
    title, figures = f"Runs in {folder.absolute().name}", for_a_page(runs)
    return f"{write_grid_page(runs, title, to, command, figures, figures_of)} is written"


def _track(args: argparse.Namespace) -> str:
    from kwta_exp.config import build, composed, user_errors
    from kwta_exp.tracking import Tracking, log_runs

    with user_errors():
        cfg, _ = composed([f"tracking={args.tracker}", *args.overrides])
        return log_runs(build(cfg, "tracking", Tracking), selection(args.select))


def _verify(args: argparse.Namespace) -> str:
    from kwta_exp.config import user_errors
    from kwta_exp.plan import plan_to_judge
    from kwta_exp.run_folder import run_of
    from kwta_exp.verify import verify

    folder = args.folder
    with user_errors():
        plan = plan_to_judge(run_of(folder), args.overrides, args.config_dir, args.trust)
        return "\n".join(verify(plan, folder))


def _compare(args: argparse.Namespace) -> str:
    from kwta_exp.evaluation.stored import Stored
    from kwta_exp.report.compare import compare

    return compare(Stored.read(args.first), Stored.read(args.second))


def _curve(args: argparse.Namespace) -> str:
    from kwta_exp.report.curve import curves, text

    return "\n\n".join(map(text, curves(args.folder)))


def _transfer(args: argparse.Namespace) -> str:
    from kwta_exp.config import user_errors
    from kwta_exp.plan import plan_to_judge
    from kwta_exp.transfer_matrix import matrix, names, overrides_for, text

    overrides = [*overrides_for(args.attack, args.eps), *args.overrides]
    with user_errors():
        plans = {
            name: plan_to_judge(folder, overrides, args.config_dir, args.trust)
            for name, folder in names(args.folders).items()
        }
        return text(matrix(plans, args.n, args.seed, args.work))
