"""Registration, activations, checks and samples that all fused operators share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arch import ACTIVATIONS
from ..backends.kernel_key import KernelKey, strides_like
from ..backends.layout import Shape
from ..backends.operands import accumulation_dtype

#: The one Library object of the package: torch keeps registrations alive as long as it lives.
LIBRARY = torch.library.Library("convmixer_fast", "DEF")

_aten = torch.ops.aten


def define(
    schema: str,
    kernel: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    gradient: tuple[Callable[..., None], Callable[..., Any]] | None = None,
    key: str = "CompositeExplicitAutograd",
) -> Any:
    """Register an operator of the package with PyTorch; returns it.

    Args:
        schema: name and signature.
        kernel: computes it, for tensors of the dispatch ``key``.
        fake: its result without values, for compilers.
        gradient: ``setup_context`` and ``backward``, as of `torch.library.register_autograd`.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, kernel, key)
    full = f"convmixer_fast::{name}"
    torch.library.register_fake(full, fake, lib=LIBRARY)
    if gradient is not None:
        setup_context, backward = gradient
        torch.library.register_autograd(full, backward, setup_context=setup_context, lib=LIBRARY)
    return getattr(torch.ops.convmixer_fast, name)


_INPLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda h: _aten.gelu_(h),
    "relu": torch.relu_,
    "silu": lambda h: F.silu(h, inplace=True),
    "hardswish": lambda h: F.hardswish(h, inplace=True),
    "identity": lambda h: h,
}


def _silu_backward(grad: Tensor, h: Tensor) -> Tensor:
    # Written out because aten::silu_backward has no derivative of its own.
    sigmoid = torch.sigmoid(h)
    return grad * (sigmoid * (1 + h * (1 - sigmoid)))


_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": lambda grad, h: _aten.gelu_backward(grad, h),
    "relu": lambda grad, h: _aten.threshold_backward(grad, h, 0),
    "silu": lambda grad, h: _silu_backward(grad, h),
    "hardswish": lambda grad, h: _aten.hardswish_backward(grad, h),
    "identity": lambda grad, h: grad,
}

_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "identity": lambda h: h,
}


def activation(h: Tensor, act: str) -> Tensor:
    return _FORWARD[act](h)


def activation_(h: Tensor, act: str) -> Tensor:
    """In place; only for tensors that autograd does not watch."""
    return _INPLACE[act](h)


def activation_backward(grad: Tensor, h: Tensor, act: str) -> Tensor:
    """Gradient with respect to ``h``, itself differentiable."""
    return _BACKWARD[act](grad, h)


def per_channel(v: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, 1)."""
    return v.view(1, -1, 1, 1)


def affine(a: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``scale * a + shift`` per channel in one pass, rounded once to the dtype of ``a``."""
    if a.numel() == 0:
        return a.clone()
    # BatchNorm with zero mean and unit variance is the one PyTorch kernel that takes half
    # activations with float32 parameters. F.batch_norm refuses eps = 0 in torch 2.10 and 2.11.
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    return torch.batch_norm(a, scale, shift, zeros, ones, False, 0.0, 0.0, False)


def check_operands(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, act: str
) -> None:
    """Shapes, dtypes and devices of an operator's arguments.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {act!r}: one of {', '.join(ACTIVATIONS)}")
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be (N, C, H, W), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{op}: x must be of a floating dtype, got {x.dtype}")
    channels = weight.shape[0]
    vectors = {"scale": scale, "shift": shift} | ({} if bias is None else {"bias": bias})
    for name, v in vectors.items():
        if v.shape != (channels,):
            raise ValueError(f"{op}: {name} must have shape ({channels},), got {tuple(v.shape)}")
    accumulation = accumulation_dtype(x.dtype)
    dtypes = {
        "weight": (weight, x.dtype),
        "scale": (scale, accumulation),
        "shift": (shift, accumulation),
    }
    if bias is not None:
        dtypes["bias"] = (bias, x.dtype)
    for name, (tensor, wanted) in dtypes.items():
        if tensor.dtype != wanted:
            raise ValueError(
                f"{op}: {name} must be {wanted} for x of {x.dtype}, got {tensor.dtype}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but x is on {x.device}")


def sample_operands(key: KernelKey, shape: Shape, inputs: int) -> list[Any]:
    """Random x, weight, bias, scale and shift for a key, and its activation.

    Statistics are those of a trained layer, and the user's random numbers stay what they would have
    been.

    Args:
        shape: N, H, W of x.
        inputs: channels that each output is a sum over.
    """
    device = torch.device(key.device)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = key.dtype) -> Tensor:
        wide = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return wide.to(dtype)

    n, h, w = shape
    k, d = key.kernel_size, key.out_channels
    wide = accumulation_dtype(key.dtype)
    x = draw(n, key.channels, h, w)
    weight = (draw(d, inputs, k, k, dtype=wide) / (inputs * k * k) ** 0.5).to(key.dtype)
    if key.dtype == torch.float64:
        # There is no wider dtype to measure by. Products of few bits sum up exactly, in any order,
        # so that what is left of the kernel's and PyTorch's errors is what follows the sum.
        x, weight = (t.mul_(2**12).round_().div_(2**12) for t in (x, weight))
    bias = draw(d) if key.bias else None
    return [x, weight, bias, draw(d, dtype=wide), draw(d, dtype=wide), key.act]


def laid_out_as(form: tuple[str, ...], x: Tensor) -> Tensor:
    """A tensor equal to images x whose strides and address have the classes of a stem's form."""
    strides = strides_like(form[:4], x.shape)
    first = int(form[4] == "unaligned")
    elements = first + 1 + sum(s * (n - 1) for s, n in zip(strides, x.shape, strict=True))
    room = torch.empty(elements, dtype=x.dtype, device=x.device)
    return room.as_strided(x.shape, strides, first).copy_(x)
