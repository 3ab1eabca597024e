"""Inputs and operands of the two operators, and their check against the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convmixer_fast.arch import ACTIVATIONS
from convmixer_fast.backends.operands import accumulation_dtype
from convmixer_fast.ops import depthwise_mix, pointwise_mix
from convmixer_fast.testing import assert_numerics

#: "patches" is the pointwise operator of a stem.
OPS = {"depthwise": depthwise_mix, "pointwise": pointwise_mix, "patches": pointwise_mix}
LAYOUTS = ("contiguous", "channels_last", "sliced", "sliced_channels_last", "expanded")


def make_input(layout: str, shape: tuple[int, int, int, int], dtype=torch.float32) -> Tensor:
    n, c, h, w = shape
    if layout == "expanded":
        return torch.randn(n, 1, h, 1).to(dtype).expand(shape)
    if layout.startswith("sliced"):
        whole = torch.randn(n + 1, c + 3, h + 2, 2 * w + 1).to(dtype)
        if layout == "sliced_channels_last":
            whole = whole.contiguous(memory_format=torch.channels_last)
        return whole[1:, 1 : c + 1, 1 : h + 1, 1 : 2 * w + 1 : 2]
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)


def make_operands(op: str, channels: int, k: int, dtype=torch.float32, bias=True, grad=False):
    out = channels if op == "depthwise" else channels + 3
    side = 1 if op == "pointwise" else k
    shape = (out, 1 if op == "depthwise" else channels, side, side)
    fan_in = shape[1] * shape[2] * shape[3]
    wide = accumulation_dtype(dtype)
    made = [
        (torch.randn(shape) / fan_in**0.5).to(dtype),
        (0.3 * torch.randn(out)).to(dtype) if bias else None,
        torch.rand(out).to(wide) + 0.5,
        torch.randn(out).to(wide),
    ]
    return [t.requires_grad_() if grad and t is not None else t for t in made]


def plain(op: str, x, weight, bias, scale, shift, act: str) -> Tensor:
    """The definition, in the dtype of ``x``."""
    if op == "depthwise":
        h = F.conv2d(x, weight, bias, padding="same", groups=weight.shape[0])
    else:
        h = F.conv2d(x, weight, bias, stride=weight.shape[2])
    a = ACTIVATIONS[act]()(h)
    y = scale.view(1, -1, 1, 1) * a + shift.view(1, -1, 1, 1)
    return (y + x if op == "depthwise" else y).to(x.dtype)


def check(op: str, x: Tensor, operands, act: str) -> None:
    got = OPS[op](x, *operands, act)
    wide = [None if t is None else t.double() for t in operands]
    oracle = plain(op, x.double(), *wide, act)
    same = plain(op, x, *operands, act)
    assert got.dtype == x.dtype
    assert_numerics(got, same, oracle)
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    expected = torch.channels_last if channels_last else torch.contiguous_format
    assert got.is_contiguous(memory_format=expected)
