"""A further backend in one file: operators by PyTorch's calls, as if kernels were compiled."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor

from convmixer_fast.ops.depthwise import DEPTHWISE
from convmixer_fast.ops.pointwise import PATCH_EMBED, POINTWISE
from convmixer_fast.ops.registry import Backend, Call, Implementation, added


class Plain(Implementation):
    what = "PyTorch's calls"
    #: Operator to number of runs; the factor that makes results wrong.
    calls: ClassVar[Counter[str]] = Counter()
    factor: ClassVar[float] = 1.0

    def compiles_for(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def unavailable(self, call: Call) -> str:
        return "" if call.dtype == torch.float32 else "the plain kernels compute float32"

    def run(self, x: Tensor, *operands: Any, **_: Any) -> Tensor:
        Plain.calls[self.operator.key] += 1
        return self.operator.reference(x, *operands) * Plain.factor


BACKEND = Backend(
    name="plain",
    unavailable_here=lambda: "",
    unavailable=lambda device: "" if device.type == "cpu" else f"the tensors are on {device.type}",
    is_automatic=lambda device: device.type == "cpu",
)


def plain_backend() -> AbstractContextManager[None]:
    return added(BACKEND, *((op, Plain) for op in (DEPTHWISE, POINTWISE, PATCH_EMBED)))
