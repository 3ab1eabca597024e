"""Accuracy is counted as by hand and told in timm's keys; wrong labels are refused, not counted."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import photographs
import pytest
import torch
from PIL import Image

from convmixer_fast import ConvMixer, Predictor, cli, save_checkpoint
from convmixer_fast.demo import plain_twin
from convmixer_fast.inference import Preprocessing
from convmixer_fast.inference.evaluate import evaluate, labelled_images
from convmixer_fast.testing import trained_like_

CLASSES = ("ant", "bee", "cat 2", "cat 10", "dog", "eel", "fox")
COUNTS = (5, 1, 4, 3, 2, 6, 4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "w.safetensors"
    net = ConvMixer(16, 2, kernel_size=3, patch_size=4, num_classes=len(CLASSES))
    save_checkpoint(trained_like_(net, (4, 3, 32, 32)), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(2)
    for name, count in zip(CLASSES, COUNTS, strict=True):
        (root / name).mkdir()
        for i in range(count):
            photographs.picture(rng, 40, 50).save(root / name / f"{i}.png")
    (root / "ant" / "cut.jpg").write_bytes(b"")
    return root


def by_hand(checkpoint: Path, folder: Path) -> tuple[list[int], list[list[int]]]:
    """The true class and the ranked classes of each image, by the plain model."""
    plain = plain_twin(ConvMixer.from_checkpoint(checkpoint))
    prepare = Preprocessing((3, 32, 32), crop_pct=0.96)
    true, ranked = [], []
    for target, name in enumerate(CLASSES):
        for path in sorted((folder / name).glob("*.png")):
            with Image.open(path) as image, torch.inference_mode():
                scores = plain(prepare(image.convert("RGB"))[None])[0]
            true.append(target)
            ranked.append(scores.argsort(descending=True).tolist())
    return true, ranked


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_figures_are_those_counted_by_hand_under_timms_keys(capsys, tmp_path, checkpoint, folder):
    files = {name: tmp_path / f"{name}.csv" for name in ("results", "confusion", "classes")}
    code, out, err = run(
        capsys, "evaluate", folder, "--checkpoint", checkpoint, "--img-size", 32, "-b", 4,
        "--results-file", files["results"], "--confusion", files["confusion"],
        "--per-class", files["classes"],
    )  # fmt: skip
    assert code == 0, err
    assert "skipped" in err
    assert "cut.jpg: the file is empty" in err
    assert out.startswith("--result\n")
    found = json.loads(out.removeprefix("--result\n"))
    true, ranked = by_hand(checkpoint, folder)
    top1 = 100 * np.mean([r[0] == t for t, r in zip(true, ranked, strict=True)])
    top5 = 100 * np.mean([t in r[:5] for t, r in zip(true, ranked, strict=True)])
    assert 0 < top1 < top5 < 100, "the case would not tell these apart"
    assert found["top1"] == round(top1, 4)
    assert found["top1_err"] == round(100 - top1, 4)
    assert found["top5"] == round(top5, 4)
    assert found["top5_err"] == round(100 - top5, 4)
    assert (found["images"], found["failed"], found["img_size"]) == (25, 1, 32)
    assert {"model", "param_count", "crop_pct", "interpolation"} <= found.keys()
    with open(files["results"], newline="") as file:
        assert float(next(csv.DictReader(file))["top1"]) == found["top1"]

    expected = np.zeros((7, 7), int)
    for t, r in zip(true, ranked, strict=True):
        expected[t, r[0]] += 1
    with open(files["confusion"], newline="") as file:
        header, *lines = csv.reader(file)
    assert header[1:] == [line[0] for line in lines] == list(CLASSES)
    assert [[int(v) for v in line[1:]] for line in lines] == expected.tolist()
    with open(files["classes"], newline="") as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    for i, name in enumerate(CLASSES):
        assert int(rows[name]["images"]) == COUNTS[i]
        assert float(rows[name]["top1"]) == round(100 * expected[i, i] / COUNTS[i], 4)
        predicted = expected[:, i].sum()
        precision = rows[name]["precision"]
        assert (precision == "") == (predicted == 0)
        assert not predicted or float(precision) == round(100 * expected[i, i] / predicted, 4)
        five = [t in r[:5] for t, r in zip(true, ranked, strict=True) if t == i]
        assert float(rows[name]["top5"]) == round(100 * np.mean(five), 4)


def test_a_class_map_sets_the_order_and_allows_folders_to_be_absent(
    capsys, tmp_path, checkpoint, folder
):
    names = tmp_path / "map.txt"
    few = tmp_path / "few"
    few.mkdir()
    for name in ("dog", "fox"):
        (few / name).symlink_to(folder / name)
    arguments = ("evaluate", few, "--checkpoint", checkpoint, "--img-size", 32)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "has 2 folders of images and the model 7 classes: pass --class-map" in err
    true, ranked = by_hand(checkpoint, folder)
    for order in (CLASSES, CLASSES[::-1]):
        names.write_text("\n".join(order))
        code, out, _ = run(capsys, *arguments, "--class-map", names)
        assert code == 0
        hits = [
            CLASSES[t] == order[r[0]]
            for t, r in zip(true, ranked, strict=True)
            if CLASSES[t] in ("dog", "fox")
        ]
        found = json.loads(out.removeprefix("--result\n"))
        assert found["top1"] == round(100 * np.mean(hits), 4)
    names.write_text("\n".join(["a", "b", "c", "d", "e", "f", "g"]))
    code, _, err = run(capsys, *arguments, "--class-map", names)
    assert code == 2
    assert "'dog' in" in err
    assert "is no class of the class map" in err


def test_what_cannot_be_evaluated_is_one_line(capsys, tmp_path, checkpoint, folder):
    (tmp_path / "empty").mkdir()
    good = ("--checkpoint", checkpoint, "--img-size", 32)
    for arguments, says in [
        ((tmp_path / "empty", *good), "no images in"),
        ((*good,), "name the folder of labelled images"),
        ((folder, *good, "--on-error", "stop"), "cut.jpg: the file is empty"),
        ((folder, *good, "--confusion", tmp_path / "no" / "c.csv"), "there is no folder"),
        ((folder,), "pass --checkpoint FILE or --pretrained"),
        ((folder, *good, "-j", -2), "--workers must not be negative"),
    ]:
        code, out, err = run(capsys, "evaluate", *arguments)
        assert (code, out) == (2, "")
        assert says in err.splitlines()[-1]


def test_timm_finds_the_same_classes_in_the_folder(folder):
    reader = pytest.importorskip("timm.data.readers.reader_image_folder")
    theirs, index = reader.find_images_and_targets(str(folder))
    paths, targets, names = labelled_images(folder, len(CLASSES))
    assert names == sorted(index, key=index.get) == list(CLASSES)
    assert list(zip(map(str, paths), targets, strict=True)) == theirs


def test_a_predictor_of_too_few_classes_is_refused(checkpoint, folder):
    predictor = Predictor(checkpoint, topk=1)
    with pytest.raises(ValueError, match="the 5 likeliest classes"):
        evaluate(predictor, *labelled_images(folder, len(CLASSES)))
