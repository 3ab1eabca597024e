"""``auto`` leaves dtypes to PyTorch where it is faster on a CPU, and `explain` says so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from convmixer_fast import ConvMixer, MixerBlock, explain, to_reference, use_backend
from convmixer_fast.backends import stock
from convmixer_fast.backends.cpu import native
from convmixer_fast.ops.dispatch import runs
from convmixer_fast.ops.mixer import MIXER_STACK
from convmixer_fast.testing import trained_like_

SHAPE = (2, 3, 20, 24)
engine = pytest.mark.skipif(native.load() is None, reason=native.why_unavailable() or "built")
has_setting = pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "conv"), reason="torch before 2.9 has no such setting"
)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=[True, False], ids=["with AMX", "without"])
def multiplies(request, monkeypatch) -> bool:
    """A CPU that multiplies half precision itself, and one that does not."""
    monkeypatch.setattr(stock, "_bfloat16_units", lambda: "AMX" if request.param else "")
    monkeypatch.setattr(stock, "_multiplies_float16", lambda: request.param)
    return request.param


def model(dtype: torch.dtype) -> ConvMixer:
    torch.manual_seed(0)
    return trained_like_(ConvMixer(16, 3, 5, 4, num_classes=6), SHAPE).eval().to(dtype)


def layouts(net: nn.Module) -> list[bool]:
    """Whether each depthwise convolution that is called gets channels-last."""
    seen: list[bool] = []
    for block in net.blocks:
        block[0].fn[0].register_forward_pre_hook(
            lambda m, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
        )
    return seen


@engine
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_where_it_is_fastest(multiplies, dtype, layout) -> None:
    net, x = model(dtype), torch.randn(SHAPE, dtype=dtype).contiguous(memory_format=layout)
    rows = explain(net, x)
    maps = net.stem(x)
    on_blocks = [row for row in rows if row.module.startswith("blocks")]
    if not multiplies:
        assert {row.backend for row in on_blocks} == {"cpu"}
        return
    assert {row.backend for row in rows} == {"reference"}
    assert all("with this CPU's AMX" in row.reason for row in rows)
    for _ in range(3):
        got = net(x)
    plain = to_reference(net).to(memory_format=torch.channels_last)
    want = plain(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    with use_backend("cpu"):
        assert {row.backend for row in explain(net.blocks, maps)} == {"cpu"}


@engine
def test_autocast_goes_where_bfloat16_is_fastest(multiplies) -> None:
    net, x = model(torch.float32), torch.randn(SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        rows = explain(net, x)[1:]
        got, want = net(x), to_reference(net)(x)
    assert {row.backend for row in rows} == {"reference" if multiplies else "cpu"}
    torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)
    assert {row.backend for row in explain(net, x)} == {"cpu"}


@engine
def test_blocks_compute_in_channels_last_and_give_back_the_layout_they_got(multiplies) -> None:
    net = model(torch.bfloat16)
    maps = torch.randn(2, 16, 6, 5).bfloat16()
    last = maps.contiguous(memory_format=torch.channels_last)
    for module in (net.blocks, net.blocks[1]):
        assert module(maps).is_contiguous()
        assert module(last).is_contiguous(memory_format=torch.channels_last)
    if multiplies:
        seen = layouts(net)
        net.blocks(maps), net.blocks[1](maps)
        assert seen == [True] * 4
        # Training is left as it is.
        seen.clear()
        net.train().blocks(maps)
        assert seen == [False] * 3


@engine
@has_setting
def test_float32_that_may_be_rounded_goes_where_that_is_fastest(multiplies) -> None:
    net, x = model(torch.float32), torch.randn(SHAPE)
    want = net(x)
    net(x)
    for allow in (torch.backends.mkldnn.conv, torch.backends):
        kept = allow.fp32_precision
        allow.fp32_precision = "bf16"
        try:
            assert stock.allows_bfloat16()
            rows = explain(net, x)
            assert {row.backend for row in rows} == {"reference" if multiplies else "cpu"}
            if multiplies:
                assert all("fp32_precision" in row.reason for row in rows)
            got = net(x)
            assert torch.equal(got, want) == (not multiplies)
            torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)
        finally:
            allow.fp32_precision = kept
        assert torch.equal(net(x), want)


@engine
def test_matmul_precision_does_not_concern_convolutions(multiplies) -> None:
    net, x = model(torch.float32), torch.randn(SHAPE)
    torch.set_float32_matmul_precision("medium")
    try:
        assert {row.backend for row in explain(net, x)} == {"cpu"}
    finally:
        torch.set_float32_matmul_precision("highest")


@engine
def test_operators_called_directly_follow_the_same_rule(multiplies) -> None:
    device = torch.device("cpu")
    for dtype in (torch.bfloat16, torch.float16):
        assert runs(MIXER_STACK, device, dtype, 8) is not multiplies
    assert runs(MIXER_STACK, device, torch.float32, 8)
    block = MixerBlock(8, 3).eval().bfloat16()
    x = torch.randn(1, 8, 5, 5).bfloat16()
    torch.testing.assert_close(block(x), copy.deepcopy(block)(x))


@pytest.mark.parametrize("units", ["AMX", "AVX512-BF16", ""])
def test_width_decides_where_bfloat16_is_only_twice_as_fast(monkeypatch, units) -> None:
    monkeypatch.setattr(stock, "_bfloat16_units", lambda: units)
    narrow, wide = stock._AVX512_CHANNELS - 1, stock._AVX512_CHANNELS
    reasons = [bool(stock.reason_stock_is_faster(torch.bfloat16, c)) for c in (narrow, wide)]
    assert reasons == {"AMX": [True, True], "AVX512-BF16": [False, True], "": [False, False]}[units]
    monkeypatch.setattr(stock, "allows_bfloat16", lambda: True)
    assert bool(stock.reason_stock_is_faster(torch.float32, wide)) == (units == "AMX")


@engine
@pytest.mark.parametrize("channels", [1023, 1024])
@pytest.mark.parametrize("side", [1, 3, 4, 31, 32])
@pytest.mark.parametrize("amx", [False, True])
def test_layout_follows_width_and_pixels(monkeypatch, amx, side, channels) -> None:
    monkeypatch.setattr(stock, "_bfloat16_units", lambda: "AMX" if amx else "AVX512-BF16")
    x = torch.empty(1, channels, side, side, dtype=torch.bfloat16)
    contiguous = not amx and channels == 1024 and side in (4, 31)
    want = torch.contiguous_format if contiguous else torch.channels_last
    assert stock.fastest_layout(x) == want


@engine
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("of", [lambda net: net.blocks, lambda net: net.blocks[0]])
def test_a_later_call_of_stock_blocks_gives_the_same_bits(monkeypatch, of, layout) -> None:
    monkeypatch.setattr(stock, "_bfloat16_units", lambda: "AMX")
    module = of(model(torch.bfloat16))
    x = torch.randn(2, 16, 6, 5).bfloat16().contiguous(memory_format=layout)
    first = module(x)
    assert module._packed.route is not None
    for y in (x, x[:1], x[:, :, :4, :4]):
        later, fresh = module(y), copy.deepcopy(module)(y)
        assert torch.equal(later, fresh)
        assert later.stride() == fresh.stride()
    assert torch.equal(module(x), first)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), copy.deepcopy(module)(x))
    seen = []
    module.register_forward_hook(lambda m, args, out: seen.append(out))
    block = module[0] if len(module) == 3 else module
    block[1].register_forward_hook(lambda m, args, out: seen.append(out))
    module(x)
    assert len(seen) == 2
    with torch.enable_grad():
        assert module(x.requires_grad_()).requires_grad
