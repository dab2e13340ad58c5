"""Edited run folders: one message, the same numbers, or numbers that follow from what is there."""

import resource
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pytest

from kwta_exp.data.published import _Torchvision
from kwta_exp.errors import UserError
from kwta_exp.storage import read_json, sha256_of_file
from tests.edits import EDITS
from tests.readers import Answer, Readers, launch, time_limit
from tests.readers import quiet as quiet
from tests.stored import forge
from tests.test_whole import QUICK, only

COMMANDS = ["verify", "compare", "curve", "transfer", "judge"]

OF_RECORDS = COMMANDS[:3]
"""Those that read more than the network: all that an edit of records or results can reach."""

OF_NETWORK = ["verify", "transfer", "judge"]
"""Those that build the network again: all that an edit of the configuration or the weights can reach."""

SECRET = "hunter2-of-the-environment"

MEMORY = 12 * 2**30
"""Bytes of address space beyond which a case fails, instead of bringing the machine down."""

BELIEVED = ("config.yaml", "checkpoints/best.safetensors", "checkpoints/last.safetensors")
"""What decides the numbers of the commands that judge anew."""


@dataclass(frozen=True)
class World:
    """A finished run to be copied, the readers, and what they say of it untouched."""

    run: Path
    case: Path
    readers: Readers
    expected: dict[str, Answer]

    def sent(self) -> Path:
        """A fresh copy of the run's folder."""
        shutil.rmtree(self.case, ignore_errors=True)
        folder = self.case / f"sent-{self.run.parent.name}" / self.run.name
        shutil.copytree(self.run, folder)
        self.readers.work.mkdir()
        return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("finished")
    launch(outputs, *QUICK)
    return only(outputs, "*/s0-*")


@pytest.fixture
def world(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch, quiet: None,
) -> Iterator[World]:  # fmt: skip
    def refuse(self: object) -> None:
        raise UserError("dataset: nothing is downloaded here")

    monkeypatch.setattr(_Torchvision, "_fetch", refuse)
    monkeypatch.setenv("SECRET", SECRET)
    monkeypatch.delenv("KWTA_EXP_DATA", raising=False)
    case = tmp_path / "case"
    readers = Readers(finished, case / "work", capsys, caplog)
    made = World(finished, case, readers, {})
    untouched = made.sent()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    made.expected.update(readers.answers(untouched, COMMANDS))
    assert all(answer.numbers is not None for answer in made.expected.values())
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, before[1]))
    yield made
    resource.setrlimit(resource.RLIMIT_AS, before)


def tree(folder: Path, without: Path) -> list[tuple[str, int, int]]:
    """Everything below ``folder``, with what changes when it is written."""
    found = [(path, path.lstat()) for path in sorted(folder.rglob("*")) if without not in (path, *path.parents)]
    return [(str(path), about.st_mtime_ns, about.st_size if path.is_file() else 0) for path, about in found]


def is_consistent(run: Path) -> bool:
    """Whether the rows of each evaluation give the accuracies of its results."""
    for path in run.glob("evaluation/*/results.json"):
        results = read_json(path)
        with np.load(path.parent / "clean.npz") as clean:
            right = set(clean["index"][clean["prediction"] == clean["label"]].tolist())
            n = len(clean["index"])
        standing = set(right)
        for name in results["attacks"]:
            with np.load(path.parent / f"{name}.npz") as rows:
                standing -= set(rows["index"][rows["fooled"]].tolist())
        found = (len(right) / n, len(standing) / n)
        if found != (results["clean"]["accuracy"], results["worst_case"]["robust_accuracy"]):
            return False
    return True


def believed(run: Path) -> list[str]:
    return [sha256_of_file(run / name) for name in BELIEVED]


def commands(name: str) -> list[str]:
    """Those that an edit can reach."""
    kind = name.partition(":")[0]
    if kind in ("file", "folder"):
        return COMMANDS
    return OF_NETWORK if kind in ("config", "overrides", "environment.json", "weights") else OF_RECORDS


def case(number: int, world: World, most: int = len(COMMANDS)) -> dict[str, str]:
    """Edit number ``number``: what became of it, for each command, or the first ``most`` of them."""
    name = list(EDITS)[number // 2 % len(EDITS)]
    forged, rng = number % 2 == 1, Random(number)
    run = world.sent()
    EDITS[name](run, rng)
    if forged:
        forge(run)
    before = tree(world.case.parent, world.readers.work)
    became = {}
    for command in commands(name)[:most]:
        expected = world.expected[command].numbers
        with time_limit(60, f"{number} ({name}): {command}"):
            answer = getattr(world.readers, command)(run)
        assert SECRET not in f"{answer}", (number, name, command)
        if answer.numbers is None:
            became[command] = "message"
            assert answer.message.strip()
            assert "Traceback" not in answer.message
        elif answer.numbers == expected:
            became[command] = "same"
        else:
            became[command] = "other"
            assert answer.message or follows(run, command, world.run), (number, name, command, answer, expected)
            assert answer.message or forged or name.startswith("weights"), (number, name, command, answer)
    assert tree(world.case.parent, world.readers.work) == before, (number, name)
    for path in world.readers.work.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), (number, name, path)
    return became


def follows(run: Path, command: str, untouched: Path) -> bool:
    """Whether other numbers than those of the untouched run follow from what is there."""
    if command in ("compare", "curve") or believed(run) == believed(untouched):
        return is_consistent(run)
    return True


def check(numbers: Iterable[int], world: World, most: int = len(COMMANDS)) -> Counter[tuple[str, str]]:
    became: Counter[tuple[str, str]] = Counter()
    for number in numbers:
        for command, what in case(number, world, most).items():
            became[command, what] += 1
    return became


FORGED = [
    "results: an attack renamed everywhere", "results: any value", "results: more images", "evaluation.json: batch size",
    "environment.json: any value", "config: any value", "config: a key of Hydra's", "config: another class",
    "config: a wide network", "config: a very deep network", "config: large images", "config: data in a place",
    "config: an alias", "config: other types", "overrides: an option", "record: a column dropped",
    "record: other rows", "images: strange", "weights: strange", "file: a pipe",
]  # fmt: skip


def test_twenty_edited_folders(world: World) -> None:
    became = check([2 * list(EDITS).index(name) + 1 for name in FORGED], world, most=2)
    assert became["verify", "message"] >= len(FORGED) / 2


@pytest.mark.slow
def test_a_hundred_edited_folders(world: World) -> None:
    became = check(range(2 * len(EDITS)), world)
    with world.readers.capsys.disabled():
        print(became)
