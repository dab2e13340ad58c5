"""Commands on edited run folders give one message, the same numbers, or numbers that follow from the files."""

import resource
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from kwta_exp.checkpoint import require_fit, save_weights
from kwta_exp.config import CommandLine
from kwta_exp.data.datasets import Synthetic
from kwta_exp.data.torchvision import _Torchvision
from kwta_exp.environment import CONF
from kwta_exp.errors import UserError
from kwta_exp.parts import planned_network
from kwta_exp.plan import Plan
from kwta_exp.storage import read_json, sha256_of_file
from kwta_exp.trust import require_trusted
from tests.edits import EDITS
from tests.launched import launch, time_limit
from tests.readers import Answer, Readers
from tests.readers import quiet as quiet
from tests.stored import forge
from tests.test_whole import QUICK, only

COMMANDS = ["verify", "compare", "curve", "transfer", "judge"]

READ_RECORDS = ["compare", "verify", "curve"]
"""The commands that read records or results."""

BUILD_NETWORK = ["verify", "transfer", "judge"]
"""The commands that read the configuration and the weights."""

SECRET = "hunter2-of-the-environment"

MEMORY = 12 * 2**30
"""The limit on address space, in bytes: a case that exceeds it fails and does not take the machine down."""

NETWORK_FILES = ("config.yaml", "checkpoints/best.safetensors", "checkpoints/last.safetensors")
"""The files that decide the numbers of the commands that build the network."""


@dataclass(frozen=True)
class World:
    """A finished run to be copied, the commands that read it, and their answers on the untouched run."""

    run: Path
    case: Path
    readers: Readers
    expected: dict[str, Answer]

    def fresh_copy(self) -> Path:
        """A fresh copy of the run's folder."""
        shutil.rmtree(self.case, ignore_errors=True)
        folder = self.case / f"copy-of-{self.run.parent.name}" / self.run.name
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
    untouched = made.fresh_copy()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    made.expected.update(readers.answers(untouched, COMMANDS))
    assert all(answer.numbers is not None for answer in made.expected.values())
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, before[1]))
    yield made
    resource.setrlimit(resource.RLIMIT_AS, before)


def tree(folder: Path, without: Path) -> list[tuple[str, int, int]]:
    """Everything below ``folder`` but ``without``, with its time of modification and size."""
    found = [(path, path.lstat()) for path in sorted(folder.rglob("*")) if without not in (path, *path.parents)]
    return [(str(path), stat.st_mtime_ns, stat.st_size if path.is_file() else 0) for path, stat in found]


def is_consistent(run: Path) -> bool:
    """Whether the rows of each evaluation give the accuracies of its results."""
    for path in run.glob("evaluation/*/results.json"):
        results = read_json(path)
        with np.load(path.parent / "clean.npz") as clean:
            clean_correct = set(clean["index"][clean["prediction"] == clean["label"]].tolist())
            n = len(clean["index"])
        robust = set(clean_correct)
        for name in results["attacks"]:
            with np.load(path.parent / f"{name}.npz") as rows:
                robust -= set(rows["index"][rows["fooled"]].tolist())
        found = (len(clean_correct) / n, len(robust) / n)
        if found != (results["clean"]["accuracy"], results["worst_case"]["robust_accuracy"]):
            return False
    return True


def network_digests(run: Path) -> list[str]:
    return [sha256_of_file(run / name) for name in NETWORK_FILES]


def commands(name: str) -> list[str]:
    """The commands that an edit can affect."""
    kind = name.partition(":")[0]
    if kind in ("file", "folder"):
        return COMMANDS
    if kind == "images":
        return ["verify"]
    return BUILD_NETWORK if kind in ("config", "overrides", "environment.json", "weights") else READ_RECORDS


def case(number: int, world: World, max_commands: int = len(COMMANDS)) -> dict[str, str]:
    """Make edit number ``number`` and run each command: whether it gives a message, the same or other numbers.

    Odd numbers are forged: the checksums are updated after the edit.
    """
    name = list(EDITS)[number // 2 % len(EDITS)]
    forged, rng = number % 2 == 1, Random(number)
    run = world.fresh_copy()
    EDITS[name](run, rng)
    if forged:
        forge(run)
    before = tree(world.case.parent, world.readers.work)
    became = {}
    for command in commands(name)[:max_commands]:
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
    """Whether numbers that differ from the untouched run's follow from the edited files."""
    if command in ("compare", "curve") or network_digests(run) == network_digests(untouched):
        return is_consistent(run)
    return True


def check(numbers: Iterable[int], world: World, max_commands: int = len(COMMANDS)) -> Counter[tuple[str, str]]:
    became: Counter[tuple[str, str]] = Counter()
    for number in numbers:
        for command, what in case(number, world, max_commands).items():
            became[command, what] += 1
    return became


FORGED = [
    "results: an attack renamed everywhere", "results: any value", "results: more images",
    "evaluation.json: batch size", "environment.json: any value", "config: any value",
    "config: a Hydra key", "config: another class",
    "config: a wide network", "config: a very deep network", "config: large images", "config: data to download",
    "config: an alias", "config: other types", "overrides: an option", "record: a column dropped",
    "record: other rows", "images: corrupted", "weights: corrupted", "file: a pipe",
]  # fmt: skip


def test_twenty_forged_folders_give_a_message_or_numbers_that_follow(world: World) -> None:
    became = check([2 * list(EDITS).index(name) + 1 for name in FORGED], world, max_commands=1)
    assert sum(count for (_, what), count in became.items() if what == "message") >= len(FORGED) / 2


@pytest.mark.slow
def test_a_hundred_edited_folders_give_a_message_or_numbers_that_follow(world: World) -> None:
    became = check(range(2 * len(EDITS)), world)
    assert sum(count for (_, what), count in became.items() if what == "message") > len(EDITS), became


@pytest.mark.parametrize(
    ("group", "more"),
    [
        ("model", {"_args_": []}),
        ("model", {"_recursive_": False}),
        ("model", {"stem_activation": {"_target_": "torch.nn.ReLU", "_convert_": "all"}}),
        ("activation", {"_partial_": False}),
        ("dataset", {"_partial_": True}),
        ("threat", {"_partial_": False}),
    ],
)
def test_hydra_keys_in_a_run_folder_are_refused(group: str, more: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"weights=x: its {group} holds _\w+_=.*; expected {group}=\.\.\."):
        require_trusted({"_target_": "torch.nn.ReLU", **more}, group, "weights=x", allowed=())


@pytest.mark.parametrize(
    "path", sorted(CONF.glob("activation/*")) + sorted(CONF.glob("model/*")), ids=lambda p: p.stem
)
def test_every_option_of_this_project_is_trusted_in_a_run_folder(path: Path) -> None:
    content = {key: value for key, value in yaml.safe_load(path.read_text()).items() if key != "defaults"}
    require_trusted(content, path.parent.name, "weights=x", allowed=("${activation}",))


def test_too_many_synthetic_images_are_refused() -> None:
    assert Synthetic(channels=3, image_size=224, train=1000).shape == (3, 224, 224)
    for values in ({"image_size": 100_000}, {"train": 10**10}, {"num_classes": 10**10}, {"channels": 10**30}):
        with pytest.raises(ValueError, match=r"synthetic images of shape .*; expected 268,435,456 at most"):
            Synthetic(**values)


HUGE = {
    "wide": ["model=mlp", "model.hidden=[100000000,100000000]"],
    "deep": ["model=wrn", "model.depth=60000004", "model.widen_factor=1"],
}


@pytest.mark.parametrize("size", HUGE)
def test_a_network_larger_than_its_weights_is_not_built(size: str, tmp_path: Path, composed: Any) -> None:
    weights = {"nn.1.weight": torch.zeros(32, 64), "nn.1.bias": torch.zeros(32)}
    save_weights(tmp_path / "w.safetensors", weights, {})
    cfg = composed("training=none", f"weights={tmp_path / 'w.safetensors'}", "runtime=cpu", *HUGE[size])
    plan = Plan.of(cfg, CommandLine.of(cfg.hydra))
    with time_limit(20, size), pytest.raises(UserError, match="do not fit the model"):
        planned_network(plan, plan.dataset.load())


def test_weights_must_have_the_shapes_of_the_network() -> None:
    with torch.device("meta"):
        shape = torch.nn.Linear(10**9, 10**9)
    with pytest.raises(UserError, match=r"misshapen: .*weight \(3, 3\) \(expected \(1000000000, "):
        require_fit(shape, {"weight": torch.zeros(3, 3), "bias": torch.zeros(10**3)}, "w")
    with torch.device("meta"):
        require_fit(torch.nn.Linear(3, 2), torch.nn.Linear(3, 2, device="cpu").state_dict(), "w")
