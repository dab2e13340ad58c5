"""Convolutions that skip the zeros of sparse activations, for a frozen network on a CPU without matrix units.

An activation module has an attribute ``density``: the largest share of values that it passes forward, and of
gradients that it passes back.

Measured on an AMD EPYC without AVX-512 (one thread, ``suite=quick evaluation.search=fast``, ResNet-18, k-WTA
0.1, 48 images, none fooled): PGD takes 0.5 and BPDA 0.6 times the CPU time of dense convolutions.
"""

import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch.nn.grad import conv2d_input

from kwta_exp import hardware
from kwta_exp.activations.selection import under_transform

SPARSE = 0.2
"""The largest density at which skipping zeros is faster than a dense convolution in bfloat16."""

_BITS = {torch.bfloat16: torch.uint16, torch.float32: torch.uint32}
_LANES = 64
_LOOKED_AT = 4
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout2d)

_Table = npt.NDArray[np.int64]


def pays(device: torch.device) -> bool:
    """Whether skipping zeros is faster: on CPUs without matrix units."""
    return device.type == "cpu" and not hardware.has_matrix_units(device)


def make_sparse(traced: fx.GraphModule) -> int:
    """Replace the convolutions of sparse activations in a traced float32 network; return their number."""
    modules = dict(traced.named_modules())
    replaced = 0
    for node in traced.graph.nodes:
        if not _calls(modules, node, nn.Conv2d) or not fits(modules[node.target]):
            continue
        if _is_sparse(modules, node.args[0]):
            few = node.users and all(_leads_to_sparse(modules, user) for user in node.users)
            traced.set_submodule(node.target, SparseConv2d(modules[node.target], sparse_gradient=bool(few)))
            replaced += 1
    return replaced


def fits(convolution: nn.Conv2d) -> bool:
    """Whether :class:`SparseConv2d` can replace ``convolution``, and is faster for sparse input."""
    return (
        convolution.groups == 1
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
        and isinstance(convolution.weight, nn.Parameter)  # not computed by a hook, as with weight_norm
        and not (convolution._forward_hooks or convolution._forward_pre_hooks)
        and _worth_it(convolution.in_channels, convolution.out_channels)
    )


class SparseConv2d(nn.Conv2d):
    """A frozen convolution that is fast for sparse input and correct for any.

    It accumulates in float32, also for bfloat16 images. Other dtypes and devices, second derivatives and
    ``torch.func`` transforms use PyTorch's convolution.

    Args:
        dense: the convolution to replace, in float32; parameters are shared. See :func:`fits`.
        sparse_gradient: whether the gradient of the output is expected to be sparse too.
    """

    def __init__(self, dense: nn.Conv2d, sparse_gradient: bool) -> None:
        super().__init__(
            dense.in_channels, dense.out_channels, dense.kernel_size, dense.stride,  # type: ignore[arg-type]
            dense.padding, dense.dilation, bias=dense.bias is not None, device="meta",  # type: ignore[arg-type]
        )  # fmt: skip
        self.weight, self.bias = dense.weight, dense.bias
        self._weight = _room(dense.out_channels, dense.in_channels, dense.kernel_size)
        self._bias = np.zeros(_LANES * len(self._weight), np.float32)
        sparse_gradient = sparse_gradient and _worth_it(dense.out_channels, dense.in_channels)
        room = _room(dense.in_channels, dense.out_channels, dense.kernel_size)
        self._transposed = room if sparse_gradient else None
        self.pack()

    @torch.no_grad()
    def pack(self) -> None:
        """Copy the current weights into the layout of the kernel."""
        _pack(self.weight, self._weight)
        if self.bias is not None:
            torch.from_numpy(self._bias)[: len(self.bias)].copy_(self.bias)
        if self._transposed is not None:
            _pack(self.weight.transpose(0, 1), self._transposed)

    def forward(self, x: Tensor) -> Tensor:
        fits = x.dtype in _BITS and x.device.type == "cpu" and x.dim() == 4 and x.numel()
        if not fits or under_transform():
            out: Tensor = super().forward(x)
        else:
            out = _Convolution.apply(x, self)
        return out

    def convolved(self, x: Tensor) -> Tensor:
        """The convolution of ``x (N, C, H, W)``."""
        sizes = self._sizes(x.shape[2:])
        tables = tuple(_reached(*each) for each in zip(x.shape[2:], sizes, *self._geometry(), strict=True))
        return _scattered(x, self._weight, self._bias, tables, (self.out_channels, *sizes))

    def pulled_back(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the input, of ``shape``, from the gradient of the output."""
        again = torch.is_grad_enabled()  # create_graph=True
        if self._transposed is None or again or not _looks_sparse(gradient):
            weight = self.weight.detach().to(gradient.dtype)
            pulled: Tensor = conv2d_input(shape, weight, gradient, self.stride, self.padding, self.dilation)
            return pulled
        sizes = tuple(shape[2:])
        tables = tuple(
            _reached_back(*each) for each in zip(gradient.shape[2:], sizes, *self._geometry(), strict=True)
        )
        return _scattered(
            gradient, self._transposed, np.zeros_like(self._transposed[:, 0, 0]).ravel(), tables, shape[1:]
        )

    def _geometry(self) -> tuple[tuple[int, int], ...]:
        return self.kernel_size, self.stride, self.padding, self.dilation  # type: ignore[return-value]

    def _sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(sizes, *self._geometry(), strict=True)
        )


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, convolution: SparseConv2d) -> Tensor:
        ctx.convolution, ctx.shape = convolution, x.shape
        return convolution.convolved(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.convolution.pulled_back(gradient, ctx.shape), None


def _scattered(
    x: Tensor, weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32], tables: Any, shape: Any
) -> Tensor:
    from kwta_exp.compiled import on_threads
    from kwta_exp.models.sparse_numba import convolve_parts

    out = torch.empty((len(x), *shape), dtype=x.dtype, memory_format=torch.channels_last)
    values = _bits(x.detach().contiguous(memory_format=torch.channels_last))
    work: Callable[..., int] = convolve_parts
    on_threads(
        work, (len(x), values[0].size), torch.get_num_threads(),
        values, weight, bias, *tables, shape[2], _bits(out),
    )  # fmt: skip
    return out


def _bits(x: Tensor) -> npt.NDArray[Any]:
    """The bits of ``x (N, C, H, W)``, channels last, as ``(N, H * W, C)``; shares memory."""
    n, c, h, w = x.shape
    bits: npt.NDArray[Any] = x.as_strided((n, h * w, c), (h * w * c, c, 1)).view(_BITS[x.dtype]).numpy()
    return bits


def _looks_sparse(x: Tensor) -> bool:
    """Check a few images: with a relaxed gate (BPDA) the gradient of an activation is dense."""
    some = x[:: max(1, len(x) // _LOOKED_AT)]
    return int(some.count_nonzero()) <= 1.5 * SPARSE * some.numel()


def _worth_it(given: int, summed: int) -> bool:
    """Whether the sums are long enough and few enough lanes stay idle."""
    return given >= _LANES and -(-summed // _LANES) * _LANES <= 1.34 * summed


def _room(k: int, c: int, window: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return np.empty((-(-k // _LANES), window[0] * window[1], c, _LANES), np.float32)


def _pack(weight: Tensor, packed: npt.NDArray[np.float32]) -> None:
    """Copy ``(K, C, R, S)`` into ``(ceil(K / 64), R * S, C, 64)``."""
    if missing := -len(weight) % _LANES:
        weight = torch.cat([weight, weight.new_zeros(missing, *weight.shape[1:])])
    parts = weight.unflatten(0, (-1, _LANES)).flatten(3)
    torch.from_numpy(packed).copy_(parts.permute(0, 3, 2, 1))


@lru_cache(maxsize=256)
def _reached(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> _Table:
    """``(kernel, size)``: the output position to which each input position contributes by each tap, or -1."""
    shifted = np.arange(size) + padding - dilation * np.arange(kernel)[:, None]
    place = shifted // stride
    return np.where((shifted % stride == 0) & (place >= 0) & (place < out), place, -1)


@lru_cache(maxsize=256)
def _reached_back(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> _Table:
    """The same for gradients: input positions for output positions."""
    place = stride * np.arange(size) - padding + dilation * np.arange(kernel)[:, None]
    return np.where((place >= 0) & (place < out), place, -1)


def _calls(modules: dict[str, nn.Module], node: Any, *kinds: type[nn.Module]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_module" and type(modules[str(node.target)]) in kinds


def _is_sparse(modules: dict[str, nn.Module], node: Any) -> bool:
    """Whether the output of ``node`` is sparse."""
    if _calls(modules, node, *_TRANSPARENT):
        return _is_sparse(modules, node.args[0])
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return False
    density = getattr(modules[str(node.target)], "density", None)
    return density is not None and float(density) <= SPARSE


def _leads_to_sparse(modules: dict[str, nn.Module], node: fx.Node) -> bool:
    """Whether ``node`` passes back a sparse gradient."""
    if node.op == "call_function" and node.target in _ADDITIONS and node.users:
        return all(_is_sparse(modules, user) for user in node.users)
    return _is_sparse(modules, node)
