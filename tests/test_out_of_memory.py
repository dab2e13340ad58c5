"""Nothing is scored by running out of memory or by an error of the GPU: the batch shrinks, or the run stops."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kwta_exp.attacks import PGD, Attack, CallableAttack, Threat, as_attack
from kwta_exp.attacks.base import MicroBatches
from kwta_exp.config import user_errors
from kwta_exp.data.batches import Split
from kwta_exp.errors import UserError
from kwta_exp.evaluation import Evaluation, Outcome
from kwta_exp.evaluation.binarized import binarize, last_linear
from kwta_exp.evaluation.checks import diagnose
from kwta_exp.evaluation.forecast import announce
from kwta_exp.evaluation.judge import Judge
from kwta_exp.failures import is_of_the_machine, is_out_of_memory, no_gradient_exists
from kwta_exp.models.proxy import Proxy, proxy_for, updated_proxy

THREAT = Threat(norm="linf", eps=0.1)
ANY = 10**6

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore hints")
CPU_NO_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")
BROKEN_GPU = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
BROKEN_GPU_OF_OLD = RuntimeError("CUDA error: an illegal memory access was encountered")


@dataclass
class Limits:
    """The largest batch that fits, in each case."""

    any: int = ANY
    with_gradients: int = ANY
    in_double: int = ANY


class Hungry(nn.Module):
    """A small network, computed in float64, that raises ``error`` for a batch beyond the limits."""

    def __init__(self, limits: Limits, error: Exception = NO_MEMORY) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.Tanh(), nn.Linear(20, 5)).double()
        self.limits, self.error = limits, error
        self.failures = 0
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        limits = [self.limits.any]
        limits += [self.limits.with_gradients] if x.requires_grad else []
        limits += [self.limits.in_double] if x.dtype == torch.double else []
        if len(x) > min(limits):
            self.failures += 1
            raise self.error
        logits: Tensor = self.layers(x.double())
        return logits


def images(n: int = 12) -> Split:
    x = torch.randint(256, (n, 1, 6, 6), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Split(x, Hungry(Limits())(x / 255).argmax(1), torch.arange(n))


def evaluation(network: nn.Module, suite: dict[str, Attack], folder: Path, **options: Any) -> Evaluation:
    return Evaluation(network, images(), suite, THREAT, folder, batch_size=8, **options)


def signs(x: Tensor) -> Tensor:
    return torch.where(torch.arange(x[0].numel()).view(x[0].shape) % 2 == 0, 0.1, -0.1)


GUESS = CallableAttack(lambda model, x, y, keys: x + signs(x), THREAT)
PLAIN = PGD(norm="linf", eps=0.1, steps=5)


def measured(network: nn.Module, folder: Path) -> dict[str, float]:
    """The checks, after an attack without gradients."""
    made = evaluation(network, {"guess": GUESS}, folder)
    outcome: Outcome = made.run()
    return diagnose(made, outcome, checks_n=12).measured


@pytest.mark.parametrize("error", [NO_MEMORY, CPU_NO_MEMORY, MemoryError()], ids=["cuda", "cpu", "numpy"])
@pytest.mark.parametrize("limits", [Limits(with_gradients=3), Limits(any=3)], ids=["gradients", "any"])
def test_checks_measure_the_same_in_smaller_batches(limits: Limits, error: Exception, tmp_path: Path) -> None:
    hungry = Hungry(limits, error)
    found = measured(hungry, tmp_path / "hungry")
    assert hungry.failures
    assert found == pytest.approx(measured(Hungry(Limits()), tmp_path / "plain"), abs=1e-6)
    assert found["gradients_are_zero"] == 0
    assert len(found) >= 9


@pytest.mark.parametrize("error", [NO_MEMORY, CPU_NO_MEMORY], ids=["cuda", "cpu"])
def test_no_memory_for_one_gradient_is_an_error_and_no_verdict(error: Exception, tmp_path: Path) -> None:
    hungry = Hungry(Limits(with_gradients=0), error)
    with pytest.raises(UserError, match=r"evaluation\.checks_n=12: not enough memory for the check \w+, .*;"):
        measured(hungry, tmp_path / "checks")
    with pytest.raises(UserError, match=r"attack\.pgd: not enough memory for a single image \("):
        evaluation(hungry, {"pgd": PLAIN}, tmp_path / "attack").run()
    assert not (tmp_path / "attack" / "pgd.npz").exists()


@pytest.mark.parametrize("error", [BROKEN_GPU, BROKEN_GPU_OF_OLD], ids=["new", "old"])
@pytest.mark.parametrize("limits", [Limits(with_gradients=0), Limits(in_double=0), Limits(any=0)])
def test_an_error_of_the_gpu_is_scored_nowhere(limits: Limits, error: Exception, tmp_path: Path) -> None:
    broken = Hungry(limits, error)

    def stops(call: Callable[[], object]) -> None:
        with pytest.raises(type(error), match="illegal memory access"):
            call()

    if limits.in_double == 0:
        judge = Judge(broken, 4)
        x = images().x / 255
        stops(lambda: judge.logits_in_double(x))
        stops(lambda: judge.logits_in_double(x))  # it is not switched off
        return
    stops(lambda: measured(broken, tmp_path / "checks"))
    stops(lambda: evaluation(broken, {"pgd": PLAIN}, tmp_path / "attack").run())
    stops(lambda: proxy_for(broken, images().x[:2] / 255))
    stops(lambda: announce({"pgd": PLAIN}, {}, broken, images().x[:4] / 255, 12, 5))
    if limits.any == 0:
        stops(lambda: last_linear(broken, images().x[:1] / 255))
        stops(lambda: binarize(broken, images(), THREAT, 0, 4))


def test_batches_of_the_judge_shrink_and_the_outcomes_are_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes = []
    for name, limits in (("plain", Limits()), ("hungry", Limits(any=3))):
        network = Hungry(limits)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            outcomes.append(evaluation(network, {"pgd": PLAIN, "guess": GUESS}, tmp_path / name).run())
        assert ("images are judged 2 at a time" in caplog.text) == (name == "hungry")
    for name in ("pgd", "guess"):
        fooled = [outcome.records[name].columns["fooled"] for outcome in outcomes]
        assert np.array_equal(*fooled)
        assert fooled[0].any()
    with pytest.raises(torch.OutOfMemoryError):
        evaluation(Hungry(Limits(any=0)), {"pgd": PLAIN}, tmp_path / "none").run()


class Rounded(Hungry):
    """Wrong in float32 for a batch of 8 and in float64, and right for other batches in float32."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits.roll(1, 1) if len(x) == 8 or x.dtype == torch.double else logits


@pytest.mark.parametrize("in_double", [ANY, 3, 1])
def test_an_error_is_confirmed_in_float64_whatever_fits(in_double: int) -> None:
    split = images()
    x, y = split.x / 255, split.y
    judge = Judge(Rounded(Limits(in_double=in_double)), 8)
    for _ in range(2):
        judged = judge(x, y)
        assert judged.misclassified.all()
        assert judged.confirmed.all()


def test_without_memory_for_one_image_in_float64_the_judge_stops() -> None:
    split = images()
    judge = Judge(Rounded(Limits(in_double=0)), 8)
    for _ in range(2):  # the second time too
        with pytest.raises(torch.OutOfMemoryError):
            judge(split.x / 255, split.y)


def test_float64_goes_from_a_full_gpu_to_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    """A tensor that claims to be on a GPU, where float64 never fits."""

    class OnGPU(torch.Tensor):
        device = torch.device("cuda")  # type: ignore[assignment]

        def to(self, *args: Any, **kwargs: Any) -> Tensor:
            on_cpu = torch.device("cpu") in args
            moved = self.as_subclass(torch.Tensor).to(*[each for each in args if each != self.device])
            return moved if on_cpu else moved.as_subclass(OnGPU)

    class FullGPU(Hungry):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, OnGPU) and x.dtype == torch.double:
                raise NO_MEMORY
            return super().forward(x).as_subclass(OnGPU)

    x = (images().x / 255).as_subclass(OnGPU)
    network = FullGPU(Limits())
    judge = Judge(network, 4)
    with caplog.at_level(logging.WARNING):
        found = judge.logits_in_double(x)
    assert found is not None
    torch.testing.assert_close(found.as_subclass(torch.Tensor), network.layers((images().x / 255).double()))
    messages = [record.getMessage() for record in caplog.records]
    assert [message.partition(": ")[2] for message in messages[:2]] == [
        "float64 takes 2 images at a time",
        "float64 takes 1 images at a time",
    ]
    assert messages[2].endswith("float64 is computed on the CPU")


def test_a_network_that_does_not_run_in_float64_is_confirmed_in_float32() -> None:
    split = images()
    judge = Judge(Rounded(Limits(in_double=0), ValueError("float32 only")), 8)
    assert not judge(split.x / 255, split.y).confirmed.any()
    assert judge.logits_in_double(split.x / 255) is None


def test_an_attack_of_others_gets_half_of_a_chunk_that_does_not_fit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = []

    def whole(model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        sizes.append(len(x))
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), x)
        return x.detach() + 0.1 * gradient.sign()

    attack = as_attack(whole, THREAT)
    records = [
        evaluation(Hungry(limits), {"theirs": attack}, tmp_path / str(limits.with_gradients)).run().records
        for limits in (Limits(), Limits(with_gradients=3))
    ]
    assert sizes == [8, 4, 8, 4, 2, 2, 4, 2, 2, 4, 2, 2]
    one, other = (record["theirs"].columns for record in records)
    for column in ("index", "fooled", "prediction", "queries", "steps", "key"):
        np.testing.assert_array_equal(one[column], other[column])
    assert "attack.theirs: not enough memory for 8 images at once" in caplog.text
    with pytest.raises(UserError, match=r"attack\.theirs: not enough memory.*evaluation\.batch_size=8"):
        evaluation(Hungry(Limits(with_gradients=0)), {"theirs": attack}, tmp_path / "0").run()


def test_a_proxy_for_which_memory_runs_out_does_not_change_the_search(tmp_path: Path) -> None:
    sample = images().x[:2] / 255
    for hungry in (Hungry(Limits(any=0)), Hungry(Limits(with_gradients=0))):
        for make in (proxy_for, updated_proxy):
            with pytest.raises(UserError, match=r"search=fast: not enough memory .*; expected more memory"):
                make(hungry, sample)
    assert isinstance(proxy_for(Hungry(Limits()), sample), Proxy)
    untyped = Hungry(Limits(any=0), TypeError("no"))
    assert proxy_for(untyped, sample) is untyped


def test_a_forecast_takes_what_fits() -> None:
    for limits in (Limits(with_gradients=1), Limits(with_gradients=0)):
        announce({"pgd": PLAIN}, {}, Hungry(limits), images().x[:4] / 255, 12, 5)


def test_an_experiment_ends_in_one_message() -> None:
    for error in (NO_MEMORY, CPU_NO_MEMORY):
        with (
            pytest.raises(UserError, match=r"^not enough memory: .*; expected a smaller") as found,
            user_errors(),
        ):
            raise error
        assert "\n" not in str(found.value)
    with pytest.raises(torch.AcceleratorError), user_errors():
        raise BROKEN_GPU


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1


def in_place(x: Tensor) -> Tensor:
    y = x.exp()
    z = y.sin()
    y.zero_()
    return z


NOT_DIFFERENTIABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": lambda x: torch.ones_like(x),
    "unused": lambda x: torch.ones_like(x).requires_grad_() * 2,
    "integers": lambda x: x.round().int().float(),
    "no grad": lambda x: x.detach() * 2,
    "no derivative": lambda x: torch.special.zeta(x + 2, x + 1),
    "no backward": lambda x: NoBackward.apply(x),  # type: ignore[no-untyped-call]
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "changed in place": in_place,
}


@pytest.mark.parametrize("function", NOT_DIFFERENTIABLE.values(), ids=NOT_DIFFERENTIABLE)
def test_what_autograd_says_of_a_function_without_gradient_is_recognised(
    function: Callable[[Tensor], Tensor],
) -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError) as raised:
        torch.autograd.grad(function(x).sum(), x)
    assert no_gradient_exists(raised.value)
    assert not is_of_the_machine(raised.value)


def test_what_the_machine_says_is_recognised() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50)
    for error in (raised.value, NO_MEMORY, CPU_NO_MEMORY, MemoryError(), RuntimeError("CUDA out of memory")):
        assert is_out_of_memory(error)
        assert is_of_the_machine(error)
        assert not no_gradient_exists(error)
    for error in (BROKEN_GPU, BROKEN_GPU_OF_OLD, RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")):
        assert is_of_the_machine(error)
        assert not is_out_of_memory(error)
        assert not no_gradient_exists(error)
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory")):
        assert not is_of_the_machine(error)
        assert not no_gradient_exists(error)


def test_micro_batches_shrink_when_the_cpu_has_no_memory() -> None:
    for error in (CPU_NO_MEMORY, MemoryError()):
        calls = MicroBatches(Hungry(Limits(any=3), error), 8)
        assert calls.logits(images().x / 255).shape == (12, 5)
        assert calls.size == 2
