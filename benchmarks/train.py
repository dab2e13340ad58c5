"""The cost of k-WTA in natural and adversarial training.

    python -m benchmarks.train [--rounds 3] [--batch 64] [--json FILE]

ResNet-18 on random 32x32 images, SGD with momentum. Every step is the framework's; the baseline of adversarial
training is a plain loop with the published snippet.
"""

import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from benchmarks.baselines import PublishedKWTA, plain_adversarial_step
from benchmarks.timing import Row, arguments, interleaved, report
from kwta_exp.activations import KWTA
from kwta_exp.attacks import PGD
from kwta_exp.data.batches import Batch
from kwta_exp.models import ResNet
from kwta_exp.runtime import Precision, Runtime
from kwta_exp.training import NaturalTraining, PGDTraining, Training

KWTA_01 = partial(KWTA, ratio=0.1)
EPS, STEPS = 8 / 255, 10
Step = Callable[[], None]


def main() -> None:
    asked = arguments(__doc__, rounds=3, batch=64)
    device, batch = "cpu", asked.batch
    rows: list[Row] = []
    natural = NaturalTraining(epochs=1)
    for name, precision, wanted in (
        ("float32", "32-true", 1.15),
        ("bfloat16, channels last", "bf16-mixed", 1.2),
    ):
        sides = {
            "ReLU": step(natural, nn.ReLU, precision, batch, device),  # type: ignore[arg-type]
            "k-WTA": step(natural, KWTA_01, precision, batch, device),  # type: ignore[arg-type]
        }
        took = interleaved(sides, asked.rounds + 2, 1, device)
        rows.append(
            Row(f"step, batch {batch}, {name}", took["k-WTA"], "ReLU", took["ReLU"], "s", "cost", wanted)
        )

    few = batch // 2
    attack = PGD(norm="linf", eps=EPS, steps=STEPS, keep_best=False)
    searches: list[Literal["exact", "fast"]] = ["fast", "exact"]
    sides = {
        search: step(PGDTraining(epochs=1, attack=attack, search=search), KWTA_01, "bf16-mixed", few, device)
        for search in searches
    }
    took = interleaved({**sides, "plain": plain_step(few, device)}, asked.rounds, 1, device)
    for search, wanted_of_it in (("fast", 3), ("exact", None)):
        what = f"PGD-{STEPS} training step, batch {few}, bfloat16, search={search}"
        baseline = "plain loop, snippet, float32"
        rows.append(Row(what, took[search], baseline, took["plain"], "s", "speed-up", wanted_of_it))

    rows += memory(batch)
    notes = [f"Images/s of PGD-{STEPS} adversarial training: {few / took['fast']:,.0f}."]
    report("ResNet-18, k-WTA 0.1", rows, notes, asked)


def images(n: int, device: str) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, 32, 32, generator=generator).to(device)
    y = torch.randint(10, (n,), generator=generator).to(device)
    return Batch(x, y, torch.arange(n, device=device))


def network(activation: Callable[[], nn.Module], device: str) -> ResNet:
    torch.manual_seed(0)
    return ResNet(activation, num_classes=10, in_channels=3).to(device)


def step(
    training: Training, activation: Callable[[], nn.Module], precision: Precision, batch: int, device: str
) -> Step:
    """A training step as in a run; bfloat16 uses channels last."""
    fabric = Runtime(accelerator=device, precision=precision).launch()  # type: ignore[arg-type]
    model = network(activation, device)
    if precision == "bf16-mixed":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    examples = images(batch, device)

    def learn() -> None:
        wrapped.train()
        with fabric.autocast():
            loss, _ = training.loss(wrapped, examples)
        wrapped_optimizer.zero_grad()
        fabric.backward(loss)
        wrapped_optimizer.step()

    return learn


def plain_step(batch: int, device: str) -> Step:
    """The same adversarial step in a plain loop, on a network with the published snippet."""
    model = network(partial(PublishedKWTA, 0.1), device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    examples = images(batch, device)
    return lambda: plain_adversarial_step(model, optimizer, examples.x, examples.y, EPS, STEPS)


def memory(batch: int) -> list[Row]:
    """The peak memory of training steps, each side in its own process."""
    # Otherwise the C library keeps most of the freed memory, and the figure measures fragmentation.
    os.environ.update(MALLOC_MMAP_THRESHOLD_="1000000", MALLOC_TRIM_THRESHOLD_="1000000")
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        relu, ours = pool.map(partial(_peak, batch=batch), ["ReLU", "k-WTA"], chunksize=1)
    return [
        Row(f"peak memory of a step, batch {batch}", ours[0], "ReLU", relu[0], "MiB", "cost", 1.1),
        Row("peak memory of its process", ours[1], "ReLU", relu[1], "MiB", "cost"),
    ]


def _peak(name: str, batch: int) -> tuple[float, float]:
    """The peak memory that steps add to a process with everything loaded, and that of the process."""
    learn = step(NaturalTraining(epochs=1), {"ReLU": nn.ReLU, "k-WTA": KWTA_01}[name], "32-true", batch, "cpu")
    if name == "k-WTA":
        KWTA_01()(torch.randn(2, 8, requires_grad=True)).sum().backward()  # compiles it
    before = _memory("VmRSS:")
    for _ in range(3):
        learn()
    peak = _memory("VmHWM:")
    return peak - before, peak


def _memory(kind: str) -> float:
    """MiB of this process. Not from getrusage, whose peak of a child includes the size of its parent."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index(kind) + 1]) / 2**10


if __name__ == "__main__":
    main()
