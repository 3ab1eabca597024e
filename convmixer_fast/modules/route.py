"""The remembered decision of a fused module.

A `Route` is what computed the last call of a module: the launch, with its operands bound. A later
call takes it while everything that the decision depended on is unchanged:

* the input: device, dtype and channels, on a GPU also shape and strides (`Inputs`);
* the dispatch state: the requested backend, autocast, precision, and that no mode, hook, transform
  or recorder must see the operators one by one (`dispatch_state`);
* the modules: classes, children, hooks and every setting (`ModuleSnapshot`);
* the parameters: memory, version and contents (`packing.WeightSnapshot`).

The comparisons run over flat lists in C loops, because at small batches a kernel waits for Python.
On a model that `optimize_for_inference` prepared, settings and parameters are promised to stay as
they are and are not compared.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from ..backends import self_check
from ..backends.kernel_key import KernelKey
from ..backends.layout import as_channels_last
from ..backends.operands import memory_format_of
from ..backends.stock import allows_bfloat16, fastest_layout
from ..backends.triton import support
from ..backends.triton.precision import dot_precision
from ..ops import dispatch, recording
from ..ops.registry import Launch
from .fusible import is_patched
from .packing import PackedCache, WeightSnapshot, shadows, sources_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MEMBERS = ("_modules", "_parameters", "_buffers")


class Promise:
    """The promise of `optimize_for_inference`, shared by all fused modules of one model."""

    def __init__(self) -> None:
        self.is_kept = True


class FusedParts(NamedTuple):
    """The modules that one fused operator replaces, and the cache of its packed copy."""

    conv: Any
    act: Any
    bn: Any
    cache: PackedCache[Any]


class Kernel(NamedTuple):
    """A GPU kernel with its operands bound: ``launch(x, out)`` on packed channels-last maps."""

    key: KernelKey
    launch: Launch


class Inputs(NamedTuple):
    """The inputs that a route takes; ``shape`` and ``strides`` are None where any will do."""

    device: torch.device
    dtype: torch.dtype
    channels: int
    shape: torch.Size | None = None
    strides: tuple[int, ...] | None = None

    def include(self, x: Tensor) -> bool:
        if x.dtype is not self.dtype or x.layout is not torch.strided or x.device != self.device:
            return False
        if self.shape is None:
            return x.dim() == 4 and x.shape[1] == self.channels
        return x.shape == self.shape and x.stride() == self.strides


def dispatch_state(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...] | None:
    """What decides, besides input and modules, which backend computes; compared by equality.

    None while something must see every operator: gradients, a mode, a profiler, a transform, a
    tracer, hooks on all modules, or `recording.recording`.
    """
    if (
        torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or torch.autograd.profiler._is_profiler_enabled
        or _has_any_global_hook()
        or recording.is_recording()
    ):
        return None
    kind, asked = device.type, dispatch.requested_backend()
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    rule: Any = allows_bfloat16() if kind == "cpu" else False
    if dtype is torch.float32 and support.is_kernel_device(device):
        rule = dot_precision(dtype)
    return support.dispatch_version(), asked, autocast, rule


class ModuleSnapshot:
    """A module and all modules inside it, as a call found them."""

    def __init__(self, root: nn.Module) -> None:
        self.modules = tuple(root.modules())
        self.classes = [*map(type, self.modules)]
        own = [module.__dict__ for module in self.modules]
        self.hooks = tuple(of[name] for of in own for name in _HOOKS)
        # Live views: each comparison reads what the dictionaries hold then.
        self.members = [of[name].values() for of in own for name in _MEMBERS if of[name]]
        self.members_then = tuple(chain.from_iterable(self.members))
        self.settings = [of.values() for of in own]
        self.settings_then = [*map(tuple, self.settings)]

    def is_intact(self) -> bool:
        """Whether classes, children, parameter objects and buffers are the same; without hooks."""
        if any(self.hooks) or [*map(type, self.modules)] != self.classes:
            return False
        try:
            members = tuple(chain.from_iterable(self.members))
        except RuntimeError:  # another thread changes a module
            return False
        then = self.members_then
        return len(members) == len(then) and all(map(operator.is_, members, then))

    def is_unchanged(self) -> bool:
        """Whether, besides, every attribute of every module is the same, and no class is patched.

        The attributes include ``training``, a convolution's geometry, a norm's epsilon, and a
        method that a library set on the object.
        """
        try:
            settings = [*map(tuple, self.settings)]
            return self.is_intact() and settings == self.settings_then and not is_patched()
        except Exception:  # values whose comparison is no boolean, such as another tensor
            return False


class Route(NamedTuple):
    """A decision as a call made it. Call ``run(x)`` only if ``holds(x)`` is true."""

    inputs: Inputs
    state: tuple[Any, ...]
    modules: ModuleSnapshot
    #: None where ``call`` packs nothing and reads the parameters from the modules.
    weights: WeightSnapshot | None
    promise: Promise | None
    #: (N, C, H, W) to the module's result; None if a kernel could not be launched.
    call: Callable[[Tensor], Tensor | None]
    #: The GPU kernels that ``call`` launches, for the route of a stack around this module.
    kernels: tuple[Kernel, ...] = ()

    @classmethod
    def of(
        cls,
        inputs: Inputs,
        owner: nn.Module,
        parts: Sequence[FusedParts],
        promise: Promise | None,
        call: Callable[[Tensor], Tensor | None],
        kernels: tuple[Kernel, ...] = (),
    ) -> Route | None:
        """The route of a module that ``call`` just computed, or None where it cannot hold.

        Args:
            parts: of ``owner``, in the order of their kernels.
            promise: of `optimize_for_inference`, if it was given.
        """
        state = dispatch_state(inputs.device, inputs.dtype)
        if state is None or any(shadows(part.conv) or shadows(part.bn) for part in parts):
            return None
        sources: dict[PackedCache[Any], Any] = {}
        for part in parts:
            known = sources.get(part.cache, ())
            sources[part.cache] = known + sources_of(part.conv, part.bn)
        weights = WeightSnapshot.of(list(sources), list(sources.values()))
        modules = ModuleSnapshot(owner)
        if weights is None or not modules.is_unchanged():
            return None
        return cls(inputs, state, modules, weights, promise, call, kernels)

    @classmethod
    def composed(
        cls, x: Tensor, owner: nn.Module, promise: Promise | None, steps: Sequence[Step]
    ) -> Route | None:
        """The route of a module whose plain children were just called on ``x``, on a CPU.

        Args:
            steps: of ``owner``, in their order; each could also be one fused operator.
        """
        state = dispatch_state(x.device, x.dtype)
        modules = ModuleSnapshot(owner)
        if state is None or type(x) is not Tensor or not modules.is_unchanged():
            return None
        inputs = Inputs(x.device, x.dtype, x.shape[1])
        return cls(inputs, state, modules, None, promise, in_turn(steps))

    def holds(self, x: Tensor) -> bool:
        """Whether a new decision for ``x`` would be this one."""
        if type(x) is not Tensor or x.device != self.inputs.device:
            return False
        # Before the shape, which a tracer would warn about.
        if dispatch_state(x.device, x.dtype) != self.state:
            return False
        weights = self.weights
        if not self.inputs.include(x) or (weights is not None and not weights.is_current()):
            return False
        if self.promise is not None and self.promise.is_kept:
            return self.modules.is_intact()
        return self.modules.is_unchanged() and (weights is None or weights.is_unchanged())

    def packed(self) -> tuple[Any, ...] | None:
        """The packed copies, in the order of the kernels that read them; None if there are none."""
        return None if self.weights is None else self.weights.packed()

    def run(self, x: Tensor) -> Tensor | None:
        """The module's result for ``x``, or None if a kernel could not be launched."""
        if self.weights is not None:
            self.weights.join_stream()
        return self.call(x)


class Step(NamedTuple):
    """``bn(act(conv(x)))``, with ``x`` added if ``is_residual``."""

    conv: nn.Module
    act: nn.Module
    bn: nn.Module
    is_residual: bool


def in_turn(steps: Sequence[Step]) -> Callable[[Tensor], Tensor]:
    """PyTorch's operators for some steps, in the layout in which they are fastest on this CPU.

    Without the hooks and checks of module calls, which a `Route` compares once for all steps. The
    result has the layout of the input.
    """
    forwards = [(s.conv.forward, s.act.forward, s.bn.forward, s.is_residual) for s in steps]

    def call(x: Tensor) -> Tensor:
        given = memory_format_of(x)
        wanted = fastest_layout(x)
        x = x.contiguous(memory_format=wanted)
        for conv, act, bn, is_residual in forwards:
            out = bn(act(conv(x)))
            x = out + x if is_residual else out
        return x if wanted == given else x.contiguous(memory_format=given)

    return call


def chained(kernels: Sequence[Kernel]) -> Callable[[Tensor], Tensor | None]:
    """The kernels of a stack of blocks one after the other, on two maps that they write in turn."""

    def call(x: Tensor) -> Tensor | None:
        x = as_channels_last(x.detach().resolve_neg())
        inner, outer = torch.empty_like(x), torch.empty_like(x)
        kernel = kernels[0]
        with support.on_device(x.device):
            try:
                # A block's first half writes the one map, its second half the other.
                out = inner
                for kernel in kernels:
                    kernel.launch(x, out)
                    x, out = out, outer if out is inner else inner
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # as in execution.launch
                if not self_check.is_on():
                    raise
                self_check.fail(kernel.key, error)
                return None
        return x

    return call
