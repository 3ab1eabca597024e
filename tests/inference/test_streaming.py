"""Streaming gives what the whole image gives: for every size, cut, source and interruption."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fresh_python
import numpy as np
import pytest
import torch
from fakes import triton as fake_triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convmixer_fast as cf
from convmixer_fast.backends.cpu import native
from convmixer_fast.inference import (
    ImageError,
    Preprocessing,
    StreamStats,
    class_activation_map,
    open_source,
    overlay,
    read_image,
    stream,
    write_overlay,
)
from convmixer_fast.inference.bands import Axis, Plan, blocks_of
from convmixer_fast.inference.sources import VipsSource
from convmixer_fast.ops.dispatch import runs
from convmixer_fast.ops.mixer import MIXER_STACK
from convmixer_fast.testing import trained_like_

HAS_ENGINE = native.load() is not None
needs_engine = pytest.mark.skipif(not HAS_ENGINE, reason=native.why_unavailable() or "built")
#: Logits and, where bits may differ, maps: relative to the largest value.
CLOSE = 2e-6


def trained(
    dim: int = 12,
    depth: int = 3,
    k: int = 5,
    p: int = 3,
    act: type[nn.Module] = nn.GELU,
    in_chans: int = 3,
    **kwargs: Any,
) -> cf.ConvMixer:
    model = cf.ConvMixer(dim, depth, k, p, in_chans, num_classes=5, act_layer=act, **kwargs)
    trained_like_(model, (2, in_chans, 8 * p, 8 * p))
    return model


def whole(model: cf.ConvMixer, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        features = model.forward_features(x)
        return features, model.forward_head(features)


def distance(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape, f"{tuple(got.shape)}, not {tuple(expected.shape)}"
    assert got.dtype == expected.dtype
    assert expected.abs().max() > 0
    return ((got.double() - expected.double()).abs().max() / expected.abs().max()).item()


def assert_streams(model: cf.ConvMixer, x: Tensor, exact: bool = HAS_ENGINE, **cut: Any) -> None:
    """Features and logits of ``x``, bit for bit where it is said and asked for."""
    features, logits = whole(model, x)
    stats = StreamStats()
    got = stream(model, x, "features", stats=stats, **cut)
    off = distance(got, features)
    assert stats.plan is not None
    if exact and stats.plan.exact:
        assert torch.equal(got, features), f"{off:.2e} off with {stats.plan}"
    assert off <= CLOSE, f"{off:.2e} off with {stats.plan}"
    off = distance(stream(model, x, **cut), logits)
    assert off <= CLOSE, f"logits {off:.2e} off with {stats.plan}"


@pytest.fixture(scope="module")
def model() -> cf.ConvMixer:
    return trained()


# Sizes and cuts


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("cut", [{}, {"band_rows": 1}, {"band_rows": 3, "strip_columns": 2}])
@pytest.mark.parametrize("k", [1, 2, 4, 5, 9, 31])
def test_every_kernel_size_streams_as_a_whole(k: int, cut: dict[str, int], backend: str) -> None:
    with cf.use_backend(backend):
        assert_streams(trained(8, 3, k), torch.randn(1, 3, 41, 38), backend == "auto", **cut)


@pytest.mark.parametrize(
    ("height", "width"), [(3, 3), (3, 61), (61, 3), (5, 4), (20, 33), (100, 31)]
)
@pytest.mark.parametrize("rows", [1, 2, 7, 1000])
def test_every_size_and_band(model: cf.ConvMixer, height: int, width: int, rows: int) -> None:
    assert_streams(model, torch.randn(1, 3, height, width), band_rows=rows)


def test_a_large_image_as_a_photograph_is() -> None:
    assert_streams(trained(16, 4, 9, 7), torch.randn(1, 3, 2000, 1500))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    k=st.integers(1, 12),
    p=st.integers(1, 4),
    depth=st.integers(0, 4),
    images=st.integers(1, 3),
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    rest=st.integers(0, 3),
    rows=st.integers(1, 12),
    columns=st.none() | st.integers(1, 12),
)
def test_any_network_on_any_image_in_any_cut(
    k: int,
    p: int,
    depth: int,
    images: int,
    height: int,
    width: int,
    rest: int,
    rows: int,
    columns: int | None,
) -> None:
    model = trained(4, depth, k, p) if depth else cf.ConvMixer(4, 0, k, p, num_classes=5).eval()
    x = torch.randn(images, 3, height * p + min(rest, p - 1), width * p + min(rest, p - 1))
    assert_streams(model, x, band_rows=rows, strip_columns=columns)


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Tanh])
def test_activations_that_are_fused_and_one_that_is_not(act: type[nn.Module]) -> None:
    assert_streams(trained(act=act), torch.randn(2, 3, 40, 31), band_rows=4)


@needs_engine
@pytest.mark.parametrize("width", [16, 25, 32, 50])
def test_joined_pixels_keep_their_bits_where_bands_hold_whole_groups(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 256 channels: wide enough for Strassen's algorithm.
    monkeypatch.setenv("CONVMIXER_FAST_STRASSEN", "1")
    model = trained(256, 2, 9, 2)
    assert native.joined_pixels(256, 256) > 1
    x = torch.randn(1, 3, 60, 2 * width)
    features, _ = whole(model, x)
    stats = StreamStats()
    got = stream(model, x, "features", band_rows=4, stats=stats)
    assert stats.plan is not None
    if width % 16 == 0:
        assert stats.plan.exact
    assert distance(got, features) <= CLOSE
    if stats.plan.exact:
        assert torch.equal(got, features)


@needs_engine
def test_a_few_pixels_at_the_end_are_multiplied_as_in_the_whole_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The stem's patches have 300 values: enough for Strassen's algorithm, but not for 4 pixels.
    monkeypatch.setenv("CONVMIXER_FAST_STRASSEN", "1")
    model = trained(24, 2, 9, 10)
    x = torch.randn(1, 3, 250, 40)
    features, _ = whole(model, x)
    stats = StreamStats()
    got = stream(model, x, "features", band_rows=8, stats=stats)
    assert stats.plan is not None
    assert torch.equal(got, features) or not stats.plan.exact, f"{distance(got, features):.2e} off"
    assert distance(got, features) <= CLOSE


@needs_engine
def test_without_joined_pixels_every_cut_keeps_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVMIXER_FAST_STRASSEN", "0")
    model, x = trained(256, 2, 9, 2), torch.randn(1, 3, 40, 42)
    features, _ = whole(model, x)
    got = stream(model, x, "features", band_rows=3, strip_columns=5)
    assert torch.equal(got, features), f"{distance(got, features):.2e} off"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model = trained(16, 3, 5, 3).to(dtype)
    x = torch.randn(2, 3, 50, 40).to(dtype)
    features, logits = whole(model, x)
    got = stream(model, x, "features", band_rows=4)
    unit = torch.finfo(dtype).eps
    assert distance(got, features) <= 2 * unit
    assert distance(stream(model, x, band_rows=4), logits) <= 4 * unit


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax"])
def test_every_pooling(pool: str) -> None:
    assert_streams(trained(global_pool=pool), torch.randn(2, 3, 40, 31), band_rows=4)


def test_the_cut_changes_no_bit_of_the_logits(model: cf.ConvMixer) -> None:
    x = torch.randn(1, 3, 90, 60)
    first = stream(model, x)
    for rows in (1, 2, 5, 13):
        assert torch.equal(stream(model, x, band_rows=rows), first), f"bands of {rows} rows"


@pytest.mark.parametrize("cut", [{"band_rows": 4}, {"band_rows": 4, "strip_columns": 3}])
@pytest.mark.parametrize("k", [4, 5])
def test_gpu_kernels_are_given_bands(k: int, cut: dict[str, int]) -> None:
    model, x = trained(k=k), torch.randn(2, 3, 40, 31)
    with cf.use_backend("reference"):
        features, _ = whole(model, x)
    stats = StreamStats()
    with fake_triton.installed() as kernels:
        got = stream(model, x, "features", stats=stats, **cut)
    assert stats.backend == "modules"
    for name in ("patch_embed", "depthwise_mix", "pointwise_mix"):
        assert kernels.calls[name] > 3, f"{name} ran {kernels.calls[name]} times"
    assert distance(got, features) <= CLOSE


def test_an_optimized_model_streams() -> None:
    timm = pytest.importorskip("timm")
    peer = timm.models.convmixer.ConvMixer(12, 2, 5, 3, num_classes=5).eval()
    x = torch.randn(1, 3, 40, 31)
    with torch.inference_mode():
        expected = peer(x)
    assert distance(stream(cf.optimize(peer), x, band_rows=3), expected) <= CLOSE


# Sources


def image(height: int = 50, width: int = 41, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def normalised(pixels: np.ndarray[Any, Any]) -> Tensor:
    recipe = Preprocessing()
    x = torch.from_numpy(pixels).permute(2, 0, 1).float().div(255)[None]
    view = (1, 3, 1, 1)
    return (x - torch.tensor(recipe.mean).view(view)) / torch.tensor(recipe.std).view(view)


def sources(pixels: np.ndarray[Any, Any], folder: Path) -> Iterator[tuple[str, Any]]:
    """The same image in every form that can be had here."""
    yield "array", pixels
    yield "planar array", np.ascontiguousarray(pixels.transpose(2, 0, 1))
    yield "tensor", torch.from_numpy(pixels).permute(2, 0, 1)
    yield "floats", normalised(pixels)
    yield "PIL", Image.fromarray(pixels)
    yield "bands", (pixels[i : i + 7] for i in range(0, len(pixels), 7))
    np.save(folder / "image.npy", pixels)
    yield "npy", folder / "image.npy"
    Image.fromarray(pixels).save(folder / "image.png")
    yield "png", folder / "image.png"


def test_every_source_gives_the_same_answer(model: cf.ConvMixer, tmp_path: Path) -> None:
    pixels = image()
    _, logits = whole(model, normalised(pixels))
    for name, source in sources(pixels, tmp_path):
        off = distance(stream(model, source, band_rows=3), logits)
        assert off <= CLOSE, f"{name}: {off:.2e} off"


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"compression": "zlib", "rowsperstrip": 7},
        {"compression": "zlib", "tile": (16, 32)},
        {"tile": (32, 16), "bigtiff": True},
        {"planarconfig": "separate", "photometric": "rgb"},
    ],
)
def test_tiff_files_striped_and_tiled(
    model: cf.ConvMixer, tmp_path: Path, how: dict[str, Any]
) -> None:
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("zarr")
    pixels, path = image(90, 70), tmp_path / "image.tif"
    planar = how.get("planarconfig") == "separate"
    tifffile.imwrite(path, pixels.transpose(2, 0, 1) if planar else pixels, **how)
    expected = stream(model, pixels, band_rows=3)
    assert torch.equal(stream(model, path, band_rows=3), expected)


def test_zarr_arrays_in_chunks_and_where_features_go(model: cf.ConvMixer, tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    pixels = image(90, 70)
    stored = zarr.open(
        str(tmp_path / "image.zarr"), mode="w", shape=pixels.shape, chunks=(13, 20, 3), dtype="u1"
    )
    stored[:] = pixels
    features = stream(model, pixels, "features", band_rows=4)
    for source in (stored, tmp_path / "image.zarr"):
        got = stream(model, source, "features", band_rows=4, out=tmp_path / "map.zarr")
        assert torch.equal(torch.from_numpy(got[:]), features)


def test_a_chunk_is_decoded_once(model: cf.ConvMixer) -> None:
    class Chunked:
        shape, dtype, chunks = (90, 30, 3), np.dtype("u1"), (20, 30, 3)
        asked: list[int] = []  # noqa: RUF012

        def __getitem__(self, at: tuple[slice, ...]) -> np.ndarray[Any, Any]:
            self.asked.append(at[0].start)
            return image(90, 30)[at]

    chunked = Chunked()
    got = stream(model, chunked, band_rows=2)
    assert chunked.asked == [0, 20, 40, 60, 80]
    assert torch.equal(got, stream(model, image(90, 30), band_rows=2))


def test_sixteen_bit_and_grey_images() -> None:
    model = trained(in_chans=1)
    grey = np.random.default_rng(0).integers(0, 2**16, (40, 31), dtype=np.uint16)
    recipe = Preprocessing(input_size=(1, 224, 224), mean=(0.4,), std=(0.3,))
    x = (torch.from_numpy(grey.astype(np.float32)) / 65535 - 0.4) / 0.3
    _, logits = whole(model, x[None, None])
    assert distance(stream(model, grey, preprocessing=recipe, band_rows=2), logits) <= CLOSE


def test_several_images_pass_together(model: cf.ConvMixer) -> None:
    pair = [image(seed=1), image(seed=2)]
    together = stream(model, pair, "features", band_rows=3)
    for i, one in enumerate(pair):
        assert torch.equal(together[i : i + 1], stream(model, one, "features", band_rows=3))
        logits = stream(model, pair, band_rows=3)[i : i + 1]
        assert distance(logits, stream(model, one, band_rows=3)) <= CLOSE
    with pytest.raises(ValueError, match="must have one size"):
        open_source([image(), image(51)], 3)


@pytest.mark.parametrize("cut", [{}, {"band_rows": 3, "strip_columns": 5}])
def test_a_list_of_several_sizes_keeps_its_order(
    model: cf.ConvMixer, tmp_path: Path, cut: dict[str, int]
) -> None:
    sizes = [(50, 41), (20, 41), (50, 41), (50, 40), (20, 41)]
    images = [image(*size, seed=i) for i, size in enumerate(sizes)]
    several = np.stack([image(20, 41, seed=i) for i in (8, 9)])
    np.save(tmp_path / "a.npy", images[2])
    listed = [*images[:2], tmp_path / "a.npy", *images[3:], several, iter([image(31), image(9)])]
    alone = [*images, *several, np.concatenate([image(31), image(9)])]
    stats = StreamStats()
    for output in ("logits", "embedding"):
        found = stream(model, listed, output, stats=stats, **cut)
        listed[-1] = iter([image(31), image(9)])
        expected = torch.cat([stream(model, one, output, **cut) for one in alone])
        assert found.shape == expected.shape
        assert distance(found, expected) <= CLOSE
        # Whole patches of 50, 50, 20 and 40 rows: each size passes once.
        assert stats.rows == sum(n // 3 * 3 for n in (50, 50, 20, 40))
    with torch.inference_mode():
        pooled = model.forward_head(model.forward_features(normalised(images[3])), pre_logits=True)
    assert distance(found[3:4], pooled) <= CLOSE
    listed = [*images, several]
    maps = stream(model, listed, "features", **cut)
    assert [len(m) for m in maps] == [1] * 5 + [2]
    for one, got in zip(listed, maps, strict=True):
        assert torch.equal(got, stream(model, one, "features", **cut))
    drawn = stream(model, listed, "heatmap", target=1, **cut)
    for one, heatmap in zip(listed, drawn, strict=True):
        expected = stream(model, one, "heatmap", target=1, **cut)
        assert distance(heatmap.scores, expected.scores) <= CLOSE
        off = (heatmap.mean() - heatmap.logits[:, 1]).abs().max()
        assert off <= CLOSE * heatmap.scores.abs().max()
        assert (heatmap.size, heatmap.cell) == (expected.size, expected.cell)
        assert np.array_equal(heatmap.pictures, expected.pictures)


@pytest.mark.parametrize("name", ["out", "checkpoint"])
def test_one_file_is_not_for_images_of_several_sizes(
    model: cf.ConvMixer, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ValueError, match=f"{name} .* is for images of one size, .* have 2"):
        stream(model, [image(), image(51)], "features", **{name: tmp_path / "map.npy"})
    assert not list(tmp_path.iterdir())


LIBVIPS = pytest.mark.skipif(find_spec("pyvips") is None, reason="pyvips is not installed")


@LIBVIPS
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_libvips_decodes_from_top_to_bottom_what_pillow_reads(
    tmp_path: Path, suffix: str, mode: str, in_chans: int
) -> None:
    path = tmp_path / f"image{suffix}"
    if suffix == ".jpg" and mode not in ("RGB", "L"):
        mode = "RGB"
    kind = "RGB" if suffix == ".webp" else mode
    smooth = Image.fromarray(image(30, 20)).resize((90, 131), Image.Resampling.BICUBIC)
    smooth.convert(kind).save(path, quality=90)
    source = VipsSource(path, in_chans)
    assert (source.channels, source.height, source.width) == (in_chans, 131, 90)
    steps = [0, 1, 17, 50, 51, 131]
    bands = [source.read(*pair) for pair in itertools.pairwise(steps)]
    assert [band.shape for band in bands] == [
        (1, in_chans, end - begin, 90) for begin, end in itertools.pairwise(steps)
    ]
    pixels = np.asarray(read_image(path, in_chans)).reshape(131, 90, in_chans)
    assert torch.equal(torch.cat(bands, 2)[0], torch.from_numpy(pixels.transpose(2, 0, 1).copy()))


@LIBVIPS
def test_libvips_goes_on_in_the_middle_and_in_another_thread(tmp_path: Path) -> None:
    pixels = image(2100, 40)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    source = VipsSource(tmp_path / "image.png", 3)
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(source.read, 1500, 2100).result()
    assert torch.equal(got[0], torch.from_numpy(pixels[1500:].transpose(2, 0, 1).copy()))


@LIBVIPS
def test_a_stream_of_a_photograph_is_that_of_its_pixels(
    model: cf.ConvMixer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = image(60, 45)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow does not read it
    got = stream(model, tmp_path / "image.png", band_rows=2)
    assert torch.equal(got, stream(model, pixels, band_rows=2))


@LIBVIPS
def test_a_photograph_that_ends_too_early_is_no_answer(model: cf.ConvMixer, tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    Image.fromarray(image(400, 300)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=r"cut\.jpg: rows \d+ to \d+: "):
        stream(model, path)


def test_formats_that_libvips_lacks_are_read_by_pillow(model: cf.ConvMixer, tmp_path: Path) -> None:
    pixels = image(60, 45)
    Image.fromarray(pixels).save(tmp_path / "image.bmp")
    assert torch.equal(stream(model, tmp_path / "image.bmp"), stream(model, pixels))
    (tmp_path / "none.bmp").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"none\.bmp: not an image"):
        stream(model, tmp_path / "none.bmp")


def test_without_libvips_large_files_say_what_to_install(
    model: cf.ConvMixer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyvips", None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.fromarray(image(60, 45)).save(tmp_path / "image.png")
    with pytest.raises(ImageError, match=r"libvips is needed .*pip install 'pyvips\[binary\]'"):
        stream(model, tmp_path / "image.png")


# What goes wrong


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: iter([]), "is empty"),
        (lambda: iter([image(2, 41)]), "2 rows of pixels are less than one patch"),
        (lambda: iter([image(9), image(9, 40)]), r"band 1 has \(images, channels, width\)"),
        (lambda: iter([image(9), image(9)[:, :, 0]]), "band 1 has shape"),
        (lambda: image(40, 2), "less than one patch of 3 x 3"),
        (lambda: np.zeros((9, 9, 4), np.uint8), "layout="),
        (lambda: Path("nowhere.png"), "no such file"),
        (lambda: object(), "cannot take an image from a object"),
        (lambda: [], "list of images is empty"),
        (lambda: np.zeros((9, 9, 3), np.complex64), "pixels cannot be"),
    ],
)
def test_sources_that_cannot_be_are_named_in_one_line(
    model: cf.ConvMixer, source: Any, message: str
) -> None:
    with pytest.raises((ImageError, ValueError, TypeError), match=message) as caught:
        stream(model, source())
    assert "\n" not in str(caught.value)


def test_an_iterator_that_ends_early_is_told(model: cf.ConvMixer) -> None:
    bands = (image(10) for _ in range(3))
    with pytest.raises(ImageError, match="ended after 30 rows of 100: it is too short"):
        stream(model, bands, height=100, band_rows=2)


def test_a_damaged_file_names_the_rows(model: cf.ConvMixer, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("zarr")
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, image(200, 70), compression="zlib", rowsperstrip=20)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(3000)
    path.write_bytes(content)
    with pytest.raises(ImageError, match=re.escape(str(path)) + ": rows"):
        stream(model, path, band_rows=2)


def test_a_model_that_trains_or_cannot_stream_is_refused(model: cf.ConvMixer) -> None:
    x = torch.randn(1, 3, 30, 30)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        stream(cf.ConvMixer(8, 1, 3, 3), x)
    with pytest.raises(TypeError, match=r"ConvMixer\.from_checkpoint"):
        stream(nn.Sequential(nn.Conv2d(3, 8, 3)).eval(), x)
    with pytest.raises(ValueError, match="output must be one of"):
        stream(model, x, "probabilities")
    with pytest.raises(ValueError, match="band_rows must be at least 1"):
        stream(model, x, band_rows=0)


# Memory


def test_max_memory_cuts_bands_then_strips_and_is_kept(model: cf.ConvMixer) -> None:
    x = torch.randn(1, 3, 60, 600)
    features, _ = whole(model, x)
    free, tight = StreamStats(), StreamStats()
    stream(model, x, stats=free)
    assert free.plan is not None
    for share in (2, 24):
        limit = free.plan.bytes // share
        got = stream(model, x, "features", max_memory=limit, stats=tight)
        assert tight.plan is not None
        assert tight.plan.bytes <= limit
        assert distance(got, features) <= CLOSE
    assert tight.plan.spilled
    assert tight.plan.columns < 200
    with pytest.raises(ValueError, match=r"max_memory of 1,000 bytes is too small.*need [\d,]+"):
        stream(model, x, max_memory=1000)


def test_memory_does_not_depend_on_the_height(model: cf.ConvMixer) -> None:
    example = torch.zeros(1, 12, 1, 1)
    blocks = blocks_of(model.blocks, model.stem[0], example)
    axis = Axis(3, 5, 1, 8)
    most = 0
    for _ in range(100):
        for down in axis.advance(8, last=False):
            first, _ = axis.kept(down.in_begin, down.out_begin)
            most = max(most, down.in_end - first)
    assert most == 8 + 5 - 1
    assert Plan.make(blocks, 1, 100, 0) == Plan.make(blocks, 1, 100, 0)


MEMORY = """
import sys
import zipfile
import numpy as np, torch
import convmixer_fast as cf
from convmixer_fast.inference import StreamStats
from pathlib import Path
height = int(sys.argv[1])
torch.manual_seed(0)
model = cf.ConvMixer(32, 2, 5, 4, num_classes=5).eval()
def bands():
    rng = np.random.default_rng(0)
    for i in range(height // 64):
        yield rng.integers(0, 256, (64, 512, 3), dtype=np.uint8)
def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
cf.stream(model, np.zeros((256, 512, 3), np.uint8), band_rows=16)
Path("/proc/self/clear_refs").write_text("5")
stats = StreamStats()
out = cf.stream(model, bands(), band_rows=16, stats=stats)
assert stats.height == height, stats
print(resident("VmHWM"))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_process_that_streams_does_not_grow_with_the_height() -> None:
    peaks = {}
    for height in (1024, 16384):
        result = fresh_python.run("-c", MEMORY, str(height))
        assert result.returncode == 0, result.stderr
        peaks[height] = int(result.stdout)
    assert peaks[16384] <= 1.03 * peaks[1024], f"kB by height: {peaks}"


# Interruptions


def cut_off(pixels: np.ndarray[Any, Any], after: int) -> Iterator[np.ndarray[Any, Any]]:
    """Bands of ``pixels``, and an end like Ctrl-C's."""
    for i in range(0, after, 10):
        yield pixels[i : i + 10]
    raise KeyboardInterrupt


@pytest.mark.parametrize("cut", [{}, {"strip_columns": 5}])
@pytest.mark.parametrize("output", ["logits", "features", "heatmap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_going_on_after_an_interruption_gives_the_same_bits(
    tmp_path: Path, output: str, cut: dict[str, int], dtype: torch.dtype
) -> None:
    model = trained().to(dtype)
    pixels, state = image(150, 60), tmp_path / "state"
    options: dict[str, Any] = {"band_rows": 2, "height": 150, "cell": 3, **cut}
    if output == "features":
        options["out"] = tmp_path / "map.npy"
    expected = stream(model, iter([pixels]), output, **options)
    if output == "features":
        expected = np.array(expected)
        options["out"].unlink()
    saving = {"checkpoint": state, "checkpoint_rows": 20}
    with pytest.raises(KeyboardInterrupt):
        stream(model, cut_off(pixels, 90), output, **options, **saving)
    assert state.exists()
    stats = StreamStats()
    got = stream(model, iter([pixels]), output, stats=stats, **options, **saving)
    assert 50 <= stats.resumed_at <= 90
    assert not state.exists()
    if output == "features":
        assert np.array_equal(np.array(got), expected)
    elif output == "heatmap":
        assert torch.equal(got.scores, expected.scores)
        assert torch.equal(got.logits, expected.logits)
        assert np.array_equal(got.pictures, expected.pictures)
    else:
        assert torch.equal(got, expected)


def test_a_checkpoint_of_another_run_is_not_gone_on_with(tmp_path: Path) -> None:
    model, state, pixels = trained(), tmp_path / "state", image(150, 60)
    saving: dict[str, Any] = {"checkpoint": state, "checkpoint_rows": 20, "height": 150}
    with pytest.raises(KeyboardInterrupt):
        stream(model, cut_off(pixels, 90), band_rows=2, **saving)
    with pytest.raises(ValueError, match="checkpoint of another run: its plan was"):
        stream(model, iter([pixels]), band_rows=3, **saving)
    with torch.no_grad():
        model.head.weight.add_(1)  # type: ignore[union-attr,operator]
    with pytest.raises(ValueError, match="checkpoint of another run: its weights was"):
        stream(model, iter([pixels]), band_rows=2, **saving)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_a_safetensors_file(tmp_path: Path, dtype: torch.dtype) -> None:
    model, state = trained().to(dtype), tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        stream(
            model, cut_off(image(150, 60), 90), "heatmap", band_rows=2, strip_columns=5, height=150,
            checkpoint=state, checkpoint_rows=20,
        )  # fmt: skip
    tensors = load_file(state)
    assert {"sum", "peak", "cells", "picture", "0-0", "0-1"} <= tensors.keys()
    assert tensors["sum"].dtype == torch.float64
    assert tensors["sum"].abs().min() > 0
    assert tensors["picture"].dtype == torch.uint8
    kept = [tensor for name, tensor in tensors.items() if "-" in name]
    # The engine computes narrow bfloat16 blocks in float32.
    whole = runs(MIXER_STACK, torch.device("cpu"), dtype, model.arch.dim)
    assert {tensor.dtype for tensor in kept} == {torch.float32 if whole else dtype}
    assert sum(float(tensor.float().abs().sum()) for tensor in kept) > 0


def older_checkpoint(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("head.json", "{}")


def cut_checkpoint(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "is no checkpoint of a stream: delete it"),
        (lambda path: path.write_bytes(b"no checkpoint"), "is no checkpoint of a stream"),
        (cut_checkpoint, "is no checkpoint of a stream"),
        (lambda path: save_file({"sum": torch.ones(2)}, path), "is no checkpoint of a stream"),
        (older_checkpoint, "is a checkpoint of an older version of convmixer_fast"),
    ],
    ids=["empty", "text", "cut short", "weights", "older version"],
)
def test_what_is_no_checkpoint_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    model, state, pixels = trained(), tmp_path / "state", image(150, 60)
    saving: dict[str, Any] = {"checkpoint": state, "checkpoint_rows": 20, "height": 150}
    with pytest.raises(KeyboardInterrupt):
        stream(model, cut_off(pixels, 90), band_rows=2, **saving)
    damage(state)
    with pytest.raises(ValueError, match=message):
        stream(model, iter([pixels]), band_rows=2, **saving)


@pytest.mark.parametrize("name", ["map.npy", "map.zarr"])
def test_features_have_their_name_only_when_they_are_complete(
    model: cf.ConvMixer, tmp_path: Path, name: str
) -> None:
    if name.endswith("zarr"):
        pytest.importorskip("zarr")
    pixels, out, state = image(150, 60), tmp_path / name, tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        stream(model, cut_off(pixels, 90), "features", out=out, band_rows=2, height=150)
    assert list(tmp_path.iterdir()) == []
    saving: dict[str, Any] = {"checkpoint": state, "checkpoint_rows": 20, "height": 150}
    with pytest.raises(KeyboardInterrupt):
        stream(model, cut_off(pixels, 90), "features", out=out, band_rows=2, **saving)
    assert not out.exists()
    (partial,) = (p for p in tmp_path.iterdir() if p != state)
    partial.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is not there: delete the checkpoint"):
        stream(model, iter([pixels]), "features", out=out, band_rows=2, **saving)
    (tmp_path / "elsewhere").rename(partial)
    got = stream(model, iter([pixels]), "features", out=out, band_rows=2, **saving)
    assert torch.equal(torch.from_numpy(got[:]), stream(model, pixels, "features", band_rows=2))
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_is_not_there_is_named(model: cf.ConvMixer, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"missing/map\.npy"):
        stream(model, image(), "features", out=tmp_path / "missing" / "map.npy")


KILLED = """
import sys, time
import numpy as np, torch
import convmixer_fast as cf
weights, image, state, slow = sys.argv[1:]
model = cf.ConvMixer.from_checkpoint(weights)
pixels = np.load(image)
def bands():
    for i in range(0, len(pixels), 6):
        if slow == "slow" and i == 120:
            print("here", flush=True)
            time.sleep(60)
        yield pixels[i : i + 6]
out = cf.stream(model, bands(), height=len(pixels), band_rows=2, checkpoint=state,
                checkpoint_rows=12)
print(out.numpy().tobytes().hex())
"""


def test_a_killed_process_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    model, pixels = trained(), image(240, 60)
    weights, stored, state = tmp_path / "m.safetensors", tmp_path / "i.npy", tmp_path / "state"
    cf.save_checkpoint(model, weights)
    np.save(stored, pixels)
    arguments = ("-c", KILLED, str(weights), str(stored), str(state))
    process = fresh_python.start(*arguments, "slow", stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
    finally:
        process.kill()
        process.wait()
    assert state.exists()
    result = fresh_python.run(*arguments, "fast")
    assert result.returncode == 0, result.stderr
    expected = stream(model, pixels, band_rows=2)
    assert result.stdout.strip() == expected.numpy().tobytes().hex()


# Heatmaps


def test_the_mean_of_a_class_activation_map_is_the_logit() -> None:
    model, x = trained(), torch.randn(2, 3, 40, 31)
    for target in (None, 3):
        found = class_activation_map(model, x, target)
        assert found.scores.shape == (2, 13, 10)
        _, logits = whole(model, x)
        expected = logits.gather(1, found.classes[:, None])[:, 0]
        assert distance(found.scores.mean((1, 2)), expected) <= CLOSE
        assert distance(found.mean(), expected) <= CLOSE
        if target is None:
            assert torch.equal(found.classes, logits.argmax(1))


@pytest.mark.parametrize("cut", [{}, {"strip_columns": 4}])
@pytest.mark.parametrize("cell", [1, 3, 4])
def test_a_streamed_heatmap_is_the_map_in_cells(cell: int, cut: dict[str, int]) -> None:
    model, x = trained(), torch.randn(2, 3, 40, 31)
    fine = class_activation_map(model, x).scores
    found = stream(model, x, "heatmap", band_rows=3, cell=cell, **cut)
    rows, columns = -(-13 // cell), -(-10 // cell)
    expected = torch.stack(
        [
            fine[:, i * cell : (i + 1) * cell, j * cell : (j + 1) * cell].mean((1, 2))
            for i in range(rows)
            for j in range(columns)
        ],
        1,
    ).view(2, rows, columns)
    assert distance(found.scores, expected) <= CLOSE
    logits = found.logits.gather(1, found.classes[:, None])[:, 0]
    assert distance(found.mean(), logits) <= CLOSE
    assert found.size == (39, 30)


def test_a_heatmap_needs_a_mean_and_a_classifier() -> None:
    with pytest.raises(ValueError, match="needs mean pooling"):
        class_activation_map(trained(global_pool="max"), torch.randn(1, 3, 9, 9))
    bare = cf.ConvMixer(8, 1, 3, 3, num_classes=0).eval()
    with pytest.raises(ValueError, match="needs a linear classifier"):
        stream(bare, torch.randn(1, 3, 9, 9), "heatmap")
    with pytest.raises(ValueError, match="there is no class 5"):
        class_activation_map(trained(), torch.randn(1, 3, 9, 9), 5)


def test_an_overlay_is_bright_where_the_class_is(tmp_path: Path) -> None:
    scores = torch.zeros(4, 6)
    scores[3, 0] = 9.0
    picture = np.asarray(overlay(scores, Image.new("RGB", (60, 40), "grey"))).astype(int)
    assert picture.shape == (40, 60, 3)
    assert picture[35:, :5].mean() > picture[:5, 40:].mean() + 50
    write_overlay(tmp_path / "map.png", scores)
    with Image.open(tmp_path / "map.png") as read:
        assert min(read.size) >= 4
        assert read.size[0] / read.size[1] == 6 / 4
    with pytest.raises(OSError, match=r"map\.png") as caught:
        write_overlay(tmp_path / "missing" / "map.png", scores)
    assert "partial" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "map.png"]


# The command


def test_the_command_prints_classes_memory_and_speed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from convmixer_fast import cli

    monkeypatch.chdir(tmp_path)
    cf.save_checkpoint(trained(), "m.safetensors")
    np.save("big.npy", image(200, 60))
    base = ["stream", "big.npy", "--checkpoint", "m.safetensors"]
    assert cli.main(base) == 0
    shown = capsys.readouterr()
    assert len(re.findall(r"\d+\.\d+%", shown.out)) == 5
    assert re.search(
        r"198 x 60 px in [\d.]+ s \([\d,]+ rows/s\); peak memory [\d,]+ MB", shown.err
    ) or re.search(r"200 x 60 px in [\d.]+ s \([\d,]+ rows/s\); peak memory [\d,]+ MB", shown.err)
    assert cli.main([*base, "--output", "map.npy", "--max-memory", "1MB", "--resume"]) == 0
    assert np.load("map.npy").shape == (1, 12, 66, 20)
    assert not Path("big.npy.stream-state").exists()
    assert cli.main([*base, "--output", "map.npy"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*base, "--heatmap", "map.png", "--target", "2", "--overwrite"]) == 0
    with Image.open("map.png") as picture:
        assert picture.mode == "RGB"
    assert np.load("map.npy").ndim == 2
    with pytest.raises(SystemExit):
        cli.main([*base, "--max-memory", "lots"])


def test_open_source_takes_a_source_as_it_is() -> None:
    source = open_source(image(), 3)
    assert open_source(source, 3) is source
