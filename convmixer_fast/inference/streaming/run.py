"""`stream`: opens images, groups those of one size, and gives each group a pass.

The last block's map is that of the whole image. Its mean is a sum in float64, row by row, where
PyTorch sums in float32 in another order: logits may differ from ``model(image)`` in the last bits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...files import replaceable
from ..ambient import autocast
from ..heatmap import Heatmap
from ..preprocessing import Preprocessing
from ..sources import Source, StackSource, open_source
from .model import StreamedModel
from .one_pass import Pass, StreamOptions, StreamStats
from .outputs import features_target

#: Rows of pixels between two checkpoints.
CHECKPOINT_ROWS = 4096


@torch.inference_mode()
def stream(
    model: nn.Module,
    source: Any,
    output: str = "logits",
    *,
    out: str | os.PathLike[str] | None = None,
    preprocessing: Preprocessing | None = None,
    layout: str | None = None,
    height: int | None = None,
    max_memory: int | None = None,
    band_rows: int | None = None,
    strip_columns: int | None = None,
    scratch: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_rows: int = CHECKPOINT_ROWS,
    target: int | None = None,
    cell: int | None = None,
    progress: bool = False,
    stats: StreamStats | None = None,
) -> Any:
    """The output of a ConvMixer for an image of any size, without tiles and in bounded memory.

    The image passes from top to bottom. Every block keeps k - 1 rows of patches: memory grows with
    the image's width and not with its height, and no patch is computed twice. The map is that of
    the whole image: zeros are padded at its border only, pixels beyond whole patches are dropped.
    On the CPU engine its bits are those of the whole image too, if every band holds whole groups of
    the pixels that Strassen's algorithm joins in wide models. Strips and some widths do not; the
    last bits may then differ, as on other backends. `Plan.exact` has the answer, and
    ``CONVMIXER_FAST_STRASSEN=0`` joins no pixels.

    Args:
        model: a `ConvMixer`, or timm's after `convmixer_fast.optimize`, in eval mode. It is run
            part by part, so hooks, replaced methods and layers whose output for a pixel depends on
            the whole map (GroupNorm, BatchNorm without running statistics...) are refused; the
            classifier and the modules before it are called, and may be of any class.
        source: a path (.npy, .zarr, TIFF, JPEG, PNG...), array, memory map, tensor, zarr array, an
            iterator of bands of rows, or a list of these: images of one size pass together, the
            sizes one after the other; see `open_source`. Integers are scaled to 0..1 and
            normalised; floating-point values go into the model unchanged.
        output: ``"logits"``, ``"embedding"`` (the pooled features), ``"features"`` (the map of the
            last block), or ``"heatmap"``.
        out: for features, a file to write them to, .npy or .zarr; None: memory.
        preprocessing: its mean and std are used; by default those of ``model.pretrained_cfg``.
        layout: order of the axes of arrays: "HW", "HWC", "CHW", "NHWC" or "NCHW". With a layout,
            the values of a TIFF are those stored; otherwise a file's pixels are Pillow's.
        height: in pixels, of an iterator of bands, if it is known.
        max_memory: bytes for the stream's own buffers: bands get smaller, then the map is cut into
            strips of columns with the kept rows in a file. Sources' own memory is not counted.
        band_rows: rows of a band, in patches, fixed instead of chosen.
        strip_columns: columns of a strip, in patches, fixed instead of chosen.
        scratch: the folder for the file of kept rows; None: the system's.
        checkpoint: a file, written atomically, from which an interrupted run continues when called
            again with the same arguments; removed at the end.
        checkpoint_rows: rows of pixels between two checkpoints.
        target: the class of a heatmap; None: the most likely one of each image.
        cell: patches along the side of a heatmap's cell; by default as many as give at most
            `HEATMAP_CELLS` cells along the longer side (the width, if the height is not known).
        progress: show a progress bar.
        stats: filled in while the stream runs; for a list of several sizes, rows and seconds are
            sums.

    Returns:
        For a list, images are in its order.
        logits: (N, num_classes), or (N, features) without a classifier, on the model's device.
        embedding: (N, features), on the model's device.
        features: (N, dim, height // p, width // p): a tensor, or ``out`` as a memory map or zarr
        array; for a list of several sizes, a list with one an image.
        heatmap: a `Heatmap`, whose mean is the logits; for several sizes, a list likewise.

    Raises:
        ImageError: the source cannot be read, ends early, or is smaller than a patch.
        ValueError: an argument is out of range, ``max_memory`` is too small, the model is in
            training mode, the checkpoint is of another run, or ``checkpoint`` or ``out`` is given
            with images of several sizes.
        TypeError: the model's parts, run on bands, may not give ``model(image)``; the message
            names the part.
        OSError: a file cannot be written.
    """
    streamed = StreamedModel(model, output, preprocessing)
    given = list(source) if isinstance(source, (list, tuple)) and source else [source]
    opened: list[Source] = []
    stats = stats or StreamStats()
    try:
        for one in given:
            opened.append(open_source(one, streamed.in_chans, layout, height))
        groups = _by_size(opened)
        for name, path in (("out", out), ("checkpoint", checkpoint)):
            if path is not None and len(groups) > 1:
                raise ValueError(
                    f"{name} {path} is for images of one size, and these have {len(groups)}: "
                    "stream them one by one"
                )
        options = StreamOptions(
            out=None if out is None else features_target(Path(out)),
            max_memory=max_memory,
            band_rows=band_rows,
            strip_columns=strip_columns,
            scratch=None if scratch is None else os.fspath(scratch),
            checkpoint=None if checkpoint is None else replaceable(checkpoint),
            checkpoint_rows=checkpoint_rows,
            target=target,
            cell=cell,
            progress=progress,
        )
        with autocast(streamed.device):
            return _stream_groups(streamed, opened, groups, options, stats)
    finally:
        for one, of in zip(given, opened, strict=False):
            if of is not one:
                of.close()


def _stream_groups(
    model: StreamedModel,
    sources: Sequence[Source],
    groups: Sequence[Sequence[int]],
    options: StreamOptions,
    stats: StreamStats,
) -> Any:
    """A pass for each group of sources of one size; results in the order of the sources."""
    found: dict[int, Any] = {}
    rows, seconds = 0, 0.0
    for members in groups:
        some = [sources[i] for i in members]
        source = StackSource(some) if len(some) > 1 else some[0]
        result = Pass(model, source, options, stats)()
        if len(groups) == 1:
            return result
        rows, seconds = rows + stats.rows, seconds + stats.seconds
        begin = 0
        for i, one in zip(members, some, strict=True):
            found[i] = _some_of(result, begin, begin + one.images)
            begin += one.images
    stats.rows, stats.seconds = rows, seconds
    answers = [found[i] for i in range(len(sources))]
    return torch.cat(answers) if model.output in ("logits", "embedding") else answers


def _by_size(sources: Sequence[Source]) -> list[list[int]]:
    """Indices of the sources that pass together: those of one size that is known in advance."""
    groups: dict[Any, list[int]] = {}
    for i, source in enumerate(sources):
        known = source.height is not None
        groups.setdefault((source.height, source.width) if known else i, []).append(i)
    return list(groups.values())


def _some_of(result: Any, begin: int, end: int) -> Any:
    """Images [begin, end) of a pass's result."""
    if not isinstance(result, Heatmap):
        return result[begin:end]
    cut = {f: getattr(result, f)[begin:end] for f in ("scores", "classes", "logits", "pictures")}
    return result._replace(**cut)
