"""Checks of a network's outputs: probabilities, random answers, and errors at random points."""

import torch
from torch import Tensor

from kwta_exp.attacks import Threat
from kwta_exp.attacks.base import MicroBatches
from kwta_exp.evaluation.checks.base import EVALUATING, OBFUSCATED, Check, Subject, measurement, per_image
from kwta_exp.evaluation.judge import misclassified
from kwta_exp.evaluation.random_networks import differ
from kwta_exp.randomness import fold

DRAWS = 200
"""Random points of each ball, half of them at its corners (or on its sphere)."""


@per_image(
    Check(
        name="outputs_are_probabilities",
        threshold=0.5,
        bears_on="plain gradients",
        source=EVALUATING,
        meaning="the network returns probabilities, on which losses saturate",
        measured="images with outputs that are positive and sum to one",
        sign=True,
    )
)
def outputs_are_probabilities(
    calls: MicroBatches, x: Tensor, y: Tensor, keys: Tensor, threat: Threat
) -> dict[str, Tensor]:
    """Which images have outputs that look like a softmax's."""
    outputs = calls.logits(x)
    probabilities = (outputs >= 0).all(1) & ((outputs.sum(1) - 1).abs() < 1e-3)
    return {"outputs_are_probabilities": probabilities.double()}


@measurement(
    Check(
        name="outputs_are_random",
        threshold=0.0,
        bears_on="worst case",
        source=OBFUSCATED,
        meaning="the network gives different answers to the same image",
        measured="images that get two different answers",
        sign=True,
    )
)
def outputs_are_random(subject: Subject) -> dict[str, float]:
    """The share of images that get two different answers; 1 if the network was judged as random."""
    if subject.outcome.share_right([]) is not None:
        return {"outputs_are_random": 1.0}
    different = [answers_differ(subject.calls, x) for x, _, _ in subject.batches]
    return {"outputs_are_random": torch.cat(different).double().mean().item()}


def answers_differ(calls: MicroBatches, x: Tensor) -> Tensor:
    """Which images get two different answers, bool ``(N,)``."""
    batch_size = calls.size
    one, other = calls.logits(x), calls.logits(x)
    if calls.size != batch_size:  # memory ran out between the two, and another batch size rounds otherwise
        one, other = calls.logits(x), calls.logits(x)
    return differ(one, other)


@measurement(
    Check(
        name="random_search_finds_more",
        threshold=0.0,
        bears_on="worst case",
        source=OBFUSCATED,
        meaning="random points fool images that no attack does",
        measured="images that one of 200 random points fools, and no attack of the suite",
    )
)
def random_search_finds_more(subject: Subject) -> dict[str, float]:
    """The share of the images that random search fools and no attack does."""
    fooled = [random_search(subject.calls, *batch, subject.threat) for batch in subject.batches]
    robust = subject.outcome.robust[subject.positions]
    return {"random_search_finds_more": float((torch.cat(fooled).cpu().numpy() & robust).mean())}


def random_search(calls: MicroBatches, x: Tensor, y: Tensor, keys: Tensor, threat: Threat) -> Tensor:
    """Which images one of :data:`DRAWS` random points of the ball fools, bool ``(N,)``."""
    fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for draw in range(DRAWS):
        point = threat.random_point if draw % 2 == 0 else threat.random_edge_point
        fooled |= misclassified(calls.logits(point(x, fold(2 + draw, keys))), y)
    return fooled
