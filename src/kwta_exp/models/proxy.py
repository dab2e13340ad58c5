"""A faster copy of a frozen network for attacks to search on; the network itself judges the results."""

import copy
import logging
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from kwta_exp import hardware
from kwta_exp.errors import UserError
from kwta_exp.failures import first_line, is_of_the_machine, is_out_of_memory
from kwta_exp.models import sparse
from kwta_exp.randomness import isolated

log = logging.getLogger(__name__)


class Proxy(nn.Module):
    """Computes the logits of ``network``, up to rounding, faster.

    BatchNorm is folded into the convolution before it, if the network can be traced and the folded copy agrees
    with it in float64. Convolutions use channels-last order and, where the hardware supports it, bfloat16.
    On a CPU without matrix units, convolutions of sparse activations skip zeros
    (:mod:`kwta_exp.models.sparse`). Logits are float32.

    Where convolutions use bfloat16, they and linear layers keep their weights in both precisions: autocast
    would cast frozen weights again at every call.

    Parameters and buffers are copies. Modules without any, such as activations, are shared with the network,
    so changes of their ratio and hooks on them affect both.

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
        except RuntimeError as error:  # such as a view() that needs the other memory format
            if is_of_the_machine(error):
                raise
            log.info("the search uses the contiguous memory format (%s)", error)
            self._layout = torch.contiguous_format
            self.network = copy.deepcopy(network).to(memory_format=self._layout)
            self._folded = {}
            self.eval()
            self._try(sample)
        self._copies = keep_bfloat16_copies(self.network) if self._in_bfloat16 else []
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
        """Whether the densities of the network are still those that the proxy was built for."""
        return self._densities == list(_densities(network))

    @torch.no_grad()
    def follow(self, network: nn.Module) -> None:
        """Copy the current weights of ``network``, the network it was made from."""
        theirs = dict(network.named_parameters()) | dict(network.named_buffers())
        for name, norm_name in self._folded.items():
            convolution: Any = network.get_submodule(name)
            norm: Any = network.get_submodule(norm_name)
            weight, bias = fuse_conv_bn_weights(
                convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps,
                norm.weight, norm.bias,
            )  # fmt: skip
            theirs |= {f"{name}.weight": weight, f"{name}.bias": bias}
        ours = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        followed = [name for name in ours if name in theirs]  # the others are constants that the tracer added
        targets, sources = [ours[name] for name in followed], [theirs[name] for name in followed]
        if targets:
            torch._foreach_copy_(targets, sources)
        if self._copies:
            torch._foreach_copy_([copy for _, copy in self._copies], [tensor for tensor, _ in self._copies])
        for module in self.network.modules():
            if isinstance(module, sparse.SparseConv2d):
                module.pack()


class _Conv2d(nn.Conv2d):
    """Keeps a bfloat16 copy of its weights, for autocast."""

    copies: tuple[Tensor, Tensor | None]

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        out: Tensor = self._conv_forward(x, *self.copies)
        return out


class _Linear(nn.Linear):
    """Keeps a bfloat16 copy of its weights, for autocast."""

    copies: tuple[Tensor, Tensor | None]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.copies) if torch.is_autocast_enabled(x.device.type) else super().forward(x)


@torch.no_grad()
def keep_bfloat16_copies(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Make plain convolutions and linear layers, in place, compute with bfloat16 copies under autocast.

    The copies are what autocast would cast, so the results are the same to the last bit. Layers of other
    classes, and those whose weights a hook or a parametrization computes, are left to autocast.

    Returns:
        Each weight or bias, and its copy.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    layers: list[Any] = [module for module in network.modules() if type(module) in (nn.Conv2d, nn.Linear)]
    for layer in layers:
        if not isinstance(layer.weight, nn.Parameter):
            continue
        layer.copies = tuple(None if each is None else each.bfloat16() for each in (layer.weight, layer.bias))
        layer.__class__ = _Conv2d if type(layer) is nn.Conv2d else _Linear
        both = zip((layer.weight, layer.bias), layer.copies, strict=True)
        pairs += [(tensor, copy) for tensor, copy in both if copy is not None]
    return pairs


def proxy_for(network: nn.Module, sample: Tensor) -> nn.Module:
    """A proxy for ``network``, or the network itself, with a warning, if none can be made.

    Arguments as for :class:`Proxy`.

    Raises:
        UserError: if the memory is too small for a proxy; a search must not depend on what else is in memory.
    """
    try:
        with isolated(0), torch.autocast(sample.device.type, enabled=False):
            return Proxy(network, sample)
    except Exception as error:  # a network that cannot be copied or checks types can raise anything
        if is_out_of_memory(error):
            raise UserError(
                f"search=fast: not enough memory for a proxy of the network ({first_line(error)}); expected"
                " more memory, or search=exact"
            ) from error
        if is_of_the_machine(error):
            raise
        log.warning("search=fast has no effect: no proxy can be made for the network (%s)", error)
        return network


_kept: WeakKeyDictionary[nn.Module, Proxy | None] = WeakKeyDictionary()
"""None for a network that has no proxy."""


def updated_proxy(network: nn.Module, sample: Tensor) -> nn.Module:
    """A proxy with the current weights of ``network``, made at the first call and updated at later ones.

    Arguments as for :class:`Proxy`. Returns ``network`` itself if no proxy can be made.
    """
    known = _kept.get(network)
    if network not in _kept or (known is not None and not known.suits(network)):
        made = proxy_for(network, sample)
        known = _kept[network] = made if isinstance(made, Proxy) else None
    if known is None:
        return network
    with torch.autocast(sample.device.type, enabled=False):
        known.follow(network)  # a new one too, so that new and updated proxies are equal bit for bit
    return known


@torch.no_grad()
def with_folded_batch_norms(network: nn.Module, sample: Tensor) -> tuple[fx.GraphModule, dict[str, str]] | None:
    """Fold each BatchNorm that directly follows a convolution into it, in a copy of ``network``.

    The folding is PyTorch's, done in float64 and compared with the network on ``sample``.

    Returns:
        The copy, and a mapping from each convolution's name to that of its BatchNorm; ``None`` if the
        network cannot be traced or the copy differs.
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
    except Exception as error:  # tracing can raise anything
        if is_of_the_machine(error):
            raise
        log.info("BatchNorm is not folded for the search: the network cannot be traced (%s)", error)
        return None
    if not torch.allclose(found, expected, rtol=1e-6, atol=1e-8):
        log.info("BatchNorm is not folded for the search: the traced network differs")
        return None
    log.debug("%d BatchNorms folded for the search", len(folded))
    return traced.float(), folded


class _Tracer(fx.Tracer):
    """Treats modules without anything to fold as leaves, so attacks still find activation modules."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        has_any = any(isinstance(inner, nn.Conv2d | nn.BatchNorm2d) for inner in module.modules())
        return super().is_leaf_module(module, qualified_name) or not has_any


def _is(modules: dict[str, nn.Module], node: object, kind: type[nn.Module]) -> bool:
    """Whether ``node`` is the only call of a module of exactly this class."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return False
    calls = [other for other in node.graph.nodes if other.op == "call_module" and other.target == node.target]
    return type(modules[str(node.target)]) is kind and len(calls) == 1


def _is_bare(module: nn.Module) -> bool:
    """Whether ``module`` has no parameters and no buffers."""
    return not any(True for some in (module.parameters(), module.buffers()) for _ in some)


def _has(module: nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True


def _densities(network: nn.Module) -> Iterator[float | None]:
    return (getattr(module, "density", None) for module in network.modules())
