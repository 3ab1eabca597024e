"""Drop-in replacement for the `ConvMixer` of the original authors' CIFAR-10 repository.

It builds the Sequential of `compat.locuslab` with that repository's defaults. As a module of its
own it replaces the original by one import line, also for callers that rely on the defaults.
"""

from __future__ import annotations

from torch import nn

from . import locuslab


def ConvMixer(
    dim: int, depth: int, kernel_size: int = 5, patch_size: int = 2, n_classes: int = 10
) -> nn.Sequential:
    """`compat.locuslab.ConvMixer` with other defaults: (N, 3, 32, 32) -> (N, 10).

    Source: https://github.com/locuslab/convmixer-cifar10.
    """
    return locuslab.ConvMixer(dim, depth, kernel_size, patch_size, n_classes)


__all__ = ["ConvMixer"]
