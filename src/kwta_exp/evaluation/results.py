"""From an outcome to ``results.json``: accuracies with intervals, the worst case, and the verdict."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kwta_exp.data.batches import to_float
from kwta_exp.evaluation.checks import Diagnosis, compare, diagnose, operators
from kwta_exp.evaluation.evaluation import Evaluation
from kwta_exp.evaluation.outcome import Outcome
from kwta_exp.evaluation.ranks import Ranks
from kwta_exp.evaluation.records import Record
from kwta_exp.evaluation.verdict import MIN_QUERIES, Tried, verdict

SCHEMA = 1


def evaluate(
    evaluation: Evaluation, run: Mapping[str, Any], checks_n: int, ranks: Ranks | None = None
) -> dict[str, Any]:
    """Attack, check, and summarise.

    Args:
        evaluation: what to attack with what.
        run: the ``run`` part of the results.
        checks_n: images on which to check for masked gradients; 0 for none.
        ranks: the processes of the run, if there are several; this is the first of them.

    Raises:
        UserError: if an attack fails, naming it.
    """
    outcome = evaluation.run(ranks)
    checked = checks_n and outcome.records
    diagnosis = diagnose(evaluation, outcome, checks_n) if checked else Diagnosis()
    return summarise(run, evaluation, outcome, diagnosis)


def summarise(
    run: Mapping[str, Any], evaluation: Evaluation, outcome: Outcome, diagnosis: Diagnosis | None = None
) -> dict[str, Any]:
    """The content of ``results.json`` (documented in ``docs/reference.md``).

    Args:
        run: the ``run`` part: name, seed, command and the like.
        evaluation: what was evaluated.
        outcome: what it found.
        diagnosis: what the checks measured.

    An attack's own ``robust_accuracy`` is over the first ``diagnostic_n`` images, since of the others it saw
    only robust ones; ``cumulative`` and the worst case are over all n.

    ``worst_case.by`` gives each attack the share of the n images that it was the first in the suite's order to
    fool, so that clean accuracy minus these shares is the worst case.

    Of a random network an image counts as right unless most draws err; ``over_draws`` has the mean over images
    and draws beside, of the worst of the attacks for each image.
    """
    diagnosis = diagnosis or Diagnosis()
    images = evaluation.images
    few = to_float(images.x[torch.arange(min(2, len(images)), device=images.y.device)])
    threat, first = evaluation.threat, slice(evaluation.diagnostic_n)
    robust = correct = outcome.clean_correct
    by: dict[str, float] = {}
    per_attack: dict[str, Any] = {}
    for name, record in outcome.records.items():
        fooled = outcome.fooled(name)
        by[name] = float(np.mean(robust & fooled))
        robust = robust & ~fooled
        per_attack[name] = {
            **_accuracy((correct & ~fooled)[first], "robust_accuracy"),
            **_over_draws(outcome.share_right([name]), first),
            "cumulative": float(np.mean(robust)),
            "eps": threat.eps,
            "norm": threat.norm,
            "forwards": record.forwards,
            "backwards": record.backwards,
            "seconds": round(record.seconds, 3),
            **evaluation.suite[name].details(evaluation.network, few),
        }
    worst_case = None
    if outcome.records:
        over_draws = _over_draws(outcome.share_right(outcome.records))
        worst_case = {**_accuracy(robust, "robust_accuracy"), **over_draws, "by": by}
    measured = {**compare(evaluation, outcome), **diagnosis.measured}
    tried = Tried(
        attacks=bool(outcome.records),
        baseline_pgd=any(name in outcome.records for name in evaluation.roles.baseline_pgd),
        without_gradient=any(map(_searches_without_gradient, outcome.records.values())),
        checks=diagnosis.n > 0,
    )
    return {
        "schema": SCHEMA,
        "run": dict(run),
        "threat": {"norm": threat.norm, "eps": threat.eps},
        "clean": {**_accuracy(correct, "accuracy"), **_over_draws(outcome.share_right([]))},
        "attacks": per_attack,
        "worst_case": worst_case,
        "inapplicable": dict(outcome.inapplicable),
        "masking": {
            **verdict(measured, len(correct[first]), tried, operators.named(diagnosis.details)),
            "checks_n": diagnosis.n,
            **diagnosis.details,
        },
    }


def _searches_without_gradient(record: Record) -> bool:
    """Whether an attack spent enough queries, and no gradients; a transferred one spends none."""
    if not len(record) or record.backwards or not record.forwards:
        return False
    queries = record.columns["queries"][~record.columns["fooled"]]
    return len(queries) == 0 or int(queries.min()) >= MIN_QUERIES


def _accuracy(correct: npt.NDArray[np.bool_], name: str) -> dict[str, Any]:
    count, n = int(correct.sum()), len(correct)
    return {name: count / n, "n": n, "ci95": list(wilson(count, n))}


def _over_draws(
    share_right: npt.NDArray[np.float64] | None, first: slice | None = None
) -> dict[str, dict[str, Any]]:
    """The mean over images and draws; nothing for a network that is not random.

    The interval is that of as many images which are all right or all wrong: it is too wide if anything, since
    a share of draws varies less.
    """
    if share_right is None:
        return {}
    shares = share_right[first or slice(None)]
    mean, n = float(shares.mean()), len(shares)
    low = wilson(math.floor(mean * n), n)[0]
    high = wilson(math.ceil(mean * n), n)[1]
    return {"over_draws": {"accuracy": mean, "ci95": [low, high]}}


def wilson(count: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of the share ``count / n``."""
    from scipy.stats import binomtest  # slow to import

    interval = binomtest(count, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
