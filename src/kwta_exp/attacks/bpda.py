"""The bpda-gradient attack: exact forward, soft backward.

A winner-take-all layer is discontinuous in its input: which values win changes densely, and the
gradient, which only sees today's winners, says nothing about it. Backward pass differentiable
approximation (Athalye, Carlini and Wagner, "Obfuscated Gradients Give a False Sense of Security",
ICML 2018, section 4.1) keeps the network as it is going forward and differentiates something smooth
in its place. Here the gate of each value, 0 or 1, is differentiated as a sigmoid around the
threshold, so the gradient also tells which losers are about to win.
"""

import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt, dataclasses
from torch import Tensor, nn

from kwta_exp.activations import KWTA, LWTA
from kwta_exp.activations.kwta import kwta_threshold
from kwta_exp.attacks.apgd import APGD
from kwta_exp.attacks.base import NotApplicableError, answers_are_exact
from kwta_exp.attacks.losses import Loss, LossName, attack_loss
from kwta_exp.attacks.pgd import PGD, Best
from kwta_exp.attacks.standing import Try, best_of
from kwta_exp.attacks.threat import Threat
from kwta_exp.attacks.together import Climb, Query, micro_batched, together
from kwta_exp.fields import STRICT, Eps, Norm
from kwta_exp.randomness import fold

Temperature = float | Tensor
"""Of all images, or of each: ``(n,)``, for a gate with the dimensions of ``x``, the others of size 1."""

Relaxation = Callable[[Any, Tensor, Any], Tensor]
"""``gate(module, x, temperature)``: a relaxation of ``module(x)``; see :data:`Temperature`."""


def soft_kwta(module: KWTA, x: Tensor, temperature: Temperature) -> Tensor:
    """``x * sigmoid((s - t) / (temperature * std(s)))``: s the score, t the k-th largest of it.

    The threshold and the standard deviation, one for each row of competitors, count as constants.
    """
    if module.relu:
        x = x.relu()
    score = x.abs() if module.by == "magnitude" else x
    threshold = kwta_threshold(x.detach(), module.ratio, k=module.k, over=module.over, by=module.by)
    first = 2 if module.over == "channel" and x.dim() > 2 else 1
    return x * torch.sigmoid((score - threshold) / (temperature * _spread(score, first)))


def soft_lwta(module: LWTA, x: Tensor, temperature: Temperature) -> Tensor:
    """``x * sigmoid((x - r) / (temperature * std(x)))``: r the best rival within the group."""
    if module.group_size == 1:
        return x
    groups = x.detach().unflatten(1, (-1, module.group_size))
    first, second = groups.topk(2, dim=2).values.split(1, dim=2)
    rival = torch.where(groups >= first, second, first).flatten(1, 2)
    return x * torch.sigmoid((x - rival) / (temperature * _spread(x, 1)))


def _spread(x: Tensor, first: int) -> Tensor:
    """The standard deviation over dimensions ``first`` and up, kept above 0; no gradient.

    In two passes: on a CPU ``std``, with one, is several times slower.
    """
    x, over = x.detach(), tuple(range(first, x.dim()))
    from_mean = x - x.mean(over, keepdim=True)
    freedom = max(1, math.prod(x.shape[first:]) - 1)
    spread: Tensor = torch.linalg.vector_norm(from_mean, dim=over, keepdim=True) / freedom**0.5
    return spread.clamp_min(1e-12)


RELAXATIONS: dict[type[nn.Module], Relaxation] = {KWTA: soft_kwta, LWTA: soft_lwta}
"""The discontinuous activations known here, and the relaxation of each."""

_MOMENTUM = 0.75
_FIRST_STEP = 0.5  # of eps


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class BPDA:
    """PGD whose forward pass is the network's own and whose backward pass goes through soft gates.

    Every restart is a run with a random start of its own. The iterate with the largest margin of error, under
    the exact network, is kept.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        eps: radius of the ball, in pixel units of [0, 1].
        steps: gradient steps of each restart.
        step_size: length of a step; ``None`` as for :class:`~kwta_exp.attacks.PGD`. For ``ascent="pgd"`` alone.
        ascent: ``"pgd"``; ``"apgd"``, which sets its own step size; or ``"anneal"``: steps along the gradients'
            momentum that shrink from eps / 2 to nothing while the gate sharpens.
        restarts: independent runs.
        temperatures: widths of the soft gate, as multiples of the standard deviation of the values that
            compete. Small ones are truer to the network, large ones see further. Restarts take turns
            through them; under ``"anneal"`` each goes from the largest to the smallest, geometrically.
        loss: ``"ce"`` or ``"margin"``.
        gates: for activations of your own: dotted path of the class to dotted path of its gate, a
            function ``(module, x, temperature)`` that returns a relaxation of ``module(x)``.
            ``"anneal"`` hands it a temperature for each image, of ``x``'s dimensions, the others a float.

    Raises:
        NotApplicableError: from a call, if the model has no module of a class with a gate. It is then
            plain PGD, and would count as what it is not.
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

    def __post_init__(self) -> None:
        if self.ascent != "pgd" and self.step_size is not None:
            raise ValueError(f"step_size={self.step_size}: ascent={self.ascent} sets its own; expected null")

    @property
    def _descent(self) -> PGD | APGD:
        """What ``"anneal"`` differs from in its steps and temperatures, not in its cost, is PGD."""
        if self.ascent == "apgd":
            return APGD(norm=self.norm, eps=self.eps, steps=self.steps, loss=self.loss)
        return PGD(norm=self.norm, eps=self.eps, steps=self.steps, step_size=self.step_size, loss=self.loss)

    def details(self, model: nn.Module) -> dict[str, int]:
        """What the attack found to work on, for the record."""
        return {"activations_replaced": len(self._gated(model))}

    refills: ClassVar = True

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, max_batch_size: int | None = None
    ) -> Tensor:
        """Adversarial images inside the ball and [0, 1]; see :class:`~kwta_exp.attacks.Attack`."""
        gated, asked = self.require(model), micro_batched(model, max_batch_size)
        descent = self._descent

        def run(restart: int) -> Try:
            temperature = self.temperatures[restart % len(self.temperatures)]

            def attempt(at: Tensor) -> Tensor:
                keys_of_run = fold(restart, keys[at])
                if self.ascent == "anneal":
                    best = Best(x[at], y[at])
                    loss = attack_loss(self.loss, asked, x[at], y[at])
                    together(
                        soft, partial(self._anneal, keys_of_run, best, loss), best.standing, max_batch_size
                    )
                    return best.x
                with relaxed(gated, temperature):
                    return descent(model, x[at], y[at], keys_of_run, max_batch_size=max_batch_size)

            return attempt

        def soft(x: Tensor, temperatures: Tensor | None = None) -> Tensor:
            if temperatures is None:
                return asked(x)
            with relaxed(gated, temperatures):
                logits: Tensor = model(x)
            return logits

        return best_of(map(run, range(self.restarts)), asked, x, y)

    def _anneal(self, keys: Tensor, best: Best, loss: Loss, at: Tensor) -> Climb:
        """One run of ``ascent="anneal"``; momentum as in Dong et al. 2018, equation 6, weaker and decaying."""
        threat = Threat(norm=self.norm, eps=self.eps)
        warm, cold = max(self.temperatures), min(self.temperatures)
        origin = best.origin[at]
        x_adv = threat.random_point(origin, keys[at])
        velocity = torch.zeros_like(origin)
        for step in range(self.steps):
            progress = step / self.steps
            temperatures = x_adv.new_full((len(at),), warm * (cold / warm) ** progress)
            gradient, logits, _ = yield Query(x_adv, partial(loss, at=at), temperatures)
            if not (go_on := best.update(x_adv, logits, at)).all():
                at, origin, x_adv, gradient, velocity = (
                    each[go_on] for each in (at, origin, x_adv, gradient, velocity)
                )
                if not len(at):
                    return
            scale = gradient.abs().mean(tuple(range(1, origin.dim())), keepdim=True)
            velocity = _MOMENTUM * velocity + gradient / scale.clamp_min(1e-30)
            length = _FIRST_STEP * self.eps * (1 - progress)
            x_adv = threat.project(x_adv + length * threat.steepest(velocity), origin)
        _, logits, _ = yield Query(x_adv)
        best.update(x_adv, logits, at)

    def passes(self, classes: int) -> tuple[int, int]:
        """The most passes, forward and backward, for one image."""
        forwards, backwards = self._descent.passes(classes)
        return self.restarts * (forwards + 1), self.restarts * backwards

    def require(self, model: nn.Module) -> list[tuple[nn.Module, Relaxation]]:
        """The activations with a gate.

        Raises:
            NotApplicableError: if there is none.
        """
        return _require_gates(model, self.gates)

    def _gated(self, model: nn.Module) -> list[tuple[nn.Module, Relaxation]]:
        return gated_modules(model, self.gates)


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class RelaxedTransfer:
    """PGD on a twin of the network with soft gates going forward too; what it finds is tried on the network.

    The twin is smooth, so its gradients are honest, and near the network, so its adversarial images often
    are the network's (a transfer attack that needs no other network). Every restart takes all its steps and
    the last iterate: what fools the twin only just seldom fools the network.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        eps: radius of the ball, in pixel units of [0, 1].
        steps: gradient steps of each restart.
        restarts: independent runs; they take turns through the temperatures.
        temperatures: see :class:`BPDA`.
        loss: ``"ce"``, ``"margin"`` or ``"dlr"``.
        gates: see :class:`BPDA`.

    Raises:
        NotApplicableError: from a call, if the model has no module of a class with a gate.
    """

    norm: Norm
    eps: Eps
    steps: PositiveInt = 40
    restarts: PositiveInt = 6
    temperatures: list[PositiveFloat] = field(default_factory=lambda: [0.1, 0.05, 0.2])
    loss: LossName = "ce"
    gates: dict[str, str] | None = None

    def details(self, model: nn.Module) -> dict[str, int]:
        """What the attack found to work on, for the record."""
        return {"activations_replaced": len(gated_modules(model, self.gates))}

    def passes(self, classes: int) -> tuple[int, int]:
        """The most passes, forward and backward, for one image; those through the twin count."""
        return self.restarts * (self.steps + 1), self.restarts * self.steps

    refills: ClassVar = True

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, max_batch_size: int | None = None
    ) -> Tensor:
        """Adversarial images inside the ball and [0, 1]; see :class:`~kwta_exp.attacks.Attack`."""
        gated = _require_gates(model, self.gates)
        descent = PGD(norm=self.norm, eps=self.eps, steps=self.steps, loss=self.loss, keep_best=False)

        def run(restart: int) -> Try:
            temperature = self.temperatures[restart % len(self.temperatures)]

            def attempt(at: Tensor) -> Tensor:
                with relaxed(gated, temperature, exact_forward=False):
                    return descent(model, x[at], y[at], fold(restart, keys[at]), max_batch_size=max_batch_size)

            return attempt

        return best_of(map(run, range(self.restarts)), micro_batched(model, max_batch_size), x, y)


def gated_modules(model: nn.Module, own: Mapping[str, str] | None) -> list[tuple[nn.Module, Relaxation]]:
    """The modules of ``model`` whose class has a gate, here or in ``own`` (dotted path to dotted path)."""
    resolve = pkgutil.resolve_name
    gates = RELAXATIONS | {resolve(name): resolve(gate) for name, gate in (own or {}).items()}
    return [(module, gates[type(module)]) for module in model.modules() if type(module) in gates]


def _require_gates(model: nn.Module, own: Mapping[str, str] | None) -> list[tuple[nn.Module, Relaxation]]:
    if gated := gated_modules(model, own):
        return gated
    raise NotApplicableError("no winner-take-all activation to put a soft gate in")


@contextmanager
def relaxed(
    gated: Sequence[tuple[nn.Module, Relaxation]], temperature: Temperature, exact_forward: bool = True
) -> Iterator[None]:
    """Let gradients of ``gated`` modules pass through their gates; what they return is unchanged, unless
    ``exact_forward`` is off: then it is the gates' too.

    The ``temperature`` is a float or, of each image, ``(n,)``. Where a network has made more or fewer rows of
    its images, all of these get the mean.
    """

    def hook_for(gate: Relaxation) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor | None]:
        inside = False

        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
            nonlocal inside
            if inside or (exact_forward and not torch.is_grad_enabled()):
                return None
            inside = True  # a gate may call the module itself
            try:
                soft = gate(module, inputs[0], _shaped_for(inputs[0], temperature))
            finally:
                inside = False
            passed: Tensor = _StraightThrough.apply(output.detach(), soft) if exact_forward else soft
            return passed

        return hook

    handles = [module.register_forward_hook(hook_for(gate)) for module, gate in gated]
    token = answers_are_exact.set(exact_forward)
    try:
        yield
    finally:
        answers_are_exact.reset(token)
        for handle in handles:
            handle.remove()


def _shaped_for(x: Tensor, temperature: Temperature) -> Temperature:
    if not isinstance(temperature, Tensor):
        return temperature
    each = temperature if len(temperature) == len(x) else temperature.mean().expand(len(x))
    return each.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))


class _StraightThrough(torch.autograd.Function):
    """Forward the first argument, backward to the second."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, soft: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient
