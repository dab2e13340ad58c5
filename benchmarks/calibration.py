"""Sets the thresholds of the verdict on one set of networks and tells its errors on another.

    python -m benchmarks.calibration [--data DIR] [--work DIR] [--processes N] [--set SET] [--only NAME ...]
    python -m benchmarks.calibration --collect [--work DIR]

Every network is trained here, disguised where it is to mask its gradients, attacked with suite=strong (at the
effort given below) and diagnosed. The first set is of small networks on digits, the second of other
architectures on FashionMNIST, whose files must lie in --data. A threshold is twice the largest value that any
honest network of the first set has, but at least a value that is given; the second set then shows how often an
honest network is not called sound (a false alarm) and a masked one is (a false trust). Networks in a disguise
have the weights of an honest one, whose worst case is the floor that the attacks should reach. Each network's
results are kept in --work, so that a stopped calibration continues, and both sets can be measured one by one;
the record goes to docs/calibration.json and the page to docs/calibration.md; --collect puts what is in --work
so far into the record, where networks measured before stay, and the page names those that are missing.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from hydra import compose, initialize_config_dir
from torch import nn

from benchmarks.calibration_networks import A_LIE, HIDDEN, SETS, SPARSE, Specimen
from benchmarks.calibration_page import WITHIN, N, page, thresholds, wrong
from kwta_exp.attacks import PGD, Attack, Threat
from kwta_exp.config import build
from kwta_exp.data.base import Images
from kwta_exp.data.batches import TrainingBatches, first_test_images, split_training
from kwta_exp.data.datasets import Digits, FashionMNIST
from kwta_exp.evaluation import Evaluation, evaluate
from kwta_exp.evaluation.checks import CHECKS
from kwta_exp.runtime import Runtime
from kwta_exp.storage import read_json, write_json, write_text
from kwta_exp.training import NaturalTraining, PGDTraining, Training
from kwta_exp.training.trainer import Recipe, Trainer

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
RECORD = Path("docs/calibration.json")
PAGE = Path("docs/calibration.md")

EFFORT = [
    "suite=strong", "attack.autoattack.steps=50", "attack.autoattack.queries=1000",
    "attack.square.queries=1000", "attack.square.restarts=1", "attack.es.steps=50",
]  # fmt: skip
"""The suite, at a part of its effort: what is judged here is the verdict, not the networks."""

ROUNDING = 1e-9
"""Of differences of shares."""

T = TypeVar("T")


@dataclass(frozen=True)
class Field:
    """Data and the recipe on it. ``eps`` is for natural networks and, the larger one, for trained ones."""

    name: str
    images: Images
    train_n: int | None
    epochs: int
    eps: tuple[float, float]


@dataclass(frozen=True)
class Job:
    """A network to train or to examine, as processes hand it to each other."""

    key: str
    name: str
    data: Path
    work: Path

    @property
    def specimen(self) -> Specimen:
        return next(each for each in SETS[self.key] if each.name == self.name)

    @property
    def field(self) -> Field:
        return field_of(self.key, self.data)

    @property
    def folder(self) -> Path:
        """Of the network's weights, if they are its own, and of its results."""
        field = {"setting": "digits", "trying": "fashion_mnist"}[self.key]
        return self.work / field / self.name.replace(" ", "_").replace(",", "")

    @property
    def done(self) -> Path:
        return self.folder / "results.json"

    def honest(self) -> "Job":
        """That of the network which has the same weights and no disguise; itself, if it has none."""
        return Job(self.key, self.specimen.of or self.name, self.data, self.work)


def fashion(data: Path) -> FashionMNIST:
    return FashionMNIST(root=str(data), train_n=6000)


@cache
def field_of(key: str, data: Path) -> Field:
    if key == "setting":
        return Field("digits", Digits().load(), None, 30, (0.1, 0.1))
    return Field("fashion_mnist", fashion(data).load(), 6000, 8, (0.05, 0.05))


def threat_of(job: Job) -> Threat:
    return Threat(norm="linf", eps=job.field.eps[job.specimen.adversarial])


def untrained(job: Job) -> nn.Module:
    images = job.field.images
    torch.manual_seed(0)
    return job.specimen.network(
        num_classes=images.num_classes, in_channels=images.in_channels, image_size=images.image_size
    )


def trained(job: Job) -> nn.Module:
    """The honest network of ``job``, trained; at once, if its folder has the state of a finished training."""
    job, field = job.honest(), job.field
    model = untrained(job)
    training: Training = NaturalTraining(epochs=field.epochs, batch_size=64)
    if job.specimen.adversarial:
        inner = PGD(norm="linf", eps=threat_of(job).eps, steps=7, keep_best=False)
        training = PGDTraining(epochs=field.epochs, batch_size=64, attack=inner)
    train, val = split_training(field.images, field.train_n, 0.1, 0, CPU)
    batches = TrainingBatches(train, 64, 0, False, 0)
    schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=field.epochs)
    recipe = Recipe(training, partial(torch.optim.SGD, lr=0.04, momentum=0.9), schedule)
    trainer = Trainer(model, recipe, batches, val, Runtime(accelerator="cpu").fabric())
    trainer.train(job.folder / "state.pt", lambda history: None)
    return model


def dressed(job: Job) -> nn.Module:
    """The network of ``job`` with the honest one's weights, in its disguise."""
    specimen, model = job.specimen, untrained(job)
    model.load_state_dict(trained(job).state_dict())
    parts = [specimen.before and specimen.before(), model, specimen.after and specimen.after()]
    return nn.Sequential(*(part for part in parts if part)).eval().requires_grad_(False)


def train(job: Job) -> None:
    """Leave the weights in the folder of ``job``."""
    trained(job)
    print(f"{job.field.name}: {job.name}: trained", flush=True)


def suite_of(threat: Threat) -> dict[str, Attack]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [*EFFORT, f"threat.eps={threat.eps}"])
        return {name: build(cfg, f"attack.{name}") for name in cfg.attack}


def examine(job: Job) -> dict[str, Any]:
    """The network's results, from its folder if they are there."""
    if job.done.exists():
        return read_json(job.done)
    network, threat = dressed(job), threat_of(job)
    images, suite = first_test_images(job.field.images, N, CPU), suite_of(threat)
    evaluation = Evaluation(network, images, suite, threat, job.folder / "evaluation", batch_size=N)
    results = evaluate(evaluation, {"name": job.name}, checks_n=32)
    write_json(job.done, results)
    print(f"{job.field.name}: {job.name}: {results['masking']['verdict']}", flush=True)
    return results


def in_processes(function: Callable[[Job], T], jobs: Sequence[Job], processes: int) -> list[T]:
    """``function`` of each job, in ``processes`` processes of one thread each."""
    if processes == 1:
        torch.set_num_threads(1)
        return [function(job) for job in jobs]
    spawn = get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(function, jobs))


def measured(jobs: Sequence[Job], processes: int) -> list[dict[str, Any]]:
    """The results of each job; weights that several networks share are trained first, and once."""
    pending = [job for job in jobs if not job.done.exists()]
    in_processes(train, list(dict.fromkeys(job.honest() for job in pending)), processes)
    return in_processes(examine, jobs, processes)


def must_be(specimen: Specimen, pgd: float, truth: float) -> str | None:
    """The verdict that the network has to get.

    Args:
        specimen: the network.
        pgd: what plain PGD leaves.
        truth: the worst case or, if it is lower, the floor.
    """
    if specimen.must not in (SPARSE, HIDDEN):
        return specimen.must
    if pgd - truth >= A_LIE - ROUNDING:
        return "masked"
    return "not sound" if specimen.must == HIDDEN else None


def entry(specimen: Specimen, results: Mapping[str, Any], floor: float | None) -> dict[str, Any]:
    """What is kept of a network's results.

    Args:
        specimen: the network.
        results: its results.json.
        floor: the worst case of the honest network in this disguise, if that is known.
    """
    masking = results["masking"]
    checks = [*masking["flags"], *masking["passed"]]
    pgd, worst = results["attacks"]["pgd"]["robust_accuracy"], results["worst_case"]["robust_accuracy"]
    return {
        "name": specimen.name,
        "must": must_be(specimen, pgd, worst if floor is None else min(worst, floor)),
        "eps": results["threat"]["eps"],
        "clean": results["clean"]["accuracy"],
        "pgd": pgd,
        "worst_case": worst,
        "floor": floor,
        "within": None if floor is None else worst - floor <= WITHIN + ROUNDING,
        "verdict": masking["verdict"],
        "flags": [flag["check"] for flag in masking["flags"]],
        # What is compared with the threshold: for shares of images the lower end of the interval.
        "compared": {c["check"]: c.get("lower95", c["value"]) for c in checks},
        "binarization": masking["binarization"],
    }


def entries(key: str, results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries of a set, of those networks that have ``results``, which are by name."""
    worst = {name: found["worst_case"]["robust_accuracy"] for name, found in results.items()}
    return [
        entry(specimen, results[specimen.name], worst.get(specimen.floor_of or ""))
        for specimen in SETS[key]
        if specimen.name in results
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("KWTA_EXP_DATA", "data")))
    parser.add_argument("--work", type=Path, default=Path("outputs/calibration"))
    parser.add_argument("--processes", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--set", choices=tuple(SETS), help="one set; the page is then not written")
    parser.add_argument("--only", nargs="*", help="names of networks; the page is then not written")
    parser.add_argument("--page", action="store_true", help="write the page from the record, and stop")
    parser.add_argument("--collect", action="store_true", help="add what is in --work to both, and stop")
    arguments = parser.parse_args()
    if arguments.collect:
        write_record(collected(arguments.data, arguments.work, json.loads(RECORD.read_text())))
    elif not arguments.page:
        measure(arguments)
        if arguments.only or arguments.set:
            return
    record = json.loads(RECORD.read_text())
    write_text(PAGE, page(record))
    rule = thresholds([found for found in record["setting"] if found["must"] == "sound"])
    for check, value in rule.items():
        if abs(value - CHECKS[check].threshold) > 1e-6:
            print(f"{check}: the rule gives {value:g}, the check has {CHECKS[check].threshold:g}")


def write_record(record: Mapping[str, Any]) -> None:
    write_text(RECORD, json.dumps(record, indent=2, allow_nan=False) + "\n")


def collected(data: Path, work: Path, before: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the networks whose results are in ``work`` or, else, in the record of ``before``.

    A floor is of the weights that the disguised network has: where both were measured anew, of the new ones.
    """
    record: dict[str, Any] = {"missing": {}}
    for key, specimens in SETS.items():
        jobs = [Job(key, specimen.name, data, work) for specimen in specimens]
        found = entries(key, {job.name: read_json(job.done) for job in jobs if job.done.exists()})
        known = {entry["name"]: entry for entry in [*before[key], *found]}
        record[key] = [known[job.name] for job in jobs if job.name in known]
        record["missing"][key] = [job.name for job in jobs if job.name not in known]
    return record


def measure(arguments: argparse.Namespace) -> None:
    """The record, or what was chosen of it on the screen."""
    keys = [arguments.set] if arguments.set else list(SETS)
    if "trying" in keys and not fashion(arguments.data).present():
        raise SystemExit(f"--data {arguments.data}: FashionMNIST is not there; run.py dataset=fashion_mnist"
                         " training=natural training.epochs=1 suite=none downloads it")  # fmt: skip
    jobs = [
        Job(key, specimen.name, arguments.data, arguments.work)
        for key in keys
        for specimen in SETS[key]
        if not arguments.only or specimen.name in arguments.only
    ]
    known: dict[str, dict[str, Any]] = {key: {} for key in keys}
    for job, results in zip(jobs, measured(jobs, arguments.processes), strict=True):
        known[job.key][job.name] = results
    record = {key: entries(key, results) for key, results in known.items()}
    if not arguments.only and not arguments.set:
        write_record(record)
        return
    for found in (found for of_set in record.values() for found in of_set):
        floor = "" if found["floor"] is None else f", floor {found['floor']:.0%}"
        numbers = f"clean {found['clean']:.0%}, PGD {found['pgd']:.0%}, worst case {found['worst_case']:.0%}"
        must = f"must be {found['must'] or 'anything'}: {wrong(found) or 'right'}"
        print(f"{found['name']}: {numbers}{floor}; {found['verdict']}, {must}")


if __name__ == "__main__":
    main()
