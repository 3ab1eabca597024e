"""``auto`` leaves dtypes to PyTorch where it is faster on a CPU, and `explain` says so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from convmixer_fast import ConvMixer, MixerBlock, _native, explain, to_reference, use_backend
from convmixer_fast.ops import backends, stock
from convmixer_fast.testing import trained_like_

SHAPE = (2, 3, 20, 24)
engine = pytest.mark.skipif(_native.load() is None, reason=_native.why_unavailable() or "built")
has_setting = pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "conv"), reason="torch before 2.9 has no such setting"
)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=[True, False], ids=["with bfloat16 units", "without"])
def multiplies(request, monkeypatch) -> bool:
    """A CPU that multiplies half precision itself, and one that does not."""
    monkeypatch.setattr(stock, "_multiplies_bfloat16", lambda: request.param)
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
    assert all("with this CPU's own instructions" in row.reason for row in rows)
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
        assert backends.whole_blocks_run(device, dtype) is not multiplies
    assert backends.whole_blocks_run(device, torch.float32)
    block = MixerBlock(8, 3).eval().bfloat16()
    x = torch.randn(1, 8, 5, 5).bfloat16()
    torch.testing.assert_close(block(x), copy.deepcopy(block)(x))
