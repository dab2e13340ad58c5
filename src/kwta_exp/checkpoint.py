"""Weights as safetensors, training state as tensors and plain values; neither can run code."""

import io
import pickle
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from kwta_exp.errors import UserError
from kwta_exp.received import require_plain, require_untangled
from kwta_exp.storage import write_bytes

Weights = dict[str, Tensor]


def weights_of(module: nn.Module) -> Weights:
    """A copy of a module's parameters and buffers on the CPU, contiguous."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in module.state_dict().items()
    }


def save_weights(path: Path, weights: Weights, metadata: Mapping[str, str]) -> None:
    """Write ``weights`` atomically as safetensors, with text ``metadata`` in the header."""
    write_bytes(path, safetensors.torch.save(weights, metadata=dict(metadata)))


def read_weights(path: Path) -> Weights:
    """Read a state dict from safetensors, or from a torch file of nothing but tensors.

    Raises:
        UserError: if the file is missing, torn, a bomb, no state dict, or a pickle that would run code.
    """
    try:
        require_plain(path)
        if path.suffix != ".safetensors":
            require_untangled(path)
    except (OSError, ValueError) as error:
        raise UserError(f"weights={path}: {error}; expected a checkpoint") from error
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise UserError(f"weights={path}: not a whole safetensors file ({error})") from error
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
    """The state dict inside what training scripts usually save: beside other things, or of a wrapped model."""
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
    """Put ``weights`` into ``model``; every name and shape must fit.

    Raises:
        UserError: listing missing, unexpected and misshapen names.
    """
    wanted = model.state_dict()
    problems = {
        "missing": sorted(wanted.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - wanted.keys()),
        "misshapen": [
            f"{name} {tuple(weights[name].shape)} (expected {tuple(wanted[name].shape)})"
            for name in sorted(wanted.keys() & weights.keys())
            if weights[name].shape != wanted[name].shape
        ],
    }
    if any(problems.values()):
        lines = (
            f"  {kind}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
            for kind, names in problems.items()
            if names
        )
        raise UserError("\n".join([f"weights={source}: do not fit the model", *lines]))
    model.load_state_dict(weights)


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write training state (tensors, numbers, text, lists and dicts of them) atomically."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_bytes(path, buffer.getvalue())


def read_state(path: Path, expected: Set[str] = frozenset()) -> dict[str, Any]:
    """Read what :func:`save_state` wrote, with at least the keys ``expected``.

    Raises:
        UserError: if the file is damaged or wants to run code. It is left where it is.
    """
    content = _load_plain(path, f"training state {path}")
    if not isinstance(content, dict) or not expected <= content.keys():
        raise UserError(f"training state {path}: not a whole one; delete it, or start again with rerun=true")
    return content


def _load_plain(path: Path, what: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{what}: refused. It is no plain torch file: loading it would run code, or it is damaged"
            " (nothing was run). Expected tensors, numbers and text only"
        ) from error
    except Exception as error:  # damaged bytes make the reader fail in any way whatever
        raise UserError(f"{what}: damaged or not a torch file ({error!r})") from error
