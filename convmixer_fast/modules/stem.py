"""The stem, `PatchEmbed`: patches of images, floats or uint8, to maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.fx
from torch import Tensor, nn

from ..arch import activation_layer, activation_name
from ..ops.stem import normalized, patch_embed_uint8
from ..reference import Normalization, normalized_in_turn, scripted_as
from .fusible import (
    PATCHWISE,
    PATCHWISE_UINT8,
    is_patchwise,
    reason_not_fusible,
)
from .packing import PackedCache, need_gradients, sources_of

if TYPE_CHECKING:
    pass
from .fused import FusedSequential, fused_pointwise, has_kernels, operands_of


class PatchEmbed(FusedSequential):
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
        out = fused_pointwise(self, self._packed, conv, act, bn, x, PATCHWISE)
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
        if (not compiling and torch._C._get_tracing_state()) or not has_kernels(x, dtype):
            return None
        if torch.is_grad_enabled() and need_gradients(sources_of(conv, bn)):
            return None
        # Where the modules run one by one the float stem says so.
        if reason_not_fusible(PATCHWISE_UINT8, conv, act, bn, x, dtype):
            return None
        is_fused, choice = self._decide(PATCHWISE_UINT8, "", x, conv, act, dtype)
        if not is_fused:
            return None
        weight, bias, scale, shift, _ = operands_of(self._packed, conv, bn, x, choice, dtype)
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
