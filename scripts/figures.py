"""Draw the figures of the README and the docs from committed records: ``make figures``."""

import json
import re
from pathlib import Path

from kwta_exp.draw import ratio
from kwta_exp.draw.style import save

RECORDS = Path("docs/results/digits48.json")
FOLDER = Path("docs/figures")

_NAME = re.compile(r"\w+-\w+-(?P<activation>relu|lwta|kwta)(?P<amount>[0-9.]*)-(?P<training>\w+)")


def points(path: Path) -> list[ratio.Point]:
    """The records of a grid over activations and ratios."""
    found = []
    for record in json.loads(path.read_text())["records"]:
        name = _NAME.fullmatch(record["name"])
        assert name, record["name"]
        amount = float(name["amount"]) if name["activation"] == "kwta" else None
        found.append(
            ratio.Point(
                name["activation"], amount, name["training"], record["seed"],
                record["attacks"]["pgd"]["robust_accuracy"], record["worst_case"]["robust_accuracy"],
                record["clean"]["n"],
            )
        )  # fmt: skip
    return found


def main() -> None:
    """Write all of them."""
    figure, rows = ratio.draw(points(RECORDS))
    for path in save(figure, FOLDER / "gap", rows):
        print(path)


if __name__ == "__main__":
    main()
