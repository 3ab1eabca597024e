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

from ..backends.kernel_key import (
    BEYOND_INT32,
    MANY_OUTPUTS,
    KernelKey,
    is_aligned,
    pixels_of,
    stride_class,
)
from ..backends.layout import Shape, stem_format
from ..backends.operands import accumulation_dtype
from ..backends.triton import support
from ..backends.triton.configs import lookup_order, why_slower
from ..backends.triton.precision import dot_precision
from .common import (
    activation,
    activation_,
    activation_backward,
    affine,
    check_operands,
    define,
    laid_out_as,
    per_channel,
    sample_operands,
)
from .execution import run
from .registry import Call, Operator, Order

NAME = "pointwise_mix"


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
    memory_format = stem_format(x, p)
    return torch.empty(shape, dtype=weight.dtype, device=x.device, memory_format=memory_format)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution alone, by PyTorch, in the layout of the operator's result."""
    p = weight.shape[2]
    h = F.conv2d(x, weight, bias, stride=p)
    return h.contiguous(memory_format=stem_format(x, p))


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, act: str
) -> Tensor:
    out = affine(activation_(convolve(x, weight, bias), act), scale, shift)
    return out.contiguous(memory_format=stem_format(x, weight.shape[2]))


def _tf32(dtype: torch.dtype) -> tuple[str, ...]:
    return ("tf32",) if dot_precision(dtype) == "tf32" else ()


def _form(x: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[int, tuple[str, ...]]:
    """1 where a product has more than `MANY_OUTPUTS`, 2 where it has `BEYOND_INT32` rows."""
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    size = int(rows * weight.shape[0] > MANY_OUTPUTS) + int(rows >= BEYOND_INT32)
    return size, (*(("many outputs",) if size else ()), *_tf32(dtype))


def _sample(key: KernelKey, shape: Shape) -> list[Any]:
    x, *rest = sample_operands(key, shape, inputs=key.channels)
    return [x.contiguous(memory_format=torch.channels_last), *rest]


def _sample_shape(key: KernelKey) -> Shape:
    pixels = MANY_OUTPUTS // key.out_channels + 150 if key.size else 390
    return 2, -(-pixels // 26), 13


def reason_library_is_faster(dtype: torch.dtype) -> str:
    """Why PyTorch's own product and one more pass are expected to be faster; ``""`` where ours."""
    return why_slower(dtype, dot_precision(dtype) == "tf32")


def _order(call: Call) -> Order | None:
    """Who multiplies on a GPU, by the architecture's row of `triton.configs.ORDER`."""
    if not support.is_kernel_device(call.device):
        return None
    if call.dtype == torch.float64:
        return Order(("product",), "float64 is multiplied by no kernel of ours")
    slower = reason_library_is_faster(call.dtype)
    if slower:
        return Order(("product",), f"expected to be faster: {slower}")
    row = lookup_order(support.architecture(call.device))
    return Order(row.kernels, row.reason)


POINTWISE = Operator(
    name=NAME,
    key=NAME,
    reference=_reference,
    form=_form,
    sample=_sample,
    sample_shape=_sample_shape,
    strided=True,
    order=_order,
)


def stem_form(x: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[int, tuple[str, ...]]:
    """The classes of the strides of the pixels (N, C, H, W) and of their address."""
    classes = map(stride_class, pixels_of(x).stride())
    return 0, (*classes, "" if is_aligned(x) else "unaligned", *_tf32(dtype))


def _stem_sample(key: KernelKey, shape: Shape) -> list[Any]:
    x, *rest = sample_operands(key, shape, inputs=key.channels)
    return [laid_out_as(key.form, x), *rest]


def stem_sample_shape(key: KernelKey) -> Shape:
    return 2, 11 * key.kernel_size + 1, 13 * key.kernel_size


#: The stem's form of the operator.
PATCH_EMBED = Operator(
    name=NAME,
    key="patch_embed",
    reference=_reference,
    form=stem_form,
    sample=_stem_sample,
    sample_shape=stem_sample_shape,
    strided=True,
    of_stride_one=POINTWISE,
)


def _kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, act: str
) -> Tensor:
    _check(x, weight, bias, scale, shift, act)
    if x.numel() == 0 or weight.numel() == 0:
        return _empty(x, weight)
    return run(PATCH_EMBED, x, weight, bias, scale, shift, act)


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


pointwise_mix = define(
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias, Tensor scale, Tensor shift, str act) -> Tensor",
    _kernel,
    _fake,
    gradient=(_setup_context, _backward),
)
