"""Which model replaces the `ConvMixer` of the original authors' CIFAR-10 repository?

The same Sequential as `compat.locuslab` builds, with that repository's defaults: a module of its
own, so that the swap stays one import line where the defaults are relied on.
"""

from __future__ import annotations

from torch import nn

from . import locuslab


def ConvMixer(
    dim: int, depth: int, kernel_size: int = 5, patch_size: int = 2, n_classes: int = 10
) -> nn.Sequential:
    """(N, 3, 32, 32) -> (N, 10) by default; otherwise as `compat.locuslab.ConvMixer`.

    Source: https://github.com/locuslab/convmixer-cifar10.
    """
    return locuslab.ConvMixer(dim, depth, kernel_size, patch_size, n_classes)


__all__ = ["ConvMixer"]
