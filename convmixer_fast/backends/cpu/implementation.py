"""What all implementations by the C++ engine share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.registry import Call, Implementation
from ..stock import reason_stock_is_faster
from . import native


class CpuImplementation(Implementation):
    """An operator by the engine, which computes in float32."""

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)

    def unavailable(self, call: Call) -> str:
        if call.device.type != "cpu":
            return f"the tensors are on {call.device.type}"
        if call.dtype not in self.dtypes:
            dtype = str(call.dtype).removeprefix("torch.")
            return f"the C++ kernels compute in float32, not {dtype}"
        return "" if native.load() else native.why_unavailable()

    def slower(self, call: Call) -> str:
        return reason_stock_is_faster(call.dtype, call.channels)


def on_plain_maps(
    run: Callable[[Tensor], Tensor], otherwise: Callable[..., Tensor], operands: tuple[Any, ...]
) -> Callable[[Tensor], Tensor]:
    """``run`` on contiguous float32 maps, which the engine reads in place; on others
    ``otherwise(x, *operands)``, the operator."""

    def call(x: Tensor) -> Tensor:
        if x.dtype is torch.float32 and x.numel() and x.is_contiguous() and not x.is_neg():
            return run(x)
        return otherwise(x, *operands)

    return call
