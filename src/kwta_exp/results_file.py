"""``results.json``: the schema it must fit to be read, and the digests of the evaluation's files in it."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from kwta_exp.errors import UserError
from kwta_exp.fields import Norm, Sha256
from kwta_exp.received import MAX_EXPANDED_BYTES, regular_size
from kwta_exp.storage import damaged, read_json, sha256_of_file

Share = Annotated[float, Field(ge=0, le=1)]

Interval = Annotated[list[Share], Field(min_length=2, max_length=2)]


def _plain(name: str) -> str:
    if not name.isprintable() or not name:
        raise ValueError("expected printable characters")
    return name


def _inside(name: str) -> str:
    path = PurePosixPath(_plain(name))
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError("expected a file inside the evaluation's folder")
    return name


Name = Annotated[str, AfterValidator(_plain)]

Inside = Annotated[str, AfterValidator(_inside)]
"""A path inside an evaluation's folder."""


class _Part(BaseModel):
    """Strict about the keys it declares; other keys are kept."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Run(_Part):
    name: Name
    seed: NonNegativeInt
    suite: Name
    weights_sha256: Sha256
    command: str
    commit: str | None


class _Threat(_Part):
    norm: Norm
    eps: NonNegativeFloat


class _OverDraws(_Part):
    accuracy: Share
    ci95: Interval


class _Clean(_Part):
    accuracy: Share
    n: PositiveInt
    ci95: Interval
    over_draws: _OverDraws | None = None


class _Robust(_Part):
    robust_accuracy: Share
    n: PositiveInt
    ci95: Interval
    over_draws: _OverDraws | None = None


class _Attack(_Robust):
    cumulative: Share
    eps: NonNegativeFloat
    norm: Norm
    forwards: NonNegativeInt
    backwards: NonNegativeInt
    seconds: NonNegativeFloat


class _Worst(_Robust):
    by: dict[Name, Share]


class _Flag(_Part):
    check: Name
    value: float
    threshold: float
    lower95: float = 0.0
    bears_on: str = ""


class _Masking(_Part):
    verdict: Literal["sound", "suspect", "masked", "untested"]
    explanation: str
    flags: list[_Flag]
    passed: list[_Flag] = []


class _Evaluation(_Part):
    name: Inside
    files: dict[Inside, Sha256]


class _Results(_Part):
    version: Literal[1] = Field(alias="schema")
    run: _Run
    threat: _Threat
    clean: _Clean
    attacks: dict[Inside, _Attack]
    worst_case: _Worst | None
    inapplicable: dict[Name, str]
    masking: _Masking
    evaluation: _Evaluation

    @model_validator(mode="after")
    def _is_consistent(self) -> "_Results":
        if (self.worst_case is None) != (not self.attacks):
            raise ValueError("expected a worst case if and only if there are attacks")
        if any(attack.n > self.clean.n for attack in self.attacks.values()):
            raise ValueError("an attack has more images than the evaluation")
        return self


def read_results(path: Path) -> dict[str, Any] | None:
    """An evaluation's results, or ``None`` where there is no such file: the evaluation is not finished.

    Raises:
        DamagedError: if the file is not as it was written, or does not fit the schema.
    """
    try:
        content = read_json(path)
    except UserError:
        if path.exists() or path.is_symlink():
            raise
        return None
    try:
        _Results.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        raise damaged(path, f"{at}: {first['msg']}" if at else first["msg"]) from error
    return content


def evaluation_info(folder: Path) -> dict[str, Any]:
    """The ``evaluation`` part of ``results.json``: the folder's name, and the SHA-256 of every file in it."""
    found = sorted(path for path in folder.rglob("*") if path.suffix in (".npz", ".json"))
    return {
        "name": folder.name,
        "files": {
            path.relative_to(folder).as_posix(): sha256_of_file(path)
            for path in found
            if path != folder / "results.json"
        },
    }


def changed_files(folder: Path, results: dict[str, Any]) -> Iterator[str]:
    """The files listed in ``results`` that are missing, or do not have the SHA-256 listed there."""
    for name, sha256 in results["evaluation"]["files"].items():
        try:
            same = regular_size(folder / name) <= MAX_EXPANDED_BYTES and sha256_of_file(folder / name) == sha256
        except ValueError:
            same = False
        if not same:
            yield name
