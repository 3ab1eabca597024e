"""`pointwise_mix` of 1x1 weights: by one Triton kernel, or by one that ends PyTorch's product."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.pointwise import POINTWISE
from ...ops.registry import Call, Launch, implements
from ..kernel_key import BEYOND_INT32, MANY_OUTPUTS, KernelKey
from ..layout import aligned, as_channels_last, into, stem_format, vectors
from ..operands import Packed, memory_format_of
from ..tuning_cache import Config
from . import configs, functions, support
from .configs import PointwiseConfig, ProductConfig
from .implementation import TritonImplementation
from .precision import dot_precision


@implements(POINTWISE, "triton")
class TritonPointwise(TritonImplementation):
    def run(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        act: str,
        config: Any = None,
        **_: Any,
    ) -> Tensor:
        n, h, w = x.shape[0], *x.shape[2:]
        shape, wanted = (n, weight.shape[0], h, w), stem_format(x, 1)
        out = torch.empty(shape, dtype=weight.dtype, device=x.device, memory_format=wanted)
        x = as_channels_last(x.detach().resolve_neg())
        operands = [aligned(weight), *vectors(bias, scale, shift), act]
        run = functions.kernels().pointwise_mix
        return into(out, lambda out: run(x, *operands, out=out, config=config))

    def bind(self, key: KernelKey, config: Config | None, packed: Packed) -> Launch | None:
        run = functions.kernels()
        weight = aligned(packed.weight)
        rest = [*vectors(packed.bias, packed.scale, packed.shift), key.act]
        return run.bound_by_first_call(
            lambda x, out: run.pointwise_mix(x, weight, *rest, out=out, config=config)
        )

    def takes(self, config: Config | None) -> bool:
        return config is None or isinstance(config, PointwiseConfig)

    def candidates(self, call: Call) -> Iterable[Config | None]:
        return dict.fromkeys([None, *shipped_tiles(call.device, call.dtype)])

    def form_of_sample(self, key: KernelKey, config: Config | None) -> Config | None:
        # So many rows are beyond the copy engine, which the few rows of a sample are not.
        return (key.size == 2 and self.plainer(key, config)) or config

    def plainer(self, key: KernelKey, config: Config | None) -> PointwiseConfig | None:
        """The tile without the copy engine; None where the call's own is without."""
        architecture = support.architecture(torch.device(key.device))
        if not isinstance(config, PointwiseConfig):
            rows = (1, MANY_OUTPUTS // key.out_channels + 1, BEYOND_INT32)[key.size]
            config = configs.lookup_pointwise(
                architecture,
                key.dtype,
                rows=rows,
                columns=key.out_channels,
                tf32=dot_precision(key.dtype) == "tf32",
            )
        return configs.without_descriptors(config, architecture) if config.descriptors else None


def shipped_tiles(device: torch.device, dtype: torch.dtype) -> tuple[PointwiseConfig, ...]:
    """Every tile shipped for 1x1 convolutions on ``device``."""
    tf32 = dot_precision(dtype) == "tf32"
    return configs.pointwise_candidates(support.architecture(device), dtype, tf32)


@implements(POINTWISE, "triton", "product")
class TritonAfterProduct(TritonImplementation):
    """PyTorch's GEMM as its settings have it, and one epilogue kernel over its result."""

    what = "PyTorch's product and one Triton kernel for the rest"
    dtypes = (*TritonImplementation.dtypes, torch.float64)
    is_whole = False
    config = ProductConfig()

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
        wanted = memory_format_of(x)
        x, weight = as_channels_last(x.detach().resolve_neg()), weight.detach()
        with torch.autocast(x.device.type, enabled=False):
            if x.dtype == torch.float64:
                # cuDNN has no channels-last convolution of float64: it converts there and back.
                rows = x.permute(0, 2, 3, 1)
                h = F.linear(rows, weight.reshape(weight.shape[:2])).permute(0, 3, 1, 2)
            else:
                h = F.conv2d(x, weight)
        run = functions.kernels().after_product_
        h = run(as_channels_last(h), *vectors(bias, scale, shift), act)
        if wanted == torch.channels_last:
            return h
        return torch.empty(h.shape, dtype=h.dtype, device=h.device).copy_(h)
