"""Tensors that claim to be on a GPU, for tests on machines without one.

A :class:`Claimed` tensor says that its device is ``cuda:0``, computes on the CPU, and refuses to mix with CPU
tensors as CUDA does. Inside :func:`claimed_gpu`, ``device="cuda"`` makes such tensors, and a count is kept of
operations, of points at which the host waits for the device, and of copies to the device. So a program's device
mistakes are found, and what it costs in launches and waits is known, though not how long any of it takes.

    python -m tests.claimed

prints the operations and waits of a step of each attack and of adversarial training.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from kwta_exp.activations import KWTA
from kwta_exp.attacks import APGD, BPDA, PGD, Attack, EvolutionStrategies, SmoothedPGD, Threat
from kwta_exp.data.batches import Batch
from kwta_exp.evaluation.query_counter import QueryCounter
from kwta_exp.training.objectives import PGDTraining

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
_HIDDEN = torch.device("meta")
"""What torch's C++ code sees: a device without streams, where "cuda" would need a real one."""

aten = torch.ops.aten

_VIEWS = {
    "view", "_unsafe_view", "detach", "alias", "expand", "permute", "transpose", "t", "slice", "select",
    "squeeze", "unsqueeze", "as_strided", "split", "split_with_sizes", "unbind", "unfold", "lift_fresh",
    "_reshape_alias",
    "diagonal", "chunk", "tensor_split", "movedim", "narrow", "view_as_real",
}  # fmt: skip
"""Operations that launch nothing."""

_WAITS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "unique",
    "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "histc", "allclose", "argwhere",
}  # fmt: skip
"""Operations whose result, or the size of it, the host needs."""

_COPIES = {"_to_copy", "copy_", "copy"}


class MixedDevicesError(RuntimeError):
    """An operation on tensors of two devices, which CUDA refuses."""


@dataclass
class Counts:
    """What happened: names of operations that launch a kernel, of waits, and of copies to the device."""

    operations: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)


counts = Counts()


class Claimed(Tensor):
    """A tensor on the claimed device; ``inner`` has its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> "Claimed":
        made: Claimed = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=_HIDDEN, requires_grad=requires_grad,
        )  # fmt: skip
        return made

    def __init__(self, inner: Tensor, requires_grad: bool = False) -> None:
        self.inner = inner

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Claimed({self.inner!r})"

    def __format__(self, specification: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), specification)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.__reduce_ex__(protocol)  # what is saved is loaded on the CPU

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run(func, args, kwargs or {})


class ClaimedGPU(TorchDispatchMode):
    """Makes ``device="cuda"`` give claimed tensors."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values inside, count it, and claim its results."""
    leaves = pytree.tree_leaves((args, kwargs))
    ours = [leaf for leaf in leaves if isinstance(leaf, Claimed)]
    wanted = kwargs.get("device")
    target = torch.device(wanted) if wanted is not None else (DEVICE if ours else CPU)
    target = DEVICE if target == _HIDDEN else target  # the device of another tensor, as C++ sees it
    name = func.overloadpacket.__name__
    _refuse_mixing(func, name, leaves, ours, args)
    if ours or target.type == "cuda":
        _count(name, args, ours, target)
    kwargs = {key: CPU if key == "device" and value is not None else value for key, value in kwargs.items()}
    inner_args, inner_kwargs = pytree.tree_map(_inner, (args, kwargs))
    result = func(*inner_args, **inner_kwargs)
    wrappers = {id(leaf.inner): leaf for leaf in ours}  # in-place operations return their argument
    if name == "copy_" and not isinstance(args[0], Claimed):
        return args[0]

    def claimed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, Claimed) or target.type != "cuda":
            return leaf
        return wrappers.get(id(leaf)) if id(leaf) in wrappers else Claimed(leaf)

    return pytree.tree_map(claimed, result)


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, Claimed) else leaf


def _refuse_mixing(func: Any, name: str, leaves: list[Any], ours: list[Claimed], args: tuple[Any, ...]) -> None:
    """CUDA takes CPU scalars of no dimension, copies, and CPU indices of CUDA tensors; nothing else."""
    others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, Claimed)]
    others = [other for other in others if other.dim() > 0]
    if not ours or not others or name in _COPIES:
        return
    if name in ("index", "index_put_", "index_put", "_index_put_impl_") and isinstance(args[0], Claimed):
        values = args[2] if len(args) > 2 else None
        if not (isinstance(values, Tensor) and not isinstance(values, Claimed) and values.dim() > 0):
            return
    found = [(str(leaf.device), tuple(leaf.shape)) for leaf in leaves if isinstance(leaf, Tensor)]
    raise MixedDevicesError(f"{func}: expected all tensors on one device, got {found}")


def _count(name: str, args: tuple[Any, ...], ours: list[Claimed], target: torch.device) -> None:
    if name in _COPIES:
        source, here = (args[1], args[0]) if name == "copy_" else (args[0], None)
        to_device = isinstance(here, Claimed) if here is not None else target.type == "cuda"
        if isinstance(source, Claimed) and not to_device:
            counts.waits[name] += 1
        elif not isinstance(source, Claimed) and to_device:
            counts.uploads[name] += 1
        else:
            counts.operations[name] += 1
        return
    if name in _VIEWS or name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"):
        return
    counts.operations[name] += 1
    indices = args[1] if name.startswith(("index", "_index_put")) and len(args) > 1 else ()
    indices = indices if isinstance(indices, list | tuple) else ()
    if name in _WAITS:
        counts.waits[name] += 1
    elif any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices):
        counts.waits[f"{name} by a mask"] += 1
    elif any(isinstance(index, Tensor) and not isinstance(index, Claimed) for index in indices):
        counts.uploads[f"{name} by a CPU index"] += 1


def _synchronize(device: object = None) -> None:
    counts.waits["synchronize"] += 1


@contextlib.contextmanager
def claimed_gpu() -> Iterator[Counts]:
    """A GPU that is only claimed; yields what is counted from here on."""
    for part in (counts.operations, counts.waits, counts.uploads):
        part.clear()
    patches = (
        mock.patch("torch.cuda._lazy_init"),
        mock.patch("torch.cuda.synchronize", _synchronize),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        # The engine has a thread for each real GPU only; so it runs in this one.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(ClaimedGPU())
        yield counts


def on_gpu(tensor: Tensor) -> Claimed:
    """A copy of a CPU tensor on the claimed device."""
    return Claimed(tensor.detach().clone())


def network_on_gpu(network: nn.Module) -> nn.Module:
    """The network, with parameters and buffers on the claimed device."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(on_gpu(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = on_gpu(buffer)
    return network


def values(tree: Any) -> Any:
    """The same with CPU tensors in place of claimed ones."""
    return pytree.tree_map(_inner, tree)


Step = tuple[float, float]
"""Operations and waits of one step."""


def a_step(call: Callable[[int], Any], few: int = 8, many: int = 24) -> Step:
    """The cost of one step of ``call(steps)``: the difference of a long and a short call."""
    found = []
    for steps in (few, many):
        with claimed_gpu() as seen:
            call(steps)
            found.append((seen.operations.total(), seen.waits.total()))
    (operations_few, waits_few), (operations_many, waits_many) = found
    return (operations_many - operations_few) / (many - few), (waits_many - waits_few) / (many - few)


def network(images: Tensor, winners: float = 0.2) -> nn.Module:
    """A small k-WTA network with random weights, for 8x8 images of one channel."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), KWTA(ratio=winners),
        nn.Conv2d(8, 8, 3, padding=1), KWTA(ratio=winners), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    made = nn.Sequential(*layers)
    made(images)  # BatchNorm sees them once
    return made.eval()


def attack_steps() -> dict[str, tuple[Step, Step]]:
    """The cost of a step of each attack on images that it never fools: alone, and with queries counted."""
    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    model = network(x).requires_grad_(False)
    y, tiny = model(x).argmax(1), {"norm": "linf", "eps": 1e-5}
    attacks: dict[str, Callable[[int], Attack]] = {
        "pgd": lambda steps: PGD(**tiny, steps=steps),
        "apgd": lambda steps: APGD(**tiny, steps=steps),
        "bpda": lambda steps: BPDA(**tiny, steps=steps, restarts=1),
        "smoothed, 5 samples": lambda steps: SmoothedPGD(**tiny, steps=steps, samples=5),
        "es, 20 samples, an image": lambda steps: EvolutionStrategies(**tiny, steps=steps, samples=20),
    }
    claimed, images, labels, keys = network_on_gpu(model), on_gpu(x), on_gpu(y), on_gpu(torch.arange(16))

    def cost(name: str, counted: bool) -> Step:
        n = 1 if name.endswith("an image") else 16

        def call(steps: int) -> None:
            seen = QueryCounter(claimed, images[:n], labels[:n], Threat(**tiny)) if counted else claimed
            attacks[name](steps)(seen, images[:n], labels[:n], keys[:n])

        return a_step(call)

    return {name: (cost(name, counted=False), cost(name, counted=True)) for name in attacks}


def training_steps() -> tuple[Step, Step]:
    """The cost of adversarial training: of one step of the inner attack, and of all else in a training step."""
    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    model = network_on_gpu(network(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batch = Batch(on_gpu(x), on_gpu(torch.arange(16) % 10), on_gpu(torch.arange(16)))

    def call(inner_steps: int, steps: int = 1) -> None:
        attack = PGD(norm="linf", eps=0.1, steps=inner_steps, keep_best=False)
        method = PGDTraining(epochs=1, attack=attack)
        for _ in range(steps):
            optimizer.zero_grad()
            loss, _ = method.loss(model.train(), batch)
            loss.backward()
            optimizer.step()

    with claimed_gpu():
        call(1)  # the optimizer makes its state
    inner = a_step(call)
    with_one = a_step(lambda steps: call(1, steps), 1, 3)
    return inner, (with_one[0] - inner[0], with_one[1] - inner[1])


def table() -> str:
    """Operations and waits of a step, as Markdown."""
    lines = [
        "| a step of | operations | waits | operations, queries counted | waits |",
        "| --- |" + " ---: |" * 4,
    ]
    for name, ((operations, waits), (counted, counted_waits)) in attack_steps().items():
        lines.append(f"| {name} | {operations:.0f} | {waits:.2f} | {counted:.0f} | {counted_waits:.2f} |")
    inner, rest = training_steps()
    lines.append(f"| adversarial training, the inner attack | {inner[0]:.0f} | {inner[1]:.2f} | | |")
    lines.append(f"| adversarial training, all else | {rest[0]:.0f} | {rest[1]:.2f} | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
