"""Images are found, read and prepared as timm does it, and bad ones are refused in one line."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.readers.reader_image_folder import find_images_and_targets

from convmixer_fast.arch import VARIANTS
from convmixer_fast.inference.images import (
    ImageError,
    LeftOut,
    find_images,
    natural_key,
    read_image,
)
from convmixer_fast.inference.preprocessing import INTERPOLATIONS, Preprocessing

SIZES = [
    (500, 333),
    (333, 500),
    (224, 224),
    (233, 233),
    (1, 1),
    (3, 2),
    (17, 211),
    (231, 640),
    (640, 427),
]


def random_image(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed + 1000 * width + height)
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    # Blocks of a few pixels beside noise: filters and crops show at edges and in flat parts.
    coarse = (
        rng.integers(0, 256, (height // 5 + 1, width // 5 + 1, channels)).repeat(5, 0).repeat(5, 1)
    )
    noise = rng.integers(-30, 31, (height, width, channels))
    pixels = (coarse[:height, :width] + noise).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels, mode)


def timm_transform(preprocessing: Preprocessing):
    config = resolve_data_config(
        {
            "input_size": preprocessing.input_size,
            "crop_pct": preprocessing.crop_pct,
            "interpolation": preprocessing.interpolation,
            "mean": preprocessing.mean,
            "std": preprocessing.std,
        }
    )
    return create_transform(**config, is_training=False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 0.96, 1.0, 1.3])
def test_pixels_equal_timm(size, crop_pct):
    image = random_image(*size)
    ours = Preprocessing(crop_pct=crop_pct)
    assert torch.equal(ours(image), timm_transform(ours)(image))


@pytest.mark.parametrize(
    "input_size", [(3, 50, 47), (3, 192, 288), (3, 7, 300), (3, 32, 32), (3, 225, 224)]
)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop_pct", [0.9, 1.0, 1.37])
def test_pixels_equal_timm_for_other_input_sizes(input_size, size, crop_pct):
    image = random_image(*size)
    ours = Preprocessing(input_size=input_size, crop_pct=crop_pct)
    tensor = ours(image)
    assert tensor.shape == input_size
    assert tensor.is_contiguous()
    assert tensor.dtype == torch.float32
    assert torch.equal(tensor, timm_transform(ours)(image))


@pytest.mark.parametrize("interpolation", sorted(INTERPOLATIONS))
def test_pixels_equal_timm_for_every_filter(interpolation):
    image = random_image(301, 199)
    ours = Preprocessing((3, 96, 96), interpolation=interpolation, mean=(0.5,), std=(0.1, 0.2, 0.3))
    assert torch.equal(ours(image), timm_transform(ours)(image))


@pytest.mark.parametrize("size", SIZES)
def test_one_channel_pixels_equal_timm(size):
    image = random_image(*size, mode="L")
    ours = Preprocessing((1, 64, 64), mean=(0.3,), std=(0.2,))
    assert torch.equal(ours(image), timm_transform(ours)(image))


@pytest.mark.parametrize("seed", range(30))
def test_pixels_equal_timm_at_random_shapes(seed):
    rng = np.random.default_rng(seed)
    width, height = (int(v) for v in rng.integers(1, 400, 2))
    rows, cols = (int(v) for v in rng.integers(1, 150, 2))
    ours = Preprocessing((3, rows, cols), crop_pct=float(rng.uniform(0.3, 1.0)))
    image = random_image(width, height)
    assert torch.equal(ours(image), timm_transform(ours)(image))


@pytest.mark.parametrize("name", VARIANTS)
def test_configuration_resolves_as_timm_resolves_it(name):
    cfg = VARIANTS[name].pretrained_cfg
    theirs = resolve_data_config(pretrained_cfg=cfg)
    ours = Preprocessing.from_cfg(cfg)
    assert theirs.pop("crop_mode") == "center"
    assert theirs == {k: getattr(ours, k) for k in theirs}
    args = {
        "img_size": 288,
        "crop_pct": 0.9,
        "mean": [0.5],
        "std": [0.25],
        "interpolation": "bilinear",
    }
    theirs = resolve_data_config(args, pretrained_cfg=cfg)
    assert theirs.pop("crop_mode") == "center"
    ours = Preprocessing.from_cfg(cfg, **args)
    assert theirs == {k: getattr(ours, k) for k in theirs}


def test_one_channel_model_averages_the_configured_mean():
    ours = Preprocessing.from_cfg(VARIANTS["convmixer_768_32"].pretrained_cfg, in_chans=1)
    assert ours.input_size == (1, 224, 224)
    assert ours.mean == pytest.approx((0.449,))
    assert ours.std == pytest.approx((0.226,))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"input_size": (2, 8, 8)}, "1 or 3 channels"),
        ({"input_size": (3, 0, 8)}, "positive"),
        ({"input_size": (8, 8)}, "input_size"),
        ({"crop_pct": 0.0}, "crop_pct"),
        ({"crop_pct": float("nan")}, "crop_pct"),
        ({"crop_pct": 225.0}, "crop_pct"),
        ({"interpolation": "magic"}, "magic"),
        ({"mean": (0.5, 0.5)}, "mean has 2 values for 3 channels"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be positive"),
        ({"mean": (float("nan"),)}, "mean must be finite"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        Preprocessing.from_cfg(None, **settings)


def test_crop_modes_other_than_center_are_refused():
    with pytest.raises(ValueError, match="squash"):
        Preprocessing.from_cfg({"crop_mode": "squash"})


def test_a_thread_thin_image_is_refused_before_it_fills_the_memory():
    with pytest.raises(ValueError, match="too long and thin"):
        Preprocessing()(Image.new("RGB", (200_000, 1)))


# Files


def write_modes(folder: Path) -> dict[str, Path]:
    """One file of each kind that a folder of photographs holds."""
    rgb, rng = random_image(61, 45), np.random.default_rng(3)
    images = {
        "rgb.png": rgb,
        "rgb.jpg": rgb,
        "grey.jpg": random_image(61, 45, "L"),
        "grey.png": random_image(61, 45, "L"),
        "palette.png": rgb.quantize(40),
        "rgba.png": random_image(61, 45, "RGBA"),
        "cmyk.jpg": random_image(61, 45, "CMYK"),
        "bilevel.png": random_image(61, 45, "L").convert("1"),
        "sixteen.png": Image.fromarray(rng.integers(0, 65536, (45, 61)).astype(np.uint16)),
    }
    for name, image in images.items():
        image.save(folder / name)
    palette = rgb.quantize(8)
    palette.save(folder / "transparent.png", transparency=3)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    rgb.save(folder / "turned.jpg", exif=exif)
    return {p.name: p for p in folder.iterdir()}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_file_gives_timms_pixels(tmp_path, channels):
    files = write_modes(tmp_path)
    assert len(files) == 11
    ours = Preprocessing.from_cfg({"mean": (0.4,), "std": (0.3,)}, input_size=(channels, 40, 40))
    theirs = timm_transform(ours)
    for name, path in files.items():
        with Image.open(path) as image:
            expected = theirs(image.convert("L" if channels == 1 else "RGB"))
        assert torch.equal(ours(read_image(path, channels)), expected), name


def test_orientation_tags_are_left_alone_as_timm_leaves_them(tmp_path):
    assert read_image(write_modes(tmp_path)["turned.jpg"]).size == (61, 45)


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return head + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def bad_images(folder: Path) -> dict[str, str]:
    """Broken files and what the complaint about each must hold."""
    random_image(64, 64).save(folder / "good.jpg")
    random_image(64, 64).save(folder / "good.png")
    (folder / "text.jpg").write_text("this is not a picture\n")
    (folder / "cut.jpg").write_bytes((folder / "good.jpg").read_bytes()[:900])
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:900])
    (folder / "empty.png").write_bytes(b"")
    (folder / "bomb.png").write_bytes(png_header(60_000, 60_000))
    (folder / "big.png").write_bytes(png_header(10_000, 10_000))
    (folder / "headless.png").write_bytes(png_header(0, 10))
    (folder / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "folder.jpg").mkdir()
    return {
        "text.jpg": "not an image",
        "cut.jpg": "damaged image (image file is truncated",
        "cut.png": "damaged image",
        "empty.png": "the file is empty",
        "bomb.png": "decompression bomb",
        "big.png": "decompression bomb",
        "headless.png": "image",
        "script.jpg": "not an image",
        "folder.jpg": "directory",
        "missing.jpg": "No such file",
    }


@pytest.mark.filterwarnings("error")
def test_bad_files_are_named_with_the_reason_in_one_line(tmp_path):
    for name, says in bad_images(tmp_path).items():
        with pytest.raises(ImageError) as caught:
            read_image(tmp_path / name)
        message = str(caught.value)
        assert says in message, message
        assert str(tmp_path / name) in message
        assert "\n" not in message


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damage_anywhere_in_a_file_is_an_image_error_or_an_image(tmp_path):
    rng = np.random.default_rng(0)
    failures = 0
    for suffix in (".png", ".jpg", ".gif", ".bmp", ".tiff", ".webp"):
        random_image(40, 30).save(tmp_path / f"good{suffix}")
        content = (tmp_path / f"good{suffix}").read_bytes()
        for _ in range(40):
            damaged = bytearray(content)
            for at in rng.integers(0, len(content), 12):
                damaged[at] = rng.integers(0, 256)
            path = tmp_path / f"bad{suffix}"
            path.write_bytes(damaged[: rng.integers(1, len(content) + 1)])
            try:
                assert read_image(path).mode == "RGB"
            except ImageError:
                failures += 1
    assert failures > 100


def test_only_one_and_three_channels_are_read(tmp_path):
    random_image(8, 8).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="in_chans=4"):
        read_image(tmp_path / "a.png", in_chans=4)


def test_folders_are_searched_in_timms_order(tmp_path):
    names = ["b/img10.png", "b/img2.PNG", "A/x.jpeg", "a1/c.jpg", "z.JPG", "10.png", "9.png"]
    for name in [*names, "b/notes.txt", "c.gif", "noextension"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = find_images([tmp_path], left_out=LeftOut())
    assert sorted(str(p.relative_to(tmp_path)) for p in found) == sorted(names)
    theirs, _ = find_images_and_targets(str(tmp_path))
    assert [str(p) for p in found] == [path for path, _ in theirs]


def test_paths_keep_their_order_and_stand_once(tmp_path):
    for name in ("one/b.png", "one/a.png", "two/c.png", "odd.xyz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = find_images(
        [tmp_path / "two", tmp_path / "odd.xyz", tmp_path / "one/b.png", tmp_path / "one"]
    )
    assert [p.name for p in found] == ["c.png", "odd.xyz", "b.png", "a.png"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_link_to_a_parent_folder_ends(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(b"x")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    assert [p.name for p in find_images([tmp_path])] == ["a.png"]


def test_missing_paths_and_empty_folders_are_named(tmp_path):
    with pytest.raises(ImageError, match="nowhere: no such file or folder"):
        find_images([tmp_path / "nowhere"])
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ImageError, match=r"no images in .*: looked for .png, .jpg, .jpeg"):
        find_images([tmp_path])


def test_natural_key_compares_any_two_names():
    names = ["a10", "a9", "10", "9a", "", "\u0663", "\u00b2"]
    assert sorted(["a10", "a9", "A8"], key=natural_key) == ["A8", "a9", "a10"]
    assert len(sorted(names, key=natural_key)) == len(names)


def test_a_given_place_is_written_and_nothing_beside_it():
    prepare = Preprocessing((3, 24, 20))
    picture = random_image(50, 40)
    around = torch.full((3, 3, 24, 20), 7.0)
    assert prepare(picture, around[1]).data_ptr() == around[1].data_ptr()
    assert torch.equal(around[1], prepare(picture))
    assert bool((around[[0, 2]] == 7).all())


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "ICO"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_every_format_is_read_as_pillow_converts_it(tmp_path, name, mode):
    if mode == "RGBA" and name in ("JPEG", "BMP", "PPM"):
        mode = "RGB"
    path = tmp_path / "image"
    random_image(40, 30, mode).save(path, name)
    for channels, kind in ((3, "RGB"), (1, "L")):
        with Image.open(path) as expected:
            assert np.array_equal(read_image(path, channels), expected.convert(kind))
        # It is whole: nothing is read later, from a file that is closed.
        assert read_image(path, channels).resize((5, 5)).size == (5, 5)
