"""What need a stack of blocks on a GPU not ask again, when a call is like the one before?

At small batches a GPU waits for Python, and most of what Python does for a block is to ask: who
serves it, does somebody watch its modules, are its packed copies still true. Here the first is
remembered, and the others are asked for all blocks in one loop over flat tuples. The two maps that
the blocks take turns to write are allocated once for a call, not once for each half.

Whatever is not as it was leaves the call to the blocks themselves.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from .kernels import support
from .kernels.precision import dot_precision
from .ops import backends, first_use, gpu
from .ops.cases import Case
from .ops.packing import Packed, PackedCache, now_on, sources_of

#: What makes a call of a module more than its class's forward, and training.
_STATE = operator.itemgetter(
    *("training", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
)
_GEOMETRY = operator.itemgetter(
    *("kernel_size", "stride", "padding", "dilation", "groups", "in_channels", "out_channels"),
    "padding_mode",
)


class Plan(NamedTuple):
    """How a half of a block was served on a GPU, and all that was looked up on the way.

    A call that is like the last one in all of this need not ask again who serves it; what the
    modules say has to be asked besides.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    asked: str
    epoch: int
    precision: str
    act: str
    case: Case
    config: Any

    def holds(self, x: Tensor) -> bool:
        return (
            type(x) is Tensor
            and x.shape == self.shape
            and x.stride() == self.stride
            and x.dtype is self.dtype
            and x.device == self.device
            and self.epoch == support.epoch()
            and self.asked == backends.requested_backend()
            and (x.dtype is not torch.float32 or self.precision == dot_precision(x.dtype))
            # Whoever watches operators is to see ours.
            and not torch.is_grad_enabled()
            and torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0
            and not torch.autograd.profiler._is_profiler_enabled
            and not backends.is_recording()
        )


class Half(NamedTuple):
    """The modules of a half of a block, and where its packed copy and its `Plan` are kept."""

    conv: Any
    act: Any
    bn: Any
    cache: PackedCache[Packed]


class _Known(NamedTuple):
    """A half as it was: `Half`, what it computed, and its packed copy."""

    conv: Any
    bn: Any
    cache: PackedCache[Packed]
    geometry: tuple[Any, ...]
    key: tuple[Any, ...]
    packed: Packed


class SteadyStack(NamedTuple):
    """A stack of blocks as a call found it; `run` is for calls for which it `holds`."""

    blocks: tuple[nn.Module, ...]
    plan: Plan
    autocast: bool
    modules: tuple[tuple[Any, type, tuple[Any, ...]], ...]
    acts: tuple[tuple[Any, Any], ...]
    halves: tuple[_Known, ...]
    launches: tuple[tuple[Case, Callable[[Tensor, Tensor], Tensor]], ...]

    @classmethod
    def of(
        cls, x: Tensor, blocks: tuple[nn.Module, ...], halves: Sequence[Half]
    ) -> SteadyStack | None:
        """Of a stack whose halves were just served by kernels, for inputs like ``x``; or None.

        Args:
            blocks: of the stack.
            halves: of the blocks, in their order; each computes what kernels compute.
        """
        given: Plan | None = halves[0].cache.plan
        # Where one axis has one element, results have other strides than the maps of this class.
        laid_out = gpu.as_channels_last(x.detach())
        if given is None or x.numel() == 0 or min(x.shape[1], x.shape[2] * x.shape[3]) == 1:
            return None
        plan = given._replace(shape=x.shape, stride=x.stride())
        known, launches = [], []
        for half in halves:
            each: Plan | None = half.cache.plan
            key = (False, True, x.dtype, half.bn.eps)
            packed = half.cache.fresh(key, sources_of(half.conv, half.bn))
            if each is None or packed is None or not each.holds(laid_out):
                return None
            if half.conv.in_channels != half.conv.out_channels:
                return None
            launch = gpu.prepare(each.case, each.config, packed)
            if launch is None:
                return None
            launches.append((each.case, launch))
            geometry = _GEOMETRY(half.conv.__dict__)
            known.append(_Known(half.conv, half.bn, half.cache, geometry, key, packed))
        modules = [module for block in blocks for module in block.modules()]
        return cls(
            blocks,
            plan,
            torch.is_autocast_enabled(x.device.type),
            tuple((m, type(m), tuple(m._modules.values())) for m in modules),
            tuple((h.act, getattr(h.act, "approximate", None)) for h in halves),
            tuple(known),
            tuple(launches),
        )

    def holds(self, x: Tensor) -> bool:
        """Whether the blocks would do with ``x`` what `run` does."""
        if _modes_are_set(x.device.type, self.autocast, x.dtype) or not self.plan.holds(x):
            return False
        for module, cls, children in self.modules:
            own = module.__dict__
            if (
                any(_STATE(own))
                # Offloading and adapter libraries set a forward on the object instead of a hook.
                or "forward" in own
                or module.__class__ is not cls
                or tuple(own["_modules"].values()) != children
            ):
                return False
        for act, approximate in self.acts:
            if act.__dict__.get("approximate") != approximate:
                return False
        now = now_on(x.device)
        for half in self.halves:
            conv, bn = half.conv, half.bn
            if (
                bn.eps != half.key[3]
                or _GEOMETRY(conv.__dict__) != half.geometry
                or half.cache.fresh(half.key, sources_of(conv, bn), now) is not half.packed
            ):
                return False
        return True

    def packed(self) -> tuple[Packed, ...]:
        """The packed copies of all halves, the very ones that their kernels are given."""
        return tuple(half.packed for half in self.halves)

    def run(self, x: Tensor) -> Tensor | None:
        """The blocks on ``x``, or None where a kernel that was right once could not be launched."""
        x = gpu.as_channels_last(x.detach().resolve_neg())
        inner, outer = torch.empty_like(x), torch.empty_like(x)
        served = self.plan.case
        with gpu.on_device(x):
            try:
                # A block's first half writes the one map, its second half the other.
                out = inner
                for case, launch in self.launches:
                    served = case
                    launch(x, out)
                    x, out = out, outer if out is inner else inner
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # as in gpu.launch
                if not first_use.is_on():
                    raise
                first_use.fail(served, error)
                return None
        return x


def _modes_are_set(device: str, autocast: bool, dtype: torch.dtype) -> bool:
    """Whether one of torch's modes wants other operators than those that were called before."""
    return bool(
        torch._C._get_tracing_state()
        or torch.is_autocast_enabled(device) is not autocast
        or (autocast and torch.get_autocast_dtype(device) is not dtype)
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or _has_any_global_hook()
    )
