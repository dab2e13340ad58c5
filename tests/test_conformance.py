"""Ours against the libraries' on trained ReLU networks: the same accuracy, and ours not the weaker."""

import os
from functools import partial
from pathlib import Path

import foolbox
import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from kwta_exp.attacks import APGD, PGD, Threat
from kwta_exp.data.base import Dataset
from kwta_exp.data.batches import TrainingBatches, first_test_images, split_training, to_float
from kwta_exp.data.datasets import Digits, FashionMNIST
from kwta_exp.fields import Norm
from kwta_exp.models import CNN
from kwta_exp.randomness import fold
from kwta_exp.training import NaturalTraining
from kwta_exp.training.fit import fit
from kwta_exp.training.sparsity import Constant

CPU = torch.device("cpu")
DATA = Path(os.environ.get("KWTA_EXP_DATA", "data"))
STEPS = 40


def trained(dataset: Dataset, epochs: int, path: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """A ReLU network, and the test images that it classifies correctly."""
    images = dataset.load()
    torch.manual_seed(0)
    model = CNN(
        nn.ReLU,
        channels=[16, 16, 32, 32],
        hidden=100,
        num_classes=10,
        in_channels=1,
        image_size=images.image_size,
    )
    train, val = split_training(images, dataset.train_n, 0.1, 0, CPU)
    fit(model, NaturalTraining(epochs=epochs), TrainingBatches(train, 64, 0, False, 0), val,
        partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0),
        Constant(), Fabric(accelerator="cpu"), path, lambda _: None)  # fmt: skip
    model.eval().requires_grad_(False)
    test = first_test_images(images, 500, CPU)
    x, y = to_float(test.x), test.y
    right = model(x).argmax(1) == y
    return model, x[right], y[right]


SETTINGS: list[tuple[Dataset, int, dict[Norm, float]]] = [
    (Digits(), 12, {"linf": 0.09, "l2": 0.5}),
    (FashionMNIST(root=str(DATA), train_n=10_000), 4, {"linf": 0.03, "l2": 0.5}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("dataset", "epochs", "radii"), SETTINGS, ids=["digits", "fashion_mnist"])
def test_attacks_reach_what_the_libraries_reach(
    dataset: Dataset, epochs: int, radii: dict[Norm, float], tmp_path: Path
) -> None:
    if not dataset.present():
        pytest.skip("FashionMNIST is not in $KWTA_EXP_DATA")
    from pyautoattack.autopgd_base import APGDAttack

    model, x, y = trained(dataset, epochs, tmp_path / "state.pt")
    keys = torch.arange(len(x))

    def left(x_adv: Tensor) -> float:
        return 100 * (model(x_adv).argmax(1) == y).double().mean().item()

    for norm, eps in radii.items():
        theirs = (foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD)(
            steps=STEPS, rel_stepsize=2.5 / STEPS, random_start=False
        )
        _, found, _ = theirs(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=eps)
        apgd = APGDAttack(model, n_iter=100, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=0)
        apgd.init_hyperparam(x)
        start = Threat(norm=norm, eps=eps).random_point(x, fold(0, keys))  # where ours starts
        same_start = apgd.attack_single_run(x, y, x_init=start)[3]
        pgd = PGD(norm=norm, eps=eps, steps=STEPS, random_start=False)
        pairs = {
            "PGD": (left(pgd(model, x, y, keys)), left(found)),
            "APGD": (left(APGD(norm=norm, eps=eps)(model, x, y, keys)), left(same_start)),
        }
        for name, (ours, library) in pairs.items():
            at = f"{type(dataset).__name__} {norm} eps {eps}, n = {len(x)}"
            print(f"{at}: {name} {ours:.2f}%, library {library:.2f}%")
            assert 20 <= library <= 80, "an eps that tells attacks apart"
            assert abs(ours - library) <= 1
            assert ours <= library
