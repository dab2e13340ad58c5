"""Networks that answer at random: found, judged by their draws, and attacked through mean answers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kwta_exp.attacks import PGD, Attack, AutoAttack, Threat
from kwta_exp.data.batches import Split
from kwta_exp.evaluation import Evaluation, evaluate
from kwta_exp.evaluation.checks import diagnose
from kwta_exp.evaluation.judge import Judge, misclassified
from kwta_exp.evaluation.random_networks import MeanAnswer, RandomJudge, is_random, judge_for

LINF = Threat(norm="linf", eps=0.1)


class Coin(nn.Module):
    """Class 0 where the first pixel is below a uniform draw of its own, else class 1."""

    def forward(self, x: Tensor) -> Tensor:
        score = x[:, 0, 0, 0] - torch.rand(len(x))
        return torch.stack([-score, score, torch.full_like(score, -2.0)], 1)


class Shaken(nn.Module):
    """A linear network with noise that is one for all images of a call."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(16, 3)
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1) + self.noise * torch.randn(16))
        return logits


def coins(shares: list[float]) -> Tensor:
    return torch.tensor(shares)[:, None, None, None].expand(-1, 1, 2, 2).clone()


def some_images(n: int, side: int = 4) -> Split:
    x = (torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(0)) * 255).byte()
    return Split(x, torch.zeros(n, dtype=torch.long), torch.arange(n))


def test_a_network_is_random_if_two_seeds_give_two_answers() -> None:
    x = torch.rand(4, 1, 4, 4)
    assert is_random(Coin(), x)
    assert is_random(Shaken(0.1), x)
    assert not is_random(Shaken(0.0), x)
    assert not is_random(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(16, 3)).eval(), x)
    assert type(judge_for(Shaken(0.0), x, 4, 20, 0)) is Judge


def test_looking_for_randomness_leaves_the_generators_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    is_random(Coin(), coins([0.5]))
    assert torch.equal(torch.rand(2), expected)


def test_the_share_of_errors_is_that_of_the_draws() -> None:
    """The label is 1, so an image of brightness p errs in about 1 - p of the draws."""
    judge = RandomJudge(Coin(), batch_size=8, draws=400, seed=0)
    y = torch.ones(5, dtype=torch.long)
    answers = judge.answers(coins([0.0, 0.2, 0.5, 0.8, 1.0]), y)
    assert answers.errors is not None
    share = answers.errors / 400
    torch.testing.assert_close(share, torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0]), atol=0.1, rtol=0)
    assert share[0] == 1
    assert share[4] == 0
    torch.testing.assert_close(answers.logits[:, 1], 1 - share, atol=1e-5, rtol=0)
    torch.testing.assert_close(answers.logits[:, 0], share, atol=1e-5, rtol=0)


def test_an_image_is_misclassified_exactly_where_most_draws_err() -> None:
    judge = RandomJudge(Coin(), batch_size=16, draws=9, seed=1)
    x, y = coins([i / 15 for i in range(16)]), torch.ones(16, dtype=torch.long)
    judged = judge(x, y)
    assert judged.errors is not None
    assert 0 < judged.misclassified.sum() < 16
    assert torch.equal(judged.misclassified, 2 * judged.errors > 9)
    assert torch.equal(misclassified(judged.logits, y), judged.misclassified)
    assert (judged.confirmed <= judged.misclassified).all()
    assert judged.confirmed[0]


def test_a_tie_is_no_error() -> None:
    logits = RandomJudge(Coin(), batch_size=4, draws=2, seed=0)
    x, y = coins([0.5] * 64), torch.ones(64, dtype=torch.long)
    judged = logits(x, y)
    assert judged.errors is not None
    tied = judged.errors == 1
    assert tied.any()
    assert not judged.misclassified[tied].any()
    assert not misclassified(judged.logits, y)[tied].any()


def test_judging_again_finds_the_same_and_another_seed_something_else() -> None:
    x, y = coins([0.5] * 64), torch.ones(64, dtype=torch.long)
    one, again, other = (RandomJudge(Coin(), 16, 5, seed)(x, y).errors for seed in (0, 0, 1))
    assert one is not None
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_mean_answer_averages_calls_of_their_own() -> None:
    x = torch.rand(3, 1, 4, 4)
    network = Shaken(1.0)
    mean = MeanAnswer(network, draws=400)(x)
    assert (mean - network.linear(x.flatten(1))).abs().max() < 0.2
    assert (network(x) - network.linear(x.flatten(1))).abs().max() > 0.2


def test_a_gradient_of_the_mean_answer_is_the_mean_of_gradients() -> None:
    x = torch.rand(2, 1, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(MeanAnswer(Coin(), 10)(x)[:, 1].sum(), x)
    torch.testing.assert_close(gradient[:, 0, 0, 0], torch.ones(2))


@pytest.fixture
def shaken(tmp_path: Path) -> Evaluation:
    network = Shaken(0.3)
    images = some_images(40)
    with torch.no_grad():
        y = network.linear(images.x.float().flatten(1) / 255).argmax(1)
    suite: dict[str, Attack] = {"pgd": PGD(norm="linf", eps=0.1, steps=5)}
    return Evaluation(network, Split(images.x, y, images.index), suite, LINF, tmp_path, batch_size=40, draws=10)


def test_results_hold_the_majority_and_the_mean_over_draws(shaken: Evaluation) -> None:
    results = evaluate(shaken, {"name": "shaken"}, checks_n=0)
    clean, attack, worst = results["clean"], results["attacks"]["pgd"], results["worst_case"]
    for found in (clean, attack, worst):
        low, high = found["over_draws"]["ci95"]
        assert low <= found["over_draws"]["accuracy"] <= high
    assert 0.5 < clean["over_draws"]["accuracy"] < 1
    assert worst["over_draws"]["accuracy"] < clean["over_draws"]["accuracy"]
    assert worst["robust_accuracy"] < clean["accuracy"]

    outcome = shaken.run()  # from the records
    errors = outcome.clean.columns["errors"]
    assert clean["over_draws"]["accuracy"] == pytest.approx(1 - errors.mean() / 10)
    assert np.array_equal(outcome.clean_correct, 2 * errors <= 10)
    fooled = outcome.records["pgd"].columns
    assert (2 * fooled["errors"][fooled["fooled"]] > 10).all()


def test_every_draw_is_counted(shaken: Evaluation) -> None:
    outcome = shaken.run()
    record = outcome.records["pgd"]
    assert outcome.clean.forwards == 10 * 40
    assert (record.columns["steps"] % 2 == 0).all()  # 4 a step, and 10 where an image is attacked again
    assert record.columns["steps"].max() >= 5 * 4
    assert record.backwards >= record.columns["steps"].sum()


def test_an_image_that_fools_the_mean_of_few_answers_alone_is_attacked_again(tmp_path: Path) -> None:
    """The network errs in 30% of the draws, whatever the image, so the mean of four is easily fooled."""
    calls = []

    class Lucky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            score = 1.0 if torch.rand(()) < 0.7 else -1.5
            return torch.tensor([[score, 0.0, -1.0]]).expand(len(x), 3) + 0 * x.flatten(1).sum(1, keepdim=True)

    class Counting(PGD):
        def __call__(self, model: nn.Module, *images: Tensor, **options: int) -> Tensor:  # type: ignore[override]
            calls.append(model.network.draws)
            return super().__call__(model, *images, **options)

    suite: dict[str, Attack] = {"pgd": Counting(norm="linf", eps=0.1, steps=3)}
    images = some_images(20)
    outcome = Evaluation(Lucky(), images, suite, LINF, tmp_path, batch_size=40, draws=21).run()
    assert calls == [4, 21]
    assert not outcome.fooled("pgd").any()


def test_autoattack_sees_single_answers_and_other_attacks_the_mean(shaken: Evaluation, tmp_path: Path) -> None:
    seen: dict[str, list[type]] = {"aa": [], "pgd": []}

    class Ensemble(AutoAttack):
        def __call__(self, model: nn.Module, *images: Tensor, **options: int) -> Tensor:  # type: ignore[override]
            seen["aa"].append(type(model.network))
            return images[0]

    class Steps(PGD):
        def __call__(self, model: nn.Module, *images: Tensor, **options: int) -> Tensor:  # type: ignore[override]
            seen["pgd"].append(type(model.network))
            return images[0]

    suite: dict[str, Attack] = {"aa": Ensemble(norm="linf", eps=0.1), "pgd": Steps(norm="linf", eps=0.1)}
    replace(shaken, suite=suite, folder=tmp_path / "other").run()
    assert set(seen["aa"]) == {Shaken}
    assert set(seen["pgd"]) == {MeanAnswer}


def test_a_network_judged_as_random_is_never_sound_however_seldom_it_changes(shaken: Evaluation) -> None:
    """The check asks only twice; that the judge saw other answers is enough."""
    outcome = shaken.run()
    shaken.network.noise = 0.0  # type: ignore[assignment]
    assert diagnose(shaken, outcome, 8).measured["outputs_are_random"] == 1


def test_autoattack_sees_the_network_itself_and_no_proxy_if_it_is_random(
    shaken: Evaluation, tmp_path: Path
) -> None:
    seen = []

    class Ensemble(AutoAttack):
        def __call__(self, model: nn.Module, *images: Tensor, **options: int) -> Tensor:  # type: ignore[override]
            seen.append(model.network)
            return images[0]

    suite: dict[str, Attack] = {"aa": Ensemble(norm="linf", eps=0.1)}
    replace(shaken, suite=suite, folder=tmp_path / "fast", search="fast").run()
    assert seen
    assert all(each is shaken.network for each in seen)


def test_a_network_that_is_not_random_has_no_share_of_draws(tmp_path: Path) -> None:
    suite: dict[str, Attack] = {"pgd": PGD(norm="linf", eps=0.1, steps=2)}
    evaluation = Evaluation(Shaken(0.0), some_images(20), suite, LINF, tmp_path, batch_size=20)
    results = evaluate(evaluation, {"name": "still"}, checks_n=0)
    assert "over_draws" not in results["clean"]
    assert "errors" not in evaluation.run().clean.columns
