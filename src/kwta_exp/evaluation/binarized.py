"""Binarized models: two-class problems with an adversarial example that is known to exist.

Zimmermann, Brendel, Tramèr and Carlini, "Increasing Confidence in Adversarial Robustness Evaluations",
NeurIPS 2022. If an attack fails, there may be nothing to find. So a two-class problem is made around each image
on the network's own features: random points of the ball are class 0, one point on its edge is class 1, and a
linear readout that separates them replaces the last layer. The point on the edge is an adversarial example by
construction, and an attack that misses it is misled by the features.

We deviate in two ways. Half of the class-0 points lie on the edge too, so that the distance from the image
gives nothing away. And the readout is a weighted ridge regression, the most regularised one that separates the
two classes, so that on a network with useful gradients the problem is no harder than necessary. All problems
share one network: a query belongs to the nearest of the images that problems were made around.
"""

import hashlib
import logging
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from kwta_exp.attacks import Threat
from kwta_exp.attacks.base import MicroBatches
from kwta_exp.attacks.relaxing import unseen
from kwta_exp.data.batches import Split, to_float
from kwta_exp.evaluation.query_counter import Owners
from kwta_exp.failures import is_of_the_machine
from kwta_exp.randomness import fold, key

log = logging.getLogger(__name__)

CLASS_0_POINTS = 999
"""Points of class 0 beside the image itself, as in the paper."""

CLOSENESS = 0.999
"""Position of the boundary between the outermost class-0 point (0) and the adversarial example (1), as in the
paper: close to the latter, so that random search finds little.
"""

RIDGES = [10.0**exponent for exponent in range(2, -7, -1)]
"""Regularisations to try, as multiples of the features' mean variance, until the classes are separated."""


@dataclass(frozen=True)
class Binarized:
    """The binarized models of some images, as one network.

    Attributes:
        network: images to two logits; class 0 at the images, class 1 at their adversarial examples.
        images: the images that a problem could be made around, all with label 0.
        tried: how many images there were.
        x_adv: the adversarial examples, float32 ``(N, C, H, W)``.
        digest: of the readouts: other rounding makes other problems.
    """

    network: nn.Module
    images: Split
    tried: int
    x_adv: Tensor
    digest: str


def binarize(network: nn.Module, images: Split, threat: Threat, seed: int, batch_size: int) -> Binarized:
    """Make a binarized model around each of ``images``.

    An image is left out if no readout separates its adversarial example in float32, or if features are not
    finite.

    Args:
        network: frozen, in eval mode. The features are the inputs of its last linear layer, or else its logits.
        images: of any class.
        threat: the ball.
        seed: of the points.
        batch_size: the most images in one call of the network.
    """
    x = to_float(images.x[torch.arange(len(images), device=images.y.device)])
    layer = last_linear(network, x[:1])
    problem = BinarizedNetwork(network, layer, Owners(x, threat))
    features_of = _Features(network, layer)
    calls = MicroBatches(features_of, batch_size)
    weights, thresholds, examples = [], [], []
    keys = fold(key(seed, "planted"), images.index)
    for i in range(len(x)):
        image = x[i : i + 1]
        streams = fold(int(keys[i]), torch.arange(CLASS_0_POINTS + 1, device=x.device))
        inside, at_edge = streams[: CLASS_0_POINTS // 2], streams[CLASS_0_POINTS // 2 : CLASS_0_POINTS]
        inner = chain(
            (
                threat.random_point(image.expand(len(some), *image.shape[1:]), some)
                for some in inside.split(batch_size)
            ),
            (threat.random_edge_point(image, some) for some in at_edge.split(batch_size)),
        )
        edge = threat.random_edge_point(image, streams[CLASS_0_POINTS:])
        own = calls.logits(image)
        lead = own_margin(features_of.logits[0])
        features = torch.cat([own, *map(calls.logits, chain(inner, [edge]))])
        if not features.isfinite().all() or not lead.isfinite():
            weight, threshold = torch.zeros_like(features[0]).double(), lead.new_zeros(())  # separates nothing
        else:
            weight, threshold = readout(features.double(), lead)
        weights.append(weight)
        thresholds.append(threshold)
        examples.append(edge)
    problem.attach(torch.stack(weights).float(), torch.stack(thresholds).float())

    x_adv = torch.cat(examples)
    answers = MicroBatches(problem, calls.size)
    separated = (answers.logits(x).argmax(1) == 0) & (answers.logits(x_adv).argmax(1) == 1)
    kept = problem.only(separated)
    index = separated.nonzero()[:, 0]
    split = Split(images.x[index], torch.zeros_like(images.y[index]), images.index[index])
    readouts = torch.cat([kept.weights.flatten(), kept.thresholds]).cpu().numpy().tobytes()
    digest = hashlib.sha256(readouts).hexdigest()[:10]
    return Binarized(kept.eval().requires_grad_(False), split, len(x), x_adv[index], digest)


def readout(features_MF: Tensor, own_margin: Tensor) -> tuple[Tensor, Tensor]:
    """Weights ``(F,)`` and threshold of the readout that separates the last row from all before it.

    The score minus the threshold is scaled to ``-own_margin`` at the first row, the image, so that the losses
    of the new problem saturate as the network's own do. If no regularisation separates the rows, the result of
    the last one is returned.
    """
    inner = len(features_MF) - 1
    target = torch.full_like(features_MF[:, 0], -1.0)
    target[-1] = 1.0
    root = torch.ones_like(target)
    root[-1] = inner**0.5  # both classes weigh the same

    share = root.square() / root.square().sum()
    rows = root[:, None] * (features_MF - share @ features_MF)
    wanted = root * (target - share @ target)
    wide = rows.shape[1] > rows.shape[0]
    gram = rows @ rows.T if wide else rows.T @ rows
    values, vectors = torch.linalg.eigh(gram)
    projected = vectors.T @ (wanted if wide else rows.T @ wanted)
    mean_variance = values.clamp_min(0).sum() / rows.shape[1]

    for ridge in RIDGES:
        solution = vectors @ (projected / (values.clamp_min(0) + ridge * mean_variance + 1e-300))
        weight = rows.T @ solution if wide else solution
        score = features_MF @ weight
        outermost, example = score[:-1].max(), score[-1]
        if example - outermost > 1e-3 * score[:-1].std():
            break
    threshold = outermost + CLOSENESS * (example - outermost)
    scale = own_margin / (threshold - score[0]).clamp_min(1e-12)
    return weight * scale, threshold * scale


def own_margin(logits_K: Tensor) -> Tensor:
    """The lead of the largest logit over the second, or 1 if they are equal."""
    first, second = logits_K.double().topk(2).values
    lead = first - second
    return torch.where(lead > 0, lead, torch.ones_like(lead))


def last_linear(network: nn.Module, x: Tensor) -> nn.Module | None:
    """The last linear layer that ``network`` runs, if its input is one row of features an image.

    Whatever follows it, such as a scale or noise that belongs to a defence, follows the readout too.
    """
    ran: list[tuple[nn.Module, Tensor]] = []
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    handles = [
        m.register_forward_hook(lambda m, inputs, _: ran.append((m, inputs[0] if inputs else x[:0])))
        for m in linears
    ]
    try:
        with torch.no_grad():
            network(x)
    finally:
        for handle in handles:
            handle.remove()
    if not ran or ran[-1][1].dim() != 2 or len(ran[-1][1]) != len(x):
        return None
    layer = ran[-1][0]
    return layer if sum(module is layer for module, _ in ran) == 1 and _takes_two(network, layer, x) else None


def _takes_two(network: nn.Module, layer: nn.Module, x: Tensor) -> bool:
    """Whether the network returns two logits if the layer does."""
    handle = layer.register_forward_hook(lambda _, inputs, output: output[:, :2])
    try:
        with torch.no_grad():
            return tuple(network(x).shape) == (len(x), 2)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if is_of_the_machine(error):
            raise
        return False
    finally:
        handle.remove()


class BinarizedNetwork(nn.Module):
    """The network with each image's own readout instead of its last layer."""

    weights: Tensor
    thresholds: Tensor

    def __init__(self, network: nn.Module, layer: nn.Module | None, owners: Owners) -> None:
        super().__init__()
        self.network = network
        self.layer = layer
        self.owners = owners

    def attach(self, weights_NF: Tensor, thresholds_N: Tensor) -> None:
        """Set the readout of each owner."""
        self.register_buffer("weights", weights_NF)
        self.register_buffer("thresholds", thresholds_N)

    def only(self, keep: Tensor) -> "BinarizedNetwork":
        """The problems where ``keep``, bool ``(N,)``."""
        smaller = BinarizedNetwork(self.network, self.layer, self.owners.only(keep))
        smaller.attach(self.weights[keep], self.thresholds[keep])
        return smaller

    def forward(self, x: Tensor) -> Tensor:
        with unseen():
            owner = self.owners(x)

        def read(features: Tensor) -> Tensor:
            score = (features * self.weights[owner].to(features)).sum(1) - self.thresholds[owner].to(features)
            return torch.stack([-score / 2, score / 2], dim=1)

        if self.layer is None:
            return read(self.network(x))
        handle = self.layer.register_forward_hook(lambda _, inputs, output: read(inputs[0]))
        try:
            logits: Tensor = self.network(x)
        finally:
            handle.remove()
        return logits


class _Features:
    """The network as a function from images to the features ``(N, F)`` that the readouts weigh.

    Attributes:
        logits: of the last images, at the layer that the readout replaces, because what follows may bound the
            outputs.
    """

    logits: Tensor

    def __init__(self, network: nn.Module, layer: nn.Module | None) -> None:
        self.network = network
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        if self.layer is None:
            self.logits = self.network(x)
            return self.logits
        seen: list[Tensor] = []

        def look(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            seen.append(inputs[0].clone())
            self.logits = output.clone()

        handle = self.layer.register_forward_hook(look)
        try:
            self.network(x)
        finally:
            handle.remove()
        return seen[0]
