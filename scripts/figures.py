"""Draw the figures of the README and the docs.

make figures                                               from committed records
python -m scripts.figures FOLDER/landscape.csv             record what kwta-exp draw landscape wrote, first
python -m scripts.figures NAME=FOLDER/passes.csv ...       record what kwta-exp draw passes wrote, first
"""

import argparse
import csv
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from kwta_exp.activations import KWTA
from kwta_exp.analysis.fit import fit as fitted
from kwta_exp.analysis.landscape import Landscape
from kwta_exp.draw import activations, fit, landscape, passes, ratio
from kwta_exp.draw.style import Drawing, Rows, save
from kwta_exp.models.factory import ActivationFactory
from kwta_exp.storage import write_text

RECORDS = Path("docs/results/digits48.json")
LANDSCAPES = Path("docs/figures/landscapes.json")
PASSES = Path("docs/figures/passes.json")
FOLDER = Path("docs/figures")
TABLES = "gap", "activations"
"""Figures whose numbers are few enough to keep beside them."""

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


def landscapes(path: Path) -> dict[str, Landscape]:
    """The recorded landscapes, by the name of the network."""
    record = json.loads(path.read_text())
    steps = torch.tensor(record["steps"])
    return {
        name: Landscape(steps, torch.tensor(loss), record["images"]) for name, loss in record["loss"].items()
    }


def record(written: Path) -> None:
    """Keep the numbers of a landscape's CSV file in :data:`LANDSCAPES`, rounded to four digits."""
    with written.open(newline="") as file:
        rows = list(csv.DictReader(file))
    loss: dict[str, dict[str, list[float]]] = {}
    for row in rows:  # by network, then by random step, in the order of gradient steps
        lines = loss.setdefault(row["network"], {})
        lines.setdefault(row["random_step"], []).append(float(f"{float(row['loss']):.4g}"))
    steps = [float(f"{float(step):.4g}") for step in next(iter(loss.values()))]
    content = {
        "images": int(rows[0]["images"]),
        "steps": steps,
        "loss": {name: list(lines.values()) for name, lines in loss.items()},
    }
    write_text(LANDSCAPES, json.dumps(content) + "\n")


def record_passes(written: Mapping[str, Path]) -> None:
    """Keep the numbers of CSV files of passes in :data:`PASSES`, by the names of the networks; others stay."""
    content = json.loads(PASSES.read_text()) if PASSES.exists() else {}
    for name, path in written.items():
        with path.open(newline="") as file:
            content[name] = [
                [row["attack"], int(row["passes"]), int(row["n"]), *(_number(row[key]) for key in _SHARES)]
                for row in csv.DictReader(file)
            ]
    write_text(PASSES, json.dumps(content) + "\n")


_SHARES = "accuracy", "low", "high"


def _number(text: str) -> float | None:
    return round(float(text), 4) if text else None


def passes_of(path: Path) -> dict[str, Rows]:
    """The recorded curves, by the name of the network."""
    keys = "attack", "passes", "n", *_SHARES
    content = json.loads(path.read_text())
    return {name: [dict(zip(keys, row, strict=True)) for row in table] for name, table in content.items()}


def main() -> None:
    """Draw all of them; before that, record landscapes or passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("written", nargs="*", metavar="[NAME=]FOLDER/FIGURE.csv")
    written = parser.parse_args().written
    if written and "=" in written[0]:
        record_passes({name: Path(path) for name, _, path in (each.partition("=") for each in written)})
    elif written:
        record(Path(written[0]))
    kinds: dict[str, ActivationFactory] = {"kwta": partial(KWTA, ratio=0.1), "relu": nn.ReLU}
    drawings: dict[str, Drawing] = {
        "gap": ratio.draw(points(RECORDS)),
        "landscapes": landscape.draw(landscapes(LANDSCAPES)),
        "passes": passes.side_by_side(passes_of(PASSES)),
        "activations": activations.draw(),
        "fit": fit.draw({name: fitted(kind, 12, [1000], 2000, 0) for name, kind in kinds.items()}, 12),
    }
    for name, (figure, rows) in drawings.items():
        for path in save(figure, FOLDER / name, rows if name in TABLES else None):
            print(path)


if __name__ == "__main__":
    main()
