"""Sets the thresholds of the verdict on one set of networks and tells its errors on another.

    python benchmarks/calibration.py [--data DIR] [--work DIR] [--only NAME ...]

Every network is trained here, disguised where it is to mask its gradients, attacked with suite=strong (at the
effort given below) and diagnosed. The first set is of small networks on digits, the second of other
architectures on FashionMNIST, whose files must lie in --data. A threshold is twice the largest value that any
honest network of the first set has, but at least the floor given here; the second set then shows how often an
honest network is not called sound (a false alarm) and a masked one is (a false trust). Each network's results
are kept in --work, so that a stopped calibration continues; the record goes to docs/calibration.json
and the page to docs/calibration.md.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from kwta_exp.activations import KWTA, LWTA
from kwta_exp.attacks import PGD, Attack, Threat
from kwta_exp.config import build
from kwta_exp.data.base import Images
from kwta_exp.data.batches import TrainingBatches, first_test_images, split_training
from kwta_exp.data.datasets import Digits, FashionMNIST
from kwta_exp.evaluation import Evaluation, evaluate
from kwta_exp.evaluation.checks import CHECKS
from kwta_exp.models import CNN, MLP, ResNet
from kwta_exp.runtime import Runtime
from kwta_exp.storage import read_json, write_json, write_text
from kwta_exp.training import NaturalTraining, PGDTraining, Training
from kwta_exp.training.trainer import Recipe, Trainer

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
RECORD = Path("docs/calibration.json")
PAGE = Path("docs/calibration.md")

N = 100
"""Images judged."""

A_LIE = 0.1
"""How far above the worst case plain PGD's accuracy is a lie."""

EFFORT = [
    "suite=strong", "attack.autoattack.steps=50", "attack.autoattack.queries=1000",
    "attack.square.queries=1000", "attack.square.restarts=1", "attack.es.steps=50",
]  # fmt: skip
"""The suite, at a part of its effort: what is judged here is the verdict, not the networks."""

FLOORS = {
    "gain_over_plain_pgd": 0.05, "single_step_finds_more": 0.02, "black_box_finds_more": 0.02,
    "robust_at_large_eps": 0.05, "gradients_are_zero": 0.05, "gradients_are_not_finite": 0.0,
    "change_unseen_by_gradients": 0.2, "last_is_not_best": 0.1, "still_rising": 0.1,
    "outputs_are_probabilities": 0.5, "outputs_are_random": 0.0, "random_search_finds_more": 0.0,
    "repeating_finds_more": 0.01, "binarization_missed_by_pgd": 0.05, "binarization_missed": 0.05,
    "operators_block_gradients": 0.0, "parts_not_covered": 0.0,
}  # fmt: skip
"""The least that each threshold may be."""


class Quantised(nn.Module):
    """Images in 17 shades: the gradient is zero everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 16).round() / 16


class Shattered(nn.Module):
    """A ripple too small to see, and steep enough to turn every gradient's sign into noise."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(2000 * x) * 0.004


class Loud(nn.Module):
    """Logits so far apart that the cross-entropy is zero and its gradient too."""

    def forward(self, x: Tensor) -> Tensor:
        return 1000 * x


class Noisy(nn.Module):
    """Another answer each time."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


@dataclass(frozen=True)
class Specimen:
    """A network of the calibration.

    ``must`` is the verdict it has to get: ``sound``, ``masked``, ``masked if PGD lies`` by :data:`A_LIE` or
    more, or ``not sound``; ``None`` where nobody knows, and it is only shown.
    """

    name: str
    must: str | None
    network: Callable[..., nn.Module]
    adversarial: bool = False
    before: Callable[[], nn.Module] | None = None
    after: Callable[[], nn.Module] | None = None


def linear(num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size[0] * image_size[1], num_classes))


def convnet(act: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    return partial(CNN, act, channels=[16, 16, 32, 32], hidden=100)


def mlp(act: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    return partial(MLP, act, hidden=[256, 256])


def resnet(act: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    def make(num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
        return ResNet(act, depth=18, width=8, num_classes=num_classes, in_channels=in_channels)

    return make


def pooled(act: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    """Convolutions with batch norm and max-pooling, global average pooling, no hidden linear layer."""

    def make(num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
        layers: list[nn.Module] = []
        width = in_channels
        for next_width in (16, 32, 64):
            layers += [
                nn.Conv2d(width, next_width, 3, padding=1),
                nn.BatchNorm2d(next_width),
                act(),
                nn.MaxPool2d(2),
            ]
            width = next_width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

    return make


SETTING: list[Specimen] = [
    Specimen("linear", "sound", linear),
    Specimen("cnn relu", "sound", convnet(nn.ReLU)),
    Specimen("cnn relu AT", "sound", convnet(nn.ReLU), adversarial=True),
    Specimen("mlp relu", "sound", mlp(nn.ReLU)),
    Specimen("mlp relu AT", "sound", mlp(nn.ReLU), adversarial=True),
    Specimen("mlp silu", "sound", mlp(nn.SiLU)),
    Specimen("cnn tanh", "sound", convnet(nn.Tanh)),
    Specimen("cnn k-WTA 0.1", "masked if PGD lies", convnet(partial(KWTA, ratio=0.1))),
    Specimen("cnn k-WTA 0.2", "masked if PGD lies", convnet(partial(KWTA, ratio=0.2))),
    Specimen("mlp k-WTA 0.1 AT", "masked if PGD lies", mlp(partial(KWTA, ratio=0.1)), adversarial=True),
    Specimen("cnn LWTA", None, convnet(partial(LWTA, group_size=2))),
    Specimen("cnn relu, quantised input", "masked", convnet(nn.ReLU), before=Quantised),
    Specimen("cnn relu, shattered gradients", "masked", convnet(nn.ReLU), before=Shattered),
    Specimen("cnn relu, logits x 1000", "masked", convnet(nn.ReLU), after=Loud),
    Specimen("cnn relu, softmax", None, convnet(nn.ReLU), after=partial(nn.Softmax, 1)),
    Specimen("cnn relu, noisy input", "not sound", convnet(nn.ReLU), before=Noisy),
]

TRYING: list[Specimen] = [
    Specimen("linear", "sound", linear),
    Specimen("resnet18 relu", "sound", resnet(nn.ReLU)),
    Specimen("pooled relu", "sound", pooled(nn.ReLU)),
    Specimen("pooled relu AT", "sound", pooled(nn.ReLU), adversarial=True),
    Specimen("mlp gelu AT", "sound", mlp(nn.GELU), adversarial=True),
    Specimen("mlp k-WTA 0.2", "masked if PGD lies", mlp(partial(KWTA, ratio=0.2))),
    Specimen("pooled k-WTA 0.1", "masked if PGD lies", pooled(partial(KWTA, ratio=0.1))),
    Specimen("mlp k-WTA 0.05", "masked if PGD lies", mlp(partial(KWTA, ratio=0.05))),
    Specimen("pooled relu AT, quantised input", "masked", pooled(nn.ReLU), adversarial=True, before=Quantised),
    Specimen("mlp gelu, shattered gradients", "masked", mlp(nn.GELU), before=Shattered),
    Specimen("pooled relu, logits x 1000", "masked", pooled(nn.ReLU), after=Loud),
    Specimen("mlp gelu, noisy input", "not sound", mlp(nn.GELU), before=Noisy),
]


@dataclass(frozen=True)
class Field:
    """Data and the recipe on it. ``eps`` is for natural networks and, the larger one, for trained ones."""

    name: str
    images: Images
    train_n: int | None
    epochs: int
    eps: tuple[float, float]


def trained(specimen: Specimen, field: Field, threat: Threat, path: Path) -> nn.Module:
    images = field.images
    torch.manual_seed(0)
    model = specimen.network(
        num_classes=images.num_classes, in_channels=images.in_channels, image_size=images.image_size
    )
    training: Training = NaturalTraining(epochs=field.epochs, batch_size=64)
    if specimen.adversarial:
        inner = PGD(norm="linf", eps=threat.eps, steps=7, keep_best=False)
        training = PGDTraining(epochs=field.epochs, batch_size=64, attack=inner)
    train, val = split_training(images, field.train_n, 0.1, 0, CPU)
    batches = TrainingBatches(train, 64, 0, False, 0)
    schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=field.epochs)
    recipe = Recipe(training, partial(torch.optim.SGD, lr=0.04, momentum=0.9), schedule)
    Trainer(model, recipe, batches, val, Runtime(accelerator="cpu").fabric()).train(path, print_epoch)
    parts = [specimen.before and specimen.before(), model, specimen.after and specimen.after()]
    return nn.Sequential(*(part for part in parts if part)).eval().requires_grad_(False)


def print_epoch(history: Sequence[Mapping[str, float]]) -> None:
    if history and len(history) % 5 == 0:
        print(f"  epoch {len(history)}: validation {history[-1]['val_accuracy']:.1%}", flush=True)


def suite_of(threat: Threat) -> dict[str, Attack]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [*EFFORT, f"threat.eps={threat.eps}"])
        return {name: build(cfg, f"attack.{name}") for name in cfg.attack}


def examined(specimen: Specimen, field: Field, work: Path) -> dict[str, Any]:
    """The network's results, from ``work`` if they are there."""
    folder = work / field.name / specimen.name.replace(" ", "_").replace(",", "")
    done = folder / "results.json"
    if done.exists():
        return read_json(done)
    print(f"{field.name}: {specimen.name}", flush=True)
    threat = Threat(norm="linf", eps=field.eps[specimen.adversarial])
    network = trained(specimen, field, threat, folder / "state.pt")
    images, suite = first_test_images(field.images, N, CPU), suite_of(threat)
    evaluation = Evaluation(network, images, suite, threat, folder / "evaluation", batch_size=N)
    results = evaluate(evaluation, {"name": specimen.name}, checks_n=32)
    write_json(done, results)
    print(f"  {results['masking']['verdict']}", flush=True)
    return results


def entry(specimen: Specimen, results: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a network's results."""
    masking = results["masking"]
    checks = [*masking["flags"], *masking["passed"]]
    must = specimen.must
    if must == "masked if PGD lies":
        gap = results["attacks"]["pgd"]["robust_accuracy"] - results["worst_case"]["robust_accuracy"]
        must = "masked" if gap >= A_LIE else None
    return {
        "name": specimen.name,
        "must": must,
        "eps": results["threat"]["eps"],
        "clean": results["clean"]["accuracy"],
        "pgd": results["attacks"]["pgd"]["robust_accuracy"],
        "worst_case": results["worst_case"]["robust_accuracy"],
        "verdict": masking["verdict"],
        "flags": [flag["check"] for flag in masking["flags"]],
        # What is compared with the threshold: for shares of images the lower end of the interval.
        "compared": {c["check"]: c.get("lower95", c["value"]) for c in checks},
        "binarization": masking["binarization"],
    }


def wrong(found: Mapping[str, Any]) -> str | None:
    """The kind of error, if the verdict is one."""
    must, verdict = found["must"], found["verdict"]
    if must == "sound" and verdict != "sound":
        return "false alarm"
    if must in ("masked", "not sound") and verdict == "sound":
        return "false trust"
    return "not called masked" if must == "masked" and verdict != "masked" else None


def thresholds(honest: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Twice the largest value of an honest network, but at least the floor."""
    return {
        check: max(floor, 2 * max(found["compared"].get(check, 0.0) for found in honest))
        for check, floor in FLOORS.items()
    }


def page(record: Mapping[str, Any]) -> str:
    honest = [found for found in record["setting"] if found["must"] == "sound"]
    lying = [found for found in record["setting"] if found["must"] not in ("sound", None)]
    rule = thresholds(honest)
    lines = [
        "# How the verdict was calibrated",
        "",
        "Made by `python benchmarks/calibration.py` ([source](../benchmarks/calibration.py)), from"
        " [the record](calibration.json). Thresholds come from the first set of networks, by one rule:"
        " twice the largest value that any honest network there has, but at least a floor. The second set, of"
        " other architectures and data, had no part in them. `must` is the verdict a network has to get because"
        " of how it was made; a k-WTA network must be called masked where plain PGD leaves ten points more than"
        f" the worst case. Where it is blank nobody knows. Each was judged on {N} images, L-inf.",
        "",
        "## Errors",
        "",
        "| set | networks | honest | false alarms | masked or random | false trust | not called masked |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for title, key in (("first (thresholds)", "setting"), ("second (trial)", "trying")):
        known = [found for found in record[key] if found["must"]]
        good = sum(found["must"] == "sound" for found in known)
        kinds = [wrong(found) for found in known]
        lines.append(
            f"| {title} | {len(record[key])} | {good} | {kinds.count('false alarm')} | {len(known) - good} |"
            f" {kinds.count('false trust')} | {kinds.count('not called masked')} |"
        )
    lines += ["", "## Thresholds", ""]
    lines += [
        "| check | honest networks: largest | the others: smallest, largest | threshold | flags raised by |"
    ]
    lines += ["| --- | ---: | ---: | ---: | --- |"]
    for check in CHECKS:
        if not any(check in found["compared"] for found in record["setting"] + record["trying"]):
            lines.append(f"| {check} | not measured | | {rule[check]:g} | |")
            continue
        values = [found["compared"][check] for found in lying if check in found["compared"]]
        top = max(found["compared"].get(check, 0.0) for found in honest)
        who = [found["name"] for found in record["setting"] + record["trying"] if check in found["flags"]]
        lines.append(
            f"| {check} | {top:.3f} | {min(values, default=0):.3f}, {max(values, default=0):.3f} |"
            f" {rule[check]:g} | {len(who)} |"
        )
    for title, key, data in (
        ("The first set", "setting", "digits"),
        ("The second set", "trying", "FashionMNIST"),
    ):
        lines += ["", f"## {title}: {data}", ""]
        lines += ["| network | eps | clean | pgd | worst case | binarized: pgd, all | must | verdict | flags |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: | --- | --- | --- |"]
        for found in record[key]:
            rates = found["binarization"].get("success_rates", {})
            test = "not made"
            if rates:
                test = f"{100 * rates.get('pgd', 0):.0f}, {100 * sum(rates.values()):.0f}"
            figures = " | ".join(f"{100 * found[key]:.0f}" for key in ("clean", "pgd", "worst_case"))
            error = f" ({kind})" if (kind := wrong(found)) else ""
            lines.append(
                f"| {found['name']} | {found['eps']:g} | {figures} | {test} | {found['must'] or ''} |"
                f" {found['verdict']}{error} | {', '.join(found['flags'])} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("KWTA_EXP_DATA", "data")))
    parser.add_argument("--work", type=Path, default=Path("outputs/calibration"))
    parser.add_argument("--only", nargs="*", help="names of networks; the page is then not written")
    parser.add_argument("--page", action="store_true", help="write the page from the record, and stop")
    arguments = parser.parse_args()
    if not arguments.page:
        torch.set_num_threads(1)
        fashion = FashionMNIST(root=str(arguments.data), train_n=6000)
        if not fashion.present():
            raise SystemExit(f"--data {arguments.data}: FashionMNIST is not there; run.py dataset=fashion_mnist"
                             " training=natural training.epochs=1 suite=none downloads it")  # fmt: skip
        fields = {
            "setting": (SETTING, Field("digits", Digits().load(), None, 30, (0.1, 0.1))),
            "trying": (TRYING, Field("fashion_mnist", fashion.load(), 6000, 8, (0.05, 0.05))),
        }
        record = {}
        for key, (specimens, field) in fields.items():
            chosen = [s for s in specimens if not arguments.only or s.name in arguments.only]
            record[key] = [entry(s, examined(s, field, arguments.work)) for s in chosen]
        if arguments.only:
            return
        write_text(RECORD, json.dumps(record, indent=2, allow_nan=False) + "\n")
    record = json.loads(RECORD.read_text())
    write_text(PAGE, page(record))
    rule = thresholds([found for found in record["setting"] if found["must"] == "sound"])
    for check, value in rule.items():
        if abs(value - CHECKS[check].threshold) > 1e-6:
            print(f"{check}: the rule gives {value:g}, the check has {CHECKS[check].threshold:g}")


if __name__ == "__main__":
    main()
