"""A run of another device verifies although rounding differs; what rounding does not explain is an error."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from kwta_exp import hardware
from kwta_exp.activations import KWTA
from kwta_exp.data.batches import first_test_images, to_float
from kwta_exp.errors import UserError
from kwta_exp.evaluation.judge import Judge, _without_tf32, misclassified
from kwta_exp.parts import planned_network
from kwta_exp.plan import plan_to_judge
from kwta_exp.sealed import read_arrays, write_arrays
from kwta_exp.storage import read_json
from kwta_exp.verify import _device_for, is_at_rounding, verify
from tests.launched import launch
from tests.stored import forge
from tests.test_whole import QUICK, only


def verify_again(run: Path) -> str:
    (said,) = verify(plan_to_judge(run, [], None, False), run)
    return said


def halfway(judge: Judge, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    """The last image before the class changes on the way from ``x`` to ``x_adv``, each ``(1, C, H, W)``."""
    right, wrong = 0.0, 1.0
    for _ in range(60):
        middle = (right + wrong) / 2
        if misclassified(judge.logits(torch.lerp(x, x_adv, middle)), y).item():
            wrong = middle
        else:
            right = middle
    return torch.lerp(x, x_adv, wrong)


@pytest.fixture(scope="module")
def borderline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which one image that PGD fooled is moved to where rounding decides."""
    outputs = tmp_path_factory.mktemp("outputs")
    usual = [override for override in QUICK if not override.startswith("attack")]
    launch(outputs, *usual, "suite=none", "+attack@attack.pgd=pgd", "attack.pgd.steps=10", "threat.eps=0.3")
    run = only(outputs, "*/s0-*")
    plan = plan_to_judge(run, [], None, False)
    data = plan.dataset.load()
    judge = Judge(planned_network(plan, data).eval(), 16)
    images = first_test_images(data, 40, torch.device("cpu"))
    path = sorted(run.glob("evaluation/*/images/*.npz"))[0]
    saved: dict[str, npt.NDArray[Any]] = read_arrays(path)
    for i, index in enumerate(saved["index"]):
        row = images.index.tolist().index(int(index))
        x, y = to_float(images.x[row : row + 1]), images.y[row : row + 1]
        x_adv = torch.from_numpy(saved["x_adv"][i : i + 1])
        if judge(x_adv, y).confirmed.item() and not misclassified(judge.logits(x), y).item():
            saved["x_adv"][i] = halfway(judge, x, x_adv, y)[0].numpy()
            break
    else:
        raise AssertionError("PGD fooled no image")
    write_arrays(path, saved)
    forge(run)
    return run


@pytest.fixture
def run(borderline: Path) -> Iterator[Path]:
    kept = {path: path.read_bytes() for path in borderline.rglob("*.json")}
    yield borderline
    for path, content in kept.items():
        path.write_bytes(content)


def claim(run: Path, more: int, what: str = "worst_case") -> None:
    """Raise an accuracy in the results by ``more`` images, in all places."""
    for path in (run / "results.json", *run.glob("evaluation/*/results.json")):
        results = json.loads(path.read_text())
        name = "accuracy" if what == "clean" else "robust_accuracy"
        results[what][name] = (round(results[what][name] * 40) + more) / 40
        path.write_text(json.dumps(results))
    forge(run)


def test_an_image_that_rounding_decides_may_differ_and_is_counted(run: Path) -> None:
    said = [verify_again(run)]
    claim(run, 1)
    said.append(verify_again(run))
    differs = "as results.json says but for 1 image whose class rounding decides"
    assert sum(differs in it for it in said) == 1
    assert sum(it.endswith("as results.json says") for it in said) == 1


@pytest.mark.parametrize(("more", "what"), [(2, "worst_case"), (-1, "worst_case"), (1, "clean"), (-1, "clean")])
def test_an_accuracy_that_rounding_does_not_explain_is_an_error(more: int, what: str, run: Path) -> None:
    claim(run, more, what)
    with pytest.raises(UserError, match=r"found clean .*, but results\.json says"):
        verify_again(run)


def test_an_accuracy_of_no_whole_number_of_images_is_an_error(run: Path) -> None:
    for path in (run / "results.json", *run.glob("evaluation/*/results.json")):
        results = json.loads(path.read_text())
        results["worst_case"]["robust_accuracy"] += 0.5 / 40
        path.write_text(json.dumps(results))
    forge(run)
    with pytest.raises(UserError, match=r"but results\.json says"):
        verify_again(run)


class Threshold(nn.Module):
    """The margin of class 0 is a pixel minus a half; or its sign, a discontinuous network."""

    def __init__(self, jumps: bool) -> None:
        super().__init__()
        self.jumps = jumps

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1)[:, 0] - 0.5
        score = torch.where(score >= 0, 1.0, -1.0).to(x) if self.jumps else score
        return torch.stack([score, torch.zeros_like(score), score - 10], 1)


@pytest.mark.parametrize("jumps", [True, False])
def test_rounding_decides_near_the_boundary_alone(jumps: bool) -> None:
    at = torch.tensor([0.5, 0.5 + 5e-7, 0.5 - 5e-7, 0.51, 0.49, 0.9])
    x, y = at[:, None, None, None].expand(-1, 1, 2, 2), torch.zeros(6, dtype=torch.long)
    found = is_at_rounding(Judge(Threshold(jumps), 4), x, y)
    assert found.tolist() == [True, True, True, False, False, False]


def test_rounding_decides_few_images_of_a_k_wta_network() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), KWTA(0.1), nn.Linear(100, 10)).eval()
    x = torch.rand(500, 1, 8, 8)
    assert is_at_rounding(Judge(network, 250), x, network(x).argmax(1)).double().mean() < 0.02


@pytest.mark.parametrize(
    ("recorded", "here", "device"),
    [
        ({"runtime": {"accelerator": "cuda"}}, True, "cuda"),
        ({"runtime": {"accelerator": "cuda"}}, False, "cpu"),
        ({"runtime": {"accelerator": "cpu"}}, True, "cpu"),
        ({"runtime": ["cuda"]}, True, "cpu"),
        (None, True, "cpu"),
        ([], True, "cpu"),
    ],
)
def test_a_run_is_judged_on_the_kind_of_device_it_ran_on_if_it_is_here(
    recorded: object, here: bool, device: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "torch_has_cuda", lambda: here)
    (evaluation,) = (run / "evaluation").iterdir()
    content = read_json(evaluation / "evaluation.json")
    assert content["environment"]["runtime"]["accelerator"] == "cpu"
    (evaluation / "evaluation.json").write_text(json.dumps(content | {"environment": recorded}))
    forge(run)
    assert _device_for(evaluation) == torch.device(device)


def test_the_judge_does_not_round_to_tf32_on_a_gpu() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, True
        with _without_tf32(torch.device("cuda")):
            assert not torch.backends.cudnn.allow_tf32
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
