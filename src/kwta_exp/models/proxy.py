"""A faster proxy for a frozen network, for attacks to search with. Nothing is judged by it."""

import copy
import logging
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from kwta_exp import hardware
from kwta_exp.models import sparse
from kwta_exp.randomness import isolated

log = logging.getLogger(__name__)


class Proxy(nn.Module):
    """The same function, up to rounding, of the same images in [0, 1].

    BatchNorm is folded into the convolution before it, where the network can be traced and the result
    is the same in float64; convolutions run in channels-last order and, on hardware that has it, in bfloat16.
    On a CPU, convolutions of sparse activations skip the zeros (:mod:`kwta_exp.models.sparse`).
    Logits are float32.

    Weights are copies. Modules without parameters or buffers are the network's own, so that an activation
    whose ratio changes, or that is hooked, is so in both.

    Args:
        network: in eval mode.
        sample: a few images, on the network's device.
    """

    def __init__(self, network: nn.Module, sample: Tensor) -> None:
        super().__init__()
        traced, self._folded = with_folded_batch_norms(network, sample) or (None, {})
        self.network = traced or copy.deepcopy(network)
        self._in_bfloat16 = hardware.computes_in_bfloat16(sample.device)
        self._layout = torch.channels_last
        self.network.to(memory_format=self._layout)
        try:
            if traced and sparse.pays(sample.device):
                log.debug("%d convolutions skip zeros in the search", sparse.make_sparse(traced))
            self.eval()
            self._try(sample)
        except RuntimeError as error:  # a view, say, of what lies in another order than expected
            log.info("the search keeps the plain memory format (%s)", error)
            self._layout = torch.contiguous_format
            self.network = copy.deepcopy(network).to(memory_format=self._layout)
            self._folded = {}
            self.eval()
            self._try(sample)
        for name, module in network.named_modules(remove_duplicate=False):
            if _is_bare(module) and name and _has(self.network, name):
                self.network.set_submodule(name, module)
        self._densities = list(_densities(network))
        self.requires_grad_(False)

    def _try(self, sample: Tensor) -> None:
        with torch.enable_grad():
            x = sample.detach().requires_grad_()
            torch.autograd.grad(self(x).sum(), x, allow_unused=True)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._in_bfloat16):
            logits: Tensor = self.network(x.contiguous(memory_format=self._layout))
        return logits.float()

    def suits(self, network: nn.Module) -> bool:
        """Whether it is still built as one for ``network``, of which it was made, would be."""
        return self._densities == list(_densities(network))

    @torch.no_grad()
    def follow(self, network: nn.Module) -> None:
        """Take over the present weights of ``network``, of which it was made."""
        theirs = dict(network.named_parameters()) | dict(network.named_buffers())
        for name, norm_name in self._folded.items():
            convolution: Any = network.get_submodule(name)
            norm: Any = network.get_submodule(norm_name)
            weight, bias = fuse_conv_bn_weights(
                convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps,
                norm.weight, norm.bias,
            )  # fmt: skip
            theirs |= {f"{name}.weight": weight, f"{name}.bias": bias}
        for name, tensor in [*self.network.named_parameters(), *self.network.named_buffers()]:
            if name in theirs:  # else a constant of the tracer's
                tensor.copy_(theirs[name])
        for module in self.network.modules():
            if isinstance(module, sparse.SparseConv2d):
                module.pack()


def proxy_for(network: nn.Module, sample: Tensor) -> nn.Module:
    """A proxy for ``network``, or the network itself where none can be had, which is logged.

    Arguments as for :class:`Proxy`.
    """
    try:
        with isolated(0), torch.autocast(sample.device.type, enabled=False):
            return Proxy(network, sample)
    except Exception as error:  # it cannot be copied, or insists on a type: whatever a network may do
        log.warning("the search is exact: no proxy for the network can be had (%s)", error)
        return network


_kept: WeakKeyDictionary[nn.Module, Proxy | None] = WeakKeyDictionary()
"""None: there is none."""


def following(network: nn.Module, sample: Tensor) -> nn.Module:
    """A proxy for ``network`` as it is now; made at the first call, brought up to date at others.

    Arguments as for :class:`Proxy`; ``network`` itself where none can be had.
    """
    known = _kept.get(network)
    if network not in _kept or (known is not None and not known.suits(network)):
        made = proxy_for(network, sample)
        known = _kept[network] = made if isinstance(made, Proxy) else None
    if known is None:
        return network
    with torch.autocast(sample.device.type, enabled=False):
        known.follow(network)  # a new one, too: whether it is new decides no bit
    return known


@torch.no_grad()
def with_folded_batch_norms(network: nn.Module, sample: Tensor) -> tuple[fx.GraphModule, dict[str, str]] | None:
    """A copy of ``network`` without the BatchNorms that follow a convolution directly; None if that fails.

    The arithmetic is PyTorch's own; it is done in float64 and held against the network on ``sample``.

    Returns:
        The copy, and the BatchNorm that was folded into each convolution, by their names.
    """
    folded: dict[str, str] = {}
    try:
        double = copy.deepcopy(network).double().eval()
        traced = fx.GraphModule(double, _Tracer().trace(double))
        modules = dict(traced.named_modules())
        for norm in [node for node in traced.graph.nodes if _is(modules, node, nn.BatchNorm2d)]:
            convolution = norm.args[0]
            if _is(modules, convolution, nn.Conv2d) and len(convolution.users) == 1:
                fused = fuse_conv_bn_eval(modules[convolution.target], modules[norm.target])
                traced.set_submodule(convolution.target, fused)
                norm.replace_all_uses_with(convolution)
                traced.graph.erase_node(norm)
                folded[convolution.target] = norm.target
        traced.recompile()
        traced.delete_all_unused_submodules()
        expected, found = double(sample.double()), traced(sample.double())
    except Exception as error:  # tracing fails in any way whatever
        log.info("BatchNorm is not folded for the search: the network cannot be traced (%s)", error)
        return None
    if not torch.allclose(found, expected, rtol=1e-6, atol=1e-8):
        log.info("BatchNorm is not folded for the search: the traced network differs")
        return None
    log.debug("%d BatchNorms folded for the search", len(folded))
    return traced.float(), folded


class _Tracer(fx.Tracer):
    """Does not look into modules with nothing to fold: an activation stays one, for attacks to find."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        has_any = any(isinstance(inner, nn.Conv2d | nn.BatchNorm2d) for inner in module.modules())
        return super().is_leaf_module(module, qualified_name) or not has_any


def _is(modules: dict[str, nn.Module], node: object, kind: type[nn.Module]) -> bool:
    """Does ``node`` call a module of this very class, once in the network?"""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return False
    calls = [other for other in node.graph.nodes if other.op == "call_module" and other.target == node.target]
    return type(modules[str(node.target)]) is kind and len(calls) == 1


def _is_bare(module: nn.Module) -> bool:
    """Has ``module`` no parameters or buffers, nor any module in it?"""
    return not any(True for some in (module.parameters(), module.buffers()) for _ in some)


def _has(module: nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True


def _densities(network: nn.Module) -> Iterator[float | None]:
    return (getattr(module, "density", None) for module in network.modules())
