"""A convolution that skips zeros gives the results of the dense one."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kwta_exp.activations import KWTA, LWTA, kwta
from kwta_exp.models import DenseNet, ResNet, WideResNet, proxy, sparse
from kwta_exp.models.proxy import Proxy
from kwta_exp.models.sparse import SparseConv2d, fits, make_sparse


def winners(*shape: int, ratio: float = 0.1) -> Tensor:
    return kwta(torch.randn(shape), ratio)


def agree(dense: nn.Conv2d, x: Tensor, gradient: Tensor | None = None) -> None:
    """Output and gradient of input as the dense convolution has them in float64."""
    copies = [SparseConv2d(dense, sparse_gradient) for sparse_gradient in (False, True)]
    exact = x.double().requires_grad_()
    expected = F.conv2d(
        exact, dense.weight.double(), None if dense.bias is None else dense.bias.double(),
        dense.stride, dense.padding, dense.dilation,  # type: ignore[arg-type]
    )  # fmt: skip
    if gradient is None:
        gradient = winners(*expected.shape)
    expected.backward(gradient.double())
    assert exact.grad is not None
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for copy in copies:
            asked = x.detach().to(dtype, copy=True).requires_grad_()
            found = copy(asked)
            assert found.dtype == dtype
            found.backward(gradient.to(dtype))
            assert asked.grad is not None
            for ours, theirs in ((found, expected), (asked.grad, exact.grad)):
                scale = theirs.abs().max().item()  # of a sum, whose terms round
                torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * scale)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 7),
    size=st.tuples(st.integers(5, 19), st.integers(5, 19)),
    channels=st.sampled_from([1, 3, 16, 48, 64, 65, 128, 160]),
    out=st.sampled_from([1, 48, 64, 128, 160]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    ratio=st.sampled_from([0.001, 0.1, 1.0]),
)
def test_it_equals_the_dense_convolution(
    seed: int, batch: int, size: Any, channels: int, out: int, kernel: Any, stride: Any, padding: Any,
    dilation: int, bias: bool, ratio: float,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    dense = nn.Conv2d(channels, out, kernel, stride, padding, dilation, bias=bias)
    agree(dense, winners(batch, channels, *size, ratio=ratio))


def test_images_larger_than_a_block_and_batches_that_do_not_divide_into_blocks() -> None:
    torch.manual_seed(0)
    agree(nn.Conv2d(4, 64, 3, padding=1), winners(2, 4, 40, 40))
    agree(nn.Conv2d(64, 64, 3, padding=1), winners(37, 64, 8, 8))


def test_negative_zero_infinity_nan_and_memory_layouts() -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(64, 64, 3, padding=1)
    fast = SparseConv2d(dense, True)
    zero = torch.full((2, 64, 6, 6), -0.0)
    assert torch.equal(fast(zero), dense.bias[:, None, None].expand(2, 64, 6, 6))  # type: ignore[index]
    for dtype in (torch.float32, torch.bfloat16):
        for value in (torch.inf, torch.nan):
            x = winners(2, 64, 6, 6)
            x[1, 5, 2, 2] = value
            found = fast(x.to(dtype))
            assert found[0].isfinite().all()
            reached = found[1].isfinite().logical_not()
            assert reached[:, 1:4, 1:4].all()
            assert reached.sum() == 64 * 9
    x = winners(3, 64, 6, 6)
    views = x, x.contiguous(memory_format=torch.channels_last), x.expand(3, 64, 6, 6), x.flip(0)
    for view in views:
        torch.testing.assert_close(fast(view), dense(view), rtol=1e-4, atol=1e-5)
    assert fast(x[:0]).shape == (0, 64, 6, 6)
    assert torch.equal(fast.double()(x.double()), dense.double()(x.double()))  # left to the dense one


def test_a_dense_gradient_is_correct() -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(64, 64, 3, padding=1)
    for gradient in (torch.randn(9, 64, 7, 7), torch.zeros(9, 64, 7, 7)):
        agree(dense, winners(9, 64, 7, 7), gradient)
    assert not sparse._looks_sparse(torch.randn(9, 64, 7, 7))
    assert sparse._looks_sparse(winners(9, 64, 7, 7, ratio=0.2))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, of its forward mode
def test_second_derivatives_and_torch_func_equal_the_dense_convolution() -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(64, 64, 3, padding=1)
    fast, x = SparseConv2d(dense, True), winners(2, 64, 5, 5)

    def slope(convolution: nn.Module, x: Tensor) -> Tensor:
        return F.softplus(convolution(x)).pow(2).sum()

    second = []
    for convolution in (dense, fast):
        asked = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(slope(convolution, asked), asked, create_graph=True)
        second.append(torch.autograd.grad(first.pow(2).sum(), asked)[0])
    torch.testing.assert_close(second[1], second[0], rtol=1e-3, atol=1e-4 * second[0].abs().max().item())
    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.jacrev):
        expected, found = (transform(partial(slope, each))(x) for each in (dense, fast))
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(fast(x[0]), dense(x[0]), rtol=1e-4, atol=1e-5)


def test_the_number_of_threads_does_not_change_results() -> None:
    torch.manual_seed(0)
    fast, x = SparseConv2d(nn.Conv2d(64, 64, 3, padding=1), True), winners(37, 64, 16, 16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = fast(x)
        torch.set_num_threads(max(2, before))
        assert torch.equal(fast(x), alone)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(fast(x[5:6]), alone[5:6])  # nor does batch composition


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(64, 32, 3),
        nn.Conv2d(48, 64, 3),
        nn.Conv2d(64, 64, 3, groups=2),
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(64, 64, 3, padding="same"),
    ],
)
def test_unsupported_and_slower_shapes_stay_dense(convolution: nn.Conv2d) -> None:
    assert not fits(convolution)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_convolutions_with_hooks_stay_dense() -> None:
    assert fits(nn.Conv2d(64, 64, 3))
    assert not fits(nn.utils.weight_norm(nn.Conv2d(64, 64, 3)))  # type: ignore[arg-type]
    hooked = nn.Conv2d(64, 64, 3)
    hooked.register_forward_hook(lambda module, inputs, output: output * 2)
    assert not fits(hooked)


def sparse_ones(network: nn.Module) -> dict[str, bool]:
    """The sparse convolutions by name, and whether their gradients are sparse too."""
    return {
        name: module._transposed is not None
        for name, module in network.named_modules()
        if isinstance(module, SparseConv2d)
    }


@pytest.mark.parametrize("cpu", ["plain", "bf16"], indirect=True)
def test_which_convolutions_become_sparse(cpu: str) -> None:
    x = torch.rand(2, 3, 16, 16)

    network = ResNet(partial(KWTA, ratio=0.1), num_classes=10, in_channels=3).eval()
    found = sparse_ones(Proxy(network, x))
    blocks = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert len(found) == blocks - 2  # the first sees the image, the second a ReLU's output
    assert all(found.values())  # every sum of a block goes through k-WTA next, as does every convolution

    pre_activation = WideResNet(
        partial(KWTA, ratio=0.1), depth=10, widen_factor=4, num_classes=10, in_channels=3
    )
    found = sparse_ones(Proxy(pre_activation.eval(), x))
    assert {name for name, each in found.items() if each} == {  # what conv2 adds to goes through BatchNorm
        "network.block2.layer.0.conv1", "network.block3.layer.0.conv1",
    }  # fmt: skip
    assert len(found) == 7  # of the first block, what is given 16 channels stays dense

    for activation in (nn.ReLU, partial(KWTA, ratio=0.3), partial(KWTA, k=5), LWTA):
        network = ResNet(activation, num_classes=10, in_channels=3).eval()  # type: ignore[arg-type]
        assert not sparse_ones(Proxy(network, x))
    network = ResNet(partial(LWTA, group_size=8), num_classes=10, in_channels=3).eval()
    assert len(sparse_ones(Proxy(network, x))) == blocks - 2


@pytest.mark.parametrize(
    "make",
    [
        partial(ResNet, width=64),
        partial(WideResNet, depth=10, widen_factor=4, dropout=0.3),
        partial(DenseNet, growth=32),
    ],
)
@pytest.mark.parametrize("cpu", ["plain"], indirect=True)
def test_gradients_of_a_sparse_proxy_equal_those_of_the_network(make: Any, cpu: str) -> None:
    """For most images: rounding sometimes changes a winner."""
    torch.manual_seed(0)
    network = make(partial(KWTA, ratio=0.1), num_classes=10, in_channels=3).eval()
    x = torch.rand(9, 3, 16, 16)
    fast = Proxy(network, x[:2])
    assert sparse_ones(fast)

    found, expected = [], []
    for each, results in ((fast, found), (network, expected)):
        asked = x.clone().requires_grad_()
        logits = each(asked)
        results += [logits.detach(), *torch.autograd.grad(logits.square().sum(), asked)]
    for ours, theirs in zip(found, expected, strict=True):
        off = (ours - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)
        assert off.median() < 1e-3


@pytest.mark.parametrize("cpu", ["amx"], indirect=True)
def test_convolutions_stay_dense_on_hardware_with_matrix_units(cpu: str) -> None:
    network = ResNet(partial(KWTA, ratio=0.1), num_classes=10, in_channels=3).eval()
    assert not sparse.pays(torch.device("cpu"))
    assert not sparse_ones(Proxy(network, torch.rand(2, 3, 16, 16)))
    assert not sparse.pays(torch.device("cuda"))


def test_only_convolutions_of_winners_become_sparse() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.pool, self.drop = KWTA(ratio=0.1), nn.MaxPool2d(2), nn.Dropout(0.5)
            self.a, self.b, self.c, self.d = (nn.Conv2d(64, 64, 3, padding=1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            first = self.act(self.a(x))
            second = self.b(self.drop(first))  # winners, but its gradient comes back whole, too
            third = self.c(self.pool(self.act(second)))  # pooled winners are dense
            out: Tensor = self.d(self.act(third)).mean((2, 3)) + second.mean((2, 3))
            return out

    traced = torch.fx.GraphModule(Net().eval(), proxy._Tracer().trace(Net().eval()))
    assert make_sparse(traced) == 2
    assert sparse_ones(traced) == {"b": False, "d": False}
