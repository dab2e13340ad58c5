"""A run in several processes takes the steps of one process, and judges each image as one process does."""

import os
import pickle
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from kwta_exp import hardware
from kwta_exp.activations import KWTA
from kwta_exp.attacks import PGD
from kwta_exp.data.batches import Split, TrainingBatches
from kwta_exp.evaluation.records import ATTACK_COLUMNS, CLEAN_COLUMNS, Record
from kwta_exp.runtime import Runtime
from kwta_exp.training.objectives import (
    ALPTraining,
    FreeTraining,
    MARTTraining,
    NaturalTraining,
    PGDTraining,
    TRADESTraining,
    Training,
)
from kwta_exp.training.shares import Shares
from kwta_exp.training.trainer import Recipe, Trainer
from tests.conftest import TINY, run_py_forked
from tests.grids import outcomes
from tests.test_launchers import start, wait_for

ROOT = Path(__file__).parent.parent
INNER = {"norm": "linf", "eps": 0.1, "steps": 2, "keep_best": False}
METHODS: dict[str, Training] = {
    "natural": NaturalTraining(epochs=2, batch_size=10, clip_norm=1.0, ema_decay=0.9),
    "pgd": PGDTraining(epochs=1, batch_size=10, attack=PGD(**INNER)),
    "free": FreeTraining(epochs=1, batch_size=10, replays=2, norm="l2", eps=0.5, probe=PGD(**INNER)),
    "trades": TRADESTraining(epochs=1, batch_size=10, attack=PGD(**INNER, loss="kl")),
    "mart": MARTTraining(epochs=1, batch_size=10, attack=PGD(**INNER)),
    "alp": ALPTraining(epochs=1, batch_size=10, attack=PGD(**INNER)),
}


class InDouble(nn.Module):
    """A network that computes in float64, whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Flatten(), nn.Linear(64, 32), KWTA(0.3), nn.Linear(32, 10)
        self.layers = nn.Sequential(*layers).double()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x.double())
        return logits


def trained(fabric: Fabric, folder: str, method: Training) -> dict[str, Any]:
    """Train on 33 images: three whole batches, and three images that two processes cannot divide evenly."""
    x = torch.randint(0, 256, (33, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    split = Split(x, torch.arange(33) % 10, torch.arange(33))
    recipe = Recipe(
        method,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        lr_schedule=partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0),
    )
    made = Trainer(InDouble(), recipe, TrainingBatches(split, 10, 1, True, seed=0), split, fabric)
    result = made.train(Path(folder, "state.pt"), lambda _: None)
    records = [{k: v for k, v in record.items() if k != "images_per_second"} for record in result.history]
    weights = {name: weight.numpy() for name, weight in result.last.items()}
    return {"last": weights, "best_epoch": result.best_epoch, "history": records}


def all_trained(fabric: Fabric, folder: str) -> None:
    """Train with each method; the first process writes what it found to a file."""
    torch.set_num_threads(1)
    found = {}
    for name, method in METHODS.items():
        Path(folder, name).mkdir(exist_ok=True)
        found[name] = trained(fabric, f"{folder}/{name}", method)
    if fabric.is_global_zero:
        Path(folder, "found.pickle").write_bytes(pickle.dumps(found))
    if fabric.world_size > 1:
        fabric.barrier()
        torch.distributed.destroy_process_group()  # else the first to end aborts the others


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    found = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        launch: Any = Runtime(accelerator="cpu", devices=devices).fabric().launch
        launch(all_trained, str(folder))
        found.append(pickle.loads((folder / "found.pickle").read_bytes()))
    one, two = found
    for name, expected in one.items():
        assert two[name]["best_epoch"] == expected["best_epoch"]
        for record, wanted in zip(two[name]["history"], expected["history"], strict=True):
            assert record == pytest.approx(wanted, rel=1e-6), name
        for key, weight in expected["last"].items():
            found = two[name]["last"][key]
            np.testing.assert_allclose(found, weight, rtol=0, atol=1e-9, err_msg=f"{name} {key}")
        assert (tmp_path / "2" / name / "state.pt").exists()


def test_a_process_without_rows_takes_part_at_weight_zero() -> None:
    class Three:
        world_size = 3

        def __init__(self, rank: int) -> None:
            self.global_rank = rank

    from kwta_exp.data.batches import Batch

    batch = Batch(torch.zeros(2, 1, 1, 1), torch.tensor([5, 6]), torch.arange(2))
    parts = [Shares(Three(rank)).of_batch(batch) for rank in range(3)]  # type: ignore[arg-type]
    assert [part.y.tolist() for part, _ in parts] == [[5], [6], [5]]
    assert [weight for _, weight in parts] == [1.5, 1.5, 0.0]


DDP = ["runtime=ddp", "runtime.accelerator=cpu", "runtime.threads=1"]
RUN = [*(each for each in TINY if not each.startswith("runtime")), "suite=quick", "training=pgd"]


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def is_rank(pid: int) -> bool:
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_whose_process_is_killed_ends_with_one_message_and_continues_to_the_same_weights(
    tmp_path: Path,
) -> None:
    longer = [*RUN, *DDP, "training.epochs=8"]
    undisturbed = start(tmp_path / "undisturbed", *longer)
    said, _ = undisturbed.communicate(timeout=240)
    assert undisturbed.returncode == 0, said

    disturbed = start(tmp_path / "disturbed", *longer)
    wait_for(lambda: next((tmp_path / "disturbed").glob("*/*/metrics.jsonl"), None))
    ranks = sorted(filter(is_rank, children(disturbed.pid)))
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    said, _ = disturbed.communicate(timeout=60)
    assert disturbed.returncode == 1, said
    assert "the same command continues" in said
    assert "Traceback" not in said
    wait_for(lambda: not any(map(is_rank, ranks)))
    assert not next((tmp_path / "disturbed").glob("*/*/results.json"), None)

    again = start(tmp_path / "disturbed", *longer)
    said, _ = again.communicate(timeout=240)
    assert again.returncode == 0, said
    assert "resuming at epoch" in said
    assert outcomes(tmp_path / "disturbed") == outcomes(tmp_path / "undisturbed")


def test_an_evaluation_in_two_processes_has_the_records_of_one(tmp_path: Path) -> None:
    made = run_py_forked(*RUN, "runtime=cpu", "runtime.threads=1", f"paths.outputs={tmp_path}")
    assert made.returncode == 0, made.stderr
    (run,) = tmp_path.glob("digits-*/s*")
    judge = [*(each for each in RUN if not each.startswith("training")), "training=none", f"weights={run}"]
    judge = [each for each in judge if not each.startswith("model")]
    two = start(tmp_path / "two", *judge, *DDP)
    said, _ = two.communicate(timeout=240)
    assert two.returncode == 0, said
    (here,), (there,) = run.glob("evaluation/*"), (tmp_path / "two").glob("*/*/evaluation/*")
    assert sorted(path.name for path in here.glob("*.npz")) == ["bpda.npz", "clean.npz", "fgsm.npz", "pgd.npz"]
    for path in here.glob("*.npz"):
        columns = CLEAN_COLUMNS if path.name == "clean.npz" else ATTACK_COLUMNS
        one, other = Record.read(path, columns), Record.read(there / path.name, columns)
        assert (one.forwards, one.backwards) == (other.forwards, other.backwards)
        for name, column in one.columns.items():
            assert np.array_equal(other.columns[name], column), (path.name, name)


def test_an_error_of_a_process_is_one_message(tmp_path: Path) -> None:
    run = start(tmp_path, *RUN, *DDP, "training=natural", "optimizer.lr=1e30")
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 1
    assert said.count("training diverged") == 1
    assert "Traceback" not in said


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: 2)
    with pytest.raises(ValueError, match=r"runtime\.devices=3: this machine has 2 visible NVIDIA GPUs"):
        Runtime(accelerator="cuda", devices=3)
    assert Runtime(accelerator="cuda", devices=2).devices == 2


def test_processes_of_the_evaluation_beside_devices_are_refused(tmp_path: Path) -> None:
    done = run_py_forked(*RUN, *DDP, "evaluation.processes=2", f"paths.outputs={tmp_path / 'outputs'}")
    assert done.returncode == 1
    assert done.stderr.startswith("evaluation.processes=2: with runtime.devices=2")
    assert list(tmp_path.iterdir()) == []


def test_threads_are_shared_among_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "usable_cores", lambda: 8)
    assert [Runtime(accelerator="cpu", devices=n).resolved_threads for n in (1, 2, 3, 16)] == [8, 4, 2, 1]
