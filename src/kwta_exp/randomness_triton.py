"""One GPU kernel for the keyed random numbers of :mod:`.randomness`, which takes 42 operators of torch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def uniform(keys: Tensor, size: int) -> Tensor:
    """As :func:`.randomness.uniform`, bit for bit: float32 ``(N, size)`` in [0, 1) for int64 keys ``(N,)``."""
    numbers = keys.new_empty((len(keys), size), dtype=torch.float32)
    if numbers.numel():
        with torch.cuda.device_of(keys):  # Triton launches on the current device
            grid = (len(keys), -(-size // _BLOCK))
            _uniform[grid](keys.contiguous(), numbers, size, BLOCK=_BLOCK)
    return numbers


@triton.jit  # type: ignore[untyped-decorator]
def _uniform(keys, numbers, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """SplitMix64 in wrapping 64-bit integers; the upper 24 bits become a fraction."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    counter = (place + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = tl.load(keys + row).to(tl.uint64, bitcast=True) + counter
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    number = (z >> 40).to(tl.float32) * (1 / (1 << 24))
    tl.store(numbers + row * size + place, number, mask=place < size)
