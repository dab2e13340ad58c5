"""Checkpoints and files: written whole or not at all, and loaded without running code."""

import copy
import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kwta_exp import storage
from kwta_exp.activations import KWTA
from kwta_exp.checkpoint import (
    load_into,
    read_state,
    read_weights,
    require_fit,
    save_state,
    save_weights,
    weights_of,
)
from kwta_exp.errors import UserError
from kwta_exp.evaluation.records import ATTACK_COLUMNS, Record
from kwta_exp.models import WideResNet
from kwta_exp.results_file import read_results
from kwta_exp.sealed import seal, trained_ratio


class Hostile:
    """Makes a folder when it is unpickled, which proves that code ran."""

    def __init__(self, proof: Path) -> None:
        self.proof = str(proof)

    def __reduce__(self) -> object:
        return os.mkdir, (self.proof,)


def test_weights_are_read_as_they_were_written(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), KWTA(0.3))
    save_weights(tmp_path / "w.safetensors", weights_of(model), {"epoch": "3"})
    torch.save(model.state_dict(), tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), KWTA(0.3))
        load_into(other, read_weights(tmp_path / name), name)
        assert all(
            torch.equal(a, b)
            for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True)
        )


def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    proof = tmp_path / "code-ran"
    torch.save({"weight": torch.zeros(1), "x": Hostile(proof)}, tmp_path / "bad.pth")
    (tmp_path / "bad.pt").write_bytes(seal((tmp_path / "bad.pth").read_bytes()))  # a forged checksum
    for read, path in ((read_weights, "bad.pth"), (read_state, "bad.pt")):
        with pytest.raises(UserError, match=r"refused.*would run code"):
            read(tmp_path / path)
    assert not proof.exists()
    # An unsafe load does run it.
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert proof.exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_truncated_files_are_refused(tmp_path: Path, name: str, keep: float) -> None:
    model = nn.Linear(30, 40)
    save_weights(tmp_path / "w.safetensors", weights_of(model), {})
    torch.save(model.state_dict(), tmp_path / "w.pth")
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(UserError, match=r"w\.(safetensors|pth)"):
        read_weights(tmp_path / name)


def test_damaged_records_and_results_raise_an_error(tmp_path: Path) -> None:
    for content in (b"", b"PK\x03\x04 nonsense"):
        (tmp_path / "pgd.npz").write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            Record.read(tmp_path / "pgd.npz", ATTACK_COLUMNS)
    (tmp_path / "results.json").write_text('{"schema": 1, "run"')
    with pytest.raises(UserError, match="damaged"):
        read_results(tmp_path / "results.json")
    assert read_results(tmp_path / "absent.json") is None


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    weights = {"weight": torch.zeros(2, 3), "extra": torch.zeros(1)}
    with pytest.raises(UserError) as caught:
        load_into(nn.Linear(3, 4), weights, "w.pth")
    message = str(caught.value)
    assert "missing: bias" in message
    assert "unexpected: extra" in message
    assert "misshapen: weight (2, 3) (expected (4, 3))" in message


def published(network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a Wide ResNet, with other values in a second first group, as TRADES' class saves them."""
    weights = weights_of(network)
    unused = {f"sub_{name}": value * 0 + 5 for name, value in weights.items() if name.startswith("block1.")}
    return weights | unused


def test_the_group_that_a_published_network_never_calls_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    facts = {"num_classes": 3, "in_channels": 3, "depth": 10, "widen_factor": 1}
    source, network = (WideResNet(nn.ReLU, **facts).eval() for _ in range(2))
    weights = published(source)
    with torch.device("meta"):
        require_fit(WideResNet(nn.ReLU, **facts), weights, "w.pth")
    x = torch.rand(2, 3, 8, 8)
    assert not torch.equal(network(x), source(x))
    load_into(network, weights, "w.pth")
    assert torch.equal(network(x), source(x))
    assert "weights=w.pth: its sub_block1, which the published network never calls, is left out" in caplog.text


def test_another_group_of_that_name_is_not_left_out() -> None:
    facts = {"num_classes": 3, "in_channels": 3, "depth": 10, "widen_factor": 1}
    network = WideResNet(nn.ReLU, **facts)
    weights = published(network)
    weights["sub_block1.layer.0.conv1.weight"] = torch.zeros(16, 16, 1, 1)  # not the shape in block1
    with pytest.raises(UserError, match="unexpected: sub_block1"):
        load_into(network, weights, "w.pth")
    weights = published(network)
    del weights["sub_block1.layer.0.bn1.bias"]  # not all of block1
    with pytest.raises(UserError, match="unexpected: sub_block1"):
        load_into(network, weights, "w.pth")
    network.sub_block1 = copy.deepcopy(network.block1)  # a network of one's own that has it
    load_into(network, published(WideResNet(nn.ReLU, **facts)), "w.pth")
    assert network.sub_block1.layer[0].bn1.bias.unique().tolist() == [5]


def test_a_file_that_holds_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds list; expected a state dict"):
        read_weights(tmp_path / "list.pth")
    with pytest.raises(UserError, match="no such file"):
        read_weights(tmp_path / "absent.pth")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.pt"
    save_state(path, {"epoch": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*state\.pt: No space left on device"):
        save_state(path, {"epoch": 2})
    monkeypatch.undo()
    assert read_state(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_files_are_readable_by_others_as_the_umask_allows(tmp_path: Path) -> None:
    storage.write_text(tmp_path / "a.txt", "x")
    current = os.umask(0)
    os.umask(current)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o666 & ~current


def test_nan_is_not_written_as_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_half_precision_weights_are_refused_with_the_conversion() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), KWTA(0.3))
    state_dict = copy.deepcopy(model).half().state_dict()
    with pytest.raises(UserError, match=r"of another type: 0\.bias float16") as caught:
        load_into(model, state_dict, "w.pth")
    conversion = str(caught.value).partition("to convert: ")[2]
    load_into(model, eval(conversion, {"torch": torch, "state_dict": state_dict}), "w.pth")


@pytest.mark.parametrize(("ratios", "expected"), [
    ([0.25], 0.25),
    ([0.25, 0.25], 0.25),
    ([0.25, 0.5], None),  # stages differ
    ([], None),
    ([2.0], None),
    ([math.nan], None),
    ([[0.25]], None),
])  # fmt: skip
def test_the_trained_ratio_is_read_without_the_network(
    tmp_path: Path, ratios: list[Any], expected: float | None
) -> None:
    states = {f"{i}._extra_state": torch.tensor(ratio, dtype=torch.float64) for i, ratio in enumerate(ratios)}
    weights = {"a": torch.zeros(1), "k._extra_state": torch.zeros(0).double(), **states}
    save_weights(tmp_path / "w.safetensors", weights, {})
    assert trained_ratio(tmp_path / "w.safetensors") == expected


def test_only_safetensors_are_searched_for_a_trained_ratio(tmp_path: Path) -> None:
    torch.save(KWTA(0.25).state_dict(), tmp_path / "w.pth")
    assert trained_ratio(tmp_path / "w.pth") is None
    (tmp_path / "w.safetensors").write_bytes(b"\x08" + 7 * b"\0" + b'{"a": 1}')
    with pytest.raises(UserError, match="not a complete safetensors file"):
        trained_ratio(tmp_path / "w.safetensors")
