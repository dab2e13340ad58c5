"""Measurements of whether gradients lead anywhere and whether an attack could have missed something.

They look at what a network does, never at what it is made of. The checks are those of Athalye, Carlini and
Wagner, "Obfuscated Gradients Give a False Sense of Security", ICML 2018, section 3.1, and Carlini et al., "On
Evaluating Adversarial Robustness", arXiv 1902.06705, sections 3 to 5, with the binarization test
(:mod:`kwta_exp.evaluation.binarization`). What the numbers mean for a claim is :mod:`.verdict`'s business.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kwta_exp.attacks import Attack, NotApplicableError, Threat
from kwta_exp.data.batches import Split, to_float
from kwta_exp.data.image_folder import FolderPixels
from kwta_exp.evaluation.binarization import plant
from kwta_exp.evaluation.evaluator import evaluate
from kwta_exp.evaluation.gradient_checks import fooled_by_random_search, measured_per_image
from kwta_exp.evaluation.records import Record
from kwta_exp.evaluation.roles import Roles
from kwta_exp.randomness import fold, isolated, key

log = logging.getLogger(__name__)

LEAST_PROBLEMS = 8
"""Planted examples without which the binarization test says nothing."""

TOO_EASY = 0.5
"""Share of the planted examples that random points may find; above it, finding them says nothing."""

HUNT_PASSES = 50_000
"""An attack that may take more passes for an image does not look for planted examples: ``nes``, above all."""

NEAR_BEST = 0.05
"""An attack so near to the most successful one in accuracy may stand in for it where it is cheaper."""


@dataclass(frozen=True)
class Diagnosis:
    """What was measured.

    Attributes:
        n: images it was measured on: the first that are classified correctly.
        measured: a share, 0 to 1, for each check; larger is worse.
        planted: of the binarization test: how many problems, the share that each attack found and
            that random points find. Empty where it was not made.
    """

    n: int = 0
    measured: dict[str, float] = field(default_factory=dict)
    planted: dict[str, Any] = field(default_factory=dict)


def diagnose(
    network: nn.Module,
    images: Split,
    suite: Mapping[str, Attack],
    clean: Record,
    records: Mapping[str, Record],
    roles: Roles,
    threat: Threat,
    seed: int,
    batch_size: int,
    folder: Path,
    checks_n: int,
    diagnostic_n: int | None = None,
    processes: int = 1,
) -> Diagnosis:
    """Every measurement, on the first ``checks_n`` images that ``network`` classifies correctly.

    Args:
        network: frozen, in eval mode.
        images: those of the evaluation.
        suite: its attacks.
        clean: its clean record.
        records: its records of attacks.
        roles: what its attacks are to a verdict.
        threat: its threat.
        seed: its seed.
        batch_size: images of a chunk.
        folder: its folder; the planted examples and the repeated attack get folders of their own in it.
        checks_n: how many images, at most.
        diagnostic_n: of how many images the comparisons of attacks are; the repeated attack's too.
        processes: as for :func:`~kwta_exp.evaluation.evaluate`.
    """
    right = clean.columns["prediction"] == clean.columns["label"]
    standing = right & ~np.isin(clean.columns["index"], _fooled_by(records))
    first = np.flatnonzero(right)[:checks_n]
    if not len(first):
        return Diagnosis()
    chosen = _part(images, first)
    x, y = to_float(chosen.x[torch.arange(len(first))]), chosen.y
    keys = fold(key(seed, "checks"), chosen.index)
    settings: dict[str, Any] = {"threat": threat, "batch_size": batch_size, "processes": processes}

    log.info("checking for masked gradients on %d images", len(first))
    with isolated(key(seed, "looked at")):  # some networks draw random numbers
        pieces = [
            measured_per_image(network, *some, threat)
            for some in zip(x.split(batch_size), y.split(batch_size), keys.split(batch_size), strict=True)
        ]
    each = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    by_luck = each.pop("by_luck").cpu().numpy()
    measured = {name: _mean(values) for name, values in each.items()}
    measured["random_search_finds_more"] = float((by_luck & standing[first]).mean())

    again = _most_successful(records, roles, clean.columns["index"][:diagnostic_n])
    if again is not None:
        log.info("repeating %s with other random numbers", again)
        left = np.flatnonzero(standing[:diagnostic_n])
        more = 0
        if len(left):
            _, repeated, _ = evaluate(
                network, _part(images, left), {again: suite[again]}, seed=key(seed, "again"),
                folder=folder / "again", **settings,
            )  # fmt: skip
            more = int(repeated[again].columns["fooled"].sum()) if len(repeated.get(again, ())) else 0
        measured["repeating_finds_more"] = more / len(right[:diagnostic_n])

    log.info("planting adversarial examples around %d images", len(first))
    with isolated(key(seed, "plant")):
        planted = plant(network, chosen, threat, seed, batch_size)
    found: dict[str, Any] = {"tried": planted.tried, "problems": len(planted.images)}
    if len(planted.images) >= max(LEAST_PROBLEMS, planted.tried / 2):
        ordered = [*roles.plain, *(name for name in suite if name not in roles.plain)]
        hunters: dict[str, Attack] = {
            name: _Hunter(suite[name])
            for name in ordered
            if name in records and sum(_Hunter(suite[name]).passes(2) or (0, 0)) <= HUNT_PASSES
        }
        _, hunts, _ = evaluate(
            planted.network, planted.images, hunters, seed=key(seed, "hunt"),
            folder=folder / f"planted-{planted.digest}", diagnostic_n=0, **settings,
        )  # fmt: skip
        n = len(planted.images)
        found["found"] = {
            name: int(hunt.columns["fooled"].sum()) / n for name, hunt in hunts.items() if len(hunt)
        }
        with isolated(key(seed, "chance")):
            found["random_success_rate"] = _by_chance(planted.network, planted.images, threat, seed, batch_size)
        missed = 1 - sum(found["found"].values())  # each attack sees only what those before it left
        if found["random_success_rate"] <= TOO_EASY:
            measured["binarization_missed"] = max(0.0, missed)
        if plain := [found["found"].get(name, 0.0) for name in roles.plain if name in hunts]:
            measured["binarization_missed_by_pgd"] = 1 - sum(plain)
    return Diagnosis(len(first), measured, found)


def _by_chance(network: nn.Module, images: Split, threat: Threat, seed: int, batch_size: int) -> float:
    x = to_float(images.x[torch.arange(len(images))])
    keys = fold(key(seed, "chance"), images.index)
    lucky = [
        fooled_by_random_search(network, some, y, own, threat)
        for some, y, own in zip(
            x.split(batch_size), images.y.split(batch_size), keys.split(batch_size), strict=True
        )
    ]
    return torch.cat(lucky).double().mean().item()


@dataclass(frozen=True)
class _Hunter:
    """An attack that steps aside where two classes are too few for it."""

    attack: Attack

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        try:
            return self.attack(model, x, y, keys)
        except (ValueError, IndexError) as error:
            raise NotApplicableError(f"not for two classes: {error}") from error

    def passes(self, classes: int) -> tuple[int, int] | None:
        return self.attack.passes(classes) if hasattr(self.attack, "passes") else None


def _most_successful(
    records: Mapping[str, Record], roles: Roles, compared: npt.NDArray[np.int64]
) -> str | None:
    """The cheapest of the attacks that did best on the images ``compared``, among those that search at all."""
    left = {
        name: 1 - record.columns["fooled"][np.isin(record.columns["index"], compared)].mean()
        for name, record in records.items()
        if len(record)
        and record.forwards
        and name not in roles.single_step
        and np.isin(record.columns["index"], compared).any()
    }
    if not left:
        return None
    near = [name for name in left if left[name] <= min(left.values()) + NEAR_BEST]
    return min(near, key=lambda name: records[name].forwards + records[name].backwards)


def _fooled_by(records: Mapping[str, Record]) -> npt.NDArray[Any]:
    found = [record.columns["index"][record.columns["fooled"]] for record in records.values() if len(record)]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def _part(images: Split, places: npt.NDArray[np.intp]) -> Split:
    at = torch.from_numpy(places).to(images.y.device)
    x = images.x.subset(at, images.y.device) if isinstance(images.x, FolderPixels) else images.x[at]
    return Split(x, images.y[at], images.index[at])


def _mean(values: Tensor) -> float:
    """The mean of what is not NaN; 0 where nothing says anything."""
    kept = values[values.isfinite()]
    return kept.mean().item() if len(kept) else 0.0
