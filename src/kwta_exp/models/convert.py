"""Replace the activations of a network that was written without a choice of activation.

Activation modules (``nn.ReLU``) are replaced where their parent holds them. Calls inside a ``forward``
(``F.relu(x)``) are found with ``torch.fx``: each module's own ``forward`` is traced, with its children as
leaves, and the edited trace replaces it only if it calls such a function.
"""

import copy
import functools
import inspect
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from pydantic import validate_call
from torch import fx, nn

from kwta_exp.fields import STRICT
from kwta_exp.models.factory import ActivationFactory
from kwta_exp.randomness import isolated

Kind = Literal["relu", "relu6", "gelu", "silu", "hardswish"]

_REPORTED = {
    "leakyrelu", "prelu", "rrelu", "elu", "selu", "celu", "mish", "softplus", "tanh", "sigmoid", "hardtanh",
    "hardsigmoid", "logsigmoid", "softsign", "threshold", "glu", *get_args(Kind),
}  # fmt: skip
_CLOSED = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, torch.jit.ScriptModule


@dataclass
class Conversion:
    """What :func:`convert` did.

    Attributes:
        replaced: each activation that was replaced: ``<path>: <what it was>``.
        unreached: modules whose own code may still call activations, each with the reason.
        left: activations of other kinds that were left as they are: name to number.
        doubtful: activations that changed the caller's tensor in place. The new ones do not, so a caller that
            goes on to use that tensor finds it unchanged.
    """

    replaced: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)
    doubtful: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{len(self.replaced)} activations replaced"
        if self.left:
            text += "; left as they are: " + ", ".join(f"{n} {name}" for name, n in sorted(self.left.items()))
        if self.doubtful:
            text += "; no longer change the caller's tensor in place: " + ", ".join(self.doubtful)
        if self.unreached:
            text += "; not reached: " + ", ".join(self.unreached)
        return text


@validate_call(config=STRICT)
def convert(model: nn.Module, activation: ActivationFactory, kinds: list[Kind] | None = None) -> Conversion:
    """Replace the activations of ``model``, in place.

    Parameters and buffers keep their names, so checkpoints of the unconverted network still load. A module
    that a ``forward`` calls several times (torchvision's ResNet blocks share one ReLU) becomes one module.
    The new activations change nothing in place; code of the same ``forward`` that goes on to use the changed
    tensor gets the output of the activation.

    Args:
        model: any network. Each ``forward`` is traced in training and in evaluation mode.
        activation: makes each new activation.
        kinds: which to replace: of ``"relu"``, ``"gelu"``, ``"silu"`` (the three that ``None`` means),
            ``"relu6"`` and ``"hardswish"``.
    """
    conversion = Conversion()
    wanted = frozenset(kinds or ("relu", "gelu", "silu"))
    modules = [(f"{path}." if path else "", module) for path, module in model.named_modules()]
    children = [dict(module._modules) for _, module in modules]
    for prefix, module in modules:
        graphs: dict[bool, fx.Graph] = {}
        try:
            graphs = _traced(module)
        except Exception as error:  # user code that is called with a tracer's proxies may raise anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
            name = prefix.rstrip(".") or "the model"
            conversion.unreached.append(f"{name} ({type(module).__name__} cannot be traced: {reason})")
        if _replace_calls(prefix, module, graphs, activation, wanted, conversion):
            _install(module, graphs)

    for (prefix, module), held in zip(modules, children, strict=True):  # the traces needed the old children
        for position, (name, child) in enumerate(held.items()):
            if isinstance(module, _CLOSED):
                continue
            if _kind(child) in wanted:
                setattr(module, name, activation())
                conversion.replaced.append(f"{prefix}{name}: {type(child).__name__}")
                is_first = position == 0 and type(module).forward is nn.Sequential.forward
                if is_first and getattr(child, "inplace", False):
                    conversion.doubtful.append(prefix + name)
            elif _kind(child) in _REPORTED:
                conversion.left[type(child).__name__] += 1
    return conversion


class _OwnCode(fx.Tracer):
    """Traces the forward of one module, with its children as leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _traced(module: nn.Module) -> dict[bool, fx.Graph]:
    """The forward of ``module`` in training mode (True) and in evaluation mode (False); empty for PyTorch's.

    Raises:
        ValueError: for code that a trace would change: a trace records the random numbers and the tensors made
            in one call, and no ``with`` statement.
        Exception: whatever the code raises.
    """
    if isinstance(module, _CLOSED):
        raise ValueError("its code is PyTorch's own or compiled")
    if "forward" in vars(module):
        raise ValueError("its forward was replaced already")
    forward: Any = type(module).forward
    if forward.__module__.startswith("torch.nn.modules."):
        return {}
    try:
        source = inspect.getsource(forward)
    except OSError:
        source = ""
    if re.search(r"^\s*with\b|set_grad_enabled", source, flags=re.MULTILINE):
        raise ValueError("its forward changes a mode of torch")
    graphs: dict[bool, fx.Graph] = {}
    with isolated(0):
        before = torch.get_rng_state(), random.getstate()
        for training in (True, False):
            scratch = copy.copy(module)  # attributes that the forward assigns stay on the copy
            scratch.training = training
            graphs[training] = _OwnCode().trace(scratch)
        if not torch.equal(before[0], torch.get_rng_state()) or before[1] != random.getstate():
            raise ValueError("its forward draws random numbers")
    if any(str(node.target).startswith("_tensor_constant") for g in graphs.values() for node in g.nodes):
        raise ValueError("its forward makes tensors of its own")
    return graphs


def _replace_calls(
    prefix: str,
    module: nn.Module,
    graphs: dict[bool, fx.Graph],
    activation: ActivationFactory,
    wanted: frozenset[str],
    conversion: Conversion,
) -> bool:
    """Edit the traced code of ``module`` to call new modules in place of activation functions.

    Returns:
        Whether there was anything to edit.
    """
    edited = False
    for training, graph in graphs.items():
        seen: Counter[str] = Counter()
        order = {node: position for position, node in enumerate(graph.nodes)}
        for node in list(graph.nodes):
            is_module = node.op == "call_module"
            called: Any = module.get_submodule(str(node.target)) if is_module else node.target
            kind = _kind(called) if node.op in ("call_module", "call_function", "call_method") else ""
            if kind not in wanted:
                if training and not is_module and kind in _REPORTED:
                    conversion.left[f"{kind}()"] += 1
                continue
            given: Any = node.args[0] if node.args else node.kwargs["input"]
            new, name = node, str(node.target)
            if not is_module:
                name = f"functional_{kind}_{seen[kind]}"
                seen[kind] += 1
                if name not in module._modules:  # training and evaluation share it
                    module.add_module(name, activation())
                    conversion.replaced.append(f"{prefix}{name}: {kind}()")
                with graph.inserting_after(node):
                    new = graph.call_module(name, (given,))
                order[new] = order[node]
                node.replace_all_uses_with(new)
                graph.erase_node(node)
                edited = True
            if _in_place(called, node):
                later = {user for user in given.users if order[user] > order[new]}
                given.replace_all_uses_with(new, delete_user_cb=later.__contains__)
                edited |= bool(later)
                if given.op == "placeholder" and training:
                    conversion.doubtful.append(prefix + name)
    return edited


def _kind(called: Any) -> str:
    """``"relu"`` for nn.ReLU, F.relu, torch.relu_ and the method relu, and so on; "" for other modules."""
    if isinstance(called, nn.Module):
        own = type(called).__module__ == "torch.nn.modules.activation"
        return type(called).__name__.lower() if own else ""
    return str(getattr(called, "__name__", called)).replace("_", "")


def _in_place(called: Any, node: fx.Node) -> bool:
    """Whether this call of an activation changes its input."""
    if isinstance(called, nn.Module):
        return bool(getattr(called, "inplace", False))
    ends = str(getattr(called, "__name__", called)).endswith("_")
    return ends or node.args[1:2] == (True,) or node.kwargs.get("inplace") is True


def _install(module: nn.Module, graphs: dict[bool, fx.Graph]) -> None:
    """Run the graphs as the forward of ``module``, which keeps its class, names and attributes."""
    functions: dict[bool, Callable[..., Any]] = {}
    for training, graph in graphs.items():
        graph.lint()
        functions[training] = fx.GraphModule(module, graph).forward.__func__  # type: ignore[attr-defined]
    module.forward = functools.partial(_forward, functions, module)


def _forward(functions: dict[bool, Callable[..., Any]], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return functions[module.training](module, *args, **kwargs)
