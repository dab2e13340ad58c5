"""Baselines: k-WTA as published, and adversarial training as usually written."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def published_kwta(x: Tensor, ratio: float) -> Tensor:
    """k-WTA as in its authors' code, in outline: flatten, topk, repeat, compare, multiply."""
    size = x.shape[1] * x.shape[2] * x.shape[3]
    threshold = x.reshape(x.shape[0], -1).topk(int(ratio * size), dim=1)[0][:, -1]
    repeated = threshold.repeat(size, 1).permute(1, 0).view_as(x)
    return (x >= repeated).to(x) * x


class PublishedKWTA(nn.Module):
    """:func:`published_kwta` as a layer."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        return published_kwta(x, self.ratio)


def plain_pgd(network: nn.Module, x: Tensor, y: Tensor, eps: float, step_size: float, steps: int) -> Tensor:
    """PGD as often written, with ``loss.backward()``, which computes the gradients of the weights too."""
    x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        F.cross_entropy(network(x_adv), y).backward()
        assert x_adv.grad is not None
        with torch.no_grad():
            moved = x_adv + step_size * x_adv.grad.sign()
            x_adv = torch.min(torch.max(moved, x - eps), x + eps).clamp(0, 1)
    return x_adv.detach()


def plain_adversarial_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, eps: float, steps: int
) -> None:
    """One step of adversarial training with :func:`plain_pgd`, in float32."""
    network.eval()
    x_adv = plain_pgd(network, x, y, eps, 2.5 * eps / steps, steps)
    network.train()
    optimizer.zero_grad()
    F.cross_entropy(network(x_adv), y).backward()
    optimizer.step()
