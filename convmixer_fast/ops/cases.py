"""What tells one compiled GPU kernel from another? The unit that is checked and tuned."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels.configs import POINTWISE

#: The stem's operator on uint8 images.
UINT8_STEM = "patch_embed_uint8"
#: Columns from which every row of tiles has a first, a last and inner tiles, for any k and tile.
WIDE = 64
#: Outputs above which no row of the table for products of few outputs holds.
MANY_OUTPUTS = max(row.outputs for row in POINTWISE if row.outputs is not None)


class Case(NamedTuple):
    """One operator, on one device, in the form that one compiled kernel serves.

    ``op``: ``depthwise_mix``, ``pointwise_mix``, ``patch_embed`` (the stem's form of the second) or
    ``patch_embed_uint8`` (the same on uint8 images); ``dtype``: the weight's;
    ``kernel_size``: k of a depthwise convolution, p of a stem, else 1. ``size``: what of the
    activations' size chooses another form: of a depthwise convolution the width, up to `WIDE`; of a
    product 1 where it has more than `MANY_OUTPUTS`; else 0. ``tile``: the kernel's configuration in
    words, where it is not the shipped one.
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

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.op} of {self.channels} -> {self.out_channels} channels, "
            f"kernel {self.kernel_size}, {self.act}, {'' if self.bias else 'no bias, '}"
            f"{dtype} on {self.device}"
        )


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
    size = 0
    if op == "depthwise_mix":
        size = min(w, WIDE)
    elif p == 1 and op != UINT8_STEM:
        size = int(n * h * w * d > MANY_OUTPUTS)
    elif op != UINT8_STEM:
        op = "patch_embed"
    return Case(op, str(x.device), dtype or x.dtype, c, d, p, act, bias is not None, size)
