"""Conversion: every activation found, in modules and in code; nothing else of the network changed."""

import copy
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


NAMES = ["resnet18", "densenet121", "vgg16_bn", "mobilenet_v3_small", "vit_b_16", "convnext_tiny"]


@pytest.mark.parametrize("name", NAMES)
def test_torchvisions_networks_are_converted_whole(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None, num_classes=5)
    names, expected = list(model.state_dict()), traced_count(model)
    conversion = convert(model, sparse)
    assert len(conversion.replaced) == expected > 0
    assert conversion.unreached == []
    assert list(model.state_dict()) == names
    assert not any(isinstance(m, nn.ReLU | nn.GELU | nn.SiLU) for m in model.modules())
    assert sum(isinstance(m, KWTA) for m in model.modules()) == expected
    calls = []
    for module in model.modules():
        if isinstance(module, KWTA):
            module.register_forward_hook(lambda *_: calls.append(1))
    model(torch.rand(1, 3, 224, 224)).sum().backward()
    assert len(calls) == expected  # each is called, once
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v3_small"])
def test_putting_back_what_was_there_changes_nothing(name: str) -> None:
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
    # In training: shared twice, .relu(), SiLU, GELU, relu_, gelu, torch.relu.
    assert len(conversion.replaced) == 8
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == 8
    assert conversion.unreached == []
    assert "shared" not in dict(model.named_modules())

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


def test_a_copy_runs_on_its_own_weights() -> None:
    model = torchvision.models.resnet18(num_classes=3).eval()
    convert(model, sparse)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert model(torch.rand(1, 3, 32, 32)).abs().sum() > 0
    assert twin(torch.rand(1, 3, 32, 32)).abs().sum() == 0


def test_what_could_not_be_reached_or_was_left_is_said() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x) if x.sum() > 0 else x

    model = nn.Sequential(
        nn.Linear(4, 4), Branching(), nn.TransformerEncoderLayer(4, 2, 8), nn.Hardswish(), nn.ReLU(),
        nn.RNN(4, 4, nonlinearity="relu"),
    )  # fmt: skip
    conversion = convert(model, sparse)
    assert conversion.replaced == ["4: ReLU"]
    assert conversion.left == {"Hardswish": 1}
    assert [text.split(" ")[0] for text in conversion.unreached] == ["1", "2", "5"]
    assert "Branching cannot be traced" in str(conversion)
    assert "1 Hardswish" in str(conversion)
    assert convert(nn.Sequential(nn.Hardswish()), sparse, ["hardswish"]).replaced == ["0: Hardswish"]


def test_torchvision_by_name() -> None:
    facts = {"num_classes": 4, "in_channels": 1, "image_size": (32, 32)}
    for name in ("resnet18", "vit_b_32", "googlenet"):
        model = Torchvision(sparse, name=name, **facts)
        assert model(torch.rand(2, 1, 32, 32)).shape == (2, 4)
        assert not any(isinstance(m, nn.ReLU | nn.GELU) for m in model.modules())
    with pytest.raises(UserError, match=r"model\.name='resnet19': torchvision has no such network.*resnet18"):
        Torchvision(sparse, name="resnet19", **facts)


def test_any_network_by_its_factory() -> None:
    def network(num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, num_classes))

    facts = {"num_classes": 3, "in_channels": 1, "image_size": (2, 2)}
    assert isinstance(Converted(sparse, network, **facts)[2], KWTA)  # type: ignore[index]
    with pytest.raises(UserError, match="nothing to convert in Sequential"):
        Converted(sparse, network, **facts, kinds=["gelu"])
