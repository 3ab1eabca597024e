"""Checks and layout of the operands of a GEMM."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ....arch import ACTIVATIONS

#: Tiles address their elements with int32 offsets from an int64 start: 256 rows at most, each less
#: than this many elements from the next.
MAX_STRIDE = 2**31 // 256

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    act: str,
) -> None:
    """The operands of ``op``: x (N, C, H, W), weight (D, C, p, p), and vectors of D.

    Raises:
        ValueError: naming the operand that does not fit.
    """
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"{op}: x and weight must have four axes, got {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    if weight.dtype not in DTYPES:
        raise ValueError(f"{op}: weight must be float32, float16 or bfloat16, got {weight.dtype}")
    d, c, p, q = weight.shape
    if p != q or p < 1:
        raise ValueError(f"{op}: weight must be (D, C, p, p), got {tuple(weight.shape)}")
    if c != x.shape[1]:
        raise ValueError(f"{op}: weight is for {c} channels, x has {x.shape[1]}")
    if max(d, c * p * p) >= MAX_STRIDE:
        raise ValueError(f"{op}: {tuple(weight.shape)}: C p p and D must be below {MAX_STRIDE}")
    if weight.device != x.device:
        raise ValueError(f"{op}: weight is on {weight.device} but x is on {x.device}")
    check_vectors(op, x, d, bias, scale, shift, act)


def check_vectors(
    op: str,
    x: Tensor,
    d: int,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    act: str,
) -> None:
    """What ends a product with d channels, on the device of ``x``; scale and shift are float32, of
    float64 ``x`` float64.

    Raises:
        ValueError: naming the operand that does not fit.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {act!r}: one of {', '.join(ACTIVATIONS)}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, vector in (("bias", bias), ("scale", scale), ("shift", shift)):
        if vector is None:
            continue
        if vector.shape != (d,) or not vector.is_contiguous():
            raise ValueError(f"{op}: {name} must be ({d},), contiguous, got {tuple(vector.shape)}")
        if name != "bias" and vector.dtype != wide:
            wanted = str(wide).removeprefix("torch.")
            raise ValueError(f"{op}: {name} must be {wanted}, got {vector.dtype}")
        if vector.device != x.device:
            raise ValueError(f"{op}: {name} is on {vector.device} but x is on {x.device}")


def result(op: str, out: Tensor | None, shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
    """``out``, or a new channels-last tensor of ``shape`` with the dtype and device of ``like``.

    Raises:
        ValueError: ``out`` has another shape, dtype, device, or gaps between its pixels.
    """
    n, d, h, w = shape
    if out is None:
        return torch.empty((n, h, w, d), dtype=like.dtype, device=like.device).permute(0, 3, 1, 2)
    if out.shape != shape or out.dtype != like.dtype or out.device != like.device:
        raise ValueError(
            f"{op}: out must be {shape}, {like.dtype}, on {like.device}; "
            f"got {tuple(out.shape)}, {out.dtype}, on {out.device}"
        )
    if not out.permute(0, 2, 3, 1).is_contiguous():
        raise ValueError(f"{op}: out must be channels-last without gaps, has {out.stride()}")
    return out


def pixel_rows(x: Tensor, rows: int) -> tuple[Tensor, int]:
    """x (N, C, H, W) as ``rows`` = N H W rows of C neighbours: the tensor to read, and the stride.

    Channels-last tensors and their slices by channel or image are read in place; anything else is
    copied to channels-last first.
    """
    c = x.shape[1]
    if not x.is_contiguous(memory_format=torch.channels_last) or x.stride(1) != 1:
        stride = _uniform_stride(x) if c == 1 or x.stride(1) == 1 else None
        if stride is not None and stride < MAX_STRIDE:
            return x, stride
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return x, c


def _uniform_stride(x: Tensor) -> int | None:
    """The distance from each pixel to the next one in (N, H, W) order; None when it varies."""
    stride, span = None, 1
    for axis in (3, 2, 0):
        if x.shape[axis] == 1:
            continue
        if stride is None:
            stride = x.stride(axis)
        elif x.stride(axis) != stride * span:
            return None
        span *= x.shape[axis]
    return x.shape[1] if stride is None else stride


def vector_width(*counts: int) -> int:
    """The largest power of two up to 16 that divides all ``counts``.

    Kernels are given counts divided by it and multiply it back: a factor that the compiler sees
    lets it move 16 bytes at once, where it would have to assume one element.
    """
    width = 16
    for count in counts:
        while count % width:
            width //= 2
    return width


def interpreted(kernel: Any) -> bool:
    """Whether ``kernel`` runs in Triton's interpreter, which multiplies bfloat16 as raw bits."""
    return not isinstance(kernel, triton.runtime.JITFunction)
