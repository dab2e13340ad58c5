"""convert() finds every activation, in modules and in code, and changes nothing else of the network."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

from kwta_exp.activations import KWTA
from kwta_exp.errors import UserError
from kwta_exp.models import Converted, Torchvision, convert

sparse = partial(KWTA, ratio=0.2)


def traced_count(model: nn.Module) -> int:
    """Calls of ReLU, GELU or SiLU in the whole network's trace: counted another way than convert does."""
    graph = fx.symbolic_trace(model)
    count = 0
    for node in graph.graph.nodes:
        if node.op == "call_module":
            count += type(graph.get_submodule(node.target)) in (nn.ReLU, nn.GELU, nn.SiLU)
        count += node.op == "call_function" and node.target in (F.relu, torch.relu, F.gelu, F.silu)
    return count


NAMES = [
    "resnet18", "densenet121", "mobilenet_v3_small", "efficientnet_b0", "vit_b_16",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("vgg16_bn", "convnext_tiny")),
]  # fmt: skip


def tensor_names(model: nn.Module) -> list[str]:
    return [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]


@pytest.mark.parametrize("name", NAMES)
def test_all_activations_of_torchvision_networks_are_replaced(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None, num_classes=5)
    weights, names, expected = model.state_dict(), tensor_names(model), traced_count(model)
    conversion = convert(model, sparse)
    assert expected > 0
    assert conversion.unreached == conversion.doubtful == []
    assert tensor_names(model) == names
    model.load_state_dict(weights)
    assert not any(isinstance(m, nn.ReLU | nn.GELU | nn.SiLU) for m in model.modules())
    assert sum(isinstance(m, KWTA) for m in model.modules()) == len(conversion.replaced)
    calls = []
    for module in model.modules():
        if isinstance(module, KWTA):
            module.register_forward_hook(lambda *_: calls.append(1))
    side = 224 if name == "vit_b_16" else 64  # it takes no other
    model(torch.rand(1, 3, side, side)).sum().backward()
    assert len(calls) == expected  # as often as the activations of before
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v3_small"])
def test_replacing_relu_by_relu_changes_no_output(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None, num_classes=5)
    same = copy.deepcopy(model)
    convert(same, nn.ReLU, ["relu"])
    x = torch.rand(2, 3, 64, 64)
    for training in (True, False):
        torch.manual_seed(0)
        expected = model.train(training)(x)
        torch.manual_seed(0)
        assert torch.equal(same.train(training)(x), expected)


class Tricky(nn.Module):
    """Everything that a forward may do with an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.shared = nn.ReLU(inplace=True)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 3, 1), nn.SiLU()), nn.GELU()])
        self.kept = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = x * 2
        self.shared(y)  # changes y, the result unused
        y = y + self.shared(x).relu()
        for block in self.blocks:
            y = block(y)
        y = self.kept(y)
        if self.training:
            y = F.dropout(y, 0.5, training=True)
            y = F.relu_(y)
        return F.gelu(y).mean((2, 3)) + torch.relu(y).amax((2, 3))


def test_functions_methods_shared_and_in_place_activations_are_all_found() -> None:
    model = Tricky()
    conversion = convert(model, nn.ReLU)
    # shared, .relu(), SiLU, GELU, relu_, gelu, torch.relu
    assert len(conversion.replaced) == 7
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == 7
    assert conversion.unreached == []
    assert conversion.left == {"Tanh": 1}

    class Expected(Tricky):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            y = (x * 2).relu() + x.relu()
            y = self.blocks[0][0](y).relu().relu()
            y = torch.tanh(y)
            if self.training:
                y = F.dropout(y, 0.5, training=True).relu()
            return y.relu().mean((2, 3)) + y.relu().amax((2, 3))

    expected = Expected()
    expected.load_state_dict(model.state_dict())
    x = torch.randn(4, 1, 8, 8)
    for training in (True, False):
        torch.manual_seed(3)
        want = expected.train(training)(x)
        for copied in (model, copy.deepcopy(model)):
            torch.manual_seed(3)
            torch.testing.assert_close(copied.train(training)(x), want)


def test_a_deep_copy_uses_its_own_weights() -> None:
    model = torchvision.models.resnet18(num_classes=3).eval()
    convert(model, sparse)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert model(torch.rand(1, 3, 32, 32)).abs().sum() > 0
    assert twin(torch.rand(1, 3, 32, 32)).abs().sum() == 0


def test_the_report_lists_what_was_left_and_what_could_not_be_traced() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x) if x.sum() > 0 else x

    model = nn.Sequential(
        nn.Linear(4, 4), Branching(), nn.TransformerEncoderLayer(4, 2, 8), nn.Hardswish(), nn.ReLU()
    )
    conversion = convert(model, sparse)
    assert conversion.replaced == ["4: ReLU"]
    assert conversion.left == {"Hardswish": 1}
    assert [text.split(" ")[0] for text in conversion.unreached] == ["1", "2"]
    assert "Branching cannot be traced" in str(conversion)
    assert "1 Hardswish" in str(conversion)
    assert convert(nn.Sequential(nn.Hardswish()), sparse, ["hardswish"]).replaced == ["0: Hardswish"]


def test_torchvision_networks_are_made_by_name() -> None:
    facts = {"num_classes": 4, "in_channels": 1, "image_size": (32, 32)}
    for name in ("resnet18", "vit_b_32", "googlenet"):
        model = Torchvision(sparse, name=name, **facts)
        assert model(torch.rand(2, 1, 32, 32)).shape == (2, 4)
        assert not any(isinstance(m, nn.ReLU | nn.GELU) for m in model.modules())
    with pytest.raises(UserError, match=r"model\.name='resnet19': torchvision has no such network.*resnet18"):
        Torchvision(sparse, name="resnet19", **facts)


def test_any_network_is_made_by_its_factory_and_converted() -> None:
    def network(num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, num_classes))

    facts = {"num_classes": 3, "in_channels": 1, "image_size": (2, 2)}
    assert isinstance(Converted(sparse, network, **facts)[2], KWTA)  # type: ignore[index]
    with pytest.raises(UserError, match="nothing to convert in Sequential"):
        Converted(sparse, network, **facts, kinds=["gelu"])


def same_after_conversion(model: nn.Module, x: Tensor) -> bool:
    """Whether putting ReLUs in place of ReLUs changes nothing, in training and in evaluation."""
    converted = copy.deepcopy(model)
    convert(converted, nn.ReLU, ["relu"])
    return all(
        torch.equal(model.train(mode)(x.clone()), converted.train(mode)(x.clone())) for mode in (True, False)
    )


class Reused(nn.Module):
    """Uses a member of its container directly too."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x) + self.features[1](x)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x)


class Intruder(nn.Module):
    """Calls the activation of a child directly."""

    def __init__(self) -> None:
        super().__init__()
        self.c = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.c.relu(x - 1) + self.c(x)


class TrainOnly(nn.Module):
    """Calls its first activation in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.r1, self.r2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = self.r1(x - 0.5)
        return self.r2(x)


@pytest.mark.parametrize("make", [Reused, Intruder, TrainOnly])
def test_unusual_uses_of_an_activation_keep_their_outputs(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    assert same_after_conversion(model, torch.randn(5, 4))
    assert set(dict(model.named_parameters())) == set(dict(make().named_parameters()))


def test_an_activation_that_a_container_holds_twice_becomes_two() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 2), relu, nn.Linear(2, 2), relu)
    assert len(convert(model, sparse).replaced) == 2
    assert model[1] is not model[3]


class Modal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x * 2
        return F.relu(x)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + torch.randn(4)) if self.training else F.relu(x)


class Remembering(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = F.relu(x)
        return self.seen


def test_code_that_a_trace_would_change_is_left_alone_and_listed() -> None:
    state = torch.get_rng_state()
    for model, reason in ((Modal(), "changes a mode"), (Noisy(), "draws random numbers")):
        conversion = convert(model, sparse)
        assert conversion.replaced == []
        assert reason in conversion.unreached[0]
        assert "forward" not in vars(model)
    assert torch.equal(torch.get_rng_state(), state)
    remembering = Remembering()
    convert(remembering, nn.ReLU)
    assert not hasattr(remembering, "seen")  # no proxy of the trace is left behind
    patched = Inner()
    patched.forward = lambda x: x + 1  # type: ignore[method-assign]
    assert "replaced already" in convert(patched, sparse).unreached[0]


def test_in_place_changes_of_the_callers_tensor_are_listed() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(x)

    assert convert(Block(), sparse).doubtful == ["relu"]
    assert convert(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2)), sparse).doubtful == ["0"]
    assert convert(torchvision.models.resnet18(), sparse).doubtful == []


class Branching(nn.Module):
    """Cannot be traced, and holds its activation as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x) if x.sum() > 0 else x


def test_activation_modules_are_replaced_in_code_that_cannot_be_traced() -> None:
    conversion = convert(model := nn.Sequential(Branching()), sparse)
    assert conversion.replaced == ["0.relu: ReLU"]
    assert isinstance(model[0].relu, KWTA)


def test_networks_without_functional_activations_keep_their_code_and_can_be_pickled() -> None:
    model = torchvision.models.resnet18(num_classes=3).eval()
    convert(model, sparse)
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
