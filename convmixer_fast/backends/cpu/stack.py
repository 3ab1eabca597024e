"""`mixer_stack` by the C++ engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops.mixer import MIXER_STACK, mixer_stack
from ...ops.registry import implements
from ..operands import memory_format_of
from . import native
from .implementation import CpuImplementation, on_plain_maps

#: Images converted to float32 together: enough work for every thread, 16 MB.
_WIDE_FLOATS = 1 << 22


@implements(MIXER_STACK, "cpu")
class CpuStack(CpuImplementation):
    """Whole blocks; half precision is converted at their edges, two passes for a stack.

    For one half of a block those would cost what the kernel gains.
    """

    what = "whole blocks in one C++ call"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def run(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        packed: Sequence[Tensor],
        kernel_size: int,
        act: str,
        **_: Any,
    ) -> Tensor:
        if x.dtype == torch.float32 and x.is_contiguous():
            return native.mixer_stack(x, weights, packed, kernel_size, act)
        # A few images at a time as contiguous float32, in place: never a second batch of that.
        out = torch.empty_like(x, memory_format=memory_format_of(x))
        step, contiguous = max(1, _WIDE_FLOATS // x[0].numel()), torch.contiguous_format
        for i in range(0, x.shape[0], step):
            wide = x[i : i + step].to(torch.float32, memory_format=contiguous, copy=True)
            done = native.mixer_stack(wide, weights, packed, kernel_size, act, out=wide)
            out[i : i + step] = done
        return out

    def bind_call(self, *operands: Any) -> Callable[[Tensor], Tensor]:
        return on_plain_maps(native.prepared_stack(*operands), mixer_stack, operands)
