"""One chunk of images under one attack."""

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from kwta_exp.attacks.base import MicroBatches
from kwta_exp.attacks.losses import margin
from kwta_exp.data.batches import Split, to_float
from kwta_exp.errors import UserError
from kwta_exp.evaluation.judge import Answers, Judge, misclassified, predicted
from kwta_exp.evaluation.query_counter import QueryCounter
from kwta_exp.evaluation.random_networks import LOOKED_AT, SEARCH_DRAWS, MeanAnswer, judge_for
from kwta_exp.evaluation.records import Column
from kwta_exp.failures import first_line, is_of_the_machine, is_out_of_memory
from kwta_exp.models.proxy import proxy_for
from kwta_exp.randomness import fold, isolated, key
from kwta_exp.storage import image_digests

if TYPE_CHECKING:
    from kwta_exp.evaluation.evaluation import Evaluation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Networks:
    """What a process works with: the judge, and the network that attacks see.

    Attributes:
        judge: of all that attacks return.
        searched: what attacks search on first: ``exact``, a proxy, or the mean of a few answers.
        exact: the network; the mean of as many answers as the judge looks at, if it is random.
    """

    judge: Judge
    searched: nn.Module
    exact: nn.Module

    @classmethod
    def of(cls, evaluation: "Evaluation") -> "Networks":
        """The network itself, or a proxy for a fast search; of a random one the mean answer."""
        network, images = evaluation.network, evaluation.images
        some = to_float(images.x[torch.arange(min(LOOKED_AT, len(images)), device=images.y.device)])
        judge = judge_for(network, some, evaluation.batch_size, evaluation.draws, evaluation.seed)
        proxy = network if evaluation.search == "exact" else proxy_for(network, some[:2])
        if judge.draws == 1:
            return cls(judge, proxy, network)
        few = min(SEARCH_DRAWS, judge.draws)
        return cls(judge, MeanAnswer(proxy, few), MeanAnswer(network, judge.draws))


@dataclass(frozen=True)
class ChunkResult:
    """The rows of one chunk, the adversarial images, and their cost."""

    rows: dict[str, Column]
    x_adv: Tensor
    forwards: int
    backwards: int
    seconds: float


def batch_size_for(searched: nn.Module, evaluation: "Evaluation") -> int:
    """The most images in one call of an attack: all draws of a gradient are in memory at once."""
    return max(1, evaluation.batch_size // int(getattr(searched, "draws", 1)))


def attack_chunk(evaluation: "Evaluation", networks: Networks, name: str, chunk: Tensor) -> ChunkResult:
    """Attack the images at positions ``chunk`` with the attack called ``name`` and judge what it returns.

    An attack that searched on a proxy, or on the mean of few answers of a random network, may have fooled that
    alone, and stopped there. Such images are attacked again, on the network itself or the mean of many answers.

    Raises:
        NotApplicableError: from the attack.
        UserError: if the attack fails or returns something other than images, naming it.
    """
    result, stopped = _attack(evaluation, networks, networks.searched, name, chunk)
    robust = torch.from_numpy(~result.rows["fooled"]).nonzero()[:, 0].to(chunk.device)
    final = networks.searched is networks.exact or (
        evaluation.suite[name].sees_single_answers and networks.judge.draws > 1
    )
    if final or not len(robust):
        return result
    with isolated(key(evaluation.seed, "claimed", name, int(chunk[0]))):
        batches = MicroBatches(networks.searched, batch_size_for(networks.searched, evaluation))
        logits = batches.logits(result.x_adv[robust])
    stopped = stopped[robust] | misclassified(logits, evaluation.images.y[chunk[robust]])
    again = robust[stopped]
    if not len(again):
        return result
    second, _ = _attack(evaluation, networks, networks.exact, name, chunk[again])
    index = again.cpu().numpy()
    for column in ("queries", "steps"):
        second.rows[column] += result.rows[column][index]
    for column, values in second.rows.items():
        result.rows[column][index] = values
    result.x_adv[again] = second.x_adv
    return ChunkResult(
        result.rows, result.x_adv, result.forwards + second.forwards, result.backwards + second.backwards,
        result.seconds + second.seconds,
    )  # fmt: skip


def _attack(
    evaluation: "Evaluation", networks: Networks, searched: nn.Module, name: str, chunk: Tensor
) -> tuple[ChunkResult, Tensor]:
    """The result, and the images ``(N,)`` that the attack saw ``searched`` misclassify inside the threat.

    A chunk for which memory runs out is attacked in halves. An attack that is not ``independent`` then draws
    other random numbers, so its outcomes may differ from those of the whole chunk; each is judged all the
    same.
    """
    try:
        return _attack_at_once(evaluation, networks, searched, name, chunk)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(chunk) == 1:
            raise UserError(
                f"attack.{name}: not enough memory for a single image ({first_line(error)}); expected more"
                f" memory, or less than evaluation.batch_size={evaluation.batch_size} in one call"
            ) from error
    log.warning("attack.%s: not enough memory for %d images at once; attacking half as many", name, len(chunk))
    halves = [_attack(evaluation, networks, searched, name, half) for half in chunk.tensor_split(2)]
    (first, _), (second, _) = halves
    joined = ChunkResult(
        {column: np.concatenate([values, second.rows[column]]) for column, values in first.rows.items()},
        torch.cat([first.x_adv, second.x_adv]), first.forwards + second.forwards,
        first.backwards + second.backwards, first.seconds + second.seconds,
    )  # fmt: skip
    return joined, torch.cat([stopped for _, stopped in halves])


def _attack_at_once(
    evaluation: "Evaluation", networks: Networks, searched: nn.Module, name: str, chunk: Tensor
) -> tuple[ChunkResult, Tensor]:
    images, threat = evaluation.images, evaluation.threat
    x, y = to_float(images.x[chunk]), images.y[chunk]
    keys = fold(key(evaluation.seed, "attack", name), images.index[chunk])
    attack = evaluation.suite[name]
    if attack.sees_single_answers and networks.judge.draws > 1:
        searched = evaluation.network  # and not a proxy of it: it is attacked once
    counter = QueryCounter(searched, x, y, threat)
    started = time.monotonic()
    try:
        with isolated(int(keys.sum())):  # for attacks and networks that draw from global generators
            returned = attack(counter, x.clone(), y, keys, batch_size_for(searched, evaluation))
        if not isinstance(returned, Tensor) or returned.shape != x.shape:
            raise ValueError(
                f"returned {getattr(returned, 'shape', type(returned).__name__)};"
                f" expected images {tuple(x.shape)}"
            )
    except (ValueError, TypeError, RuntimeError, LookupError, AssertionError) as error:
        if is_of_the_machine(error):
            raise
        raise UserError(f"attack.{name}: {type(error).__name__}: {error}") from error

    with torch.no_grad(), isolated(~int(keys.sum())):
        x_adv = returned.detach().to(x)
        x_adv = threat.project(torch.where(x_adv.isfinite(), x_adv, x), x)
        judged = networks.judge(x_adv, y)
        rows = {
            **rows_of(images, chunk, Answers(judged.logits, judged.errors), networks.judge.draws),
            "fooled": judged.confirmed.cpu().numpy(),
            "unconfirmed": (judged.misclassified & ~judged.confirmed).cpu().numpy(),
            "distance": threat.distance(x_adv, x).cpu().numpy(),
            "queries": counter.queries.cpu().numpy(),
            "steps": counter.steps.cpu().numpy(),
            "key": keys.cpu().numpy(),
        }
    seconds = time.monotonic() - started
    return ChunkResult(rows, x_adv, counter.forwards, counter.backwards, seconds), counter.fooled


def rows_of(images: Split, chunk: Tensor, answers: Answers, draws: int) -> dict[str, Column]:
    """The identity of a chunk's images and their predictions."""
    labels, logits = images.y[chunk], answers.logits
    random = {}
    if answers.errors is not None:
        random = {"errors": answers.errors.cpu().numpy(), "draws": np.full(len(chunk), draws)}
    return {
        "index": images.index[chunk].cpu().numpy(),
        "digest": image_digests(images.x[chunk].cpu().numpy()),
        "label": labels.cpu().numpy(),
        "prediction": predicted(logits).cpu().numpy(),
        "margin": margin(logits, labels).cpu().numpy(),
        **random,
    }
