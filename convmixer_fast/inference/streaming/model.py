"""A model as a stream runs it: stem and blocks on bands, then pool and classifier on sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...modules.model import GlobalPool
from ..heatmap import Heatmap, check_mean_pooling, class_scores
from ..preprocessing import Preprocessing
from ..separable import check_eval, reason_not_separable
from .outputs import CellMeans, PooledStatistics
from .pixels import Pixels, default_preprocessing

OUTPUTS = ("logits", "embedding", "features", "heatmap")


class StreamedModel:
    """The parts of a model that a stream runs, checked.

    Raises:
        ValueError, TypeError: see `stream`.
    """

    def __init__(self, model: nn.Module, output: str, preprocessing: Preprocessing | None) -> None:
        if output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
        check_eval(model)
        parts: Any = model
        if output == "heatmap":
            check_mean_pooling(model)
        pooled = () if output == "features" else ("global_pool",)
        reason = reason_not_separable(model, "stem", "blocks", *pooled)
        if reason:
            raise TypeError(
                f"{reason}: stream takes a convmixer_fast.ConvMixer without hooks or replaced "
                "parts; ConvMixer.from_checkpoint reads any published format"
            )
        self.model, self.output, self.parts = model, output, parts
        conv = parts.stem[0]
        self.patch, self.in_chans = int(conv.kernel_size[0]), int(conv.in_channels)
        self.dtype, self.device = conv.weight.dtype, conv.weight.device
        self._pool = GlobalPool(parts.global_pool.pool_type) if pooled else None
        if self._pool is not None and self._pool.is_identity():
            raise ValueError(
                f"the model has no pooling, so there are no {output}: use output='features'"
            )
        self.preprocessing = preprocessing or default_preprocessing(model)
        self.pixels = Pixels(self.preprocessing, self.dtype, self.device)

    def probe(self) -> Tensor:
        """An image of 2 x 2 patches: the memory layout of a map of 1 x 1 would be ambiguous."""
        side = 2 * self.patch
        return torch.zeros(1, self.in_chans, side, side, dtype=self.dtype, device=self.device)

    def pooled(self, pool: PooledStatistics) -> Tensor:
        assert self._pool is not None
        mean = (pool.sum / pool.pixels).to(self.dtype)
        pooled: Tensor = self._pool.of_statistics(mean, pool.peak.to(self.dtype))
        pooled = self.parts.head_drop(pooled)
        return pooled

    def logits(self, pool: PooledStatistics) -> Tensor:
        out: Tensor = self.parts.head(self.pooled(pool))
        return out

    def heatmap(self, cells: CellMeans, pool: PooledStatistics, target: int | None) -> Heatmap:
        logits = self.logits(pool)
        means = cells.means().to(self.dtype)
        scores, classes = class_scores(self.parts.head, means, logits, target)
        rows, columns = cells.size()
        size = (rows * self.patch, columns * self.patch)
        cell = cells.cell * self.patch
        return Heatmap(scores, classes, logits, cell, size, cells.picture.numpy())


def reason_not_streamable(model: nn.Module, output: str = "logits") -> str:
    """Why `stream` cannot give this output of a model in eval mode; ``""`` if it can."""
    try:
        StreamedModel(model, output, None)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def whole_image_bytes(model: nn.Module, height: int, width: int) -> int:
    """Bytes that a streamable model needs at least for one image taken as a whole.

    The image as numbers, and three maps: a block's input, its output, and one between its halves.
    0 for a model without a stem.
    """
    stem = getattr(model, "stem", None)
    conv = stem[0] if isinstance(stem, nn.Sequential) and len(stem) else None
    if not isinstance(conv, nn.Conv2d):
        return 0
    patch = int(conv.kernel_size[0])
    values = conv.in_channels * height * width
    values += 3 * conv.out_channels * (height // patch) * (width // patch)
    return int(values * conv.weight.element_size())
