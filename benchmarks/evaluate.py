"""A whole evaluation of a naturally trained ReLU network with PGD-20, against foolbox.

    python -m benchmarks.evaluate [--rounds 3] [--images 64] [--eps 0.1255] [--npz FILE] [--json FILE]

ResNet-18 is trained for three epochs on digits, enlarged to 32x32 and three channels, at an eighth of the
contrast, so that they are fooled about as fast as photographs. ``--npz`` trains on 5,000 images of an ``.npz``
file of 32x32 photographs, as for ``dataset=arrays``, instead; ``--weights`` reads weights. Our side includes
all that ``run.py`` does from the trained network to the record: proxy, judging, confirming and counting.
foolbox's side is only its attack. We drop fooled images; foolbox does not.
"""

import itertools
import tempfile
from pathlib import Path
from typing import Literal

import foolbox
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import Row, arguments, interleaved, report
from kwta_exp.attacks import PGD, Threat
from kwta_exp.checkpoint import load_into, read_weights
from kwta_exp.data.batches import Split
from kwta_exp.data.datasets import Arrays, Digits
from kwta_exp.evaluation import Evaluation
from kwta_exp.models import ResNet

STEPS = 20


def main() -> None:
    asked = arguments(__doc__, rounds=3, images=64, eps=32 / 255, npz="", weights="")
    network, images = network_and_images(asked.npz, asked.weights, asked.images, "cpu")
    took, found = compared(network, images, asked.eps, asked.rounds)
    name = f"PGD-{STEPS} evaluation of {len(images)} images"
    rows = [
        Row(f"{name}, search=fast", took["fast"], "foolbox", took["foolbox"], "s", "speed-up", 10),
        Row(f"{name}, search=exact", took["exact"], "foolbox", took["foolbox"], "s", "speed-up"),
    ]
    left = ", ".join(f"{side} {found[f'{side} left']:.1%}" for side in ("fast", "exact", "foolbox"))
    notes = [
        f"eps {asked.eps:.4f}; robust: {left}. Mean gradient steps an image: fast"
        f" {found['fast steps']:.1f}, exact {found['exact steps']:.1f}, foolbox {STEPS}."
    ]
    of = Path(asked.npz).name if asked.npz else "grey digits"
    report(f"ReLU ResNet-18, naturally trained on {of}", rows, notes, asked)


def network_and_images(npz: str, weights: str, n: int, device: str) -> tuple[nn.Module, Split]:
    """A trained network, and the first ``n`` test images that it classifies correctly."""
    x_train, y_train, x_test, y_test = photographs(npz) if npz else grey_digits()
    if weights:
        network = ResNet(nn.ReLU, num_classes=int(y_train.max()) + 1, in_channels=3).to(device).eval()
        load_into(network, read_weights(Path(weights)), weights)
    else:
        network = trained(x_train.to(device), y_train.to(device))
    with torch.no_grad():
        some = x_test[: 6 * n].to(device)
        right = (network(some / 255).argmax(1).cpu() == y_test[: len(some)]).nonzero()[:n, 0]
    return network, Split(x_test[right].to(device), y_test[right].to(device), right.to(device))


def compared(
    network: nn.Module, images: Split, eps: float, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """The seconds of each side, and what it found: the share of images left, and steps an image."""
    x, y = images.x / 255, images.y
    suite, threat = {"pgd": PGD(norm="linf", eps=eps, steps=STEPS)}, Threat(norm="linf", eps=eps)
    library = foolbox.attacks.LinfPGD(rel_stepsize=2.5 / STEPS, steps=STEPS)
    found: dict[str, float] = {}

    with tempfile.TemporaryDirectory() as scratch:
        numbers = itertools.count()

        def ours(search: Literal["exact", "fast"]) -> None:
            folder = Path(scratch) / str(next(numbers))
            evaluation = Evaluation(network, images, suite, threat, folder, batch_size=len(x), search=search)
            record = evaluation.run().records["pgd"]
            found[f"{search} left"] = 1 - record.columns["fooled"].mean()
            found[f"{search} steps"] = record.backwards / len(x)

        def foolboxes(library: foolbox.attacks.LinfPGD = library) -> None:
            network.requires_grad_(True)  # the default of a network
            model = foolbox.PyTorchModel(network, bounds=(0, 1), device=x.device)
            found["foolbox left"] = 1 - library(model, x, y, epsilons=eps)[2].double().mean().item()

        ours("fast")  # warm up
        foolboxes(foolbox.attacks.LinfPGD(steps=2))
        took = interleaved(
            {"fast": lambda: ours("fast"), "exact": lambda: ours("exact"), "foolbox": foolboxes},
            rounds, 0, x.device.type,
        )  # fmt: skip
    return took, found


def grey_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits enlarged to 32x32 and three channels, at an eighth of the contrast."""
    digits = Digits().load()
    x_train, x_test = (
        F.interpolate(torch.from_numpy(x) / 8 + 100, scale_factor=4, mode="bilinear")
        .round()
        .byte()
        .expand(-1, 3, -1, -1)
        for x in (digits.x_train, digits.x_test)
    )
    y_train, y_test = (torch.from_numpy(y).long() for y in (digits.y_train, digits.y_test))
    return x_train, y_train, x_test, y_test


def photographs(path: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images = Arrays(path=path).load()
    return (
        torch.from_numpy(images.x_train[:5000]), torch.from_numpy(images.y_train[:5000]).long(),
        torch.from_numpy(images.x_test), torch.from_numpy(images.y_test).long(),
    )  # fmt: skip


def trained(x_u8: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(0)
    network = ResNet(nn.ReLU, num_classes=10, in_channels=3).to(x_u8.device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for at in torch.randperm(len(y), device=y.device).split(64):
            optimizer.zero_grad()
            with torch.autocast(x_u8.device.type, torch.bfloat16):
                loss = F.cross_entropy(network(x_u8[at] / 255), y[at])
            loss.backward()
            optimizer.step()
    return network.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload,no-any-return]


if __name__ == "__main__":
    main()
