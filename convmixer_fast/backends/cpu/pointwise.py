"""`pointwise_mix`, 1x1 and of patches, by the C++ engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ops.pointwise import PATCH_EMBED, POINTWISE, convolve, pointwise_mix
from ...ops.registry import implements
from ..operands import memory_format_of
from . import native
from .implementation import CpuImplementation, on_plain_maps


@implements(POINTWISE, "cpu")
@implements(PATCH_EMBED, "cpu")
class CpuPointwise(CpuImplementation):
    what = "one C++ kernel; channels-last, PyTorch's convolution and one C++ pass"

    def run(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        act: str,
        **_: Any,
    ) -> Tensor:
        if memory_format_of(x) == torch.contiguous_format:
            return native.pointwise_mix(x, weight, bias, scale, shift, act)
        with torch.autocast("cpu", enabled=False):
            return native.epilogue_(convolve(x, weight, bias), scale, shift, act)

    def bind_call(self, *operands: Any) -> Callable[[Tensor], Tensor]:
        return on_plain_maps(native.prepared_pointwise(*operands), pointwise_mix, operands)
