"""The rows of docs/performance_gpu.md, and the worker that measures them; see :mod:`benchmarks.gpu`.

    python -m benchmarks.gpu_rows --device cuda -- ROW...

Prints a line of JSON for the machine and for each row, in order. A row that fails is printed as an error; after
a CUDA error, which spoils the process, the worker ends.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks import attack, evaluate, train
from benchmarks.timing import interleaved, machine
from kwta_exp.activations import KWTA, kwta
from kwta_exp.attacks import APGD, BPDA, PGD, Attack
from kwta_exp.models.proxy import Proxy
from kwta_exp.runtime import Precision, compute_in_float32
from kwta_exp.training import NaturalTraining, PGDTraining, Training

MARK = "@row "
ROOT = Path(__file__).parents[1]
RATIO, EPS = 0.1, 8 / 255


@dataclass(frozen=True)
class Setting:
    """Where to measure, and whether on tiny shapes."""

    device: str
    small: bool

    def of(self, size: int) -> int:
        """A number of images, or of values."""
        return min(size, 4) if self.small else size


Measure = Callable[[Setting], Mapping[str, float | str]]
"""Measures one row: a number, or a text, by column."""


@dataclass(frozen=True)
class Section:
    """A table: its columns, and what measures each row."""

    title: str
    about: str
    columns: tuple[str, ...]
    rows: Mapping[str, Measure]


def layer(setting: Setting, length: int, dtype: torch.dtype) -> dict[str, float | str]:
    """One k-WTA layer on 128 rows, against topk with a mask, ReLU and a copy of the same tensor."""
    x = torch.randn(setting.of(128), length, device=setting.device).to(dtype)
    k = math.floor(RATIO * length)

    def by_topk(x: Tensor) -> Tensor:
        return x.masked_fill(x < x.topk(k, dim=1).values[:, -1:], 0)

    if not torch.equal(kwta(x, RATIO), by_topk(x)):
        raise RuntimeError("k-WTA and topk with a mask differ")
    leaf, gradient, out = x.clone().requires_grad_(), torch.randn_like(x), torch.empty_like(x)

    def there_and_back(function: Callable[[Tensor], Tensor]) -> None:
        torch.autograd.grad(function(leaf), leaf, gradient)

    def ours(x: Tensor) -> Tensor:
        return kwta(x, RATIO)

    took = bursts(
        {
            "k-WTA": lambda: ours(x), "topk": lambda: by_topk(x), "ReLU": lambda: torch.relu(x),
            "copy": lambda: out.copy_(x), "k-WTA, gradient": lambda: there_and_back(ours),
            "ReLU, gradient": lambda: there_and_back(torch.relu),
        },
        setting,
    )  # fmt: skip
    alone = graphed({"k-WTA": lambda: ours(x), "copy": lambda: out.copy_(x)}, setting)
    return {
        "k-WTA, ms": took["k-WTA"],
        "topk + mask, ms": took["topk"],
        "speed-up": took["topk"] / took["k-WTA"],
        "ReLU, ms": took["ReLU"],
        "GPU alone, ms": alone if isinstance(alone, str) else alone["k-WTA"],
        "copy alone, ms": "" if isinstance(alone, str) else alone["copy"],
        "of a copy's bandwidth": "" if isinstance(alone, str) else f"{alone['copy'] / alone['k-WTA']:.0%}",
        "with gradient, ms": took["k-WTA, gradient"],
        "ReLU with gradient, ms": took["ReLU, gradient"],
    }


def step_of_attack(setting: Setting, made: Callable[[int], Attack], fast: bool) -> dict[str, float | str]:
    """A step of an attack on ResNet-18: the difference between a long and a short attack, by step."""
    few, many, n = 2, 4 if setting.small else 12, setting.of(128)
    x = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(setting.device)
    y, keys = torch.zeros(n, dtype=torch.long, device=setting.device), torch.arange(n, device=setting.device)

    def on(activation: nn.Module) -> Callable[[int], None]:
        network = attack.constant_network(activation, setting.device)
        searched = Proxy(network, x[:2]) if fast else network.requires_grad_(False)

        def run(steps: int) -> None:
            made(steps)(searched, x, y, keys)

        run(few)
        return run

    sides = {"k-WTA": on(KWTA(RATIO))}
    if not isinstance(made(few), BPDA):  # which does not apply to ReLU
        sides["ReLU"] = on(nn.ReLU())
    calls = {f"{name}, {steps}": partial(side, steps) for name, side in sides.items() for steps in (few, many)}
    took = interleaved(calls, 3, 0, setting.device)
    ms = {name: 1000 * (took[f"{name}, {many}"] - took[f"{name}, {few}"]) / (many - few) for name in sides}
    found: dict[str, float | str] = {f"{name}, ms": value for name, value in ms.items()}
    if "ReLU" in ms:
        found["cost"] = ms["k-WTA"] / ms["ReLU"]
    if setting.device == "cuda":
        synchronised = [synchronisations(partial(sides["k-WTA"], steps)) for steps in (few, many)]
        found["synchronisations"] = (synchronised[1] - synchronised[0]) / (many - few)
    return found


def training_step(
    setting: Setting, training: Training, precision: Precision, batch: int, plain: bool
) -> dict[str, float | str]:
    """A training step of ResNet-18, with k-WTA and ReLU, and of a plain loop with the published snippet."""
    n = setting.of(batch)
    sides: dict[str, Callable[[], None]] = {
        "k-WTA": train.step(training, train.KWTA_01, precision, n, setting.device),
        "ReLU": train.step(training, nn.ReLU, precision, n, setting.device),
    }
    if plain:
        sides["plain loop"] = train.plain_step(n, setting.device)
    took = interleaved(sides, 5 if not plain else 3, 1 if plain else 2, setting.device)
    found: dict[str, float | str] = {f"{name}, ms": 1000 * seconds for name, seconds in took.items()}
    found |= {"cost": took["k-WTA"] / took["ReLU"], "images/s": n / took["k-WTA"]}
    if plain:
        found["speed-up over the plain loop"] = took["plain loop"] / took["k-WTA"]
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sides["k-WTA"]()
        found["peak, MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return found


def pgd_20(setting: Setting, images: int) -> dict[str, float | str]:
    """PGD-20 on a k-WTA ResNet-18 that is never fooled, against other libraries."""
    n, steps = setting.of(images), 2 if setting.small else 20
    sides = attack.sides(n, setting.device)
    for side in sides.values():
        side(2)
    took = interleaved({name: partial(side, steps) for name, side in sides.items()}, 3, 0, setting.device)
    found: dict[str, float | str] = {f"{name}, ms an image": 1000 * s / n for name, s in took.items()}
    found["speed-up over foolbox"] = took["foolbox"] / took["ours"]
    return {"torchattacks, ms an image": "not installed", **found}


def whole_evaluation(setting: Setting, images: int) -> dict[str, float | str]:
    """An evaluation of a trained ReLU ResNet-18 with PGD-20, against foolbox's attack alone."""
    network, some = evaluate.network_and_images("", "", setting.of(images), setting.device)
    took, found = evaluate.compared(network, some, 32 / 255, 1 if setting.small else 3)
    left = " / ".join(f"{found[f'{side} left']:.1%}" for side in ("fast", "exact", "foolbox"))
    return {
        **{f"{side}, s": seconds for side, seconds in took.items()},
        "speed-up (fast)": took["foolbox"] / took["fast"],
        "left: fast / exact / foolbox": left,
    }


def epoch(setting: Setting, activation: str, more: tuple[str, ...]) -> dict[str, float | str]:
    """An epoch of PGD-10 training on 50,000 synthetic images of CIFAR-10's size, with run.py."""
    sizes = ("dataset.train=50000", "dataset.test=10", "recipe.batch_size=256")
    if setting.small:
        sizes = ("dataset.train=20", "dataset.test=10", "recipe.batch_size=8", "training.attack.steps=1")
    with tempfile.TemporaryDirectory() as outputs:
        command = [
            sys.executable, "run.py", "dataset=synthetic", "model=resnet18", f"activation={activation}",
            "training=pgd", "training.search=fast", "recipe.epochs=1", *sizes, "suite=none",
            "evaluation.n=10", "runtime.precision=bf16-mixed", "runtime.channels_last=true", *more,
            f"runtime.accelerator={setting.device}", f"paths.outputs={outputs}",
        ]  # fmt: skip
        started = time.monotonic()
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        (metrics,) = Path(outputs).rglob("metrics.jsonl")
        speed = json.loads(metrics.read_text().splitlines()[0])["images_per_second"]
    return {"images/s": speed, "the whole command, s": seconds}


def bursts(sides: Mapping[str, Callable[[], Any]], setting: Setting) -> dict[str, float]:
    """Median milliseconds a call of each side, over interleaved bursts of calls."""
    calls = 20 if setting.device == "cuda" else 1

    def burst(side: Callable[[], Any]) -> None:
        for _ in range(calls):
            side()

    rounds = 2 if setting.small else 9
    took = interleaved({name: partial(burst, side) for name, side in sides.items()}, rounds, 1, setting.device)
    return {name: 1000 * seconds / calls for name, seconds in took.items()}


def graphed(sides: Mapping[str, Callable[[], Any]], setting: Setting) -> dict[str, float] | str:
    """Milliseconds a call, replayed from CUDA graphs of 20 calls; a text where that is not possible."""
    if setting.device != "cuda":
        return "no CUDA graph on a CPU"
    calls, found = 20, {}
    try:
        for name, side in sides.items():
            graph = torch.cuda.CUDAGraph()
            with torch.no_grad(), torch.cuda.graph(graph):
                for _ in range(calls):
                    side()
            graph.replay()
            taken = []
            for _ in range(9):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                taken.append(start.elapsed_time(end) / calls)
            found[name] = statistics.median(taken)
    except RuntimeError as error:
        if is_cuda_error(error):
            raise
        return f"no CUDA graph: {error}".splitlines()[0]
    return found


def synchronisations(call: Callable[[], Any]) -> int:
    """How often ``call`` waits for the GPU, as torch's debug mode counts."""
    call()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def pgd(steps: int) -> Attack:
    return PGD(norm="linf", eps=EPS, steps=steps)


def apgd(steps: int) -> Attack:
    return APGD(norm="linf", eps=EPS, steps=steps)


def bpda(steps: int) -> Attack:
    return BPDA(norm="linf", eps=EPS, steps=steps, restarts=1)


def training_with(search: Literal["exact", "fast"]) -> PGDTraining:
    inner = PGD(norm="linf", eps=EPS, steps=10, keep_best=False)
    return PGDTraining(epochs=1, attack=inner, search=search)


LENGTHS = (1024, 4096, 8192, 16384, 32768, 65536)
NATURAL = NaturalTraining(epochs=1)

SECTIONS = (
    Section(
        "A layer",
        "k-WTA 0.1 on 128 rows, one for each image. The layers of ResNet-18 on 32x32 images have 65,536,"
        " 32,768, 16,384 and 8,192 values an image.",
        (
            "k-WTA, ms",
            "topk + mask, ms",
            "speed-up",
            "ReLU, ms",
            "GPU alone, ms",
            "copy alone, ms",
            "of a copy's bandwidth",
            "with gradient, ms",
            "ReLU with gradient, ms",
        ),
        {
            f"{length:,} values, {name}": partial(layer, length=length, dtype=dtype)
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
            for length in LENGTHS
        },
    ),
    Section(
        "A step of an attack",
        "ResNet-18, 128 images that are never fooled; `synchronisations` counts how often a step waits for the"
        " GPU (torch.cuda.set_sync_debug_mode).",
        ("k-WTA, ms", "ReLU, ms", "cost", "synchronisations"),
        {
            f"{name}, search={'fast' if fast else 'exact'}": partial(step_of_attack, made=made, fast=fast)
            for fast in (True, False)
            for name, made in (("PGD", pgd), ("APGD", apgd), ("bpda", bpda))
        },
    ),
    Section(
        "A training step",
        "ResNet-18, SGD with momentum; `plain loop` is PGD as often written, in float32, with the published"
        " snippet for k-WTA.",
        (
            "k-WTA, ms",
            "ReLU, ms",
            "cost",
            "plain loop, ms",
            "speed-up over the plain loop",
            "images/s",
            "peak, MiB",
        ),
        {
            "natural, float32, batch 128": partial(
                training_step, training=NATURAL, precision="32-true", batch=128, plain=False
            ),
            "natural, bfloat16, batch 128": partial(
                training_step, training=NATURAL, precision="bf16-mixed", batch=128, plain=False
            ),
            "natural, bfloat16, batch 256": partial(
                training_step, training=NATURAL, precision="bf16-mixed", batch=256, plain=False
            ),
            "PGD-10, bfloat16, batch 256, search=fast": partial(
                training_step, training=training_with("fast"), precision="bf16-mixed", batch=256, plain=True
            ),
            "PGD-10, bfloat16, batch 256, search=exact": partial(
                training_step, training=training_with("exact"), precision="bf16-mixed", batch=256, plain=False
            ),
        },
    ),
    Section(
        "PGD-20 against other libraries",
        "A k-WTA ResNet-18 that is never fooled. Ours searches on the fast proxy and the network itself judges;"
        " the others attack the network with the published snippet, in float32.",
        (
            "ours, ms an image",
            "ours, ReLU, ms an image",
            "foolbox, ms an image",
            "torchattacks, ms an image",
            "speed-up over foolbox",
        ),
        {f"PGD-20, {n} images": partial(pgd_20, images=n) for n in (64, 512)},
    ),
    Section(
        "A whole evaluation",
        "PGD-20 on a ReLU ResNet-18 trained on grey digits, eps 32/255. Ours includes proxy, judging,"
        " confirming and records; foolbox's side is its attack alone.",
        ("fast, s", "exact, s", "foolbox, s", "speed-up (fast)", "left: fast / exact / foolbox"),
        {f"evaluation, {n} images": partial(whole_evaluation, images=n) for n in (64, 256)},
    ),
    Section(
        "An epoch of PGD-10",
        "`run.py` on 50,000 synthetic images of CIFAR-10's size, ResNet-18, bfloat16, batch 256, search=fast;"
        " a tenth of the images is held out and attacked for validation.",
        ("images/s", "the whole command, s"),
        {
            "an epoch, k-WTA": partial(epoch, activation="kwta", more=()),
            "an epoch, ReLU": partial(epoch, activation="relu", more=()),
            "an epoch, k-WTA, runtime.compile=true": partial(
                epoch, activation="kwta", more=("runtime.compile=true",)
            ),
        },
    ),
)


def all_rows() -> Iterator[str]:
    """The names of all rows, in order."""
    return (name for section in SECTIONS for name in section.rows)


def is_cuda_error(error: BaseException) -> bool:
    """Whether the process cannot use the GPU any more."""
    kind = getattr(torch, "AcceleratorError", ())
    return isinstance(error, kind) or "CUDA error" in str(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("rows", nargs="*", default=list(all_rows()))
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no CUDA device")
    compute_in_float32()
    say({"machine": machine(asked.device)})
    measures = {name: measure for section in SECTIONS for name, measure in section.rows.items()}
    for name in asked.rows:
        try:
            say({"cells": measures[name](Setting(asked.device, asked.small))})
        except Exception as error:
            traceback.print_exc()
            say({"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})
            if is_cuda_error(error):
                return
        if asked.device == "cuda":
            torch.cuda.empty_cache()


def say(message: Mapping[str, Any]) -> None:
    print(MARK + json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
