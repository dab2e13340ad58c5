"""Networks: placement of activations, names and shapes of the original, any image size."""

from functools import partial

import pytest
import torch
from torch import nn

from kwta_exp.activations import KWTA, LWTA
from kwta_exp.models import CNN, MLP, ResNet

sparse = partial(KWTA, ratio=0.2)


def shapes(model: nn.Module) -> dict[str, list[int]]:
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("_extra_state")}
    return {name: list(tensor.shape) for name, tensor in state.items()}


def test_cnn_equals_the_mnist_network_of_the_study() -> None:
    model = CNN(
        sparse, channels=[32, 32, 64, 64], hidden=1000, num_classes=10, in_channels=1, image_size=(28, 28)
    )
    found = shapes(model)
    expected = {
        "cnn.0": [32, 1, 3, 3], "cnn.2": [32, 32, 3, 3], "cnn.4": [64, 32, 3, 3], "cnn.6": [64, 64, 3, 3],
        "cnn.9": [1000, 3136], "cnn.11": [10, 1000],
    }  # fmt: skip
    assert {k.removesuffix(".weight"): v for k, v in found.items() if k.endswith("weight")} == expected
    assert len(found) == 12
    assert [layer.stride for layer in model.cnn if isinstance(layer, nn.Conv2d)] == [
        (1, 1),
        (2, 2),
        (1, 1),
        (2, 2),
    ]
    assert sum(isinstance(m, KWTA) for m in model.modules()) == 5


def test_mlp_equals_the_dnn_of_the_study() -> None:
    model = MLP(sparse, hidden=[1000, 1000], num_classes=10, in_channels=1, image_size=(28, 28))
    assert shapes(model) == {
        "nn.1.weight": [1000, 784], "nn.1.bias": [1000], "nn.3.weight": [1000, 1000], "nn.3.bias": [1000],
        "nn.5.weight": [10, 1000], "nn.5.bias": [10],
    }  # fmt: skip


def test_resnet18_has_the_names_and_activations_of_the_original() -> None:
    model = ResNet(sparse, num_classes=10, in_channels=3)
    found = shapes(model)
    assert len(found) == 122
    assert found["conv1.weight"] == [64, 3, 3, 3]
    assert found["layer2.0.shortcut.0.weight"] == [128, 64, 1, 1]
    assert found["layer4.1.bn2.running_var"] == [512]
    assert found["linear.weight"] == [10, 512]
    assert not [name for name in found if "conv" in name and name.endswith("bias")]
    # Two in each of eight blocks; the stem keeps its ReLU.
    assert sum(isinstance(m, KWTA) for m in model.modules()) == 16
    assert [n for n, m in model.named_modules() if isinstance(m, nn.ReLU)] == ["act"]
    assert len(list(ResNet(sparse, num_classes=10, in_channels=3, depth=34).modules())) > len(
        list(model.modules())
    )


def test_resnet_block_computes_the_formula_of_the_paper() -> None:
    """The second block of a stage, by hand: act(bn2(conv2(act(bn1(conv1 x)))) + x)."""
    model = ResNet(sparse, num_classes=4, in_channels=1, width=8).eval()
    block, x = model.layer1[1], torch.randn(3, 8, 6, 6)
    inner = KWTA(0.2)(block.bn1(block.conv1(x)))
    expected = KWTA(0.2)(block.bn2(block.conv2(inner)) + x)
    torch.testing.assert_close(block(x), expected)
    # And the global average equals the original's 4x4 pooling at 32x32.
    images = torch.rand(2, 1, 32, 32)
    features = model.layer4(model.layer3(model.layer2(model.layer1(model.act(model.bn1(model.conv1(images)))))))
    pooled = torch.nn.functional.avg_pool2d(features, 4).flatten(1)
    torch.testing.assert_close(model(images), model.linear(pooled))


@pytest.mark.parametrize("activation", [nn.ReLU, partial(LWTA, group_size=2), sparse])
@pytest.mark.parametrize("size", [(8, 8), (28, 28), (9, 7)])
def test_networks_accept_any_image_size_and_number_of_classes(activation, size) -> None:  # type: ignore[no-untyped-def]
    for channels in (1, 3):
        x = torch.rand(2, channels, *size)
        facts = {"num_classes": 7, "in_channels": channels}
        for model in (
            CNN(activation, channels=[4, 4, 8, 8], hidden=16, image_size=size, **facts),
            MLP(activation, hidden=[16, 12], image_size=size, **facts),
            ResNet(activation, width=4, **facts),
        ):
            model(x).sum().backward()
            assert model(x).shape == (2, 7)
            assert all(p.grad is not None for p in model.parameters())
