"""What need a stack of blocks not ask again, when a call is like the one before?

At small batches the kernels wait for Python, and most of what Python does for a block is to ask:
who serves it, does somebody watch its modules, are its packed copies still true. Here the first is
remembered, and the others are asked for all blocks in one loop over flat tuples. On a GPU the two
maps that the blocks take turns to write are allocated once for a call, not once for each half. On a
CPU the engine asks (csrc/steady.cpp), and gets addresses that were found before.

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

from . import _native
from .fusible import CALL_PATH, is_patched, is_touched
from .kernels import support
from .kernels.precision import dot_precision
from .ops import backends, first_use, gpu
from .ops.cases import Case
from .ops.packing import JoinedCopies, Packed, PackedCache, Sources, now_on, sources_of
from .ops.stock import reason_stock_is_faster

#: What makes a call of a module more than its class's forward, and training.
_STATE_NAMES = (
    *("training", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
)
_GEOMETRY_NAMES = (
    *("kernel_size", "stride", "padding", "dilation", "groups", "in_channels", "out_channels"),
    "padding_mode",
)
_GEOMETRY = operator.itemgetter(*_GEOMETRY_NAMES)


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
            and not _is_watched()
        )


class Watched(NamedTuple):
    """The modules of some blocks as a call found them."""

    modules: tuple[tuple[Any, type, tuple[Any, ...]], ...]
    acts: tuple[tuple[Any, Any], ...]

    @classmethod
    def of(cls, blocks: Sequence[nn.Module], acts: Sequence[Any]) -> Watched:
        modules = [module for block in blocks for module in block.modules()]
        return cls(
            tuple((m, type(m), tuple(m._modules.values())) for m in modules),
            tuple((act, getattr(act, "approximate", None)) for act in acts),
        )

    def unchanged(self) -> bool:
        """Whether a call of each runs what it ran, in eval mode, and nobody watches."""
        if _native.load() is not None:
            return _native.modules_unchanged(self.modules, self.acts, _STATE_NAMES, CALL_PATH)
        for module, cls, children in self.modules:
            own = module.__dict__
            if (
                module.training
                or is_touched(module)
                or module.__class__ is not cls
                or tuple(own["_modules"].values()) != children
            ):
                return False
        return all(act.__dict__.get("approximate") == form for act, form in self.acts)


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
    watched: Watched
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
        return cls(
            blocks,
            plan,
            torch.is_autocast_enabled(x.device.type),
            Watched.of(blocks, [half.act for half in halves]),
            tuple(known),
            tuple(launches),
        )

    def holds(self, x: Tensor) -> bool:
        """Whether the blocks would do with ``x`` what `run` does."""
        if _modes_are_set(x.device.type, self.autocast, x.dtype) or not self.plan.holds(x):
            return False
        if not self.watched.unchanged():
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


class SteadyOnCpu(NamedTuple):
    """A stack or a stem on a CPU as a call found it: what the engine was given, for calls that
    `holds` finds alike. Their batch and size may be others: the engine serves any.
    """

    children: tuple[nn.Module, ...]
    channels: int
    dtype: torch.dtype
    asked: str
    epoch: int
    autocast: bool
    watched: Watched
    halves: tuple[tuple[Any, Any, tuple[Any, ...], float], ...]
    copies: JoinedCopies
    #: The engine with all operands, for inputs that need not be converted.
    launch: Callable[[Tensor], Tensor]
    #: The operator with all operands, for any.
    call: Callable[[Tensor], Tensor]

    @classmethod
    def of(
        cls,
        x: Tensor,
        children: tuple[nn.Module, ...],
        halves: Sequence[Half],
        prepare: Callable[[], Callable[[Tensor], Tensor]],
        call: Callable[[Tensor], Tensor],
    ) -> SteadyOnCpu | None:
        """Of a module that the engine just served, for inputs like ``x``; or None.

        Args:
            children: of the module.
            halves: of its blocks, in their order, or the stem's one. Halves of one packed copy
                stand side by side.
            prepare: gives ``launch``, see the fields.
            call: see there too.
        """
        watched = Watched.of(children, [half.act for half in halves])
        if type(x) is not Tensor or _is_watched() or not watched.unchanged():
            return None
        sources: dict[PackedCache[Any], Sources] = {}
        for half in halves:
            sources[half.cache] = sources.get(half.cache, ()) + sources_of(half.conv, half.bn)
        copies = JoinedCopies.of(list(sources), list(sources.values()))
        if copies is None:
            return None
        found = cls(
            children,
            x.shape[1],
            x.dtype,
            backends.requested_backend(),
            support.epoch(),
            torch.is_autocast_enabled("cpu"),
            watched,
            tuple((h.conv, h.bn, _GEOMETRY(h.conv.__dict__), h.bn.eps) for h in halves),
            copies,
            prepare(),
            call,
        )
        # Not of modules whose parameters are kept elsewhere than PyTorch's own.
        return found if found.holds(x) else None

    def holds(self, x: Tensor) -> bool:
        """Whether the module would give the engine for ``x`` what it was given."""
        return bool(
            type(x) is Tensor
            and not _is_watched()
            # Before the shape, which a tracer would warn about.
            and not _modes_are_set("cpu", self.autocast, x.dtype)
            and x.layout is torch.strided
            and x.dim() == 4
            and x.shape[1] == self.channels
            and x.dtype is self.dtype
            and x.device.type == "cpu"
            and self.epoch == support.epoch()
            and self.asked == backends.requested_backend()
            and (self.asked == "cpu" or not reason_stock_is_faster(x.dtype))
            and self.watched.unchanged()
            and _native.parameters_unchanged(self.halves, _GEOMETRY_NAMES, self.copies.stamps)
            and self.copies.fresh()
        )

    def run(self, x: Tensor) -> Tensor:
        """What the module computes of ``x``."""
        if x.dtype is torch.float32 and x.numel() and x.is_contiguous() and not x.is_neg():
            return self.launch(x)
        return self.call(x)


def _is_watched() -> bool:
    """Whether a mode, a profiler, autograd or a patch must see each operator."""
    return bool(
        torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.autograd.profiler._is_profiler_enabled
        or backends.is_recording()
        or is_patched()
    )


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
