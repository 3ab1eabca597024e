"""Whole blocks, one after the other, as one operator: what inference on a CPU runs.

    mixer_stack(x, weights, packed, kernel_size, act)

x: (N, C, H, W), float32, bfloat16 or float16, any strides; weights: (C, C, 1, 1) float32, the
pointwise weight of each block; packed: one flat tensor for each block, the rest of it, made by
`_native.mixer_pack`; kernel_size: k; act: a name, of all.
Returns (N, C, H, W) of x's dtype, channels-last if x is, else contiguous; everything between is
float32. There is no gradient: the operator is for parameters that are not trained; `depthwise_mix`
and `pointwise_mix` are its differentiable halves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from ..arch import ACTIVATIONS
from .common import LIBRARY, memory_format_of

NAME = "mixer_stack"

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
    # A copy that only this function knows is worked on in place.
    wide = x.float().contiguous()
    mine = wide.data_ptr() != x.data_ptr()
    out = _native.mixer_stack(wide, weights, packed, kernel_size, act, wide if mine else None)
    return out.to(dtype=x.dtype, memory_format=memory_format)


LIBRARY.impl(NAME, _kernel, "CPU")


@torch.library.register_fake(f"convmixer_fast::{NAME}", lib=LIBRARY)
def _fake(
    x: Tensor, weights: list[Tensor], packed: list[Tensor], kernel_size: int, act: str
) -> Tensor:
    _check(x, weights, packed, kernel_size, act)
    return torch.empty_like(x, memory_format=memory_format_of(x))


mixer_stack = torch.ops.convmixer_fast.mixer_stack
