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

from ..backends import gpu
from ..backends.cpu import native
from ..backends.operands import accumulation_dtype, memory_format_of
from . import registry
from .common import (
    LIBRARY,
    activation,
    activation_,
    activation_backward,
    affine,
    check_operands,
    per_channel,
)

NAME = "depthwise_mix"

LIBRARY.define(
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias, Tensor scale, Tensor shift, str act) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


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


def _kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, act: str
) -> Tensor:
    _check(x, weight, bias, scale, shift, act)
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=memory_format_of(x))
    call = registry.call_of(NAME, x, weight, bias, act)
    choice = registry.choose(NAME, x.device, x.dtype, weight.shape[0], call)
    backend = choice.backend
    if backend == "cpu":
        return native.depthwise_mix(x, weight, bias, scale, shift, act)
    if choice.case is not None:
        out = gpu.serve(choice.case, choice.config, _reference, x, weight, bias, scale, shift, act)
        if out is not None:
            return out
        registry.fall_back(NAME, choice)
    # Operands have the dtype they are to be computed in: autocast has nothing to add.
    with torch.autocast(x.device.type, enabled=False):
        operands = (weight, bias, scale, shift, act)
        return gpu.in_layout(choice.memory_format, memory_format_of(x), _reference, x, *operands)


LIBRARY.impl(NAME, _kernel, "CompositeExplicitAutograd")


@torch.library.register_fake(f"convmixer_fast::{NAME}", lib=LIBRARY)
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


torch.library.register_autograd(
    f"convmixer_fast::{NAME}", _backward, setup_context=_setup_context, lib=LIBRARY
)

depthwise_mix = torch.ops.convmixer_fast.depthwise_mix
