"""The figures of a run's own page."""

from collections.abc import Callable, Iterator
from contextlib import suppress

from markupsafe import Markup

from kwta_exp.draw.style import Drawing, inline_svg
from kwta_exp.errors import UserError
from kwta_exp.report.pages import Figure as PageFigure
from kwta_exp.report.runs import Run


def figures_of(run: Run) -> list[PageFigure]:
    """The figures that the records of a run are enough for, drawn from its latest evaluation.

    The checks of the verdict have a table on the page. A figure whose files are missing or damaged is left out.
    """
    found = []
    for name, title, text, drawing in _kinds(run):
        with suppress(UserError, OSError, LookupError, TypeError, ValueError, ArithmeticError):
            figure, _ = drawing()
            found.append(PageFigure(title, text, Markup(inline_svg(figure, f"{name}-"))))
    return found


def _kinds(run: Run) -> Iterator[tuple[str, str, str, Callable[[], Drawing]]]:
    from kwta_exp.draw import confusion, passes, training
    from kwta_exp.evaluation.stored import Stored

    stored = None
    with suppress(UserError):
        stored = Stored.read(run.folder)
    if stored is not None and stored.results["worst_case"] is not None:
        text = (
            "What each attack leaves once every image had so many forward and backward passes; a mark with a"
            " 95% interval where it ends."
        )
        yield "passes", "Accuracy against passes", text, lambda: passes.draw(stored)
        text = (
            "Accuracy of each class with 95% intervals, and the classes that the worst case makes of each"
            " label, in numbers of images."
        )
        yield "confusion", "Classes under attack", text, lambda: confusion.draw(stored)
    text = "Loss and accuracies against the epoch, on training and validation images."
    yield "training", "Training", text, lambda: training.draw([run])
