"""`depthwise_mix` by the C++ engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.depthwise import DEPTHWISE
from ...ops.registry import implements
from ..operands import Packed, memory_format_of
from . import native
from .implementation import CpuImplementation


@implements(DEPTHWISE, "cpu")
class CpuDepthwise(CpuImplementation):
    what = "one C++ kernel"

    def run(self, x: Tensor, *operands: Any, **_: Any) -> Tensor:
        return native.depthwise_mix(x, *operands)

    def layout_of_packed(self, x: Tensor) -> torch.memory_format:
        return memory_format_of(x)

    def pack(self, packed: Packed, layout: torch.memory_format | None) -> Packed:
        """For channels-last maps with the taps as (k, k, 1, C) in memory."""
        if layout != torch.channels_last:
            return packed
        weight = packed.weight.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
        return packed._replace(weight=weight)
