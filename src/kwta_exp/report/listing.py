"""Which runs there are, by what differs between them."""

from collections.abc import Sequence

from kwta_exp.report.runs import Run, shown, varying
from kwta_exp.report.tabular import aligned

_LONGEST_CAUSE = 60


def listing(runs: Sequence[Run]) -> str:
    """A line for each run: folder, state, the keys that vary, clean and worst-case accuracy, verdict."""
    if not runs:
        return "no runs"
    keys = varying(runs)
    header = ["folder", "state", *keys, "clean", "worst case", "verdict"]
    rows = [[run.name, run.state, *(_value(run, key) for key in keys), *_outcome(run)] for run in runs]
    return "\n".join([*aligned([header, *rows]), "", _counts(runs)])


def _value(run: Run, key: str) -> str:
    return shown(run.settings[key]) if key in run.settings else ""


def _outcome(run: Run) -> list[str]:
    """Accuracies and verdict of the run's latest evaluation; what went wrong, if it failed."""
    if run.state in ("failed", "damaged"):
        cause = run.cause if len(run.cause) <= _LONGEST_CAUSE else f"{run.cause[: _LONGEST_CAUSE - 3]}..."
        return ["", "", cause]
    latest = run.latest
    if latest is None:
        return ["", "", ""]
    worst = latest["worst_case"]
    more = f" (of {len(run.evaluations)} evaluations)" if len(run.evaluations) > 1 else ""
    return [
        f"{100 * latest['clean']['accuracy']:.1f}",
        f"{100 * worst['robust_accuracy']:.1f}" if worst else "",
        latest["masking"]["verdict"] + more,
    ]


def _counts(runs: Sequence[Run]) -> str:
    states = [run.state for run in runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"{len(runs)} runs: {counts}"
