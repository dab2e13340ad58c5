"""The GPU's kernels against a full sort: interpreted on a CPU, compiled for GPUs, and on a real device.

Triton looks at TRITON_INTERPRET when it is imported, so the first two run in processes of their own:
``python -m tests.test_selection_triton interpret`` or ``compile 80 90``.
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kwta_exp.activations import selection
from kwta_exp.activations.soft_gate import moving_threshold
from tests.conftest import ROOT

INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def rows_of_every_kind(size: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Ordinary and awkward rows: ties, one sign, signed zeros, infinities, subnormals, NaN about ``k``."""
    normal = torch.randn(19, size, generator=generator)
    rows = normal.to(dtype)
    rows[2] = (normal[2] * 2).round().to(dtype)
    rows[3] = -rows[3].abs()
    rows[4] = rows[4].relu()
    rows[5], rows[6], rows[7], rows[8] = -1.5, 0.0, -0.0, math.nan
    rows[9] = torch.where(normal[9] < 0, -0.0, 0.0)
    rows[10][normal[10].abs() < 1] = torch.where(normal[11] < 0, -0.0, 0.0).to(dtype)[normal[10].abs() < 1]
    rows[11] = torch.where(normal[11] < 0, -math.inf, math.inf)
    rows[12][normal[12] > 0.5], rows[12][normal[12] < -0.5] = math.inf, -math.inf
    rows[13] = (normal[13] * 8).round().to(dtype) * smallest_subnormal(dtype)
    for row, nans in zip((14, 15, 16), (k - 1, k, k + 1), strict=True):
        rows[row][torch.randperm(size, generator=generator)[:nans]] = math.nan
    rows[16][normal[16] > 1] = math.inf
    integer = INTEGERS[dtype]
    patterns = torch.randint(-(1 << 31), 1 << 31, (2, size), generator=generator)
    rows[17:19] = patterns.to(integer).view(dtype)
    return rows


def smallest_subnormal(dtype: torch.dtype) -> float:
    return torch.ones(1, dtype=INTEGERS[dtype]).view(dtype).item()


def check(
    triton_selection: ModuleType, rows: Tensor, k: int, by_magnitude: bool, device: str, only_keep: bool = False
) -> None:
    """Compare every bit of the winners with what a sort in float64 says they are."""
    integer = INTEGERS[rows.dtype]
    score = rows.double().abs() if by_magnitude else rows.double()
    threshold = score.sort(dim=1, descending=True).values[:, k - 1 : k]
    winning = ~(score < threshold.masked_fill(threshold.isnan(), math.inf))
    expected = rows.view(integer).where(winning & (rows != 0), 0)
    gradients = torch.arange(1.0, 1 + rows.numel()).view(rows.shape).to(rows.dtype)

    if not only_keep:
        check_gate(triton_selection, rows, k, by_magnitude, device)
    winners, bits = triton_selection.keep(rows.to(device), k, by_magnitude)
    passed = triton_selection.pass_winners(gradients.to(device), bits).cpu()

    assert winners.dtype == rows.dtype
    found = winners.cpu()
    differing = (found.view(integer).where(found != 0, 0) != expected).any(1).nonzero().flatten().tolist()
    assert not differing, f"rows {differing} of {tuple(rows.shape)}, {rows.dtype}, {k=}, {by_magnitude=}"
    assert torch.equal(bits.cpu(), selection._packed(winning))
    assert torch.equal(passed, gradients.where(winning, 0))
    if not by_magnitude and not only_keep:
        selected = triton_selection.kth_largest(rows.to(device), k).cpu().double()
        assert torch.equal(selected.isnan(), threshold.isnan())
        assert torch.equal(selected.nan_to_num(), threshold.nan_to_num())


def check_gate(module: ModuleType, rows: Tensor, k: int, by_magnitude: bool, device: str) -> None:
    """Compare the soft gate and its gradient with float64."""
    x = rows.double().requires_grad_()
    score = x.abs() if by_magnitude else x
    threshold = score.detach().sort(dim=1, descending=True).values[:, k - 1 : k]
    width = 0.3 * score.detach().std(dim=1, keepdim=True, correction=1 if rows.shape[1] > 1 else 0)
    expected = x * torch.sigmoid((score - moving_threshold(score, threshold, width, [1])) / width)
    weight = torch.linspace(-1, 2, rows.numel(), dtype=rows.dtype).view_as(rows)
    (slope,) = torch.autograd.grad(expected, x, weight.double())

    gated, thresholds, widths = module.gate(rows.to(device), k, by_magnitude, 0.3)
    passed = module.pass_gate(weight.to(device), rows.to(device), thresholds, widths, by_magnitude)

    finite = threshold.masked_fill(threshold.isnan(), math.inf)
    # Triton's interpreter takes subnormals of bfloat16 for 0.
    torch.testing.assert_close(thresholds.cpu().double(), finite, rtol=0, atol=2e-38)
    # Where the width is at the limits of float32 (a constant row, or bits at random), rounding decides.
    ordinary = ((width > 1e-6) & (width < 1e15)).flatten()
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if rows.dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    same = partial(torch.testing.assert_close, check_dtype=False, **tolerance)
    same(widths.cpu()[ordinary], width[ordinary])
    same(gated.cpu()[ordinary], expected.detach()[ordinary])
    # The difference of a value and its row's weighted mean rounds more.
    coarse = {"rtol": 1e-3, "atol": 1e-4} if rows.dtype == torch.float32 else tolerance
    same(passed.cpu()[ordinary], slope[ordinary], **coarse)


def check_sizes(sizes: Iterable[int], device: str, few: bool = False) -> None:
    """Check rows of every kind, dtype and k; of a few, extreme k in float32 by value alone."""
    from kwta_exp.activations import selection_triton

    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        between = int(torch.randint(1, size + 1, (1,), generator=generator))
        for k in sorted({1, between, size}):
            for dtype in INTEGERS if k == between or not few else [torch.float32]:
                rows = rows_of_every_kind(size, k, dtype, generator)
                both = not few or (k == between and dtype == torch.float32)
                for by_magnitude in (False, True) if both else (False,):
                    check(selection_triton, rows, k, by_magnitude, device)


def interpret() -> None:
    """Short rows of two sizes, operators in every layout, long rows, and how often they are read."""
    check_sizes([1, 100], "cpu", few=True)
    check_layouts()
    check_reads()
    check_uniform()
    selection_triton = make_short_rows_long()
    generator = torch.Generator().manual_seed(0)
    for dtype, by_magnitude in ((torch.float32, False), (torch.bfloat16, True)):
        rows = rows_of_every_kind(150, 40, dtype, generator)[[0, 2, 5, 12, 14, 15, 17]]
        check(selection_triton, rows, 40, by_magnitude, "cpu")


def interpret_more() -> None:
    """Both ways of selection on rows of more sizes, and on rows as long as in earnest."""
    from kwta_exp.activations import selection_triton

    check_sizes([1, 7, 100, 1500], "cpu")
    long = torch.randn(1, selection_triton.IN_REGISTERS + 1001)
    check(selection_triton, long, 3000, True, "cpu")
    check(selection_triton, long[:, : selection_triton.IN_REGISTERS].contiguous(), 3000, False, "cpu")
    check_more_reads()
    make_short_rows_long()
    check_sizes([64, 300], "cpu")


def make_short_rows_long() -> ModuleType:
    """All rows take the way of long ones, with smaller samples and tiles."""
    from kwta_exp.activations import selection_triton

    selection_triton.IN_REGISTERS, selection_triton._TILE, selection_triton._WARPS = 0, 1024, 1
    selection_triton.SAMPLE = selection_triton.FEW = 64
    return selection_triton


LAYOUTS = [
    ((2, 12), None),
    ((2, 3, 6), None),
    ((2, 3, 5, 4), None),
    ((2, 3, 5, 4), torch.channels_last),
    ((2, 4, 5, 3), (1, 3)),  # a transpose, dense in neither format
    ((2, 3, 2, 4, 3), torch.channels_last_3d),
]


def check_layouts() -> None:
    """The bodies of the CUDA operators give what the CPU's give, in the same memory format."""
    from kwta_exp.activations import soft_gate

    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    cases = product(LAYOUTS, (False, True), (False, True))
    for number, ((shape, layout), per_channel, by_magnitude) in enumerate(cases):
        x, gradient = torch.randn(2, *shape, generator=generator).to(dtypes[number % 4]).unbind()
        if isinstance(layout, tuple):
            x, gradient = x.transpose(*layout), gradient.transpose(*layout)
        elif layout is not None:
            x = x.contiguous(memory_format=layout)
        per_channel = per_channel and x.dim() > 2

        kept, bits = selection._keep_on_cuda(x, 3, per_channel, by_magnitude)
        same(kept, torch.ops.kwta_exp.keep(x, 3, per_channel, by_magnitude)[0])
        assert torch.equal(bits, torch.ops.kwta_exp.keep(x, 3, per_channel, by_magnitude)[1])
        channels_last = selection.in_channels_last(x) and not per_channel
        if x.dtype == torch.float64:
            rows = x.flatten(1)
            same(selection._select_on_cuda(rows, 3), torch.ops.kwta_exp.kth_largest(rows, 3))
            continue
        passed = selection._pass_on_cuda(gradient, bits, channels_last)
        same(passed, torch.ops.kwta_exp.pass_winners(gradient, bits, channels_last))
        found = soft_gate._gate_on_cuda(x, 3, per_channel, by_magnitude, 0.1)
        for one, other in zip(
            found, torch.ops.kwta_exp.soft_gate(x, 3, per_channel, by_magnitude, 0.1), strict=True
        ):
            same(one, other, 1e-5 if one.dtype == torch.float32 else 1e-2)
        passed = soft_gate._pass_gate_on_cuda(gradient, x, *found[1:], by_magnitude)
        expected = torch.ops.kwta_exp.pass_soft_gate(gradient, x, *found[1:], by_magnitude)
        same(passed, expected, 1e-5 if x.dtype == torch.float32 else 1e-2)


def same(found: Tensor, expected: Tensor, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_stride=True)


def check_uniform() -> None:
    """The kernel's random numbers are those of torch's operators, bit for bit."""
    from kwta_exp import randomness, randomness_triton

    generator = torch.Generator().manual_seed(0)
    some = torch.randint(-(1 << 63), (1 << 63) - 1, (4,), generator=generator)
    keys = torch.cat([some, torch.tensor([0, -1, (1 << 63) - 1, -(1 << 63)])])
    for size in (0, 1, 7, 1500):
        assert torch.equal(randomness_triton.uniform(keys, size), randomness.uniform(keys, (size,)))
    assert torch.equal(randomness_triton.uniform(keys[::2], 9), randomness.uniform(keys[::2], (9,)))
    assert randomness_triton.uniform(keys[:0], 3).shape == (0, 3)


def check_reads() -> None:
    """How often the kernel itself reads a row of 65,536 values."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(3, 1 << 16, generator=generator)
    assert sorted(reads(normal, 6553))[:2] == [3, 3]
    image = of_a_network(generator)
    for rows in (image, image.movedim(1, -1)):
        assert max(reads(rows.reshape(len(rows), -1), 6553)) <= 4
    ties = torch.stack([(normal[0] * 2).round(), normal[1].relu(), torch.full_like(normal[2], 1.5)])
    assert max(reads(ties, 6553)) <= 4
    assert reads(ties, 40_000)[1:] == [2, 2]  # nothing to gather
    normal[0, :9000], normal[1, ::30] = math.nan, math.nan
    assert max(reads(normal[:2], 6553)) <= 4


def check_more_reads() -> None:
    """The same for other ranks, bfloat16 and longer rows."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(4, 1 << 16, generator=generator)
    ties = torch.stack([(normal[0] * 2).round(), normal[1].relu(), (normal[2] * 4).round()])
    for share in (0.001, 0.01, 0.1, 0.4, 0.49, 0.505, 0.6, 0.999):
        k = int(share * normal.shape[1])
        assert max(reads(normal, k)) <= 4
        assert max(reads(ties, k)) <= 4
        assert max(reads(normal.bfloat16(), k)) <= 4
        assert max(reads(torch.randn(1, 802_816, generator=generator), int(share * 802_816))) <= 5
    assert max(reads(of_a_network(generator).flatten(1).bfloat16(), 6553)) <= 4


def of_a_network(generator: torch.Generator) -> Tensor:
    """What a k-WTA layer receives from batch normalisation: smooth channels of different scale and mean."""
    from kwta_exp.activations import KWTA
    from kwta_exp.models import ResNet

    torch.manual_seed(0)
    network = ResNet(depth=18, activation=partial(KWTA, ratio=0.1), num_classes=10, in_channels=3).eval()
    norm = next(module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d))
    norm.weight.data.uniform_(0.1, 3)
    norm.bias.data.normal_()
    first = next(module for module in network.modules() if isinstance(module, KWTA))
    received: list[Tensor] = []
    first.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    images = torch.rand(2, 3, 36, 36, generator=generator)
    with torch.no_grad():
        network(torch.nn.functional.avg_pool2d(images, 5, 1))
    assert received[0].shape == (2, 64, 32, 32)
    return received[0]


def reads(rows: Tensor, k: int) -> list[int]:
    """Select with the constants of earnest; the sample is not counted."""
    from kwta_exp.activations import selection_triton as module

    counts = torch.zeros(len(rows), dtype=torch.int32)
    kernel = module._in_tiles
    module._in_tiles = {(len(rows),): lambda rows, *rest, **how: kernel[(len(rows),)](
        rows, *rest[:4], counts, *rest[5:], **how
    )}  # fmt: skip
    try:
        check(module, rows.contiguous(), k, False, "cpu", only_keep=True)
    finally:
        module._in_tiles = kernel
    return counts.tolist()


def compile_kernels(architectures: Iterable[int], few: bool) -> None:
    """Compile what would be launched, launching nothing; of a few, the largest sizes alone."""
    import triton
    from triton.backends.compiler import GPUTarget

    from kwta_exp import randomness_triton
    from kwta_exp.activations import selection_triton

    class NoDevice:
        architecture = 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", self.architecture, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    class Compiled:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Sequence[int]) -> Any:
            def compiled(*args: Any, **options: Any) -> None:
                done = self.kernel.warmup(*args, grid=grid, **options)
                assert done.metadata.shared < 99 * 1024  # the least that a GPU from sm_80 on grants
                assert spilled(tools, done.asm["cubin"]) <= 16, (self.kernel, options)

            return compiled

    driver = NoDevice()
    triton.runtime.driver.set_active(driver)
    of_selection = [(selection_triton, name) for name in ("_in_registers", "_in_tiles", "_pass", "_pass_gate")]
    kernels = [(module, name, getattr(module, name)) for module, name in of_selection]
    kernels.append((randomness_triton, "_uniform", randomness_triton._uniform))
    for module, name, kernel in kernels:
        setattr(module, name, Compiled(kernel))
    for driver.architecture in architectures:
        for *_, kernel in kernels:
            kernel.device_caches.clear()
        randomness_triton.uniform(torch.zeros(2, dtype=torch.int64), 3072)
        launch_all(selection_triton, few)


def launch_all(module: ModuleType, few: bool) -> None:
    long = module.IN_REGISTERS * 2
    sizes = (long,) if few else (1, 49, 3136, long // 2, long)
    for dtype, size in product([torch.float32] if few else INTEGERS, sizes):
        rows = torch.zeros(2, size, dtype=dtype)
        _, bits = module.keep(rows, 1, False)
        module.pass_winners(rows, bits)
        _, thresholds, widths = module.gate(rows, 1, False, 0.1)
        module.pass_gate(rows, rows, thresholds, widths, False)
        if not few:
            module.kth_largest(rows, 1)
            module.keep(rows, 1, True)
            module.gate(rows, 1, True, 0.1)
    module.keep(torch.zeros(2, long // 2), 1, False)


def spilled(tools: Path, cubin: bytes) -> int:
    """Bytes of registers in memory, a thread."""
    path = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    path.write_bytes(cubin)
    told = subprocess.run(
        [tools / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True
    ).stdout
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", told)))


def in_a_process(*what: str, **environment: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_selection_triton", *what],
        capture_output=True, text=True, cwd=ROOT, timeout=1200, check=False, env=inherited | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_interpreted_kernels_equal_a_sort() -> None:
    pytest.importorskip("triton")
    in_a_process("interpret", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.slow
def test_the_interpreted_kernels_equal_a_sort_at_more_sizes() -> None:
    pytest.importorskip("triton")
    in_a_process("interpret-more", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.parametrize("what", ["compile", pytest.param("compile-more", marks=pytest.mark.slow)])
def test_the_kernels_compile_for_gpus(tmp_path: Path, what: str) -> None:
    """They need no more shared memory than every GPU has, and spill no more than four registers."""
    triton = pytest.importorskip("triton")
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").exists():
        pytest.skip("this Triton came without ptxas")
    in_a_process(what, "80", "90", "100", TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.gpu
def test_the_kernels_equal_a_sort_on_a_device() -> None:
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    check_sizes([1, 7, 49, 64, 256, 1000, 1024, 5000, 16384, 32768, 32769, 65536, 802_816, 1_000_003], "cuda")


@pytest.mark.parametrize(
    ("rows", "k"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), 1),
        (torch.zeros(2, 3, 4), 1),
        (torch.zeros(3, 2).T, 1),
        (torch.zeros(2, 3), 0),
        (torch.zeros(2, 3), 4),
    ],
)
def test_unsupported_rows_and_ranks_are_refused(rows: Tensor, k: int) -> None:
    pytest.importorskip("triton")
    from kwta_exp.activations.selection_triton import keep, kth_largest

    with pytest.raises(ValueError, match="expected"):
        keep(rows, k, False)
    with pytest.raises(ValueError, match="expected"):
        kth_largest(rows, k)


if __name__ == "__main__":
    if sys.argv[1].startswith("compile"):
        compile_kernels(map(int, sys.argv[2:]), few=sys.argv[1] == "compile")
    else:
        {"interpret": interpret, "interpret-more": interpret_more}[sys.argv[1]]()
