"""Nothing in a folder, a pattern or a list is passed over without a word, and nothing hangs."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
import types
import warnings
from pathlib import Path

import fresh_python
import fsspec
import numpy as np
import pytest
from PIL import Image, ImageFile

from convmixer_fast import ConvMixer, Predictor, cli, save_checkpoint
from convmixer_fast.inference import (
    ImageError,
    LeftOut,
    Preprocessing,
    find_images,
    images,
    open_source,
    read_image,
    read_image_list,
    readable_suffixes,
)
from convmixer_fast.inference.evaluate import labelled_images
from convmixer_fast.testing import trained_like_

MIXED = ("a.jpg", "b.webp", "c.tif", "d.bmp", "e.gif", "sub/f.avif", "sub/g.JPEG", "sub/h.jp2",
         "i.pcx", "j.tga", "k.ppm")  # fmt: skip
OTHERS = ("notes.txt", "README", ".hidden", "sub/labels.json")


def save(path: Path, kind: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, kind)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of many suffixes, and files that are none."""
    root = tmp_path / "photos"
    for name in MIXED:
        save(root / name)
    for name in OTHERS:
        (root / name).write_text("no image")
    return root


@pytest.fixture
def bucket(folder: Path):
    store = fsspec.filesystem("memory")
    for file in (p for p in folder.rglob("*") if p.is_file()):
        store.pipe_file(f"/mixed/{file.relative_to(folder)}", file.read_bytes())
    yield "memory://mixed"
    store.rm("/mixed", recursive=True)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    net = ConvMixer(16, 1, kernel_size=3, patch_size=4, num_classes=3)
    save_checkpoint(trained_like_(net, (4, 3, 32, 32)), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def tails(found, root: object) -> set[str]:
    return {str(one).split(f"{root}/", 1)[1] for one in found}


@pytest.mark.parametrize("suffixes", [None, ".webp", "webp, .TIF", (".jpg", "gif"), "all", "*"])
@pytest.mark.parametrize("pattern", ["", "/*", "/**", "/**/*", "/sub", "/[a-k].*"])
@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_every_file_is_taken_or_named(request, place, pattern, suffixes):
    root = request.getfixturevalue(place)
    options = {} if suffixes is None else {"suffixes": suffixes}
    left_out = LeftOut()
    base = "mixed" if place == "bucket" else root
    everything = tails(find_images([f"{root}{pattern}"], "*"), base)
    wanted = {
        None: {".png", ".jpg", ".jpeg"}, ".webp": {".webp"}, "webp, .TIF": {".webp", ".tif"},
        (".jpg", "gif"): {".jpg", ".gif"}, "all": readable_suffixes(),
        "*": {Path(name).suffix.lower() for name in everything},
    }[suffixes]  # fmt: skip
    expected = {name for name in everything if Path(name).suffix.lower() in wanted}
    if not expected:
        with pytest.raises(ImageError, match="no images in") as caught:
            find_images([f"{root}{pattern}"], **options)
        assert all(Path(name).suffix.lower() in str(caught.value) for name in everything)
        return
    found = find_images([f"{root}{pattern}"], left_out=left_out, **options)
    taken, left = tails(found, base), tails(left_out.files, base)
    assert taken | left == everything
    assert not taken & left
    assert taken == expected
    if suffixes == "all":
        assert left <= set(OTHERS)
    said = str(left_out)
    assert "\n" not in said
    for name in left:
        assert (Path(name).suffix.lower() or "without a suffix") in said
    assert (f"left out {len(left)} file" in said) == bool(left)


def test_the_words_count_name_and_tell_the_way(folder):
    with pytest.warns(UserWarning, match="left out 13 files: ") as told:
        find_images([folder])
    said = str(told[0].message)
    assert told[0].filename == __file__
    assert f"1 .webp ({folder / 'b.webp'})" in said
    assert "2 without a suffix" in said
    assert "suffixes='all' (--suffixes all) takes .avif, .bmp, .gif, .jp2, .pcx, .ppm, .tga" in said
    assert "suffixes='*'" in said
    for i in range(30):
        (folder / f"n.kind{i}").touch()
        (folder / f"x{i}.txt").touch()
    left_out = LeftOut()
    find_images([folder], left_out=left_out)
    assert "left out 73 files" in str(left_out)
    assert len(str(left_out)) < 4000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_images([folder / "a.jpg", folder / "b.webp", folder / "*.tif"])
        # What a folder leaves out and another path names is not left out.
        find_images([folder, *left_out.files])


def test_suffixes_that_name_nothing_are_refused(folder):
    for suffixes in ("", ",", ()):
        with pytest.raises(ValueError, match=r"suffixes .* name none"):
            find_images([folder], suffixes)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_names_what_it_left_out_and_takes_it(capsys, folder, checkpoint, tmp_path):
    out = tmp_path / "r.csv"
    base = ["predict", str(folder), "--checkpoint", str(checkpoint), "--img-size", "32",
            "--no-console-results", "--results-file", str(out)]  # fmt: skip
    assert cli.main(base) == 0
    said = capsys.readouterr().err
    for word in (".webp", ".tif", ".bmp", ".txt", "left out 13 files", "--suffixes all"):
        assert word in said
    assert len(rows(out)) == 2
    assert cli.main([*base, "--overwrite", "--suffixes", "all"]) == 0
    assert tails([row["filename"] for row in rows(out)], folder) == set(MIXED)
    said = capsys.readouterr().err
    assert "left out 4 files" in said
    assert "--suffixes all" not in said
    assert cli.main([*base, "--overwrite", "--suffixes", "*"]) == 0
    bad = rows(tmp_path / "r.errors.csv")
    assert tails([row["filename"] for row in bad], folder) == set(OTHERS)
    names = tmp_path / "list.csv"
    names.write_text("path,n\nb.webp,1\n,2\nc.tif,3\n,4\n")
    listed = ["--image-list", str(names), "--data-dir", str(folder), "--overwrite"]
    assert cli.main([base[0], *base[2:], *listed]) == 0
    assert "left out 2 rows that name no file" in capsys.readouterr().err
    assert len(rows(out)) == 2


def test_lists_name_their_empty_rows(tmp_path):
    (tmp_path / "list.csv").write_text("path,n\na.png,1\n,2\n")
    with pytest.warns(UserWarning, match=r"list\.csv: left out 1 row that name"):
        found = read_image_list(tmp_path / "list.csv")
    assert found == [Path("a.png")]
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pa.table({"path": ["a.png", None, "", "b.png"]})
    pyarrow.parquet.write_table(table, tmp_path / "list.parquet")
    left_out = LeftOut()
    assert len(read_image_list(tmp_path / "list.parquet", left_out=left_out)) == 2
    assert left_out.nameless == 2


def test_evaluation_names_what_it_left_out_and_takes_it(capsys, checkpoint, tmp_path):
    root = tmp_path / "labelled"
    for name in ("x/1.png", "x/2.webp", "y/1.png", "y/2.tif", "z/1.webp"):
        save(root / name)
    base = ["evaluate", str(root), "--checkpoint", str(checkpoint), "--img-size", "32"]
    # Class z has nothing but a WebP file: the number of classes is wrong, and that is said.
    assert cli.main(base) == 2
    said = capsys.readouterr().err
    assert "2 folders of images and the model 3 classes" in said
    assert "left out 3 files: 1 .tif" in said
    assert cli.main([*base, "--suffixes", "all"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out.split("--result\n")[1])["images"] == 5
    assert "left out" not in shown.err
    with pytest.warns(UserWarning, match=r"left out 3 files"):
        labelled_images(root, 2)


def test_a_folder_is_no_image_for_stream(folder):
    with pytest.raises(ImageError, match=r"photos: a folder, and no zarr array: .*find_images"):
        open_source(folder, 3)


# Formats


class Flat(ImageFile.ImageFile):
    format = "FLAT"

    def _open(self):
        self._mode, self._size, self.tile = "RGB", (48, 40), []

    def load(self):
        self.im = Image.new("RGB", self._size, (90, 30, 20)).im


@pytest.fixture
def plugin():
    Image.register_open("FLAT", Flat, lambda start: start.startswith(b"FLAT"))
    Image.register_extensions("FLAT", [".flat", ".FLT"])
    yield
    Image.ID.remove("FLAT")
    del Image.OPEN["FLAT"]
    for suffix in (".flat", ".flt"):
        Image.EXTENSION.pop(suffix, None)


@pytest.mark.usefixtures("plugin")
def test_what_a_plugin_teaches_pillow_is_read_found_and_streamed(tmp_path):
    for name in ("x.flat", "x.jpg", "nameless"):
        (tmp_path / name).write_bytes(b"FLAT and more")
        assert read_image(tmp_path / name).getpixel((0, 0)) == (90, 30, 20)
        assert open_source(tmp_path / name, 3).read(0, 1)[0, :, 0, 0].tolist() == [90, 30, 20]
    assert {".flat", ".flt"} <= readable_suffixes()
    assert len(find_images([tmp_path], "all", LeftOut())) == 2
    with pytest.warns(UserWarning, match=r"--suffixes all\) takes \.flat"):
        find_images([tmp_path])


def test_plugins_that_are_installed_are_registered(tmp_path, monkeypatch):
    heif = types.ModuleType("pillow_heif")
    heif.register_heif_opener = lambda: Image.register_extensions("PNG", [".heic"])
    (tmp_path / "a.png").touch()
    (tmp_path / "b.heic").touch()
    left_out = LeftOut()
    find_images([tmp_path], left_out=left_out)
    if ".heic" not in readable_suffixes():
        assert "pip install pillow-heif reads .heic" in str(left_out)
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.EXTENSION))
    monkeypatch.setitem(sys.modules, "pillow_heif", heif)
    images._load_plugins.cache_clear()
    try:
        assert "(--suffixes all) takes .heic" in str(left_out)
    finally:
        images._load_plugins.cache_clear()


@pytest.mark.filterwarnings("ignore:IM image format is deprecated")
@pytest.mark.parametrize("kind", ["PCX", "SGI", "QOI", "DDS", "IM", "TGA", "PPM", "JPEG2000"])
def test_what_image_open_reads_is_read(tmp_path, kind):
    save(tmp_path / "image", kind)
    with Image.open(tmp_path / "image") as expected:
        assert np.array_equal(read_image(tmp_path / "image"), expected.convert("RGB"))


# Special files


def make_special(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            here = os.getcwd()
            os.chdir(path.parent)  # a socket's name is short
            try:
                one.bind(path.name)
            finally:
                os.chdir(here)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to a pipe":
        os.mkfifo(path.parent / "elsewhere")
        path.symlink_to(path.parent / "elsewhere")
    else:
        path.symlink_to(path.parent / "nothing")


SPECIAL = {
    "pipe": "a named pipe, not a regular file",
    "socket": "a socket, not a regular file",
    "device": "a device, not a regular file",
    "link to a pipe": "a named pipe, not a regular file",
    "dangling link": "No such file",
}
needs_posix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX's special files")


@needs_posix
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("suffix", [".jpg", ".npy", ".tif", ".png"])
def test_special_files_are_refused_by_every_reader(tmp_path, kind, suffix):
    path = tmp_path / f"b{suffix}"
    make_special(path, kind)
    net = ConvMixer(8, 1, kernel_size=3, patch_size=4, num_classes=3)
    readers = (read_image, Predictor(net), lambda p: read_image(p.as_uri()))
    for reader in readers:
        with pytest.raises(ImageError, match=rf"{path.name}: .*(?i:{SPECIAL[kind]})"):
            reader(path)
    with pytest.raises(ImageError, match=rf"{path.name}: {SPECIAL[kind].lower()}"):
        open_source(path, 3)


@needs_posix
@pytest.mark.parametrize("way", ["folder", "pattern", "list", "name", "url", "url pattern"])
def test_a_run_over_special_files_ends_and_each_is_named(tmp_path, checkpoint, way):
    photos = tmp_path / "photos"
    save(photos / "a.jpg")
    save(tmp_path / "real.jpg")
    (photos / "link.jpg").symlink_to(tmp_path / "real.jpg")
    for i, kind in enumerate(SPECIAL):
        make_special(photos / f"s{i}.jpg", kind)
    (tmp_path / "list.txt").write_text("\n".join(p.name for p in photos.glob("*.jpg")))
    given = {
        "folder": [str(photos)],
        "pattern": [f"{photos}/*.jpg"],
        "list": ["--image-list", str(tmp_path / "list.txt"), "--data-dir", str(photos)],
        "name": [str(p) for p in photos.glob("*.jpg") if p.name != "s4.jpg"],
        "url": [photos.as_uri()],
        "url pattern": [f"{photos.as_uri()}/*.jpg"],
    }[way]
    out = tmp_path / "r.csv"
    command = ["-m", "convmixer_fast", "predict", *given, "--checkpoint", str(checkpoint),
               "--img-size", "32", "--results-file", str(out)]  # fmt: skip
    process = fresh_python.start(*command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert {Path(row["filename"]).name for row in rows(out)} == {"a.jpg", "link.jpg"}
    failed = {Path(row["filename"]).name: row["error"] for row in rows(tmp_path / "r.errors.csv")}
    for i, words in enumerate(SPECIAL.values()):
        if (way, i) != ("name", 4):
            assert words.lower() in failed.pop(f"s{i}.jpg").lower()
    assert not failed
    assert "elsewhere" in said or way not in ("folder", "url")  # of no suffix, left out


# Patterns


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("photos [2024]/*.jpg", ["photos [2024]/a.jpg", "photos [2024]/b[1].jpg"]),
        ("photos [2024]/b[1].jpg", ["photos [2024]/b[1].jpg"]),
        ("photos [2024]/b[1]*", ["photos [2024]/b[1].jpg"]),
        ("photos [2024]/[ab].jpg", ["photos [2024]/a.jpg"]),
        ("photos [2024]/**/*.jpg",
         ["photos [2024]/a.jpg", "photos [2024]/b[1].jpg", "photos [2024]/in [x]/c.jpg"]),
        ("photos [2024]/**/in [x]/*.jpg", ["photos [2024]/in [x]/c.jpg"]),
        ("*/in [x]/*.jpg", ["photos [2024]/in [x]/c.jpg"]),
        ("photos [[]2024]/a.*", ["photos [2024]/a.jpg"]),
        ("photos [2024]", ["photos [2024]/a.jpg", "photos [2024]/b[1].jpg",
                           "photos [2024]/in [x]/c.jpg"]),
        ("set[12]/*.jpg", ["set1/d.jpg", "set2/e.jpg"]),
        ("set[12]/[de].jpg", ["set1/d.jpg", "set2/e.jpg"]),
        ("both[1]/*.jpg", ["both[1]/g.jpg"]),
        ("[p-s]*/*.jpg", ["photos [2024]/a.jpg", "photos [2024]/b[1].jpg", "set1/d.jpg",
                          "set2/e.jpg"]),
        ("photos [2025]/*.jpg", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["path", "file", "memory"])
def test_brackets_are_literal_where_they_are_in_a_name(tmp_path, place, pattern, expected):
    root = tmp_path / "root [a]"
    store = fsspec.filesystem("memory")
    base = {"path": str(root), "file": root.as_uri().replace("%20", " ").replace("%5B", "[")
            .replace("%5D", "]"), "memory": "memory://root [a]"}[place]  # fmt: skip
    names = ("photos [2024]/a.jpg", "photos [2024]/b[1].jpg", "photos [2024]/in [x]/c.jpg",
             "set1/d.jpg", "set2/e.jpg", "both1/f.jpg", "both[1]/g.jpg")  # fmt: skip
    try:
        for name in names:
            save(root / name)
            store.pipe_file(f"/root [a]/{name}", (root / name).read_bytes())
        if expected is None:
            with pytest.raises(ImageError, match="no image"):
                find_images([f"{base}/{pattern}"])
            return
        found = find_images([f"{base}/{pattern}"])
        assert [str(one).split("root [a]/", 1)[1] for one in found] == expected
        for one in found:
            assert read_image(one).size == (50, 40)
    finally:
        for name in names:
            store.rm_file(f"/root [a]/{name}")


def test_images_with_brackets_are_predicted(tmp_path):
    save(tmp_path / "in [x]" / "a[1].png")
    net = ConvMixer(8, 1, kernel_size=3, patch_size=4, num_classes=3)
    predictor = Predictor(net, preprocessing=Preprocessing((3, 16, 16)))
    [outcome] = predictor.predict_files(find_images([tmp_path / "in [x]" / "*.png"]))
    assert [Path(row.filename).name for row in outcome.rows] == ["a[1].png"]
