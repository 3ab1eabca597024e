"""Files have the same pixels for `stream`, whatever reads their rows, as for `Predictor`."""

from __future__ import annotations

import itertools
import struct
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import convmixer_fast as cf
from convmixer_fast.inference import ImageError, Predictor, open_source, read_image, stream
from convmixer_fast.inference.sources import VipsSource
from convmixer_fast.testing import trained_like_

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore:IM image format is deprecated"),
]

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F")
FORMATS = (
    "PNG", "JPEG", "WEBP", "BMP", "GIF", "JPEG2000", "TGA", "PPM", "ICO", "AVIF", "PCX", "SGI",
    "QOI", "DDS", "IM", "TIFF",
)  # fmt: skip
COMPRESSIONS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4")
SIZES = ((53, 70), (1, 1), (19, 3))


def samples(height: int, width: int, channels: int = 4) -> np.ndarray[Any, Any]:
    """Bytes that vary from pixel to pixel, and slowly."""
    few = np.random.default_rng(height).integers(0, 256, (9, 9, 4), dtype=np.uint8)
    smooth = Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(smooth)[:, :, :channels])


def picture(mode: str, height: int, width: int) -> Image.Image:
    """An image of one of Pillow's modes, beyond 0 to 255 where the mode goes there."""
    ramp = np.linspace(-0.1, 1.1, height * width).reshape(height, width)
    if mode == "I;16":
        return Image.fromarray((ramp.clip(0, 1) * 65535).astype(np.uint16))
    if mode == "I":
        return Image.fromarray((ramp * 300).astype(np.int32))
    if mode == "F":
        return Image.fromarray((ramp * 300).astype(np.float32))
    rgba = Image.fromarray(samples(height, width))
    if mode in ("CMYK", "LAB"):
        stored = samples(height, width, len(mode))
        return Image.frombytes(mode, (width, height), stored.tobytes())
    return rgba if mode == "RGBA" else (rgba if "A" in mode else rgba.convert("RGB")).convert(mode)


def assert_same_pixels(path: Path) -> None:
    """Rows from `open_source` are those of `read_image`, or both refuse the file."""
    for in_chans in (3, 1):
        try:
            expected = np.asarray(read_image(path, in_chans))
        except ImageError:
            with pytest.raises(ImageError, match=path.name):
                open_source(path, in_chans)
            continue
        source = open_source(path, in_chans)
        height, width = expected.shape[:2]
        assert (source.height, source.width) == (height, width)
        cuts = sorted({0, 1, height // 3, height // 2, height})
        bands = [source.read(*pair) for pair in itertools.pairwise(cuts)]
        source.close()
        got = torch.cat(bands, 2)[0].permute(1, 2, 0).numpy()
        assert got.dtype == np.uint8
        off = np.abs(got.reshape(expected.shape).astype(int) - expected)
        assert off.max() == 0, f"{path.name} as {in_chans} channels: {off.max()} off"


@pytest.mark.parametrize("kind", FORMATS)
def test_every_mode_in_every_format(tmp_path: Path, kind: str) -> None:
    written = 0
    hows = COMPRESSIONS if kind == "TIFF" else ("",)
    for mode, size, how in itertools.product(MODES, SIZES, hows):
        path = tmp_path / f"{mode}{size[0]}{how}.image"  # the name does not tell the format
        try:
            picture(mode, *size).save(path, kind, **({"compression": how} if how else {}))
        except (OSError, ValueError, KeyError, SystemError, struct.error):
            continue  # Pillow does not write that
        written += 1
        assert_same_pixels(path)
    assert written >= 3


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


ODD: dict[str, Callable[[Path, Image.Image], object]] = {
    "palette with a transparent colour": lambda p, i: i.quantize(40).save(p, "PNG", transparency=3),
    "gif with a transparent colour": lambda p, i: i.quantize(40).save(p, "GIF", transparency=3),
    "grey with a transparent value": lambda p, i: i.convert("L").save(p, "PNG", transparency=7),
    "colours with a transparent one": lambda p, i: i.save(p, "PNG", transparency=(7, 7, 7)),
    "progressive": lambda p, i: i.save(p, "JPEG", progressive=True, quality=80),
    "without subsampling": lambda p, i: i.save(p, "JPEG", subsampling=0),
    "animation": lambda p, i: i.save(p, "WEBP", save_all=True, append_images=[i.rotate(90)]),
    **{
        f"turned {kind}": lambda p, i, kind=kind: i.save(p, kind, exif=_exif(6))  # type: ignore[misc]
        for kind in ("JPEG", "PNG", "WEBP", "TIFF")
    },
    **{
        f"colour profile {kind}": lambda p, i, kind=kind: i.save(  # type: ignore[misc]
            p, kind, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
        )
        for kind in ("JPEG", "PNG", "WEBP", "TIFF")
    },
}


@pytest.mark.parametrize("kind", ODD)
def test_tags_and_profiles_change_nothing(tmp_path: Path, kind: str) -> None:
    ODD[kind](tmp_path / "odd", picture("RGB", 53, 70))
    assert_same_pixels(tmp_path / "odd")


def test_inks_without_adobes_marker(tmp_path: Path) -> None:
    path = tmp_path / "inks.jpg"
    picture("CMYK", 53, 70).save(path)
    content = path.read_bytes()
    at = content.index(b"\xff\xee")
    (length,) = struct.unpack(">H", content[at + 2 : at + 4])
    path.write_bytes(content[:at] + content[at + 2 + length :])
    assert_same_pixels(path)


GREY, COLOUR = samples(53, 70, 1)[:, :, 0], samples(53, 70, 3)
WIDE = np.random.default_rng(1).integers(0, 65536, (53, 70, 3)).astype(np.uint16)
TIFFS: dict[str, tuple[np.ndarray[Any, Any], dict[str, Any]]] = {
    "colours": (COLOUR, {"photometric": "rgb"}),
    "colours, planar": (
        COLOUR.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"},
    ),
    "colours, 16 bits": (WIDE, {"photometric": "rgb"}),
    "colours, 16 bits, big-endian": (WIDE, {"photometric": "rgb", "byteorder": ">"}),
    "grey": (GREY, {"photometric": "minisblack"}),
    "grey, white is zero": (GREY, {"photometric": "miniswhite"}),
    "grey, 1 bit": (GREY > 100, {"photometric": "minisblack"}),
    "grey, 16 bits": (WIDE[:, :, 0] // 128, {"photometric": "minisblack"}),
    "grey, 16 bits, big-endian": (
        WIDE[:, :, 0] // 128, {"photometric": "minisblack", "byteorder": ">"},
    ),
    "grey, 16 bits, white is zero": (WIDE[:, :, 0] // 128, {"photometric": "miniswhite"}),
    "grey, signed": (WIDE[:, :, 0].astype(np.int16), {"photometric": "minisblack"}),
    "grey, 32 bits": (WIDE[:, :, 0].astype(np.uint32) * 9, {"photometric": "minisblack"}),
    "grey, float": (WIDE[:, :, 0].astype(np.float32) / 200 - 9, {"photometric": "minisblack"}),
    "transparency": (samples(53, 70), {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
    "multiplied": (samples(53, 70), {"photometric": "rgb", "extrasamples": ["assocalpha"]}),
    "a fourth sample": (samples(53, 70), {"photometric": "rgb", "extrasamples": ["unspecified"]}),
    "inks": (samples(53, 70), {"photometric": "separated"}),
    "palette": (GREY, {"photometric": "palette", "colormap": WIDE.reshape(3, -1)[:, :256]}),
    "three pages": (np.stack([GREY, 255 - GREY, GREY]), {"photometric": "minisblack"}),
    "pages of colours": (np.stack([COLOUR, 255 - COLOUR]), {"photometric": "rgb"}),
    "turned": (COLOUR, {"photometric": "rgb", "extratags": [(274, 3, 1, 6, True)]}),
}  # fmt: skip


@pytest.mark.parametrize("storage", [{}, {"tile": (16, 32)}, {"compression": "zlib"}])
@pytest.mark.parametrize("kind", TIFFS)
@pytest.mark.parametrize("without", [(), ("tifffile",), ("pyvips",), ("zarr",)])
def test_every_kind_of_tiff_by_every_reader(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    storage: dict[str, Any],
    without: tuple[str, ...],
) -> None:
    tifffile = pytest.importorskip("tifffile")
    array, how = TIFFS[kind]
    tifffile.imwrite(tmp_path / "image.tif", array, **how, **storage)
    for name in without:
        monkeypatch.setitem(sys.modules, name, None)
    assert_same_pixels(tmp_path / "image.tif")


VIPS = pytest.mark.skipif(find_spec("pyvips") is None, reason="pyvips is not installed")


@VIPS
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.png", {"bitdepth": 1}),
        ("a.png", {"bitdepth": 2}),
        ("a.png", {"bitdepth": 4}),
        ("a.png", {"bitdepth": 4, "palette": True}),
        ("a.png", {"interlace": True}),
        ("a.tif", {"bitdepth": 1, "miniswhite": True}),
        ("a.tif", {"bitdepth": 2}),
        ("a.tif", {"bitdepth": 4, "miniswhite": True}),
        ("a.tif", {"compression": "lzw", "predictor": "horizontal"}),
        ("a.tif", {"compression": "jpeg", "tile": True, "tile_width": 64, "tile_height": 64}),
        ("a.jpg", {"subsample_mode": "on", "Q": 60}),
        ("a.webp", {"lossless": True}),
        ("a.webp", {"Q": 60}),
    ],
)
def test_what_libvips_writes(tmp_path: Path, name: str, how: dict[str, Any]) -> None:
    import pyvips

    written = 0
    for kind in ("b-w", "srgb", "rgba", "grey16", "rgb16", "rgba16"):
        array = {"b-w": GREY, "srgb": COLOUR, "rgba": samples(53, 70), "grey16": WIDE[:, :, 0]}
        image = pyvips.Image.new_from_array(array.get(kind, WIDE))
        image = image.copy(interpretation={"rgba": "srgb", "rgba16": "rgb16"}.get(kind, kind))
        if kind == "rgba16":
            image = image.bandjoin(30000).cast("ushort").copy(interpretation="rgb16")
        try:
            image.write_to_file(str(tmp_path / name), **how)
        except pyvips.Error:
            continue  # libvips does not write that
        written += 1
        assert_same_pixels(tmp_path / name)
    assert written >= 2


@VIPS
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_a_file_that_is_replaced_is_read_again(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image{suffix}"
    how = {"compression": "tiff_lzw"} if suffix == ".tif" else {}
    for pixels in (COLOUR, 255 - COLOUR):
        Image.fromarray(pixels).save(path, **how)
        assert_same_pixels(path)


@VIPS
@pytest.mark.parametrize(
    ("kind", "modes"),
    [
        ("PNG", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        ("JPEG", ("L", "RGB", "CMYK")),
        ("WEBP", ("RGB", "RGBA")),
    ],
)
def test_photographs_are_read_row_by_row(tmp_path: Path, kind: str, modes: tuple[str, ...]) -> None:
    for mode in modes:
        picture(mode, 53, 70).save(tmp_path / mode, kind)
        assert isinstance(open_source(tmp_path / mode, 3), VipsSource), mode


@pytest.mark.parametrize("name", ["16.png", "ink.jpg", "16.tif", "float.tif", "bits.png"])
def test_the_answers_are_the_same(tmp_path: Path, name: str) -> None:
    mode = {"16": "I;16", "ink": "CMYK", "float": "F", "bits": "1"}[name.split(".")[0]]
    picture(mode, 48, 64).save(tmp_path / name)
    model = trained_like_(cf.ConvMixer(16, 2, 5, 4, num_classes=10), (2, 3, 32, 32)).eval()
    predictor = Predictor(model, preprocessing="native", topk=None, output_type="logit")
    one, two = torch.from_numpy(predictor(tmp_path / name)), stream(model, tmp_path / name)[0]
    assert one.abs().max() > 0
    assert ((one - two).abs().max() / one.abs().max()).item() <= 2e-6


def test_with_a_layout_values_are_as_they_are_stored(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "deep.tif"
    tifffile.imwrite(path, WIDE[:, :, 0], photometric="minisblack")
    rows = open_source(path, 1, "HW").read(0, 53)
    assert rows.dtype == torch.uint16
    assert np.array_equal(rows[0, 0].numpy(), WIDE[:, :, 0])
    picture("I;16", 53, 70).save(path, compression="tiff_lzw")
    with pytest.raises(ImageError, match="imagecodecs"):  # and not 8 bits of it
        open_source(path, 1, "HW")


@pytest.mark.parametrize("how", ["tiff_lzw", "packbits", "jpeg"])
def test_a_tiff_falls_through_the_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    pytest.importorskip("tifffile")
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    path = tmp_path / "image.tif"
    picture("RGB", 53, 70).save(path, compression=how)
    assert_same_pixels(path)
    monkeypatch.setitem(sys.modules, "pyvips", None)
    assert_same_pixels(path)


def test_the_last_error_names_every_reader_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tifffile")
    pytest.importorskip("zarr")
    monkeypatch.setitem(sys.modules, "pyvips", None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = tmp_path / "image.tif"
    picture("RGB", 53, 70).save(path, compression="tiff_lzw")
    with pytest.raises(ImageError) as caught:
        open_source(path, 3)
    said = str(caught.value)
    assert "\n" not in said
    assert said.count(str(path)) <= 2
    for reason in (
        "raise PIL.Image.MAX_IMAGE_PIXELS if the file is trusted (by Pillow)",
        "pip install 'pyvips[binary]' (by libvips)",
        "imagecodecs",
        "(by tifffile)",
    ):
        assert reason in said, said
