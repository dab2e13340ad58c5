"""A run folder after its command: complete, consistent, and repaired if a file is damaged."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from kwta_exp import experiment
from kwta_exp.config import ConfigError
from kwta_exp.storage import read_json, read_lines, write_json
from tests.conftest import TINY
from tests.launched import launch

QUICK = [*TINY, "evaluation.save_images=true"]
OTHER = [override for override in TINY if not override.startswith("attack")] + [
    "suite=none",
    "+attack@attack.fgsm=fgsm",
]


def only(outputs: Path, pattern: str) -> Path:
    (found,) = outputs.glob(pattern)
    return found


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that must not depend on damage: weights, rows, images, numbers, configuration."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("checkpoints/*.safetensors")):
        found |= {f"{path.name}/{name}": value.tobytes() for name, value in load_file(path).items()}
    for path in sorted(folder.glob("evaluation/**/*.npz")):
        with np.load(path) as file:
            found |= {
                f"{path.relative_to(folder)}/{name}": file[name].tobytes()
                for name in file.files
                if name not in ("seconds", "checksum")
            }
    for path in (folder / "results.json", *sorted(folder.glob("evaluation/*/results.json"))):
        results = read_json(path)
        for attack in results["attacks"].values():
            del attack["seconds"]
        found[str(path.relative_to(folder))] = [
            results[part] for part in ("threat", "clean", "attacks", "worst_case", "masking")
        ]
    found["epochs"] = [each["epoch"] for each in read_lines(folder / "metrics.jsonl")]
    return found | {name: (folder / name).read_text() for name in ("config.yaml", "overrides.yaml")}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of a tiny run that saved its images, for copying."""
    outputs = tmp_path_factory.mktemp("pristine")
    launch(outputs, *QUICK)
    return outputs


@pytest.fixture
def outputs(pristine: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "outputs"
    shutil.copytree(pristine, copied)
    # Rewrites what depends on the folder's place.
    launch(copied, *QUICK)
    return copied


@pytest.fixture
def whole(outputs: Path) -> dict[str, Any]:
    found = outcome(only(outputs, "*/s0-*"))
    return {name: value for name, value in found.items() if not name.endswith(".yaml")}  # they name the outputs


def test_results_json_is_the_last_commands(outputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Run A, then B with another suite, then A again: results.json is A's."""
    folder = only(outputs, "*/s0-*")
    first = read_json(folder / "results.json")
    launch(outputs, *OTHER)
    assert list(read_json(folder / "results.json")["attacks"]) == ["fgsm"]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        left = launch(outputs, *QUICK)
    assert read_json(folder / "results.json") == first
    assert left == first["worst_case"]["robust_accuracy"]
    assert "already finished" in caplog.text
    assert "worst case" in caplog.text  # the table, again
    assert f"Everything is in {folder / 'evaluation' / first['evaluation']['name']}" in caplog.text


def test_a_damaged_copy_of_the_results_is_rewritten(outputs: Path) -> None:
    path = only(outputs, "*/s0-*/results.json")
    first = path.read_bytes()
    for content in (b"", b"[]", first.replace(b"0.", b"1.", 1)):
        path.write_bytes(content)
        launch(outputs, *QUICK)
        assert path.read_bytes() == first


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: list[tuple[str, Callable[[Path], None]]] = [
    ("checkpoints/best.safetensors", flip),
    ("checkpoints/best.safetensors", Path.unlink),
    ("checkpoints/last.safetensors", cut),
    ("checkpoints/last.safetensors", Path.unlink),
    ("evaluation/*/clean.npz", flip),
    ("evaluation/*/clean.npz", Path.unlink),
    ("evaluation/*/pgd.npz", cut),
    ("evaluation/*/pgd.npz", folder_instead),
    ("evaluation/*/bpda.npz", Path.unlink),
    ("evaluation/*/images/pgd-*.npz", flip),
    ("evaluation/*/images/fgsm-*.npz", Path.unlink),
    ("evaluation/*/evaluation.json", flip),
    ("evaluation/*/results.json", flip),
    ("evaluation/*/results.json", Path.unlink),
    ("config.yaml", flip),
    ("config.yaml", Path.unlink),
    ("overrides.yaml", cut),
    ("environment.json", flip),
    ("environment.json", Path.unlink),
    ("metrics.jsonl", flip),
    ("metrics.jsonl", folder_instead),
]


@pytest.mark.parametrize(("file", "damage"), DAMAGE, ids=lambda value: getattr(value, "__name__", value))
def test_a_damaged_or_missing_file_is_made_again(
    outputs: Path, whole: dict[str, Any], file: str, damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder = only(outputs, "*/s0-*")
    path = only(folder, file)
    damage(path)
    there = path.exists()
    caplog.clear()
    launch(outputs, *QUICK)
    after = outcome(folder)
    assert after | whole == after
    kept = {found.name.split(".damaged-")[0] for found in path.parent.glob("*.damaged-*")}
    assert (path.name in kept) == there
    assert not there or path.name in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        launch(outputs, *QUICK)
    assert "already finished" in caplog.text


def test_a_record_replaced_by_another_intact_one_is_detected(outputs: Path) -> None:
    folder = only(outputs, "*/s0-*/evaluation/*")
    record = folder / "pgd.npz"
    shutil.copy(folder / "fgsm.npz", record)  # intact, but not the file that results.json names
    launch(outputs, *QUICK)
    assert len(list(folder.glob("pgd.npz.damaged-*"))) == 1


def test_a_damaged_training_state_matters_only_if_weights_are_missing(
    outputs: Path, whole: dict[str, Any]
) -> None:
    folder = only(outputs, "*/s0-*")
    flip(folder / "checkpoints" / "state.pt")
    launch(outputs, *QUICK)  # the weights are there, so the state is not read
    assert not list(folder.rglob("*.damaged-*"))
    (folder / "checkpoints" / "best.safetensors").unlink()
    launch(outputs, *QUICK)
    assert len(list(folder.glob("checkpoints/state.pt.damaged-*"))) == 1
    after = outcome(folder)
    assert after | whole == after


def test_a_folder_deleted_during_training_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def delete(*_: object) -> str:
        shutil.rmtree(only(tmp_path, "*/s0-*"))
        return "deleted"

    monkeypatch.setattr(experiment, "_epoch_line", delete)
    with pytest.raises(ConfigError, match=r"deleted or replaced during the run; run the same command"):
        launch(tmp_path, *QUICK)
    assert not list(tmp_path.glob("*/s0-*"))
    monkeypatch.undo()
    launch(tmp_path, *QUICK)
    assert (only(tmp_path, "*/s0-*") / "results.json").exists()


LINKS = [
    "checkpoints", "evaluation", "evaluation/*/images", "run.log", "results.json",
    "checkpoints/last.safetensors", "evaluation/*/results.json", "metrics.jsonl", "config.yaml", ".",
]  # fmt: skip


@pytest.mark.parametrize("link", LINKS)
def test_a_link_inside_a_run_folder_is_not_followed_when_writing(
    outputs: Path, tmp_path: Path, link: str
) -> None:
    folder = only(outputs, "*/s0-*")
    path = only(folder, link) if link != "." else folder
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    lost_files = (
        "checkpoints/best.safetensors", "checkpoints/last.safetensors", "evaluation/*/pgd.npz",
        "environment.json",
    )  # fmt: skip
    for lost in lost_files:
        for found in (*folder.glob(lost), *elsewhere.glob(lost.partition("/")[2] or lost)):
            found.unlink()
    before = sorted((p, p.stat().st_mtime_ns) for p in (elsewhere, *elsewhere.rglob("*")))
    path.symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="is a symbolic link, which is not followed for writing"):
        launch(outputs, *QUICK)
    assert sorted((p, p.stat().st_mtime_ns) for p in (elsewhere, *elsewhere.rglob("*"))) == before


def test_the_outputs_folder_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "outputs").symlink_to(tmp_path / "disk")
    launch(tmp_path / "outputs", *OTHER[:-1])
    assert only(tmp_path / "disk", "*/s0-*/results.json").exists()


def test_a_lock_that_is_a_link_is_not_opened(outputs: Path, tmp_path: Path) -> None:
    folder = only(outputs, "*/s0-*")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    lock = folder.with_name(f".{folder.name}.lock")
    lock.unlink(missing_ok=True)
    lock.symlink_to(victim)
    (folder / "environment.json").unlink()
    with pytest.raises(ConfigError, match=r"\.lock: is a symbolic link"):
        launch(outputs, *QUICK)
    assert victim.read_text() == "mine"


def test_repeating_a_finished_command_writes_nothing(outputs: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in outputs.rglob("*")}
    launch(outputs, *QUICK)
    assert {path: path.stat().st_mtime_ns for path in outputs.rglob("*")} == before


ODD = [
    ("clean.accuracy", [0.5]),
    ("clean.accuracy", 1.5),
    ("clean.n", "40"),
    ("clean.n", True),
    ("clean.ci95", [0.1]),
    ("attacks", []),
    ("attacks.pgd", None),
    ("attacks.pgd.robust_accuracy", {}),
    ("attacks.pgd.n", 1000),
    ("attacks.pgd.forwards", 1.5),
    ("threat.norm", "l7"),
    ("threat.eps", "0.1"),
    ("worst_case", None),
    ("worst_case.by", 3),
    ("run", "me"),
    ("run.name", "a\x1b[2Jb"),
    ("run.seed", None),
    ("masking.verdict", "fine"),
    ("masking.flags", {}),
    ("schema", 2),
    ("evaluation.name", "../../other"),
    ("evaluation.files", {"/etc/passwd": "0" * 64}),
    ("evaluation.files", {"clean.npz": 3}),
]


@pytest.mark.parametrize(("key", "value"), ODD, ids=lambda value: str(value)[:20])
def test_malformed_results_are_one_message_and_are_made_again(
    outputs: Path, key: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    from kwta_exp.errors import UserError
    from kwta_exp.evaluation.stored import Stored

    folder = only(outputs, "*/s0-*")
    results = read_json(folder / "results.json")
    *way, last = key.split(".")
    part = results
    for step in way:
        part = part[step]
    part[last] = value
    for path in (folder / "results.json", only(folder, "evaluation/*/results.json")):
        write_json(path, results)
    with pytest.raises(UserError, match=r"results\.json: damaged"):
        Stored.read(folder)
    launch(outputs, *QUICK)
    assert (
        Stored.read(folder).outcome.robust.mean()
        == read_json(folder / "results.json")["worst_case"]["robust_accuracy"]
    )


def test_every_json_file_of_a_run_is_standard_json(outputs: Path) -> None:
    found = list(outputs.rglob("*.json"))
    assert len(found) > 3
    for path in found:
        assert json.loads(path.read_text())["checksum"]


def ratio_of(run: Path) -> float:
    states = load_file(run / "checkpoints" / "best.safetensors").items()
    (ratio,) = {float(value) for name, value in states if name.endswith("_extra_state")}
    return ratio


def test_a_checkpoint_carries_its_ratio_and_the_configuration_overrides_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = [override for override in TINY if not override.startswith("attack")] + ["suite=none"]
    launch(tmp_path / "trained", *small, "activation.ratio=0.5")
    run = only(tmp_path / "trained", "*-kwta0.5-natural/s0-*")
    assert ratio_of(run) == 0.5

    moved = tmp_path / "moved.safetensors"
    shutil.copy(run / "checkpoints" / "best.safetensors", moved)
    evaluate = ["training=none", f"weights={moved}", *(each for each in small if "epochs" not in each)]
    launch(tmp_path / "moved", *evaluate)
    assert ratio_of(only(tmp_path / "moved", "*-kwta0.5-none/s0-*")) == 0.5
    assert "trained at sparsity ratio" not in caplog.text

    launch(tmp_path / "moved", *evaluate, "activation.ratio=0.2")
    assert ratio_of(only(tmp_path / "moved", "*-kwta0.2-none/s0-*")) == 0.2
    assert "trained at sparsity ratio 0.5; 0.2 is used here" in caplog.text

    launch(tmp_path / "tuned", f"weights={run}", "activation.ratio=0.3", *small)
    assert ratio_of(only(tmp_path / "tuned", "*-kwta0.3-natural/s0-*")) == 0.3
