"""Putting another activation into a network that was written without one in mind.

Activations hide in two places: modules (``nn.ReLU``), and calls inside a ``forward`` (``F.relu(x)``).
The second can only be found by following the code, which ``torch.fx`` does: each module's own
``forward`` is traced with its children taken as they are, and where an activation is called the traced
code, calling a new module instead, takes the place of the old.
"""

import functools
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import validate_call
from torch import fx, nn

from kwta_exp.errors import UserError
from kwta_exp.fields import STRICT, Count
from kwta_exp.models.factory import ActivationFactory, with_facts

log = logging.getLogger(__name__)

Kind = Literal["relu", "relu6", "gelu", "silu", "hardswish"]

_MODULES: dict[type[nn.Module], Kind] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}
_FUNCTIONS: dict[Callable[..., Any], Kind] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.gelu: "gelu",
    F.silu: "silu",
    F.hardswish: "hardswish",
}
_METHODS: dict[str, Kind] = {"relu": "relu", "relu_": "relu"}

_OPAQUE: dict[type[nn.Module], Callable[[Any], bool]] = {
    nn.TransformerEncoderLayer: lambda layer: True,
    nn.TransformerDecoderLayer: lambda layer: True,
    nn.RNN: lambda layer: layer.nonlinearity == "relu",
}
"""Modules of torch itself that call an activation where no one can put another."""


@dataclass
class Conversion:
    """What :func:`convert` did.

    Attributes:
        replaced: where an activation was put in place of another: ``<path>: <what was there>``, one for
            each place in the code that calls one.
        unreached: modules whose activations, if any, stay: their code cannot be traced, or they are
            torch's own and closed. Each with the reason.
        left: activations of other kinds that were seen and left, by name, with their number.
    """

    replaced: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        text = f"{len(self.replaced)} activations replaced"
        if self.left:
            text += "; left as they are: " + ", ".join(f"{n} {name}" for name, n in sorted(self.left.items()))
        if self.unreached:
            text += "; not reached: " + ", ".join(self.unreached)
        return text


@validate_call(config=STRICT)
def convert(model: nn.Module, activation: ActivationFactory, kinds: list[Kind] | None = None) -> Conversion:
    """Replace activations of ``model``, in place, wherever they are called.

    Parameters and buffers keep their names, so checkpoints of the unconverted network still load. A
    module that is called in several places (torchvision's ResNet blocks have one ReLU for all) is
    replaced by an activation of its own in each. Code that changes its input in place
    (``inplace=True``) and goes on using it keeps doing what it did.

    Args:
        model: any network. A ``forward`` that asks ``self.training`` is traced in both modes.
        activation: makes each new activation.
        kinds: which to replace: of ``"relu"``, ``"gelu"``, ``"silu"`` (these three for ``None``),
            ``"relu6"`` and ``"hardswish"``.

    Returns:
        What was replaced, what was seen and left, and what could not be looked into.
    """
    wanted = frozenset(kinds or ("relu", "gelu", "silu"))
    conversion = Conversion()
    for path, module in list(model.named_modules()):
        if any(isinstance(module, kind) and holds(module) for kind, holds in _OPAQUE.items()):
            conversion.unreached.append(
                f"{path or 'the model'} ({type(module).__name__} of torch, which is closed)"
            )
        elif isinstance(module, torch.jit.ScriptModule):
            conversion.unreached.append(f"{path or 'the model'} (compiled by TorchScript)")
        elif type(module).forward in _CONTAINERS:
            _convert_children(path, module, activation, wanted, conversion)
        elif not type(module).__module__.startswith("torch.nn."):
            _convert_code(path, module, activation, wanted, conversion)
    if type(model) in _MODULES:
        conversion.unreached.append("the model (is itself one activation)")
    return conversion


_CONTAINERS = (
    nn.Sequential.forward, nn.ModuleList.forward, nn.ModuleDict.forward,
)  # fmt: skip
"""Forwards that call each child once, or none."""


def _convert_children(
    path: str, module: nn.Module, activation: ActivationFactory, wanted: frozenset[str], conversion: Conversion
) -> None:
    """Swap the activations of a container."""
    if type(module).forward is not nn.Sequential.forward:
        return  # whoever owns the list calls its members, and is traced
    for name, child in list(module.named_children()):
        if (kind := _MODULES.get(type(child))) in wanted:
            setattr(module, name, activation())
            conversion.replaced.append(f"{_join(path, name)}: {type(child).__name__}")
        elif kind:
            conversion.left[type(child).__name__] += 1


class _OwnCode(fx.Tracer):
    """Traces one module's forward; its children are called, not entered."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _convert_code(
    path: str, module: nn.Module, activation: ActivationFactory, wanted: frozenset[str], conversion: Conversion
) -> None:
    """Trace a module's forward in both modes and, where it calls activations, put the traced code there."""
    mode = module.training
    graphs: dict[bool, fx.Graph] = {}
    try:
        for training in (True, False):
            module.training = training
            graphs[training] = _OwnCode().trace(module)
    except Exception as error:  # user code traced with stand-ins fails in any way whatever
        reason = (str(error) or type(error).__name__).splitlines()[0]
        conversion.unreached.append(
            f"{path or 'the model'} ({type(module).__name__} cannot be traced: {reason})"
        )
        return
    finally:
        module.training = mode

    if str(graphs[True].python_code("self").src) == str(graphs[False].python_code("self").src):
        graphs = {True: graphs[True]}

    new_names: dict[int, str] = {}
    sites: dict[bool, list[tuple[fx.Node, str]]] = {}
    for training, graph in graphs.items():
        sites[training] = []
        for node in graph.nodes:
            kind, label = _activation_of(module, node)
            if kind in wanted:
                sites[training].append((node, label))
            elif kind:
                conversion.left[label] += training
    most = max(sites, key=lambda training: len(sites[training]))
    for number, (node, label) in enumerate(sites[most]):
        where = f"{node.target}" if node.op == "call_module" else f"activation_{number}"
        new_names[number] = f"{str(where).replace('.', '_')}_{number}" if node.op == "call_module" else where
        module.add_module(new_names[number], activation())
        conversion.replaced.append(f"{_join(path, str(where))}: {label}")
    if not sites[most]:
        return

    replaced = {str(node.target) for found in sites.values() for node, _ in found if node.op == "call_module"}
    for training, graph in graphs.items():
        for number, (node, _) in enumerate(sites[training]):
            _put(graph, node, new_names[number], _changes_input(module, node))
        graph.lint()
    still_used = {
        str(node.target) for graph in graphs.values() for node in graph.nodes if node.op == "call_module"
    }
    for name in replaced - still_used:
        parent, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(parent), leaf)
    _install(module, graphs)


def _activation_of(module: nn.Module, node: fx.Node) -> tuple[Kind | None, str]:
    """Which kind of activation a node calls, if any, and how it is called there."""
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        return _MODULES.get(type(child)), type(child).__name__
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target), f"{getattr(node.target, '__name__', node.target)}()"  # type: ignore[arg-type]
    if node.op == "call_method":
        return _METHODS.get(str(node.target)), f".{node.target}()"
    return None, ""


def _changes_input(module: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    if str(getattr(node.target, "__name__", node.target)).endswith("_"):
        return True
    return bool(
        node.kwargs.get(
            "inplace", node.args[1] if node.target in _TAKES_INPLACE and len(node.args) > 1 else False
        )
    )


_TAKES_INPLACE = {F.relu, F.relu6, F.silu, F.hardswish}


def _put(graph: fx.Graph, node: fx.Node, name: str, changes_input: bool) -> None:
    """Call the module ``name`` in place of ``node``."""
    given = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(given, fx.Node)
    with graph.inserting_after(node):
        new = graph.call_module(name, (given,))
    if changes_input:
        order = {each: position for position, each in enumerate(graph.nodes)}
        given.replace_all_uses_with(new, delete_user_cb=lambda user: order[user] > order[new])
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _install(module: nn.Module, graphs: dict[bool, fx.Graph]) -> None:
    """Let ``module`` run the graphs' code as its own forward, keeping its class, names and attributes."""
    forwards = {training: fx.GraphModule(module, graph).forward.__func__ for training, graph in graphs.items()}  # type: ignore[attr-defined]
    module.forward = functools.partial(_Forward(forwards), module)


class _Forward:
    """The forward of the mode that a module is in."""

    def __init__(self, forwards: dict[bool, Callable[..., Any]]) -> None:
        self.forwards = forwards

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.forwards.get(module.training, self.forwards[True])(module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Forward":
        return self


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@validate_call(config=STRICT)
def Converted(  # noqa: N802 - stands where a network's class would
    activation: ActivationFactory,
    network: Callable[..., nn.Module],
    num_classes: Count,
    in_channels: Count,
    image_size: tuple[Count, Count],
    kinds: list[Kind] | None = None,
) -> nn.Module:
    """Any network with its activations replaced; see :func:`convert`.

    Args:
        activation: makes the new activations.
        network: makes the network; called with those of the next three that its signature asks for.
        num_classes: number of logits.
        in_channels: channels of the input.
        image_size: (height, width) of the input.
        kinds: which activations to replace.

    Raises:
        UserError: if there was none to replace.
    """
    facts = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    return _converted(network(**with_facts(network, facts)), activation, kinds)


@validate_call(config=STRICT)
def Torchvision(  # noqa: N802 - stands where a network's class would
    activation: ActivationFactory,
    name: str,
    num_classes: Count,
    in_channels: Count,
    image_size: tuple[Count, Count],
    kinds: list[Kind] | None = None,
) -> nn.Module:
    """A classification network of torchvision, untrained, with its activations replaced.

    Args:
        activation: makes the new activations.
        name: torchvision's, such as ``"resnet50"``, ``"densenet121"`` or ``"vit_b_16"``.
        num_classes: number of logits.
        in_channels: channels of the input; the first convolution is made anew where they are not 3.
        image_size: (height, width) of the input; vision transformers are built for it.
        kinds: which activations to replace; see :func:`convert`.

    Raises:
        UserError: for a name torchvision does not have, or if there was no activation to replace.
    """
    import torchvision.models as zoo

    available = zoo.list_models(zoo)
    if name not in available:
        raise UserError(
            f"model.name={name!r}: torchvision has no such network; expected one of {', '.join(available)}"
        )
    options: dict[str, Any] = {"num_classes": num_classes}
    if name.startswith("vit_"):
        if image_size[0] != image_size[1]:
            raise UserError(f"model.name={name!r}: takes square images; the data's are {image_size}")
        options["image_size"] = image_size[0]
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    network = zoo.get_model(name, weights=None, **options)
    if in_channels != 3:
        _first_convolution_for(network, in_channels)
    return _converted(network, activation, kinds)


def _first_convolution_for(network: nn.Module, in_channels: int) -> None:
    path, old = next((p, m) for p, m in network.named_modules() if isinstance(m, nn.Conv2d))
    parent, _, leaf = path.rpartition(".")
    options = {name: getattr(old, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    new = nn.Conv2d(in_channels, old.out_channels, **options, bias=old.bias is not None)
    setattr(network.get_submodule(parent), leaf, new)


def _converted(network: nn.Module, activation: ActivationFactory, kinds: list[Kind] | None) -> nn.Module:
    conversion = convert(network, activation, kinds)
    if not conversion.replaced:
        raise UserError(f"model: nothing to convert in {type(network).__name__}: {conversion}")
    log.info("%s: %s", type(network).__name__, conversion)
    return network
