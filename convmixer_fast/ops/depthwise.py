"""The spatial half of a block as one operator: depthwise, activation, BatchNorm, residual.

    depthwise_mix(x, weight, bias, scale, shift, act) = x + scale * act(dw_kxk(x) + bias) + shift

x: (N, C, H, W), contiguous, channels-last or any slice; weight: (C, 1, k, k), any strides;
bias: (C,) or None; scale, shift: (C,) float32 (float64 for float64 x): BatchNorm's statistics as
an affine map. "Same" padding: (k-1)//2 zeros before and k//2 after each axis. Returns (N, C, H, W),
channels-last if x is, else contiguous.

Source: Trockman and Kolter 2022, section 2: ``BN(sigma(ConvDepthwise(z))) + z``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.kernel_key import KernelKey
from ..backends.layout import Shape
from ..backends.operands import accumulation_dtype, memory_format_of
from .common import (
    activation,
    activation_,
    activation_backward,
    affine,
    check_operands,
    define,
    per_channel,
    sample_operands,
)
from .execution import run
from .registry import Operator

NAME = "depthwise_mix"
#: Columns from which every row of tiles has a first, a last and inner tiles, for any k and tile.
WIDE = 64


def same_padding(kernel_size: int) -> list[int]:
    """The argument of `torch.nn.functional.pad` that keeps H and W under a k x k convolution."""
    before, after = (kernel_size - 1) // 2, kernel_size // 2
    return [before, after, before, after]


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, act: str
) -> None:
    check_operands(NAME, x, weight, bias, scale, shift, act)
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"{NAME}: weight must be (C, 1, k, k), got {tuple(weight.shape)}")
    if weight.shape[0] != x.shape[1]:
        raise ValueError(f"{NAME}: weight is for {weight.shape[0]} channels, x has {x.shape[1]}")


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    k = weight.shape[-1]
    if k % 2:
        return F.conv2d(x, weight, bias, padding=k // 2, groups=weight.shape[0])
    return F.conv2d(F.pad(x, same_padding(k)), weight, bias, groups=weight.shape[0])


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, act: str
) -> Tensor:
    h = activation_(_convolve(x, weight, bias), act)
    return affine(h, scale, shift).add_(x).contiguous(memory_format=memory_format_of(x))


def _form(x: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[int, tuple[str, ...]]:
    """The width: below `WIDE` itself, from there on the smallest one of its class."""
    c, width = x.shape[1], x.shape[3]
    if width < WIDE:
        return width, (f"width {width}",)
    # The kernel's distance from row to row, in words of two channels where there are such.
    words = c // 2 if dtype == torch.bfloat16 and c % 2 == 0 else c
    width = WIDE if width * words % 16 == 0 else WIDE + 1
    return width, (f"width {width} or more",)


def _sample(key: KernelKey, shape: Shape) -> list[Any]:
    x, *rest = sample_operands(key, shape, inputs=1)
    return [x.contiguous(memory_format=torch.channels_last), *rest]


DEPTHWISE = Operator(
    name=NAME,
    key=NAME,
    reference=_reference,
    form=_form,
    sample=_sample,
    sample_shape=lambda key: (2, 2 * key.kernel_size + 11, key.size),
    depthwise=True,
)


def _kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, act: str
) -> Tensor:
    _check(x, weight, bias, scale, shift, act)
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=memory_format_of(x))
    return run(DEPTHWISE, x, weight, bias, scale, shift, act)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, act: str
) -> Tensor:
    _check(x, weight, bias, scale, shift, act)
    return torch.empty_like(x, memory_format=memory_format_of(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, scale, _shift, act = inputs
    ctx.save_for_backward(x, weight, bias, scale)
    ctx.act = act


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The activation's input is computed again rather than kept: it is one depthwise convolution,
    # and keeping it would double the memory of a block. Every step is a PyTorch operator, so the
    # gradient is differentiable and traceable in its turn.
    x, weight, bias, scale = ctx.saved_tensors
    wide = accumulation_dtype(x.dtype)
    k, channels = weight.shape[-1], weight.shape[0]
    padded = F.pad(x, same_padding(k))
    h = F.conv2d(padded, weight, bias, groups=channels)
    grad_a = (grad * per_channel(scale)).to(x.dtype)
    grad_h = activation_backward(grad_a, h, ctx.act)
    need_x, need_weight, need_bias = (ctx.needs_input_grad[i] for i in range(3))
    grad_padded, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_h,
        padded,
        weight,
        [channels],
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        channels,
        [need_x, need_weight, need_bias],
    )
    grad_x = None
    if need_x:
        before = same_padding(k)[0]
        inner = grad_padded[:, :, before : before + x.shape[2], before : before + x.shape[3]]
        grad_x = inner + grad
    grad_scale = grad_shift = None
    if ctx.needs_input_grad[3]:
        grad_scale = (grad.to(wide) * activation(h, ctx.act).to(wide)).sum(dim=(0, 2, 3))
    if ctx.needs_input_grad[4]:
        grad_shift = grad.to(wide).sum(dim=(0, 2, 3))
    return grad_x, grad_weight, grad_bias, grad_scale, grad_shift, None


depthwise_mix = define(
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias, Tensor scale, Tensor shift, str act) -> Tensor",
    _kernel,
    _fake,
    gradient=(_setup_context, _backward),
)
