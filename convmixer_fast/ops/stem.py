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
from typing import Any

import torch
from torch import Tensor

from ..backends.kernel_key import KernelKey
from ..backends.layout import Shape
from ..backends.operands import accumulation_dtype, memory_format_of
from . import pointwise
from .common import define, laid_out_as, per_channel, sample_operands
from .execution import run
from .registry import Operator

NAME = "patch_embed_uint8"


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


def _composed(x: Tensor, weight: Tensor, *operands: Any) -> Tensor:
    """PyTorch normalises, then as `pointwise_mix`."""
    *rest, mean, std = operands
    return run(pointwise.PATCH_EMBED, normalized(x, mean, std, weight.dtype), weight, *rest)


def _sample(key: KernelKey, shape: Shape) -> list[Any]:
    x, *rest = sample_operands(key, shape, inputs=key.channels)
    # Three in four pixels are drawn, the others are black or white.
    pixels = (x * 110 + 128).clamp_(0, 255).to(torch.uint8)
    mean = [0.4 + c % 7 / 40 for c in range(key.channels)]
    return [laid_out_as(key.form, pixels), *rest, mean, mean[::-1]]


PATCH_EMBED_UINT8 = Operator(
    name=NAME,
    key=NAME,
    reference=_reference,
    form=pointwise.stem_form,
    sample=_sample,
    sample_shape=pointwise.stem_sample_shape,
    strided=True,
    composed=_composed,
)


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
        return pointwise._empty(x, weight)
    operands = (weight, bias, scale, shift, act, mean, std)
    return run(PATCH_EMBED_UINT8, x, *operands, dtype=weight.dtype)


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


patch_embed_uint8 = define(
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias, Tensor scale, Tensor shift, str act, "
    "float[] mean, float[] std) -> Tensor",
    _kernel,
    _fake,
)
