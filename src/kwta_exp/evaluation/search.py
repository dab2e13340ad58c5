"""A faster stand-in for a frozen network, for attacks to search with. Nothing is judged by it."""

import copy
import logging

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kwta_exp.models import sparse

log = logging.getLogger(__name__)


class FastSearch(nn.Module):
    """The same function, up to rounding, of the same images in [0, 1].

    BatchNorm is folded into the convolution before it, where the network can be traced and the result
    is the same in float64; convolutions run in channels-last order and, on hardware that has it, in bfloat16.
    On a CPU, convolutions of sparse activations skip the zeros (:mod:`kwta_exp.models.sparse`).
    Logits are float32. Its activations are modules of the same classes as the network's.

    Args:
        network: in eval mode; it is copied.
        sample: a few images, on the network's device.
    """

    def __init__(self, network: nn.Module, sample: Tensor) -> None:
        super().__init__()
        folded = folded_batch_norms(network, sample)
        self.network = (folded or copy.deepcopy(network)).to(memory_format=torch.channels_last)
        if folded and sparse.pays(sample.device):
            log.debug("%d convolutions skip zeros in the search", sparse.make_sparse(folded))
        self._in_bfloat16 = computes_in_bfloat16(sample.device)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._in_bfloat16):
            logits: Tensor = self.network(x.contiguous(memory_format=torch.channels_last))
        return logits.float()


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32, instead of imitating it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


@torch.no_grad()
def folded_batch_norms(network: nn.Module, sample: Tensor) -> fx.GraphModule | None:
    """A copy of ``network`` without the BatchNorms that follow a convolution directly; None if that fails.

    The arithmetic is PyTorch's own; it is done in float64 and held against the network on ``sample``.
    """
    double = copy.deepcopy(network).double().eval()
    try:
        traced = fx.GraphModule(double, _Tracer().trace(double))
        modules = dict(traced.named_modules())
        folded = 0
        for norm in [node for node in traced.graph.nodes if _is(modules, node, nn.BatchNorm2d)]:
            convolution = norm.args[0]
            if _is(modules, convolution, nn.Conv2d) and len(convolution.users) == 1:
                fused = fuse_conv_bn_eval(modules[convolution.target], modules[norm.target])
                traced.set_submodule(convolution.target, fused)
                norm.replace_all_uses_with(convolution)
                traced.graph.erase_node(norm)
                folded += 1
        traced.recompile()
        traced.delete_all_unused_submodules()
        expected, found = double(sample.double()), traced(sample.double())
    except Exception as error:  # tracing fails in any way whatever
        log.info("BatchNorm is not folded for the search: the network cannot be traced (%s)", error)
        return None
    if not torch.allclose(found, expected, rtol=1e-6, atol=1e-8):
        log.info("BatchNorm is not folded for the search: the traced network differs")
        return None
    log.debug("%d BatchNorms folded for the search", folded)
    return traced.float()


class _Tracer(fx.Tracer):
    """Does not look into modules without modules of their own: an activation stays one."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return super().is_leaf_module(module, qualified_name) or next(module.children(), None) is None


def _is(modules: dict[str, nn.Module], node: object, kind: type[nn.Module]) -> bool:
    """Does ``node`` call a module of this very class, once in the network?"""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return False
    calls = [other for other in node.graph.nodes if other.op == "call_module" and other.target == node.target]
    return type(modules[str(node.target)]) is kind and len(calls) == 1
