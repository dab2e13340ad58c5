"""The paper's networks: parameter names, shapes and outputs. The reference implementations are plain functions
of a state dict that use no module of this project.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwta_exp.activations import KWTA
from kwta_exp.checkpoint import load_into, read_weights
from kwta_exp.models import CNN, MLP, VGG, DenseNet, ResNet, WideResNet

SHAPES: dict[str, dict[str, list[int]]] = json.loads(
    (Path(__file__).parent / "data" / "original_state_dicts.json").read_text()
)
"""Parameter names and shapes of nine networks of the original repository."""

sparse = partial(KWTA, ratio=0.1)
colour = {"num_classes": 10, "in_channels": 3}
grey = {"num_classes": 10, "in_channels": 1, "image_size": (28, 28)}
STAGES = [partial(KWTA, ratio=ratio) for ratio in (0.5, 0.4, 0.3, 0.2)]

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet18": lambda: ResNet(nn.ReLU, **colour),
    "SparseResNet18(bias=(relu=False, sparsities=[0.5, 0.4, 0.3, 0.2], sparse_func='reg', bias=False))":
        lambda: ResNet(STAGES, **colour),
    "SparseResNet50": lambda: ResNet(sparse, depth=50, **colour),
    "WideResNet(22,10,widen_factor=2)": lambda: WideResNet(nn.ReLU, depth=22, widen_factor=2, **colour),
    "SparseWideResNet(22,10,widen_factor=2)":
        lambda: WideResNet(sparse, depth=22, widen_factor=2, conv_bias=True, **colour),
    "SparseDenseNet121": lambda: DenseNet(sparse, **colour),
    "DenseNet121": lambda: DenseNet(nn.ReLU, **colour),
    "SparseMNIST_CNN([32,32,64,64],hidden=1000)":
        lambda: CNN(sparse, channels=[32, 32, 64, 64], hidden=1000, **grey),
    "SparseDNN(hidden=1000)": lambda: MLP(sparse, hidden=[1000, 1000], **grey),
}  # fmt: skip


def random_weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Weights that keep activations in range, and BatchNorm statistics that are not the defaults."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(7)
        elif name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            weights[name] = 0.5 + torch.rand(shape, generator=generator)
        else:
            scale = (2 / max(1, torch.Size(shape[1:]).numel())) ** 0.5 if len(shape) > 1 else 0.1
            weights[name] = scale * torch.randn(shape, generator=generator)
    return weights


@pytest.mark.parametrize("name", SHAPES)
def test_original_state_dicts_load_strictly(name: str, tmp_path: Path) -> None:
    weights = random_weights(SHAPES[name])
    torch.save({f"module.{key}": value for key, value in weights.items()}, tmp_path / "original.pth")
    model = NETWORKS[name]()
    load_into(model, read_weights(tmp_path / "original.pth"), "original.pth")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def winners(x: Tensor, ratio: float = 0.1) -> Tensor:
    """k-WTA over all units of an image, by sorting."""
    flat = x.flatten(1)
    k = max(1, int(ratio * flat.shape[1]))
    return x * (flat >= flat.sort(1).values[:, -k, None]).view_as(x)


class Reference:
    """A state dict with the operations that the paper's networks use."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.w = {name: value.double() for name, value in weights.items()}

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.w[f"{name}.weight"]
        return F.conv2d(x, weight, self.w.get(f"{name}.bias"), stride, padding=weight.shape[-1] // 2)

    def bn(self, name: str, x: Tensor) -> Tensor:
        mean, var, gain, shift = (
            self.w[f"{name}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * gain + shift

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.w


def resnet(r: Reference, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    x = r.bn("bn1", r.conv("conv1", x)).relu()  # the stem keeps its ReLU
    for stage in range(1, 5):
        block = 0
        while r.has(f"layer{stage}.{block}.conv1"):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            if r.has(f"{name}.conv3"):
                out = act(r.bn(f"{name}.bn1", r.conv(f"{name}.conv1", x)))
                out = act(r.bn(f"{name}.bn2", r.conv(f"{name}.conv2", out, stride)))
                out = r.bn(f"{name}.bn3", r.conv(f"{name}.conv3", out))
            else:
                out = act(r.bn(f"{name}.bn1", r.conv(f"{name}.conv1", x, stride)))
                out = r.bn(f"{name}.bn2", r.conv(f"{name}.conv2", out))
            if r.has(f"{name}.shortcut.0"):
                x = r.bn(f"{name}.shortcut.1", r.conv(f"{name}.shortcut.0", x, stride))
            x = act(out + x)
            block += 1
    return r.linear("linear", F.avg_pool2d(x, 4).flatten(1))


def wide_resnet(r: Reference, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    x = r.conv("conv1", x)
    for group in range(1, 4):
        block = 0
        while r.has(f"block{group}.layer.{block}.conv1"):
            name = f"block{group}.layer.{block}"
            stride = 2 if group > 1 and block == 0 else 1
            activated = act(r.bn(f"{name}.bn1", x))
            out = r.conv(f"{name}.conv2", act(r.bn(f"{name}.bn2", r.conv(f"{name}.conv1", activated, stride))))
            if r.has(f"{name}.convShortcut"):
                x = r.conv(f"{name}.convShortcut", activated, stride)
            x = x + out
            block += 1
    return r.linear("fc", F.avg_pool2d(act(r.bn("bn1", x)), 8).flatten(1))


def densenet(r: Reference, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    x = r.conv("conv1", x)
    for block in range(1, 5):
        layer = 0
        while r.has(f"dense{block}.{layer}.conv1"):
            name = f"dense{block}.{layer}"
            new = r.conv(f"{name}.conv1", act(r.bn(f"{name}.bn1", x)))
            new = r.conv(f"{name}.conv2", act(r.bn(f"{name}.bn2", new)))
            x = torch.cat([new, x], 1)  # the new channels first
            layer += 1
        if block < 4:
            x = F.avg_pool2d(r.conv(f"trans{block}.conv", act(r.bn(f"trans{block}.bn", x))), 2)
    return r.linear("linear", F.avg_pool2d(r.bn("bn", x).relu(), 4).flatten(1))  # the last one keeps its ReLU


PARITY = [
    ("ResNet18", resnet, False),
    ("SparseResNet50", resnet, True),
    ("WideResNet(22,10,widen_factor=2)", wide_resnet, False),
    ("SparseWideResNet(22,10,widen_factor=2)", wide_resnet, True),
    ("SparseDenseNet121", densenet, True),
    ("DenseNet121", densenet, False),
]


@pytest.mark.parametrize(("name", "reference", "is_sparse"), PARITY, ids=[name for name, _, _ in PARITY])
def test_networks_compute_the_outputs_of_the_originals(
    name: str, reference: Callable[..., Tensor], is_sparse: bool
) -> None:
    weights = random_weights(SHAPES[name])
    model = NETWORKS[name]()
    model.load_state_dict(weights)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        found = model.double().eval()(x)
        expected = reference(Reference(weights), x, winners if is_sparse else torch.relu)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_each_stage_has_its_own_ratio() -> None:
    def ratios(model: nn.Module) -> list[float | None]:
        return list(dict.fromkeys(m.ratio for m in model.modules() if isinstance(m, KWTA)))

    assert ratios(ResNet(STAGES, width=4, **colour)) == [0.5, 0.4, 0.3, 0.2]
    assert ratios(DenseNet(STAGES, growth=4, **colour)) == [0.5, 0.4, 0.3, 0.2]
    assert ratios(WideResNet(STAGES[:3], depth=10, widen_factor=1, **colour)) == [0.5, 0.4, 0.3]
    with pytest.raises(ValueError, match="lists 4 factories; expected one, or one for 3 stages"):
        WideResNet(STAGES, depth=10, **colour)


@pytest.mark.parametrize(("depth", "biased"), [(18, 0), (50, 0), (101, 0), (152, 0), (50, 1)])
def test_conv_bias_adds_biases_to_bottleneck_blocks_only(depth: int, biased: int) -> None:
    model = ResNet(nn.ReLU, depth=depth, width=4, conv_bias=bool(biased), **colour)  # type: ignore[arg-type]
    names = [name for name in model.state_dict() if "conv" in name or "shortcut.0" in name]
    blocks = {18: 8, 50: 16, 101: 33, 152: 50}[depth]
    assert sum(name.endswith("conv1.weight") for name in names) == blocks + 1
    with_bias = [name for name in names if name.endswith("bias")]
    assert len(with_bias) == (16 * 3 + 4 if biased else 0)
    assert "conv1.bias" not in with_bias  # never the stem


def test_the_7x7_stem_halves_the_resolution_twice() -> None:
    paper = ResNet(sparse, stem_activation=sparse, depth=50, width=4, **colour)
    assert isinstance(paper.act, KWTA)
    assert paper.conv1.stride == (1, 1)
    large = ResNet(sparse, depth=50, width=4, stem="7x7", **colour)
    x = torch.rand(1, 3, 224, 224)
    assert large.pool(large.act(large.bn1(large.conv1(x)))).shape == (1, 4, 56, 56)


def test_vgg_has_the_parameter_names_of_the_original() -> None:
    model = VGG(nn.ReLU, depth=16, **colour)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes["features.0.weight"] == [64, 3, 3, 3]
    assert shapes["features.40.bias"] == [512]  # the thirteenth convolution
    assert [name for name in shapes if name.startswith("classifier") and name.endswith("weight")] == [
        "classifier.1.weight", "classifier.4.weight", "classifier.6.weight",
    ]  # fmt: skip
    assert sum(isinstance(m, nn.Conv2d) for m in VGG(nn.ReLU, depth=19, width=4, **colour).modules()) == 16


@pytest.mark.parametrize("size", [28, 32, 64, 224])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_network_takes_every_image_size(size: int, channels: int) -> None:
    facts = {"num_classes": 7, "in_channels": channels}
    x = torch.rand(2, channels, size, size)
    for model in (
        ResNet(sparse, width=2, depth=50, stem="7x7" if size == 224 else "3x3", **facts),
        WideResNet(sparse, depth=10, widen_factor=1, dropout=0.1, conv_bias=True, **facts),
        DenseNet(sparse, growth=2, **facts),
        VGG(sparse, depth=11, width=4, **facts),
    ):
        model(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        with torch.no_grad():
            assert model.eval()(x).shape == (2, 7)


def test_an_impossible_depth_is_refused() -> None:
    with pytest.raises(ValueError, match=r"depth=21 is not 6n \+ 4"):
        WideResNet(sparse, depth=21, **colour)
