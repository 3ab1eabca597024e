"""`depthwise_mix` by one Triton kernel."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...ops.depthwise import DEPTHWISE
from ...ops.registry import Call, Launch, implements
from ..kernel_key import KernelKey
from ..layout import as_channels_last, into, vectors
from ..operands import Packed, memory_format_of
from ..tuning_cache import Config
from . import configs, functions
from .implementation import TritonImplementation


@implements(DEPTHWISE, "triton")
class TritonDepthwise(TritonImplementation):
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
        out = torch.empty_like(x, memory_format=memory_format_of(x))
        x = as_channels_last(x.detach().resolve_neg())
        run = functions.kernels()
        taps = run.pack_taps(weight.detach()) if prepared is None else prepared
        operands = [taps, *vectors(bias, scale, shift), act, weight.shape[-1]]
        return into(out, lambda out: run.depthwise_mix(x, *operands, out=out, config=config))

    def pack(self, packed: Packed, layout: torch.memory_format | None) -> Packed:
        """With the taps in the kernel's order."""
        # What does not work here does not work in `run` either, which finds out and says so.
        with suppress(Exception):
            return packed._replace(prepared=functions.kernels().pack_taps(packed.weight))
        return packed

    def bind(self, key: KernelKey, config: Config | None, packed: Packed) -> Launch | None:
        run, taps, k = functions.kernels(), packed.prepared, key.kernel_size
        if taps is None:
            return None
        rest = [*vectors(packed.bias, packed.scale, packed.shift), key.act, k]
        return run.bound_by_first_call(
            lambda x, out: run.depthwise_mix(x, taps, *rest, out=out, config=config)
        )

    def takes(self, config: Config | None) -> bool:
        return config is None or isinstance(config, configs.DepthwiseConfig)

    def candidates(self, call: Call) -> Iterable[Config | None]:
        assert call.key is not None
        k = call.key.kernel_size
        shipped = configs.lookup_depthwise(call.dtype, k, call.channels)
        found = [row.config for row in configs.DEPTHWISE if k in row.kernel_sizes]
        # Fewer registers and more programs at once; taller tiles, which read less of their borders.
        found += [replace(shipped, columns=4), replace(shipped, rows=2 * shipped.rows)]
        return dict.fromkeys([None, *(config for config in found if config != shipped)])
