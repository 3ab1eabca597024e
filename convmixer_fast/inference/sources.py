"""Where do the rows of an image come from that is too large for memory? From its file, in order.

A source hands out rows of pixels (N, C, rows, width) from top to bottom, and never holds more than
those and one row of its file's tiles.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .images import ImageError, read_image

#: How the axes of an array are ordered.
LAYOUTS = ("HW", "HWC", "CHW", "NHWC", "NCHW")
_TIFF = (".tif", ".tiff", ".btf", ".svs", ".ndpi")


class Source:
    """Rows of one image, or of several of the same size, from top to bottom.

    Attributes:
        images, channels, width: N, C and the width in pixels.
        height: in pixels, None where only the end of the rows tells.
        name: for messages.
    """

    images = 1
    channels: int
    width: int
    height: int | None
    name: str

    def read(self, begin: int, end: int) -> Tensor:
        """Rows [begin, end), (N, C, rows, width), as they are stored; fewer at the image's end.

        ``begin`` is never less than the last ``end``.

        Raises:
            ImageError: the rows cannot be read.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the file."""


def _layout(shape: Sequence[int], in_chans: int, tensor: bool) -> str:
    """The order of the axes of an array of that shape, by the place of its channels."""
    if len(shape) == 2 and in_chans == 1:
        return "HW"
    if len(shape) in (3, 4):
        batch = "N" * (len(shape) - 3)
        first, last = shape[-3] == in_chans, shape[-1] == in_chans
        if first and (tensor or not last):
            return batch + "CHW"
        if last:
            return batch + "HWC"
    raise ValueError(
        f"an image of {in_chans} channels cannot have shape {tuple(shape)}: "
        f"say how its axes are ordered, layout= one of {', '.join(LAYOUTS)}"
    )


class ArraySource(Source):
    """Anything with a shape, a dtype and slices: arrays, memory maps, tensors, zarr arrays.

    Args:
        array: 2 to 4 dimensions.
        in_chans: channels that the model takes.
        layout: one of `LAYOUTS`; by default the axis that is ``in_chans`` long has the channels
            (where both could, the last one of an array and the first one of a tensor).
        granule: rows that lie together in the file, which are read once and kept.
        name: for messages.
        file: what is to be closed at the end.

    Raises:
        ValueError: the shape does not fit.
    """

    def __init__(
        self,
        array: Any,
        in_chans: int,
        layout: str | None = None,
        granule: int = 1,
        name: str = "the array",
        file: Any = None,
    ) -> None:
        shape = tuple(array.shape)
        layout = layout or _layout(shape, in_chans, isinstance(array, Tensor))
        if layout not in LAYOUTS or len(layout) != len(shape):
            raise ValueError(f"layout {layout!r} does not fit {name} of shape {shape}")
        sizes = dict(zip(layout, shape, strict=True))
        self._array, self._layout, self._granule, self.name = array, layout, granule, name
        self.images, self.channels = sizes.get("N", 1), sizes.get("C", 1)
        self.height, self.width = sizes["H"], sizes["W"]
        self._held = (0, torch.empty(0, dtype=torch.uint8, device="cpu"))
        self._file = file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, begin: int, end: int) -> Tensor:
        assert self.height is not None
        end = min(end, self.height)
        if self._granule == 1 or begin >= end:
            return self._slice(begin, end)
        # Whole granules, so that no tile is decoded twice.
        parts, at = [], begin
        while at < end:
            first, held = self._held
            if not (first <= at < first + held.shape[2] if held.dim() == 4 else False):
                first = at // self._granule * self._granule
                held = self._slice(first, min(first + self._granule, self.height))
                self._held = (first, held)
            stop = min(end, first + held.shape[2])
            parts.append(held[:, :, at - first : stop - first])
            at = stop
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _slice(self, begin: int, end: int) -> Tensor:
        at = tuple(slice(begin, end) if axis == "H" else slice(None) for axis in self._layout)
        try:
            rows = self._array[at]
        except Exception as error:
            # Decoders of damaged files raise whatever their parsing runs into.
            raise ImageError(f"{self.name}: rows {begin} to {end}: {_reason(error)}") from error
        found = _as_rows(rows, self._layout)
        if isinstance(self._array, np.memmap):
            found = found.clone()
            forget(self._array)
        return found


def forget(array: np.memmap[Any, Any]) -> None:
    """Let the pages of a memory map go that were read or written: they stay in its file.

    A mapped page counts as the process's memory for as long as the system has room.
    """
    pages = getattr(array, "_mmap", None)
    # A copy-on-write map keeps in its pages what no file has.
    if pages is not None and getattr(array, "mode", "c") != "c" and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


def _as_rows(rows: Any, layout: str) -> Tensor:
    """(N, C, rows, width) of rows in another order of axes, a view where it can be."""
    if not isinstance(rows, Tensor):
        rows = np.asarray(rows)
        if rows.dtype.byteorder not in ("=", "|"):
            rows = rows.astype(rows.dtype.newbyteorder("="))
        if not rows.flags.writeable:
            rows = rows.copy()  # torch.from_numpy wants to be able to write
        rows = torch.from_numpy(rows)
    for axis, place in (("N", 0), ("C", 1)):
        if axis not in layout:
            rows = rows.unsqueeze(0 if axis == "N" else place)
            layout = "N" + layout if axis == "N" else layout[0] + "C" + layout[1:]
    return rows.permute([layout.index(axis) for axis in "NCHW"])


class BandSource(Source):
    """An iterator of bands of rows: (rows, W, C) arrays or (C, rows, W) tensors.

    Raises:
        ValueError: the iterator is empty, or its first band does not fit.
    """

    name = "the iterator of bands"

    def __init__(
        self,
        bands: Iterable[Any],
        in_chans: int,
        layout: str | None = None,
        height: int | None = None,
    ) -> None:
        self._bands = iter(bands)
        self.height = height
        first = next(self._bands, None)
        if first is None:
            raise ValueError(f"{self.name} is empty: there is no image")
        shape = np.shape(first)
        self._layout = layout or _layout(shape, in_chans, isinstance(first, Tensor))
        self._waiting: list[Tensor] = [_as_rows(first, self._layout)]
        self._at, self._count, self._ended = 0, 1, False
        self.images, self.channels, _, self.width = self._waiting[0].shape

    def read(self, begin: int, end: int) -> Tensor:
        if self.height is not None:
            end = min(end, self.height)
        found: list[Tensor] = []
        while self._at < end:
            if not self._waiting and not self._pull():
                break
            band = self._waiting.pop()
            stop = min(self._at + band.shape[2], end)
            if stop > begin:
                found.append(band[:, :, max(begin - self._at, 0) : stop - self._at])
            if stop < self._at + band.shape[2]:
                self._waiting.append(band[:, :, stop - self._at :])
            self._at = stop
        if self.height is not None and self._at < end:
            raise ImageError(
                f"{self.name} ended after {self._at} rows of {self.height}: it is too short"
            )
        if not found:
            return torch.empty(
                *(self.images, self.channels, 0, self.width), dtype=torch.uint8, device="cpu"
            )
        return found[0] if len(found) == 1 else torch.cat(found, 2)

    def _pull(self) -> bool:
        if self._ended:
            return False
        band = next(self._bands, None)
        if band is None:
            self._ended = True
            return False
        if len(np.shape(band)) != len(self._layout):
            raise ImageError(
                f"{self.name}: band {self._count} has shape {np.shape(band)}, "
                f"but the first one was {self._layout}"
            )
        rows = _as_rows(band, self._layout)
        expected = (self.images, self.channels, self.width)
        got = (rows.shape[0], rows.shape[1], rows.shape[3])
        if got != expected:
            raise ImageError(
                f"{self.name}: band {self._count} has (images, channels, width) {got}, "
                f"the first one had {expected}"
            )
        self._count += 1
        self._waiting.append(rows)
        return True


class VipsSource(Source):
    """A JPEG, PNG, TIFF or the like that libvips decodes from top to bottom, holding a few rows."""

    def __init__(self, path: Path, in_chans: int) -> None:
        pyvips = _pyvips(path)
        self.name = str(path)
        try:
            image = pyvips.Image.new_from_file(str(path), access="sequential", fail_on="truncated")
            image = image.colourspace("srgb")
            if image.hasalpha():
                image = image[0 : image.bands - 1]
            if image.format != "uchar":
                image = image.cast("uchar")
            # A region is computed where it is asked for, in order. An image is computed by threads
            # that read ahead, and each crop of it would begin again at the top.
            self._region = pyvips.Region.new(image)
        except Exception as error:
            raise ImageError(f"{path}: {_reason(error)}") from error
        self._bands = image.bands
        self.channels, self.width, self.height = in_chans, image.width, image.height

    def read(self, begin: int, end: int) -> Tensor:
        assert self.height is not None
        end = min(end, self.height)
        pieces = []
        try:
            # A few rows at a time: libvips keeps as many again.
            for row in range(begin, end, _VIPS_ROWS):
                rows = min(_VIPS_ROWS, end - row)
                pieces.append(bytes(self._region.fetch(0, row, self.width, rows)))
        except Exception as error:
            raise ImageError(f"{self.name}: rows {begin} to {end}: {_reason(error)}") from error
        pixels = np.frombuffer(b"".join(pieces), np.uint8)
        pixels = pixels.reshape(end - begin, self.width, self._bands)
        if self.channels == 1:
            return _as_rows(_grey(pixels), "HW")
        return _as_rows(pixels, "HWC")


#: Rows that are asked of libvips at once.
_VIPS_ROWS = 16


def _grey(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Red, green and blue to mode "L", by the weights and the rounding of Pillow (ITU-R 601-2)."""
    red, green, blue = (pixels[:, :, i].astype(np.uint32) for i in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)


class StackSource(Source):
    """Several sources of the same size as one batch."""

    def __init__(self, sources: Sequence[Source]) -> None:
        first = sources[0]
        for source in sources:
            if (source.height, source.width) != (first.height, first.width):
                raise ValueError(
                    f"images that pass together must have one size: {first.name} has "
                    f"{first.height} x {first.width} px, {source.name} "
                    f"{source.height} x {source.width} px; stream them one by one"
                )
        self._sources = sources
        self.images = sum(source.images for source in sources)
        self.channels, self.width, self.height = first.channels, first.width, first.height
        self.name = f"{first.name} and {len(sources) - 1} more"

    def read(self, begin: int, end: int) -> Tensor:
        return torch.cat([source.read(begin, end) for source in self._sources])

    def close(self) -> None:
        for source in self._sources:
            source.close()


def _pyvips(path: Path) -> Any:
    try:
        import pyvips
    except (ImportError, OSError) as error:
        raise ImageError(
            f"{path} has to be decoded row by row, for which libvips is needed "
            f"({_reason(error)}): pip install 'pyvips[binary]'"
        ) from error
    return pyvips


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _open_tiff(path: Path, in_chans: int, layout: str | None) -> Source | None:
    """A TIFF by tifffile: memory-mapped where its pixels lie plain, else tile by tile."""
    try:
        import tifffile
    except ImportError:
        return None
    try:
        with tifffile.TiffFile(path) as tiff:
            series = tiff.series[0].levels[0]
            page = series.pages[0]
            plain = series.dataoffset is not None
            granule = page.tilelength if page.is_tiled else page.rowsperstrip
        if plain:
            array: Any = tifffile.memmap(path, mode="r", series=0)
            return ArraySource(array, in_chans, layout, name=str(path))
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"{path}: {_reason(error)}") from error
    try:
        import zarr
    except ImportError as error:
        raise ImageError(
            f"{path} is compressed or tiled, and is read piece by piece with zarr, "
            "which is not installed: pip install zarr"
        ) from error
    try:
        store = tifffile.imread(path, series=0, level=0, aszarr=True)
        array = zarr.open(store, mode="r")
    except Exception as error:
        raise ImageError(f"{path}: {_reason(error)}") from error
    return ArraySource(array, in_chans, layout, granule, str(path), file=store)


def _open_zarr(path: Path, in_chans: int, layout: str | None) -> Source:
    try:
        import zarr
    except ImportError as error:
        raise ImageError(
            f"{path} is a zarr array, and zarr is not installed: pip install zarr"
        ) from error
    try:
        array = zarr.open(str(path), mode="r")
        if not hasattr(array, "shape"):
            raise ValueError("a group of arrays, not an array: name one of them")
    except Exception as error:
        raise ImageError(f"{path}: {_reason(error)}") from error
    return _of_chunked(array, in_chans, layout, str(path))


def _of_chunked(array: Any, in_chans: int, layout: str | None, name: str) -> Source:
    order = layout or _layout(array.shape, in_chans, False)
    # Shards are what is read as a whole, where there are any.
    chunks = getattr(array, "shards", None) or array.chunks
    return ArraySource(array, in_chans, order, granule=chunks[order.index("H")], name=name)


def _open_path(path: Path, in_chans: int, layout: str | None) -> Source:
    if not path.exists():
        raise ImageError(f"{path}: no such file or folder")
    suffix = path.suffix.lower()
    if suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ImageError(f"{path}: {_reason(error)}") from error
        return ArraySource(array, in_chans, layout, name=str(path))
    if suffix == ".zarr" or path.is_dir():
        return _open_zarr(path, in_chans, layout)
    if suffix in _TIFF:
        source = _open_tiff(path, in_chans, layout)
        if source is not None:
            return source
    try:
        return VipsSource(path, in_chans)
    except ImageError as error:
        # Without libvips, or in a format that only Pillow knows: by Pillow as a whole, if it is
        # small enough for that.
        why = error
    try:
        whole = np.asarray(read_image(path, in_chans))
    except ImageError as error:
        bombs = (Image.DecompressionBombWarning, Image.DecompressionBombError, MemoryError)
        raise why if isinstance(error.__cause__, bombs) else error from None
    return ArraySource(whole, in_chans, "HW" if in_chans == 1 else "HWC", name=str(path))


def open_source(
    source: Any, in_chans: int, layout: str | None = None, height: int | None = None
) -> Source:
    """A `Source` of whatever holds an image.

    Args:
        source: a `Source`; a path (.npy, .zarr, TIFF by tifffile, anything else by libvips, or by
            Pillow where it fits in memory); an array, memory map, tensor or zarr array; an
            iterator of bands; or a list of these, images of one size that pass together.
        in_chans: channels that the model takes.
        layout: how the axes of arrays are ordered, one of `LAYOUTS`.
        height: in pixels, of an iterator of bands, where it is known.

    Raises:
        ImageError: the file cannot be read.
        ValueError: a shape does not fit.
        TypeError: nothing of these.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: one of {', '.join(LAYOUTS)}")
    if isinstance(source, (list, tuple)):
        if not source:
            raise ValueError("the list of images is empty")
        found: Source = StackSource([open_source(s, in_chans, layout, height) for s in source])
    elif isinstance(source, Source):
        found = source
    elif isinstance(source, (str, os.PathLike)):
        found = _open_path(Path(source), in_chans, layout)
    elif isinstance(source, Image.Image):
        pixels = np.asarray(source.convert("L" if in_chans == 1 else "RGB"))
        found = ArraySource(pixels, in_chans, name="the PIL image")
    elif hasattr(source, "chunks") and hasattr(source, "shape"):
        found = _of_chunked(source, in_chans, layout, "the zarr array")
    elif hasattr(source, "shape") and hasattr(source, "dtype"):
        found = ArraySource(source, in_chans, layout)
    elif isinstance(source, (Iterator, Iterable)):
        found = BandSource(source, in_chans, layout, height)
    else:
        raise TypeError(
            f"cannot take an image from a {type(source).__name__}: "
            "pass a path, an array, a tensor, or an iterator of bands of rows"
        )
    if found.channels != in_chans:
        raise ValueError(f"{found.name} has {found.channels} channels, the model takes {in_chans}")
    return found
