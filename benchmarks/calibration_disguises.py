"""What the calibration puts before, into and after a network, most of it to hide or to break its gradient.

Most are written as in published code: in plain PyTorch, and with none of this project's layers. Images are
``(N, C, H, W)`` in [0, 1]; what comes after a network takes logits ``(N, K)``.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Quantised(nn.Module):
    """Images in ``levels + 1`` shades: the gradient is zero everywhere."""

    def __init__(self, levels: int = 16) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.levels).round() / self.levels


class Staircase(nn.Module):
    """Images rounded down to ``levels + 1`` shades: the gradient is zero everywhere."""

    def __init__(self, levels: int = 64) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.levels).floor() / self.levels


class Thermometer(nn.Module):
    """The same as :class:`Staircase`, as the share of ``levels`` thresholds that each value reaches.

    The code is that of Buckman et al., "Thermometer Encoding", ICLR 2018, decoded at once: no gradient at all.
    """

    def __init__(self, levels: int = 64) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        thresholds = torch.arange(1, self.levels + 1, dtype=x.dtype, device=x.device) / self.levels
        code = (x.unsqueeze(-1) >= thresholds).to(x.dtype)
        return code.sum(-1) / self.levels


class SteepStaircase(nn.Module):
    """:class:`Staircase` with a sigmoid at each step: a gradient that is tiny almost everywhere."""

    def __init__(self, levels: int = 64, steepness: float = 4000) -> None:
        super().__init__()
        self.levels, self.steepness = levels, steepness

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(1, self.levels + 1, dtype=x.dtype, device=x.device) / self.levels
        return torch.sigmoid(self.steepness * (x.unsqueeze(-1) - steps)).sum(-1) / self.levels


class Shattered(nn.Module):
    """A ripple too small to see, and steep enough to turn every gradient's sign into noise."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(2000 * x) * 0.004


class Masked(nn.Module):
    """Values below a tiny threshold become 0, in place: no gradient there, the true one elsewhere."""

    def __init__(self, threshold: float = 0.02) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        h = x.clone()
        h[h < self.threshold] = 0
        return h


class InNumPy(nn.Module):
    """:class:`Quantised` by way of NumPy, where autograd ends."""

    def __init__(self, levels: int = 176) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        array = x.detach().cpu().numpy()
        return torch.from_numpy((array * self.levels).round() / self.levels).to(x)


class _Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int, share: float) -> Tensor:
        ctx.share = share
        return (x * levels).round() / levels

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.share, None, None


class OwnBackward(nn.Module):
    """:class:`Quantised` by an own autograd function, which passes back ``share`` of the gradient.

    With 1 it is the straight-through estimator (Bengio, Léonard and Courville 2013): the gradient is that of
    the network at the rounded image, and plain PGD does what BPDA does. With 0 it is zero.
    """

    def __init__(self, share: float, levels: int = 176) -> None:
        super().__init__()
        self.share, self.levels = share, levels

    def forward(self, x: Tensor) -> Tensor:
        rounded: Tensor = _Rounding.apply(x, self.levels, self.share)
        return rounded


class Loud(nn.Module):
    """Logits so far apart that the cross-entropy is zero and its gradient too."""

    def forward(self, x: Tensor) -> Tensor:
        return 1000 * x


class Saturated(nn.Module):
    """The softmax of logits x 1000: the same answers, as zeros and a one, and no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return (1000 * x).softmax(1)


class Noisy(nn.Module):
    """Another answer each time."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


class RandomShift(nn.Module):
    """Each image moved by up to ``most`` pixels, another way each time; after Xie et al., ICLR 2018."""

    def __init__(self, most: int = 1) -> None:
        super().__init__()
        self.most = most

    def forward(self, x: Tensor) -> Tensor:
        padded = functional.pad(x, [self.most] * 4)
        moved = padded.unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)
        down, right = torch.randint(2 * self.most + 1, (2, len(x)), device=x.device)
        return moved[torch.arange(len(x), device=x.device), :, down, right]


class DroppedReLU(nn.Module):
    """A ReLU and dropout, which stays on at test time."""

    def __init__(self, p: float = 0.2) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x.relu(), self.p, training=True)


class RandomLWTA(nn.Module):
    """Of each pair of channels, one drawn by the Gumbel softmax: at temperature 0.67, at test time at 0.01."""

    def forward(self, x: Tensor) -> Tensor:
        pairs = x.unflatten(1, (-1, 2))
        gates = functional.gumbel_softmax(pairs, tau=0.67 if self.training else 0.01, dim=2)
        drawn: Tensor = (pairs * gates).flatten(1, 2)
        return drawn


class EqualLWTA(nn.Module):
    """LWTA of pairs of channels: the values that equal the larger of their pair."""

    def forward(self, x: Tensor) -> Tensor:
        pairs = x.unflatten(1, (-1, 2))
        return (pairs * (pairs == pairs.amax(2, keepdim=True))).flatten(1, 2)


class ArgmaxLWTA(nn.Module):
    """LWTA of pairs of channels: a one-hot mask at the index of the larger value."""

    def forward(self, x: Tensor) -> Tensor:
        pairs = x.unflatten(1, (-1, 2))
        winner = pairs.argmax(2, keepdim=True)
        return (pairs * torch.zeros_like(pairs).scatter(2, winner, 1.0)).flatten(1, 2)


class ThresholdKWTA(nn.Module):
    """k-WTA as published: all values that are not below the k-th largest of the sample."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(x), -1)
        k = max(1, int(self.ratio * rows.shape[1]))
        smallest = rows.topk(k, dim=1).values.amin(1, keepdim=True)
        return (x * (rows >= smallest).to(x.dtype).view_as(x)).contiguous()


class ScatterKWTA(nn.Module):
    """k-WTA by a mask of ones that is scattered to the k largest values of the sample."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(x), -1)
        k = max(1, int(self.ratio * rows.shape[1]))
        winners = rows.topk(k, dim=1).indices
        mask = torch.zeros_like(rows).scatter(1, winners, 1.0)
        return (rows * mask).view_as(x)


class SparsedNorm(nn.BatchNorm2d):
    """Batch norm; at test time, values within 0.2 standard deviations of their channel's mean become the mean.

    As MeanSparse does before an activation (Amini et al. 2024, arXiv 2406.05927). After batch norm, a channel's
    mean is its bias, and its standard deviation the size of its weight.
    """

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = super().forward(x)
        if self.training:
            return h
        mean, deviation = self.bias.view(1, -1, 1, 1), self.weight.abs().view(1, -1, 1, 1)
        return torch.where((h - mean).abs() < 0.2 * deviation, mean, h)
