"""Networks that answer at random: found, judged by the share of draws that err, searched by mean answers."""

import torch
from torch import Tensor, nn

from kwta_exp.attacks.base import with_fewer
from kwta_exp.evaluation.judge import Answers, Judge, Judgement
from kwta_exp.randomness import isolated, key

RANDOM_LOGITS = 1e-3
"""A relative difference of two answers to the same image that rounding does not explain."""

LOOKED_AT, SEEDS = 8, 6
"""Images that are asked, and how often."""

SEARCH_DRAWS = 4
"""Answers whose mean attacks see first."""

_TIE = 1e-6


def differ(one: Tensor, other: Tensor) -> Tensor:
    """Which of two answers ``(N, K)`` to the same images differ by more than rounding, bool ``(N,)``."""
    size = one.abs().amax(1).clamp_min(1e-12)
    return (one - other).abs().amax(1) > RANDOM_LOGITS * size


@torch.no_grad()
def is_random(network: nn.Module, x: Tensor) -> bool:
    """Whether the network gives an image of ``x`` different answers under :data:`SEEDS` seeds.

    Fewer images are asked where memory runs out.
    """

    def asked(x: Tensor) -> bool:
        first: Tensor | None = None
        for draw in range(SEEDS):
            with isolated(key(0, "is it random?", draw)):
                answer: Tensor = network(x)
            if first is not None and differ(first, answer).any():
                return True
            first = answer if first is None else first
        return False

    return with_fewer(asked, x[:LOOKED_AT])


def judge_for(network: nn.Module, x: Tensor, batch_size: int, draws: int, seed: int) -> Judge:
    """The judge of a network: of its answers, or of ``draws`` of them if it answers at random.

    Args:
        network: images to logits.
        x: some of its images.
        batch_size: of the judge.
        draws: answers to each image.
        seed: of these draws.
    """
    return (
        RandomJudge(network, batch_size, draws, seed)
        if is_random(network, x[:batch_size])
        else Judge(network, batch_size)
    )


class RandomJudge(Judge):
    """A judge of a random network: an image is misclassified if most of its draws err.

    The draws are a function of the seed, the place of an image in its batch, and which look it is, so judging
    again finds the same. An error counts if most draws of a second look err too.

    Args:
        network: images ``(N, C, H, W)`` in [0, 1] to logits.
        batch_size: of the padded batches.
        draws: answers to each image, at each look.
        seed: of the draws.
    """

    def __init__(self, network: nn.Module, batch_size: int, draws: int, seed: int) -> None:
        super().__init__(network, batch_size)
        self.draws = draws
        self.seed = seed

    def __call__(self, x: Tensor, y: Tensor) -> Judgement:
        """Classify ``x`` and confirm the errors."""
        answers = self.answers(x, y)
        assert answers.errors is not None
        wrong = 2 * answers.errors > self.draws
        confirmed = wrong.clone()
        if wrong.any():
            again = self._errors(self._draws(x[wrong], look=1), y[wrong])
            confirmed[wrong] = 2 * again > self.draws
        return Judgement(answers.logits, wrong, confirmed, answers.errors)

    def answers(self, x: Tensor, y: Tensor) -> Answers:
        """Shares of the draws in place of logits: the label's own, and all errors at the most frequent one.

        So the prediction is wrong exactly where most draws err, and the margin is the share of draws that err
        minus the share of the others.
        """
        predictions = self._draws(x, look=0)
        errors = self._errors(predictions, y)
        classes = self.logits(x[:1]).shape[1]
        votes = torch.zeros(len(x), classes, device=x.device)
        for drawn in predictions:
            votes.scatter_add_(1, drawn[:, None], torch.ones(len(x), 1, device=x.device))
        others = votes.scatter(1, y[:, None], -1.0).argmax(1)
        share = errors.float() / self.draws
        logits = torch.zeros_like(votes)
        logits.scatter_(1, others[:, None], share[:, None])
        logits.scatter_(1, y[:, None], (1 - share + _TIE)[:, None])
        return Answers(logits, errors)

    def _padded(self, x: Tensor, size: int) -> Tensor:
        """No padding: what rounding decides is nothing beside what the draws do."""
        return super()._padded(x, len(x))

    def _draws(self, x: Tensor, look: int) -> list[Tensor]:
        """The class of each image ``(N,)`` in each draw; a NaN is an error, and counts for the last class."""
        drawn = []
        for draw in range(self.draws):
            with isolated(key(self.seed, "judge", look, draw)):
                logits = self.logits(x)
            drawn.append(torch.where(logits.isnan().any(1), logits.shape[1] - 1, logits.argmax(1)))
        return drawn

    @staticmethod
    def _errors(predictions: list[Tensor], y: Tensor) -> Tensor:
        return torch.stack([(each != y).long() for each in predictions]).sum(0)


class MeanAnswer(nn.Module):
    """The mean of the logits of a random network over several draws: what attacks see of it.

    Gradients of the mean are expectations over transformations (Athalye, Engstrom, Ilyas and Kwok,
    "Synthesizing Robust Adversarial Examples", ICML 2018), and no attack stops at one lucky draw.

    Args:
        network: images to logits, another answer at each call.
        draws: how many calls each answer takes.
    """

    def __init__(self, network: nn.Module, draws: int) -> None:
        super().__init__()
        self.network = network
        self.draws = draws
        self.train(network.training)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.network(x)
        for _ in range(self.draws - 1):
            total = total + self.network(x)
        return total / self.draws
