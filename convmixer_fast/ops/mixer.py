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
from ..backends.operands import memory_format_of
from .common import define
from .registry import Operator, implementations

NAME = "mixer_stack"


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


MIXER_STACK = Operator(name=NAME, key=NAME)


def _kernel(
    x: Tensor, weights: list[Tensor], packed: list[Tensor], kernel_size: int, act: str
) -> Tensor:
    _check(x, weights, packed, kernel_size, act)
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=memory_format_of(x))
    (engine,) = (i for i in implementations(MIXER_STACK) if i.backend == "cpu")
    return engine.run(x, weights, packed, kernel_size, act)


def _fake(
    x: Tensor, weights: list[Tensor], packed: list[Tensor], kernel_size: int, act: str
) -> Tensor:
    _check(x, weights, packed, kernel_size, act)
    return torch.empty_like(x, memory_format=memory_format_of(x))


mixer_stack = define(
    f"{NAME}(Tensor x, Tensor[] weights, Tensor[] packed, int kernel_size, str act) -> Tensor",
    _kernel,
    _fake,
    key="CPU",
)
