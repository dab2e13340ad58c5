"""Backward pass differentiable approximation (BPDA) of winner-take-all layers.

A winner-take-all layer is discontinuous in its input: the set of winners changes densely, and the gradient,
which sees today's winners only, says nothing about it. BPDA (Athalye, Carlini and Wagner, "Obfuscated Gradients
Give a False Sense of Security", ICML 2018, section 4.1) leaves the forward pass as it is and differentiates a
smooth relaxation instead. Here the gate of each value, 0 or 1, is differentiated as a sigmoid around the
threshold, so the gradient also tells which losers are about to win.
"""

import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt, dataclasses
from torch import Tensor, nn

from kwta_exp.activations import KWTA, LWTA
from kwta_exp.activations.soft_gate import soft_gate, standard_deviation
from kwta_exp.attacks.apgd import APGD
from kwta_exp.attacks.base import (
    Attack,
    MaxQueries,
    MicroBatches,
    NotApplicableError,
    compact,
    forward_is_exact,
)
from kwta_exp.attacks.losses import Loss, LossName, loss_and_labels
from kwta_exp.attacks.pgd import PGD, Best, normalised
from kwta_exp.attacks.relaxing import StraightThrough
from kwta_exp.fields import STRICT, Eps, Norm
from kwta_exp.randomness import fold

Relaxation = Callable[[Any, Tensor, float], Tensor]
"""``relaxation(module, x, temperature)``: a smooth function near ``module(x)``."""


def soft_kwta(module: KWTA, x: Tensor, temperature: float) -> Tensor:
    """``x * sigmoid((s - t) / (temperature * std(s)))``: s the score, t the k-th largest of it.

    The threshold and the standard deviation, one for each row of competitors, count as constants.
    """
    if module.relu:
        x = x.relu()
    return soft_gate(x, temperature, module.ratio, k=module.k, over=module.over, by=module.by)


def soft_lwta(module: LWTA, x: Tensor, temperature: float) -> Tensor:
    """``x * sigmoid((x - r) / (temperature * std(x)))``: r the best rival within the group."""
    if module.group_size == 1:
        return x
    groups = x.detach().unflatten(1, (-1, module.group_size))
    first, second = groups.topk(2, dim=2).values.split(1, dim=2)
    rival = torch.where(groups >= first, second, first).flatten(1, 2)
    return x * torch.sigmoid((x - rival) / (temperature * standard_deviation(x, range(1, x.dim()))))


RELAXATIONS: dict[type[nn.Module], Relaxation] = {KWTA: soft_kwta, LWTA: soft_lwta}
"""The discontinuous activations of this project, each with its relaxation."""

_MOMENTUM = 0.75
_FIRST_STEP = 0.5  # of eps


class _Relaxing(Attack):
    """An attack that needs layers with a relaxation."""

    gates: dict[str, str] | None

    def check_applicable(self, model: nn.Module) -> None:
        """Raise a :class:`NotApplicableError` if no layer of ``model`` has a relaxation."""
        if not relaxable(model, self.gates):
            raise NotApplicableError("the network has no winner-take-all layer")

    def details(self, model: nn.Module) -> dict[str, int]:
        """How many layers are relaxed."""
        return {"activations_replaced": len(relaxable(model, self.gates))}


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class BPDA(_Relaxing):
    """PGD whose forward pass is the network's own and whose backward pass goes through soft gates.

    Every restart has a random start of its own. The iterate with the largest margin, under the exact network,
    is kept.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        eps: radius of the ball, in pixel units of [0, 1].
        steps: gradient steps of each restart.
        step_size: length of a step; ``None`` as for :class:`~kwta_exp.attacks.PGD`. For ``ascent="pgd"`` alone.
        ascent: ``"pgd"``; ``"apgd"``, which sets its own step size; or ``"anneal"``: momentum steps that shrink
            from eps / 2 to 0 while the temperature falls.
        restarts: independent runs.
        temperatures: widths of the soft gate, as multiples of the standard deviation of the values that
            compete. Small ones are closer to the network, large ones see further. Restarts take turns
            through them; under ``"anneal"`` each falls from the largest to the smallest, geometrically.
        loss: ``"ce"``, ``"margin"``, ``"dlr"`` or ``"kl"``.
        gates: for activations of your own: dotted path of the class to dotted path of its relaxation, a
            function ``(module, x, temperature)`` that returns a smooth function near ``module(x)``.

    Raises:
        NotApplicableError: from a call, if no layer of the model has a relaxation. The attack would be plain
            PGD under another name.
    """

    norm: Norm
    eps: Eps
    steps: PositiveInt = 40
    step_size: Eps | None = None
    ascent: Literal["anneal", "pgd", "apgd"] = "anneal"
    restarts: PositiveInt = 6
    temperatures: list[PositiveFloat] = field(default_factory=lambda: [0.1, 0.01])
    loss: LossName = "margin"
    gates: dict[str, str] | None = None

    independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.ascent != "pgd" and self.step_size is not None:
            raise ValueError(f"step_size={self.step_size}: ascent={self.ascent} sets its own; expected null")

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, max_batch_size: int | None = None
    ) -> Tensor:
        """Adversarial images inside the ball and [0, 1]; see :class:`~kwta_exp.attacks.Attack`."""
        self.check_applicable(model)
        layers, batches, best = relaxable(model, self.gates), MicroBatches(model, max_batch_size), Best(x, y)
        loss, labels = loss_and_labels(self.loss, batches.logits, x, y)
        for restart in range(self.restarts):
            index = best.not_fooled
            if not len(index):
                break
            run_keys = fold(restart, keys[index])
            if self.ascent == "anneal":
                start = self.threat.random_point(x[index], run_keys)
                self._anneal(batches, layers, best, index, start, loss, labels[index])
            else:
                with relaxed(layers, self.temperatures[restart % len(self.temperatures)]):
                    found = self._inner(model, x[index], y[index], run_keys, max_batch_size)
                best.update(found, batches.logits(found), index)
        return best.x

    def _anneal(
        self,
        model: MicroBatches,
        layers: "Layers",
        best: Best,
        index: Tensor,
        x_adv: Tensor,
        loss: Loss,
        y: Tensor,
    ) -> None:
        """One run of ``ascent="anneal"``; momentum as in Dong et al. 2018, equation 6, weaker and decaying."""
        threat, x, velocity = self.threat, best.clean[index], torch.zeros_like(x_adv)
        warm, cold = max(self.temperatures), min(self.temperatures)
        for step in range(self.steps):
            progress = step / self.steps
            with relaxed(layers, warm * (cold / warm) ** progress):
                gradient, logits, _ = model.gradient(x_adv, y, loss)
            keep = best.update(x_adv, logits, index)
            index, x, x_adv, y, gradient, velocity = compact(step, keep, index, x, x_adv, y, gradient, velocity)
            if not len(index):
                return
            velocity = _MOMENTUM * velocity + normalised(gradient)
            step_size = _FIRST_STEP * self.eps * (1 - progress)
            x_adv = threat.project(x_adv + step_size * threat.steepest(velocity), x)
        best.update(x_adv, model.logits(x_adv), index)

    @property
    def _inner(self) -> PGD | APGD:
        """The attack that runs on the relaxed gradients; ``"anneal"`` costs what PGD does."""
        if self.ascent == "apgd":
            return APGD(norm=self.norm, eps=self.eps, steps=self.steps, loss=self.loss)
        return PGD(norm=self.norm, eps=self.eps, steps=self.steps, step_size=self.step_size, loss=self.loss)

    def max_queries(self, classes: int) -> MaxQueries:
        """Every restart takes all its steps and one look at what it found."""
        forward, backward = self._inner.max_queries(classes)
        return MaxQueries(self.restarts * (forward + 1) + (self.loss == "kl"), self.restarts * backward)


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class RelaxedTransfer(_Relaxing):
    """PGD on the relaxed network, soft gates going forward too; its images are tried on the network itself.

    The relaxed network is smooth, so its gradients are honest, and close to the network, so its adversarial
    images often transfer. Every restart takes all its steps and returns the last iterate: an image that barely
    fools the relaxed network seldom fools the network.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        eps: radius of the ball, in pixel units of [0, 1].
        steps: gradient steps of each restart.
        restarts: independent runs; they take turns through the temperatures.
        temperatures: see :class:`BPDA`.
        loss: ``"ce"``, ``"margin"``, ``"dlr"`` or ``"kl"``.
        gates: see :class:`BPDA`.

    Raises:
        NotApplicableError: from a call, if no layer of the model has a relaxation.
    """

    norm: Norm
    eps: Eps
    steps: PositiveInt = 40
    restarts: PositiveInt = 6
    temperatures: list[PositiveFloat] = field(default_factory=lambda: [0.1, 0.05, 0.2])
    loss: LossName = "ce"
    gates: dict[str, str] | None = None

    independent: ClassVar[bool] = True

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, max_batch_size: int | None = None
    ) -> Tensor:
        """Adversarial images inside the ball and [0, 1]; see :class:`~kwta_exp.attacks.Attack`."""
        self.check_applicable(model)
        layers, batches, best = relaxable(model, self.gates), MicroBatches(model, max_batch_size), Best(x, y)
        pgd = PGD(norm=self.norm, eps=self.eps, steps=self.steps, loss=self.loss, keep_best=False)
        for restart in range(self.restarts):
            index = best.not_fooled
            if not len(index):
                break
            with relaxed(layers, self.temperatures[restart % len(self.temperatures)], exact_forward=False):
                found = pgd(model, x[index], y[index], fold(restart, keys[index]), max_batch_size)
            best.update(found, batches.logits(found), index)
        return best.x

    def max_queries(self, classes: int) -> MaxQueries:
        """Every restart takes all its steps and one look at what it found; relaxed passes count."""
        clean = self.loss == "kl"
        return MaxQueries(self.restarts * (self.steps + 1 + clean), self.restarts * self.steps)


Layers = Sequence[tuple[nn.Module, Relaxation]]
"""Modules, each with its relaxation."""


def relaxable(model: nn.Module, own: Mapping[str, str] | None) -> list[tuple[nn.Module, Relaxation]]:
    """The modules of ``model`` with a relaxation, from :data:`RELAXATIONS` or ``own`` (dotted paths)."""
    resolve = pkgutil.resolve_name
    known = RELAXATIONS | {resolve(name): resolve(relaxation) for name, relaxation in (own or {}).items()}
    return [(module, known[type(module)]) for module in model.modules() if type(module) in known]


@contextmanager
def relaxed(layers: Layers, temperature: float, exact_forward: bool = True) -> Iterator[None]:
    """Differentiate the relaxations of ``layers``; without ``exact_forward``, compute them forward too."""

    def hook_for(relaxation: Relaxation) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor | None]:
        inside = False

        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
            nonlocal inside
            if inside or (exact_forward and not torch.is_grad_enabled()):
                return None
            inside = True  # a relaxation may call the module itself
            try:
                soft = relaxation(module, inputs[0], temperature)
            finally:
                inside = False
            passed: Tensor = StraightThrough.apply(output.detach(), soft) if exact_forward else soft
            return passed

        return hook

    handles = [module.register_forward_hook(hook_for(relaxation)) for module, relaxation in layers]
    token = forward_is_exact.set(exact_forward)
    try:
        yield
    finally:
        forward_is_exact.reset(token)
        for handle in handles:
            handle.remove()
