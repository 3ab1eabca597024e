"""What tells one compiled GPU kernel from another? The unit that is checked and tuned."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Case(NamedTuple):
    """One operator, on one device, in the form that one compiled kernel serves.

    ``op``: ``depthwise_mix``, ``pointwise_mix`` or ``patch_embed`` (the stem's form of the second);
    ``kernel_size``: k of a depthwise convolution, p of a stem, else 1.
    """

    op: str
    device: str
    dtype: torch.dtype
    channels: int
    out_channels: int
    kernel_size: int
    act: str
    bias: bool

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.op} of {self.channels} -> {self.out_channels} channels, "
            f"kernel {self.kernel_size}, {self.act}, {'' if self.bias else 'no bias, '}"
            f"{dtype} on {self.device}"
        )


def case_of(
    op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, act: str
) -> Case:
    """The case of an operator's call on ``x`` (N, C, H, W) with a convolution's ``weight``."""
    p = weight.shape[-1]
    name = "patch_embed" if op == "pointwise_mix" and p > 1 else op
    return Case(name, str(x.device), x.dtype, x.shape[1], weight.shape[0], p, act, bias is not None)
