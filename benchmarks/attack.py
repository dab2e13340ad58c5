"""PGD-20 on a k-WTA ResNet-18 that is never fooled, 64 images: ours against foolbox.

    python -m benchmarks.attack [--rounds 3] [--images 64] [--steps 20] [--json FILE]

foolbox attacks the network with the published snippet for its activation, in float32. Ours searches on the
fast proxy (``evaluation.search=fast``), and the network itself judges the result.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import foolbox
import torch
from torch import Tensor, nn

from benchmarks.baselines import PublishedKWTA
from benchmarks.timing import Row, arguments, interleaved, report
from kwta_exp.activations import KWTA
from kwta_exp.attacks import PGD
from kwta_exp.evaluation.judge import Judge
from kwta_exp.models import ResNet
from kwta_exp.models.proxy import Proxy

EPS = 8 / 255


def main() -> None:
    asked = arguments(__doc__, rounds=3, images=64, steps=20)
    attacks = sides(asked.images, "cpu")
    for side in attacks.values():
        side(2)  # warm up
    took = interleaved({name: partial(side, asked.steps) for name, side in attacks.items()}, asked.rounds, 0)
    ms = {name: 1000 * seconds / asked.images for name, seconds in took.items()}
    what = f"PGD-{asked.steps} an image, search=fast"
    rows = [
        Row(what, ms["ours"], "foolbox, snippet, float32", ms["foolbox"], "ms", "speed-up", 4),
        Row(what, ms["ours"], "the same of ReLU", ms["ours, ReLU"], "ms", "cost"),
    ]
    note = f"eps {EPS:.4f}; no image was fooled, so each took {asked.steps} steps on every side."
    report(f"{asked.images} images, k-WTA 0.1 ResNet-18", rows, [note], asked)


def sides(images: int, device: str) -> dict[str, Callable[[int], None]]:
    """Functions of the number of steps that attack ``images`` random images, which none of them fools.

    torchattacks is among them if it is installed.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(images, 3, 32, 32, generator=generator).to(device)
    y = torch.zeros(images, dtype=torch.long, device=device)
    network = constant_network(KWTA(ratio=0.1), device)
    theirs = constant_network(PublishedKWTA(0.1), device)
    found = {
        "ours": our_pgd(network, x, y),
        "ours, ReLU": our_pgd(constant_network(nn.ReLU(), device), x, y),
        "foolbox": foolbox_pgd(theirs, x, y),
    }
    if find_spec("torchattacks"):
        found["torchattacks"] = torchattacks_pgd(theirs, x, y)
    return found


def our_pgd(network: nn.Module, x: Tensor, y: Tensor) -> Callable[[int], None]:
    """PGD on the fast proxy, judged by the network."""
    proxy, judge = Proxy(network, x[:2]), Judge(network, len(x))
    keys = torch.arange(len(x), device=x.device)

    def attack(steps: int) -> None:
        x_adv = PGD(norm="linf", eps=EPS, steps=steps)(proxy, x, y, keys)
        require_none_fooled(judge.logits(x_adv), y)

    return attack


def foolbox_pgd(network: nn.Module, x: Tensor, y: Tensor) -> Callable[[int], None]:
    """LinfPGD of foolbox, in float32."""
    wrapped = foolbox.PyTorchModel(network, bounds=(0, 1), device=x.device)

    def attack(steps: int) -> None:
        library = foolbox.attacks.LinfPGD(rel_stepsize=2.5 / steps, steps=steps)
        require_none_fooled(wrapped(library(wrapped, x, y, epsilons=EPS)[1]), y)

    return attack


def torchattacks_pgd(network: nn.Module, x: Tensor, y: Tensor) -> Callable[[int], None]:
    """PGD of torchattacks, in float32."""
    torchattacks = import_module("torchattacks")

    def attack(steps: int) -> None:
        library = torchattacks.PGD(network, eps=EPS, alpha=2.5 * EPS / steps, steps=steps)
        require_none_fooled(network(library(x, y)), y)

    return attack


def require_none_fooled(logits: Tensor, y: Tensor) -> None:
    """Raise if an image is fooled: the sides then take different numbers of steps."""
    if not (logits.argmax(1) == y).all():
        raise RuntimeError("an image was fooled, so the sides took different numbers of steps")


def constant_network(activation: nn.Module, device: str) -> nn.Module:
    """An untrained network that predicts class 0 for every image."""
    torch.manual_seed(0)
    network = ResNet(lambda: activation, num_classes=10, in_channels=3).to(device).eval()
    with torch.no_grad():
        network.linear.bias[0] += 20.0
    return network


if __name__ == "__main__":
    main()
