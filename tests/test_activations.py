"""k-WTA and LWTA against plain references, in every shape, dtype and memory format they promise."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.autograd import forward_ad

from kwta_exp.activations import KWTA, LWTA, kwta, lwta, selection
from kwta_exp.activations.kwta import kwta_threshold
from kwta_exp.activations.selection import keep, kth_largest

SHAPES = [(5, 12), (3, 4, 6), (2, 3, 5, 4), (2, 3, 2, 4, 3)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def reference(x: Tensor, k: int, per_channel: bool = False, magnitude: bool = False) -> Tensor:
    """Row by row in Python: keep what is not smaller than the k-th of a full sort."""
    rows = x.flatten(0, 1).flatten(1) if per_channel and x.dim() > 2 else x.flatten(1)
    kept = torch.zeros_like(rows)
    for i, row in enumerate(rows):
        score = [abs(v) if magnitude else v for v in row.tolist()]
        # NaN ranks above everything; where it is the k-th largest, nothing finite wins.
        threshold = sorted(score, key=lambda v: (math.isnan(v), v), reverse=True)[k - 1]
        threshold = math.inf if math.isnan(threshold) else threshold
        for j, v in enumerate(score):
            if math.isnan(v) or v >= threshold:
                kept[i, j] = row[j]
    return kept.view(x.shape)


def same(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


values = st.one_of(
    st.floats(-4, 4, width=16), st.sampled_from([0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf])
)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), shape=st.sampled_from(SHAPES), dtype=st.sampled_from(DTYPES),
       per_channel=st.booleans(), magnitude=st.booleans(), last=st.booleans())  # fmt: skip
def test_kwta_equals_a_sort(data, shape, dtype, per_channel, magnitude, last):  # type: ignore[no-untyped-def]
    size = math.prod(shape)
    x = torch.tensor(data.draw(st.lists(values, min_size=size, max_size=size)), dtype=dtype).view(shape)
    if last and x.dim() in CHANNELS_LAST:
        x = x.contiguous(memory_format=CHANNELS_LAST[x.dim()])
    row = math.prod(shape[2:]) if per_channel and x.dim() > 2 else math.prod(shape[1:])
    k = data.draw(st.integers(1, row))
    over, by = "channel" if per_channel else "volume", "magnitude" if magnitude else "value"

    result = kwta(x, k=k, over=over, by=by)

    assert same(result, reference(x, k, per_channel, magnitude))
    assert result.stride() == x.stride()


@pytest.mark.parametrize("dtype", DTYPES)
def test_kth_largest_is_exact_on_long_rows(dtype: torch.dtype) -> None:
    rows = torch.randn(4, 5000, generator=torch.Generator().manual_seed(1)).to(dtype)
    for k in (1, 2, 500, 4999, 5000):
        expected = rows.double().sort(descending=True).values[:, k - 1 : k]
        assert torch.equal(kth_largest(rows, k).double(), expected)


@pytest.mark.parametrize("rounds", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_winners_are_those_of_a_float64_sort(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random shapes, dtypes and layouts; ties, clusters, outliers; one thread and several; past the caches."""
    generator = torch.Generator().manual_seed(rounds)

    def pick(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=generator))]

    def size(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator)) + 1

    for _ in range(rounds):
        torch.set_num_threads(pick(1, 2))
        monkeypatch.setattr(selection, "STREAMED", pick(0, 1 << 40))
        shape = pick(
            (size(9), size(3000)),
            (size(9), 32 * size(100)),
            (size(4), size(40), size(15), size(15)),
            (size(3), 2, size(200), size(200)),
            (size(3), size(5), size(4), size(4), size(4)),
        )
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = pick(x, x, x.relu(), x.round(), x * 1e-7 + 1, x**9, x.cumsum(-1), x.exp2() * 1e-44, -x.abs())
        x = x.to(pick(*DTYPES))
        if x.dim() in CHANNELS_LAST:
            x = pick(x, x.contiguous(memory_format=CHANNELS_LAST[x.dim()]), x.transpose(1, 2), x.flip(0))
        per_channel, magnitude = pick(False, True), pick(False, True)
        rows = x.flatten(0, 1).flatten(1) if per_channel and x.dim() > 2 else x.flatten(1)
        k = min(pick(1, size(rows.shape[1]), max(1, rows.shape[1] // 10), rows.shape[1]), rows.shape[1])
        score = rows.double().abs() if magnitude else rows.double()
        threshold = score.sort(1, descending=True).values[:, k - 1 : k]
        expected = torch.where(score >= threshold, rows, 0).view(x.shape)

        x.requires_grad_()
        kept = kwta(
            x, k=k, over="channel" if per_channel else "volume", by="magnitude" if magnitude else "value"
        )
        (gradient,) = torch.autograd.grad(kept.sum(), x)

        assert torch.equal(kept, expected)
        assert torch.equal(gradient, (score >= threshold).view(x.shape).to(x.dtype))


def test_only_outputs_whose_rows_are_whole_lines_of_the_cache_are_written_past_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not selection._streamed(torch.empty(4, 64), 4)
    monkeypatch.setattr(selection, "STREAMED", 0)
    assert selection._streamed(torch.empty(4, 64), 4)
    assert not selection._streamed(torch.empty(4, 65), 4)
    assert not selection._streamed(torch.empty(4, 65).flatten()[1:257].view(4, 64), 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_unlike_the_row_before_are_exact(dtype: torch.dtype) -> None:
    """The kernel guesses a row's threshold from the row before; here each row is of another kind."""
    noise = torch.randn(9, 5003, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = torch.stack(
        [
            noise[0],
            noise[1] * 1e-4,
            noise[2].relu() * -1,  # zeros of both signs
            torch.where(noise[3] > 0, 0.0, -0.0),
            noise[4].round(),
            torch.full_like(noise[5], -3),
            noise[6].sort().values * 1e3,
            torch.where(noise[7] > 1, noise[7] / 0, noise[7]),  # infinite where it wins
            noise[8] + 1,
        ]
    ).to(dtype)
    for k in (1, 500, 2500, 4999, 5003):
        for magnitude in (False, True):
            score = x.double().abs() if magnitude else x.double()
            threshold = score.sort(1, descending=True).values[:, k - 1 : k]
            kept = kwta(x, k=k, by="magnitude" if magnitude else "value")
            assert torch.equal(kept, torch.where(score >= threshold, x, 0))
            assert torch.equal(kth_largest(x.abs() if magnitude else x, k).double(), threshold)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nan", [torch.nan, -torch.nan], ids=["nan", "negative nan"])
def test_many_nans_in_long_rows(dtype: torch.dtype, nan: float) -> None:
    x = torch.randn(4, 5000, generator=torch.Generator().manual_seed(3)).to(dtype)
    x[:, ::5] = nan
    ranked = x.nan_to_num(torch.inf)  # no value is infinite
    for k in (999, 1000, 1001, 1500):
        threshold = ranked.sort(1, descending=True).values[:, k - 1 : k]
        expected = torch.where(ranked >= threshold, x, 0)
        assert torch.equal(kwta(x, k=k).nan_to_num(9), expected.nan_to_num(9))
        assert kth_largest(x, k).isnan().all() == (k <= 1000)


@pytest.mark.parametrize(
    ("ratio", "size", "kept"), [(0.1, 100, 10), (0.1, 9, 1), (1.0, 7, 7), (0.5, 3, 1), (0.29, 100, 28)]
)
def test_ratio_floors_and_keeps_at_least_one(ratio: float, size: int, kept: int) -> None:
    # 0.29 * 100 is 28.999... in floating point; the published int(ratio * size) gives 28 too.
    x = torch.randperm(size).float()[None] + 1
    assert int((kwta(x, ratio) != 0).sum()) == kept


def test_ties_are_all_kept_and_a_constant_passes() -> None:
    assert kwta(torch.tensor([[3.0, 1.0, 3.0, 3.0, 2.0]]), k=2).tolist() == [[3, 0, 3, 3, 0]]
    constant = torch.full((2, 3, 4, 4), -1.5)
    assert torch.equal(kwta(constant, 0.1), constant)


def test_nan_is_kept() -> None:
    assert kwta(torch.tensor([[1.0, math.nan, 3.0]]), k=2).isnan().tolist() == [[False, True, False]]
    crowded = kwta(torch.tensor([[math.nan, math.nan, 3.0]]), k=1)
    assert crowded.isnan().tolist() == [[True, True, False]]
    assert crowded[0, 2] == 0


def test_gradient_passes_only_through_winners() -> None:
    x = torch.tensor([[4.0, -1.0, 2.0, 3.0]], requires_grad=True)
    kwta(x, k=2).backward(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    assert x.grad is not None
    assert x.grad.tolist() == [[1, 0, 0, 1000]]


@pytest.mark.parametrize("activation", [
    partial(kwta, ratio=0.3),
    partial(kwta, ratio=0.3, over="channel", by="magnitude"),
    partial(lwta, group_size=2),
])  # fmt: skip
def test_gradcheck(activation) -> None:  # type: ignore[no-untyped-def]
    # A permutation keeps every pair of magnitudes far apart compared with gradcheck's step.
    signs = torch.tensor([1.0, -1.0]).repeat(48)
    x = ((torch.randperm(96, generator=torch.Generator().manual_seed(0)) + 1) * signs).double()
    x = x.view(2, 4, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(activation, (x,))
    assert torch.autograd.gradgradcheck(activation, (x,))


def test_backward_saves_one_bit_a_value() -> None:
    saved = []
    x = torch.randn(2, 8, 16, 16, requires_grad=True)

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        kwta(x * 1.0, 0.1)
    # What the multiplication saves is none of k-WTA's.
    assert sum(saved) == x.numel() / 8


@pytest.mark.parametrize("make", [partial(KWTA, ratio=0.2), partial(LWTA, group_size=2)])
def test_autocast_and_compile(make) -> None:  # type: ignore[no-untyped-def]
    torch.compiler.reset()
    net = nn.Sequential(nn.Conv2d(1, 4, 3), make())
    x = torch.randn(2, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).dtype == torch.bfloat16
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)  # fullgraph: no graph break
    assert torch.equal(compiled(x), net(x))
    compiled(x).sum().backward()
    assert net[0].weight.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_module_options() -> None:
    x = torch.tensor([[-5.0, 1.0, -2.0, 0.5]])
    assert KWTA(k=3)(x).tolist() == [[0, 1, -2, 0.5]]
    assert KWTA(k=3, relu=True)(x).tolist() == [[0, 1, 0, 0.5]]
    assert KWTA(ratio=0.25, by="magnitude")(x).tolist() == [[-5, 0, 0, 0]]
    assert KWTA(k=100)(x).tolist() == x.tolist()
    assert repr(KWTA(0.25)) == "KWTA(ratio=0.25, over=volume, by=value)"


@pytest.mark.parametrize("bad", [{}, {"ratio": 0.1, "k": 3}, {"ratio": 0.0}, {"ratio": 1.5}, {"ratio": True},
                                 {"k": 0}, {"ratio": 0.1, "over": "rows"}])  # fmt: skip
def test_bad_settings_are_refused(bad) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((ValidationError, ValueError)):
        KWTA(**bad)


@pytest.mark.parametrize("bad", [{"ratio": 1.5}, {"ratio": 0.0}, {"ratio": -1.0}, {"k": 0}, {"k": -3}, {}])
def test_the_function_refuses_bad_settings(bad) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="kwta"):
        kwta(torch.zeros(2, 3), **bad)


def test_bad_inputs_are_refused_and_empty_ones_pass() -> None:
    with pytest.raises(ValueError, match="2 or more dimensions"):
        kwta(torch.zeros(3), 0.1)
    with pytest.raises(ValueError, match="does not divide"):
        lwta(torch.zeros(2, 5), 2)
    with pytest.raises(TypeError, match=r"k-WTA expects float16.*, got torch.int64"):
        kwta(torch.zeros(2, 3, dtype=torch.int64), 0.5)
    assert kwta(torch.zeros(0, 3, 4), 0.1).shape == (0, 3, 4)


def test_lwta_keeps_the_largest_of_each_group() -> None:
    x = torch.tensor([[1.0, 2.0, -3.0, -1.0, 5.0, 5.0]])
    assert lwta(x, 2).tolist() == [[0, 2, 0, -1, 5, 5]]
    assert lwta(x, 3).tolist() == [[0, 2, 0, 0, 5, 5]]
    planes = torch.randn(2, 6, 3, 3)
    groups = planes.view(2, 2, 3, 3, 3)
    expected = torch.where(groups == groups.amax(2, keepdim=True), groups, 0).view_as(planes)
    assert torch.equal(lwta(planes, 3), expected)
    assert lwta(torch.tensor([[1.0, math.nan]]), 2).isnan().tolist() == [[False, True]]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 100, 257, 4133, 20000])
def test_selection_equals_a_sort_in_short_and_long_rows(length: int, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(length)
    rows = torch.randn(7, length, generator=generator).to(dtype)
    rows[1] = rows[1].round()  # ties
    rows[2, ::2] = -rows[2, ::2].abs()
    rows[3, :5], rows[3, 5:9] = math.inf, -math.inf
    rows[4, ::3], rows[4, 1::3] = 0.0, -0.0
    rows[5, :4] = math.nan
    rows[5, 4:8] = -torch.tensor(math.nan, dtype=dtype)  # a NaN with its sign bit set
    rows[6] = torch.finfo(dtype).tiny / 2  # subnormal
    for k in {min(k, length) for k in (1, 2, 7, 50, 99, length // 3 + 1, length)}:
        expected = rows.double().sort(dim=1, descending=True).values[:, k - 1 : k].to(dtype)
        torch.testing.assert_close(kth_largest(rows, k), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, of its forward mode
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("over", ["volume", "channel"])
def test_torch_func_transforms_and_forward_mode_give_the_gradient_of_the_winners(
    over: Any, layout: torch.memory_format
) -> None:
    """Each way to compute a derivative gives that of the winners, and none silently gives zeros."""
    torch.manual_seed(0)
    x, v = (torch.randn(4, 3, 5, 5).contiguous(memory_format=layout) for _ in range(2))

    def f(x: Tensor) -> Tensor:
        return (kwta(x, 0.2, over=over) ** 3).sum()

    winners = kwta(x, 0.2, over=over)
    assert 0.1 < (winners != 0).double().mean() < 0.3
    gradient = 3 * winners**2
    alone = torch.func.grad(lambda image: f(image[None]))

    torch.testing.assert_close(torch.func.grad(f)(x), gradient)
    torch.testing.assert_close(torch.vmap(alone)(x), gradient)
    torch.testing.assert_close(
        torch.vmap(alone, in_dims=3, out_dims=3)(x.permute(1, 2, 3, 0)), gradient.permute(1, 2, 3, 0)
    )
    torch.testing.assert_close(torch.func.jvp(f, (x,), (v,))[1], (gradient * v).sum())
    torch.testing.assert_close(
        torch.vmap(lambda v: torch.func.jvp(f, (x,), (v,))[1])(v[None]), (gradient * v).sum()[None]
    )
    forward, reverse = (
        jacobian(lambda x: kwta(x, 0.2, over=over))(x) for jacobian in (torch.func.jacfwd, torch.func.jacrev)
    )
    torch.testing.assert_close(forward, reverse)
    torch.testing.assert_close(reverse.flatten(4).flatten(0, 3).diagonal(), (winners != 0).float().flatten())
    torch.testing.assert_close(
        torch.func.hessian(f)(x).flatten(4).flatten(0, 3).diagonal(), 6 * winners.flatten()
    )
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(kwta(forward_ad.make_dual(x, v), 0.2, over=over)).tangent
    torch.testing.assert_close(tangent, v * (winners != 0))


def test_a_rank_out_of_range_is_refused() -> None:
    for dtype in DTYPES:
        x = torch.randn(2, 600).to(dtype)
        for k in (-(10**12), -1, 0, 601, 10**13):
            with pytest.raises(ValueError, match=f"k={k}"):
                keep(x, k, False, False)
            with pytest.raises(ValueError, match=f"k={k}"):
                kth_largest(x, k)
    with pytest.raises(TypeError, match="int64"):
        kth_largest(torch.arange(6)[None], 2)
    with pytest.raises(ValueError, match="no value"):
        keep(torch.randn(0, 6), 1, False, False)
    assert kwta_threshold(torch.randn(0, 3, 4, 4), 0.1).shape == (0, 1, 1, 1)
    assert kwta_threshold(torch.randn(2, 3, 0, 4), 0.1, over="channel").shape == (2, 3, 1, 1)


@pytest.mark.parametrize("size", [50, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_threshold_of_zero_is_zero_where_cpus_take_small_numbers_for_it(
    size: int, dtype: torch.dtype
) -> None:
    x = torch.randn(3, size, dtype=dtype, generator=torch.Generator().manual_seed(3)).relu().requires_grad_()
    k = size * 9 // 10
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot")
    try:
        thresholds, kept = kth_largest(x.detach(), k), kwta(x, k=k)
        (gradient,) = torch.autograd.grad(kept.sum(), x)
    finally:
        torch.set_flush_denormal(False)
    assert thresholds.tolist() == [[0], [0], [0]]
    assert torch.equal(kept, x)
    assert gradient.all()  # zeros tie at the threshold
