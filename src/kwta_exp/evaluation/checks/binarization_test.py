"""The binarization test: can the attacks find adversarial examples that are known to exist?"""

import logging
from dataclasses import replace

import torch
from torch import Tensor, nn

from kwta_exp.attacks import Attack, NotApplicableError
from kwta_exp.attacks.base import MaxQueries, MicroBatches
from kwta_exp.evaluation.binarized import Binarized, binarize
from kwta_exp.evaluation.checks.base import BINARIZATION, Check, Subject, batches, measurement
from kwta_exp.evaluation.checks.outputs import random_search
from kwta_exp.randomness import fold, key

log = logging.getLogger(__name__)

MIN_PROBLEMS = 8
"""Binarized models without which the test says nothing."""

TOO_EASY = 0.5
"""A random success rate above which success says nothing."""

MAX_QUERIES = 50_000
"""An attack that may take more passes for an image is left out of the test: above all ``nes``."""


@measurement(
    Check(
        name="binarization_missed_by_pgd",
        threshold=0.05,
        bears_on="plain gradients",
        source=BINARIZATION,
        meaning="plain PGD misses adversarial examples that are known to exist",
        measured="adversarial examples of the binarization test that plain PGD misses",
        sign=True,
    ),
    Check(
        name="binarization_missed",
        threshold=0.05,
        bears_on="worst case",
        source=BINARIZATION,
        meaning="the attacks miss adversarial examples that are known to exist",
        measured="adversarial examples of the binarization test that all attacks of the suite miss",
    ),
)
def binarization_test(subject: Subject) -> dict[str, float]:
    """The shares that plain PGD and all attacks together miss; ``details`` has the success rates."""
    evaluation = subject.evaluation
    log.info("making binarized models around %d images", len(subject.images))
    made = binarize(
        evaluation.network, subject.images, evaluation.threat, evaluation.seed, evaluation.batch_size
    )
    details = subject.details["binarization"] = {"tried": made.tried, "problems": len(made.images)}
    if len(made.images) < max(MIN_PROBLEMS, made.tried / 2):
        return {}
    baseline = [name for name in evaluation.roles.baseline_pgd if name in subject.outcome.records]
    names = [*baseline, *(name for name in subject.outcome.records if name not in baseline)]
    attacks: dict[str, Attack] = {name: _OnTwoClasses(evaluation.suite[name]) for name in names}
    cheap = {
        name: attack for name, attack in attacks.items() if sum(attack.max_queries(2) or (0, 0)) <= MAX_QUERIES
    }
    outcome = replace(
        evaluation, network=made.network, images=made.images, suite=cheap, seed=key(evaluation.seed, "hunt"),
        folder=evaluation.folder / f"binarized-{made.digest}", diagnostic_n=0, save_images=False, budget=None,
        search="exact",
    ).run()  # fmt: skip
    rates = {
        name: int(outcome.fooled(name).sum()) / len(made.images)
        for name, record in outcome.records.items()
        if len(record)
    }
    random_rate = _random_success_rate(subject, made)
    details |= {"success_rates": rates, "random_success_rate": random_rate}

    measured = {}
    if any(name in outcome.records for name in baseline):
        measured["binarization_missed_by_pgd"] = 1 - sum(rates.get(name, 0.0) for name in baseline)
    if random_rate <= TOO_EASY:
        # Each attack sees only the problems that no earlier one solved.
        measured["binarization_missed"] = max(0.0, 1 - sum(rates.values()))
    return measured


def _random_success_rate(subject: Subject, made: Binarized) -> float:
    """The share of the problems that random search solves."""
    keys = fold(key(subject.evaluation.seed, "chance"), made.images.index)
    calls = MicroBatches(made.network, subject.evaluation.batch_size)
    solved = [
        random_search(calls, *batch, subject.threat)
        for batch in batches(made.images, keys, subject.evaluation.batch_size)
    ]
    return torch.cat(solved).double().mean().item()


class _OnTwoClasses(Attack):
    """An attack that does not apply if two classes are too few for it."""

    def __init__(self, attack: Attack) -> None:
        self.attack = attack
        self.norm, self.eps = attack.norm, attack.eps

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, max_batch_size: int | None = None
    ) -> Tensor:
        try:
            return self.attack(model, x, y, keys, max_batch_size)
        except (ValueError, IndexError) as error:
            raise NotApplicableError(f"not for two classes: {error}") from error

    def max_queries(self, classes: int) -> MaxQueries | None:
        return self.attack.max_queries(classes)
