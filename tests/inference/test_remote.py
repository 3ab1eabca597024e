"""Images in buckets are found, read and answered as those in folders are, errors included."""

from __future__ import annotations

import csv
from pathlib import Path

import fsspec
import numpy as np
import photographs
import pytest
from PIL import Image

from convmixer_fast import ConvMixer, Predictor, cli, save_checkpoint
from convmixer_fast.inference import (
    ImageError,
    Preprocessing,
    find_images,
    read_image,
    read_image_list,
    remote,
)
from convmixer_fast.inference.evaluate import labelled_images
from convmixer_fast.testing import trained_like_

pytestmark = pytest.mark.filterwarnings("ignore:left out 1 file. 1 .txt")

NAMES = ("a10.png", "a2.jpg", "a1.PNG", "b/x.png", "b/y.jpeg")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five images, one of them broken, and a file that is none."""
    root = tmp_path / "images"
    (root / "b").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in NAMES:
        photographs.picture(rng, 50, 40).save(root / name)
    (root / "b" / "y.jpeg").write_bytes((root / "b" / "y.jpeg").read_bytes()[:300])
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def bucket(folder):
    """The same in fsspec's store in memory, which has folders only in names, as buckets do."""
    store = fsspec.filesystem("memory")
    for file in (p for p in folder.rglob("*") if p.is_file()):
        store.pipe_file(f"/bucket/photos/{file.relative_to(folder)}", file.read_bytes())
    yield "memory://bucket/photos"
    store.rm("/bucket", recursive=True)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    net = ConvMixer(16, 1, kernel_size=3, patch_size=4, num_classes=3)
    save_checkpoint(trained_like_(net, (4, 3, 32, 32)), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def tails(found, root: str) -> list[str]:
    return [str(one).split(f"{root}/", 1)[1] for one in found]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["a1.PNG", "a2.jpg", "a10.png", "b/x.png", "b/y.jpeg"]),
        ("/", ["a1.PNG", "a2.jpg", "a10.png", "b/x.png", "b/y.jpeg"]),
        ("/b", ["b/x.png", "b/y.jpeg"]),
        ("/a2.jpg", ["a2.jpg"]),
        ("/notes.txt", ["notes.txt"]),
        ("/a*", ["a1.PNG", "a2.jpg", "a10.png"]),
        ("/a[0-9].*", ["a1.PNG", "a2.jpg"]),
        ("/**/*.png", ["a10.png", "b/x.png"]),
        ("/*.txt", ["notes.txt"]),
        ("/n*", None),
        ("/?", ["b/x.png", "b/y.jpeg"]),
    ],
)
def test_urls_stand_for_what_paths_stand_for(bucket, folder, pattern, expected):
    if expected is None:
        with pytest.raises(ImageError, match=r"no image"):
            find_images([bucket + pattern])
        return
    found = find_images([bucket + pattern])
    assert tails(found, "bucket/photos") == expected
    assert all(isinstance(url, str) for url in found)
    assert find_images([str(folder) + pattern]) == [folder / name for name in expected]
    assert find_images([folder.as_uri() + pattern]) == [
        (folder / name).as_uri() for name in expected
    ]


def test_images_come_out_as_from_a_file(bucket, folder):
    for name in NAMES[:-1]:
        for url in (f"{bucket}/{name}", (folder / name).as_uri()):
            assert np.array_equal(read_image(url), read_image(folder / name)), url
    with pytest.raises(ImageError, match=r"memory://.*y\.jpeg: damaged image"):
        read_image(f"{bucket}/b/y.jpeg")
    with pytest.raises(ImageError, match=r"memory://.*none\.png: no such file"):
        read_image(f"{bucket}/none.png")


def test_mixed_sources_keep_their_order(bucket, folder):
    found = find_images([folder / "b", bucket + "/b", folder / "b" / "x.png"])
    assert found[:2] == [folder / "b" / "x.png", folder / "b" / "y.jpeg"]
    assert tails(found[2:], "bucket/photos") == ["b/x.png", "b/y.jpeg"]


def test_lists_may_name_urls_or_lie_beside_a_bucket(bucket, folder, tmp_path):
    names = tmp_path / "list.csv"
    names.write_text(f"path\na1.PNG\n{bucket}/a2.jpg\n{folder}/a10.png\na1.PNG\n")
    found = read_image_list(names, root=bucket)
    assert found == [f"{bucket}/a1.PNG", f"{bucket}/a2.jpg", folder / "a10.png"]
    assert read_image_list(names, root=f"{bucket}/") == found
    names = tmp_path / "list.txt"
    names.write_text("nowhere://x/a.png\n")
    with pytest.raises(ValueError, match="nowhere"):
        read_image_list(names)


def test_what_cannot_be_reached_is_told_before_the_run(monkeypatch, bucket):
    with pytest.raises(ImageError, match=r"memory://bucket/none: no such file or folder"):
        find_images(["memory://bucket/none"])
    with pytest.raises(ValueError, match=r"nowhere://a/b: Protocol not known"):
        find_images(["nowhere://a/b"])

    def lacking(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", lacking)
    with pytest.raises(ImportError, match=r"s3://bucket/photos: Install s3fs"):
        find_images(["s3://bucket/photos"])


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError("/bucket/photos/a2.jpg"), "permission denied"),
        (PermissionError(13, "Forbidden"), "Forbidden"),
        (RuntimeError("no\n credentials"), "RuntimeError: no credentials"),
        (ConnectionResetError("peer"), "peer"),
    ],
)
def test_a_stores_own_errors_name_the_image_and_do_not_end_a_run(monkeypatch, bucket, error, says):
    store = fsspec.filesystem("memory")
    real = type(store).cat_file

    def failing(self, path, *args, **kwargs):
        if path.endswith("a2.jpg"):
            raise error
        return real(self, path, *args, **kwargs)

    monkeypatch.setattr(type(store), "cat_file", failing)
    net = ConvMixer(8, 1, kernel_size=3, patch_size=4, num_classes=3)
    predictor = Predictor(net, preprocessing=Preprocessing((3, 16, 16)))
    [outcome] = predictor.predict_files([f"{bucket}/a2.jpg", f"{bucket}/a1.PNG"])
    assert [row.filename for row in outcome.rows] == [f"{bucket}/a1.PNG"]
    assert [(f.filename, f.error) for f in outcome.failures] == [(f"{bucket}/a2.jpg", says)]


def test_a_connection_lost_while_listing_is_one_line(monkeypatch, bucket):
    def lost(self, *args, **kwargs):
        raise TimeoutError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(type(fsspec.filesystem("memory")), "find", lost)
        with pytest.raises(ImageError, match=r"memory://bucket/photos: no answer"):
            find_images([bucket])


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_gives_the_same_rows_and_goes_on(bucket, folder, checkpoint, tmp_path, capsys):
    out, local = tmp_path / "out.csv", tmp_path / "local.csv"
    options = ["--checkpoint", str(checkpoint), "--img-size", "32", "--no-console-results"]
    assert cli.main(["predict", f"{bucket}/a*", *options, "--results-file", str(out)]) == 0
    again = [*options, "--results-file", str(out), "--resume"]
    assert cli.main(["predict", bucket, *again]) == 0
    assert "3 were there already" in capsys.readouterr().err
    assert cli.main(["predict", str(folder), *options, "--results-file", str(local)]) == 0
    for name in ("{}.csv", "{}.errors.csv"):
        there, here = (read(tmp_path / name.format(p.stem)) for p in (out, local))
        for a, b in zip(there, here, strict=True):
            tail = tails([a.pop("filename")], "bucket/photos")
            assert [b.pop("filename")] == [str(folder / tail[0])]
            assert a == b


def test_heatmaps_of_urls_have_places_of_their_own(bucket, checkpoint, tmp_path):
    out = tmp_path / "maps"
    options = ["--checkpoint", str(checkpoint), "--img-size", "32", "--no-console-results"]
    assert cli.main(["predict", f"{bucket}/a2.jpg", *options, "--heatmap", str(out)]) == 0
    [picture] = out.rglob("*.png")
    assert picture.name == "a2.jpg.png"
    with Image.open(picture) as image:
        assert image.size == (32, 32)


@pytest.mark.parametrize("flag", ["--results-file", "--results-dir", "--errors-file", "--heatmap"])
def test_results_stay_on_this_machine(bucket, checkpoint, capsys, flag):
    out = [] if flag.startswith("--results") else ["--results-file", "out.csv"]
    args = ["predict", bucket, "--checkpoint", str(checkpoint), *out, flag, "s3://bucket/out"]
    assert cli.main(args) == 2
    assert f"{flag} s3://bucket/out: results are written on this" in capsys.readouterr().err
    assert not Path("s3:").exists()


def test_labels_come_from_a_buckets_folders(bucket):
    store = fsspec.filesystem("memory")
    store.rm_file("/bucket/photos/b/y.jpeg")
    paths, targets, names = labelled_images(bucket, 2)
    assert names == ["b", "photos"]
    assert targets == [1, 1, 1, 0]
    assert len(paths) == 4


@pytest.mark.parametrize("name", ["C:\\photos\\a.png", "a:/x", "photos/a.png", "a b://c", "://x"])
def test_paths_are_no_urls(name):
    assert not remote.is_url(name)
    assert remote.located(name) == Path(name)
