"""The networks of finished runs side by side, with test images for a look at them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kwta_exp.attacks import Threat
from kwta_exp.config import build, plain, user_errors
from kwta_exp.data.base import Images
from kwta_exp.data.batches import first_test_images, to_float
from kwta_exp.draw.style import SHOWN_AS
from kwta_exp.errors import UserError
from kwta_exp.parts import planned_network
from kwta_exp.plan import Plan, plan_to_judge
from kwta_exp.report.runs import Run
from kwta_exp.run_folder import run_of

MANY = 1000
"""Test images that are looked at, at most."""


@dataclass(frozen=True)
class TrainedNetworks:
    """Networks and the images that all of them classify correctly.

    Attributes:
        networks: by names to show, such as ``"k-WTA 0.1, pgd"``, in evaluation mode.
        activations: the option of each, such as ``"kwta"``.
        threat: of the first run.
        test: the first :data:`MANY` test images, float32 ``(M, C, H, W)`` in [0, 1].
        x: the first of these that every network classifies correctly, ``(N, C, H, W)``.
        y: their labels, ``(N,)``.
    """

    networks: dict[str, nn.Module]
    activations: dict[str, str]
    threat: Threat
    test: Tensor
    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, runs: Sequence[Path], n: int, trust: bool) -> "TrainedNetworks":
        """Read them.

        Args:
            runs: their folders.
            n: the number of images in ``x``.
            trust: build any class that the folders name.

        Raises:
            UserError: for a run that is not finished or cannot be built, for runs on different data, or if
                fewer than ``n`` images are classified correctly by all.
        """
        runs = [run_of(run) for run in runs]
        if len(set(runs)) < len(runs):
            raise UserError("RUN_FOLDER: the same run is given twice; expected different runs")
        with user_errors():
            plans = {run: plan_to_judge(run, ["suite=none"], None, trust) for run in runs}
            images, _ = same_data(plans)
            names = _names(plans)
            first = next(iter(plans.values()))
            device = first.runtime.launch().device
            threat = build(first.cfg, "threat", Threat)
            networks = {
                names[run]: planned_network(plan, images).eval().requires_grad_(False).to(device)
                for run, plan in plans.items()
            }
        split = first_test_images(images, MANY, device)
        test = to_float(torch.cat([batch.x for batch in split.batches(256, 0)]))
        right = torch.ones_like(split.y, dtype=torch.bool)
        with torch.no_grad():
            for network in networks.values():
                logits = torch.cat([network(part) for part in test.split(256)])
                right &= logits.argmax(1) == split.y
        if int(right.sum()) < n:
            raise UserError(
                f"--images {n}: only {int(right.sum())} of {len(test)} test images are classified correctly by"
                " all of these networks"
            )
        activations = {names[run]: plan.chosen["activation"] for run, plan in plans.items()}
        return cls(networks, activations, threat, test, test[right][:n], split.y[right][:n])


def same_data(plans: Mapping[Path, Plan] | Mapping[str, Plan]) -> tuple[Images, str]:
    """The data that all runs use, and its fingerprint.

    Raises:
        UserError: if they differ.
    """
    fingerprints = {plan.dataset.fingerprint(): str(name) for name, plan in plans.items()}
    if len(fingerprints) > 1:
        raise UserError(f"{', '.join(fingerprints.values())}: use different data; expected the same data")
    return next(iter(plans.values())).dataset.load(), next(iter(fingerprints))


def _names(plans: Mapping[Path, Plan]) -> dict[Path, str]:
    """A name for each: its activation, ratio and training; with the folder's name where two are the same."""
    found: dict[Path, str] = {}
    for run, plan in plans.items():
        activation = plan.chosen["activation"]
        ratio = plain(plan.cfg, "activation").get("ratio")
        parts = [SHOWN_AS.get(activation, activation), "" if ratio is None else f"{ratio:g}"]
        training = Run.read(run).settings.get("training", "")
        found[run] = ", ".join(filter(None, (" ".join(filter(None, parts)), training)))
    names = list(found.values())
    return {
        run: name if names.count(name) == 1 else f"{name}, {run.resolve().name}" for run, name in found.items()
    }
