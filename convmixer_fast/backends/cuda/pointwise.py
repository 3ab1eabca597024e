"""`pointwise_mix` of 1x1 weights by the CUDA extension, one implementation a family of kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ...ops.pointwise import POINTWISE
from ...ops.registry import Call, Implementation, Launch, Operator, implements
from .. import self_check
from ..kernel_key import KernelKey
from ..layout import aligned, as_channels_last, into, stem_format, vectors
from ..operands import Packed
from ..triton import support
from ..triton.configs import CudaConfig
from ..tuning_cache import Config
from . import native


def _float32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float()


@implements(POINTWISE, "cuda", "mma.sync")
@implements(POINTWISE, "cuda", "wgmma")
class CudaPointwise(Implementation):
    def __init__(self, operator: Operator, backend: str, name: str) -> None:
        super().__init__(operator, backend, name)
        self.what, self.config = f"one CUDA kernel ({name})", CudaConfig(name)

    def compiles_for(self, device: torch.device) -> bool:
        return support.is_kernel_device(device)

    def unavailable(self, call: Call) -> str:
        why = native.why_not(call.device)
        if why:
            return why
        kind, key = native.type_of(call.dtype), call.key
        if not kind:
            if call.dtype == torch.float32:
                return (
                    "float32 is multiplied exactly unless "
                    'torch.set_float32_matmul_precision("high") allows TF32'
                )
            return f"no kernel for {str(call.dtype).removeprefix('torch.')}"
        if key is None or call.shape is None:
            return ""
        n, h, w = call.shape
        why = native.refusal(
            *(self.name, support.architecture(call.device), kind, n * h * w),
            *(key.out_channels, key.channels, key.act),
        )
        if not why and self.name == "wgmma" and not self_check.is_on():
            why = f"not without its check at the first use ({self_check.ENVIRONMENT}=0)"
        return why

    def run(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        act: str,
        config: Any = None,
        prepared: Tensor | None = None,
    ) -> Tensor:
        n, _, h, w = x.shape
        shape, wanted = (n, weight.shape[0], h, w), stem_format(x, 1)
        out = torch.empty(shape, dtype=weight.dtype, device=x.device, memory_format=wanted)
        pixels = as_channels_last(x.detach().resolve_neg())
        wide = prepared if prepared is not None else _float32(bias)
        operands = [aligned(weight), *vectors(wide, scale, shift), act]
        run: Callable[..., Tensor] = native.pointwise_mix
        return into(out, lambda out: run(pixels, *operands, out=out, family=self.name))

    def pack(self, packed: Packed, layout: torch.memory_format | None) -> Packed:
        """With the bias in float32."""
        return packed._replace(prepared=_float32(packed.bias))

    def bind(self, key: KernelKey, config: Config | None, packed: Packed) -> Launch | None:
        weight, run = aligned(packed.weight), cast("Callable[..., Tensor]", native.pointwise_mix)
        rest = [*vectors(packed.prepared, packed.scale, packed.shift), key.act]
        return lambda x, out: run(x, weight, *rest, out=out, family=self.name)
