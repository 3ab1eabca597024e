"""How does one enormous image get its answer? Row by row, exactly, in memory that does not grow.

`stream` reads an image from top to bottom and sends it through a ConvMixer in bands (bands.py has
the arithmetic). The map that comes out is the one that the whole image would give; its mean is a
sum in float64, row after row, where PyTorch's is in float32 in an order of its own: logits may
differ from ``model(image)`` in the last bits.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..arch import IMAGENET_MEAN, IMAGENET_STD
from ..files import replaceable, whole_or_absent
from ..model import GlobalPool
from .ambient import autocast
from .bands import BandFlow, Plan, blocks_of
from .heatmap import Heatmap, check_mean_pooling, class_scores
from .identity import model_digest
from .images import ImageError
from .preprocessing import Preprocessing, own_normalization
from .separable import check_eval, reason_not_separable
from .sources import Source, StackSource, forget, open_source

OUTPUTS = ("logits", "embedding", "features", "heatmap")
#: Cells of a heatmap's longer side, at most.
HEATMAP_CELLS = 128
#: Pixels of a heatmap's picture along a cell's side.
PICTURE_PIXELS = 8
#: Rows of pixels between two checkpoints.
CHECKPOINT_ROWS = 4096


@dataclass
class StreamStats:
    """What a stream did: filled in while it runs.

    Attributes:
        height, width: of the image, in pixels; the height is what was read of it.
        rows: rows of pixels that this run has read.
        seconds: that it took.
        plan: how the map was cut.
        backend: ``cpu`` (the engine takes whole blocks) or ``modules`` (each half by the backend
            that serves it).
        resumed_at: the row of pixels at which it went on, 0 from the beginning.
    """

    height: int = 0
    width: int = 0
    rows: int = 0
    seconds: float = 0.0
    plan: Plan | None = None
    backend: str = ""
    resumed_at: int = 0


class Pixels:
    """Stored pixels -> what the stem takes: scaled, normalised, in the model's dtype.

    Whole numbers are pixels: divided by the largest of their type, less the mean, by the deviation.
    Floating-point values are taken as they are, as ``model(image)`` takes them.
    """

    def __init__(self, preprocessing: Preprocessing, dtype: torch.dtype, device: Any) -> None:
        view = (1, -1, 1, 1)
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device="cpu").view(view)
            for values in (preprocessing.mean, preprocessing.std)
        )
        self._dtype, self._device = dtype, device

    def __call__(self, rows: Tensor) -> Tensor:
        if rows.dtype == torch.bool or rows.is_complex():
            raise ImageError(f"pixels cannot be {rows.dtype}: pass whole numbers or floats")
        if not rows.is_floating_point():
            largest = torch.iinfo(rows.dtype).max
            values = rows.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
            rows = values.div_(largest).sub_(self._mean).div_(self._std)
        return rows.to(device=self._device, dtype=self._dtype)

    def visible(self, rows: Tensor) -> Tensor:
        """The same as bytes for people to look at, of 1 or 3 channels."""
        if rows.is_floating_point():
            shown = rows.float().cpu() * self._std + self._mean
        else:
            shown = rows.float() / torch.iinfo(rows.dtype).max
        if shown.shape[1] not in (1, 3):
            shown = shown.mean(1, keepdim=True)
        return shown.clamp(0, 1).mul(255).round().to(torch.uint8)


class _Pool:
    """Sum and maximum of every channel over all pixels so far."""

    def __init__(self, images: int, dim: int, device: torch.device) -> None:
        self.sum = torch.zeros(images, dim, dtype=torch.float64, device=device)
        self.peak = torch.full_like(self.sum, -torch.inf)
        self.pixels = 0

    def add(self, values: Tensor) -> None:
        # Row by row: the same sums whatever the bands are.
        for row in range(values.shape[2]):
            self.sum += values[:, :, row].sum(-1, dtype=torch.float64)
        self.peak = torch.maximum(self.peak, values.amax((2, 3)).to(torch.float64))
        self.pixels += values.shape[2] * values.shape[3]


class _Reduced:
    """Means of cells of ``cell`` x ``cell`` patches, the last ones of what is left."""

    def __init__(
        self, images: int, dim: int, cell: int, width: int, patch: int, device: Any
    ) -> None:
        self.cell, self._width = cell, width
        #: Every so many pixels of the image, for a picture of it.
        self._every = max(1, cell * patch // PICTURE_PIXELS)
        shape = (images, 0, -(-width * patch // self._every), 3)
        self.picture = torch.empty(shape, dtype=torch.uint8, device="cpu")
        self._shape = (images, dim, -(-width // cell))
        self._device = device
        self.sums = self._zeros(0)
        self._rows = 0

    def _zeros(self, rows: int) -> Tensor:
        return torch.zeros(rows, *self._shape, dtype=torch.float32, device=self._device)

    def _range(self, *bounds: int) -> Tensor:
        return torch.arange(*bounds, dtype=torch.int64, device=self._device)

    def add(self, row: int, column: int, values: Tensor) -> None:
        rows, columns = values.shape[2:]
        down = self._range(row, row + rows) // self.cell
        across = self._range(column, column + columns) // self.cell
        missing = int(down[-1]) + 1 - self.sums.shape[0]
        if missing > 0:
            self.sums = torch.cat((self.sums, self._zeros(missing)))
        summed = self._zeros(rows)
        summed.index_add_(3, across, values.permute(2, 0, 1, 3).float())
        self.sums.index_add_(0, down, summed)
        self._rows = max(self._rows, row + rows)

    def look(self, row: int, rows: Tensor, pixels: Pixels) -> None:
        """Take some of these rows, the first one of which is ``row``, into the picture."""
        some = rows[:, :, -row % self._every :: self._every, :: self._every]
        seen = pixels.visible(some).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
        self.picture = torch.cat((self.picture, seen), 1)

    def means(self) -> Tensor:
        """(N, C, cells down, cells across)"""

        def sizes(count: int) -> Tensor:
            whole = self._range(0, count, self.cell)
            return (count - whole).clamp(max=self.cell).float()

        area = sizes(self._rows)[:, None, None, None] * sizes(self._width)
        return (self.sums / area).permute(1, 2, 0, 3).contiguous()

    def areas(self) -> tuple[int, int]:
        return self._rows, self._width


def default_preprocessing(model: nn.Module) -> Preprocessing:
    """The normalisation of a model's stem, else of its ``pretrained_cfg``, else ImageNet's."""
    cfg: Any = {**(getattr(model, "pretrained_cfg", None) or {}), **own_normalization(model)}
    channels = int(getattr(model, "in_chans", 3))

    def per_channel(name: str, default: tuple[float, ...]) -> tuple[float, ...]:
        values = tuple(cfg.get(name) or default)
        return values if len(values) in (1, channels) else (sum(values) / len(values),)

    mean, std = per_channel("mean", IMAGENET_MEAN), per_channel("std", IMAGENET_STD)
    return Preprocessing(input_size=(channels, 224, 224), mean=mean, std=std)


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
    """What a ConvMixer says of an image of any size, exactly, without tiles and in bounded memory.

    The image passes from top to bottom; every block keeps k - 1 rows of patches, so memory grows
    with the image's width and not with its height, and no patch is computed twice. The map is the
    one of the whole image: zeros are padded at its border only, pixels beyond whole patches are
    dropped. On the CPU engine bits are equal to the whole image's; where the matrix product joins
    neighbouring pixels (Strassen's algorithm, in wide models) this needs whole groups of
    them in every band, which strips and some widths do not have: then the last bits may differ,
    as they do on other backends (`Plan.exact` tells, ``CONVMIXER_FAST_STRASSEN=0`` joins none).

    Args:
        model: a `ConvMixer`, or timm's after `convmixer_fast.optimize`, in eval mode. It is taken
            apart, so hooks, replaced methods and layers whose answer for a pixel depends on the
            whole map (GroupNorm, BatchNorm without running statistics...) are refused; the
            classifier and what stands before it are called, and may be any modules.
        source: a path (.npy, .zarr, TIFF, JPEG, PNG...), array, memory map, tensor, zarr array, an
            iterator of bands of rows, or a list of these: images of one size pass together, the
            sizes one after the other; see `open_source`. Whole numbers are scaled to 0..1 and
            normalised; floating-point values go into the model as they are.
        output: ``"logits"``, ``"embedding"`` (the pooled features), ``"features"`` (the map of the
            last block), or ``"heatmap"``.
        out: for features, a file to write them to as they come, .npy or .zarr; None: memory.
        preprocessing: its mean and std are used; by default those of ``model.pretrained_cfg``.
        layout: how the axes of arrays are ordered: "HW", "HWC", "CHW", "NHWC" or "NCHW". Of a
            TIFF, the values are then those that are stored; else a file's pixels are Pillow's.
        height: in pixels, of an iterator of bands, where it is known.
        max_memory: bytes for the stream's own buffers; bands get smaller, and then strips of
            columns are made, with the kept rows in a file. Sources' own memory is not counted.
        band_rows: rows of a band, in patches, fixed instead of chosen.
        strip_columns: columns of a strip, in patches, fixed instead of chosen.
        scratch: the folder for that file; None: the system's.
        checkpoint: a file that is written, whole or not at all, every ``checkpoint_rows`` rows of
            pixels, from which a run that was cut off goes on if called again in the same way. It is
            removed at the end.
        checkpoint_rows: see there.
        target: the class of a heatmap; None: the likeliest one of each image.
        cell: patches along the side of a heatmap's cell; by default as many as leave at most
            `HEATMAP_CELLS` cells along the longer side (the width, where the height is not known).
        progress: show a bar.
        stats: filled in while the stream runs; with the sums of rows and seconds where a list has
            several sizes.

    Returns:
        Of a list, images are in its order.
        logits: (N, num_classes), or (N, features) without a classifier, on the model's device.
        embedding: (N, features), on the model's device.
        features: (N, dim, height // p, width // p): a tensor, or what ``out`` holds as a memory map
        or zarr array; of a list of several sizes, a list with each one's.
        heatmap: a `Heatmap`, whose mean is the logits; of a list of several sizes, a list likewise.

    Raises:
        ImageError: the source cannot be read, ends early, or is smaller than a patch.
        ValueError: an argument makes no sense, ``max_memory`` is too small, the model is in
            training mode, the checkpoint is of another run, or there is one, or an ``out``, for
            images of several sizes.
        TypeError: bands of the image through the model's parts may not give ``model(image)``; the
            message names the part.
        OSError: a file cannot be written.
    """
    run = _Run(model, output, preprocessing)
    given = list(source) if isinstance(source, (list, tuple)) and source else [source]
    opened: list[Source] = []

    def one_pass(of: Source, stats: StreamStats) -> Any:
        with autocast(run.device):
            return run(
                of,
                out=None if out is None else _features_target(Path(out)),
                max_memory=max_memory,
                band_rows=band_rows,
                strip_columns=strip_columns,
                scratch=None if scratch is None else os.fspath(scratch),
                checkpoint=None if checkpoint is None else replaceable(checkpoint),
                checkpoint_rows=checkpoint_rows,
                target=target,
                cell=cell,
                progress=progress,
                stats=stats,
            )

    stats = stats or StreamStats()
    try:
        for one in given:
            opened.append(open_source(one, run.in_chans, layout, height))
        groups = _by_size(opened)
        if len(groups) == 1:
            return one_pass(StackSource(opened) if len(opened) > 1 else opened[0], stats)
        for name, path in (("out", out), ("checkpoint", checkpoint)):
            if path is not None:
                raise ValueError(
                    f"{name} {path} is for images of one size, and these have {len(groups)}: "
                    "stream them one by one"
                )
        found: dict[int, Any] = {}
        rows, seconds = 0, 0.0
        for members in groups:
            some = [opened[i] for i in members]
            result = one_pass(StackSource(some) if len(some) > 1 else some[0], stats)
            rows, seconds = rows + stats.rows, seconds + stats.seconds
            begin = 0
            for i, of in zip(members, some, strict=True):
                found[i] = _some_of(result, begin, begin + of.images)
                begin += of.images
        stats.rows, stats.seconds = rows, seconds
        answers = [found[i] for i in range(len(opened))]
        return torch.cat(answers) if output in ("logits", "embedding") else answers
    finally:
        for one, of in zip(given, opened, strict=False):
            if of is not one:
                of.close()


def _by_size(sources: Sequence[Source]) -> list[list[int]]:
    """Which of them can pass together: those of one size, if it is known before the end."""
    groups: dict[Any, list[int]] = {}
    for i, source in enumerate(sources):
        known = source.height is not None
        groups.setdefault((source.height, source.width) if known else i, []).append(i)
    return list(groups.values())


def _some_of(result: Any, begin: int, end: int) -> Any:
    """Images [begin, end) of what a pass gave."""
    if not isinstance(result, Heatmap):
        return result[begin:end]
    cut = {f: getattr(result, f)[begin:end] for f in ("scores", "classes", "logits", "pictures")}
    return result._replace(**cut)


def reason_not_streamable(model: nn.Module, output: str = "logits") -> str:
    """Why `stream` cannot give this output of a model in eval mode; ``""`` where it can."""
    try:
        _Run(model, output, None)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def whole_image_bytes(model: nn.Module, height: int, width: int) -> int:
    """What a model that can be streamed holds of one image, at least, when it takes it as a whole.

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


class _Run:
    """One call of `stream`: the model's parts, checked."""

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
        self.model, self.output, self._parts = model, output, parts
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
        """An image of more than one patch each way: a map of 1 x 1 says nothing of its layout."""
        side = 2 * self.patch
        return torch.zeros(1, self.in_chans, side, side, dtype=self.dtype, device=self.device)

    def __call__(
        self,
        source: Source,
        *,
        out: Path | None,
        max_memory: int | None,
        band_rows: int | None,
        strip_columns: int | None,
        scratch: str | None,
        checkpoint: Path | None,
        checkpoint_rows: int,
        target: int | None,
        cell: int | None,
        progress: bool,
        stats: StreamStats,
    ) -> Any:
        for name, value in (
            ("band_rows", band_rows),
            ("strip_columns", strip_columns),
            ("checkpoint_rows", checkpoint_rows),
            ("cell", cell),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if out is not None and self.output != "features":
            raise ValueError(f"out is for output='features', not for {self.output!r}")
        patch, images = self.patch, source.images
        width = source.width // patch
        height = None if source.height is None else source.height // patch
        if width < 1 or height == 0:
            raise ImageError(
                f"{source.name}: {source.height or '?'} x {source.width} px (height x width) are "
                f"less than one patch of {patch} x {patch}"
            )
        if out is not None and height is None:
            raise ValueError(
                f"{source.name} does not tell its height, which the file of features needs: "
                "pass height="
            )
        stem = self._parts.stem
        probe = self.probe()
        blocks = blocks_of(self._parts.blocks, stem[0], stem(probe))
        if height is not None and hasattr(blocks, "map_pixels"):
            blocks.map_pixels = height * width
        bytes_of_pixel = self.in_chans * (4 + 2 * probe.element_size())
        plan = Plan.make(
            blocks,
            images,
            width,
            images * source.width * patch * bytes_of_pixel,
            max_memory=max_memory,
            band_rows=band_rows,
            strip_columns=strip_columns,
        )
        stats.plan, stats.backend, stats.width = plan, blocks.name, source.width
        flow = BandFlow(blocks, images, width, plan, scratch)
        pool = _Pool(images, blocks.dim, self.device)
        sinks: _Features | _Reduced | None = None
        saved = None
        if checkpoint is not None:
            saved = _Checkpoint(
                checkpoint, self._identity(source, plan, cell, out, blocks.name), checkpoint_rows
            )
        resume = saved is not None and saved.exists()
        try:
            if self.output == "features":
                sinks = _Features(out, images, blocks.dim, height, width, self.dtype, resume)
            elif self.output == "heatmap":
                longer = max(width, height or width)
                cell = cell or -(-longer // HEATMAP_CELLS)
                sinks = _Reduced(images, blocks.dim, cell, width, patch, self.device)
            begin = 0
            if saved is not None and resume:
                begin = saved.load(flow, pool, sinks)
                stats.resumed_at = begin * patch
            self._pass(source, flow, pool, sinks, begin, height, saved, progress, stats)
            if isinstance(sinks, _Features):
                result: Any = sinks.finish()
            elif isinstance(sinks, _Reduced):
                result = self._heatmap(sinks, pool, target)
            elif self.output == "embedding":
                result = self._pooled(pool)
            else:
                result = self._logits(pool)
        except BaseException:
            if isinstance(sinks, _Features) and saved is None:
                sinks.discard()
            raise
        finally:
            flow.close()
        if saved is not None:
            saved.remove()
        return result

    def _pass(
        self,
        source: Source,
        flow: BandFlow,
        pool: _Pool,
        sinks: _Features | _Reduced | None,
        begin: int,
        height: int | None,
        saved: _Checkpoint | None,
        progress: bool,
        stats: StreamStats,
    ) -> None:
        """The image from row ``begin`` of patches on."""
        from tqdm import tqdm

        patch, step, stem = self.patch, flow.plan.rows, self._parts.stem
        start, at, last = time.perf_counter(), begin, False
        total = None if height is None else height * patch
        bar = tqdm(
            total=total, initial=at * patch, unit="row", unit_scale=True, disable=not progress
        )
        with bar:
            while not last:
                wanted = step if height is None else flow.next_band(height - at)
                rows = source.read(at * patch, (at + wanted) * patch)
                new = rows.shape[2] // patch
                last = new < step if height is None else at + new >= height
                if height is not None and new < wanted:
                    raise ImageError(
                        f"{source.name} ended after {at * patch + rows.shape[2]} rows of "
                        f"{source.height}"
                    )
                if at + new == 0:
                    raise ImageError(
                        f"{source.name}: {rows.shape[2]} rows of pixels are less than one patch of "
                        f"{patch} x {patch}"
                    )
                rows = rows[:, :, : new * patch, : flow.width * patch]
                if isinstance(sinks, _Reduced):
                    sinks.look(at * patch, rows, self.pixels)
                ready = self.pixels(rows)
                del rows

                def band(first: int, end: int, ready: Tensor = ready) -> Tensor:
                    out: Tensor = stem(ready[:, :, :, first * patch : end * patch])
                    return out

                for piece in flow.feed(band, new, last):
                    values = piece.values.to(self.dtype)
                    if sinks is not None:
                        sinks.add(piece.row, piece.column, values)
                    if not isinstance(sinks, _Features):
                        pool.add(values)
                del ready, band
                at += new
                bar.update(new * patch)
                stats.rows = (at - begin) * patch
                stats.height, stats.seconds = at * patch, time.perf_counter() - start
                if saved is not None and not last:
                    saved.offer(at, patch, flow, pool, sinks)
        stats.height = source.height or stats.height

    def _pooled(self, pool: _Pool) -> Tensor:
        assert self._pool is not None
        mean = (pool.sum / pool.pixels).to(self.dtype)
        pooled: Tensor = self._pool.of_statistics(mean, pool.peak.to(self.dtype))
        pooled = self._parts.head_drop(pooled)
        return pooled

    def _logits(self, pool: _Pool) -> Tensor:
        out: Tensor = self._parts.head(self._pooled(pool))
        return out

    def _heatmap(self, reduced: _Reduced, pool: _Pool, target: int | None) -> Heatmap:
        logits = self._logits(pool)
        means = reduced.means().to(self.dtype)
        scores, classes = class_scores(self._parts.head, means, logits, target)
        rows, columns = reduced.areas()
        size = (rows * self.patch, columns * self.patch)
        return Heatmap(
            scores, classes, logits, reduced.cell * self.patch, size, reduced.picture.numpy()
        )

    def _identity(
        self, source: Source, plan: Plan, cell: int | None, out: Path | None, backend: str
    ) -> dict[str, Any]:
        """What must be the same for a run to go on from another one's checkpoint."""
        return {
            "weights": model_digest(self.model),
            "output": self.output,
            "out": None if out is None else str(out.absolute()),
            "backend": backend,
            "image": [source.images, source.channels, source.height, source.width],
            "mean and std": [list(self.preprocessing.mean), list(self.preprocessing.std)],
            "cell": cell,
            "plan": asdict(plan),
        }


class _Features:
    """The last block's map, as it comes: in memory, a .npy memory map or a zarr array.

    A file has a hidden name beside its own until it is complete.
    """

    def __init__(
        self,
        path: Path | None,
        images: int,
        dim: int,
        height: int | None,
        width: int,
        dtype: torch.dtype,
        resume: bool,
    ) -> None:
        self._dtype = dtype
        self._shape = (images, dim, height or 0, width)
        self._array: Any = None
        self._path, self._height = path, 0
        if path is None:
            if height is not None:
                self._whole: Tensor | None = torch.empty(self._shape, dtype=dtype, device="cpu")
            else:
                self._whole = None
            return
        if dtype == torch.bfloat16:
            # numpy has no bfloat16; every one of its values is a float32 as well.
            self._dtype = torch.float32
        numbers = np.dtype(str(self._dtype).removeprefix("torch."))
        if path.suffix not in (".npy", ".zarr"):
            raise ValueError(f"features are written to .npy or .zarr, not to {path}")
        self._partial = path.with_name(f".{path.stem}.partial{path.suffix}")
        if resume and not self._partial.exists():
            raise ValueError(
                f"{self._partial}, which the checkpoint goes on with, is not there: "
                "delete the checkpoint to start anew"
            )
        if path.suffix == ".npy":
            self._array = _create_npy(self._partial, path, self._shape, numbers, resume)
        else:
            self._array = _create_zarr(self._partial, self._shape, numbers, resume)
        if tuple(self._array.shape) != self._shape:
            raise ValueError(f"{self._partial} has shape {self._array.shape}, not {self._shape}")

    def add(self, row: int, column: int, values: Tensor) -> None:
        rows, columns = values.shape[2:]
        values = values.to("cpu", self._dtype)
        if self._array is not None:
            self._array[:, :, row : row + rows, column : column + columns] = values.numpy()
            if isinstance(self._array, np.memmap):
                forget(self._array)
            return
        if self._whole is None or row + rows > self._whole.shape[2]:
            # The height is not known: room for twice as many rows.
            n, c, _, w = self._shape
            held = self._whole
            shape = (n, c, 2 * (row + rows), w)
            self._whole = torch.empty(shape, dtype=self._dtype, device="cpu")
            if held is not None:
                self._whole[:, :, : held.shape[2]] = held
        self._whole[:, :, row : row + rows, column : column + columns] = values
        self._height = max(self._height, row + rows)

    def flush(self) -> None:
        if isinstance(self._array, np.memmap):
            self._array.flush()

    def finish(self) -> Any:
        if self._array is None:
            assert self._whole is not None
            return self._whole[:, :, : self._height]
        assert self._path is not None
        if self._path.suffix == ".npy":
            self.flush()
            os.replace(self._partial, self._path)
            return np.load(self._path, mmap_mode="r+")
        import zarr

        if self._path.exists():
            shutil.rmtree(self._path)
        os.replace(self._partial, self._path)
        return zarr.open(str(self._path), mode="r+")

    def discard(self) -> None:
        """Delete what is not complete."""
        if self._array is not None:
            if self._partial.is_dir():
                shutil.rmtree(self._partial, ignore_errors=True)
            else:
                self._partial.unlink(missing_ok=True)


def _features_target(path: Path) -> Path:
    """The file or the zarr array that will be written or replaced.

    Raises:
        OSError: something else stands there.
    """
    if path.suffix != ".zarr" or not path.exists():
        return replaceable(path)
    target = Path(os.path.realpath(path))
    if not any((target / name).is_file() for name in (".zarray", "zarr.json")):
        reason = "it is no zarr array, and would be deleted: name another folder"
        raise FileExistsError(errno.EEXIST, reason, str(path))
    return target


def _create_npy(
    partial: Path, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], resume: bool
) -> Any:
    try:
        if resume:
            return np.lib.format.open_memmap(partial, mode="r+")
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            # A full disk is an error here, and the end of the process when a page is written.
            with open(partial, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        return array
    except OSError as error:
        if not resume:
            partial.unlink(missing_ok=True)
        raise type(error)(error.errno, error.strerror, str(path)) from error


def _create_zarr(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], resume: bool) -> Any:
    try:
        import zarr
    except ImportError as error:
        raise ImportError(f"{path} needs zarr, which is not installed: pip install zarr") from error
    if resume and path.exists():
        return zarr.open(str(path), mode="r+")
    c, w = shape[1], shape[3]
    # A few rows of a megabyte or so: bands are written as they come.
    rows = max(1, (1 << 20) // max(1, c * w * dtype.itemsize))
    chunks = (1, c, min(rows, max(1, shape[2])), w)
    return zarr.open(str(path), mode="w", shape=shape, chunks=chunks, dtype=dtype)


class _Checkpoint:
    """All that a stream needs to go on, in one file, whole or not there.

    A zip file of a JSON header and .npy members: kept rows, sums, and a heatmap's cells.
    """

    def __init__(self, path: Path, identity: dict[str, Any], rows: int) -> None:
        self.path, self._identity, self._rows = path, identity, rows
        self._done = 0

    def exists(self) -> bool:
        return self.path.exists()

    def remove(self) -> None:
        with suppress(FileNotFoundError):
            self.path.unlink()

    def offer(
        self, at: int, patch: int, flow: BandFlow, pool: _Pool, sinks: _Features | _Reduced | None
    ) -> None:
        """Write one if it is time: ``at`` rows of patches have passed."""
        if (at - self._done) * patch < self._rows:
            return
        if isinstance(sinks, _Features):
            sinks.flush()
        with whole_or_absent(self.path, "wb") as target, zipfile.ZipFile(target, "w") as file:
            head = {
                "row": at,
                "flow": flow.state(),
                "pixels": pool.pixels,
                **self._members(sinks),
            }
            file.writestr("head.json", json.dumps({"run": self._identity, **head}))
            _write(file, "sum", pool.sum)
            _write(file, "peak", pool.peak)
            if isinstance(sinks, _Reduced):
                _write(file, "cells", sinks.sums)
                _write(file, "picture", sinks.picture)
            for key, shape in flow.pieces():
                _write(file, f"{key[0]}-{key[1]}", flow.kept(key, shape))
        self._done = at

    @staticmethod
    def _members(sinks: _Features | _Reduced | None) -> dict[str, Any]:
        if isinstance(sinks, _Reduced):
            return {"heatmap rows": sinks._rows}
        if isinstance(sinks, _Features) and sinks._array is None:
            raise ValueError(
                "features in memory cannot be gone on with: pass out=, or no checkpoint"
            )
        return {}

    def load(self, flow: BandFlow, pool: _Pool, sinks: _Features | _Reduced | None) -> int:
        """Put everything back; returns the row of patches at which to go on."""
        try:
            with zipfile.ZipFile(self.path) as file:
                head = json.loads(file.read("head.json"))
                wanted = json.loads(json.dumps(self._identity))
                for key, value in wanted.items():
                    if head["run"].get(key) != value:
                        raise ValueError(
                            f"{self.path} is the checkpoint of another run: its {key} was "
                            f"{head['run'].get(key)}, now {value}; delete it to start anew"
                        )
                flow.restore(head["flow"])
                pool.sum = _read(file, "sum", pool.sum)
                pool.peak = _read(file, "peak", pool.peak)
                pool.pixels = head["pixels"]
                if isinstance(sinks, _Reduced):
                    sinks.sums = _read(file, "cells", sinks.sums)
                    sinks.picture = _read(file, "picture", sinks.picture)
                    sinks._rows = head["heatmap rows"]
                like = torch.empty(0, dtype=flow.blocks.dtype, device="cpu")
                for piece, _ in flow.pieces():
                    flow.put_back(piece, _read(file, f"{piece[0]}-{piece[1]}", like))
        except (zipfile.BadZipFile, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{self.path} is no checkpoint of a stream: delete it to start anew"
            ) from error
        self._done = int(head["row"])
        return self._done


def _write(file: zipfile.ZipFile, name: str, values: Tensor) -> None:
    dense = values.detach().cpu().contiguous()
    # numpy has no bfloat16: its bits are kept.
    array = dense.view(torch.int16).numpy() if dense.dtype == torch.bfloat16 else dense.numpy()
    with file.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def _read(file: zipfile.ZipFile, name: str, like: Tensor) -> Tensor:
    with file.open(f"{name}.npy") as member:
        array = np.lib.format.read_array(member, allow_pickle=False)
    values = torch.from_numpy(array)
    return (values.view(like.dtype) if like.dtype == torch.bfloat16 else values).to(like.device)
