"""The checks of the network's own code: what blocks gradients, and what no attack sees through."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kwta_exp.activations import KWTA
from kwta_exp.attacks import BPDA, PGD, Attack, Threat
from kwta_exp.data.batches import Split
from kwta_exp.evaluation import Evaluation
from kwta_exp.evaluation.checks import Diagnosis, diagnose, operators
from kwta_exp.evaluation.results import summarise
from kwta_exp.evaluation.verdict import Tried, verdict

LINF = Threat(norm="linf", eps=0.1)


class Leaky(nn.Module):
    """A leaky ReLU by comparison: its gradient tells all."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.1 * x)


class Rounds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 4).round() / 4


class Halves(nn.Module):
    """A detour through NumPy to another shape."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.round(4 * x.detach().numpy()[:, ::2]) / 4)


def measured(part: nn.Module, folder: Path, features: int = 64) -> tuple[Evaluation, Diagnosis]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 64), part, nn.Linear(features, 4)).eval()
    pixels = (torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 255).byte()
    with torch.no_grad():
        y = network(pixels / 255).argmax(1)
    suite: dict[str, Attack] = {
        "pgd": PGD(norm="linf", eps=0.1, steps=10), "bpda": BPDA(norm="linf", eps=0.1, steps=10, restarts=1),
    }  # fmt: skip
    evaluation = Evaluation(network, Split(pixels, y, torch.arange(12)), suite, LINF, folder, batch_size=12)
    return evaluation, diagnose(evaluation, evaluation.run(), 12)


@pytest.mark.parametrize(
    ("part", "blocks"), [(nn.ReLU(), 0), (nn.GELU(), 0), (Leaky(), 0), (Rounds(), 1), (KWTA(0.2), 1)]
)
def test_blocked_gradients_are_found(part: nn.Module, blocks: float, tmp_path: Path) -> None:
    _, diagnosis = measured(part, tmp_path)
    assert diagnosis.measured["operators_block_gradients"] == blocks
    assert diagnosis.measured["parts_not_covered"] == 0


def test_a_part_that_is_not_covered_forbids_a_sound_verdict_and_is_named(tmp_path: Path) -> None:
    evaluation, diagnosis = measured(Halves(), tmp_path, features=32)
    assert diagnosis.measured["parts_not_covered"] == 1
    masking: dict[str, Any] = summarise({}, evaluation, evaluation.run(), diagnosis)["masking"]
    assert masking["gradient_blockers"]["not_covered"] == {"2": "values leave torch, no gradient"}
    (flag,) = [flag for flag in masking["flags"] if flag["check"] == "parts_not_covered"]
    assert flag["meaning"].endswith("(2 (values leave torch, no gradient))")
    assert masking["verdict"] in ("suspect", "masked")


def test_all_else_in_order_the_verdict_is_suspect_and_names_the_part() -> None:
    good = {"gain_over_plain_pgd": 0.0, "binarization_missed": 0.0, "repeating_finds_more": 0.0}
    assert verdict(good, 100, Tried())["verdict"] == "sound"
    doubted = verdict(
        {**good, "parts_not_covered": 1.0}, 100, Tried(), {"parts_not_covered": "encoder (NumPy)"}
    )
    assert doubted["verdict"] == "suspect"
    assert "encoder (NumPy)" in doubted["explanation"]


def test_names_of_what_blocks_gradients() -> None:
    blockers = {
        "layers": 2,
        "operators": {"comparison": 5},
        "smoothed": {"q": "no gradient"},
        "not_covered": {},
    }
    assert operators.named({"gradient_blockers": blockers}) == {
        "parts_not_covered": "",
        "operators_block_gradients": "winner-take-all layer: 2, comparison: 5; q (no gradient)",
    }
    assert operators.named({}) == {}
