"""Whole blocks, one after the other, as one operator: what inference on a CPU runs.

    mixer_stack(x, weights, packed, kernel_size, act)

x: (N, C, H, W), float32, bfloat16 or float16, any strides; weights: (C, C, 1, 1) float32, the
pointwise weight of each block; packed: one flat tensor for each block, the rest of it, made by
`native.mixer_pack`; kernel_size: k; act: a name, of all.
Returns (N, C, H, W) of x's dtype, channels-last if x is, else contiguous; everything between is
float32. There is no gradient: the operator is for parameters that are not trained; `depthwise_mix`
and `pointwise_mix` are its differentiable halves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arch import ACTIVATIONS
from ..backends.cpu import native
from ..backends.operands import memory_format_of
from .common import LIBRARY

NAME = "mixer_stack"
#: Images converted to float32 together: enough work for every thread, 16 MB.
_WIDE_FLOATS = 1 << 22

LIBRARY.define(
    f"{NAME}(Tensor x, Tensor[] weights, Tensor[] packed, int kernel_size, str act) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(
    x: Tensor, weights: list[Tensor], packed: list[Tensor], kernel_size: int, act: str
) -> None:
    if x.dim() != 4:
        raise ValueError(f"{NAME}: x must be (N, C, H, W), got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{NAME}: x must be float32, bfloat16 or float16, got {x.dtype}")
    if x.device.type != "cpu":
        raise ValueError(f"{NAME}: x must be on the CPU, not on {x.device}")
    if not packed:
        raise ValueError(f"{NAME}: packed must hold at least one block")
    if len(weights) != len(packed):
        raise ValueError(f"{NAME}: {len(packed)} packed blocks, but {len(weights)} weights")
    if kernel_size < 1:
        raise ValueError(f"{NAME}: kernel_size must be at least 1, got {kernel_size}")
    if act not in ACTIVATIONS:
        raise ValueError(f"{NAME}: unknown activation {act!r}: one of {', '.join(ACTIVATIONS)}")


def _kernel(
    x: Tensor, weights: list[Tensor], packed: list[Tensor], kernel_size: int, act: str
) -> Tensor:
    _check(x, weights, packed, kernel_size, act)
    memory_format = memory_format_of(x)
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=memory_format)
    if x.dtype == torch.float32 and x.is_contiguous():
        return native.mixer_stack(x, weights, packed, kernel_size, act)
    # A few images at a time as contiguous float32, in place: never a second batch of that.
    out = torch.empty_like(x, memory_format=memory_format)
    step = max(1, _WIDE_FLOATS // x[0].numel())
    for i in range(0, x.shape[0], step):
        wide = x[i : i + step].to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        out[i : i + step] = native.mixer_stack(wide, weights, packed, kernel_size, act, out=wide)
    return out


LIBRARY.impl(NAME, _kernel, "CPU")


@torch.library.register_fake(f"convmixer_fast::{NAME}", lib=LIBRARY)
def _fake(
    x: Tensor, weights: list[Tensor], packed: list[Tensor], kernel_size: int, act: str
) -> Tensor:
    _check(x, weights, packed, kernel_size, act)
    return torch.empty_like(x, memory_format=memory_format_of(x))


mixer_stack = torch.ops.convmixer_fast.mixer_stack
