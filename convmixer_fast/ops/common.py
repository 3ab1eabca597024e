"""Activations, gradients and checks that all fused operators share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arch import ACTIVATIONS
from ..backends.operands import accumulation_dtype

#: The one Library object of the package: torch keeps registrations alive as long as it lives.
LIBRARY = torch.library.Library("convmixer_fast", "DEF")

_aten = torch.ops.aten

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
