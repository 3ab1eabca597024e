"""Conditions under which a fused kernel computes exactly what a call of the plain children would.

Three of them, each in one function: the children are PyTorch's own modules, untouched on the object
and on the class (`reason_not_plain`, `is_touched`, `is_patched`); nothing watches or transforms the
operators that the children would call (`reason_observed`); and the input is one that they take as
it is (`reason_not_fusible`, which asks the other two). A reason is one line for `explain`; ``""``
means that fusing is the same.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from itertools import repeat
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._device import DeviceContext

from ..arch import ACTIVATIONS, activation_name
from ..backends.operands import accumulation_dtype
from ..ops import dispatch, recording
from ..ops.depthwise import DEPTHWISE as DEPTHWISE_MIX
from ..ops.pointwise import PATCH_EMBED
from ..ops.pointwise import POINTWISE as POINTWISE_MIX
from ..ops.registry import OPERATORS, Call, Operator
from ..ops.stem import PATCH_EMBED_UINT8

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)

#: What a call of a module goes through. None may be set on an object or patched on a class.
CALL_PATH = (
    "forward",
    "_call_impl",
    "_conv_forward",
    "_check_input_dim",
    "_compiled_call_impl",
)
#: The functions that the forwards of the plain classes call, and those that these call.
_FUNCTIONS = {
    F: ("conv2d", "batch_norm", "gelu", "relu", "silu", "hardswish"),
    torch: ("batch_norm", "relu", "relu_"),
    torch._C._nn: ("silu", "silu_", "hardswish", "hardswish_"),
}
_TORCH = os.path.dirname(torch.__file__) + os.sep


def is_depthwise(conv: nn.Module) -> bool:
    """Whether ``conv`` is what `depthwise_mix` takes: depthwise, square, stride 1, "same"."""
    if type(conv) is not nn.Conv2d:
        return False
    k = conv.kernel_size[0]
    padded = conv.padding == "same" or (k % 2 == 1 and conv.padding == (k // 2, k // 2))
    if k == 1:
        padded = padded or conv.padding == "valid"
    return (
        padded
        and conv.kernel_size == (k, k)
        and k <= 31
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
    )


def is_pointwise(conv: nn.Module) -> bool:
    """Whether ``conv`` is the 1x1 convolution of `pointwise_mix`: dense, stride 1, no padding."""
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (1, 1)
        and conv.groups == 1
        and conv.stride == (1, 1)
        and conv.padding in ((0, 0), "same", "valid")
        and conv.padding_mode == "zeros"
    )


def is_patchwise(conv: nn.Module) -> bool:
    """Whether ``conv`` is a dense convolution of square patches that do not overlap: a stem's."""
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == conv.stride
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding in ((0, 0), "valid")
        and conv.padding_mode == "zeros"
    )


def compiled_kernels_run(device: torch.device, dtype: torch.dtype, op: str) -> bool:
    """Whether a compiler is to see the operator ``op``; asked once while it traces.

    Where no kernel of ours computes it whole, or none computes a block's first half, plain
    operators make the faster graph.
    """
    if not dispatch.has_gpu_implementation(device, dtype, DEPTHWISE_MIX):
        return False
    return dispatch.runs_whole(Call(OPERATORS[op], device, dtype, 0))


# What torch.compiler.assume_constant_result does, which would import the compiler and Triton here.
compiled_kernels_run._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Kind(NamedTuple):
    """The convolution that a fused operator stands for, and what to say of another."""

    operator: Operator
    fits: Any
    otherwise: str


_NO_PATCHES = "the convolution is not one of square patches that do not overlap"
DEPTHWISE = Kind(DEPTHWISE_MIX, is_depthwise, 'the convolution is not a plain "same" depthwise one')
POINTWISE = Kind(POINTWISE_MIX, is_pointwise, "the convolution is not a plain dense 1x1 one")
PATCHWISE = Kind(PATCH_EMBED, is_patchwise, _NO_PATCHES)
PATCHWISE_UINT8 = Kind(PATCH_EMBED_UINT8, is_patchwise, _NO_PATCHES)


def is_touched(module: nn.Module) -> bool:
    """Whether a call of this object runs more or other code than its class's forward."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        # Offloading and adapter libraries set a method on the object instead of a hook.
        or any(name in own for name in CALL_PATH)
    )


_M = TypeVar("_M", bound=nn.Module)


def is_exactly(module: nn.Module, cls: type[_M]) -> TypeGuard[_M]:
    """Whether a call of ``module`` runs the forward of ``cls`` and nothing else."""
    kind = type(module)
    return (
        isinstance(module, cls)
        and all(getattr(kind, name) is getattr(cls, name) for name in _CLASS_PATH)
        and not is_touched(module)
    )


#: What a call looks up on the class. Of `nn.Module` torch.export patches ``__call__`` as it traces.
_CLASS_PATH = ("__call__", "forward", "_call_impl")
_OWN_PATH = {nn.Conv2d: ("_conv_forward",), nn.BatchNorm2d: ("_check_input_dim",)}


def _is_torchs_own(value: Any) -> bool:
    if isinstance(value, FunctionType):
        return value.__code__.co_filename.startswith(_TORCH)
    return value is None or isinstance(value, BuiltinFunctionType)


def _entry_points() -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, value) of all that the plain children go through."""
    for cls in (nn.Conv2d, *_NORMS, nn.Sequential, *ACTIVATIONS.values()):
        for name in (*_CLASS_PATH, *_OWN_PATH.get(cls, ())):
            yield cls, name, getattr(cls, name)
    for owner, names in _FUNCTIONS.items():
        for name in names:
            yield owner, name, getattr(owner, name)


_watched = tuple(_entry_points())
#: The same by column, for comparisons in C loops.
_watched_columns = tuple(zip(*_watched, strict=True))
#: Patched before this package was imported: never fused.
_PATCHED_EARLY = not all(_is_torchs_own(value) for _, _, value in _watched)


def watch_classes(*classes: type[nn.Module]) -> None:
    """Add the call paths of other classes of modules to what `is_patched` compares."""
    global _watched, _watched_columns
    rows = ((cls, name, getattr(cls, name)) for cls in classes for name in _CLASS_PATH)
    known = {(owner, name) for owner, name, _ in _watched}
    _watched += tuple(row for row in rows if row[:2] not in known)
    _watched_columns = tuple(zip(*_watched, strict=True))


_forwards: dict[type[nn.Module], Any] = {}


def has_its_forward(cls: type[nn.Module]) -> bool:
    """Whether a class has the forward that it had at the first such question."""
    if cls not in _forwards:
        watch_classes(cls)
        _forwards[cls] = cls.forward
    return cls.forward is _forwards[cls]


def is_patched() -> bool:
    """Whether a class or function that the plain children go through was replaced by the user.

    Tilers patch ``nn.Conv2d._conv_forward``, profilers patch `torch.nn.functional`.
    """
    if _PATCHED_EARLY:
        return True
    owners, names, values = _watched_columns
    if torch.compiler.is_compiling():
        rows = [row for row in _watched if row[1] != "__call__"]
        owners, names, values = zip(*rows, strict=True)
    return not all(map(operator.is_, map(getattr, owners, names, repeat(None)), values))


# What torch.compiler.assume_constant_result does, which would import the compiler and Triton here.
is_patched._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_under_mode() -> bool:
    """Whether a mode sees every operator or function call.

    The mode that `torch.set_default_device` sets changes factory calls alone, and the one in which
    `explain` runs a model is its own.
    """
    if torch._C._len_torch_dispatch_stack() > recording.modes_of_recording():
        return True
    return any(
        not isinstance(torch._C._get_function_stack_at(i), DeviceContext)
        for i in range(torch._C._len_torch_function_stack())
    )


def reason_observed(x: Any) -> str:
    """Why operators on ``x`` must be PyTorch's own, one by one, whatever the modules are."""
    if isinstance(x, torch.fx.Proxy):
        return _TRACED
    if torch.compiler.is_compiling():
        return _PATCHED if is_patched() else ""
    if torch._C._get_tracing_state():
        return _TRACED
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return "torch.func and forward-mode gradients see plain operators"
    if is_under_mode():
        return "a dispatch or function mode sees plain operators"
    if _has_any_global_hook():
        return "hooks are set on all modules"
    if is_patched():
        return _PATCHED
    if x.layout != torch.strided:
        return f"the input has the layout {x.layout}"
    if type(x) not in (Tensor, nn.Parameter) and not recording.modes_of_recording():
        return f"the input is a {type(x).__name__}"
    return ""


_TRACED = "torch.fx and torch.jit.trace see plain modules"
_PATCHED = "a class or function of torch.nn was patched"


def reason_not_plain(kind: Kind, conv: Any, act: nn.Module, bn: Any) -> str:
    """Why a call of these three children is not the formula of the fused operator in eval mode."""
    if not kind.fits(conv):
        return kind.otherwise
    if type(bn) not in _NORMS:
        return f"the norm is a {type(bn).__name__}, not a BatchNorm2d"
    statistics = bn._buffers.get("running_mean")
    if bn.training or statistics is None or bn._buffers.get("running_var") is None:
        return "BatchNorm gathers batch statistics"
    if activation_name(act) is None:
        return f"no fused form of the activation {act}"
    if is_touched(conv) or is_touched(act) or is_touched(bn):
        return "a child module has hooks or a method of its own"
    k = conv.kernel_size[0]
    shape = (conv.out_channels, conv.in_channels // conv.groups, k, k)
    weight, bias = conv.weight, conv.bias
    norms = (bn.weight, bn.bias, statistics, bn.running_var)
    if weight.shape != shape or any(t is not None and t.shape != shape[:1] for t in norms):
        return "the parameters do not have the shapes that the modules were built for"
    if bias is not None and bias.dtype != weight.dtype:
        return f"the convolution's bias is {bias.dtype}, its weight {weight.dtype}"
    for t in norms:
        # PyTorch's BatchNorm takes float32 parameters for half activations, and no other mixture.
        if t is not None and t.dtype not in (weight.dtype, accumulation_dtype(weight.dtype)):
            return f"the norm has {t.dtype} tensors, the convolution {weight.dtype}"
    if weight.layout != torch.strided:
        return f"the weight has the layout {weight.layout}"
    return ""


def reason_not_fusible(
    kind: Kind,
    conv: Any,
    act: nn.Module,
    bn: Any,
    x: Tensor,
    dtype: torch.dtype | None = None,
) -> str:
    """Why these three children must run one by one on ``x``; ``""`` when fusing is the same.

    Args:
        kind: the operator, and the convolution that it stands for.
        dtype: that ``x`` is converted to on the way, where it is another than its own.
    """
    why = reason_observed(x) or reason_not_plain(kind, conv, act, bn)
    if why:
        return why
    if x.dim() != 4:
        return f"the input has {x.dim()} dimensions"
    if x.shape[1] != conv.in_channels:
        return f"the input has {x.shape[1]} channels, the convolution takes {conv.in_channels}"
    weight = conv.weight
    device = x.device.type
    dtype = dtype or x.dtype
    if device == "meta":
        return "meta tensors hold no values"
    if torch.is_autocast_enabled(device):
        if dtype != torch.get_autocast_dtype(device):
            return "autocast changes the input's dtype"
    elif dtype != weight.dtype:
        return f"the input is {dtype}, the weights {weight.dtype}"
    if not dtype.is_floating_point:
        return f"the input is {dtype}"
    if x.device != weight.device:
        return f"the input is on {x.device}, the weights on {weight.device}"
    if torch.compiler.is_compiling():
        # The operator is opaque to the compiler; where no kernel of ours stands behind it, the
        # plain operators are the faster graph.
        if device != "cpu" and not compiled_kernels_run(x.device, dtype, kind.operator.key):
            return "no fused kernel for this device: the compiler gets plain operators"
        return ""
    if type(weight) not in (Tensor, nn.Parameter) and not recording.modes_of_recording():
        return f"the weight is a {type(weight).__name__}"
    if weight.is_neg() or (conv.bias is not None and conv.bias.is_neg()):
        return "a parameter is a lazily negated view"
    return ""
