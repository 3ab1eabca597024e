"""What all fused modules share: packed copies, the decision, the remembered route.

Children are the ordinary `nn.Conv2d`, activation and `nn.BatchNorm2d` under the names that the
published models use, so state dicts, optimizers, hooks and surgery on children work as usual. Only
the parent's forward is fused, and only where that computes the same thing: while BatchNorm gathers
batch statistics, while a child carries hooks or is not the plain module, the children run one by
one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch import Tensor, nn

from ..arch import activation_name
from ..backends import self_check
from ..backends.operands import Packed, accumulation_dtype
from ..backends.triton import support
from ..ops import recording
from ..ops.dispatch import (
    Choice,
    call_of,
    choose,
    composed,
    has_gpu_implementation,
)
from ..ops.execution import launch, run
from ..ops.pointwise import pointwise_mix
from .fusible import (
    DEPTHWISE,
    PATCHWISE,
    POINTWISE,
    Kind,
    compiled_kernels_run,
    has_its_forward,
    reason_not_fusible,
    reason_observed,
)
from .packing import PackedCache, batch_norm_affine, cacheable, need_gradients, sources_of
from .route import FusedParts, Inputs, Kernel, Promise, Route, dispatch_state

if TYPE_CHECKING:
    from typing_extensions import Self


def operands_of(
    cache: PackedCache[Packed],
    conv: Any,
    bn: Any,
    x: Tensor,
    choice: Choice | None,
    dtype: torch.dtype | None = None,
) -> Packed:
    """The operator's arguments: cached copies for inference, differentiable ones otherwise.

    Args:
        choice: who computes; None for a compiler to see.
        dtype: as for `reason_not_fusible`.
    """
    dtype = dtype or x.dtype
    sources = sources_of(conv, bn)
    inference = not (torch.is_grad_enabled() and need_gradients(sources))
    if choice is not None and inference and cacheable(sources):
        chosen = choice.implementation

        def pack() -> Packed:
            weight = conv.weight.detach().to(dtype)
            bias = None if conv.bias is None else conv.bias.detach().to(dtype)
            wide = accumulation_dtype(dtype)
            scale, shift = (v.to(wide) for v in batch_norm_affine(bn, torch.float64))
            packed = Packed(weight, bias, scale, shift)
            return packed if chosen is None else chosen.pack(packed, chosen.layout_of_packed(x))

        return cache.get(packed_key(choice, x, dtype, bn), sources, pack)
    bias = None if conv.bias is None else conv.bias.to(dtype)
    return Packed(conv.weight.to(dtype), bias, *batch_norm_affine(bn, dtype))


def packed_key(choice: Choice, x: Tensor, dtype: torch.dtype, bn: Any) -> tuple[Any, ...]:
    """What a packed copy depends on, besides the parameters."""
    chosen = choice.implementation
    if chosen is None:
        return dtype, bn.eps
    return dtype, bn.eps, chosen.name, chosen.layout_of_packed(x)


def computed(
    kind: Kind, op: Any, choice: Choice | None, packed: Packed, x: Tensor, act: Any
) -> Any:
    """The result of a fused module, through PyTorch's dispatcher where something there must see the
    operator ``op`` or its arguments are to be checked."""
    weight, bias, scale, shift, prepared = packed
    if (
        choice is None
        or kind is PATCHWISE
        or type(x) is not Tensor
        or x.numel() == 0
        or dispatch_state(x.device, x.dtype) is None
    ):
        return op(x, weight, bias, scale, shift, act)
    operands = (weight, bias, scale, shift)
    return run(kind.operator, x, *operands, act, choice=choice, prepared=prepared)


class FusedModule(nn.Module):
    """The common base of the fused modules: packed copies, the remembered route, the decision."""

    #: The packed copy and the last `Route`; no copy or pickle carries them.
    _packed: PackedCache[Any]
    #: See `optimize_for_inference`.
    _promise: Promise | None = None
    #: The module whose place this one took; in a tuple, because it is no child.
    _original: tuple[nn.Module] | None = None
    #: What belongs to fusion: neither TorchScript nor a plain module in this one's place has it.
    __jit_ignored_attributes__ = (
        "_packed",
        "_promise",
        "_halves",
        "_branch",
        "_original",
        "_graphs",
        "_depth_first",
        "_idle_in_eval",
    )

    def _patched(self) -> Callable[[Tensor], Tensor] | None:
        """The forward of the module whose place this one took, if its class has another one now."""
        if self._original is None or torch.compiler.is_compiling():
            return None
        (original,) = self._original
        if has_its_forward(type(original)):
            return None
        original.__dict__["training"] = self.training
        return original.forward

    def _by_route(self, cache: PackedCache[Any], x: Tensor) -> Tensor | None:
        """The result by the remembered route, or None where the call needs a new decision."""
        if torch.compiler.is_compiling():
            return None
        route: Route | None = cache.route
        if route is None:
            return None
        if route.holds(x):
            return route.run(x)
        cache.route = None
        return None

    def _break_promise(self) -> None:
        """End what `optimize_for_inference` promised of this model: routes compare everything."""
        if self._promise is not None:
            self._promise.is_kept = False

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._break_promise()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._break_promise()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._break_promise()
        super()._load_from_state_dict(*args, **kwargs)

    def _decide(
        self,
        kind: Kind,
        why_composed: str,
        x: Tensor,
        conv: Any,
        act: Any,
        dtype: torch.dtype | None = None,
    ) -> tuple[bool, Choice | None]:
        """Whether to call the fused operator, and who computes it; the latter is unknown to a
        compiler. Reports the choice to `recording.recording`."""
        if torch.compiler.is_compiling():
            return not why_composed, None
        call = None
        if why_composed:
            choice = composed(why_composed)
        else:
            name: Any = activation_name(act)
            call = call_of(kind.operator, x, conv.weight, conv.bias, name, dtype)
            choice = choose(call)
        if recording.is_recording():
            recording.record(self, kind.operator.name, choice, call)
        # The operator also knows PyTorch's own calls, in the layout that was measured.
        return choice.backend != "reference" or choice.memory_format is not None, choice


class FusedSequential(FusedModule, nn.Sequential):
    """A fused module that is a Sequential of the parts it fuses."""

    def __getitem__(self, index: int | slice) -> Any:
        # A slice is no longer the fused whole: it is the plain Sequential of those children.
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


def fused_pointwise(
    owner: FusedModule,
    cache: PackedCache[Packed],
    conv: nn.Module,
    act: nn.Module,
    bn: nn.Module,
    x: Tensor,
    kind: Kind = POINTWISE,
) -> Tensor | None:
    """``bn(act(conv(x)))`` as one operator, or None where the three must run one by one."""
    out = owner._by_route(cache, x)
    if out is not None:
        return out
    why = reason_not_fusible(kind, conv, act, bn, x)
    is_fused, choice = owner._decide(kind, why, x, conv, act)
    if not is_fused:
        return None
    packed = operands_of(cache, conv, bn, x, choice)
    out = computed(kind, pointwise_mix, choice, packed, x, activation_name(act))
    parts = FusedParts(conv, act, bn, cache)
    cache.route = half_route(owner, kind, parts, x)
    return out


def choice_of(kind: Kind, parts: FusedParts, x: Tensor) -> Choice:
    name: Any = activation_name(parts.act)
    return choose(call_of(kind.operator, x, parts.conv.weight, parts.conv.bias, name))


def half_route(owner: FusedModule, kind: Kind, parts: FusedParts, x: Tensor) -> Route | None:
    """The route of half a block, or of a stem, that was just computed for ``x``.

    None where PyTorch's operators computed it, and for a half on a CPU, which computes a block as a
    whole.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return None
    if dispatch_state(x.device, x.dtype) is None:
        return None
    if kind is not PATCHWISE and not support.is_kernel_device(x.device):
        return None
    conv, act, bn, cache = parts
    name: Any = activation_name(act)
    choice = choice_of(kind, parts, x)
    packed = cache.fresh(packed_key(choice, x, x.dtype, bn), sources_of(conv, bn))
    if packed is None:
        return None
    *plain, prepared = packed
    implementation, key = choice.implementation, choice.key
    if implementation is None:
        return None
    call = implementation.bind_call(*plain, name)
    if call is not None:
        inputs = Inputs(x.device, x.dtype, x.shape[1])
        return Route.of(inputs, owner, [parts], owner._promise, call)
    if key is None or self_check.result(key) != "":
        return None
    config = self_check.fallback_tile(key)[0] or choice.config
    bound = implementation.bind(key, config, packed)
    return Route.of(
        Inputs(x.device, x.dtype, x.shape[1], x.shape, x.stride()),
        owner,
        [parts],
        owner._promise,
        lambda x: launch(implementation, key, config, x, *plain, name, prepared=prepared),
        () if bound is None else (Kernel(key, bound),),
    )


def has_kernels(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether GPU kernels compute a block on ``x``, or a compiler is to see that they do."""
    if torch.compiler.is_compiling():
        return compiled_kernels_run(x.device, dtype, DEPTHWISE.operator.key)
    return has_gpu_implementation(x.device, dtype, DEPTHWISE.operator)


def to_preferred_layout(module: nn.Module, x: Tensor) -> Tensor:
    """``x`` in the layout of the blocks: channels-last for GPU kernels, else as it is.

    Converted once, not in each half: a block that gets channels-last gives channels-last.
    """
    compiling = torch.compiler.is_compiling()
    if module.training or isinstance(x, torch.fx.Proxy) or x.dim() != 4:
        return x
    if not compiling and (reason_observed(x) or x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous(memory_format=torch.channels_last) if has_kernels(x, x.dtype) else x
