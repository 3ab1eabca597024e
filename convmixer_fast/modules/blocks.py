"""The fused modules of a network: stem, block, the two halves of a block, and a stack of blocks.

Their children are the ordinary `nn.Conv2d`, activation and `nn.BatchNorm2d` under the names that
the published models use, so state dicts, optimizers, hooks and surgery on children work as usual.
Only the parent's forward is fused, and only where that computes the same thing: while BatchNorm
gathers batch statistics, while a child carries hooks or is not the plain module, the children run
one by one.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.fx
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from ..arch import activation_layer, activation_name
from ..backends import self_check
from ..backends.cpu import native
from ..backends.layout import as_channels_last
from ..backends.operands import Packed, accumulation_dtype, memory_format_of
from ..backends.stock import fastest_layout
from ..backends.triton import support
from ..ops import recording
from ..ops.depthwise import depthwise_mix
from ..ops.dispatch import (
    Choice,
    call_of,
    choose,
    compiled_kernels_run,
    composed,
    has_gpu_implementation,
    reason_left_to_pytorch,
    runs,
)
from ..ops.execution import launch, run
from ..ops.mixer import MIXER_STACK, mixer_stack
from ..ops.pointwise import pointwise_mix
from ..ops.registry import Call
from ..ops.stem import normalized, patch_embed_uint8
from ..reference import DropPath, Normalization, in_turn, normalized_in_turn, residual, scripted_as
from . import cuda_graph
from .fusible import (
    DEPTHWISE,
    PATCHWISE,
    PATCHWISE_UINT8,
    POINTWISE,
    Kind,
    has_its_forward,
    is_depthwise,
    is_exactly,
    is_patchwise,
    is_pointwise,
    is_touched,
    reason_not_fusible,
    reason_observed,
    watch_classes,
)
from .packing import PackedCache, batch_norm_affine, cacheable, need_gradients, sources_of
from .route import FusedParts, Inputs, Kernel, Promise, Route, Step, chained, dispatch_state

if TYPE_CHECKING:
    from typing_extensions import Self


def _operands(
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

        return cache.get(_packed_key(choice, x, dtype, bn), sources, pack)
    bias = None if conv.bias is None else conv.bias.to(dtype)
    return Packed(conv.weight.to(dtype), bias, *batch_norm_affine(bn, dtype))


def _computed(
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


def _packed_key(choice: Choice, x: Tensor, dtype: torch.dtype, bn: Any) -> tuple[Any, ...]:
    """What a packed copy depends on, besides the parameters."""
    chosen = choice.implementation
    if chosen is None:
        return dtype, bn.eps
    return dtype, bn.eps, chosen.name, chosen.layout_of_packed(x)


class _Fused(nn.Module):
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


class _FusedSequential(_Fused, nn.Sequential):
    """A fused module that is a Sequential of the parts it fuses."""

    def __getitem__(self, index: int | slice) -> Any:
        # A slice is no longer the fused whole: it is the plain Sequential of those children.
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


class DepthwiseMix(_Fused):
    """``x + BN(act(depthwise_kxk(x) + b))``: the spatial half of a block.

    (N, dim, H, W) -> (N, dim, H, W), channels-last if the input is. Children: ``fn`` =
    Sequential(Conv2d, activation, BatchNorm2d), so keys are ``fn.0.*`` and ``fn.2.*`` as in timm.

    Args:
        dim: channels.
        kernel_size: k, odd or even.
        act_layer: a class or factory of activation modules, or a name in `arch.ACTIVATIONS`.
        drop_path: probability of dropping a sample's branch in training.
        device: as for `nn.Conv2d`.
        dtype: as for `nn.Conv2d`.

    Source: Trockman and Kolter 2022, section 2.
    """

    #: The class of a foreign drop_path that `optimize` found to return its input in eval mode.
    _idle_in_eval: type[nn.Module] | None = None

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        act_layer: Callable[[], nn.Module] | str = nn.GELU,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        act_layer = activation_layer(act_layer)
        self.fn = nn.Sequential(
            nn.Conv2d(
                dim, dim, kernel_size, groups=dim, padding="same", device=device, dtype=dtype
            ),
            act_layer(),
            nn.BatchNorm2d(dim, device=device, dtype=dtype),
        )
        self.drop_path: nn.Module | None = DropPath(drop_path) if drop_path else None
        self._branch = "fn"
        self._packed = PackedCache()

    @classmethod
    def from_parts(cls, fn: nn.Sequential, name: str = "fn") -> DepthwiseMix:
        """Around an existing ``fn`` = Sequential(conv, act, bn), kept as the child ``name``.

        Raises:
            ValueError: the convolution is not a "same" depthwise one.
        """
        if len(fn) != 3 or not is_depthwise(fn[0]):
            raise ValueError(f'expected Sequential("same" depthwise Conv2d, act, norm), got {fn}')
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.add_module(name, fn)
        # Not a child: the module must not gain one that the wrapped module did not have.
        self.drop_path = None
        self._branch = name
        self._packed = PackedCache()
        # Only here: children may be frozen in eval mode.
        self.training = fn.training
        return self

    @scripted_as(residual)
    def forward(self, x: Tensor) -> Tensor:
        patched = self._patched()
        if patched is not None:
            return patched(x)
        out = self._by_route(self._packed, x)
        if out is not None:
            return out
        fn: Any = getattr(self, self._branch)
        why = self._reason_composed(fn, x)
        # Where it is not three modules, `why` says so and they are not looked at.
        conv, act, bn = (None, None, None) if why else fn
        is_fused, choice = self._decide(DEPTHWISE, why, x, conv, act)
        if not is_fused:
            branch = fn(x)
            return (branch if self.drop_path is None else self.drop_path(branch)) + x
        packed = _operands(self._packed, conv, bn, x, choice)
        out = _computed(DEPTHWISE, depthwise_mix, choice, packed, x, activation_name(act))
        parts = FusedParts(conv, act, bn, self._packed)
        self._packed.route = _half_route(self, DEPTHWISE, parts, x)
        return out

    def _reason_composed(self, fn: nn.Module, x: Tensor) -> str:
        if type(fn) is not nn.Sequential or len(fn) != 3:
            return "the branch is no longer Sequential(conv, act, norm)"
        drop = self.drop_path
        if is_touched(fn) or (drop is not None and is_touched(drop)):
            return "a child module has hooks or a method of its own"
        if drop is not None and drop.training:
            return "drop_path drops samples"
        if drop is not None and type(drop) not in (DropPath, nn.Identity, self._idle_in_eval):
            return f"the drop_path is a {type(drop).__name__}"
        conv, act, bn = fn
        return reason_not_fusible(DEPTHWISE, conv, act, bn, x)


class PointwiseMix(_FusedSequential):
    """``BN(act(W x + b))``: the channel half of a block.

    (N, in_dim, H, W) -> (N, out_dim, H, W), channels-last if the input is. Children: ``0`` Conv2d
    (1x1), ``1`` activation, ``2`` BatchNorm2d.

    Args:
        in_dim: channels of the input.
        out_dim: channels of the output; None for ``in_dim``.
        act_layer: a class or factory of activation modules, or a name in `arch.ACTIVATIONS`.
        device: as for `nn.Conv2d`.
        dtype: as for `nn.Conv2d`.

    Source: Trockman and Kolter 2022, section 2.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        act_layer: Callable[[], nn.Module] | str = nn.GELU,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        out_dim = in_dim if out_dim is None else out_dim
        super().__init__(
            nn.Conv2d(in_dim, out_dim, 1, device=device, dtype=dtype),
            activation_layer(act_layer)(),
            nn.BatchNorm2d(out_dim, device=device, dtype=dtype),
        )
        self._packed = PackedCache()

    @classmethod
    def from_parts(cls, conv: nn.Conv2d, act: nn.Module, bn: nn.Module) -> PointwiseMix:
        """Around existing modules, the same objects.

        Raises:
            ValueError: the convolution is not a dense 1x1 one.
        """
        if not is_pointwise(conv):
            raise ValueError(f"expected a dense 1x1 Conv2d of stride 1, got {conv}")
        self = cls.__new__(cls)
        nn.Sequential.__init__(self, conv, act, bn)
        self._packed = PackedCache()
        self.training = bn.training
        return self

    @scripted_as(in_turn)
    def forward(self, x: Tensor) -> Tensor:
        patched = self._patched()
        if patched is not None:
            return patched(x)
        if len(self) != 3:
            return super().forward(x)
        conv, act, bn = self
        out = _fused_pointwise(self, self._packed, conv, act, bn, x)
        return super().forward(x) if out is None else out


class PatchEmbed(_FusedSequential):
    """``BN(act(conv(x)))`` of p x p patches that do not overlap: the stem of a ConvMixer.

    (N, in_chans, H, W) -> (N, dim, H // p, W // p), channels-last if the input is, and always where
    Triton kernels compute it (on a GPU, in eval mode). Children as in timm: ``0`` Conv2d (p x p,
    stride p), ``1`` activation, ``2`` BatchNorm2d.

    Args:
        in_chans: channels of the image.
        dim: channels of the map.
        patch_size: p.
        act_layer: a class or factory of activation modules, or a name in `arch.ACTIVATIONS`.
        device: as for `nn.Conv2d`.
        dtype: as for `nn.Conv2d`.
        normalize: (mean, std), a number for each channel of both: uint8 images are taken too, and
            become ``(x / 255 - mean) / std``, inside the kernel on a GPU. Other images are left as
            they are.

    Raises:
        ValueError: mean or std does not fit the channels, or no image could be divided by std.

    Source: Trockman and Kolter 2022, section 2.
    """

    # Not annotated: TorchScript would take the annotation for the attribute's type.
    normalize = cast("Normalization | None", None)

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int,
        act_layer: Callable[[], nn.Module] | str = nn.GELU,
        device: Any = None,
        dtype: torch.dtype | None = None,
        normalize: Normalization | None = None,
    ) -> None:
        super().__init__(
            nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, device=device, dtype=dtype),
            activation_layer(act_layer)(),
            nn.BatchNorm2d(dim, device=device, dtype=dtype),
        )
        self._packed = PackedCache()
        if normalize is not None:
            self.normalize = _checked_normalization(normalize, in_chans)

    def extra_repr(self) -> str:
        return "" if self.normalize is None else f"normalize={self.normalize}"

    @scripted_as(normalized_in_turn)
    def forward(self, x: Tensor) -> Tensor:
        normalize = self.normalize
        # torch.fx sees a stem of floats.
        if normalize is not None and not isinstance(x, torch.fx.Proxy) and x.dtype == torch.uint8:
            out = self._on_uint8(x, *normalize)
            if out is not None:
                return out
            x = normalized(x, *normalize, dtype_of_pixels(x, self))
        if len(self._modules) != 3:
            return super().forward(x)
        conv, act, bn = self
        out = _fused_pointwise(self, self._packed, conv, act, bn, x, PATCHWISE)
        return super().forward(x) if out is None else out

    def _on_uint8(self, x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor | None:
        """The stem with its normalisation as one operator, or None where PyTorch normalises first.

        That is so where no kernel would compute the operator, and where gradients are recorded,
        which it does not have.
        """
        if len(self) != 3 or not is_patchwise(self[0]):
            return None
        conv: Any
        conv, act, bn = self
        dtype = dtype_of_pixels(x, self)
        compiling = torch.compiler.is_compiling()
        if (not compiling and torch._C._get_tracing_state()) or not _has_kernels(x, dtype):
            return None
        if torch.is_grad_enabled() and need_gradients(sources_of(conv, bn)):
            return None
        # Where the modules run one by one the float stem says so.
        if reason_not_fusible(PATCHWISE_UINT8, conv, act, bn, x, dtype):
            return None
        is_fused, choice = self._decide(PATCHWISE_UINT8, "", x, conv, act, dtype)
        if not is_fused:
            return None
        weight, bias, scale, shift, _ = _operands(self._packed, conv, bn, x, choice, dtype)
        name = activation_name(act)
        return patch_embed_uint8(x, weight, bias, scale, shift, name, mean, std)


def _checked_normalization(normalize: Normalization, channels: int) -> Normalization:
    """(mean, std) as tuples of floats."""
    try:
        mean, std = (tuple(float(v) for v in values) for values in normalize)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"normalize must be (mean, std), a number for each channel of both, got {normalize!r}"
        ) from error
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(
                f"normalize: {name} has {len(values)} numbers, the images have {channels} channels"
            )
        if not all(map(math.isfinite, values)):
            raise ValueError(f"normalize: {name} must be finite, got {values}")
    if min(std) <= 0:
        raise ValueError(f"normalize: std must be positive, got {std}")
    return mean, std


def dtype_of_pixels(x: Tensor, stem: nn.Module) -> torch.dtype:
    """What uint8 images are normalised to: the dtype that the stem computes in."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype: torch.dtype = next(stem.parameters()).dtype
    return dtype


class MixerBlock(_FusedSequential):
    """One ConvMixer block: `DepthwiseMix`, then the channel half.

    (N, dim, H, W) -> (N, dim, H, W), channels-last if the input is, and always where Triton kernels
    compute the block (on a GPU, in eval mode). Children as in timm: ``0`` `DepthwiseMix`, ``1``
    Conv2d (1x1), ``2`` activation, ``3`` BatchNorm2d.

    Args:
        dim: channels.
        kernel_size: k of the depthwise convolution, odd or even.
        act_layer: a class or factory of activation modules, or a name in `arch.ACTIVATIONS`.
        drop_path: probability of dropping a sample's residual branch in training.
        device: as for `nn.Conv2d`.
        dtype: as for `nn.Conv2d`.

    Source: Trockman and Kolter 2022, section 2.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        act_layer: Callable[[], nn.Module] | str = nn.GELU,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        act_layer = activation_layer(act_layer)
        super().__init__(
            DepthwiseMix(dim, kernel_size, act_layer, drop_path, device=device, dtype=dtype),
            nn.Conv2d(dim, dim, 1, device=device, dtype=dtype),
            act_layer(),
            nn.BatchNorm2d(dim, device=device, dtype=dtype),
        )
        self._packed = PackedCache()
        self._halves: PackedCache[Packed] = PackedCache()

    @classmethod
    def from_parts(
        cls, spatial: DepthwiseMix, conv: nn.Conv2d, act: nn.Module, bn: nn.Module
    ) -> MixerBlock:
        """Around existing modules, the same objects.

        Raises:
            ValueError: the convolution is not a dense 1x1 one.
        """
        if not is_pointwise(conv):
            raise ValueError(f"expected a dense 1x1 Conv2d of stride 1, got {conv}")
        self = cls.__new__(cls)
        nn.Sequential.__init__(self, spatial, conv, act, bn)
        self._packed = PackedCache()
        self._halves = PackedCache()
        self.training = bn.training
        return self

    @scripted_as(in_turn)
    def forward(self, x: Tensor) -> Tensor:
        patched = self._patched()
        if patched is not None:
            return patched(x)
        if len(self) != 4:
            return super().forward(x)
        out = self._by_route(self._packed, x)
        if out is not None:
            return out
        whole = self._whole(x) if can_run_whole_blocks(x) else None
        if whole is not None:
            return _run_stack(self, [self], [whole], x)
        return _by_stock(self, [self], self._by_halves, x)

    def _by_halves(self, x: Tensor) -> Tensor:
        x = to_preferred_layout(self, x)
        spatial, conv, act, bn = self
        x = spatial(x)
        out = _fused_pointwise(self, self._halves, conv, act, bn, x)
        if out is None:
            # One name for all of them: no map outlives the module that takes it.
            x = conv(x)
            x = act(x)
            out = bn(x)
        return out

    def mix_channels(self, x: Tensor) -> Tensor:
        """The channel half alone, on the map that child ``0`` made."""
        _, conv, act, bn = self
        out = _fused_pointwise(self, self._halves, conv, act, bn, x)
        return bn(act(conv(x))) if out is None else out

    def _whole(self, x: Tensor) -> PackedBlock | None:
        """The block as `mixer_stack` takes it, or None where its halves must run one by one on x.

        They must for every reason for which a half is composed, and where the halves are not
        alike, gradients are recorded, or changes of the parameters could not be noticed.
        """
        if len(self._modules) != 4:
            return None
        spatial: Any
        conv: Any
        bn: Any
        spatial, conv, act, bn = self._modules.values()
        # While the block trains, the first of these answers at once.
        if bn.training or not is_exactly(spatial, DepthwiseMix):
            return None
        branch: Any = spatial._modules[spatial._branch]
        if spatial._reason_composed(branch, x):
            return None
        if reason_not_fusible(POINTWISE, conv, act, bn, x):
            return None
        depthwise, spatial_act, spatial_bn = branch
        name = activation_name(act)
        if name is None or name != activation_name(spatial_act):
            return None
        if conv.in_channels != conv.out_channels:
            return None
        sources = sources_of(depthwise, spatial_bn) + sources_of(conv, bn)
        if torch.is_grad_enabled() and (x.requires_grad or need_gradients(sources)):
            return None
        whole = PackedBlock(x, x, conv.in_channels, depthwise.kernel_size[0], name)
        if recording.is_recording() and is_fake(x):
            return whole
        key = (spatial_bn.eps, bn.eps)
        packed = self._packed.fresh(key, sources)
        if packed is None:
            if not cacheable(sources):
                return None

            def pack() -> tuple[Tensor, Tensor]:
                # In float64: where the mean is many deviations away, the shift is a difference
                # of large numbers.
                first = batch_norm_affine(spatial_bn, torch.float64)
                second = batch_norm_affine(bn, torch.float64)
                given = (depthwise.weight, depthwise.bias, *first, conv.bias, *second)
                floats: Any = [t if t is None else t.float() for t in given]
                # A float32 weight is the parameter's own memory, not a copy.
                return conv.weight.detach().float(), native.mixer_pack(*floats)

            packed = self._packed.get(key, sources, pack)
        weight, rest = packed
        return whole._replace(weight=weight, packed=rest)


class PackedBlock(NamedTuple):
    """A block packed for `mixer_stack`, and what all blocks of a stack must share."""

    weight: Tensor
    packed: Tensor
    dim: int
    kernel_size: int
    act: str


def packed_blocks(blocks: Sequence[nn.Module], x: Tensor) -> list[PackedBlock] | None:
    """All blocks packed for one call of the engine on ``x``; None where their halves must run."""
    if not blocks or not can_run_whole_blocks(x):
        return None
    packed: list[PackedBlock] = []
    for block in blocks:
        found = block._whole(x) if is_exactly(block, MixerBlock) else None
        if found is None or (packed and found[2:] != packed[0][2:]):
            return None
        packed.append(found)
    return packed


def can_run_whole_blocks(x: Tensor) -> bool:
    """Whether the CPU engine runs whole blocks on ``x``; a compiler sees the halves instead."""
    if torch.compiler.is_compiling() or isinstance(x, torch.fx.Proxy):
        return False
    if x.dim() != 4 or not recording.has_whole_blocks():
        return False
    return runs(MIXER_STACK, x.device, x.dtype, x.shape[1])


def to_preferred_layout(module: nn.Module, x: Tensor) -> Tensor:
    """``x`` in the layout of the blocks: channels-last for GPU kernels, else as it is.

    Converted once, not in each half: a block that gets channels-last gives channels-last.
    """
    compiling = torch.compiler.is_compiling()
    if module.training or isinstance(x, torch.fx.Proxy) or x.dim() != 4:
        return x
    if not compiling and (reason_observed(x) or x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous(memory_format=torch.channels_last) if _has_kernels(x, x.dtype) else x


def _has_kernels(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether GPU kernels compute a block on ``x``, or a compiler is to see that they do."""
    if torch.compiler.is_compiling():
        return compiled_kernels_run(x.device, dtype, DEPTHWISE.operator.key)
    return has_gpu_implementation(x.device, dtype, DEPTHWISE.operator)


def _by_stock(
    owner: _Fused, blocks: Iterable[nn.Module], forward: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    """``forward(x)``; where PyTorch is faster than the engine, in the layout that it likes best.

    The result has the layout of ``x``.

    Args:
        blocks: what ``forward`` runs one after the other.
    """
    if owner.training or torch.compiler.is_compiling() or isinstance(x, torch.fx.Proxy):
        return forward(x)
    if x.device.type != "cpu" or reason_observed(x) or x.dim() != 4:
        return forward(x)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if not reason_left_to_pytorch(MIXER_STACK, x.device, dtype, x.shape[1]):
        return forward(x)
    given = memory_format_of(x)
    wanted = fastest_layout(x)
    out = forward(x.contiguous(memory_format=wanted))
    owner._packed.route = _plain_route(owner, blocks, x)
    return out if wanted == given else out.contiguous(memory_format=given)


def _plain_route(owner: _Fused, blocks: Iterable[nn.Module], x: Tensor) -> Route | None:
    """The route of blocks that PyTorch's operators just computed although they could be fused."""
    if type(x) is not Tensor or dispatch_state(x.device, x.dtype) is None:
        return None
    blocks = list(blocks)
    halves = list(_fusible_halves(blocks, x))
    if not blocks or len(halves) != 2 * len(blocks):
        return None
    steps = [Step(*half[:3], is_residual=i % 2 == 0) for i, half in enumerate(halves)]
    return Route.composed(x, owner, owner._promise, steps)


def _fusible_halves(blocks: Iterable[nn.Module], x: Tensor) -> Iterator[FusedParts]:
    """The halves of blocks that fused operators could compute on ``x``, up to the first other."""
    for block in blocks:
        if not is_exactly(block, MixerBlock) or len(block) != 4:
            return
        spatial, conv, act, bn = block
        if not is_exactly(spatial, DepthwiseMix):
            return
        branch: Any = spatial._modules[spatial._branch]
        if spatial._reason_composed(branch, x):
            return
        if reason_not_fusible(POINTWISE, conv, act, bn, x):
            return
        depthwise, spatial_act, spatial_bn = branch
        yield FusedParts(depthwise, spatial_act, spatial_bn, spatial._packed)
        yield FusedParts(conv, act, bn, block._halves)


class MixerStack(_FusedSequential):
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
            return super().forward(x) if packed is None else _run_stack(self, self, packed, x)
        if not self._modules or not self._may_run_kernels(x):
            return _by_stock(self, self, super().forward, x)
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
        parts = list(_fusible_halves(self, x))
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
            or not _has_kernels(x, x.dtype)
        ):
            return None
        halves = list(_fusible_halves(self, x))
        if len(halves) != 2 * len(self._modules):
            return None
        if torch.is_grad_enabled() and (
            x.requires_grad
            or any(need_gradients(sources_of(half.conv, half.bn)) for half in halves)
        ):
            return None
        return tuple(
            _operands(half.cache, half.conv, half.bn, x, _choice_of(kind, half, x))
            for kind, half in zip(cycle((DEPTHWISE, POINTWISE)), halves, strict=False)
        )


def _run_stack(
    owner: _Fused, blocks: Iterable[nn.Module], wholes: Sequence[PackedBlock], x: Tensor
) -> Tensor:
    """Blocks of the same width, kernel and activation as one operator of the CPU engine."""
    if recording.is_recording():
        choice = choose(Call(MIXER_STACK, x.device, x.dtype, wholes[0].dim))
        for block in blocks:
            recording.record(block, MIXER_STACK.name, choice)
    weights, packed = [whole.weight for whole in wholes], [whole.packed for whole in wholes]
    operands = (weights, packed, wholes[0].kernel_size, wholes[0].act)
    out = mixer_stack(x, *operands)
    if type(x) is not Tensor or dispatch_state(x.device, x.dtype) is None:
        return out
    owner._packed.route = Route.of(
        Inputs(x.device, x.dtype, x.shape[1]),
        owner,
        [part for block in blocks for part in _parts_of_whole(block)],
        owner._promise,
        _on_plain_maps(native.prepared_stack(*operands), lambda x: mixer_stack(x, *operands)),
    )
    return out


def _parts_of_whole(block: Any) -> Iterator[FusedParts]:
    """Both halves of a block that `MixerBlock._whole` packed into one copy."""
    spatial, conv, act, bn = block._modules.values()
    depthwise, spatial_act, spatial_bn = spatial._modules[spatial._branch]
    yield FusedParts(depthwise, spatial_act, spatial_bn, block._packed)
    yield FusedParts(conv, act, bn, block._packed)


def _fused_pointwise(
    owner: _Fused,
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
    packed = _operands(cache, conv, bn, x, choice)
    out = _computed(kind, pointwise_mix, choice, packed, x, activation_name(act))
    parts = FusedParts(conv, act, bn, cache)
    cache.route = _half_route(owner, kind, parts, x)
    return out


def _choice_of(kind: Kind, parts: FusedParts, x: Tensor) -> Choice:
    name: Any = activation_name(parts.act)
    return choose(call_of(kind.operator, x, parts.conv.weight, parts.conv.bias, name))


def _half_route(owner: _Fused, kind: Kind, parts: FusedParts, x: Tensor) -> Route | None:
    """The route of half a block, or of a stem, that was just computed for ``x``.

    None where PyTorch's operators computed it, and for a half on a CPU, which computes a block as a
    whole.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return None
    if dispatch_state(x.device, x.dtype) is None:
        return None
    if not isinstance(owner, PatchEmbed) and not support.is_kernel_device(x.device):
        return None
    conv, act, bn, cache = parts
    name: Any = activation_name(act)
    choice = _choice_of(kind, parts, x)
    packed = cache.fresh(_packed_key(choice, x, x.dtype, bn), sources_of(conv, bn))
    if packed is None:
        return None
    *plain, prepared = packed
    if choice.backend == "cpu":
        if x.dtype != torch.float32 or not isinstance(owner, PatchEmbed):
            return None
        operands = (*plain, name)
        inputs = Inputs(x.device, x.dtype, x.shape[1])
        run = native.prepared_pointwise(*operands)
        call = _on_plain_maps(run, lambda x: pointwise_mix(x, *operands))
        return Route.of(inputs, owner, [parts], owner._promise, call)
    implementation, key = choice.implementation, choice.key
    if implementation is None or key is None or self_check.result(key) != "":
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


def _on_plain_maps(
    run: Callable[[Tensor], Tensor], otherwise: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """``run`` on contiguous float32 maps, which the engine reads in place; else ``otherwise``."""

    def call(x: Tensor) -> Tensor:
        if x.dtype is torch.float32 and x.numel() and x.is_contiguous() and not x.is_neg():
            return run(x)
        return otherwise(x)

    return call


def refresh(model: nn.Module) -> None:
    """Drop every packed copy of parameters in ``model``: the next forward makes new ones.

    Needed only after writes that torch cannot see to a few elements of a large tensor, such as one
    weight set through ``.data``; all others are noticed.
    """
    for module in model.modules():
        if isinstance(module, _Fused):
            module._packed.clear()
        if isinstance(module, MixerBlock):
            module._halves.clear()
        if isinstance(module, MixerStack) and module._graphs is not None:
            module._graphs.clear()


watch_classes(DropPath, DepthwiseMix, MixerBlock)
