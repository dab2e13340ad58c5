"""Networks written elsewhere with their activations replaced: any importable one, and torchvision's by name."""

import logging
from collections.abc import Callable
from typing import Any

from pydantic import PositiveInt, validate_call
from torch import nn

from kwta_exp.errors import UserError
from kwta_exp.fields import STRICT
from kwta_exp.models.convert import Kind, convert
from kwta_exp.models.factory import ActivationFactory, with_facts

log = logging.getLogger(__name__)


@validate_call(config=STRICT)
def Converted(  # noqa: N802 - used like a network's class
    activation: ActivationFactory,
    network: Callable[..., nn.Module],
    num_classes: PositiveInt,
    in_channels: PositiveInt,
    image_size: tuple[PositiveInt, PositiveInt],
    kinds: list[Kind] | None = None,
) -> nn.Module:
    """Any network with its activations replaced.

    Args:
        activation: makes the new activations.
        network: makes the network; gets those of the next three that its signature names.
        num_classes: number of logits.
        in_channels: channels of the input.
        image_size: (height, width) of the input.
        kinds: which activations to replace; see :func:`convert`.

    Raises:
        UserError: if there is none to replace.
    """
    facts = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    return _converted(network(**with_facts(network, facts)), activation, kinds)


@validate_call(config=STRICT)
def Torchvision(  # noqa: N802 - used like a network's class
    activation: ActivationFactory,
    name: str,
    num_classes: PositiveInt,
    in_channels: PositiveInt,
    image_size: tuple[PositiveInt, PositiveInt],
    kinds: list[Kind] | None = None,
) -> nn.Module:
    """A classifier of torchvision, untrained, with its activations replaced.

    Arguments as for :class:`Converted`, and:
        name: torchvision's name, such as ``"resnet50"``, ``"densenet121"`` or ``"vit_b_16"``. Unless
            ``in_channels`` is 3, the first convolution is replaced.

    Raises:
        UserError: for a name that torchvision does not have, or if there is no activation to replace.
    """
    import torchvision.models as zoo

    if name not in (available := zoo.list_models(zoo)):
        raise UserError(f"model.name={name!r}: torchvision has no such network; expected one of {available}")
    options: dict[str, Any] = {"num_classes": num_classes}
    if name.startswith("vit_"):
        if image_size[0] != image_size[1]:
            raise UserError(f"model.name={name!r}: expected square images; the data's are {image_size}")
        options["image_size"] = image_size[0]
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    network = zoo.get_model(name, weights=None, **options)
    if in_channels != 3:
        path, old = next((p, m) for p, m in network.named_modules() if isinstance(m, nn.Conv2d))
        options = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation")}
        new = nn.Conv2d(in_channels, old.out_channels, **options, bias=old.bias is not None)
        network.set_submodule(path, new)
    return _converted(network, activation, kinds)


def _converted(network: nn.Module, activation: ActivationFactory, kinds: list[Kind] | None) -> nn.Module:
    conversion = convert(network, activation, kinds)
    if not conversion.replaced:
        raise UserError(f"model: nothing to convert in {type(network).__name__}: {conversion}")
    log.info("%s: %s", type(network).__name__, conversion)
    return network
