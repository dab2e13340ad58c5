"""Whether an attack finds more when it is repeated with other random numbers."""

import logging
from dataclasses import replace

import numpy as np

from kwta_exp.evaluation.checks.base import EVALUATING, Check, Subject, measurement, part
from kwta_exp.evaluation.evaluation import Evaluation
from kwta_exp.evaluation.outcome import Outcome
from kwta_exp.randomness import key

log = logging.getLogger(__name__)

NEAR_BEST = 0.05
"""An attack this close to the most successful one in accuracy may replace it if it is cheaper."""


@measurement(
    Check(
        name="repeating_finds_more",
        threshold=0.01,
        bears_on="worst case",
        source=EVALUATING,
        meaning="the same attack, repeated, fools more images",
        measured="images newly fooled when the cheapest of the most successful attacks is repeated with other"
        " random numbers",
        paired=True,
    )
)
def repeating_finds_more(subject: Subject) -> dict[str, float]:
    """The share of all compared images that a repetition fools for the first time."""
    evaluation, outcome = subject.evaluation, subject.outcome
    name = most_successful(evaluation, outcome)
    if name is None:
        return {}
    log.info("repeating %s with other random numbers", name)
    robust = outcome.robust[: evaluation.diagnostic_n]
    more = 0
    if robust.any():
        repeated = replace(
            evaluation, images=part(evaluation.images, np.flatnonzero(robust)),
            suite={name: evaluation.suite[name]},
            seed=key(evaluation.seed, "again"), folder=evaluation.folder / "repeated", diagnostic_n=None,
            save_images=False, budget=None, search="exact",
        ).run()  # fmt: skip
        more = int(repeated.fooled(name).sum()) if name in repeated.records else 0
    return {"repeating_finds_more": more / len(robust)}


def most_successful(evaluation: Evaluation, outcome: Outcome) -> str | None:
    """The cheapest of the attacks that did best where all ran, among those that search on the network."""
    correct = outcome.clean_correct[: evaluation.diagnostic_n]
    compared = {
        name: 1 - outcome.fooled(name)[: evaluation.diagnostic_n][correct].mean()
        for name, record in outcome.records.items()
        if len(record) and record.forwards and name not in evaluation.roles.single_step and correct.any()
    }
    if not compared:
        return None
    near = [name for name, accuracy in compared.items() if accuracy <= min(compared.values()) + NEAR_BEST]
    records = outcome.records
    return min(near, key=lambda name: records[name].forwards + records[name].backwards)
