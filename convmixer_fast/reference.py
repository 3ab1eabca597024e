"""ConvMixer in plain PyTorch: the oracle of every test.

Nothing here is fused, packed or cached. Parameter names are timm's. torch.jit.script and torch.fx
need annotations that are types, not strings: this module does without
``from __future__ import annotations``.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_type_hints

import torch
import torch.fx
from torch import Tensor, nn

from .arch import Arch, activation_layer

#: (mean, std) of images in [0, 1], a number for each channel of both.
Normalization = tuple[Sequence[float], Sequence[float]]
_Forward = TypeVar("_Forward", bound=Callable[..., Any])


def in_turn(self: Any, x: Tensor) -> Tensor:
    """The forward of a Sequential."""
    for module in self:
        x = module(x)
    return x


def residual(self: Any, x: Tensor) -> Tensor:
    """The forward of a depthwise half: ``drop_path(branch(x)) + x``.

    The branch is the first child that is not named ``drop_path``.
    """
    y = x
    ran = False
    for name, module in self.named_children():
        if name != "drop_path" and not ran:
            y = module(y)
            ran = True
    for name, module in self.named_children():
        if name == "drop_path":
            y = module(y)
    return y + x


def normalized_in_turn(self: Any, x: Tensor) -> Tensor:
    """The forward of a stem: uint8 becomes ``(x / 255 - mean) / std`` if ``normalize`` is set."""
    if hasattr(self, "normalize") and x.dtype == torch.uint8:
        mean, std = self.normalize
        dtype = self[0].weight.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        # torch.full, since torch.tensor rounds floats to float32 first in TorchScript.
        shift = torch.stack([torch.full((1, 1), v, dtype=wide, device=x.device) for v in mean])
        scale = torch.stack([torch.full((1, 1), v, dtype=wide, device=x.device) for v in std])
        x = ((x.to(wide) / 255 - shift) / scale).to(dtype)
    for module in self:
        x = module(x)
    return x


def scripted_as(plain: Callable[..., Any]) -> Callable[[_Forward], _Forward]:
    """Decorate a forward so that torch.jit.script compiles ``plain``, which computes the same.

    TorchScript reads the source of what `inspect.unwrap` finds, and resolves its names in the
    module of the decorated function: ``plain`` may use ``torch`` and ``Tensor``.
    ``__prepare_scriptable__`` is no alternative: torch.jit.script writes the plain module that it
    returns into the parent, which would then no longer be fused.
    """

    def mark(forward: _Forward) -> _Forward:
        forward.__wrapped__ = plain  # type: ignore[attr-defined]
        # torch.fx copies annotations into its graphs; torch before 2.9 does not resolve strings.
        forward.__annotations__ = get_type_hints(forward)
        return forward

    return mark


class DropPath(nn.Module):
    """Stochastic depth: training drops samples with probability ``p`` and scales the others.

    Source: Huang et al., "Deep Networks with Stochastic Depth", 2016.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"drop_path must be in [0, 1), got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        keep = 1.0 - self.p
        mask = x.new_empty([x.shape[0]] + [1] * (x.dim() - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Residual(nn.Module):
    """``fn(x) + x``."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


class ResidualSequential(nn.Sequential):
    """``drop_path(branch(x)) + x``; the branch is the first child not named ``drop_path``."""

    forward = residual


class NormalizedSequential(nn.Sequential):
    """A stem that also takes uint8 images.

    Args:
        normalize: (mean, std) of the images in [0, 1], a number for each channel of both.
    """

    def __init__(self, *modules: nn.Module, normalize: Normalization) -> None:
        super().__init__(*modules)
        self.normalize = normalize

    @scripted_as(normalized_in_turn)
    def forward(self, x: Tensor) -> Tensor:
        # torch.fx traces a stem of floats: the dtype of a proxy is unknown.
        return in_turn(self, x) if isinstance(x, torch.fx.Proxy) else normalized_in_turn(self, x)


def reference_block(
    dim: int, kernel_size: int, act_layer: Callable[[], nn.Module]
) -> nn.Sequential:
    """One block, (N, dim, H, W) -> (N, dim, H, W): the depthwise half, then the pointwise half."""
    return nn.Sequential(
        Residual(
            nn.Sequential(
                nn.Conv2d(dim, dim, kernel_size, groups=dim, padding="same"),
                act_layer(),
                nn.BatchNorm2d(dim),
            )
        ),
        nn.Conv2d(dim, dim, 1),
        act_layer(),
        nn.BatchNorm2d(dim),
    )


class ReferenceConvMixer(nn.Module):
    """The whole network, (N, in_chans, H, W) -> (N, num_classes); see the paper's Figure 3."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        if arch.act is None:
            raise ValueError("the activation of this Arch is not known: set act")
        act_layer = activation_layer(arch.act)
        dim, patch = arch.dim, arch.patch_size
        self.stem = nn.Sequential(
            nn.Conv2d(arch.in_chans, dim, patch, stride=patch), act_layer(), nn.BatchNorm2d(dim)
        )
        self.blocks = nn.Sequential(
            *[reference_block(dim, arch.kernel_size, act_layer) for _ in range(arch.depth)]
        )
        self.head = nn.Linear(dim, arch.num_classes) if arch.num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))
