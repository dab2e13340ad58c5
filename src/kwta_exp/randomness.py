"""Random numbers that are a pure function of (seed, purpose, example, position).

A generator has state, which must be saved, restored and shared between processes. A counter-based
stream has none: the noise of image 17 in epoch 3 is the same in any batch, on any
device, before or after a resume. The mixing function is SplitMix64's finaliser (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), computed in wrapping int64.
"""

import hashlib
import math
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def _signed(word: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit word."""
    return word - (1 << 64) if word >= 1 << 63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def key(seed: int, *purpose: str | int) -> int:
    """A 63-bit key for one use of a seed, such as ``key(seed, "order", epoch)``."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def fold(key: int | Tensor, data: Tensor) -> Tensor:
    """One new key for each number in ``data``, an int64 tensor ``(N,)``."""
    return _mix(_mix(data * _GOLDEN) + key)


def uniform(keys_N: Tensor, shape: Sequence[int]) -> Tensor:
    """Float32 numbers in [0, 1), shape ``(N, *shape)``, one stream for each key.

    The same bits on every device. CPUs use a Numba kernel for many numbers, CUDA a Triton kernel.
    """
    drawn: Tensor = torch.ops.kwta_exp.uniform(keys_N, math.prod(shape))
    return drawn.view(len(keys_N), *shape)


def normal(keys_N: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 numbers, shape ``(N, *shape)``, by the Box-Muller transform."""
    u = uniform(keys_N, (2, *shape))
    radius = (-u[:, 0]).log1p_().mul_(-2).sqrt_()
    return radius.mul_((2 * math.pi * u[:, 1]).cos_())


MANY = 1 << 14
"""Numbers from which it pays to load Numba (0.3 s); once it is loaded, its kernel is faster for any number."""

# An operator, so that torch.compile and the like do not look into the kernels.
torch.library.define("kwta_exp::uniform", "(Tensor keys, int size) -> Tensor")


def _uniform_by_torch(keys: Tensor, size: int) -> Tensor:
    counter = torch.arange(1, size + 1, device=keys.device) * _GOLDEN
    bits = _mix(keys[:, None] + counter)
    return _shift(bits, 40).float() * 2.0**-24


torch.library.impl("kwta_exp::uniform", "CompositeExplicitAutograd", _uniform_by_torch)


@torch.library.impl("kwta_exp::uniform", "CPU")
def _uniform_on_cpu(keys: Tensor, size: int) -> Tensor:
    if len(keys) * size < MANY and "numba" not in sys.modules:
        return _uniform_by_torch(keys, size)
    from kwta_exp import randomness_numba
    from kwta_exp.compiled import on_threads

    drawn = torch.empty(len(keys), size)
    arrays = keys.contiguous().numpy(), drawn.numpy()
    on_threads(randomness_numba.uniform_parts, drawn.shape, torch.get_num_threads(), *arrays)
    return drawn


@torch.library.impl("kwta_exp::uniform", "CUDA")
def _uniform_on_cuda(keys: Tensor, size: int) -> Tensor:
    from kwta_exp import randomness_triton

    return randomness_triton.uniform(keys, size)


@torch.library.register_fake("kwta_exp::uniform")  # type: ignore[untyped-decorator]
def _uniform_shape(keys: Tensor, size: int) -> Tensor:
    return keys.new_empty((len(keys), size), dtype=torch.float32)


def permutation(length: int, key: int) -> Tensor:
    """A random order of ``range(length)`` on the CPU, int64 ``(length,)``."""
    generator = torch.Generator().manual_seed(key)
    return torch.randperm(length, generator=generator)


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and Python, and restore their states afterwards.

    For third-party code that draws from them: what it draws depends on ``seed`` alone. Of GPUs, those that this
    process uses are seeded and restored; others are not touched, nor is CUDA where nothing has used it yet.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    of_gpus = {gpu: torch.cuda.get_rng_state(gpu) for gpu in _gpus_in_use()}
    try:
        # Not torch.manual_seed, which also reaches all GPUs, or queues a call for when CUDA is initialised.
        torch.default_generator.manual_seed(seed)
        for gpu in of_gpus:
            torch.cuda.default_generators[gpu].manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        for gpu, state in of_gpus.items():
            torch.cuda.set_rng_state(state, gpu)


def _gpus_in_use() -> list[int]:
    """The current GPU and those with a context of this process; none before CUDA is initialised."""
    if not torch.cuda.is_initialized():
        return []
    current = torch.cuda.current_device()
    return [
        gpu
        for gpu in range(torch.cuda.device_count())
        if gpu == current or torch._C._cuda_hasPrimaryContext(gpu)  # type: ignore[attr-defined]
    ]


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's ``>>`` keeps the sign)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)
