"""Putting another activation into a network that was written without one in mind.

Activations hide in two places: modules (``nn.ReLU``), and calls inside a ``forward`` (``F.relu(x)``).
The second can only be found by following the code, which ``torch.fx`` does: each module's own
``forward`` is traced with its children taken as they are, and where an activation is called the traced
code, calling a new module instead, takes the place of the old.
"""

import functools
import inspect
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import validate_call
from torch import fx, nn

from kwta_exp.fields import STRICT
from kwta_exp.models.factory import ActivationFactory

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

_OTHER_MODULES = (
    nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.Mish, nn.Softplus, nn.Tanh, nn.Sigmoid,
    nn.Hardtanh, nn.Hardsigmoid, nn.LogSigmoid, nn.Softsign, nn.Threshold, nn.GLU,
)  # fmt: skip
_OTHER_FUNCTIONS = {
    F.leaky_relu, F.prelu, F.rrelu, F.elu, F.selu, F.celu, F.mish, F.softplus, F.tanh, F.sigmoid, F.hardtanh,
    F.hardsigmoid, F.logsigmoid, F.softsign, F.threshold, F.glu, torch.tanh, torch.sigmoid, torch.selu,
}  # fmt: skip

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
        doubtful: places that changed in place a tensor handed to them from outside, and no longer do.
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
            text += "; worked in place on a tensor from outside, and no longer do: " + ", ".join(self.doubtful)
        if self.unreached:
            text += "; not reached: " + ", ".join(self.unreached)
        return text


@validate_call(config=STRICT)
def convert(model: nn.Module, activation: ActivationFactory, kinds: list[Kind] | None = None) -> Conversion:
    """Replace activations of ``model``, in place, wherever they are called.

    Parameters and buffers keep their names, so checkpoints of the unconverted network still load. A
    module that is called in several places (torchvision's ResNet blocks have one ReLU for all) is
    replaced by an activation of its own in each. The new activations change nothing in place. Within one
    ``forward`` code that goes on using what an in-place activation changed keeps doing what it did; where
    the changed tensor came from outside, whoever else uses it sees it unchanged now, and the place is listed
    as doubtful.

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
    obsolete: list[tuple[nn.Module, str]] = []
    for path, module in list(model.named_modules()):
        if reason := _closed(module):
            conversion.unreached.append(f"{path or 'the model'} ({type(module).__name__} {reason})")
        elif type(module).forward is nn.Sequential.forward:
            _convert_children(path, module, activation, wanted, conversion)
        elif not type(module).__module__.startswith("torch.nn."):
            obsolete += _convert_code(path, module, activation, wanted, conversion)
    if type(model) in _MODULES:
        conversion.unreached.append("the model (is itself one activation)")
    if not conversion.unreached:  # else code that could not be read may still use them
        for owner, name in obsolete:
            delattr(owner, name)
    return conversion


def _closed(module: nn.Module) -> str | None:
    """Why a module's code cannot be looked into, if it cannot."""
    if any(isinstance(module, kind) and holds(module) for kind, holds in _OPAQUE.items()):
        return "of torch, which is closed"
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript"
    if "forward" in vars(module):
        return "whose forward was replaced already"
    if type(module).__module__.startswith("torch."):
        return None
    try:
        source = inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return None
    if re.search(r"^\s*with\b|set_grad_enabled", source, flags=re.MULTILINE):
        return "whose forward changes a mode of torch, which a trace would lose"
    return None


def _convert_children(
    path: str, module: nn.Module, activation: ActivationFactory, wanted: frozenset[str], conversion: Conversion
) -> None:
    """Swap the activations of a container; one that stands there twice is two."""
    for position, (name, child) in enumerate(list(module._modules.items())):
        kind = _MODULES.get(type(child)) if child is not None else None
        if kind is not None and kind in wanted:
            setattr(module, name, activation())
            conversion.replaced.append(f"{_join(path, name)}: {type(child).__name__}")
            if position == 0 and getattr(child, "inplace", False):
                conversion.doubtful.append(_join(path, name))
        elif kind or isinstance(child, _OTHER_MODULES):
            conversion.left[type(child).__name__] += 1


class _OwnCode(fx.Tracer):
    """Traces one module's forward; its children are called, not entered."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _convert_code(
    path: str, module: nn.Module, activation: ActivationFactory, wanted: frozenset[str], conversion: Conversion
) -> list[tuple[nn.Module, str]]:
    """Trace a module's forward in both modes and, where it calls activations, put the traced code there.

    Returns:
        Its own children that nothing calls any longer.
    """
    graphs = _traced(path, module, conversion)
    # A place is known by what it calls and the how-manieth such call it is, in training and in evaluation.
    sites: dict[bool, dict[tuple[str, int], tuple[fx.Node, str]]] = {}
    for training, graph in graphs.items():
        sites[training] = {}
        seen: Counter[str] = Counter()
        for node in graph.nodes:
            kind, label = _activation_of(module, node)
            if kind in wanted:
                called = f"{node.op} {node.target}"
                sites[training][called, seen[called]] = node, label
                seen[called] += 1
            elif label and (kind or _is_other(module, node)):
                conversion.left[label] += training
    everywhere: dict[tuple[str, int], tuple[fx.Node, str]] = {}
    for place, site in itertools.chain.from_iterable(found.items() for found in sites.values()):
        everywhere.setdefault(place, site)
    if not everywhere:
        return []

    names: dict[tuple[str, int], str] = {}
    for number, (place, (node, label)) in enumerate(everywhere.items()):
        stem = str(node.target).replace(".", "_") if node.op == "call_module" else "activation"
        names[place] = next(name for name in _numbered(stem, number) if not hasattr(module, name))
        module.add_module(names[place], activation())
        where = str(node.target) if node.op == "call_module" else names[place]
        conversion.replaced.append(f"{_join(path, where)}: {label}")

    obsolete = {str(node.target) for node, _ in everywhere.values() if node.op == "call_module"}
    for training, graph in graphs.items():
        for place, (node, _) in sites[training].items():
            in_place = _changes_input(module, node)
            given = node.args[0] if node.args else node.kwargs["input"]
            if in_place and training and _is_of_others(given):
                conversion.doubtful.append(_join(path, names[place]))
            _put(graph, node, names[place], in_place)
        graph.lint()
        obsolete -= {str(node.target) for node in graph.nodes if node.op == "call_module"}
    _install(module, graphs)
    return [(module, name) for name in obsolete if "." not in name]


_VIEWS = frozenset({
    "view", "view_as", "reshape", "flatten", "unflatten", "transpose", "permute", "chunk", "split", "unbind",
    "getitem", "squeeze", "unsqueeze", "expand", "narrow", "select", "movedim", "t",
})  # fmt: skip


def _is_of_others(given: Any) -> bool:
    """Whether a tensor comes from outside a forward, or may be a view of another."""
    if given.op in ("placeholder", "get_attr"):
        return True
    return given.op != "call_module" and getattr(given.target, "__name__", given.target) in _VIEWS


def _numbered(stem: str, number: int) -> Iterator[str]:
    yield f"{stem}_{number}"
    yield from (f"{stem}_{number}_{again}" for again in itertools.count(1))


def _traced(path: str, module: nn.Module, conversion: Conversion) -> dict[bool, fx.Graph]:
    """The code of a module's forward in training and, where it differs, in evaluation.

    None where it cannot be had, which is then said. Code that draws random numbers or makes tensors of its
    own as it runs is such: a trace would keep what came out the first time.
    """
    attributes, mode = dict(vars(module)), module.training
    inner = {name: dict(vars(module)[name]) for name in ("_modules", "_parameters", "_buffers")}
    before = torch.get_rng_state(), random.getstate()
    graphs: dict[bool, fx.Graph] = {}
    reason = ""
    try:
        for training in (True, False):
            module.training = training
            graphs[training] = _OwnCode().trace(module)
    except Exception as error:  # user code traced with stand-ins fails in any way whatever
        reason = (str(error) or type(error).__name__).splitlines()[0]
    if not torch.equal(before[0], torch.get_rng_state()) or before[1] != random.getstate():
        reason = reason or "it draws random numbers"
    if any(str(node.target).startswith("_tensor_constant") for g in graphs.values() for node in g.nodes):
        reason = reason or "it makes tensors of its own"
    torch.set_rng_state(before[0])
    random.setstate(before[1])
    vars(module).clear()
    vars(module).update(attributes)
    for name, content in inner.items():
        vars(module)[name].clear()
        vars(module)[name].update(content)
    module.training = mode

    if reason:
        where = path or "the model"
        conversion.unreached.append(f"{where} ({type(module).__name__} cannot be traced: {reason})")
        return {}
    code = [str(graph.python_code("self").src) for graph in graphs.values()]
    return graphs if code[0] != code[1] else {True: graphs[True]}


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


def _is_other(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node calls an activation of a kind that is never replaced."""
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), _OTHER_MODULES)
    if node.op == "call_function":
        return node.target in _OTHER_FUNCTIONS
    return node.op == "call_method" and node.target in ("tanh", "sigmoid")


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
