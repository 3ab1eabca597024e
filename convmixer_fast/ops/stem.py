"""The stem on uint8 images as one operator: normalisation, patches, activation, BatchNorm.

    patch_embed_uint8(x, weight, bias, scale, shift, act, mean, std)
        = pointwise_mix((x / 255 - mean) / std, weight, bias, scale, shift, act)

x: (N, C, H, W) uint8, contiguous, channels-last or any slice; mean, std: a number for each channel;
the rest as for `pointwise_mix` with weights (D, C, p, p), in the dtype of the weight. Pixels are
normalised in float32 (float64 for float64 weights) and rounded once to the weight's dtype. On a GPU
that is part of the kernel's reads; elsewhere PyTorch normalises first. There is no gradient: for
parameters that are trained, normalise first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import gpu
from ..backends.kernel_key import UINT8_STEM as NAME
from ..backends.operands import accumulation_dtype, memory_format_of
from . import pointwise, registry
from .common import LIBRARY, per_channel

LIBRARY.define(
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias, Tensor scale, Tensor shift, str act, "
    "float[] mean, float[] std) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def normalized(
    x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """``(x / 255 - mean) / std`` of images (N, C, H, W), rounded once to ``dtype``."""
    wide = accumulation_dtype(dtype)
    mean_, std_ = (per_channel(torch.tensor(v, dtype=wide, device=x.device)) for v in (mean, std))
    x = x.to(wide, memory_format=memory_format_of(x))
    return (x / 255).sub_(mean_).div_(std_).to(dtype)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    act: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    if x.dtype != torch.uint8:
        raise ValueError(f"{NAME}: x must be uint8, got {x.dtype}: pointwise_mix takes floats")
    if x.device != weight.device:
        raise ValueError(f"{NAME}: weight is on {weight.device} but x is on {x.device}")
    # What the product gets has the shape of x and the dtype of the weight.
    pixels = weight.new_empty(()).expand(x.shape)
    pointwise._check(pixels, weight, bias, scale, shift, act, name=NAME)
    for name, v in (("mean", mean), ("std", std)):
        if len(v) != x.shape[1]:
            raise ValueError(
                f"{NAME}: {name} must have a number for each of {x.shape[1]} channels, got {len(v)}"
            )


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    act: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    pixels = normalized(x, mean, std, weight.dtype)
    return pointwise._reference(pixels, weight, bias, scale, shift, act)


def _kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    act: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    _check(x, weight, bias, scale, shift, act, mean, std)
    if x.numel() == 0 or weight.numel() == 0:
        return _fake(x, weight, bias, scale, shift, act, mean, std)
    call = registry.call_of(NAME, x, weight, bias, act, weight.dtype)
    if call is not None:
        choice = registry.choose(NAME, x.device, weight.dtype, weight.shape[0], call)
        operands = (weight, bias, scale, shift, act, mean, std)
        if choice.case is not None:
            out = gpu.serve(choice.case, choice.config, _reference, x, *operands)
            if out is not None:
                return out
            registry.fall_back(NAME, choice)
        elif choice.memory_format is not None:
            wanted = gpu.stem_format(x, weight.shape[2])
            with torch.autocast(x.device.type, enabled=False):
                return gpu.in_layout(choice.memory_format, wanted, _reference, x, *operands)
    pixels = normalized(x, mean, std, weight.dtype)
    return pointwise._kernel(pixels, weight, bias, scale, shift, act)


LIBRARY.impl(NAME, _kernel, "CompositeExplicitAutograd")


@torch.library.register_fake(f"convmixer_fast::{NAME}", lib=LIBRARY)
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    act: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    _check(x, weight, bias, scale, shift, act, mean, std)
    return pointwise._empty(x, weight)


patch_embed_uint8 = torch.ops.convmixer_fast.patch_embed_uint8
