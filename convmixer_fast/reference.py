"""What exactly must be computed? ConvMixer in plain PyTorch, the oracle of every test.

Nothing here is fused, packed or cached. Parameter names are timm's.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .arch import Arch, activation_layer


class Residual(nn.Module):
    """``fn(x) + x``."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


def reference_block(
    dim: int, kernel_size: int, act_layer: Callable[[], nn.Module]
) -> nn.Sequential:
    """One block, (N, dim, H, W) -> (N, dim, H, W): spatial mixing, then channel mixing."""
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
