"""Weights as safetensors, training state as tensors and plain values. Loading neither runs code."""

import io
import logging
import pickle
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from kwta_exp.errors import DamagedError, UserError
from kwta_exp.received import refuse_pickle_bomb, refuse_zip_bomb
from kwta_exp.sealed import is_extra_state, read_metadata, seal, unseal, with_metadata
from kwta_exp.storage import set_aside, write_bytes

log = logging.getLogger(__name__)

Weights = dict[str, Tensor]


def weights_of(module: nn.Module) -> Weights:
    """A copy of a module's state dict on the CPU, contiguous; it includes the ratio of each k-WTA layer."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in module.state_dict().items()
    }


def save_weights(path: Path, weights: Weights, metadata: Mapping[str, str]) -> None:
    """Write ``weights`` atomically as safetensors, with text ``metadata`` and a checksum in the header."""
    write_bytes(path, with_metadata(safetensors.torch.save(weights), metadata))


def read_weights(path: Path) -> Weights:
    """Read a state dict from safetensors, or from a torch file of nothing but tensors.

    Raises:
        UserError: if the file is missing, damaged, a decompression bomb, no state dict, or would run code.
    """
    try:
        refuse_zip_bomb(path)
        if path.suffix != ".safetensors":
            refuse_pickle_bomb(path)
    except (OSError, ValueError) as error:
        raise UserError(f"weights={path}: {error}; expected a checkpoint") from error
    if path.suffix == ".safetensors":
        read_metadata(path)  # checks its checksum
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise UserError(f"weights={path}: not a complete safetensors file ({error})") from error
    content = _unwrap(_load_plain(path, f"weights={path}"))
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise UserError(
            f"weights={path}: holds {type(content).__name__}; expected a state dict"
            " (names to tensors), as torch.save(model.state_dict()) writes"
        )
    return dict(content)


def _unwrap(content: Any) -> Any:
    """The state dict inside what training scripts usually save: among other things, or of a wrapped model."""
    if isinstance(content, dict):
        for name in ("state_dict", "model_state_dict", "model", "net"):
            if isinstance(content.get(name), dict):
                content = content[name]
                break
    prefix = "module."  # DataParallel's
    if isinstance(content, dict) and content and all(str(name).startswith(prefix) for name in content):
        content = {str(name).removeprefix(prefix): value for name, value in content.items()}
    return content


def load_into(model: nn.Module, weights: Weights, source: str) -> None:
    """Load ``weights`` into ``model``; every name, shape and type must fit, and every value must be finite.

    Extra state, such as the ratio of a k-WTA layer, is loaded where the model has a place for it and is
    ignored where it has none: the same weights fit a network with another activation.

    Raises:
        UserError: listing the names that are missing, unexpected, or do not fit.
    """
    state = model.state_dict()
    wanted, given = _tensors(state), without_unused_group(_tensors(weights), _tensors(state))
    if len(given) < len(_tensors(weights)):
        log.info("weights=%s: its sub_block1, which the published network never calls, is left out", source)
    problems = _misfits(wanted, given)
    if not any(problems.values()):
        problems["not finite"] = [name for name in sorted(wanted) if _has_odd_values(given[name], wanted[name])]
    _refuse(problems, given, source)
    try:
        model.load_state_dict({name: value for name, value in weights.items() if name in state})
    except (ValueError, RuntimeError) as error:  # a module refuses its extra state
        raise UserError(f"weights={source}: {error}") from error


def require_fit(shape: nn.Module, weights: Weights, source: str) -> None:
    """Raise unless the names, shapes and types of ``weights`` are those of a network without values.

    Args:
        shape: the network, on torch's meta device.
        weights: the checkpoint.
        source: the checkpoint's name, for the message.

    Raises:
        UserError: as :func:`load_into`.
    """
    wanted = _tensors(shape.state_dict())
    given = without_unused_group(_tensors(weights), wanted)
    _refuse(_misfits(wanted, given), given, source)


_UNUSED, _USED = "sub_block1.", "block1."


def without_unused_group(weights: Weights, wanted: Collection[str]) -> Weights:
    """``weights`` without ``sub_block1``, a group of a published Wide ResNet that its ``forward`` never calls.

    The network of the TRADES repository (github.com/yaodongyu/TRADES, ``models/wideresnet.py``), which many
    published defences start from, has a second first group. It is recognised by its names and shapes, which are
    those of ``block1``.

    Args:
        weights: parameters and buffers.
        wanted: the names of the network that they are for. One that has a ``sub_block1`` gets it.
    """
    unused = {name.removeprefix(_UNUSED): tensor.shape for name, tensor in _inside(weights, _UNUSED)}
    used = {name.removeprefix(_USED): tensor.shape for name, tensor in _inside(weights, _USED)}
    if not unused or unused != used or any(name.startswith(_UNUSED) for name in wanted):
        return weights
    return {name: tensor for name, tensor in weights.items() if not name.startswith(_UNUSED)}


def _inside(weights: Weights, group: str) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in weights.items() if name.startswith(group)]


def _tensors(state: Mapping[str, Any]) -> Weights:
    """Parameters and buffers alone, without extra state."""
    return {name: value for name, value in state.items() if not is_extra_state(name)}


def _misfits(wanted: Weights, weights: Weights) -> dict[str, list[str]]:
    both = sorted(wanted.keys() & weights.keys())
    return {
        "missing": sorted(wanted.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - wanted.keys()),
        "misshapen": [
            f"{name} {tuple(weights[name].shape)} (expected {tuple(wanted[name].shape)})"
            for name in both
            if weights[name].shape != wanted[name].shape
        ],
        "of another type": [
            f"{name} {_type(weights[name])} (expected {_dtype(wanted[name])})"
            for name in both
            if _type(weights[name]) != _dtype(wanted[name])
        ],
    }


def _refuse(problems: Mapping[str, list[str]], weights: Weights, source: str) -> None:
    if any(problems.values()):
        halves = [tensor for tensor in weights.values() if tensor.dtype in (torch.float16, torch.bfloat16)]
        lines = [
            f"  {kind}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
            for kind, names in problems.items()
            if names
        ]
        if halves and problems["of another type"]:
            half = f"value.float() if value.dtype == {halves[0].dtype} else value"
            lines.append(f"  to convert: {{name: {half} for name, value in state_dict.items()}}")
        raise UserError("\n".join([f"weights={source}: do not fit the model", *lines]))


def _type(tensor: Tensor) -> str:
    """The dtype, and the layout if it is not dense."""
    dtype = _dtype(tensor)
    if tensor.is_meta:
        return f"{dtype} without values"
    return dtype if tensor.layout == torch.strided else f"{dtype} {str(tensor.layout).removeprefix('torch.')}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _has_odd_values(given: Tensor, wanted: Tensor) -> bool:
    """Whether it holds NaN or infinities, other than the network's own constants (a mask of -inf)."""
    finite = given.isfinite()
    return bool((~finite & (given != wanted.to(given.device))).any()) if not finite.all() else False


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write training state (tensors, numbers, text, lists and dicts of them) atomically."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_bytes(path, seal(buffer.getvalue()))


def read_state(path: Path) -> dict[str, Any]:
    """Read what :func:`save_state` wrote.

    Raises:
        DamagedError: if the file is not as it was written.
        UserError: if it is intact but no training state, or would run code. The file stays where it is.
    """
    content = _load_plain(io.BytesIO(unseal(path)), f"training state {path}")
    if not isinstance(content, dict):
        raise UserError(
            f"training state {path}: holds {type(content).__name__}; expected a dict. Use rerun=true"
        )
    return content


def read_state_or_set_aside(path: Path) -> dict[str, Any] | None:
    """:func:`read_state`, or ``None`` if there is no file or it is damaged; a damaged one is renamed.

    Raises:
        UserError: as :func:`read_state`.
    """
    try:
        return read_state(path) if path.exists() else None
    except DamagedError as error:
        log.warning(
            "training starts from the beginning: %s; kept as %s", error, set_aside(path, ".damaged").name
        )
        return None


def _load_plain(file: Path | io.BytesIO, what: str) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # of TorchScript archives, which are then refused
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{what}: refused. Loading it would run code, or it is damaged (nothing was run). Expected tensors,"
            " numbers and text only. If it is a pickled model, save its weights with"
            " torch.save(model.state_dict(), ...)"
        ) from error
    except Exception as error:  # the reader fails in many ways on damaged bytes
        short = str(error).partition("\n")[0][:200]
        raise UserError(
            f"{what}: damaged or not a torch file ({type(error).__name__}: {short}); expected a file written by"
            " torch.save(model.state_dict(), ...)"
        ) from error
