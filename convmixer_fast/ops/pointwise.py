"""The channel half of a block as one operator: 1x1 convolution, activation, BatchNorm.

    pointwise_mix(x, weight, bias, scale, shift, act) = scale * act(W x + bias) + shift

x: (N, C, H, W), contiguous, channels-last or any slice; weight: (D, C, 1, 1); bias: (D,) or None;
scale, shift: (D,) float32 (float64 for float64 x): BatchNorm's statistics as an affine map.
Returns (N, D, H, W), channels-last if x is, else contiguous.

A weight (D, C, p, p) is a 1x1 convolution of p x p patches that do not overlap, the stem of a
ConvMixer: then H and W are at least p, and (N, D, H // p, W // p) comes back; on a GPU it is always
channels-last, which the blocks after a stem want.

Source: Trockman and Kolter 2022, section 2: ``BN(sigma(ConvPointwise(z)))``.
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

NAME = "pointwise_mix"

LIBRARY.define(
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias, Tensor scale, Tensor shift, str act) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    act: str,
    name: str = NAME,
) -> None:
    check_operands(name, x, weight, bias, scale, shift, act)
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or weight.shape[2] < 1:
        raise ValueError(
            f"{name}: weight must be (D, C, 1, 1) or (D, C, p, p), got {tuple(weight.shape)}"
        )
    if weight.shape[1] != x.shape[1]:
        raise ValueError(f"{name}: weight is for {weight.shape[1]} channels, x has {x.shape[1]}")
    p = weight.shape[2]
    if p > 1 and (x.shape[2] < p or x.shape[3] < p):
        raise ValueError(
            f"{name}: x of {x.shape[2]} x {x.shape[3]} is smaller than a patch of {p} x {p}"
        )


def _empty(x: Tensor, weight: Tensor) -> Tensor:
    p = weight.shape[2]
    shape = (x.shape[0], weight.shape[0], x.shape[2] // p, x.shape[3] // p)
    memory_format = gpu.stem_format(x, p)
    return torch.empty(shape, dtype=weight.dtype, device=x.device, memory_format=memory_format)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    p = weight.shape[2]
    h = F.conv2d(x, weight, bias, stride=p)
    return h.contiguous(memory_format=gpu.stem_format(x, p))


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, act: str
) -> Tensor:
    out = affine(activation_(_convolve(x, weight, bias), act), scale, shift)
    return out.contiguous(memory_format=gpu.stem_format(x, weight.shape[2]))


def _kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, act: str
) -> Tensor:
    _check(x, weight, bias, scale, shift, act)
    if x.numel() == 0 or weight.numel() == 0:
        return _empty(x, weight)
    call = registry.call_of(NAME, x, weight, bias, act)
    choice = registry.choose(NAME, x.device, x.dtype, weight.shape[0], call)
    if choice.backend == "cpu" and memory_format_of(x) == torch.contiguous_format:
        return native.channel_mix(x, weight, bias, scale, shift, act)
    while choice.case is not None:
        out = gpu.serve(choice.case, choice.config, _reference, x, weight, bias, scale, shift, act)
        if out is not None:
            return out
        # What was just found to be bad has a second choice; what could not be checked has not.
        registry.fall_back(NAME, choice)
        tried, choice = choice.case, registry.choose(NAME, x.device, x.dtype, weight.shape[0], call)
        if choice.case == tried:
            break
    # Operands have the dtype they are to be computed in: autocast has nothing to add.
    with torch.autocast(x.device.type, enabled=False):
        if choice.backend == "cpu":
            return native.epilogue_(_convolve(x, weight, bias), scale, shift, act)
        operands = (weight, bias, scale, shift, act)
        return gpu.in_layout(
            choice.memory_format, gpu.stem_format(x, weight.shape[2]), _reference, x, *operands
        )


LIBRARY.impl(NAME, _kernel, "CompositeExplicitAutograd")


@torch.library.register_fake(f"convmixer_fast::{NAME}", lib=LIBRARY)
def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, act: str
) -> Tensor:
    _check(x, weight, bias, scale, shift, act)
    return _empty(x, weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, scale, _shift, act = inputs
    ctx.save_for_backward(x, weight, bias, scale)
    ctx.act = act


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # As in depthwise.py: the activation's input is computed again rather than kept.
    x, weight, bias, scale = ctx.saved_tensors
    wide = accumulation_dtype(x.dtype)
    p = weight.shape[2]
    h = F.conv2d(x, weight, bias, stride=p)
    grad_a = (grad * per_channel(scale)).to(x.dtype)
    grad_h = activation_backward(grad_a, h, ctx.act)
    mask = [ctx.needs_input_grad[i] for i in range(3)]
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_h, x, weight, [weight.shape[0]], [p, p], [0, 0], [1, 1], False, [0, 0], 1, mask
    )
    grad_scale = grad_shift = None
    if ctx.needs_input_grad[3]:
        grad_scale = (grad.to(wide) * activation(h, ctx.act).to(wide)).sum(dim=(0, 2, 3))
    if ctx.needs_input_grad[4]:
        grad_shift = grad.to(wide).sum(dim=(0, 2, 3))
    return grad_x, grad_weight, grad_bias, grad_scale, grad_shift, None


torch.library.register_autograd(
    f"convmixer_fast::{NAME}", _backward, setup_context=_setup_context, lib=LIBRARY
)

pointwise_mix = torch.ops.convmixer_fast.pointwise_mix
