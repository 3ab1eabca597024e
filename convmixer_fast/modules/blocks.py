"""One block, `MixerBlock`, and blocks as the CPU engine runs them: whole, several in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from ..arch import activation_layer, activation_name
from ..backends.cpu import native
from ..backends.operands import Packed, memory_format_of
from ..backends.stock import fastest_layout
from ..ops import recording
from ..ops.dispatch import (
    choose,
    reason_left_to_pytorch,
    runs,
)
from ..ops.mixer import MIXER_STACK, mixer_stack
from ..ops.registry import Call
from ..reference import DropPath, in_turn, scripted_as
from .fusible import (
    POINTWISE,
    is_exactly,
    is_pointwise,
    reason_not_fusible,
    reason_observed,
    watch_classes,
)
from .packing import PackedCache, batch_norm_affine, cacheable, need_gradients, sources_of
from .route import FusedParts, Inputs, Route, Step, dispatch_state

if TYPE_CHECKING:
    pass
from .fused import FusedModule, FusedSequential, fused_pointwise, to_preferred_layout
from .halves import DepthwiseMix


class MixerBlock(FusedSequential):
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
            return run_stack(self, [self], [whole], x)
        return by_stock(self, [self], self._by_halves, x)

    def _by_halves(self, x: Tensor) -> Tensor:
        x = to_preferred_layout(self, x)
        spatial, conv, act, bn = self
        x = spatial(x)
        out = fused_pointwise(self, self._halves, conv, act, bn, x)
        if out is None:
            # One name for all of them: no map outlives the module that takes it.
            x = conv(x)
            x = act(x)
            out = bn(x)
        return out

    def mix_channels(self, x: Tensor) -> Tensor:
        """The channel half alone, on the map that child ``0`` made."""
        _, conv, act, bn = self
        out = fused_pointwise(self, self._halves, conv, act, bn, x)
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


def run_stack(
    owner: FusedModule, blocks: Iterable[nn.Module], wholes: Sequence[PackedBlock], x: Tensor
) -> Tensor:
    """Blocks of the same width, kernel and activation as one operator of the CPU engine."""
    choice = choose(Call(MIXER_STACK, x.device, x.dtype, wholes[0].dim))
    if recording.is_recording():
        for block in blocks:
            recording.record(block, MIXER_STACK.name, choice)
    weights, packed = [whole.weight for whole in wholes], [whole.packed for whole in wholes]
    operands = (weights, packed, wholes[0].kernel_size, wholes[0].act)
    out: Tensor = mixer_stack(x, *operands)
    if type(x) is not Tensor or dispatch_state(x.device, x.dtype) is None:
        return out
    engine = choice.implementation
    call = None if engine is None else engine.bind_call(*operands)
    if call is not None:
        inputs = Inputs(x.device, x.dtype, x.shape[1])
        parts = [part for block in blocks for part in _parts_of_whole(block)]
        owner._packed.route = Route.of(inputs, owner, parts, owner._promise, call)
    return out


def _parts_of_whole(block: Any) -> Iterator[FusedParts]:
    """Both halves of a block that `MixerBlock._whole` packed into one copy."""
    spatial, conv, act, bn = block._modules.values()
    depthwise, spatial_act, spatial_bn = spatial._modules[spatial._branch]
    yield FusedParts(depthwise, spatial_act, spatial_bn, block._packed)
    yield FusedParts(conv, act, bn, block._packed)


def by_stock(
    owner: FusedModule, blocks: Iterable[nn.Module], forward: Callable[[Tensor], Tensor], x: Tensor
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


def _plain_route(owner: FusedModule, blocks: Iterable[nn.Module], x: Tensor) -> Route | None:
    """The route of blocks that PyTorch's operators just computed although they could be fused."""
    if type(x) is not Tensor or dispatch_state(x.device, x.dtype) is None:
        return None
    blocks = list(blocks)
    halves = list(fusible_halves(blocks, x))
    if not blocks or len(halves) != 2 * len(blocks):
        return None
    steps = [Step(*half[:3], is_residual=i % 2 == 0) for i, half in enumerate(halves)]
    return Route.composed(x, owner, owner._promise, steps)


def fusible_halves(blocks: Iterable[nn.Module], x: Tensor) -> Iterator[FusedParts]:
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


watch_classes(DropPath, DepthwiseMix, MixerBlock)
