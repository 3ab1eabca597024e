"""Blocks one after the other, `MixerStack`."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch import Tensor, nn

from ..backends.layout import as_channels_last
from ..backends.operands import Packed
from ..backends.triton import support
from ..ops import recording
from ..reference import in_turn, scripted_as
from . import cuda_graph
from .fusible import (
    DEPTHWISE,
    POINTWISE,
)
from .packing import PackedCache, need_gradients, sources_of
from .route import Inputs, Kernel, Route, chained, dispatch_state

if TYPE_CHECKING:
    pass
from .blocks import (
    MixerBlock,
    by_stock,
    can_run_whole_blocks,
    fusible_halves,
    packed_blocks,
    run_stack,
)
from .fused import (
    FusedModule,
    FusedSequential,
    choice_of,
    has_kernels,
    operands_of,
    to_preferred_layout,
)


class MixerStack(FusedSequential):
    """Blocks one after the other, a Sequential of `MixerBlock`; for inference on a CPU, one call.

    (N, dim, H, W) -> (N, dim, H, W), channels-last if the input is, and always where Triton kernels
    compute the blocks (on a GPU, in eval mode). Children and keys are those of `nn.Sequential`.
    Where a block cannot be fused whole (see `explain`), the blocks run one by one. On a GPU,
    `optimize` lets them run as a CUDA graph or depth first.
    """

    _graphs: cuda_graph.StackGraphs | None = None
    _depth_first = False

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self._packed = PackedCache()

    @classmethod
    def from_parts(cls, *blocks: nn.Module) -> MixerStack:
        """Around existing blocks, the same objects."""
        return cls(*blocks)

    def __getitem__(self, index: int | slice) -> Any:
        # A part of a stack is a stack.
        if isinstance(index, slice):
            part = MixerStack()
            part._modules.update(list(self._modules.items())[index])
            part._depth_first = self._depth_first
            part._graphs = None if self._graphs is None else cuda_graph.StackGraphs()
            return part.train(self.training)
        return super().__getitem__(index)

    @scripted_as(in_turn)
    def forward(self, x: Tensor) -> Tensor:
        planned = (self._graphs is not None or self._depth_first) and self._may_run_kernels(x)
        if not planned:
            out = self._by_route(self._packed, x)
            if out is not None:
                return out
        if self._modules and can_run_whole_blocks(x):
            packed = packed_blocks(list(self), x)
            return super().forward(x) if packed is None else run_stack(self, self, packed, x)
        if not self._modules or not self._may_run_kernels(x):
            return by_stock(self, self, super().forward, x)
        if planned and not support.is_capturing(x.device):
            return self._on_gpu(x)
        return self._one_by_one(x)

    def _may_run_kernels(self, x: Tensor) -> bool:
        return (
            not self.training
            and not torch.compiler.is_compiling()
            and not isinstance(x, torch.fx.Proxy)
            and x.dim() == 4
            and support.is_kernel_device(x.device)
        )

    def _one_by_one(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self._packed.route = self._kernel_route(x)
        return out

    def _kernel_route(self, x: Tensor) -> Route | None:
        """The route of all blocks that were just computed for ``x``, each half by a GPU kernel."""
        if type(x) is not Tensor or dispatch_state(x.device, x.dtype) is None:
            return None
        # If one axis has one element, results have other strides than the maps of `chained`.
        if x.numel() == 0 or min(x.shape[1], x.shape[2] * x.shape[3]) == 1:
            return None
        parts = list(fusible_halves(self, x))
        if len(parts) != 2 * len(self._modules):
            return None
        laid_out = as_channels_last(x.detach())
        kernels: list[Kernel] = []
        for part in parts:
            route = part.cache.route
            if not isinstance(route, Route) or not route.kernels or not route.holds(laid_out):
                return None
            if part.conv.in_channels != part.conv.out_channels:
                return None
            kernels += route.kernels
        inputs = Inputs(x.device, x.dtype, x.shape[1], x.shape, x.stride())
        return Route.of(inputs, self, parts, self._promise, chained(kernels), tuple(kernels))

    def _on_gpu(self, x: Tensor) -> Tensor:
        """The blocks as a CUDA graph or depth first, as `optimize` was asked to run them."""
        route: Route | None = self._packed.route
        if route is not None and not route.holds(x):
            route = self._packed.route = None
        packed = self._packed_now(x) if route is None else route.packed()
        if packed is None:
            return super().forward(x)
        laid_out = to_preferred_layout(self, x)
        graphs = self._graphs
        if graphs is not None and not graphs.why_not and x.shape[0] <= cuda_graph.MAX_BATCH:
            out = graphs.run(cuda_graph.key_of(laid_out), packed, super().forward, laid_out)
            if route is None:
                self._packed.route = self._kernel_route(x)
            return out
        if self._depth_first:
            return cuda_graph.depth_first(super().forward, laid_out, cuda_graph.l2_bytes(x.device))
        return self._one_by_one(x)

    def _packed_now(self, x: Tensor) -> tuple[Packed, ...] | None:
        """What GPU kernels would be given of the blocks, or None where they do not run them all."""
        if (
            self.training
            or torch.compiler.is_compiling()
            or isinstance(x, torch.fx.Proxy)
            or recording.is_recording()
            or x.dim() != 4
            or x.numel() == 0
            or not has_kernels(x, x.dtype)
        ):
            return None
        halves = list(fusible_halves(self, x))
        if len(halves) != 2 * len(self._modules):
            return None
        if torch.is_grad_enabled() and (
            x.requires_grad
            or any(need_gradients(sources_of(half.conv, half.bn)) for half in halves)
        ):
            return None
        return tuple(
            operands_of(half.cache, half.conv, half.bn, x, choice_of(kind, half, x))
            for kind, half in zip(cycle((DEPTHWISE, POINTWISE)), halves, strict=False)
        )


def refresh(model: nn.Module) -> None:
    """Drop every packed copy of parameters in ``model``: the next forward makes new ones.

    Needed only after writes that torch cannot see to a few elements of a large tensor, such as one
    weight set through ``.data``; all others are noticed.
    """
    for module in model.modules():
        if isinstance(module, FusedModule):
            module._packed.clear()
        if isinstance(module, MixerBlock):
            module._halves.clear()
        if isinstance(module, MixerStack) and module._graphs is not None:
            module._graphs.clear()
