"""The two halves of a block: `DepthwiseMix` and `PointwiseMix`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch import Tensor, nn

from ..arch import activation_layer, activation_name
from ..ops.depthwise import depthwise_mix
from ..reference import DropPath, in_turn, residual, scripted_as
from .fusible import (
    DEPTHWISE,
    is_depthwise,
    is_pointwise,
    is_touched,
    reason_not_fusible,
)
from .packing import PackedCache
from .route import FusedParts

if TYPE_CHECKING:
    pass
from .fused import FusedModule, FusedSequential, computed, fused_pointwise, half_route, operands_of


class DepthwiseMix(FusedModule):
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
        packed = operands_of(self._packed, conv, bn, x, choice)
        out = computed(DEPTHWISE, depthwise_mix, choice, packed, x, activation_name(act))
        parts = FusedParts(conv, act, bn, self._packed)
        self._packed.route = half_route(self, DEPTHWISE, parts, x)
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


class PointwiseMix(FusedSequential):
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
        out = fused_pointwise(self, self._packed, conv, act, bn, x)
        return super().forward(x) if out is None else out
