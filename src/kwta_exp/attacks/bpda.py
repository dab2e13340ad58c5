"""Backward pass differentiable approximation (BPDA) of winner-take-all layers.

A winner-take-all layer is discontinuous in its input: the set of winners changes densely, and the gradient,
which sees today's winners only, says nothing about it. BPDA (Athalye, Carlini and Wagner, "Obfuscated Gradients
Give a False Sense of Security", ICML 2018, section 4.1) leaves the forward pass as it is and differentiates a
smooth relaxation instead. Here the gate of each value, 0 or 1, is differentiated as a sigmoid around the
threshold, so the gradient also tells which losers are about to win.
"""

import pkgutil
from collections.abc import Mapping
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
    with_fewer,
)
from kwta_exp.attacks.losses import Loss, LossName, loss_and_labels
from kwta_exp.attacks.pgd import PGD, Best, normalised
from kwta_exp.attacks.relaxing.model import Relaxation, RelaxedModel, examined
from kwta_exp.fields import STRICT, Eps, Norm
from kwta_exp.randomness import fold


def soft_kwta(module: KWTA, x: Tensor, temperature: float) -> Tensor:
    """:func:`~kwta_exp.activations.soft_gate.soft_gate`, behind ReLU where the module begins with one."""
    if module.relu:
        x = x.relu()
    return soft_gate(x, temperature, module.ratio, k=module.k, over=module.over, by=module.by)


def soft_lwta(module: LWTA, x: Tensor, temperature: float) -> Tensor:
    """``x * sigmoid((x - r) / (temperature * std(x)))``: r the best rival within the group.

    The standard deviation, one for each image, counts as a constant.
    """
    if module.group_size == 1:
        return x
    groups = x.unflatten(1, (-1, module.group_size))
    first, second = groups.topk(2, dim=2).values.split(1, dim=2)
    rival = torch.where(groups >= first, second, first).flatten(1, 2)
    return x * torch.sigmoid((x - rival) / (temperature * standard_deviation(x, range(1, x.dim()))))


RELAXATIONS: dict[type[nn.Module], Relaxation] = {KWTA: soft_kwta, LWTA: soft_lwta}
"""The discontinuous activations of this project, each with its relaxation."""

_MOMENTUM = 0.75
_FIRST_STEP = 0.5  # of eps


class _Relaxing(Attack):
    """An attack that needs something to relax."""

    temperatures: list[float]
    gates: dict[str, str] | None
    operators: bool

    def check_applicable(self, model: nn.Module, x: Tensor) -> None:
        """Raise a :class:`NotApplicableError` if nothing in ``model`` is relaxed."""
        relaxing = self.relaxing(model)
        relaxing(x.detach().clone().requires_grad_())
        self.require_relaxed(relaxing)

    def relaxing(self, model: nn.Module, exact_forward: bool = True) -> RelaxedModel:
        """``model`` with its stand-ins."""
        return RelaxedModel(model, relaxable(model, self.gates), self.operators, exact_forward)

    def require_relaxed(self, model: RelaxedModel) -> None:
        """Raise a :class:`NotApplicableError` if the first call with a gradient found nothing to relax."""
        if not model.relaxes:
            raise NotApplicableError(
                "the network has no winner-take-all layer, and none of its operators blocks a gradient"
                if self.operators
                else "the network has no winner-take-all layer"
            )

    def details(self, model: nn.Module, x: Tensor) -> dict[str, Any]:
        """How many layers and operators are relaxed, and which modules are smoothed or not covered."""
        layers = relaxable(model, self.gates)
        if not self.operators:
            return {"activations_replaced": len(layers)}
        found = with_fewer(lambda x: examined(model, layers, x, max(self.temperatures)), x)
        return {
            "activations_replaced": found.layers,
            "operators_relaxed": found.operators,
            "smoothed": found.smoothed,
            "not_covered": found.not_covered,
        }


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
        operators: relax what blocks gradients in the network's own code too: operators
            (:class:`~kwta_exp.attacks.relaxing.Relaxing`), and modules that hide a gradient from torch.

    Raises:
        NotApplicableError: from a call, if there is nothing to relax. The attack would be plain PGD under
            another name.
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
    operators: bool = True

    independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.ascent != "pgd" and self.step_size is not None:
            raise ValueError(f"step_size={self.step_size}: ascent={self.ascent} sets its own; expected null")

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, max_batch_size: int | None = None
    ) -> Tensor:
        """Adversarial images inside the ball and [0, 1]; see :class:`~kwta_exp.attacks.Attack`."""
        relaxing = self.relaxing(model)
        batches, best = MicroBatches(relaxing, max_batch_size), Best(x, y)
        loss, labels = loss_and_labels(self.loss, batches.logits, x, y)
        for restart in range(self.restarts):
            index = best.not_fooled
            if not len(index):
                break
            run_keys = fold(restart, keys[index])
            if self.ascent == "anneal":
                start = self.threat.random_point(x[index], run_keys)
                self._anneal(batches, relaxing, best, index, start, loss, labels[index])
            else:
                relaxing.temperature = self.temperatures[restart % len(self.temperatures)]
                found = self._inner(relaxing, x[index], y[index], run_keys, max_batch_size)
                self.require_relaxed(relaxing)
                best.update(found, batches.logits(found), index)
        return best.x

    def _anneal(
        self,
        model: MicroBatches,
        relaxing: RelaxedModel,
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
            relaxing.temperature = warm * (cold / warm) ** progress
            gradient, logits, _ = model.gradient(x_adv, y, loss)
            self.require_relaxed(relaxing)
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
        operators: see :class:`BPDA`.

    Raises:
        NotApplicableError: from a call, if there is nothing to relax.
    """

    norm: Norm
    eps: Eps
    steps: PositiveInt = 40
    restarts: PositiveInt = 6
    temperatures: list[PositiveFloat] = field(default_factory=lambda: [0.1, 0.05, 0.2])
    loss: LossName = "ce"
    gates: dict[str, str] | None = None
    operators: bool = True

    independent: ClassVar[bool] = True

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, max_batch_size: int | None = None
    ) -> Tensor:
        """Adversarial images inside the ball and [0, 1]; see :class:`~kwta_exp.attacks.Attack`."""
        relaxing = self.relaxing(model, exact_forward=False)
        batches, best = MicroBatches(model, max_batch_size), Best(x, y)
        pgd = PGD(norm=self.norm, eps=self.eps, steps=self.steps, loss=self.loss, keep_best=False)
        for restart in range(self.restarts):
            index = best.not_fooled
            if not len(index):
                break
            relaxing.temperature = self.temperatures[restart % len(self.temperatures)]
            found = pgd(relaxing, x[index], y[index], fold(restart, keys[index]), max_batch_size)
            self.require_relaxed(relaxing)
            best.update(found, batches.logits(found), index)
        return best.x

    def max_queries(self, classes: int) -> MaxQueries:
        """Every restart takes all its steps and one look at what it found; relaxed passes count."""
        clean = self.loss == "kl"
        return MaxQueries(self.restarts * (self.steps + 1 + clean), self.restarts * self.steps)


def relaxable(model: nn.Module, own: Mapping[str, str] | None) -> list[tuple[nn.Module, Relaxation]]:
    """The modules of ``model`` with a relaxation, from :data:`RELAXATIONS` or ``own`` (dotted paths)."""
    resolve = pkgutil.resolve_name
    known = RELAXATIONS | {resolve(name): resolve(relaxation) for name, relaxation in (own or {}).items()}
    return [(module, known[type(module)]) for module in model.modules() if type(module) in known]
