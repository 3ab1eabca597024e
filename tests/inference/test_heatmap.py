"""Every image of a run gets its class activation map, once, and whole."""

from __future__ import annotations

import csv
import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convmixer_fast import ConvMixer, cli, save_checkpoint
from convmixer_fast.inference import (
    HeatmapFolder,
    Predictor,
    class_activation_map,
    load_image,
    overlay,
    preprocessing_for,
)
from convmixer_fast.testing import trained_like_

SIDE = 34  # not whole patches: the map covers 32 of it


@pytest.fixture(scope="module")
def model() -> ConvMixer:
    net = ConvMixer(16, 2, kernel_size=3, patch_size=4, num_classes=6)
    return trained_like_(net, (4, 3, 32, 32))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: ConvMixer) -> Path:
    """The folder that commands run in: a model, and five images of two forms in ``photos``."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint(model, "m.safetensors")
    rng = np.random.default_rng(0)
    for name in ("1.png", "1.jpg", "b/1.png", "b/2.jpeg", "b/3.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        size = tuple(rng.integers(40, 60, 2))
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return tmp_path


def predict(*more: object) -> int:
    arguments = ["predict", "photos", "--checkpoint", "m.safetensors", "--img-size", SIDE,
                 "-b", 2, "-j", 1, "--no-console-results", *more]  # fmt: skip
    return cli.main([str(a) for a in arguments])


def names(path: str) -> list[str]:
    with open(path, newline="") as file:
        return [row["filename"] for row in csv.DictReader(file)]


def drawn(folder: str = "maps") -> set[str]:
    return {str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()}


EVERY = {
    f"photos/{name}.{kind}"
    for name in ("1.png", "1.jpg", "b/1.png", "b/2.jpeg", "b/3.png")
    for kind in ("png", "npy")
}


@pytest.mark.parametrize("target", [None, 4])
def test_every_image_gets_the_map_of_its_class_over_what_the_model_saw(
    folder: Path, model: ConvMixer, target: int | None
) -> None:
    chosen = [] if target is None else ["--target", target]
    assert predict("--heatmap", "maps", "--results-file", "r.csv", *chosen) == 0
    assert predict("--results-file", "plain.csv") == 0
    assert Path("r.csv").read_bytes() == Path("plain.csv").read_bytes()
    assert drawn() == EVERY
    prepare = preprocessing_for(model, img_size=SIDE)
    for name in names("r.csv"):
        x = load_image(name, prepare)
        expected = class_activation_map(model, x[None], target)
        scores = np.load(f"maps/{name}.npy")
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected.scores[0], rtol=1e-5, atol=1e-6)
        seen = x[:, :32, :32].permute(1, 2, 0) * torch.tensor(prepare.std)
        seen = (seen + torch.tensor(prepare.mean)).mul(255).round().to(torch.uint8)
        picture = overlay(scores, Image.fromarray(seen.numpy()))
        with Image.open(f"maps/{name}.png") as got:
            assert got.size == (32, 32)
            # Colours in between round either way with the last bits of the scores.
            difference = np.abs(np.asarray(got).astype(int) - np.asarray(picture))
        assert difference.max() <= 1


def test_images_as_large_as_they_are(folder: Path) -> None:
    assert predict("--native-size", "--heatmap", "maps") == 0
    for name in ("1.png", "b/2.jpeg"):
        with Image.open(f"photos/{name}") as image, Image.open(f"maps/photos/{name}.png") as got:
            assert got.size == (image.width // 4 * 4, image.height // 4 * 4)
            scores = np.load(f"maps/photos/{name}.npy")
            assert scores.shape == (image.height // 4, image.width // 4)


class _Cut(Exception):
    """The run ends here."""


def test_a_run_that_was_cut_off_draws_what_is_missing_and_repeats_no_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("photos/b/broken.png").write_bytes(b"no image")
    real = Predictor.rows
    calls = []

    def rows(self: Predictor, *args: Any) -> Any:
        calls.append(args[0])
        if len(calls) == 2:
            # The maps are there, the rows are not: a kill between the two.
            real(self, *args)
            raise _Cut
        return real(self, *args)

    monkeypatch.setattr(Predictor, "rows", rows)
    options = ["--heatmap", "maps", "--results-file", "r.csv", "--part-seconds", 0]
    with pytest.raises(_Cut):
        predict(*options)
    monkeypatch.setattr(Predictor, "rows", real)
    kept = names("r.csv.parts/part-00000000.csv")
    assert len(kept) == 2
    assert {f"{name}.npy" for name in kept} < drawn() < EVERY
    before = {name: os.stat(f"maps/{name}.png").st_mtime_ns for name in kept}
    assert predict(*options, "--resume") == 0
    assert sorted(names("r.csv")) == sorted({e[:-4] for e in EVERY})
    assert names("r.errors.csv") == ["photos/b/broken.png"]
    assert drawn() == EVERY
    assert before == {name: os.stat(f"maps/{name}.png").st_mtime_ns for name in kept}


def test_a_finished_run_gets_the_maps_that_it_lacks(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("photos/b/broken.png").write_bytes(b"no image")
    assert predict("--results-file", "r.csv") == 0
    rows, errors = Path("r.csv").read_bytes(), Path("r.errors.csv").read_bytes()
    assert predict("--results-file", "r.csv", "--heatmap", "maps", "--resume") == 0
    assert drawn() == EVERY
    Path("maps/photos/b/3.png.npy").unlink()
    capsys.readouterr()
    assert predict("--results-file", "r.csv", "--heatmap", "maps", "--resume") == 0
    assert drawn() == EVERY
    assert "1 image in" in capsys.readouterr().err
    assert (Path("r.csv").read_bytes(), Path("r.errors.csv").read_bytes()) == (rows, errors)


def test_maps_are_replaced_only_when_that_is_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict("--heatmap", "maps", "--target", 1) == 0
    before = np.load("maps/photos/1.png.npy")
    assert predict("--heatmap", "maps", "--target", 2) == 2
    assert "maps/photos/1." in (error := capsys.readouterr().err)
    assert "--overwrite" in error
    np.testing.assert_array_equal(np.load("maps/photos/1.png.npy"), before)
    assert predict("--heatmap", "maps", "--target", 2, "--overwrite") == 0
    assert not np.array_equal(np.load("maps/photos/1.png.npy"), before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--target", 1], "--target is for --heatmap"),
        (["--heatmap", "maps", "--target", 6], "there is no class 6: the model has 0 to 5"),
        (["--heatmap", "photos/maps"], "lies in photos"),
        (["--heatmap", "m.safetensors"], "is a file: name a folder"),
        (["--heatmap", "maps", "--engine", "ray"], "leave --engine ray out"),
        (
            ["--heatmap", "maps", "--output-type", "embedding", "--results-file", "r.csv"],
            "a heatmap is of a class",
        ),
        (["--heatmap", "maps", "--image-list", "twins.txt"], "give them a folder each"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[Any], says: str
) -> None:
    twins = (f"../{folder.name}/photos/1.png", f"__/{folder.name}/photos/1.png")
    Path("twins.txt").write_text("\n".join(twins))
    before = sorted(folder.rglob("*"))
    assert predict(*options) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert sorted(folder.rglob("*")) == before


def test_a_full_disk_is_named_and_leaves_no_half_of_a_map(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Image.Image.save

    def save(self: Image.Image, file: Any, **options: Any) -> None:
        if "2.jpeg" in file.name:
            file.write(b"some bytes")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, file, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    options = ["--heatmap", "maps", "--results-file", "r.csv"]
    assert predict(*options) == 2
    assert "maps/photos/b/2.jpeg.png: No space left" in capsys.readouterr().err
    assert not any("partial" in name or name.endswith("2.jpeg.png") for name in drawn())
    monkeypatch.setattr(Image.Image, "save", real)
    assert predict(*options, "--resume") == 0
    assert drawn() == EVERY
    assert len(names("r.csv")) == 5


def test_names_stay_within_the_folder() -> None:
    maps = HeatmapFolder("maps")
    for given, kept in (
        ("a/b.jpg", "a/b.jpg"),
        ("./a/../b.jpg", "b.jpg"),
        ("../../b.jpg", "__/__/b.jpg"),
        ("/data/b.jpg", "data/b.jpg"),
    ):
        assert maps.places(given) == (Path(f"maps/{kept}.png"), Path(f"maps/{kept}.npy"))
