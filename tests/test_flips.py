"""A flipped bit anywhere in a run folder is detected or makes no difference."""

import logging
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kwta_exp import experiment
from kwta_exp.checkpoint import read_state, read_weights
from kwta_exp.errors import UserError
from kwta_exp.results_file import read_results
from kwta_exp.run_folder import read_config_file
from kwta_exp.sealed import read_arrays
from kwta_exp.storage import read_json, read_lines
from tests.launched import launch, time_limit
from tests.readers import Readers
from tests.readers import quiet as quiet
from tests.test_whole import QUICK, only, outcome

UNFINISHED = "checkpoints/state.pt"
"""The one file whose flips are tried in a run that was stopped after its first epoch, not in a finished run."""

FILES: dict[str, Callable[[Path], Any]] = {
    "checkpoints/best.safetensors": read_weights,
    "checkpoints/last.safetensors": read_weights,
    UNFINISHED: read_state,
    "evaluation/*/evaluation.json": read_json,
    "evaluation/*/results.json": read_results,
    "results.json": read_results,
    "evaluation/*/clean.npz": read_arrays,
    "evaluation/*/pgd.npz": read_arrays,
    "evaluation/*/bpda.npz": read_arrays,
    "evaluation/*/images/*.npz": read_arrays,
    "config.yaml": lambda path: read_config_file(path.parent, path.name),
    "overrides.yaml": lambda path: read_config_file(path.parent, path.name),
    "environment.json": read_json,
    "metrics.jsonl": read_lines,
}
"""The reader of every kind of file that is read back."""

COMMANDS: dict[str, list[str]] = {
    "checkpoints/best.safetensors": ["verify", "judge"],
    "evaluation/*/evaluation.json": ["verify", "curve"],
    "evaluation/*/results.json": ["verify", "compare"],
    "results.json": ["compare"],
    "evaluation/*/clean.npz": ["curve"],
    "evaluation/*/pgd.npz": ["compare"],
    "evaluation/*/bpda.npz": ["curve"],
    "evaluation/*/images/*.npz": ["verify"],
    "config.yaml": ["judge"],
    "overrides.yaml": ["judge"],
    "environment.json": ["judge"],
}
"""The commands, other than the one that made a file, that read it."""

ALL = ["verify", "compare", "curve", "judge"]


class StoppedError(Exception):
    """Raised where the process is stopped."""


@dataclass(frozen=True)
class World:
    """A finished run and the same run stopped after its first epoch, both to be copied to ``outputs``."""

    outputs: Path
    finished: Path
    stopped: Path

    def restored(self, name: str) -> Path:
        """A fresh copy of the run's folder."""
        shutil.rmtree(self.outputs, ignore_errors=True)
        shutil.copytree(getattr(self, name), self.outputs)
        return only(self.outputs, "*/s0-*")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    place = tmp_path_factory.mktemp("world")
    made = World(place / "outputs", place / "finished", place / "stopped")

    def stop(record: dict[str, Any], epochs: int) -> str:
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "_epoch_line", stop)
        with pytest.raises(StoppedError):
            launch(made.outputs, *QUICK)
    shutil.copytree(made.outputs, made.stopped)
    shutil.rmtree(made.outputs)
    launch(made.outputs, *QUICK)
    shutil.copytree(made.outputs, made.finished)
    return made


@dataclass(frozen=True)
class Flip:
    """A flip of one bit, chosen by ``number``."""

    number: int

    @property
    def file(self) -> str:
        return list(FILES)[self.number % len(FILES)]

    def apply(self, run: Path) -> Path:
        """Flip the bit. Two thirds of the flips are in the first and last 400 bytes: headers and trailers."""
        rng = random.Random(self.number)
        path = rng.choice(sorted(run.glob(self.file)))
        content = bytearray(path.read_bytes())
        edge = min(len(content), 400)
        position = rng.choice(
            [rng.randrange(edge), len(content) - 1 - rng.randrange(edge), rng.randrange(len(content))]
        )
        content[position] ^= 1 << rng.randrange(5)
        path.write_bytes(content)
        return path


def plain(content: Any) -> Any:
    """A reader's result as values that can be compared."""
    if isinstance(content, torch.Tensor):
        content = content.numpy()
    if isinstance(content, np.ndarray):
        return content.dtype.str, content.shape, content.tobytes()
    if isinstance(content, dict):
        return {name: plain(value) for name, value in content.items()}
    return [plain(value) for value in content] if isinstance(content, list | tuple) else content


def read(flip: Flip, path: Path) -> Any:
    """What the file's reader returns; ``UserError`` if it detects the flip."""
    try:
        return plain(FILES[flip.file](path))
    except UserError as error:
        return UserError if str(path) in str(error) else error


def test_a_reader_detects_a_flipped_bit_or_returns_the_same(world: World) -> None:
    detected = 0
    for number in range(10 * len(FILES)):
        flip = Flip(number)
        run = world.restored("finished")
        path = flip.apply(run)
        untouched = world.finished / path.relative_to(world.outputs)
        after = read(flip, path)
        detected += after is UserError
        assert after is UserError or after == read(flip, untouched), (number, path)
    assert detected > 8 * len(FILES)


def whole_case(flip: Flip, world: World, readers: Readers, expected: dict[str, Any]) -> str:
    """Flip a bit, run every command that reads the file, repeat the run; return what became of the flip."""
    run = world.restored("stopped" if flip.file == UNFINISHED else "finished")
    path = flip.apply(run)
    reported = False
    for name, answer in readers.answers(run, COMMANDS.get(flip.file, [])).items():
        reported |= answer.numbers is None
        assert answer.numbers in (None, expected[name]), (name, answer)
    readers.caplog.clear()
    launch(world.outputs, *QUICK)
    recovered = path.name in readers.caplog.text
    after = outcome(run)
    assert after | expected["outcome"] == after
    readers.caplog.clear()
    with readers.caplog.at_level(logging.INFO):
        launch(world.outputs, *QUICK)
    assert "already finished" in readers.caplog.text
    return "recovered" if recovered else "reported" if reported else "harmless"


def check(numbers: range, world: World, readers: Readers) -> Counter[tuple[str, str]]:
    run = world.restored("finished")
    expected: dict[str, Any] = {name: answer.numbers for name, answer in readers.answers(run, ALL).items()}
    assert None not in expected.values()
    expected["outcome"] = outcome(run)
    became: Counter[tuple[str, str]] = Counter()
    for number in numbers:
        flip = Flip(number)
        shutil.rmtree(readers.work, ignore_errors=True)
        with time_limit(120, f"{number}: {flip.file}"):
            became[flip.file, whole_case(flip, world, readers, expected)] += 1
    return became


@pytest.fixture
def readers(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    quiet: None,
) -> Readers:
    return Readers(only(world.finished, "*/s0-*"), tmp_path / "work", capsys, caplog)


def test_a_flipped_bit_changes_no_number_and_no_weight(world: World, readers: Readers) -> None:
    check(range(5), world, readers)


@pytest.mark.slow
def test_four_hundred_flipped_bits_change_no_number_and_no_weight(world: World, readers: Readers) -> None:
    became = check(range(1000, 1400), world, readers)
    assert sum(count for (_, what), count in became.items() if what != "harmless") > 300, became
