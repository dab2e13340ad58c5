"""The binarization test: adversarial examples planted where an attack must find them.

Zimmermann, Brendel, Tramèr and Carlini, "Increasing Confidence in Adversarial Robustness Evaluations",
NeurIPS 2022. An attack that finds nothing may have nothing to find. So around each image a two-class problem is
made on the network's own features: random points of the ball are class 0, one on its edge is class 1, and a
linear readout that tells them apart takes the last layer's place. The point on the edge is then an adversarial
example by construction, and an attack that misses it is led astray by the features.

Where we deviate: half of the class-0 points lie on the edge too, so that how far an image is changed gives
nothing away; and the readout is a weighted ridge regression, the most regularised that separates the two kinds,
so that on an honest network the problem is no harder than it must be. All problems share one network: an image
belongs to the nearest of the images that problems were made around.
"""

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from kwta_exp.attacks import Threat
from kwta_exp.data.batches import Split, to_float
from kwta_exp.evaluation.query_counter import Owners
from kwta_exp.randomness import fold, key

log = logging.getLogger(__name__)

INNER = 999
"""Points of class 0 beside the image itself, as many as in the paper."""

CLOSENESS = 0.999
"""Where the boundary lies on the way from the outermost class-0 point to the planted one, as in the paper: all
but at the latter, so that little is found by luck."""

RIDGES = [10.0**exponent for exponent in range(2, -7, -1)]
"""Regularisations tried, as multiples of the features' mean variance, until the two kinds are apart."""


@dataclass(frozen=True)
class Planted:
    """A network full of planted examples.

    Attributes:
        network: images to two logits; class 0 at the images, class 1 at the planted points.
        images: those that a problem could be made around, all of label 0.
        tried: how many images there were.
        x_planted: the planted points, float32 ``(N, C, H, W)``.
        digest: tells these readouts from others: rounding elsewhere makes other problems.
    """

    network: nn.Module
    images: Split
    tried: int
    x_planted: Tensor
    digest: str


def plant(network: nn.Module, images: Split, threat: Threat, seed: int, batch_size: int) -> Planted:
    """Plant one example at the edge of the ball around each of ``images``.

    An image is left out where no readout separates its planted point, or not in float32, or where features are
    not finite.

    Args:
        network: frozen, in eval mode. The inputs of its last linear layer are the features, or else its logits.
        images: any, whatever their class.
        threat: the ball.
        seed: of the points.
        batch_size: images sent through the network at once.
    """
    x = to_float(images.x[torch.arange(len(images), device=images.y.device)])
    layer = last_linear(network, x[:1])
    problem = Problem(network, layer, Owners(x, threat))
    weights, thresholds, planted = [], [], []
    keys = fold(key(seed, "planted"), images.index)
    for i in range(len(x)):
        image = x[i : i + 1]
        streams = fold(int(keys[i]), torch.arange(INNER + 1, device=x.device))
        inside, at_edge = streams[: INNER // 2], streams[INNER // 2 : INNER]
        inner = chain(
            (
                threat.random_point(image.expand(len(some), *image.shape[1:]), some)
                for some in inside.split(batch_size)
            ),
            (threat.random_edge_point(image, some) for some in at_edge.split(batch_size)),
        )
        edge = threat.random_edge_point(image, streams[INNER:])
        features, lead = problem.features(chain([image], inner, [edge]), batch_size)
        if not features.isfinite().all() or not lead.isfinite():
            weight, threshold = torch.zeros_like(features[0]).double(), lead.new_zeros(())  # holds nothing
        else:
            weight, threshold = readout(features.double(), lead)
        weights.append(weight)
        thresholds.append(threshold)
        planted.append(edge)
    problem.attach(torch.stack(weights).float(), torch.stack(thresholds).float())

    x_planted = torch.cat(planted)
    with torch.no_grad():
        holds = (problem(x).argmax(1) == 0) & (problem(x_planted).argmax(1) == 1)
    kept = problem.only(holds)
    at = holds.nonzero()[:, 0]
    split = Split(images.x[at], torch.zeros_like(images.y[at]), images.index[at])
    readouts = torch.cat([kept.weights.flatten(), kept.thresholds]).cpu().numpy().tobytes()
    digest = hashlib.sha256(readouts).hexdigest()[:10]
    return Planted(kept.eval().requires_grad_(False), split, len(x), x_planted[at], digest)


def readout(features_MF: Tensor, own_margin: Tensor) -> tuple[Tensor, Tensor]:
    """Weights ``(F,)`` and threshold of the readout that tells the last row from all before it.

    The score less the threshold is scaled to ``-own_margin`` at the first row, the image, so that the
    losses of the new problem saturate as the network's own do. Where no regularisation separates the
    rows the last one's answer is returned, and does not hold.
    """
    inner = len(features_MF) - 1
    target = torch.full_like(features_MF[:, 0], -1.0)
    target[-1] = 1.0
    root = torch.ones_like(target)
    root[-1] = inner**0.5  # both kinds weigh the same

    share = root.square() / root.square().sum()
    rows = root[:, None] * (features_MF - share @ features_MF)
    wanted = root * (target - share @ target)
    wide = rows.shape[1] > rows.shape[0]
    gram = rows @ rows.T if wide else rows.T @ rows
    values, vectors = torch.linalg.eigh(gram)
    right = vectors.T @ (wanted if wide else rows.T @ wanted)
    mean_variance = values.clamp_min(0).sum() / rows.shape[1]

    for ridge in RIDGES:
        solution = vectors @ (right / (values.clamp_min(0) + ridge * mean_variance + 1e-300))
        weight = rows.T @ solution if wide else solution
        score = features_MF @ weight
        outermost, planted = score[:-1].max(), score[-1]
        if planted - outermost > 1e-3 * score[:-1].std():
            break
    threshold = outermost + CLOSENESS * (planted - outermost)
    scale = own_margin / (threshold - score[0]).clamp_min(1e-12)
    return weight * scale, threshold * scale


def own_margin(logits_K: Tensor) -> Tensor:
    """The lead of the largest logit, or 1 where there is none."""
    first, second = logits_K.double().topk(2).values
    lead = first - second
    return torch.where(lead > 0, lead, torch.ones_like(lead))


def last_linear(network: nn.Module, x: Tensor) -> nn.Module | None:
    """The last linear layer that ``network`` runs, if its input is one row of features an image.

    It is not enough that it is a layer of the network: whatever comes behind it, be it a scale or a noise
    that belongs to a defence, stays behind the readout too.
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
    """Whether two logits in the place of the layer's arrive as two logits at the network's end."""
    handle = layer.register_forward_hook(lambda _, inputs, output: output[:, :2])
    try:
        with torch.no_grad():
            return tuple(network(x).shape) == (len(x), 2)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    finally:
        handle.remove()


class Problem(nn.Module):
    """The network with each image's own readout in its last layer's place."""

    weights: Tensor
    thresholds: Tensor

    def __init__(self, network: nn.Module, layer: nn.Module | None, owners: Owners) -> None:
        super().__init__()
        self.network = network
        self.layer = layer
        self.owners = owners

    def attach(self, weights_NF: Tensor, thresholds_N: Tensor) -> None:
        """Give each owner its readout."""
        self.register_buffer("weights", weights_NF)
        self.register_buffer("thresholds", thresholds_N)

    def only(self, keep: Tensor) -> "Problem":
        """The problems where ``keep``, bool ``(N,)``, alone."""
        smaller = Problem(self.network, self.layer, self.owners.only(keep))
        smaller.attach(self.weights[keep], self.thresholds[keep])
        return smaller

    def forward(self, x: Tensor) -> Tensor:
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

    @torch.no_grad()
    def features(self, pieces: Iterable[Tensor], batch_size: int) -> tuple[Tensor, Tensor]:
        """What the readout sees of images that come in pieces, ``(N, F)``, and the first image's own lead.

        The lead is that of the layer the readout replaces, not of the outputs: what follows may bound them.
        """
        seen: list[Tensor] = []
        logits: list[Tensor] = []

        def look(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            seen.append(inputs[0].clone())
            logits.append(output[:1].clone())

        handle = self.layer.register_forward_hook(look) if self.layer is not None else None
        try:
            for piece in pieces:
                for some in piece.split(batch_size):
                    outputs = self.network(some)
                    if self.layer is None:
                        seen.append(outputs)
                        logits.append(outputs[:1])
        finally:
            if handle is not None:
                handle.remove()
        return torch.cat(seen), own_margin(logits[0][0])
