"""Which files are images, and what is in them?

Finding follows timm's folder reader (extensions, recursion, natural order), reading follows its
dataset (``Image.open(...).convert(...)``): EXIF orientation is **not** applied, because the
published accuracies were measured without it.
"""

from __future__ import annotations

import csv
import glob
import io
import os
import re
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from .remote import Location, check_stores, find_urls, located, read_url

#: What a folder is searched for, in any case (timm's list); a file named outright may end in
#: anything.
IMG_EXTENSIONS = (".png", ".jpg", ".jpeg")

# Pillow's readers of photographs. The others are left out because a file's name says nothing of
# its content, and some of them (EPS) hand it to an outside program.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "TGA", "ICO")

_MODES = {1: "L", 3: "RGB"}

# `warnings.catch_warnings` changes the state of the whole process.
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
            if os.path.splitext(name)[1].lower() in IMG_EXTENSIONS:
                yield Path(root, name)


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Location]:
    """The image files that ``paths`` stand for, each once.

    A file stands for itself, whatever its extension; a folder for every image below it
    (`IMG_EXTENSIONS`), in natural order; a pattern (``*``, ``?``, ``[..]``, ``**`` for any
    folders) for the images that match, and those below folders that match: whatever their
    extension if the pattern ends in one, as in ``*.webp``. The order of ``paths`` is kept.
    Each may be a URL (``s3://bucket/photos/``); what is found there are URLs too, as strings.

    Raises:
        ImageError: a path does not exist or cannot be listed, a pattern matches nothing, or a
            folder holds no image.
        ImportError: a package is missing that reaches such URLs; the message says which.
    """
    found: dict[Location, None] = {}
    for path in map(located, paths):
        try:
            if isinstance(path, str):
                urls = sorted(find_urls(path, IMG_EXTENSIONS), key=_path_key)
                if not urls:
                    raise ImageError(f"no images in {path}: looked for {', '.join(IMG_EXTENSIONS)}")
                found.update(dict.fromkeys(urls))
            elif path.is_dir():
                inside = sorted(_walk(path), key=_path_key)
                if not inside:
                    raise ImageError(f"no images in {path}: looked for {', '.join(IMG_EXTENSIONS)}")
                found.update(dict.fromkeys(inside))
            elif path.exists():
                found[path] = None
            elif glob.has_magic(str(path)):
                found.update(dict.fromkeys(_matches(path)))
            else:
                raise ImageError.about(path, "no such file or folder")
        except OSError as error:
            raise ImageError.about(path, error.strerror or error) from error
    return list(found)


def _path_key(path: Location) -> tuple[list[str | int], str]:
    return natural_key(str(path)), str(path)


def _matches(pattern: Path) -> Iterator[Path]:
    any_file = len(pattern.suffix) > 1 and not glob.has_magic(pattern.suffix)
    found = False
    for path in sorted(map(Path, glob.glob(str(pattern), recursive=True)), key=_path_key):
        inside = sorted(_walk(path), key=_path_key) if path.is_dir() else [path]
        for file in inside:
            if any_file or file.suffix.lower() in IMG_EXTENSIONS:
                found = True
                yield file
    if not found:
        raise ImageError.about(pattern, "no image matches")


def read_image_list(
    path: str | os.PathLike[str], column: str | None = None, root: str | os.PathLike[str] = ""
) -> list[Location]:
    """The image files that a list names, each once, in its order; they need not exist.

    Args:
        path: CSV with a header, Parquet (needs pyarrow), or any other text: one name a line.
        column: of a table; default: the first of `LIST_COLUMNS` that it has, or its only one.
        root: the folder that relative names are relative to, or its URL.

    Raises:
        ValueError: the list cannot be understood, names nothing, or has no such column.
        OSError: it cannot be read.
        ImportError: a Parquet list, without pyarrow; URLs, without what reaches them.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    names: list[str]
    if suffix in (".parquet", ".pq"):
        from .files import pyarrow

        pa = pyarrow()
        try:
            schema = pa.parquet.read_schema(path)
            chosen = _list_column(path, list(schema.names), column)
            names = pa.parquet.read_table(path, columns=[chosen])[chosen].to_pylist()
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: not a Parquet file ({error})") from error
    else:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            if suffix == ".csv":
                rows = csv.reader(file)
                header = next(rows, [])
                at = header.index(_list_column(path, header, column))
                names = [row[at] if at < len(row) else "" for row in rows if row]
            else:
                names = file.read().splitlines()
    found = list(dict.fromkeys(located(name, root) for name in names if name))
    if not found:
        raise ValueError(f"{path}: the list names no images")
    check_stores(found)
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
    """Decode one image file, or what a URL leads to, to mode "RGB" (``in_chans`` 3) or "L" (1).

    Conversion is Pillow's ``convert``: transparency is dropped, CMYK and palettes are expanded,
    16-bit greyscale is clipped to 8 bits as Pillow does.

    Raises:
        ImageError: the file is missing, empty, no image, damaged, cut short, or larger than
            ``PIL.Image.MAX_IMAGE_PIXELS``.
        ValueError: ``in_chans`` is neither 1 nor 3.
    """
    if in_chans not in _MODES:
        raise ValueError(f"images have 1 or 3 channels, the model wants in_chans={in_chans}")
    place = located(path)
    try:
        content = read_url(place) if isinstance(place, str) else place.read_bytes()
    except OSError as error:
        raise ImageError.about(path, error.strerror or error) from error
    if not content:
        raise ImageError.about(path, "the file is empty")
    try:
        with _open_lock, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
        with image:
            image.load()
            # `convert` would copy an image that is in this mode already.
            mode = _MODES[in_chans]
            return image if image.mode == mode else image.convert(mode)
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
