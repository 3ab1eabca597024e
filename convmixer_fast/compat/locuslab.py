"""Drop-in replacement for the original repository's `ConvMixer`, with its keys."""

from __future__ import annotations

from torch import nn

from ..modules.model import ConvMixer as _ConvMixer


def ConvMixer(
    dim: int, depth: int, kernel_size: int = 9, patch_size: int = 7, n_classes: int = 1000
) -> nn.Sequential:
    """The original's flat Sequential with fused blocks: (N, 3, H, W) -> (N, n_classes).

    Keys are the original's: the stem under ``0.`` and ``2.``, block i under ``{3 + i}.``, the
    classifier under ``{depth + 5}.``. The same seed gives the original's initial weights.

    Args:
        dim: channels.
        depth: blocks.
        kernel_size: k of the depthwise convolutions, odd or even.
        patch_size: side of a patch, in pixels.
        n_classes: outputs of the classifier.

    Raises:
        ValueError: an argument is out of range.

    Source: https://github.com/locuslab/convmixer, Trockman and Kolter 2022.
    """
    if n_classes < 1:
        raise ValueError(f"n_classes must be at least 1, got {n_classes}")
    model = _ConvMixer(dim, depth, kernel_size, patch_size, num_classes=n_classes)
    return nn.Sequential(
        *model.stem, *model.blocks, nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), model.head
    )


__all__ = ["ConvMixer"]
