"""A finished evaluation, read back, after a check that its results follow from its rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from kwta_exp.errors import UserError
from kwta_exp.evaluation.outcome import Bools, Outcome
from kwta_exp.evaluation.records import ATTACK_COLUMNS, CLEAN_COLUMNS, Record
from kwta_exp.results_file import changed_files, read_results
from kwta_exp.run_folder import is_evaluation
from kwta_exp.storage import damaged, read_json

MAX_BATCH_SIZE = 1 << 16
"""The largest batch that ``evaluation.json`` may name; the judge pads every batch to the named size."""

MAX_DRAWS = 10_000
"""The most draws that ``evaluation.json`` may name."""


class _Identity(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    attacks: list[Annotated[list[str | dict[str, Any]], Field(min_length=2, max_length=2)]]
    batch_size: Annotated[PositiveInt, Field(le=MAX_BATCH_SIZE)]
    draws: Annotated[PositiveInt, Field(le=MAX_DRAWS)] = 1


@dataclass(frozen=True)
class Stored:
    """A finished evaluation.

    Attributes:
        folder: ``RUN/evaluation/<suite>-<hash>``.
        results: its ``results.json``.
        settings: the values of its attacks, by name.
        outcome: its records.
    """

    folder: Path
    results: dict[str, Any]
    settings: dict[str, Any]
    outcome: Outcome

    @classmethod
    def read(cls, folder: Path) -> "Stored":
        """Read an evaluation, whole or not at all.

        An image without a row was not judged, so every file that the results list must be unchanged, every
        record must hold exactly the images that its attack had to judge, and the rows must give the numbers of
        the results.

        Args:
            folder: of an evaluation, or of a run: then its latest one.

        Raises:
            UserError: if it is not finished, or any of this does not hold.
        """
        folder = evaluation_folder(folder)
        results, identity = finished(folder)
        outcome = Outcome(Record.read(folder / "clean.npz", CLEAN_COLUMNS))
        _must_agree(folder, "clean", results["clean"], "accuracy", outcome.clean_correct)
        for name, found in results["attacks"].items():
            images = outcome.clean.columns["index"][outcome.due(found["n"])]
            outcome.records[name] = _record(folder, name, images)
            _must_agree(folder, name, found, "robust_accuracy", outcome.robust_to([name])[: found["n"]])
            if found["cumulative"] != float(np.mean(outcome.robust)):
                raise damaged(folder, f"{name}: its cumulative accuracy is not that of the rows")
        if results["worst_case"] is not None:
            _must_agree(folder, "worst case", results["worst_case"], "robust_accuracy", outcome.robust)
        settings = {str(name): values for name, values in identity["attacks"]}
        return cls(folder, results, settings, outcome)


def evaluation_folder(folder: Path) -> Path:
    """The folder of an evaluation: ``folder`` itself, or the latest one of the run in it.

    Raises:
        UserError: if there is none, or the run's ``results.json`` is not of any of its evaluations.
    """
    if is_evaluation(folder):
        return folder
    results = read_results(folder / "results.json")
    if results is None:
        raise UserError(
            f"{folder}: holds no finished evaluation; expected the folder of a run, or of an evaluation in it"
        )
    latest: Path = folder / "evaluation" / results["evaluation"]["name"]
    if read_results(latest / "results.json") != results:
        raise UserError(
            f"{folder}: its results.json is not that of {latest.name}; run the command that made them again"
        )
    return latest


def evaluation_folders(folder: Path) -> list[Path]:
    """``folder`` itself, if it is an evaluation's; for a run, the folders of all its finished evaluations."""
    if is_evaluation(folder):
        return [folder]
    return sorted(path.parent for path in folder.glob("evaluation/*/results.json"))


def finished(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """An evaluation's results and its identity: its attacks' values, its batch size.

    Raises:
        UserError: if it is not finished, or a file that the results list is missing or changed.
    """
    results = read_results(folder / "results.json")
    if results is None:
        raise UserError(f"{folder}: not finished; the command that began it continues")
    if lost := sorted(changed_files(folder, results)):
        raise damaged(folder, f"missing or changed since results.json was written: {', '.join(lost)}")
    identity = read_json(folder / "evaluation.json").get("identity")
    try:
        _Identity.model_validate(identity)
    except ValidationError as error:
        raise damaged(folder / "evaluation.json", error.errors()[0]["msg"]) from error
    assert isinstance(identity, dict)
    return results, identity


def _record(folder: Path, name: str, images: npt.NDArray[np.int64]) -> Record:
    """The record of an attack that had to judge ``images``; there is no file if it had none to judge."""
    path = folder / f"{name}.npz"
    record = Record.read(path, ATTACK_COLUMNS) if len(images) or path.exists() else Record(path)
    judged = record.columns.get("index", images[:0])
    if not np.array_equal(judged, images):
        raise damaged(path, f"{len(judged)} rows, not one for each of the {len(images)} images to judge")
    return record


def _must_agree(folder: Path, what: str, found: Mapping[str, Any], name: str, outcomes: Bools) -> None:
    if found["n"] != len(outcomes) or found[name] != int(outcomes.sum()) / len(outcomes):
        raise damaged(
            folder,
            f"results.json says {what} {100 * found[name]:.2f}% of {found['n']}, its rows say"
            f" {100 * outcomes.mean():.2f}% of {len(outcomes)}",
        )
