"""The networks of the calibration: honest ones, the same weights disguised, winner-take-all and random ones."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.calibration_disguises import (
    ArgmaxLWTA,
    DroppedReLU,
    EqualLWTA,
    InNumPy,
    Loud,
    Masked,
    Noisy,
    OwnBackward,
    Quantised,
    RandomLWTA,
    RandomShift,
    Saturated,
    ScatterKWTA,
    Shattered,
    SparsedNorm,
    Staircase,
    SteepStaircase,
    Thermometer,
    ThresholdKWTA,
)
from kwta_exp.activations import KWTA, LWTA
from kwta_exp.models import CNN, MLP, ResNet

A_LIE = 0.1
"""How far above the truth plain PGD's accuracy is a lie."""

SOUND, RANDOM, MASKED = "sound", "not sound", "masked"
SPARSE, HIDDEN = "masked if PGD lies", "masked or not sound"
"""What a network's verdict must be; see :class:`Specimen`."""


@dataclass(frozen=True)
class Specimen:
    """A network of the calibration.

    Attributes:
        name: of the network, and of its folder.
        must: the verdict it has to get, because of how it was made.

            - ``sound``: an honest network. Its gradient is the true one, and it is smooth or piecewise linear,
              so plain PGD finds what there is to find.
            - ``masked or not sound``: a disguise whose gradient says nothing about the network, almost
              everywhere: zero, or noise. ``masked`` where plain PGD lies, that is, leaves :data:`A_LIE` more
              than the worst case or the floor, whichever is lower. Otherwise the accuracy that PGD leaves may
              be right by luck, since the network is about as robust as if it had no gradient; then nobody can
              ask for ``masked``, but a search that nothing guided is no reason to call it ``sound``.
            - ``masked``: the same, on a network of which it is known that plain PGD lies: quantised inputs.
            - ``masked if PGD lies``: a network with jumps (k-WTA, LWTA, MeanSparse, a mask), or with a
              staircase for which a tiny gradient is left. Its gradient is the true one of the piece that the
              image lies on, or points the right way. Where plain PGD lies it must be called masked; elsewhere
              plain PGD may suffice, ``sound`` may be right, and nobody knows.
            - ``not sound``: a network that answers at random. One answer that stays right says nothing of the
              next, so a worst case of single answers is no bound, whatever PGD finds.
            - ``None``: nobody knows, and it is only shown. So for outputs that are probabilities, and for
              straight-through rounding: its gradient is as good as the honest network's, so ``sound`` may be
              right; but the network is as flat and as full of jumps as the one with a zero gradient.
        network: makes it.
        adversarial: whether it is trained by PGD.
        before: makes what the images pass first.
        after: makes what the logits pass.
        of: the honest network of the same set whose weights it has.
        alters: whether it has these weights but answers too differently for the honest network's worst case
            to be its floor.
    """

    name: str
    must: str | None
    network: Callable[..., nn.Module]
    adversarial: bool = False
    before: Callable[[], nn.Module] | None = None
    after: Callable[[], nn.Module] | None = None
    of: str | None = None
    alters: bool = False

    @property
    def floor_of(self) -> str | None:
        """The honest network whose worst case is about this one's true robust accuracy."""
        return None if self.alters else self.of


def disguised(honest: Specimen, how: str, must: str | None, **parts: Any) -> Specimen:
    """The same weights, in a disguise of this name."""
    return replace(honest, name=f"{honest.name}, {how}", must=must, of=honest.name, **parts)


def linear(num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size[0] * image_size[1], num_classes))


def convnet(act: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    return partial(CNN, act, channels=[16, 16, 32, 32], hidden=100)


def mlp(act: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    return partial(MLP, act, hidden=[256, 256])


def resnet(act: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    def make(num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
        return ResNet(act, depth=18, width=8, num_classes=num_classes, in_channels=in_channels)

    return make


def _stages(
    act: Callable[[], nn.Module], norm: Callable[[int], nn.Module], widths: list[int]
) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for width, next_width in pairwise(widths):
        layers += [nn.Conv2d(width, next_width, 3, padding=1), norm(next_width), act(), nn.MaxPool2d(2)]
    return layers


def pooled(
    act: Callable[[], nn.Module], norm: Callable[[int], nn.Module] = nn.BatchNorm2d
) -> Callable[..., nn.Module]:
    """Convolutions with batch norm and max-pooling, global average pooling, no hidden linear layer."""

    def make(num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
        layers = _stages(act, norm, [in_channels, 16, 32, 64])
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))

    return make


def normed(
    act: Callable[[], nn.Module], norm: Callable[[int], nn.Module] = nn.BatchNorm2d
) -> Callable[..., nn.Module]:
    """Two convolutions with batch norm and max-pooling, a hidden linear layer."""

    def make(num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
        size = 24 * (image_size[0] // 4) * (image_size[1] // 4)
        head = [nn.Flatten(), nn.Linear(size, 64), act(), nn.Linear(64, num_classes)]
        return nn.Sequential(*_stages(act, norm, [in_channels, 12, 24]), *head)

    return make


class OwnAttention(nn.Module):
    """Softmax attention of ``heads`` heads over tokens ``(N, T, D)``, by hand."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.inward(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        mixed: Tensor = self.outward((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return mixed


class TorchAttention(nn.Module):
    """The same by ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed: Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return mixed


class Block(nn.Module):
    """Attention and two linear layers, each on normed tokens and added to them."""

    def __init__(self, attention: Callable[[int, int], nn.Module], width: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), attention(width, 4))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(tokens)
        after: Tensor = tokens + self.mlp(tokens)
        return after


class Tokens(nn.Module):
    """Images as tokens ``(N, T, D)``, one for each patch, with learned positions."""

    def __init__(self, in_channels: int, width: int, patch: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, width, patch, stride=patch)
        number = (image_size[0] // patch) * (image_size[1] // patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, number, width))

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return tokens


class Mean(nn.Module):
    """The mean of all tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


def transformer(attention: Callable[[int, int], nn.Module], patch: int) -> Callable[..., nn.Module]:
    """Two blocks of attention over patches, after Dosovitskiy et al., ICLR 2021; the mean of all tokens."""

    def make(num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
        width = 32
        blocks = [Block(attention, width) for _ in range(2)]
        head = [nn.LayerNorm(width), Mean(), nn.Linear(width, num_classes)]
        return nn.Sequential(Tokens(in_channels, width, patch, image_size), *blocks, *head)

    return make


_cnn = Specimen("cnn relu", SOUND, convnet(nn.ReLU))
_cnn_at = Specimen("cnn relu AT", SOUND, convnet(nn.ReLU), adversarial=True)
_cnn_tanh = Specimen("cnn tanh", SOUND, convnet(nn.Tanh))
_mlp = Specimen("mlp relu", SOUND, mlp(nn.ReLU))
_mlp_at = Specimen("mlp relu AT", SOUND, mlp(nn.ReLU), adversarial=True)
_mlp_silu = Specimen("mlp silu", SOUND, mlp(nn.SiLU))
_attention = Specimen("attention", SOUND, transformer(TorchAttention, 2))
_normed = Specimen("normed gelu", SOUND, normed(nn.GELU))
_normed_at = Specimen("normed relu AT", SOUND, normed(nn.ReLU), adversarial=True)

# Which steps leave the ball much as it is was measured on up to two networks of each set, by PGD straight
# through them, with margins and restarts. Rounding to 1/176, or down to 1/64, leaves what it leaves of the
# honest network, to 2 points. To 1/16, it leaves 5 to 21 points less, since 0.1 becomes 2/16; to 1/64, up to
# 6 points more, since 0.1 becomes 6/64; down to 1/16, 14 to 16 points more.
SETTING: list[Specimen] = [
    Specimen("linear", SOUND, linear),
    _cnn, _cnn_at, _mlp, _mlp_at, _mlp_silu, _cnn_tanh, _attention, _normed, _normed_at,
    Specimen("cnn k-WTA 0.1", SPARSE, convnet(partial(KWTA, ratio=0.1))),
    Specimen("cnn k-WTA 0.2", SPARSE, convnet(partial(KWTA, ratio=0.2))),
    Specimen("mlp k-WTA 0.1 AT", SPARSE, mlp(partial(KWTA, ratio=0.1)), adversarial=True),
    Specimen("mlp k-WTA 0.2 by threshold", SPARSE, mlp(partial(ThresholdKWTA, ratio=0.2))),
    Specimen("cnn k-WTA 0.1 by scatter", SPARSE, convnet(partial(ScatterKWTA, ratio=0.1))),
    Specimen("cnn LWTA", SPARSE, convnet(partial(LWTA, group_size=2))),
    Specimen("mlp LWTA by equality", SPARSE, mlp(EqualLWTA)),
    disguised(_normed_at, "mean-sparse", SPARSE, network=normed(nn.ReLU, SparsedNorm), alters=True),
    disguised(_cnn, "quantised input", MASKED, before=Quantised, alters=True),
    disguised(_cnn, "shattered gradients", HIDDEN, before=Shattered),
    disguised(_cnn, "logits x 1000", HIDDEN, after=Loud),
    disguised(_cnn, "softmax", None, after=partial(nn.Softmax, 1)),
    disguised(_cnn_at, "thermometer input", HIDDEN, before=Thermometer),
    disguised(_mlp, "staircase", HIDDEN, before=Staircase),
    disguised(_cnn_tanh, "steep staircase", SPARSE, before=SteepStaircase),
    disguised(_attention, "saturated softmax", HIDDEN, after=Saturated),
    disguised(_mlp_silu, "input mask", SPARSE, before=Masked),
    disguised(_mlp_at, "straight-through rounding", None, before=partial(OwnBackward, 1.0)),
    disguised(_normed, "rounding with a zero gradient", HIDDEN, before=partial(OwnBackward, 0.0)),
    disguised(_mlp_silu, "rounding in NumPy", HIDDEN, before=InNumPy),
    disguised(_cnn, "noisy input", RANDOM, before=Noisy, alters=True),
    disguised(_normed, "random shift", RANDOM, before=RandomShift, alters=True),
    Specimen("mlp dropout", RANDOM, mlp(DroppedReLU)),
    Specimen("normed random LWTA", RANDOM, normed(RandomLWTA)),
]  # fmt: skip
"""Of digits: they set the thresholds."""

_pooled = Specimen("pooled relu", SOUND, pooled(nn.ReLU))
_pooled_at = Specimen("pooled relu AT", SOUND, pooled(nn.ReLU), adversarial=True)
_pooled_tanh = Specimen("pooled tanh", SOUND, pooled(nn.Tanh))
_mlp_gelu = Specimen("mlp gelu", SOUND, mlp(nn.GELU))
_mlp_gelu_at = Specimen("mlp gelu AT", SOUND, mlp(nn.GELU), adversarial=True)
_own_attention = Specimen("attention by hand", SOUND, transformer(OwnAttention, 4))
_own_attention_at = Specimen("attention by hand AT", SOUND, transformer(OwnAttention, 4), adversarial=True)

TRYING: list[Specimen] = [
    Specimen("linear", SOUND, linear),
    Specimen("resnet18 relu", SOUND, resnet(nn.ReLU)),
    _pooled, _pooled_at, _pooled_tanh, _mlp_gelu, _mlp_gelu_at, _own_attention, _own_attention_at,
    Specimen("mlp k-WTA 0.2", SPARSE, mlp(partial(KWTA, ratio=0.2))),
    Specimen("pooled k-WTA 0.1", SPARSE, pooled(partial(KWTA, ratio=0.1))),
    Specimen("mlp k-WTA 0.05", SPARSE, mlp(partial(KWTA, ratio=0.05))),
    Specimen("pooled k-WTA 0.2 by threshold", SPARSE, pooled(partial(ThresholdKWTA, ratio=0.2))),
    Specimen("mlp k-WTA 0.1 by scatter", SPARSE, mlp(partial(ScatterKWTA, ratio=0.1))),
    Specimen("pooled LWTA", SPARSE, pooled(partial(LWTA, group_size=2))),
    Specimen("pooled LWTA by argmax AT", SPARSE, pooled(ArgmaxLWTA), adversarial=True),
    disguised(_pooled_at, "mean-sparse", SPARSE, network=pooled(nn.ReLU, SparsedNorm), alters=True),
    disguised(_pooled_at, "quantised input", MASKED, before=Quantised, alters=True),
    disguised(_mlp_gelu, "shattered gradients", HIDDEN, before=Shattered),
    disguised(_pooled, "logits x 1000", HIDDEN, after=Loud),
    disguised(_mlp_gelu_at, "thermometer input", HIDDEN, before=Thermometer),
    disguised(_pooled, "staircase", HIDDEN, before=Staircase),
    disguised(_mlp_gelu, "steep staircase", SPARSE, before=SteepStaircase),
    disguised(_pooled_tanh, "saturated softmax", HIDDEN, after=Saturated),
    disguised(_pooled, "input mask", SPARSE, before=Masked),
    disguised(_own_attention, "straight-through rounding", None, before=partial(OwnBackward, 1.0)),
    disguised(_mlp_gelu, "rounding with a zero gradient", HIDDEN, before=partial(OwnBackward, 0.0)),
    disguised(_own_attention_at, "rounding in NumPy", HIDDEN, before=InNumPy),
    disguised(_mlp_gelu, "noisy input", RANDOM, before=Noisy, alters=True),
    disguised(_pooled_at, "random shift", RANDOM, before=RandomShift, alters=True),
    Specimen("pooled dropout", RANDOM, pooled(DroppedReLU)),
    Specimen("mlp random LWTA", RANDOM, mlp(RandomLWTA)),
]  # fmt: skip
"""Of FashionMNIST: no threshold has seen them."""

SETS = {"setting": SETTING, "trying": TRYING}
