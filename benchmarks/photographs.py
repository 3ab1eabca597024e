"""Generated folders of photographs of many kinds, some of them broken."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

#: Kinds of unusual files that hold an image, and kinds of files that hold none.
ODD = ("CMYK", "16-bit", "EXIF-rotated", "palette with transparency", "wrong extension")
BROKEN = ("truncated", "zero bytes", "text", "decompression bomb", "bomb by pixels")


def picture(rng: np.random.Generator, width: int, height: int, channels: int = 3) -> Image.Image:
    """An image of blobs and some noise, which compresses about as well as a photograph."""
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, channels), dtype=np.uint8)
    blobs = Image.fromarray(coarse.squeeze() if channels == 1 else coarse[..., :3])
    blobs = blobs.resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.integers(0, 24, (height, width, channels), dtype=np.uint8)
    pixels = np.asarray(blobs).reshape(height, width, -1) // 2 + noise[..., : min(channels, 3)]
    return Image.fromarray(pixels.squeeze() if channels == 1 else pixels.astype(np.uint8))


def write_odd(path: Path, kind: str, rng: np.random.Generator) -> None:
    """Write an image of a kind in `ODD`; the file's suffix has no influence."""
    image = picture(rng, 160, 120)
    if kind == "CMYK":
        image.convert("CMYK").save(path, "JPEG")
    elif kind == "16-bit":
        Image.fromarray(rng.integers(0, 65536, (90, 120)).astype(np.uint16)).save(path, "PNG")
    elif kind == "EXIF-rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, "JPEG", exif=exif)
    elif kind == "palette with transparency":
        image.quantize(32).save(path, "PNG", transparency=3)
    else:
        image.save(path, "PNG")


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG file with this size in its header and without pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return head + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def write_broken(path: Path, kind: str, rng: np.random.Generator) -> None:
    """Write a file of a kind in `BROKEN`."""
    if kind == "truncated":
        picture(rng, 160, 120).save(path, "JPEG")
        path.write_bytes(path.read_bytes()[:700])
    elif kind == "zero bytes":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a picture\n")
    else:
        side = 60_000 if kind == "decompression bomb" else 10_000
        path.write_bytes(png_header(side, side))


def write_folder(
    folder: Path, count: int, sizes: tuple[int, int] = (40, 200), seed: int = 0
) -> dict[str, str]:
    """Write ``count`` files named .jpg with edges in the range ``sizes``, in folders of 1000.

    One file in a hundred is broken and one in a hundred odd; every kind occurs in turn and at least
    once.

    Returns:
        The broken files: name -> kind.
    """
    rng = np.random.default_rng(seed)
    each = max(len(BROKEN), count // 100)
    special = rng.permutation(count)[: 2 * each]
    broken = {int(n): BROKEN[i % len(BROKEN)] for i, n in enumerate(special[:each])}
    odd = {int(n): ODD[i % len(ODD)] for i, n in enumerate(special[each:])}
    names: dict[str, str] = {}
    for n in range(count):
        path = folder / f"{n // 1000:03d}" / f"{n:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if n in broken:
            write_broken(path, broken[n], rng)
            names[str(path)] = broken[n]
        elif n in odd:
            write_odd(path, odd[n], rng)
        else:
            width, height = (int(v) for v in rng.integers(*sizes, 2, endpoint=True))
            picture(rng, width, height).save(path, "JPEG", quality=85)
    return names
