"""The operands of a fused operator, and the dtype and layout of its result."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """The operands of a fused operator, except the activations."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor
    shift: Tensor
    #: What an implementation made of them for its kernel (`Implementation.pack`).
    prepared: Tensor | None = None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that BatchNorm's scale and shift have for activations of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The layout an operator's result has: channels-last for channels-last input, else contiguous.

    Where both hold (one channel, or one pixel) the result is contiguous.
    """
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
