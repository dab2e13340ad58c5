"""Our attacks on trained ReLU networks are at least as strong as the libraries', and within one point."""

import os
from functools import partial
from pathlib import Path

import foolbox
import pytest
import torch
from torch import Tensor, nn

from kwta_exp.attacks import APGD, PGD, Threat
from kwta_exp.data.base import Dataset
from kwta_exp.data.batches import TrainingBatches, first_test_images, split_training, to_float
from kwta_exp.data.datasets import Digits, FashionMNIST
from kwta_exp.fields import Norm
from kwta_exp.models import CNN
from kwta_exp.randomness import fold
from kwta_exp.runtime import Runtime
from kwta_exp.training import NaturalTraining
from kwta_exp.training.trainer import Recipe, Trainer

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
    recipe = Recipe(
        NaturalTraining(epochs=epochs),
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        lr_schedule=partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0),
    )
    batches = TrainingBatches(train, 64, 0, False, 0)
    Trainer(model, recipe, batches, val, Runtime(accelerator="cpu").fabric()).train(path, lambda _: None)
    model.eval().requires_grad_(False)
    test = first_test_images(images, 500, CPU)
    x, y = to_float(test.x), test.y
    clean_correct = model(x).argmax(1) == y
    return model, x[clean_correct], y[clean_correct]


SETTINGS: list[tuple[Dataset, int, dict[Norm, float]]] = [
    (Digits(), 12, {"linf": 0.09, "l2": 0.5}),
    (FashionMNIST(root=str(DATA), train_n=10_000), 4, {"linf": 0.03, "l2": 0.5}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("dataset", "epochs", "radii"), SETTINGS, ids=["digits", "fashion_mnist"])
def test_attacks_are_as_strong_as_the_libraries(
    dataset: Dataset, epochs: int, radii: dict[Norm, float], tmp_path: Path
) -> None:
    if not dataset.present():
        pytest.skip("FashionMNIST is not in $KWTA_EXP_DATA")
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

    model, x, y = trained(dataset, epochs, tmp_path / "state.pt")
    keys = torch.arange(len(x))
    theirs = foolbox.attacks
    likeliest = model(x).scatter(1, y[:, None], float("-inf")).argsort(1, descending=True)

    def robust_accuracy(x_adv: Tensor) -> float:
        return 100 * (model(x_adv).argmax(1) == y).double().mean().item()

    def of_foolbox(attack: foolbox.attacks.base.Attack, eps: float) -> float:
        return robust_accuracy(
            attack(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=eps)[1]
        )

    def of_authors(loss: str, norm: Norm, eps: float) -> float:
        """Robust accuracy under the authors' Auto-PGD, from the starting point of ours."""
        apgd = APGDAttack(
            model, n_iter=100, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=0, loss=loss
        )
        apgd.init_hyperparam(x)
        start = Threat(norm=norm, eps=eps).random_point(x, fold(0, keys))
        return robust_accuracy(apgd.attack_single_run(x, y, x_init=start)[3])

    def of_authors_targeted(norm: Norm, eps: float) -> float:
        """The same for targeted Auto-PGD, over three target classes."""
        robust = torch.ones(len(x), dtype=torch.bool)
        apgd = APGDAttack_targeted(
            lambda z: model(z), n_iter=50, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=0
        )
        apgd.init_hyperparam(x)
        for number in range(3):
            apgd.y_target = likeliest[:, number]
            start = Threat(norm=norm, eps=eps).random_point(x, fold(number, keys))
            robust &= model(apgd.attack_single_run(x, y, x_init=start)[3]).argmax(1) == y
        return 100 * robust.double().mean().item()

    for norm, eps in radii.items():
        linf = norm == "linf"
        ours = {
            "FGSM": PGD(norm=norm, eps=eps, steps=1, step_size=eps, random_start=False),
            "MIM": PGD(norm=norm, eps=eps, steps=10, relative_step_size=1.0, random_start=False, momentum=1.0),
            "PGD": PGD(norm=norm, eps=eps, steps=STEPS, random_start=False),
            "APGD": APGD(norm=norm, eps=eps),
            "APGD-DLR": APGD(norm=norm, eps=eps, loss="dlr"),
            "APGD-T": APGD(norm=norm, eps=eps, steps=50, targets=3),
        }
        fgsm = theirs.LinfFastGradientAttack() if linf else theirs.L2FastGradientAttack()
        mim = (
            theirs.LinfMomentumIterativeFastGradientMethod
            if linf
            else theirs.L2MomentumIterativeFastGradientMethod
        )(steps=10, rel_stepsize=0.1)
        pgd = (theirs.LinfPGD if linf else theirs.L2PGD)(
            steps=STEPS, rel_stepsize=2.5 / STEPS, random_start=False
        )
        libraries = {
            "FGSM": of_foolbox(fgsm, eps),
            "MIM": of_foolbox(mim, eps),
            "PGD": of_foolbox(pgd, eps),
            "APGD": of_authors("ce", norm, eps),
            "APGD-DLR": of_authors("dlr", norm, eps),
            "APGD-T": of_authors_targeted(norm, eps),
        }
        pairs = {
            name: (robust_accuracy(attack(model, x, y, keys)), libraries[name]) for name, attack in ours.items()
        }
        for name, (mine, library) in pairs.items():
            setting = f"{type(dataset).__name__} {norm} eps {eps}, n = {len(x)}"
            print(f"{setting}: {name} {mine:.2f}%, library {library:.2f}%")
            assert 20 <= library <= 80, "expected an eps at which attacks differ"
            assert abs(mine - library) <= 1
            assert mine <= library
