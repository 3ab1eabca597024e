"""The key of a compiled GPU kernel: the unit that is checked and tuned.

Triton compiles a kernel again for every class of its arguments: an integer that is 1, a multiple of
16, or neither, of 32 bits or 64; an address that is a multiple of 16 or not. What of that follows
from channels and dtype needs no name of its own; the rest is in `Case.size` and `Case.form`, so
that a kernel is checked in the very form that the call runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .triton.configs import POINTWISE
from .triton.precision import dot_precision

#: The stem's operator on uint8 images.
UINT8_STEM = "patch_embed_uint8"
#: Columns from which every row of tiles has a first, a last and inner tiles, for any k and tile.
WIDE = 64
#: Outputs above which no row of the table for products of few outputs holds.
MANY_OUTPUTS = max(row.outputs for row in POINTWISE if row.outputs is not None)


#: Rows of a product, and strides, that do not fit 32 bits.
BEYOND_INT32 = 1 << 31


class Case(NamedTuple):
    """One operator, on one device, in the form that one compiled kernel computes.

    ``op``: ``depthwise_mix``, ``pointwise_mix``, ``patch_embed`` (the stem's form of the second) or
    ``patch_embed_uint8`` (the same on uint8 images); ``dtype``: the weight's;
    ``kernel_size``: k of a depthwise convolution, p of a stem, else 1. ``size``: what of the
    activations' size chooses another form: of a depthwise convolution the width, below `WIDE`
    itself and from there on the smallest one of its class; of a product 1 where it has more than
    `MANY_OUTPUTS`, 2 where it has `BEYOND_INT32` rows; else 0. ``tile``: the kernel's configuration
    in words, where it is not the shipped one. ``form``: what else chooses another form: of a stem
    the classes of the strides of its pixels (N, C, H, W) and of their address, of a product or stem
    in float32 ``tf32`` where that is allowed.
    """

    op: str
    device: str
    dtype: torch.dtype
    channels: int
    out_channels: int
    kernel_size: int
    act: str
    bias: bool
    size: int = 0
    tile: str = ""
    form: tuple[str, ...] = ()

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        size = ""
        if self.op == "depthwise_mix":
            size = f", width {self.size}{' or more' if self.size >= WIDE else ''}"
        elif self.size:
            size = ", many outputs"
        form = f", {' '.join(self.form)}" if self.form else ""
        return (
            f"{self.op} of {self.channels} -> {self.out_channels} channels, "
            f"kernel {self.kernel_size}, {self.act}, {'' if self.bias else 'no bias, '}"
            f"{dtype} on {self.device}{size}{form}"
        )


def stride_class(stride: int) -> str:
    """The class of an integer argument: ``1``, ``16`` for its multiples, else ``any``; an ``L``
    behind it for 64 bits."""
    kind = "1" if stride == 1 else "any" if stride % 16 else "16"
    return kind if stride < BEYOND_INT32 else f"{kind}L"


def strides_like(classes: Sequence[str], shape: Sequence[int]) -> list[int]:
    """The smallest strides of these classes under which no two elements of ``shape`` meet.

    The axis of stride 1 is innermost, those beyond 32 bits outermost, and else the last one varies
    fastest, as in PyTorch's own two layouts: of a contiguous or channels-last tensor's classes and
    its shape, these are its strides.
    """
    strides, extent = [0] * len(shape), 1
    order = sorted(
        range(len(shape)), key=lambda i: (classes[i].endswith("L"), classes[i] != "1", -i)
    )
    for i in order:
        stride = max(extent, BEYOND_INT32 if classes[i].endswith("L") else 1)
        while stride_class(stride) != classes[i]:
            stride += 1
        strides[i], extent = stride, extent + stride * (shape[i] - 1)
    return strides


def pixels_of(x: torch.Tensor) -> torch.Tensor:
    """Images (N, C, H, W) as the stem's kernel is given them: the same, with strides that are 0
    where they mean nothing, and at most one that is 1."""
    strides = [0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True)]
    if strides.count(1) > 1:
        return pixels_of(x.contiguous())  # windows that overlap
    return x if tuple(strides) == x.stride() else x.as_strided(x.shape, strides)


def is_aligned(x: torch.Tensor) -> bool:
    """Whether a tensor begins at a multiple of 16 bytes; of one without memory, in its storage."""
    address = x.storage_offset() * x.element_size()
    if not isinstance(x, FakeTensor):
        with suppress(RuntimeError):  # other tensors without memory
            address = x.data_ptr()
    return bool(address % 16 == 0)


def case_of(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    act: str,
    dtype: torch.dtype | None = None,
) -> Case:
    """The case of an operator's call on ``x`` (N, C, H, W) with a convolution's ``weight``.

    Args:
        dtype: that is computed in, where it is not that of ``x``.
    """
    n, c, h, w = x.shape
    d, p = weight.shape[0], weight.shape[-1]
    dtype, size, form = dtype or x.dtype, 0, []
    if op == "depthwise_mix":
        size = w
        if w >= WIDE:
            # The kernel's distance from row to row, in words of two channels where there are such.
            words = c // 2 if dtype == torch.bfloat16 and c % 2 == 0 else c
            size = WIDE if w * words % 16 == 0 else WIDE + 1
    elif p == 1 and op != UINT8_STEM:
        rows = n * h * w
        size = int(rows * d > MANY_OUTPUTS) + int(rows >= BEYOND_INT32)
    else:
        op = UINT8_STEM if op == UINT8_STEM else "patch_embed"
        form = [*map(stride_class, pixels_of(x).stride()), "" if is_aligned(x) else "unaligned"]
    if op != "depthwise_mix" and dot_precision(dtype) == "tf32":
        form.append("tf32")
    return Case(op, str(x.device), dtype, c, d, p, act, bias is not None, size, form=tuple(form))
