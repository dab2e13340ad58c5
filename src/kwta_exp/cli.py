"""The command line: ``kwta-exp COMMAND``, or ``python -m kwta_exp COMMAND``."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kwta_exp.errors import printable
from kwta_exp.runtime import let_idle_threads_sleep
from kwta_exp.shell import at_the_shell

_JUDGING = (
    "OVERRIDES are those of run.py (activation=mine threat.eps=8/255); a group that they choose is not taken"
    " from the folder."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake is one message and exit status 1."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["run"]:
        _run(words[1:])
        return
    asked = _parser().parse_args(words)
    let_idle_threads_sleep()
    with at_the_shell():
        print(printable(asked.do(asked)))


def _run(words: Sequence[str]) -> None:
    from kwta_exp.command import main as run

    sys.argv = ["kwta-exp run", *words]
    run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kwta-exp", description="k-Winners-Take-All networks, trained, attacked, and judged."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands.add_parser("run", help="train, attack and report, as run.py does; --help lists its overrides")

    def command(name: str, do: Callable[[argparse.Namespace], str], about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about)
        added.set_defaults(do=do)
        return added

    plan = command("plan", _plan, "what a run would do: its configuration, its folder, what is done")
    plan.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for run")
    plan.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder of your own options")

    verify = command("verify", _verify, "recompute a worst case from weights and adversarial images alone")
    verify.add_argument("folder", type=Path, metavar="FOLDER", help="of a run, or of one of its evaluations")
    _judging(verify)

    compare = command("compare", _compare, "two runs, paired image by image (McNemar)")
    for name in ("first", "second"):
        compare.add_argument(name, type=Path, metavar="FOLDER", help="of a run, or of one of its evaluations")

    curve = command("curve", _curve, "accuracy against eps, from all evaluations of a run")
    curve.add_argument("folder", type=Path, metavar="FOLDER", help="of a run, or of one of its evaluations")

    transfer = command("transfer", _transfer, "who fools whom: adversarial images of each run, tried on all")
    transfer.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER")
    transfer.add_argument("--attack", default="pgd", help="a file of conf/attack (default: pgd)")
    transfer.add_argument("--n", type=int, help="test images (default: all)")
    transfer.add_argument("--eps", type=_eps, help="radius, such as 8/255 (default: the first run's)")
    transfer.add_argument("--seed", type=int, default=0, help="of the attack (default: 0)")
    transfer.add_argument("--work", type=Path, default=Path("outputs/transfer"), help="where records are kept")
    _judging(transfer)
    return parser


def _judging(parser: argparse.ArgumentParser) -> None:
    """The options of commands that build a run's network again."""
    parser.epilog = _JUDGING
    parser.add_argument("--with", nargs="+", default=[], dest="overrides", metavar="OVERRIDE")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder of your own options")
    parser.add_argument(
        "--trust", action="store_true", help="build whatever classes the folder names, from the paths it names"
    )


def _eps(text: str) -> float:
    from pydantic import TypeAdapter, ValidationError

    from kwta_exp.fields import Eps

    try:
        return TypeAdapter(Eps).validate_python(float(text) if "/" not in text else text)
    except (ValueError, ValidationError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of 0 or more, such as 8/255") from error


def _plan(asked: argparse.Namespace) -> str:
    from kwta_exp.config import composed, user_errors, yaml_of
    from kwta_exp.plan import Plan

    with user_errors():
        plan = Plan.of(*composed(asked.overrides, asked.config_dir))
        done = plan.finished_results() is not None
    if not done:
        done_so_far = "begun" if plan.folder.environment.exists() else "not begun"
    return f"{yaml_of(plan.cfg)}\n# {plan.folder.path}: {'finished' if done else done_so_far}"


def _verify(asked: argparse.Namespace) -> str:
    from kwta_exp.config import user_errors
    from kwta_exp.plan import plan_to_judge
    from kwta_exp.run_folder import run_of
    from kwta_exp.verify import verify

    folder = asked.folder
    with user_errors():
        plan = plan_to_judge(run_of(folder), asked.overrides, asked.config_dir, asked.trust)
        return "\n".join(verify(plan, folder))


def _compare(asked: argparse.Namespace) -> str:
    from kwta_exp.report.compare import Outcomes, compare

    return compare(Outcomes.of(asked.first), Outcomes.of(asked.second))


def _curve(asked: argparse.Namespace) -> str:
    from kwta_exp.report.curve import curves, text

    return "\n\n".join(map(text, curves(asked.folder)))


def _transfer(asked: argparse.Namespace) -> str:
    from kwta_exp.config import user_errors
    from kwta_exp.plan import plan_to_judge
    from kwta_exp.transfer_matrix import matrix, names, overrides_for, text

    overrides = [*overrides_for(asked.attack, asked.eps), *asked.overrides]
    with user_errors():
        plans = {
            name: plan_to_judge(folder, overrides, asked.config_dir, asked.trust)
            for name, folder in names(asked.folders).items()
        }
        return text(matrix(plans, asked.n, asked.seed, asked.work))
