"""PGD-20 on a k-WTA ResNet-18 that is never fooled, 64 images: ours against foolbox.

    python -m benchmarks.attack [--rounds 3] [--images 64] [--steps 20] [--device cuda] [--json FILE]

foolbox attacks the network with the published snippet for its activation, in float32. Ours searches on the
fast proxy (``evaluation.search=fast``), and the network itself judges the result.
"""

from functools import partial

import foolbox
import torch
from torch import nn

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
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(asked.images, 3, 32, 32, generator=generator).to(asked.device)
    y = torch.zeros(asked.images, dtype=torch.long, device=asked.device)
    keys = torch.arange(asked.images, device=asked.device)
    network = constant_network(KWTA(ratio=0.1), asked.device)
    theirs = constant_network(PublishedKWTA(0.1), asked.device)
    relu = constant_network(nn.ReLU(), asked.device)
    searched = {id(each): (Proxy(each, x[:2]), Judge(each, asked.images)) for each in (network, relu)}
    wrapped = foolbox.PyTorchModel(theirs, bounds=(0, 1), device=asked.device)

    def ours(steps: int, attacked: nn.Module = network) -> None:
        proxy, judge = searched[id(attacked)]
        x_adv = PGD(norm="linf", eps=EPS, steps=steps)(proxy, x, y, keys)
        assert (judge.logits(x_adv).argmax(1) == y).all(), (
            "an image was fooled, so the sides took different numbers of steps"
        )

    def foolboxes(steps: int) -> None:
        library = foolbox.attacks.LinfPGD(rel_stepsize=2.5 / steps, steps=steps)
        assert not library(wrapped, x, y, epsilons=EPS)[2].any()

    sides = {
        "ours": ours,
        "ours, ReLU": partial(ours, attacked=relu),
        "foolbox": foolboxes,
    }
    for side in sides.values():
        side(2)  # warm up
    sides = {name: partial(side, asked.steps) for name, side in sides.items()}
    took = interleaved(sides, asked.rounds, 0, asked.device)
    ms = {name: 1000 * seconds / asked.images for name, seconds in took.items()}
    what = f"PGD-{asked.steps} an image, search=fast"
    rows = [
        Row(what, ms["ours"], "foolbox, snippet, float32", ms["foolbox"], "ms", "speed-up", 4),
        Row(what, ms["ours"], "the same of ReLU", ms["ours, ReLU"], "ms", "cost"),
    ]
    note = f"eps {EPS:.4f}; no image was fooled, so each took {asked.steps} steps on every side."
    report(f"{asked.images} images, k-WTA 0.1 ResNet-18", rows, [note], asked)


def constant_network(activation: nn.Module, device: str) -> nn.Module:
    """An untrained network that predicts class 0 for every image."""
    torch.manual_seed(0)
    network = ResNet(lambda: activation, num_classes=10, in_channels=3).to(device).eval()
    with torch.no_grad():
        network.linear.bias[0] += 20.0
    return network


if __name__ == "__main__":
    main()
