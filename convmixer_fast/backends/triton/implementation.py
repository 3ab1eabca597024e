"""What all implementations by Triton kernels share."""

from __future__ import annotations

from typing import ClassVar

import torch

from ...ops.registry import Call, Implementation
from . import support


class TritonImplementation(Implementation):
    """An operator by one kernel, or by one that ends PyTorch's product."""

    what = "one Triton kernel"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16, torch.float16)

    def compiles_for(self, device: torch.device) -> bool:
        return support.is_kernel_device(device)

    def unavailable(self, call: Call) -> str:
        if call.dtype not in self.dtypes:
            return (
                "the Triton kernels compute float32, bfloat16 and float16, "
                f"not {str(call.dtype).removeprefix('torch.')}"
            )
        return support.why_not(call.device)
