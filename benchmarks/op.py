"""The cost of a k-WTA layer, ours and the published snippet, against ReLU on the same tensor.

    python -m benchmarks.op [--ratio 0.1] [--rounds 9] [--json FILE]

Every timed pass allocates its output, as a layer does, and freed memory is kept, as in a run.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.baselines import published_kwta
from benchmarks.timing import Row, arguments, interleaved, report
from kwta_exp.activations import KWTA, kwta
from kwta_exp.models import ResNet, sparse
from kwta_exp.randomness import fold, key, uniform

SHAPE = (128, 64, 32, 32)


def main() -> None:
    asked = arguments(__doc__, rounds=9, ratio=0.1)
    torch.manual_seed(0)
    sides: dict[str, Callable[[Tensor], Tensor]] = {
        "ReLU": torch.relu,
        "k-WTA": lambda x: kwta(x, asked.ratio),
        "snippet": lambda x: published_kwta(x, asked.ratio),
    }
    rows: list[Row] = []
    for kind, batch, dtype, layout in (
        ("float32", SHAPE[0], torch.float32, torch.contiguous_format),
        ("float32, half the batch", SHAPE[0] // 2, torch.float32, torch.contiguous_format),
        ("float32, channels last", SHAPE[0], torch.float32, torch.channels_last),
        ("bfloat16, channels last", SHAPE[0], torch.bfloat16, torch.channels_last),
    ):
        x = torch.randn(batch, *SHAPE[1:], device="cpu").to(dtype).contiguous(memory_format=layout)
        if not torch.equal(kwta(x, asked.ratio), published_kwta(x.float(), asked.ratio).to(dtype)):
            raise SystemExit(f"the two k-WTA differ in {kind}")
        names = sides if kind == "float32" else ("ReLU", "k-WTA")
        rows += compared(kind, x, {name: sides[name] for name in names}, asked.rounds)
    x = activations(asked.ratio, "cpu")
    kind = "bfloat16, channels last, half the batch, a ResNet's activations"
    rows += compared(kind, x, {name: sides[name] for name in ("ReLU", "k-WTA")}, asked.rounds)
    if sparse.pays(x.device):
        rows += convolutions(asked.ratio, asked.rounds)
    rows.append(random_numbers(asked.rounds))
    notes = [roofline(rows, asked.rounds, "cpu")]
    report(f"k-WTA {asked.ratio:g} on {SHAPE}", rows, notes, asked)


def compared(kind: str, x: Tensor, sides: dict[str, Callable[[Tensor], Tensor]], rounds: int) -> list[Row]:
    """Time forward, and forward with backward, for every side."""
    leaf, gradient = x.clone().requires_grad_(), torch.randn_like(x)

    def both(side: Callable[[Tensor], Tensor]) -> None:
        leaf.grad = None
        side(leaf).backward(gradient)

    device = x.device.type
    forward = interleaved({name: lambda side=side: side(x) for name, side in sides.items()}, rounds, 2, device)
    whole = interleaved({name: lambda side=side: both(side) for name, side in sides.items()}, rounds, 2, device)
    forward, whole = ({name: 1000 * t for name, t in times.items()} for times in (forward, whole))
    ours, backward_too = forward["k-WTA"], whole["k-WTA"]
    on_gpu, first = device == "cuda", "snippet" in sides
    wanted = (2.5 if on_gpu else 2.0) if first else None
    rows = [
        Row(f"forward, {kind}", ours, "ReLU", forward["ReLU"], "ms", "cost"),
        Row(f"forward + backward, {kind}", backward_too, "ReLU", whole["ReLU"], "ms", "cost", wanted),
    ]
    if first:
        rows.insert(
            0, Row(f"forward, {kind}", ours, "published snippet", forward["snippet"], "ms", "speed-up", 10)
        )
    if first and on_gpu:
        ranked = x.flatten(1)
        topk = interleaved({"topk": lambda: ranked.topk(ranked.shape[1] // 10, dim=1)}, rounds, 2, device)
        rows.append(Row(f"forward, {kind}", ours, "torch.topk", 1000 * topk["topk"], "ms", "speed-up", 10))
    return rows


@torch.no_grad()
def activations(ratio: float, device: str) -> Tensor:
    """The input of a k-WTA layer of an untrained ResNet-18; unlike random numbers, its channels differ."""
    network = ResNet(partial(KWTA, ratio=ratio), num_classes=10, in_channels=3).to(device).eval()
    given: list[Tensor] = []
    layer = next(module for module in network.modules() if isinstance(module, KWTA))
    layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    network(torch.rand(SHAPE[0] // 2, 3, *SHAPE[2:], device=device))
    return given[0].to(torch.bfloat16).contiguous(memory_format=torch.channels_last)


def convolutions(ratio: float, rounds: int) -> list[Row]:
    """3x3 convolutions of sparse images, and of sparse gradients, with and without skipping zeros."""
    rows = []
    for shape in ((64, 64, 32, 32), (64, 512, 4, 4)):
        dense = nn.Conv2d(shape[1], shape[1], 3, padding=1).requires_grad_(False)
        skipping = sparse.SparseConv2d(dense, sparse_gradient=True)
        dense = copy.deepcopy(dense).to(torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
        x, gradient = (
            kwta(torch.randn(shape), ratio).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
            for _ in range(2)
        )
        if (skipping(x).float() - dense(x).float()).abs().max() > 0.1:
            raise SystemExit("the two convolutions differ")
        sides = {
            name: partial(there_and_back, side, x.clone().requires_grad_(), gradient)
            for name, side in (("ours", skipping), ("dense", dense))
        }
        took = interleaved(sides, rounds, 2, "cpu")
        what = f"3x3 convolution of winners {shape} and back, bfloat16"
        rows.append(Row(what, 1000 * took["ours"], "torch", 1000 * took["dense"], "ms", "speed-up"))
    return rows


def random_numbers(rounds: int) -> Row:
    """The random start of an attack on 64 colour images: keyed numbers against those of torch's generator."""
    keys = fold(key(0, "start"), torch.arange(64))
    shape = (3, *SHAPE[2:])
    sides = {
        "keyed": lambda: uniform(keys, shape),
        "torch": lambda: torch.rand(len(keys), *shape),
    }
    took = interleaved(sides, rounds, 2)
    what = f"uniform random numbers for {(len(keys), *shape)}"
    return Row(what, 1000 * took["keyed"], "torch.rand", 1000 * took["torch"], "ms", "cost")


def there_and_back(side: Callable[[Tensor], Tensor], leaf: Tensor, gradient: Tensor) -> None:
    torch.autograd.grad(side(leaf), leaf, gradient)


def roofline(rows: list[Row], rounds: int, device: str) -> str:
    """The bytes that k-WTA must move and does move, and the speed of a copy on this machine."""
    x = torch.randn(SHAPE, device=device)
    y = torch.empty_like(x)
    copied = interleaved({"copy": lambda: y.copy_(x)}, rounds, 2, device)["copy"]
    size = x.nbytes / 2**20
    forward = next(row for row in rows if row.what == "forward, float32" and row.baseline == "ReLU")
    speed = 2 * size / copied / 1024
    least = 1000 * copied * (2 + 1 / 32) / 2
    return (
        f"Roofline: a forward pass must read {size:.0f} MiB and write {size:.0f} MiB, and {size / 32:.0f} MiB"
        " of bits; k-WTA moves no more. At the speed of a copy between tensors whose memory is mapped already,"
        f" {speed:.0f} GiB/s, that takes {least:.1f} ms. k-WTA took {forward.ours:.1f} ms and ReLU"
        f" {forward.theirs:.1f} ms; both write to memory that an earlier output used."
    )


if __name__ == "__main__":
    main()
