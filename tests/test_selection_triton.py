"""The GPU's selection against a full sort: interpreted on a CPU, compiled for sm_90, and on a real device.

Triton looks at TRITON_INTERPRET when it is imported, so the first two run in processes of their own:
``python -m tests.test_selection_triton interpret`` or ``compile``.
"""

import math
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kwta_exp.activations import selection
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


def check(triton_selection: ModuleType, rows: Tensor, k: int, by_magnitude: bool, device: str) -> None:
    """Compare every bit of the winners with what a sort in float64 says they are."""
    integer = INTEGERS[rows.dtype]
    score = rows.double().abs() if by_magnitude else rows.double()
    threshold = score.sort(dim=1, descending=True).values[:, k - 1 : k]
    winning = ~(score < threshold.masked_fill(threshold.isnan(), math.inf))
    expected = rows.view(integer).where(winning & (rows != 0), 0)
    gradients = torch.arange(1.0, 1 + rows.numel()).view(rows.shape).to(rows.dtype)

    winners, bits = triton_selection.keep(rows.to(device), k, by_magnitude)
    passed = triton_selection.pass_winners(gradients.to(device), bits).cpu()

    assert winners.dtype == rows.dtype
    found = winners.cpu()
    differing = (found.view(integer).where(found != 0, 0) != expected).any(1).nonzero().flatten().tolist()
    assert not differing, f"rows {differing} of {tuple(rows.shape)}, {rows.dtype}, {k=}, {by_magnitude=}"
    assert torch.equal(bits.cpu(), selection._packed(winning))
    assert torch.equal(passed, gradients.where(winning, 0))
    if not by_magnitude:
        selected = triton_selection.kth_largest(rows.to(device), k).cpu().double()
        assert torch.equal(selected.isnan(), threshold.isnan())
        assert torch.equal(selected.nan_to_num(), threshold.nan_to_num())


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
    """Both ways of selection, each on rows of one size."""
    from kwta_exp.activations import selection_triton

    check_sizes([1, 100], "cpu", few=True)
    selection_triton.IN_REGISTERS, selection_triton.TILE = 0, 128
    check_sizes([200], "cpu", few=True)


def interpret_more() -> None:
    """Both ways of selection on rows of more sizes, and on rows as long as in earnest."""
    from kwta_exp.activations import selection_triton

    check_sizes([1, 7, 100, 1500], "cpu")
    long = torch.randn(1, selection_triton.IN_REGISTERS + 1001)
    check(selection_triton, long, 3000, True, "cpu")
    check(selection_triton, long[:, : selection_triton.IN_REGISTERS].contiguous(), 3000, False, "cpu")
    selection_triton.IN_REGISTERS, selection_triton.TILE = 0, 128
    check_sizes([1, 300], "cpu")


def compile_for_sm_90(few: bool = True) -> None:
    """Compile what would be launched, launching nothing; of a few, the largest sizes in float32 alone."""
    import triton
    from triton.backends.compiler import GPUTarget

    from kwta_exp.activations import selection_triton

    class NoDevice:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    class Compiled:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int]) -> Any:
            def compiled(*args: Any, **options: Any) -> None:
                assert self.kernel.warmup(*args, grid=grid, **options).asm["cubin"]

            return compiled

    triton.runtime.driver.set_active(NoDevice())
    for name in ("_in_registers", "_in_tiles", "_pass"):
        setattr(selection_triton, name, Compiled(getattr(selection_triton, name)))
    for dtype in INTEGERS:
        large = (selection_triton.IN_REGISTERS, selection_triton.IN_REGISTERS + 1001)
        for size in (49, *(large if not few or dtype == torch.float32 else ()), *(() if few else (1,))):
            rows = torch.zeros(2, size, dtype=dtype)
            _, bits = selection_triton.keep(rows, 1, False)
            selection_triton.pass_winners(rows, bits)
        selection_triton.kth_largest(rows, 1)
        selection_triton.keep(rows, 1, True)
        selection_triton.keep(rows[:, :64].contiguous(), 1, True)


def in_a_process(what: str, **environment: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_selection_triton", what],
        capture_output=True, text=True, cwd=ROOT, timeout=600, check=False, env=inherited | environment,
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
def test_the_kernels_compile_for_sm_90(tmp_path: Path, what: str) -> None:
    triton = pytest.importorskip("triton")
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").exists():
        pytest.skip("this Triton came without ptxas")
    in_a_process(what, TRITON_CACHE_DIR=str(tmp_path))


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
    {
        "interpret": interpret,
        "interpret-more": interpret_more,
        "compile": compile_for_sm_90,
        "compile-more": lambda: compile_for_sm_90(few=False),
    }[sys.argv[1]]()
