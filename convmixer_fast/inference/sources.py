"""Sources of rows for images too large for memory: files and arrays, read from top to bottom.

A source returns rows of pixels (N, C, rows, width) in order, and never holds more than those and
one row of its file's tiles.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .images import MODES, ImageError, PillowPixels, read_image
from .remote import check_regular

#: Orders of an array's axes.
LAYOUTS = ("HW", "HWC", "CHW", "NHWC", "NCHW")
_TIFF = (".tif", ".tiff", ".btf", ".svs", ".ndpi")


class Source:
    """Rows of one image, or of several of the same size, from top to bottom.

    Attributes:
        images, channels, width: N, C and the width in pixels.
        height: in pixels; None if it is known only at the end of the rows.
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
        """Close the file."""


def layout_of(shape: Sequence[int], channels: Container[int], tensor: bool) -> str | None:
    """The order of the axes of an array of that shape, by the place of its channels.

    Args:
        channels: the numbers of channels to expect.
        tensor: if both the first and the last axis could be the channels', take the first, as for
            tensors, instead of the last, as for arrays.

    Returns:
        One of `LAYOUTS`; None if no axis can be that of the channels.
    """
    if len(shape) == 2 and 1 in channels:
        return "HW"
    if len(shape) in (3, 4):
        batch = "N" * (len(shape) - 3)
        first, last = shape[-3] in channels, shape[-1] in channels
        if first and (tensor or not last):
            return batch + "CHW"
        if last:
            return batch + "HWC"
    return None


def _layout(shape: Sequence[int], in_chans: int, tensor: bool) -> str:
    found = layout_of(shape, (in_chans,), tensor)
    if found is not None:
        return found
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
        granule: rows stored together in the file, which are read once and kept.
        name: for messages.
        file: closed at the end.
        pixels: converts stored samples to the model's pixels.

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
        pixels: PillowPixels | None = None,
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
        self._file, self._pixels = file, pixels
        if pixels is not None:
            self.channels = pixels.in_chans

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
        return found if self._pixels is None else _converted(found, self._pixels, self.name)


def forget(array: np.memmap[Any, Any]) -> None:
    """Release the resident pages of a memory map; their content stays in its file.

    A mapped page counts as the process's memory until the system needs the room.
    """
    pages = getattr(array, "_mmap", None)
    # The pages of a copy-on-write map hold data that is in no file.
    if pages is not None and getattr(array, "mode", "c") != "c" and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


def _as_rows(rows: Any, layout: str) -> Tensor:
    """Rows in any order of axes as (N, C, rows, width), a view if possible."""
    if not isinstance(rows, Tensor):
        rows = np.asarray(rows)
        if rows.dtype.byteorder not in ("=", "|"):
            rows = rows.astype(rows.dtype.newbyteorder("="))
        if not rows.flags.writeable:
            rows = rows.copy()  # torch.from_numpy warns of read-only arrays
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


def _converted(rows: Tensor, pixels: PillowPixels, name: str) -> Tensor:
    """Stored samples (1, C, rows, width) of one image as its pixels."""
    samples = rows[0].permute(1, 2, 0).numpy()
    try:
        return _as_rows(pixels(samples), "HWC")
    except ValueError as error:
        raise ImageError(f"{name}: {_reason(error)}") from error


class VipsSource(Source):
    """A JPEG, PNG, TIFF and others, decoded by libvips from top to bottom, a few rows at a time.

    Raises:
        ImageError: libvips cannot read it, or reads other pixels than Pillow does.
    """

    def __init__(self, path: Path, in_chans: int) -> None:
        pyvips = _pyvips(path)
        self.name, self.channels = str(path), in_chans
        if in_chans not in MODES:
            raise ImageError(f"{path}: an image file has 1 or 3 channels, not {in_chans}")
        self._pixels = PillowPixels.of(path, in_chans)
        held = self._pixels
        if held is not None and (held.format not in _VIPS_FORMATS or not _is_plain(held)):
            raise ImageError(
                f"{path}: {held.format} of mode {held.mode} has other pixels here than in Pillow"
            )
        try:
            # By name, libvips may return its cached copy of an earlier file.
            file = pyvips.Source.new_from_file(str(path))
            image = pyvips.Image.new_from_source(file, "", access="sequential", fail_on="truncated")
            if self._pixels is None:
                if image.format not in ("uchar", "ushort"):
                    raise ValueError(f"samples of type {image.format} are not made 8 bits of")
                image = image.colourspace("srgb")
                if image.hasalpha():
                    image = image[0 : image.bands - 1]
                if image.format != "uchar":
                    image = image.cast("uchar")
            # A region is computed on request, in order. An image is computed by threads that read
            # ahead, and each crop of it would begin at the top again.
            self._region = pyvips.Region.new(image)
            size = (image.width, image.height)
        except Exception as error:
            raise ImageError(f"{path}: {_reason(error)}") from error
        if self._pixels is not None and size != (self._pixels.width, self._pixels.height):
            raise ImageError(f"{path}: {size} px, and in Pillow another size")
        self._bands, self._dtype = image.bands, _VIPS_DTYPES.get(image.format, "V")
        self.width, self.height = size
        self._top: Tensor | None = None
        self._top = self.read(0, _VIPS_ROWS)

    def read(self, begin: int, end: int) -> Tensor:
        assert self.height is not None
        end = min(end, self.height)
        pieces = []
        if self._top is not None and begin < self._top.shape[2]:
            pieces.append(self._top[:, :, begin:end])
            begin = min(end, self._top.shape[2])
        try:
            # A few rows at a time, because libvips holds as many again.
            for row in range(begin, end, _VIPS_ROWS):
                rows = min(_VIPS_ROWS, end - row)
                samples = np.frombuffer(self._region.fetch(0, row, self.width, rows), self._dtype)
                pieces.append(self._of(samples.reshape(rows, self.width, self._bands)))
        except ImageError:
            raise
        except Exception as error:
            raise ImageError(f"{self.name}: rows {begin} to {end}: {_reason(error)}") from error
        if not pieces:
            return torch.empty(1, self.channels, 0, self.width, dtype=torch.uint8, device="cpu")
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)

    def _of(self, samples: np.ndarray[Any, Any]) -> Tensor:
        if self._pixels is not None:
            return _converted(_as_rows(samples, "HWC"), self._pixels, self.name)
        if self.channels == 1:
            return _as_rows(np.asarray(Image.fromarray(samples).convert("L")), "HW")
        return _as_rows(samples, "HWC")


#: Rows requested from libvips at once.
_VIPS_ROWS = 16
_VIPS_DTYPES = {"uchar": "u1", "ushort": "u2", "short": "i2", "uint": "u4", "int": "i4",
                "float": "f4"}  # fmt: skip
#: Formats, by Pillow's names, that libvips decodes to the same samples as Pillow.
_VIPS_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF")


def _is_plain(pixels: PillowPixels) -> bool:
    """Whether every reader decodes a file to the samples of Pillow's mode."""
    tags = pixels.tags
    if pixels.format != "TIFF":
        # Pillow inverts every JPEG of this mode, libvips not all that lack the marker.
        return pixels.mode != "CMYK" or pixels.adobe
    return (
        tags.get("Orientation", 1) == 1
        # Colours premultiplied by the transparency.
        and tuple(tags.get("ExtraSamples", ()))[:1] != (1,)
        and set(tags.get("BitsPerSample", (1,))) in ({1}, {8}, {16}, {32})
        and (
            tags.get("PhotometricInterpretation", 1) in (1, 2, 3, 5)
            or pixels.mode in ("1", "L")
            or tags.get("Compression") == 7  # JPEG, whose decoder gives red, green and blue
        )
    )


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


def _open_tiff(path: Path, in_chans: int, layout: str | None) -> Source:
    """A TIFF by tifffile: memory-mapped if its pixels are stored plainly, else tile by tile.

    Its first page, in Pillow's pixels; with a layout, or if Pillow does not know the file, its
    first series of pages with the stored values.
    """
    try:
        import tifffile
    except ImportError as error:
        raise ImageError(f"{path}: tifffile is not installed: pip install tifffile") from error
    pixels = None if layout or in_chans not in MODES else PillowPixels.of(path, in_chans)
    if pixels is not None:
        if not _is_plain(pixels):
            raise ImageError(
                f"{path}: mode {pixels.mode} is stored in a way that only Pillow reads"
            )
        # libvips inverts images with white at zero, tifffile does not.
        white_is_zero = pixels.tags.get("PhotometricInterpretation") == 0
        pixels = replace(pixels, inverted=white_is_zero)
    try:
        with tifffile.TiffFile(path) as tiff:
            series = tiff.series[0].levels[0]
            page = tiff.pages.first if pixels else series.pages[0]
            plain = page.is_memmappable if pixels else series.dataoffset is not None
            granule = page.tilelength if page.is_tiled else page.rowsperstrip
            if pixels is not None:
                layout = "".join({"Y": "H", "X": "W", "S": "C"}.get(a, "?") for a in page.axes)
        which: dict[str, Any] = {"series": 0} if pixels is None else {"page": 0}
        if plain:
            array: Any = tifffile.memmap(path, mode="r", **which)
            return ArraySource(array, in_chans, layout, name=str(path), pixels=pixels)
        import zarr

        which = {"series": 0, "level": 0} if pixels is None else {"key": 0}
        store = tifffile.imread(path, aszarr=True, **which)
        array = zarr.open(store, mode="r")
    except ImportError as error:
        raise ImageError(
            f"{path}: it is compressed or tiled, and is read piece by piece with zarr, "
            "which is not installed: pip install zarr"
        ) from error
    except Exception as error:
        raise ImageError(f"{path}: {_reason(error)}") from error
    return ArraySource(array, in_chans, layout, granule, str(path), file=store, pixels=pixels)


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
    # Shards, if there are any, are read as a whole.
    chunks = getattr(array, "shards", None) or array.chunks
    return ArraySource(array, in_chans, order, granule=chunks[order.index("H")], name=name)


def _open_path(path: Path, in_chans: int, layout: str | None) -> Source:
    if not path.exists():
        raise ImageError(f"{path}: no such file or folder")
    suffix = path.suffix.lower()
    if path.is_dir():
        if not any((path / name).exists() for name in ("zarr.json", ".zarray", ".zgroup")):
            raise ImageError.about(
                path,
                "a folder, and no zarr array: name an image, or pass the list of "
                "find_images(folder); on the command line, predict --native-size takes folders",
            )
        return _open_zarr(path, in_chans, layout)
    try:
        check_regular(path)
        pixels = PillowPixels.of(path, in_chans)
    except OSError as error:
        raise ImageError.about(path, error.strerror or error) from error
    if suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ImageError(f"{path}: {_reason(error)}") from error
        return ArraySource(array, in_chans, layout, name=str(path))
    if suffix == ".zarr":
        return _open_zarr(path, in_chans, layout)
    tiff = suffix in _TIFF if pixels is None else pixels.format == "TIFF"
    readers = {"tifffile": _open_tiff} if tiff else {}
    if not (tiff and layout and pixels and pixels.is_deep):  # of which they would lose bits
        readers |= {"libvips": _open_vips, "Pillow": _open_whole}
    reasons: dict[str, str] = {}
    for name, reader in readers.items():
        source = None
        try:
            source = reader(path, in_chans, layout)
            # A missing or failing decoder shows only when rows are decoded.
            source.read(0, 1)
            return source
        except (ImageError, ValueError) as error:
            reasons[name] = str(error).removeprefix(f"{path}: ")
            if source is not None:
                source.close()
    if len(reasons) == 1:
        raise ImageError.about(path, *reasons.values())
    # The reader of the most formats comes first.
    said = [f"{why} (by {name})" for name, why in reversed(reasons.items())]
    raise ImageError.about(path, "; ".join(said))


def _open_vips(path: Path, in_chans: int, layout: str | None) -> Source:
    return VipsSource(path, in_chans)


def _open_whole(path: Path, in_chans: int, layout: str | None) -> Source:
    """An image decoded as a whole by Pillow, which refuses those too large for that."""
    whole = np.asarray(read_image(path, in_chans))
    return ArraySource(whole, in_chans, "HW" if in_chans == 1 else "HWC", name=str(path))


def open_source(
    source: Any, in_chans: int, layout: str | None = None, height: int | None = None
) -> Source:
    """A `Source` for any object that holds an image.

    Args:
        source: a `Source`; a path (.npy, .zarr, TIFF by tifffile, anything else by libvips, or by
            Pillow where it fits in memory); an array, memory map, tensor or zarr array; an
            iterator of bands; or a list of these, images of one size that pass together. The
            pixels of image files are those of `read_image`, whichever reader gives them.
        in_chans: channels that the model takes.
        layout: order of the axes of arrays, one of `LAYOUTS`; a TIFF's values are then the
            stored ones.
        height: in pixels, of an iterator of bands, if it is known.

    Raises:
        ImageError: the file cannot be read; the message has the reason of every reader.
        ValueError: a shape does not fit.
        TypeError: the source is none of these.
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
