"""The key of a compiled GPU kernel: the unit that is checked and tuned.

Triton compiles a kernel again for every class of its arguments: an integer that is 1, a multiple of
16, or neither, of 32 bits or 64; an address that is a multiple of 16 or not. What of that follows
from channels and dtype needs no name of its own; the rest is in `KernelKey.size` and
`KernelKey.form`, so that a kernel is checked in the very form that the call runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .triton.configs import POINTWISE

#: Outputs above which no row of the table for products of few outputs holds.
MANY_OUTPUTS = max(row.outputs for row in POINTWISE if row.outputs is not None)
#: Rows of a product, and strides, that do not fit 32 bits.
BEYOND_INT32 = 1 << 31


class KernelKey(NamedTuple):
    """One operator, on one device, in the form that one compiled kernel computes.

    ``op``: an operator's key; ``dtype``: the weight's; ``kernel_size``: k of a depthwise
    convolution, p of a stem, else 1. ``size``: what of the activations' size chooses another form,
    as a number that the operator's sample is made from; ``tile``: the kernel's configuration in
    words, where it is not the shipped one; ``form``: what else chooses another form, in words.
    Operators set both (`Operator.form`).
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
        form = f", {' '.join(self.form)}" if self.form else ""
        return (
            f"{self.op} of {self.channels} -> {self.out_channels} channels, "
            f"kernel {self.kernel_size}, {self.act}, {'' if self.bias else 'no bias, '}"
            f"{dtype} on {self.device}{form}"
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
