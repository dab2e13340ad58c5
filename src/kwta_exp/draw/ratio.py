"""Accuracy against the sparsity ratio, under plain PGD and in the worst case: the gap is what PGD misses."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from kwta_exp.draw.style import COLOURS, SHOWN_AS, WARNING, Drawing, inline_svg, styled
from kwta_exp.errors import UserError
from kwta_exp.report.pages import Figure as PageFigure
from kwta_exp.report.runs import Run
from kwta_exp.report.summary import Measured, measured, over_seeds

if TYPE_CHECKING:
    pass

PGD = "pgd"


@dataclass(frozen=True)
class Point:
    """One evaluated run.

    Attributes:
        activation: the option, such as ``"kwta"``.
        ratio: of k-WTA; ``None`` for other activations.
        training: the option, such as ``"natural"``.
        seed: of the run.
        pgd: accuracy under plain PGD, in [0, 1].
        worst: accuracy in the worst case.
        n: images.
    """

    activation: str
    ratio: float | None
    training: str
    seed: int
    pgd: float
    worst: float
    n: int


def points(found: Iterable[Measured]) -> list[Point]:
    """The evaluations that ran PGD, as points.

    Raises:
        UserError: if none did, or they are not of the same suite, threat and images.
    """
    found = [each for each in found if PGD in each.results["attacks"]]
    if not found:
        raise UserError("draw ratio: no evaluation with an attack named pgd among these runs")
    if len({each.kind for each in found}) > 1:
        raise UserError(
            "draw ratio: these evaluations differ in suite, attacks, threat or images; expected runs of one"
            " grid, chosen by its folder or by KEY=VALUE"
        )
    return [
        Point(
            str(each.run.settings.get("activation")),
            each.run.settings.get("activation.ratio"),
            str(each.run.settings.get("training")),
            each.seed,
            each.results["attacks"][PGD]["robust_accuracy"],
            each.results["worst_case"]["robust_accuracy"],
            each.results["clean"]["n"],
        )
        for each in found
    ]


def rows(given: Sequence[Point]) -> list[dict[str, Any]]:
    """The mean of each setting's seeds and its 95% interval (Student's t), for PGD and the worst case."""
    settings: dict[tuple[Any, ...], list[Point]] = {}
    for point in sorted(given, key=lambda each: (each.training, each.activation, each.ratio or 0, each.seed)):
        settings.setdefault((point.training, point.activation, point.ratio), []).append(point)
    found = []
    for (training, activation, ratio), of_setting in settings.items():
        row: dict[str, Any] = {
            "training": training, "activation": activation, "ratio": "" if ratio is None else ratio,
            "seeds": len(of_setting), "n": of_setting[0].n,
        }  # fmt: skip
        for name in ("pgd", "worst"):
            shares = [float(getattr(point, name)) for point in of_setting]
            mean, low, high = over_seeds(shares) if len(shares) > 1 else (shares[0],) * 3
            row |= {name: mean, f"{name} low": low, f"{name} high": high}
        found.append(row)
    return found


def draw(given: Sequence[Point]) -> Drawing:
    """The figure, a panel for each training, and the numbers in it.

    k-WTA has a curve under plain PGD and one in the worst case, with intervals over seeds. Other activations,
    which have no ratio, are horizontal lines at their worst case.

    Raises:
        UserError: if there are not two ratios of k-WTA.
    """
    table = rows(given)
    curves = [row for row in table if row["ratio"] != ""]
    if len({row["ratio"] for row in curves}) < 2:
        raise UserError("draw ratio: fewer than two values of activation.ratio among these runs")
    trainings = list(dict.fromkeys(row["training"] for row in table))
    with styled():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.3 * len(trainings), 2.8))
        axes = figure.subplots(1, len(trainings), sharey=True, squeeze=False)[0]
        for axis, training in zip(axes, trainings, strict=True):
            _panel(axis, training, [row for row in table if row["training"] == training])
        axes[0].set_ylabel("accuracy (%)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2 * len(trainings))
    return figure, table


def for_a_page(runs: Sequence[Run]) -> list[PageFigure]:
    """The figure for the page of these runs, if they have what it shows."""
    try:
        figure, _ = draw(points(measured(runs)))
    except UserError:
        return []
    return [
        PageFigure(
            "Accuracy against the sparsity ratio",
            "Under plain PGD and in the worst case; the shades are 95% intervals over seeds. The gap between"
            " the two curves is what plain PGD misses.",
            Markup(inline_svg(figure)),
        )
    ]


def _panel(axis: Any, training: str, table: Sequence[dict[str, Any]]) -> None:
    curve = [row for row in table if row["ratio"] != ""]
    ratios = [row["ratio"] for row in curve]
    looks = (("pgd", "k-WTA, plain PGD", COLOURS["kwta"], "o"), ("worst", "k-WTA, worst case", WARNING, "s"))
    for name, label, colour, marker in looks:
        low, high = ([100 * row[f"{name} {end}"] for row in curve] for end in ("low", "high"))
        axis.fill_between(ratios, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(ratios, [100 * row[name] for row in curve], color=colour, marker=marker, label=label)
    dashes = {"relu": (4, 2), "lwta": (1, 1.5)}
    for row in (row for row in table if row["ratio"] == ""):
        activation = row["activation"]
        axis.axhline(
            100 * row["worst"], color=COLOURS.get(activation, "#777777"), dashes=dashes.get(activation, (6, 2)),
            linewidth=1, label=f"{SHOWN_AS.get(activation, activation)}, worst case",
        )  # fmt: skip
    seeds = sorted({row["seeds"] for row in table})
    axis.set_xscale("log")
    axis.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axis.minorticks_off()
    axis.set_ylim(0, 100)
    axis.set_xlabel("sparsity ratio (share of values that win)")
    many = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    named = {"natural": "natural training"}.get(training, f"adversarial training ({training})")
    axis.set_title(f"{named}; seeds: {many}, n = {table[0]['n']}", loc="left")
