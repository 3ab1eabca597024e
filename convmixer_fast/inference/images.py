"""Finding image files, and decoding them.

Finding follows timm's folder reader (extensions, recursion, natural order), reading follows its
dataset (``Image.open(...).convert(...)``): EXIF orientation is **not** applied, because the
published accuracies were measured without it.
"""

from __future__ import annotations

import csv
import functools
import glob
import importlib
import io
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from .remote import Location, check_stores, expanded, find_urls, located, read_regular, read_url

#: Suffixes of the files that are taken from a folder by default, in any case (timm's list); a file
#: named explicitly may have any suffix.
IMG_EXTENSIONS = (".png", ".jpg", ".jpeg")

# Pillow's own readers that are not used: a file's name says nothing of its content, EPS and WMF
# run another program on it, and the others have no decoder.
_NOT_READ = ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG")

# Packages that add a format to Pillow: module, registration function, suffixes.
_PLUGINS = {
    "pillow_heif": ("pillow-heif", "register_heif_opener", (".heic", ".heif", ".hif")),
    "pillow_jxl": ("pillow-jxl-plugin", None, (".jxl",)),
}

#: Pillow's modes of the images that models take, by their channels.
MODES = {1: "L", 3: "RGB"}

# For `warnings.catch_warnings`, which changes the state of the whole process.
_open_lock = threading.Lock()


class ImageError(ValueError):
    """An image that cannot be found or read; the message is one line and names the file."""

    path = ""
    reason = ""

    @classmethod
    def about(cls, path: str | os.PathLike[str], reason: object) -> ImageError:
        error = cls(f"{path}: {reason}")
        error.path, error.reason = str(path), str(reason)
        return error


def natural_key(text: str) -> list[str | int]:
    """A sorting key that puts ``img2`` before ``img10``, in any case (timm's order)."""
    parts = re.split(r"([0-9]+)", text.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


@functools.cache
def _load_plugins() -> None:
    Image.init()
    for module, (_, register, _) in _PLUGINS.items():
        with suppress(ImportError, OSError, AttributeError):
            plugin = importlib.import_module(module)
            if register is not None:
                getattr(plugin, register)()


def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that `read_image` decodes, registered plugins' included."""
    _load_plugins()
    return tuple(
        name
        for name in Image.ID
        if name not in _NOT_READ or not Image.OPEN[name][0].__module__.startswith("PIL.")
    )


def readable_suffixes() -> frozenset[str]:
    """Suffixes of the files in `readable_formats`."""
    formats = readable_formats()
    return frozenset(s for s, name in Image.registered_extensions().items() if name in formats)


def _chosen(suffixes: str | Iterable[str]) -> Callable[[Location], bool]:
    """A predicate: the file of a folder is taken."""
    names = suffixes.split(",") if isinstance(suffixes, str) else list(suffixes)
    names = [name.strip().lower() for name in names]
    if "*" in names:
        return lambda _: True
    taken = {f".{name.lstrip('.')}" for name in names if name not in ("", "all")}
    if "all" in names:
        taken |= readable_suffixes()
    if not taken:
        raise ValueError(f"suffixes {suffixes!r} name none: pass some like .png,.webp, or 'all'")
    return lambda file: _suffix(file) in taken


def _suffix(file: Location) -> str:
    return os.path.splitext(file)[1].lower()


@dataclass
class LeftOut:
    """Files and rows that a search for images left out; ``str`` describes them in one line.

    Attributes:
        files: of folders and patterns, those of other suffixes.
        nameless: rows of lists that name no file.
    """

    files: list[Location] = field(default_factory=list)
    nameless: int = 0

    def __bool__(self) -> bool:
        return bool(self.files or self.nameless)

    def __str__(self) -> str:
        said = []
        if self.files:
            kinds: dict[str, list[Location]] = {}
            for file in self.files:
                kinds.setdefault(_suffix(file), []).append(file)
            shown = [_some_files(*kind) for kind in sorted(kinds.items())[:_MOST_KINDS]]
            if len(kinds) > len(shown):
                shown.append(f"{len(kinds) - len(shown)} more kinds")
            said.append(f"left out {_count(len(self.files), 'file')}: {', '.join(shown)}")
            readable = sorted(kinds.keys() & readable_suffixes())
            if readable:
                said.append(f"suffixes='all' (--suffixes all) takes {', '.join(readable)}")
            if "" in kinds:
                said.append("suffixes='*' (--suffixes '*') takes every file")
            for package, _, suffixes in _PLUGINS.values():
                lacking = sorted((kinds.keys() & set(suffixes)) - set(readable))
                if lacking:
                    said.append(f"pip install {package} reads {', '.join(lacking)}")
        if self.nameless:
            said.append(f"left out {_count(self.nameless, 'row')} that name no file")
        return "; ".join(said)


#: Kinds of files, and names of each, in the words of a `LeftOut`.
_MOST_KINDS, _MOST_NAMES = 20, 3


def _some_files(suffix: str, files: list[Location]) -> str:
    names = ", ".join(map(str, files[:_MOST_NAMES])) + ", ..." * (len(files) > _MOST_NAMES)
    return f"{len(files)} {suffix or 'without a suffix'} ({names})"


def _count(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"


def _walk(folder: Path) -> Iterator[Path]:
    # Links are followed as timm does; a folder met before is not entered again, so that a link
    # to a parent ends.
    seen: set[tuple[int, int]] = set()

    def fail(error: OSError) -> None:
        raise error

    for root, subfolders, files in os.walk(folder, followlinks=True, onerror=fail):
        stat = os.stat(root)
        if (stat.st_dev, stat.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        for name in files:
            yield Path(root, name)


def find_images(
    paths: Iterable[str | os.PathLike[str]],
    suffixes: str | Iterable[str] = IMG_EXTENSIONS,
    left_out: LeftOut | None = None,
) -> list[Location]:
    """The image files of ``paths``, each once.

    A file stands for itself, whatever its extension; a folder for every image below it, in natural
    order; a pattern (``*``, ``?``, ``[..]``, ``**`` for any folders) for the images that match, and
    those below folders that match: whatever their extension if the pattern ends in one, as in
    ``*.webp``. Brackets are literal where a file or folder of that name is there, and where nothing
    matches otherwise. The order of ``paths`` is kept. Each may be a URL (``s3://bucket/photos/``);
    what is found there are URLs too, as strings. Pipes, sockets and devices are found as files are:
    `read_image` refuses them.

    Args:
        suffixes: of the images in folders, a list or a string like ``".png,.webp"``; ``"all"`` for
            every suffix that Pillow and its registered plugins read, ``"*"`` for every file.
        left_out: collects the files that are not taken; by default a `UserWarning` names them.

    Raises:
        ImageError: a path does not exist or cannot be listed, a pattern matches nothing, or a
            folder holds no image.
        ImportError: a package is missing that reaches such URLs; the message says which.
        ValueError: ``suffixes`` names none.
    """
    suffixes = suffixes if isinstance(suffixes, str) else tuple(suffixes)
    taken = _chosen(suffixes)
    found: dict[Location, None] = {}
    passed = LeftOut() if left_out is None else left_out
    for path in map(located, paths):
        try:
            inside = sorted(_stands_for(path), key=lambda one: _path_key(one[0]))
        except OSError as error:
            raise ImageError.about(path, error.strerror or error) from error
        some = [file for file, named in inside if named or taken(file)]
        others = [file for file, named in inside if not (named or taken(file))]
        if not some:
            looked = suffixes if isinstance(suffixes, str) else ", ".join(suffixes)
            why = f"; {LeftOut(others)}" if others else ""
            raise ImageError(f"no images in {path}: looked for {looked}{why}")
        found.update(dict.fromkeys(some))
        passed.files += others
    # A file left out of one path may be named by another.
    passed.files[:] = [file for file in dict.fromkeys(passed.files) if file not in found]
    if left_out is None and passed:
        warnings.warn(str(passed), stacklevel=2)
    return list(found)


def _path_key(path: Location) -> tuple[list[str | int], str]:
    return natural_key(str(path)), str(path)


def _stands_for(path: Location) -> Iterator[tuple[Location, bool]]:
    """The files of a path or URL, in no order; True: taken regardless of the suffix."""
    if isinstance(path, str):
        yield from find_urls(path)
    elif path.is_dir():
        yield from ((file, False) for file in _walk(path))
    elif path.exists():
        yield path, True
    elif glob.has_magic(str(path)):
        any_file = len(path.suffix) > 1 and not glob.has_magic(path.suffix)
        matches = expanded(str(path), os.path.exists, lambda p: glob.glob(p, recursive=True))
        if not matches:
            raise ImageError.about(path, "no image matches")
        for match in map(Path, matches):
            if match.is_dir():
                yield from ((file, False) for file in _walk(match))
            else:
                yield match, any_file
    else:
        raise ImageError.about(path, "no such file or folder")


def read_image_list(
    path: str | os.PathLike[str],
    column: str | None = None,
    root: str | os.PathLike[str] = "",
    left_out: LeftOut | None = None,
) -> list[Location]:
    """The image files that a list names, each once, in its order; they need not exist.

    Args:
        path: CSV with a header, Parquet (needs pyarrow), or any other text: one name a line.
        column: of a table; default: the first of `LIST_COLUMNS` that it has, or its only one.
        root: the folder that relative names are relative to, or its URL.
        left_out: collects rows of a table that name no file; by default a `UserWarning` is given.

    Raises:
        ValueError: the list cannot be understood, names nothing, or has no such column.
        OSError: it cannot be read.
        ImportError: a Parquet list, without pyarrow; URLs, without what reaches them.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    names: list[str]
    nameless = 0
    if suffix in (".parquet", ".pq"):
        from .files import pyarrow

        pa = pyarrow()
        try:
            schema = pa.parquet.read_schema(path)
            chosen = _list_column(path, list(schema.names), column)
            names = pa.parquet.read_table(path, columns=[chosen])[chosen].to_pylist()
            nameless = sum(not name for name in names)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: not a Parquet file ({error})") from error
    else:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            if suffix == ".csv":
                rows = csv.reader(file)
                header = next(rows, [])
                at = header.index(_list_column(path, header, column))
                names = [row[at] if at < len(row) else "" for row in rows if row]
                nameless = sum(not name for name in names)
            else:
                names = file.read().splitlines()
    found = list(dict.fromkeys(located(name, root) for name in names if name))
    if not found:
        raise ValueError(f"{path}: the list names no images")
    check_stores(found)
    if left_out is not None:
        left_out.nameless += nameless
    elif nameless:
        warnings.warn(f"{path}: {LeftOut(nameless=nameless)}", stacklevel=2)
    return found


#: Columns of lists that hold file names by custom.
LIST_COLUMNS = ("filename", "path", "file", "image", "image_path")


def _list_column(path: Path, header: list[str], column: str | None) -> str:
    if column is not None:
        if column not in header:
            raise ValueError(f"{path} has no column {column!r}: it has {', '.join(header)}")
        return column
    known = [name for name in LIST_COLUMNS if name in header]
    if known or len(header) == 1:
        return (known or header)[0]
    raise ValueError(
        f"{path}: which column names the images? It has {', '.join(header) or 'none'}: "
        "pass --image-column"
    )


def read_image(path: str | os.PathLike[str], in_chans: int = 3) -> Image.Image:
    """Decode one image file or URL to mode "RGB" (``in_chans`` 3) or "L" (1).

    Conversion is Pillow's ``convert``: transparency is dropped, CMYK and palettes are expanded,
    16-bit greyscale is clipped to 8 bits as Pillow does. Formats are those of `readable_formats`.

    Raises:
        ImageError: the file is missing, empty, no regular file (a pipe, a socket, a device), no
            image, damaged, cut short, or larger than ``PIL.Image.MAX_IMAGE_PIXELS``.
        ValueError: ``in_chans`` is neither 1 nor 3.
    """
    if in_chans not in MODES:
        raise ValueError(f"images have 1 or 3 channels, the model wants in_chans={in_chans}")
    place = located(path)
    try:
        content = read_url(place) if isinstance(place, str) else read_regular(place)
    except OSError as error:
        raise ImageError.about(path, error.strerror or error) from error
    if not content:
        raise ImageError.about(path, "the file is empty")
    try:
        formats = readable_formats()
        with _open_lock, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=formats)
        with image:
            image.load()
            # `convert` would copy an image that already has this mode.
            mode = MODES[in_chans]
            try:
                return image if image.mode == mode else image.convert(mode)
            except ValueError as error:  # Pillow's words name both modes
                raise ImageError.about(path, error) from error
    except ImageError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError.about(
            path,
            f"more than {Image.MAX_IMAGE_PIXELS:,} pixels, which Pillow takes for a "
            "decompression bomb: raise PIL.Image.MAX_IMAGE_PIXELS if the file is trusted",
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError.about(path, "not an image (no known format)") from error
    except MemoryError as error:
        raise ImageError.about(path, "not enough memory to decode it") from error
    except Exception as error:
        # Decoders of damaged files raise whatever their parsing runs into: OSError, SyntaxError,
        # struct.error, IndexError and more.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError.about(path, f"damaged image ({reason})") from error


@dataclass(frozen=True)
class PillowPixels:
    """The conversion of `read_image`, for rows of samples from any reader.

    Attributes:
        format: Pillow's name of the file's format.
        mode: Pillow's mode of the image before it is converted.
        width, height: in pixels.
        in_chans: 1 or 3, of the result.
        palette: of mode "P": Pillow's mode of the palette, and its bytes.
        tags: of a TIFF, by name, some that tell how samples are stored.
        adobe: whether a JPEG has Adobe's marker.
        inverted: whether samples of 8 bits or less come inverted from the reader.
    """

    format: str
    mode: str
    width: int
    height: int
    in_chans: int
    palette: tuple[str, bytes] = ("RGB", b"")
    tags: Mapping[str, Any] = field(default_factory=dict)
    adobe: bool = False
    inverted: bool = False

    @classmethod
    def of(cls, path: Path, in_chans: int) -> PillowPixels | None:
        """From the head of a file of any size; None if Pillow does not know the format."""
        with open(path, "rb") as file:
            prefix = file.read(16)
            for name in readable_formats():
                opener, accepts = Image.OPEN[name]
                file.seek(0)
                try:
                    accepted = accepts(prefix) if accepts else True
                    if not accepted or isinstance(accepted, str):
                        continue
                    # `Image.open` would count the pixels and refuse a large image.
                    image = opener(file, "")
                except Exception:
                    continue
                palette: Any = ("RGB", b"")
                if image.mode == "P" and image.palette is not None:
                    palette = image.palette.getdata()
                stored = getattr(image, "tag_v2", {})
                tags = {tag.name: stored[tag] for tag in _TAGS if tag in stored}
                return cls(
                    image.format or name,
                    image.mode,
                    *image.size,
                    in_chans,
                    palette,
                    tags,
                    "adobe" in image.info,
                )
        return None

    @property
    def is_deep(self) -> bool:
        """Whether a stored sample has more bits than the 8 of a pixel."""
        return self.mode.startswith(("I", "F"))

    def __call__(self, samples: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """(rows, W, C) samples as they are stored -> (rows, W, in_chans) pixels.

        Raises:
            ValueError: such samples are not known to be what Pillow reads.
        """
        given = f"{samples.shape[2]} samples of {samples.dtype}"
        if samples.dtype == bool:
            samples = samples * np.uint8(255)
        kind, count, dtype = _RAW.get(self.mode, ("", 0, "?"))
        if kind == "P" and samples.shape[2] > 1:  # the reader has looked the colours up
            kind, count = "RGB", 3
        if dtype == "u1" and samples.dtype == np.uint16 and kind != "P":
            samples = (samples >> 8).astype(np.uint8)
        if dtype == "i4" and samples.dtype in (np.int16, np.int32, np.uint32):
            samples = samples.astype(np.int32)
        if samples.dtype != np.dtype(dtype) or samples.shape[2] < count:
            raise ValueError(f"{given} a pixel, which Pillow has as mode {self.mode}")
        samples = np.ascontiguousarray(samples[:, :, :count])
        samples = ~samples if self.inverted else samples
        size = (samples.shape[1], samples.shape[0])
        image = Image.frombytes(kind, size, samples.tobytes())
        if kind == "P":
            image.putpalette(self.palette[1], self.palette[0])
        image = image.convert(MODES[self.in_chans])
        return np.asarray(image).reshape(*samples.shape[:2], self.in_chans)


_TAGS = (
    ExifTags.Base.BitsPerSample,
    ExifTags.Base.Compression,
    ExifTags.Base.ExtraSamples,
    ExifTags.Base.Orientation,
    ExifTags.Base.PhotometricInterpretation,
)

# Pillow's mode -> mode, number and type of the samples of a pixel that are converted. Transparency
# is dropped; of colours with 16 bits a sample, Pillow reads the upper 8.
_RAW = {
    "1": ("L", 1, "u1"),
    "L": ("L", 1, "u1"),
    "LA": ("L", 1, "u1"),
    "P": ("P", 1, "u1"),
    "RGB": ("RGB", 3, "u1"),
    "RGBA": ("RGB", 3, "u1"),
    "CMYK": ("CMYK", 4, "u1"),
    "I;16": ("I;16", 1, "u2"),
    "I;16B": ("I;16", 1, "u2"),
    "I": ("I", 1, "i4"),
    "F": ("F", 1, "f4"),
}
