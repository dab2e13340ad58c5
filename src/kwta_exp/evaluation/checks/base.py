"""What a check is, and how all of them are measured."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kwta_exp.attacks import Threat
from kwta_exp.attacks.base import MicroBatches
from kwta_exp.data.batches import Split, to_float
from kwta_exp.data.image_folder import FolderPixels
from kwta_exp.errors import UserError
from kwta_exp.evaluation.evaluation import Evaluation
from kwta_exp.evaluation.outcome import Outcome
from kwta_exp.failures import first_line, is_out_of_memory
from kwta_exp.randomness import fold, isolated, key

log = logging.getLogger(__name__)

OBFUSCATED = "Athalye, Carlini and Wagner 2018, section 3.1"
EVALUATING = "Carlini et al. 2019"
BINARIZATION = "Zimmermann et al. 2022"

BearsOn = Literal["plain gradients", "worst case"]


@dataclass(frozen=True)
class Check:
    """A share, 0 to 1, that is measured; larger is worse.

    Attributes:
        name: in ``results.json``.
        threshold: the check is raised if the value (the lower end of its 95% interval, if ``paired``) exceeds
            it.
        bears_on: what a raised check puts in doubt: the number of plain PGD, or the worst case.
        source: the paper it is from.
        meaning: what a raised check means, in words.
        measured: what the value is the share of, for the documentation.
        sign: whether it is a sign of masked gradients. Where such signs were measured and none is raised, a
            plain PGD that misses images is merely weak: on any network other losses and targets find a little
            more.
        paired: whether it is a share of the images that every attack ran on, those that some attacks fool and
            others do not: a paired comparison.
    """

    name: str
    threshold: float
    bears_on: BearsOn
    source: str
    meaning: str
    measured: str
    sign: bool = False
    paired: bool = False


@dataclass(frozen=True)
class Comparison:
    """Attacks to compare on the images that all of them ran on.

    Attributes:
        fooled: by attack, bool ``(n,)``.
        baseline_pgd: names of attacks; see :class:`~kwta_exp.evaluation.roles.Roles`.
        single_step: likewise.
        black_box: names of the attacks that computed no gradient of the network.
    """

    fooled: Mapping[str, npt.NDArray[np.bool_]]
    baseline_pgd: tuple[str, ...]
    single_step: tuple[str, ...]
    black_box: tuple[str, ...]

    @classmethod
    def of(cls, evaluation: Evaluation, outcome: Outcome) -> "Comparison":
        """The attacks of ``outcome``."""
        roles, records = evaluation.roles, outcome.records
        return cls(
            {name: outcome.fooled(name)[: evaluation.diagnostic_n] for name in records},
            tuple(name for name in roles.baseline_pgd if name in records),
            tuple(name for name in roles.single_step if name in records),
            tuple(name for name, record in records.items() if len(record) and not record.backwards),
        )

    def only(self, these: tuple[str, ...], others: tuple[str, ...]) -> float:
        """The share of the images that some of ``these`` fool and none of ``others``."""
        by_these, by_others = (
            np.any([self.fooled[name] for name in names], axis=0) for names in (these, others)
        )
        return float((by_these & ~by_others).mean())


@dataclass(frozen=True)
class Subject:
    """What measurements look at: an evaluation, its outcome, and the first images that are classified
    correctly.

    Attributes:
        evaluation: the evaluation.
        outcome: its outcome.
        positions: of the images in the evaluation.
        images: the images.
        details: for ``results.json``; a measurement may add to it.
    """

    evaluation: Evaluation
    outcome: Outcome
    positions: npt.NDArray[np.intp]
    images: Split
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def network(self) -> nn.Module:
        """The network."""
        return self.evaluation.network

    @property
    def threat(self) -> Threat:
        """The threat."""
        return self.evaluation.threat

    @cached_property
    def calls(self) -> MicroBatches:
        """Calls of the network, in batches that all checks shrink together when memory runs out."""
        return MicroBatches(self.network, self.evaluation.batch_size)

    @cached_property
    def batches(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Images in [0, 1], labels and keys, batch by batch; read once for all checks."""
        keys = fold(key(self.evaluation.seed, "checks"), self.images.index)
        return list(batches(self.images, keys, self.evaluation.batch_size))


PerImage = Callable[[MicroBatches, Tensor, Tensor, Tensor, Threat], dict[str, Tensor]]
"""``(calls of the network, x, y, keys, threat)`` to a number for each image ``(N,)``, NaN where it says
nothing, by check.
"""

CHECKS: dict[str, Check] = {}
"""All checks by name, in the order they are reported."""

_COMPARISONS: dict[str, Callable[[Comparison], float | None]] = {}
_MEASUREMENTS: list[Callable[[Subject], Mapping[str, float]]] = []


def comparison(check: Check) -> Callable[[Callable[[Comparison], float | None]], Any]:
    """Register a function of the attacks' outcomes as the measurement of ``check``; ``None`` says nothing."""

    def register(function: Callable[[Comparison], float | None]) -> Any:
        CHECKS[check.name] = check
        _COMPARISONS[check.name] = function
        return function

    return register


def measurement(*checks: Check) -> Callable[[Callable[[Subject], Mapping[str, float]]], Any]:
    """Register a function as the measurement of ``checks``: it returns values by their names, or leaves some
    out.
    """

    def register(function: Callable[[Subject], Mapping[str, float]]) -> Any:
        CHECKS.update({check.name: check for check in checks})
        _MEASUREMENTS.append(function)
        return function

    return register


def per_image(*checks: Check) -> Callable[[PerImage], PerImage]:
    """Register a function of single images; the value of each check is the mean over images."""

    def register(function: PerImage) -> PerImage:
        def measured(subject: Subject) -> dict[str, float]:
            pieces = [function(subject.calls, *batch, subject.threat) for batch in subject.batches]
            return {name: _mean(torch.cat([piece[name] for piece in pieces])) for name in pieces[0]}

        measured.__name__ = getattr(function, "__name__", "per_image")
        measurement(*checks)(measured)
        return function

    return register


@dataclass(frozen=True)
class Diagnosis:
    """What was measured.

    Attributes:
        n: images it was measured on.
        measured: values by the name of the check.
        details: what measurements add to ``results.json``.
    """

    n: int = 0
    measured: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def compare(evaluation: Evaluation, outcome: Outcome) -> dict[str, float]:
    """The comparisons of attacks, by the name of the check."""
    attacks = Comparison.of(evaluation, outcome)
    found = {name: function(attacks) for name, function in _COMPARISONS.items()}
    return {name: value for name, value in found.items() if value is not None}


def diagnose(evaluation: Evaluation, outcome: Outcome, checks_n: int) -> Diagnosis:
    """Every measurement, on the first ``checks_n`` images that the network classifies correctly.

    Raises:
        UserError: if the memory is too small even for a batch of one image. Nothing is scored then.
    """
    positions = np.flatnonzero(outcome.clean_correct)[:checks_n]
    if not len(positions):
        return Diagnosis()
    log.info("checking for masked gradients on %d images", len(positions))
    subject = Subject(evaluation, outcome, positions, part(evaluation.images, positions))
    measured: dict[str, float] = {}
    for function in _MEASUREMENTS:
        try:
            with isolated(key(evaluation.seed, function.__name__)):  # some networks draw random numbers
                measured |= function(subject)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"evaluation.checks_n={checks_n}: not enough memory for the check {function.__name__}, even for"
                f" one image at a time ({first_line(error)}); expected more memory, or evaluation.checks_n=0"
            ) from error
    return Diagnosis(len(positions), measured, subject.details)


def table() -> str:
    """All checks as a Markdown table, for the documentation."""
    lines = ["| check | bears on | threshold | what is measured | source |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| `{check.name}` | {check.bears_on} | {check.threshold:g} | {check.measured} | {check.source} |"
        for check in CHECKS.values()
    ]
    return "\n".join(lines)


def batches(images: Split, keys: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images in [0, 1], labels and keys, ``size`` at a time."""
    x = to_float(images.x[torch.arange(len(images), device=images.y.device)])
    return zip(x.split(size), images.y.split(size), keys.split(size), strict=True)


def part(images: Split, positions: npt.NDArray[np.intp]) -> Split:
    """The images at ``positions``."""
    index = torch.from_numpy(positions).to(images.y.device)
    x = images.x.subset(index, images.y.device) if isinstance(images.x, FolderPixels) else images.x[index]
    return Split(x, images.y[index], images.index[index])


def _mean(values: Tensor) -> float:
    """The mean of the finite values; 0 if there are none."""
    kept = values[values.isfinite()]
    return kept.mean().item() if len(kept) else 0.0
